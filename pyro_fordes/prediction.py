"""Posterior predictive of particles: draws, distribution parameters, means and entropies."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from pyro.distributions import Bernoulli, Categorical, OneHotCategorical
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from pyro_fordes._checks import ArgumentError, ModelError, check_positive_int
from pyro_fordes._random import preserved_rng
from pyro_fordes.loops import arguments
from pyro_fordes.metrics import uncertainty
from pyro_fordes.particles import Call
from pyro_fordes.randomness import Draws
from pyro_fordes.sites import (
    base_distribution,
    given_parameters,
    plain_distribution,
    pointwise_log_prob,
)
from pyro_fordes.state import share_loaded


class ParticlePredictive:
    """What the model predicts under each particle, as ``pyro.infer.Predictive`` does it.

    The model is called with its arguments, observations left out. Networks are in eval mode during
    a call and in their own mode after it; BatchNorm uses each particle's running statistics, which
    stay as they are.

    Args:
        inference: a `ParticleInference` that has particles.
        return_sites: names of the sites to return; None for all that are no latent sites. The
            name ``"_RETURN"`` stands for the model's return value.
        chunk_size: how many particles are run at a time; None for all.

    Where discrete sites were summed out, `__call__` draws them and what depends on them; the other
    methods refuse.

    Where particles are spread over several processes, all of them call the same methods with the
    same arguments, and all get what all particles predict.

    Raises:
        ArgumentError: if an argument is of the wrong kind.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_fordes import Ensemble, ParticleInference, ParticlePredictive
        >>> def model(x, y=None):
        ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)
        >>> inference = ParticleInference(
        ...     model, pyro.optim.Adam({"lr": 0.1}), 5, transport=Ensemble(), seed=0
        ... )
        >>> x = torch.linspace(0.0, 1.0, 4)
        >>> _ = inference.run(100, x, 2 * x, progress_bar=False)
        >>> predict = ParticlePredictive(inference)
        >>> predict(x)["y"].shape
        torch.Size([5, 4])
        >>> predict.mean(torch.ones(1))["y"].round(decimals=1)
        tensor([2.])
    """

    def __init__(
        self,
        inference: Any,
        return_sites: Collection[str] | None = None,
        chunk_size: int | None = None,
    ) -> None:
        if not hasattr(inference, "get_unconstrained"):
            raise ArgumentError(
                f"ParticlePredictive(inference) needs a ParticleInference, got "
                f"{type(inference).__name__}"
            )
        if isinstance(return_sites, str):
            raise ArgumentError(
                f"return_sites must be a list of names, got {return_sites!r}; write "
                f"[{return_sites!r}]"
            )
        if return_sites is not None and (
            not isinstance(return_sites, Collection)
            or not all(isinstance(name, str) for name in return_sites)
        ):
            raise ArgumentError(f"return_sites must be a list of names, got {return_sites!r}")
        if chunk_size is not None:
            check_positive_int("chunk_size", chunk_size)
        self.inference = inference
        self.return_sites = return_sites
        self.chunk_size = chunk_size

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of the observed sites, and values of the deterministic ones.

        Random numbers come from the global generators, as ``pyro.infer.Predictive``'s do.

        Args:
            *args: arguments of the model, observations left out.
            **kwargs: keyword arguments of the model.

        Returns:
            ``{site: (particle, *shape)}``.

        Raises:
            ArgumentError: if a named site is not in the model.
            ModelError: if the model cannot be run with these arguments.
        """

        def capture(call: Call) -> dict[str, Tensor]:
            nodes = call.trace.nodes
            sites = [name for name, site in nodes.items() if _is_sampled(site)]
            names = self.return_sites
            if names is None:
                names = [name for name in sites if name not in self.inference._particles]
            unknown = [name for name in names if name not in (*sites, "_RETURN")]
            if unknown:
                raise ArgumentError(
                    f"return_sites names {unknown}, but the model has the sites {sites}"
                )
            found = {name: nodes[name]["value"] for name in names}
            if "_RETURN" in found:
                found["_RETURN"] = pytree.tree_map(_returned, found["_RETURN"])
            return found

        return self._map(capture, args, kwargs, draw=True)

    def parameters(self, *args: Any, **kwargs: Any) -> dict[str, dict[str, Tensor]]:
        """Parameters of the observed sites' distributions under each particle.

        Args:
            *args: arguments of the model; observations may be left out.
            **kwargs: keyword arguments of the model.

        Returns:
            ``{site: {parameter: (particle, *batch shape, ...)}}``, such as ``logits`` (normalised)
            of a Categorical, or ``loc`` and ``scale`` of a Normal.
        """

        def capture(call: Call) -> dict[str, dict[str, Tensor]]:
            return {
                name: given_parameters(base_distribution(site["fn"]))
                for name, site in self._observed(call).items()
            }

        return self._map(capture, args, kwargs)

    def mean(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Predictive mean: the average over particles of each one's mean.

        Args:
            *args: arguments of the model; observations may be left out.
            **kwargs: keyword arguments of the model.

        Returns:
            ``{site: (*shape)}``; of a Categorical site the class probabilities, with a class axis
            at the end.

        Raises:
            ModelError: if torch knows no mean of a site's distribution.
        """

        def capture(call: Call) -> dict[str, Tensor]:
            return {name: _mean(name, site["fn"]) for name, site in self._observed(call).items()}

        means = self._map(capture, args, kwargs)
        return {name: value.mean(0) for name, value in means.items()}

    def log_prob(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Log density of each observation under each particle; not scaled, 0 where masked.

        The predictive log density of the ensemble is its ``logsumexp(0) - log(num_particles)``.

        Args:
            *args: arguments of the model, observations included.
            **kwargs: keyword arguments of the model.

        Returns:
            ``{site: (particle, *batch shape)}``.
        """
        found = self._map(pointwise_log_prob, args, kwargs)
        if not found:
            raise ArgumentError(
                "log_prob needs the observations, but no site of the model is observed with these "
                "arguments"
            )
        return found

    def entropy(self, *args: Any, **kwargs: Any) -> dict[str, dict[str, Tensor]]:
        r"""Entropy of the predictive of discrete sites, split by where it comes from.

        .. math:: \underbrace{H\big[\tfrac1M \sum_i p_i\big]}_{\text{total}} =
            \underbrace{\tfrac1M \sum_i H[p_i]}_{\text{aleatoric}} +
            \underbrace{\text{mutual information}}_{\text{epistemic}}

        Source: Depeweg et al., Decomposition of Uncertainty in Bayesian Deep Learning, ICML 2018.

        Args:
            *args: arguments of the model; observations may be left out.
            **kwargs: keyword arguments of the model.

        Returns:
            ``{site: {"total": ..., "aleatoric": ..., "epistemic": ...}}``, each of the site's batch
            shape, in nats.

        Raises:
            ModelError: if the model has no site with class probabilities.
        """

        def capture(call: Call) -> dict[str, Tensor]:
            return {
                name: log_probs
                for name, site in self._observed(call).items()
                if (log_probs := _log_probs(site["fn"])) is not None
            }

        found = self._map(capture, args, kwargs)
        if not found:
            raise ModelError(
                "entropy is split for Categorical, OneHotCategorical and Bernoulli sites, and the "
                "model observes none; use parameters(...) or draws"
            )
        return {name: _split_entropy(log_probs) for name, log_probs in found.items()}

    def captured(self, capture: Callable[[Call], Any], *args: Any, **kwargs: Any) -> Any:
        """What a function keeps of each particle's run, such as a distribution's parameters.

        Args:
            capture: function of a run's ``trace`` that returns a tree of tensors.
            *args: arguments of the model; observations may be left out.
            **kwargs: keyword arguments of the model.

        Returns:
            The tree, with a leading particle axis.
        """
        return self._map(capture, args, kwargs)

    def predict(self, loader: Iterable[Any], *, progress_bar: bool = True) -> dict[str, Tensor]:
        """Predictive means of a whole data set, one batch at a time.

        Args:
            loader: batches as `ParticleInference.fit` takes them, observations left out or
                included.
            progress_bar: whether to show one.

        Returns:
            What `mean` returns, the batches joined along the first axis.

        Raises:
            ArgumentError: if the loader is empty, or none.
        """
        if not isinstance(loader, Iterable):
            raise ArgumentError(
                f"loader must be an iterable of batches, such as a torch DataLoader, got "
                f"{type(loader).__name__}"
            )
        parts: list[dict[str, Tensor]] = []
        total = len(loader) if isinstance(loader, Sized) else None
        for batch in tqdm(loader, total=total, disable=not progress_bar, unit="batch"):
            args, kwargs = arguments(batch)
            parts.append(self.mean(*args, **kwargs))
        if not parts:
            raise ArgumentError("the loader gave no batch; is the data set empty?")
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _observed(self, call: Call) -> dict[str, Any]:
        """The sites of a run that are observed, or would be."""
        return {
            name: site
            for name, site in call.trace.nodes.items()
            if _is_sampled(site)
            and name not in self.inference._particles
            and not site["infer"].get("_deterministic", False)
            and not site["infer"].get("is_auxiliary", False)
        }

    @torch.no_grad()
    def _map(
        self,
        capture: Callable[[Call], Any],
        args: tuple,
        kwargs: Mapping[str, Any],
        *,
        draw: bool = False,
    ) -> Any:
        """What is captured of each particle's run, the network in eval mode.

        A distribution that depends on discrete sites is one given a draw of them, so only draws
        are right where such sites have been summed out.
        """
        inference, log_joint = self.inference, self.inference._log_joint
        inference._started()
        if inference._enumerated and not draw:
            raise ModelError(
                f"the model's discrete sites {list(inference._enumerated)} were summed out, and "
                f"the distributions of what depends on them are known only given a draw of them; "
                f"draw with ParticlePredictive(inference)(...), and average the draws"
            )
        gather = inference._gather
        content = {"arguments": (args, dict(kwargs))}
        with gather.together("prediction", lambda: content), eval_mode(log_joint.module):
            values, buffers = inference._particles, inference._buffers
            latents = inference._latents or log_joint.latents(values, args, kwargs)
            if inference._loaded is not None:  # on the CPU, and the model may be elsewhere
                share_loaded(inference)
                values = {name: value.to(latents[name].device) for name, value in values.items()}
                device = next(iter(latents.values())).device
                buffers = {name: value.to(device) for name, value in buffers.items()}
            draws = None
            if draw:
                seed = gather.first(lambda: int(torch.randint(2**62, ())))
                draws = Draws(seed, gather.rows.start or 0)
            with nullcontext() if draw else preserved_rng():
                found = log_joint.replay(
                    {name: value.detach() for name, value in values.items()},
                    args,
                    kwargs,
                    latents,
                    capture=capture,
                    buffers=buffers,
                    draw=draw,
                    chunk_size=self.chunk_size,
                    draws=draws,
                )
            return pytree.tree_map(gather, found)


@contextmanager
def eval_mode(module: torch.nn.Module | None) -> Iterator[None]:
    """A module in eval mode, and every submodule in its own mode again after."""
    training = [] if module is None else [m for m in module.modules() if m.training]
    for one in training:
        one.training = False
    try:
        yield
    finally:
        for one in training:
            one.training = True


def _is_sampled(site: Any) -> bool:
    """Whether a node is a site with a value of interest: no plate, parameter or argument."""
    return site["type"] == "sample" and not site_is_subsample(site)


def _returned(value: Any) -> Tensor:
    """A part of what the model returns, if it can be stacked over particles."""
    if isinstance(value, Tensor | bool | int | float):
        return torch.as_tensor(value)
    raise ArgumentError(
        f"return_sites names '_RETURN', but the model returns "
        f"{'nothing' if value is None else type(value).__name__}; let it return tensors, or leave "
        f"'_RETURN' out"
    )


def _mean(name: str, fn: Any) -> Tensor:
    """Mean of a site's distribution, or its class probabilities."""
    base = base_distribution(fn)
    if isinstance(base, Categorical):
        return base.probs
    try:
        return fn.mean
    except NotImplementedError as error:
        kind = type(plain_distribution(fn)).__name__
        raise ModelError(
            f"torch knows no mean of the {kind} of site '{name}'; average draws, "
            f"ParticlePredictive(inference)(...)['{name}']"
        ) from error


def _log_probs(fn: Any) -> Tensor | None:
    """Log probabilities of the classes along a last axis; None for other distributions."""
    base = base_distribution(fn)
    if isinstance(base, Categorical | OneHotCategorical):
        return base.logits
    if isinstance(base, Bernoulli):
        pair = torch.stack([torch.zeros_like(base.logits), base.logits], dim=-1)
        return pair.log_softmax(-1)
    return None


def _split_entropy(log_probs: Float[Tensor, "particle *batch k"]) -> dict[str, Tensor]:
    """What `metrics.uncertainty` says, in the site's batch shape."""
    count, *batch, classes = log_probs.shape
    found = uncertainty(log_probs.reshape(count, -1, classes))
    return {
        name: getattr(found, name).reshape(batch) for name in ("total", "aleatoric", "epistemic")
    }
