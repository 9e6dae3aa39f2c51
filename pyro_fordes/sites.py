"""Reading Pyro traces: which sites are observed, and how likely the observations are."""

import copy
import inspect
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_fordes._checks import ArgumentError
from pyro_fordes.particles import Call


def base_distribution(fn: Any) -> Any:
    """A distribution without the wrappers (``Independent``, masks, ...) that Pyro puts around it.

    Nor with the transform of another one that it is made of, unless the transform has its
    parameters, as that of a Weibull.

    Example:
        >>> import pyro.distributions as dist
        >>> type(base_distribution(dist.Normal(0.0, 1.0).expand([3]).to_event(1))).__name__
        'Normal'
    """
    while hasattr(fn, "base_dist") and not _has_parameters(fn):
        fn = fn.base_dist
    return fn


def _has_parameters(fn: Any) -> bool:
    """Whether a transformed distribution keeps parameters, and not its base alone."""
    return isinstance(fn, torch.distributions.TransformedDistribution) and any(
        isinstance(vars(fn).get(name), Tensor) for name in fn.arg_constraints
    )


_SAME_VALUES = (torch.distributions.Independent, MaskedDistribution, ExpandedDistribution)
"""Wrappers of a distribution of the same values."""


def plain_distribution(fn: Any) -> Any:
    """A distribution without the wrappers that leave its values as they are; transforms stay.

    Example:
        >>> import pyro.distributions as dist
        >>> type(plain_distribution(dist.LogNormal(torch.zeros(3), 1.0).to_event(1))).__name__
        'LogNormal'
    """
    while isinstance(fn, _SAME_VALUES):
        fn = fn.base_dist
    return fn


def counted(site: Any) -> Tensor:
    """Which elements of an observed site count: no handler and no distribution masks them.

    Args:
        site: a site of a trace.

    Returns:
        Truth values, of the batch shape of the `plain_distribution` and the value.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     y = torch.tensor([0.1, 0.2, -99.0])
        ...     with pyro.plate("data", 3), pyro.poutine.mask(mask=y > -99.0):
        ...         pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        >>> counted(pyro.poutine.trace(model).get_trace().nodes["y"])
        tensor([ True,  True, False])
    """
    fn, value = site["fn"], site["value"]
    shape = torch.broadcast_shapes(fn.batch_shape + fn.event_shape, value.shape)
    found = _as_tensor(site["mask"], value.device)
    while isinstance(fn, _SAME_VALUES):
        if isinstance(fn, MaskedDistribution):
            found = found & _as_tensor(fn._mask, value.device)
        elif isinstance(fn, torch.distributions.Independent):
            found = found.reshape(found.shape + (1,) * fn.reinterpreted_batch_ndims)
        fn = fn.base_dist
    return found.expand(shape[: len(shape) - len(fn.event_shape)])


def _as_tensor(mask: Any, device: torch.device) -> Tensor:
    """A mask as truth values; None masks nothing."""
    return torch.as_tensor(True if mask is None else mask, dtype=torch.bool, device=device)


def latent_sites(trace: Any) -> list[str]:
    """Names of the sites to infer: sampled, not observed, not summed out, no minibatch indices."""
    return [name for name, site in _unobserved(trace) if not _summed_out(site)]


def enumerated_sites(trace: Any) -> list[str]:
    """Names of the discrete latent sites with a finite support, which are summed out.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     p = pyro.sample("p", dist.Beta(1.0, 1.0))
        ...     pyro.sample("z", dist.Bernoulli(p))
        >>> trace = pyro.poutine.trace(model).get_trace()
        >>> enumerated_sites(trace), latent_sites(trace)
        (['z'], ['p'])
    """
    return [name for name, site in _unobserved(trace) if _summed_out(site)]


def _unobserved(trace: Any) -> Iterator[tuple[str, Any]]:
    """The sampled sites without a given value, minibatch indices left out."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site):
            yield name, site


def _summed_out(site: Any) -> bool:
    """Whether Pyro can enumerate a site in parallel, and the model does not ask otherwise."""
    asked = site["infer"].get("enumerate", "parallel")
    return asked == "parallel" and getattr(site["fn"], "has_enumerate_support", False)


def observed_sites(trace: Any) -> list[str]:
    """Names of the sites with a likelihood: no deterministic sites, factors or minibatch indices.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.deterministic("twice", 2 * z)
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.5))
        >>> observed_sites(pyro.poutine.trace(model).get_trace())
        ['y']
    """
    return [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic", False)
        and not site["infer"].get("is_auxiliary", False)
    ]


def deterministic_sites(trace: Any) -> list[str]:
    """Names of the sites that ``pyro.deterministic`` made.

    Example:
        >>> import pyro
        >>> def model():
        ...     pyro.deterministic("one", torch.ones(()))
        >>> deterministic_sites(pyro.poutine.trace(model).get_trace())
        ['one']
    """
    return [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site["infer"].get("_deterministic", False)
    ]


def choose_sites(
    where: str, sizes: Mapping[str, int], sites: Collection[str] | None, max_size: int
) -> tuple[list[str], list[str]]:
    """Sites by name, pattern and size.

    Args:
        where: the function that asks, for messages.
        sizes: how many values each site has.
        sites: names, which are taken whatever their size, and patterns with ``*``, ``?`` or
            ``[...]``; None for all.
        max_size: sites that are not named are taken up to this size.

    Returns:
        The chosen sites, and those left out for their size alone, both in the order of ``sizes``.

    Raises:
        ArgumentError: if ``sites`` is a text, or something in it fits no site.

    Example:
        >>> choose_sites("f", {"a.x": 2, "a.y": 9, "b": 9}, ["a.*", "b"], 5)
        (['a.x', 'b'], ['a.y'])
    """
    if sites is None and not sizes:
        return [], []
    asked = ["*"] if sites is None else sites
    if (
        isinstance(asked, str)
        or not isinstance(asked, Collection)
        or not all(
            isinstance(one, str) and (one in sizes or any(fnmatchcase(name, one) for name in sizes))
            for one in asked
        )
    ):
        raise ArgumentError(
            f"{where}(sites=...) must be a list of names or patterns of sites, got {sites!r}; the "
            f"model has {list(sizes)}"
        )
    matched = [
        name for name in sizes if any(name == one or fnmatchcase(name, one) for one in asked)
    ]
    chosen = [name for name in matched if name in asked or sizes[name] <= max_size]
    return chosen, [name for name in matched if name not in chosen]


def pointwise_log_prob(call: Call) -> dict[str, Tensor]:
    """Log probability of each observation, not scaled, 0 where masked.

    Args:
        call: one particle's run of the model.

    Returns:
        ``{site: (*batch shape)}``.
    """
    nodes = call.trace.nodes
    return {
        name: scale_and_mask(
            nodes[name]["fn"].log_prob(nodes[name]["value"]), mask=nodes[name]["mask"]
        )
        for name in observed_sites(call.trace)
    }


def distribution_parameters(fn: Any) -> dict[str, Tensor]:
    """Parameters of a distribution on the real line, with its batch dimensions on the left.

    The logits where it has some, else every parameter that it was made from: those with a
    constraint that torch can map to the real line are mapped (a scale becomes a log scale), others
    are left as they are. Nothing for distributions without parameters of their own, such as
    mixtures.

    Example:
        >>> import pyro.distributions as dist
        >>> distribution_parameters(dist.Normal(torch.zeros(2), 1.0).to_event(1))
        {'loc': tensor([0., 0.]), 'scale': tensor([0., 0.])}
    """
    base = base_distribution(fn)
    return {
        name: _transform(base, name).inv(value) for name, value in given_parameters(base).items()
    }


def log_likelihood_scores(site: Any) -> dict[str, Tensor]:
    """Gradient of an observed site's log likelihood, scaled and masked.

    Returns:
        The gradient by each of the site's `distribution_parameters`, without a graph.
    """
    fn = site["fn"]
    base = base_distribution(fn)

    def log_likelihood(parameters: Mapping[str, Tensor]) -> Tensor:
        given = {name: _transform(base, name)(value) for name, value in parameters.items()}
        log_prob = _with_base(fn, _remade(base, given)).log_prob(site["value"])
        return scale_and_mask(log_prob, site["scale"], site["mask"]).sum()

    parameters = {name: value.detach() for name, value in distribution_parameters(fn).items()}
    return torch.func.grad(log_likelihood)(parameters)


def add_shared(found: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """Note a parameter under a name, unless it is there under another one (weights that are tied).

    Example:
        >>> found, weight = {}, torch.zeros(2)
        >>> add_shared(found, "encoder", weight)
        >>> add_shared(found, "decoder", weight)
        >>> list(found)
        ['encoder']
    """
    if not any(known is tensor for other, known in found.items() if other != name):
        found[name] = tensor


def given_parameters(base: Any) -> dict[str, Tensor]:
    """The parameters that a distribution was made from, with its batch dimensions."""
    constraints = base.arg_constraints
    names = ["logits"] if "logits" in constraints else [n for n in constraints if n in vars(base)]
    found = {}
    for name in names:
        value = getattr(base, name)
        if isinstance(value, Tensor) and value.is_floating_point():
            batch, event_dim = base.batch_shape, constraints[name].event_dim
            found[name] = value.expand(batch + value.shape[value.dim() - event_dim :])
    return found


def _transform(base: Any, name: str) -> Any:
    """Map from the real line to a parameter, the identity where torch knows none."""
    try:
        return biject_to(base.arg_constraints[name])
    except NotImplementedError:
        return torch.distributions.transforms.identity_transform


def _remade(base: Any, parameters: Mapping[str, Tensor]) -> Any:
    """A distribution of the same kind with other parameters."""
    names = inspect.signature(type(base).__init__).parameters
    kept = {
        name: value
        for name, value in vars(base).items()
        if name in names and name not in ("logits", "probs")
    }
    return type(base)(**{**kept, **parameters})


def _with_base(fn: Any, base: Any) -> Any:
    """A distribution with its `base_distribution` replaced, all wrappers kept."""
    if base_distribution(fn) is fn:
        return base
    outer = copy.copy(fn)
    outer.base_dist = _with_base(fn.base_dist, base)
    return outer
