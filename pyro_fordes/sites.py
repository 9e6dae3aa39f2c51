"""Reading Pyro traces: which sites are observed, and how likely the observations are."""

from typing import Any

from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_fordes.particles import Call


def base_distribution(fn: Any) -> Any:
    """A distribution without the wrappers (``Independent``, masks, ...) that Pyro puts around it.

    Example:
        >>> import pyro.distributions as dist
        >>> type(base_distribution(dist.Normal(0.0, 1.0).expand([3]).to_event(1))).__name__
        'Normal'
    """
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def latent_sites(trace: Any) -> list[str]:
    """Names of the sites to infer: sampled, not observed, not summed out, no minibatch indices."""
    return [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not _summed_out(site)
    ]


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
    return [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and _summed_out(site)
    ]


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
