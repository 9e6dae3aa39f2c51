r"""Spaces in which functions are compared: what a model puts out, and what a layer computes.

The representation of a particle is :math:`f_i = f(x_1, \dots, x_B; \theta_i)`, on the batch of the
step or on points of the user's. Source: Repulsive Deep Ensembles (D'Angelo & Fortuin, NeurIPS
2021), Section 2.2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import ArgumentError, ModelError, check_choice, describe
from pyro_fordes.particles import Call, Evaluation, Setting
from pyro_fordes.sites import (
    distribution_parameters,
    enumerated_sites,
    log_likelihood_scores,
    observed_sites,
)
from pyro_fordes.spaces import Output

Points = Tensor | tuple[Any, ...] | Mapping[str, Any] | Callable[[], Any]
"""Arguments of the model, observations left out: one tensor, positional, by keyword; or a function
that gives such."""


@dataclass(frozen=True)
class Outputs:
    r"""What the model puts out: the parameters of its observations, or values that are named.

    With `WGD` the estimated score of these values is pulled back to the latent sites (f-WGD). With
    `SVGD` the scores of the log likelihood are smoothed in function space and pulled back (f-SVGD,
    Wang et al. 2019):

    .. math:: v_i = J_i^T \frac1M \sum_j \left[k(f_j, f_i) \nabla_{f_j} \log p(D \mid f_j)
        + \nabla_{f_j} k(f_j, f_i)\right]
        + \Big(\frac1M \sum_j k(f_j, f_i)\Big) \nabla_{\theta_i} \log p(\theta_i)

    The prior is one of weights, whose density over functions is not known; it acts on each
    particle by itself, with the weight that the kernel gives the likelihood.

    On training points alone, functions that fit agree, and repulsion hardly spreads them elsewhere:
    ``points`` says where they are to differ.

    Args:
        output: None takes the parameters of the observed sites' distributions, mapped to the real
            line: logits of discrete ones, else location, log scale and so on. Or the name of a
            site (of an observed one, its parameters), the path of a submodule, or a function of
            the trace.
        points: arguments of a further run of the model, observations left out, whose outputs are
            compared in place of the batch's: a tensor, a tuple of positional arguments, a mapping
            of keyword arguments, or a function that gives one of these at each step (random points,
            drawn from the inference's own stream). Not with `SVGD`, which needs the likelihood.
        group: ``"joint"`` compares all points with one kernel, as the paper does; ``"point"``
            averages a kernel over the points (the first axis).

    Raises:
        ArgumentError: if an argument is of the wrong kind or, when the driver starts, does not fit
            the model.

    Example:
        >>> Outputs("logits", group="point").group
        'point'
    """

    output: Output | None = None
    points: Points | None = None
    group: str = "joint"
    input: None = None
    submodules: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    own_values: bool = False
    with_scores: bool = False

    def __post_init__(self) -> None:
        """Check the arguments that do not depend on a model."""
        check_choice("Outputs(group=...)", self.group, ("joint", "point"))
        _check_points("Outputs", self.points)
        if (
            self.output is not None
            and not isinstance(self.output, str)
            and not callable(self.output)
        ):
            raise ArgumentError(
                f"Outputs(output=...) must be a site's name, a submodule's path or a function of "
                f"the trace, got {self.output!r}"
            )

    @property
    def has_scores(self) -> bool:
        """Whether the gradient of the log likelihood by the representation is known."""
        return self.output is None and self.points is None

    @property
    def share_axis(self) -> int | None:
        """Along which axis the shares of a batch are joined."""
        return _share_axis(self.points, self.group)

    def check(self, locate: Callable[[int | str], tuple[str, Any]]) -> None:
        """Any arguments will do."""

    def prepare(self, setting: Setting) -> "Outputs":
        """Find the sites or the submodule to read."""
        nodes, observed = setting.trace.nodes, observed_sites(setting.trace)
        sites: tuple[str, ...] = ()
        submodules: tuple[str, ...] = ()
        if self.output is None:
            sites = tuple(observed)
            if not sites:
                raise ArgumentError(
                    "Outputs(output=None) takes the parameters of the observed sites, but there is "
                    "none in this call; pass the observations, or name a site or submodule"
                )
        elif self.output in observed:
            sites = (str(self.output),)
        elif isinstance(self.output, str) and not _is_sample(nodes.get(self.output)):
            submodules = _submodule("Outputs(output=...)", self.output, setting)
        summed = enumerated_sites(setting.trace)
        if setting.scores and summed:
            raise ArgumentError(
                f"SVGD() in Outputs() smooths the likelihood's gradient point by point, but the "
                f"discrete sites {summed} are summed out, and the likelihood is no function of one "
                f"output; use SVGD() in Weights(), or WGD() with Outputs(output=...)"
            )
        return replace(self, sites=sites, submodules=submodules, with_scores=setting.scores)

    def extra(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Arguments of the run that is compared, None for that of the step."""
        return _arguments(self.points)

    def capture(self, call: Call) -> dict[str, Any]:
        """Values of one particle, each ``(point, feature)``; for `SVGD` also their scores."""
        nodes = call.trace.nodes
        if callable(self.output):
            return {"values": (_rows("Outputs", self.output(call.trace)),)}
        if self.submodules:
            return {"values": (_rows("Outputs", call.modules[self.submodules[0]]),)}
        if not self.sites:
            return {"values": (_rows("Outputs", nodes[self.output]["value"]),)}
        values = tuple(_parameters(name, nodes[name]["fn"]) for name in self.sites)
        if not self.with_scores:
            return {"values": values}
        scores = tuple(
            _join(log_likelihood_scores(nodes[name]), nodes[name]["fn"]) for name in self.sites
        )
        return {"values": values, "scores": scores}

    def represent(self, evaluation: Evaluation) -> Float[Tensor, "particle point feature"]:
        """All values, as one point or point by point."""
        return _grouped(evaluation.captured["values"], self.group)

    def scores(self, evaluation: Evaluation) -> Float[Tensor, "particle point feature"]:
        """Gradient of the log likelihood by the representation."""
        return _grouped(evaluation.captured["scores"], self.group)


@dataclass(frozen=True)
class Features:
    """Activations of a submodule, in training mode where the model is.

    Args:
        module: the submodule's path, such as ``"net.2"``.
        points: as in `Outputs`.
        group: ``"joint"`` compares all points with one kernel, ``"point"`` averages a kernel over
            the points (the first axis of the activations).

    Raises:
        ArgumentError: if an argument is of the wrong kind or, when the driver starts, the model
            has no such submodule.

    Example:
        >>> Features("net.2", group="point").module
        'net.2'
    """

    module: str
    points: Points | None = None
    group: str = "joint"
    input: None = None
    own_values: bool = False

    def __post_init__(self) -> None:
        """Check the arguments that do not depend on a model."""
        check_choice("Features(group=...)", self.group, ("joint", "point"))
        _check_points("Features", self.points)
        if not isinstance(self.module, str):
            raise ArgumentError(
                f"Features(module=...) must be a submodule's path, such as 'net.2', got "
                f"{self.module!r}"
            )

    @property
    def submodules(self) -> tuple[str, ...]:
        """The one that is read."""
        return (self.module,)

    @property
    def has_scores(self) -> bool:
        """False: the likelihood is not known as a function of features."""
        return False

    @property
    def share_axis(self) -> int | None:
        """Along which axis the shares of a batch are joined."""
        return _share_axis(self.points, self.group)

    def check(self, locate: Callable[[int | str], tuple[str, Any]]) -> None:
        """Any arguments will do."""

    def prepare(self, setting: Setting) -> "Features":
        """Check the path."""
        _submodule("Features(module=...)", self.module, setting)
        return self

    def extra(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Arguments of the run that is compared, None for that of the step."""
        return _arguments(self.points)

    def capture(self, call: Call) -> tuple[Tensor]:
        """The activations of one particle, ``(point, feature)``."""
        return (_rows("Features", call.modules.get(self.module)),)

    def represent(self, evaluation: Evaluation) -> Float[Tensor, "particle point feature"]:
        """All activations, as one point or point by point."""
        return _grouped(evaluation.captured, self.group)


def _is_sample(site: Any) -> bool:
    """Whether there is such a site, and it is no parameter or plate."""
    return site is not None and site["type"] == "sample"


def _submodule(argument: str, path: str, setting: Setting) -> tuple[str]:
    """The path in a tuple, if the model has it."""
    if path not in setting.modules:
        sites = [name for name, site in setting.trace.nodes.items() if _is_sample(site)]
        raise ArgumentError(
            f"{argument} got {path!r}, which is neither a site of the model ({', '.join(sites)}) "
            f"nor the path of a submodule ({', '.join(setting.modules) or 'it is no nn.Module'})"
        )
    return (path,)


def _check_points(name: str, points: object) -> None:
    """Refuse points that cannot be arguments of a model."""
    if not (points is None or isinstance(points, Tensor | tuple | Mapping) or callable(points)):
        raise ArgumentError(
            f"{name}(points=...) must be a tensor, a tuple of the model's arguments, a mapping of "
            f"its keyword arguments, or a function that gives one of these; got {points!r}"
        )


def _arguments(points: Points | None) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Positional and keyword arguments of the model."""
    given: Any = points() if callable(points) else points
    if given is None:
        return None
    if isinstance(given, Mapping):
        return (), dict(given)
    return (given if isinstance(given, tuple) else (given,)), {}


def _share_axis(points: Points | None, group: str) -> int | None:
    """That of the points or, of one joint point, of the features; None for points of their own."""
    if points is not None:
        return None
    return 2 if group == "joint" else 1


def _rows(name: str, value: Any) -> Float[Tensor, "point feature"]:
    """A value of one particle as points and features; its first axis is that of the points."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = describe(value) if isinstance(value, Tensor) else type(value).__name__
        raise ModelError(
            f"{name} found {got} to compare; wanted a floating-point tensor (point, ...)"
        )
    return value.reshape(len(value) if value.dim() else 1, -1)


def _parameters(name: str, fn: Any) -> Float[Tensor, "point feature"]:
    """The parameters of a site's distribution side by side."""
    parameters = distribution_parameters(fn)
    if not parameters:
        raise ModelError(
            f"Outputs() does not know the parameters of site '{name}' ({type(fn).__name__}); name "
            f"a deterministic site, a submodule or a function with output="
        )
    return _join(parameters, fn)


def _join(parameters: Mapping[str, Tensor], fn: Any) -> Float[Tensor, "point feature"]:
    """Values with the batch dimensions of a distribution, side by side."""
    count = fn.batch_shape[0] if fn.batch_shape else 1
    return torch.cat([value.reshape(count, -1) for value in parameters.values()], dim=1)


def _grouped(
    values: tuple[Float[Tensor, "particle _ _"], ...], group: str
) -> Float[Tensor, "particle point feature"]:
    """One joint point, or the points with the features of all values."""
    if group == "joint":
        return torch.cat([value.flatten(1) for value in values], dim=1).unsqueeze(1)
    counts = {value.shape[1] for value in values}
    if len(counts) > 1:
        raise ModelError(
            f"the observed sites have {sorted(counts)} points, which cannot be averaged point by "
            f"point; name one with output=, or use group='joint'"
        )
    return torch.cat(values, dim=2)
