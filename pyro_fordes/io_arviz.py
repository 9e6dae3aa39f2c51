"""Export of particles to ArviZ: ``InferenceData`` on ArviZ 0.x, ``DataTree`` on 1.x."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_fordes._checks import ArgumentError, check_positive_int, require
from pyro_fordes.sites import observed_sites


def to_arviz(
    inference: Any,
    *args: Any,
    sites: Collection[str] | None = None,
    max_site_size: int = 1000,
    **kwargs: Any,
) -> Any:
    """Particles, observations and pointwise log likelihoods as ArviZ sees them.

    Particles are draws of a single chain, ``(chain=1, draw=particle)``. They interact, so R-hat and
    effective sample sizes, which ask how independent draws are, do not apply to them. Dimensions
    are named after plates where a site is in one.

    Args:
        inference: a `ParticleInference` that has particles.
        *args: arguments of the model, observations included.
        sites: latent sites to export. None takes those with at most ``max_site_size`` values per
            particle; the names of the others are listed in the posterior's attribute
            ``omitted_sites``.
        max_site_size: see ``sites``.
        **kwargs: keyword arguments of the model.

    Returns:
        Groups ``posterior``, ``log_likelihood`` (pointwise, not scaled by plates; left out where
        discrete latent sites are summed out), ``sample_stats`` (``lp``, the log
        joint of each particle) and ``observed_data``.

    Raises:
        MissingDependencyError: if ArviZ is not installed.
        ArgumentError: if a named site is unknown.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_fordes import Ensemble, ParticleInference, to_arviz
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> inference = ParticleInference(
        ...     model, pyro.optim.Adam({"lr": 0.1}), 5, transport=Ensemble(), seed=0
        ... )
        >>> y = torch.zeros(3)
        >>> inference.setup(y)
        >>> dict(to_arviz(inference, y).log_likelihood["y"].sizes)
        {'chain': 1, 'draw': 5, 'data': 3}
    """
    arviz = require("arviz")
    check_positive_int("max_site_size", max_site_size)
    samples = inference.get_samples(gather=True)
    unknown = [name for name in sites or () if name not in samples]
    if isinstance(sites, str) or unknown:
        raise ArgumentError(
            f"to_arviz(sites=...) must be names of latent sites, got {sites!r}; the model has "
            f"{list(samples)}"
        )
    chosen = (
        list(sites)
        if sites is not None
        else [name for name, value in samples.items() if value[0].numel() <= max_site_size]
    )
    prototype = inference.prototype(*args, **kwargs)
    trace = prototype.trace
    nodes = trace.nodes
    pointwise = {} if prototype.enumerated else inference.log_likelihood(*args, **kwargs)
    observed = observed_sites(trace)
    dims: dict[str, list[str]] = {}
    for name in (*chosen, *observed):
        dims[name] = _dims(name, nodes[name])
    groups = {
        "posterior": {name: _array(samples[name])[None] for name in chosen},
        "log_likelihood": {name: _array(value)[None] for name, value in pointwise.items()},
        "sample_stats": {"lp": _array(inference.log_joint(*args, **kwargs))[None]},
        "observed_data": {name: _array(nodes[name]["value"]) for name in observed},
    }
    groups = {name: group for name, group in groups.items() if group}
    # Pointwise log likelihoods have batch dimensions only, observations event dimensions too.
    data = _convert(arviz, groups, dims, {name: nodes[name]["fn"].event_dim for name in observed})
    omitted = [name for name in samples if name not in chosen]
    if omitted and "posterior" in groups:
        data["posterior"].attrs["omitted_sites"] = ", ".join(omitted)
    return data


def _array(tensor: Tensor) -> Any:
    return torch.as_tensor(tensor).detach().cpu().numpy()


def _dims(name: str, site: Mapping[str, Any]) -> list[str]:
    """Names of a site's dimensions: plates where there is one, else numbered."""
    plates = {frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
    rank, event_dim = site["value"].dim(), site["fn"].event_dim
    names = []
    for axis in range(rank):
        batch_dim = axis - (rank - event_dim)  # negative on batch dimensions
        names.append(
            plates.get(batch_dim, f"{name}_dim_{axis}") if batch_dim < 0 else f"{name}_dim_{axis}"
        )
    return names


def _convert(
    arviz: Any,
    groups: Mapping[str, Mapping[str, Any]],
    dims: Mapping[str, list[str]],
    event_dims: Mapping[str, int],
) -> Any:
    """Call the ``from_dict`` of the installed ArviZ, group by group so that dims can differ."""
    major = int(arviz.__version__.split(".")[0])
    parts = []
    for group, variables in groups.items():
        named = {}
        for name in variables:
            if name not in dims:
                continue
            cut = event_dims.get(name, 0) if group == "log_likelihood" else 0
            named[name] = dims[name][: len(dims[name]) - cut]
        if major == 0:
            parts.append(arviz.from_dict(**{group: dict(variables)}, dims=named))
        else:
            parts.append(arviz.from_dict({group: dict(variables)}, dims=named))
    result = parts[0]
    for part in parts[1:]:
        result = result + part if major == 0 else _merged(result, part)
    return result


def _merged(tree: Any, other: Any) -> Any:
    """A tree with the groups of two."""
    tree = tree.copy()
    tree.update(other)
    return tree
