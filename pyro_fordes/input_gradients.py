r"""The space of input gradients: what a network's output depends on, point by point.

`InputGradients.capture` keeps the outputs of each particle's run, and `InputGradients.represent`
differentiates them by the input, outside of the vectorised call.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from pyro.distributions import Categorical, OneHotCategorical
from torch import Tensor

from pyro_fordes._checks import ArgumentError, ModelError, check_number, describe
from pyro_fordes.lengthscales import Lengthscale, identity_lengthscale
from pyro_fordes.particles import Call, Evaluation, Setting
from pyro_fordes.perturbation import Activation
from pyro_fordes.sites import base_distribution, observed_sites
from pyro_fordes.spaces import Output


@dataclass(frozen=True)
class InputGradients:
    r"""Gradients of a model output by a model input, one point per row of the input.

    .. math:: r_{ib} = \Sigma^{-1/2} U^T \frac{g}{\sqrt{\lVert g\rVert^2 + \epsilon^2}},
        \qquad g = \nabla_{x_b} f(x_b; \theta_i)_{y_b}

    Source: FoRDE (ICLR 2024), Section 3.2, Eq. 9 to 17, Algorithm 1.

    Where the output has a class axis beyond the observed site's batch shape, the observed label
    picks the entry. Other axes after the first are outputs of their own: each costs one more pass,
    and each output at each row is a point. A gradient of exactly zero has no direction: it is
    represented by zero and feels no force at that point.

    With ``points``, the model is run once more in each step, on a random part of the batch: the
    tensors among its arguments whose first axis is as long as the input's, cut to the same rows for
    all particles. The repulsive force is not rescaled, since it is that of a mean over points.
    BatchNorm in train mode then uses the statistics of these points in that run (the running
    statistics see the whole batch only), and dropout draws masks of its own.

    Args:
        input: name or position of the model argument to differentiate by: a floating tensor whose
            first axis is that of the data points. Or the path of a submodule that is called once:
            gradients are then by its output, such as token embeddings or the features of a
            backbone. The name of an argument comes before a path.
        output: what is differentiated: the name of a ``pyro.deterministic`` site or an observed
            site, the path of a submodule (its output), a function of the trace, or a sequence of
            these. None takes the model's only observed site. Of an observed site, the log
            probability of the observed value is taken where it is discrete, and the location (mean)
            of its distribution where it is continuous. The paper differentiates the raw logit of
            the observed class; ``torch``'s Categorical keeps normalised logits only, so name the
            site or submodule that has the raw ones.
        lengthscale: metric on the normalised gradients, None for the identity; see
            `pca_lengthscale`.
        normalize: whether gradients are scaled to unit length. Inputs with a single feature need
            ``False``.
        eps: :math:`\epsilon`, in units of the gradient.
        points: at how many points of a batch particles are compared, a number or (as a float) a
            share of the batch, at least one; drawn at random in each step. None for all. Where the
            batch is split over processes, so many of each share.

    Raises:
        ArgumentError: if an argument is of the wrong kind or, when the driver starts, does not fit
            the model.

    Example:
        >>> InputGradients("x", output="logits").input
        'x'
        >>> InputGradients("encoder.embedding", points=0.25).count(128)
        32
    """

    input: int | str = 0
    output: Output | Sequence[Output] | None = None
    lengthscale: Lengthscale | None = None
    normalize: bool = True
    eps: float = 1e-12
    points: int | float | None = None
    submodules: tuple[str, ...] = ()
    own_values: bool = False
    has_scores: bool = False
    share_axis: int = 1

    def __post_init__(self) -> None:
        """Check the arguments that do not depend on a model."""
        check_number("InputGradients(eps=...)", self.eps, minimum=0.0, exclusive=True)
        if isinstance(self.input, bool) or not isinstance(self.input, int | str):
            raise ArgumentError(
                f"InputGradients(input=...) must be the name or position of a model argument or "
                f"the path of a submodule, got {self.input!r}"
            )
        given = self.output if isinstance(self.output, tuple | list) else [self.output]
        for output in given:
            if output is not None and not isinstance(output, str) and not callable(output):
                raise ArgumentError(
                    f"InputGradients(output=...) must be a site's name, a submodule's path, a "
                    f"function of the trace, or a list of these, got {output!r}"
                )
        if self.points is not None:
            _check_points(self.points)
        if self.lengthscale is not None and not isinstance(self.lengthscale, Lengthscale):
            raise ArgumentError(
                "InputGradients(lengthscale=...) must come from identity_lengthscale(), "
                f"pca_lengthscale(data) or tuned_lengthscale(data, alpha), got "
                f"{type(self.lengthscale).__name__}"
            )

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The outputs as a tuple."""
        if self.output is None:
            return ()
        if isinstance(self.output, str) or callable(self.output):
            return (self.output,)
        return tuple(self.output)

    def count(self, size: int) -> int:
        """At how many of so many points particles are compared."""
        if self.points is None:
            return size
        share = self.points * size if isinstance(self.points, float) else self.points
        return max(1, min(size, round(share)))

    def check(self, locate: Callable[[int | str], tuple[str, Any]]) -> None:
        """The input must be a floating-point tensor with the features of the lengthscale."""
        try:
            name, value = locate(self.input)
        except ArgumentError:
            if isinstance(self.input, str):
                return  # a submodule's path, perhaps
            raise
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0:
            got = describe(value) if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentError(
                f"InputGradients(input={self.input!r}) is the model argument '{name}', which is "
                f"{got}; gradients need a floating-point tensor (point, ...). Cast it, name "
                f"another argument or a submodule (that embeds it) with input=, or compare "
                f"particles in Weights()"
            )
        self._check_features(f"model argument '{name}'", value)

    def _check_features(self, name: str, value: Tensor) -> None:
        """Refuse a single feature, and numbers of features that the lengthscale does not have."""
        num_features = value[0].numel() if len(value) else 0
        if self.normalize and num_features == 1:
            raise ArgumentError(
                f"the {name} has a single feature per point, so normalised input gradients are all "
                f"+1 or -1 and cannot tell particles apart; use "
                f"InputGradients(..., normalize=False)"
            )
        fitted = None if self.lengthscale is None else self.lengthscale.num_features
        if fitted not in (None, num_features):
            raise ArgumentError(
                f"InputGradients(lengthscale=...) was fitted to {fitted} features, but the {name} "
                f"has {num_features} per point"
            )

    def _find(self, setting: Setting) -> tuple[str, Tensor]:
        """The argument's name and value, or the submodule's path and output."""
        try:
            return setting.locate(self.input)
        except ArgumentError as error:
            if self.input not in setting.modules:
                raise ArgumentError(
                    f"InputGradients(input={self.input!r}): {error}; nor is it the path of a "
                    f"submodule ({', '.join(setting.modules) or 'the model is no nn.Module'})"
                ) from None
        value = setting.activation(str(self.input))
        self._check_features(f"output of submodule '{self.input}'", value)
        return Activation(self.input), value

    def prepare(self, setting: Setting) -> "InputGradients":
        """Check the outputs against the model; fix what was left open."""
        name, value = self._find(setting)
        metric = self.lengthscale or identity_lengthscale()
        outputs = self.outputs or (_only_observed_site(setting.trace),)
        nodes = setting.trace.nodes
        paths = []
        for output in outputs:
            if callable(output) or (output in nodes and nodes[output]["type"] == "sample"):
                continue
            if output not in setting.modules:
                sites = [n for n, node in nodes.items() if node["type"] == "sample"]
                raise ArgumentError(
                    f"InputGradients(output={output!r}) is neither a site of the model "
                    f"({', '.join(sites)}) nor the path of a submodule "
                    f"({', '.join(setting.modules) or 'the model is no nn.Module'})"
                )
            paths.append(output)
        ready = replace(
            self,
            input=name,
            output=outputs,
            lengthscale=metric.to(value),
            submodules=tuple(paths),
        )
        return ready

    def extra(self) -> None:
        """None: gradients are those of the step's run."""

    def capture(self, call: Call) -> tuple[Tensor, ...]:
        """The outputs of one particle, each ``(point, output)``."""
        return tuple(_read_output(output, call) for output in self.outputs)

    def represent(self, evaluation: Evaluation) -> Float[Tensor, "particle point feature"]:
        """Differentiate the captured outputs by the input and normalise."""
        x = evaluation.inputs[str(self.input)]
        gradients = []
        for output, values in zip(self.outputs, evaluation.captured, strict=True):
            rows = _rows_of(values, x, evaluation, output)
            with torch.enable_grad():  # gradients are asked for without a graph of their own, too
                columns = values.unbind(-1)
            for column in columns:
                g = _gradient(column, x, output, str(self.input))
                g = g.reshape(*g.shape[:2], -1)  # an input of one axis has one feature
                gradients.append(g if rows is None else g.index_select(1, rows))
        g = torch.cat(gradients, dim=1) if len(gradients) > 1 else gradients[0]
        if self.normalize:
            g = _unit(g, self.eps)
        return (self.lengthscale or identity_lengthscale())(g)


def _check_points(points: Any) -> None:
    """Refuse what is neither a positive whole number nor a share."""
    number = isinstance(points, int | float) and not isinstance(points, bool)
    if not number or points <= 0 or (isinstance(points, float) and not points <= 1):
        raise ArgumentError(
            f"InputGradients(points=...) must be a number of points (1, 2, ...), a share of the "
            f"batch as a float above 0 and at most 1, or None for all, got {points!r}"
        )


def _unit(g: Tensor, eps: float) -> Tensor:
    """Gradients over their length, zero (with zero derivative) where they are zero."""
    squares = g.square().sum(-1, keepdim=True)
    zero = squares == 0
    length = (torch.where(zero, 1.0, squares) + eps**2).sqrt()
    return g / torch.where(zero, math.inf, length)


def _gradient(column: Tensor, x: Tensor, output: Output, name: str) -> Tensor:
    """Gradient of a sum of outputs by the stacked input, or an error where there is none."""
    gradient = None
    if column.requires_grad:
        (gradient,) = torch.autograd.grad(
            column,
            x,
            torch.ones_like(column),
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
            retain_graph=True,
        )
    if gradient is None:
        raise ModelError(
            f"the output {output!r} does not depend on the input '{name}', so it has no input "
            f"gradient; choose another with InputGradients(input=..., output=...)"
        )
    return gradient


def _rows_of(values: Tensor, x: Tensor, evaluation: Evaluation, output: Output) -> Tensor | None:
    """Which rows of the input the output's points are: all (None) or a plate's subsample."""
    num_points, num_rows = values.shape[1], x.shape[1]
    if num_points == num_rows:
        return None
    fitting = {
        name: subsample.indices
        for name, subsample in evaluation.subsamples.items()
        if len(subsample.indices) == num_points and subsample.size == num_rows
    }
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if fitting:
        raise ModelError(
            f"the output {output!r} has {num_points} points, and the plates {list(fitting)} all "
            f"draw that many of {num_rows} rows, so it cannot be told which rows they are; take an "
            f"output at all rows of the input, or minibatches of different sizes"
        )
    raise ModelError(
        f"the output {output!r} has {num_points} points, but the input has {num_rows} rows and no "
        f"plate draws that many of them; the first axis of the output must be that of the input"
    )


def _only_observed_site(trace: Any) -> str:
    """Name of the model's one observed site."""
    names = observed_sites(trace)
    if len(names) != 1:
        raise ArgumentError(
            f"InputGradients(output=None) takes the model's only observed site, but it has "
            f"{len(names)} ({', '.join(names) or 'are observations passed to the model?'}); name "
            f"a site, submodule or function with output="
        )
    return names[0]


def _read_output(output: Output, call: Call) -> Float[Tensor, "point output"]:
    """One output of one particle, the class axis removed by the observed label."""
    nodes = call.trace.nodes
    if callable(output):
        try:
            value = output(call.trace)
        except Exception as error:
            raise ModelError(
                f"the function given as InputGradients(output=...) raised "
                f"{type(error).__name__}: {error}; it is called with the Pyro trace of one particle"
            ) from error
    elif output in nodes and nodes[output]["type"] == "sample":
        site = nodes[output]
        if site["is_observed"] and output in observed_sites(call.trace):
            value = _observed_output(site["fn"], site["value"])
            return value.reshape(len(value), -1)
        value = site["value"]
    else:
        value = call.modules[output]
    if not isinstance(value, Tensor) or value.dim() == 0:
        got = describe(value) if isinstance(value, Tensor) else type(value).__name__
        raise ModelError(
            f"InputGradients(output={output!r}) gave {got}; wanted a tensor (point, ...)"
        )
    value = _pick_label(value, call)
    return value.reshape(len(value), -1)


def _observed_output(fn: Any, value: Tensor) -> Tensor:
    """Log probability of a discrete observation, or the location of a continuous one."""
    if fn.support.is_discrete:
        return fn.log_prob(value)
    location = getattr(base_distribution(fn), "loc", None)
    return fn.mean if location is None else location


def _pick_label(value: Tensor, call: Call) -> Tensor:
    """Entry of the observed class where the output has a class axis, else the output itself.

    A class axis is as long as the site has classes. Where several sites fit, it is the one whose
    log probabilities are nearest to the output's.
    """
    picked, distances = [], []
    for name in observed_sites(call.trace):
        site = call.trace.nodes[name]
        base, label = base_distribution(site["fn"]), site["value"]
        if isinstance(base, Categorical) and value.shape == (*label.shape, base.logits.shape[-1]):
            picked.append(value.gather(-1, label.long().unsqueeze(-1)).squeeze(-1))
        elif isinstance(base, OneHotCategorical) and value.shape == label.shape:
            picked.append((value * label).sum(-1))
        else:
            continue
        distances.append((value.log_softmax(-1) - base.logits).detach().abs().amax())
    if len(picked) < 2:
        return picked[0] if picked else value
    nearest = torch.stack(distances).argmin().reshape(1)
    return torch.stack(picked).index_select(0, nearest).squeeze(0)
