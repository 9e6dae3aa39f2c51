"""Export of particles to ArviZ: ``InferenceData`` on ArviZ 0.x, ``DataTree`` on 1.x."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from pyro_fordes._checks import ArgumentError, check_positive_int, check_seed, require
from pyro_fordes._random import preserved_rng
from pyro_fordes.arviz_groups import DATA, GROUPS, Exporter, Request, SameMinibatch
from pyro_fordes.labels import Labels, Variable
from pyro_fordes.prediction import eval_mode
from pyro_fordes.state import sample_shapes


def to_arviz(
    inference: Any,
    *args: Any,
    sites: Collection[str] | None = None,
    max_site_size: int = 1000,
    groups: Collection[str] | None = None,
    max_size: int = 10_000_000,
    predictions: Any = None,
    prior: int | None = None,
    trajectory: bool = False,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> Any:
    """Particles, predictions, data and pointwise log likelihoods as ArviZ sees them.

    The particles of one inference are the draws of a single chain. They interact, so R-hat and
    effective sample sizes, which ask how independent draws are, do not apply to them. Several
    inferences, each from a start of its own, are several chains, and R-hat compares them. The page
    ``docs/diagnostics.md`` says what each number means for particles.

    Networks are in eval mode meanwhile, random numbers come from ``seed``, and the inference is
    left as it is. Where a model draws its own minibatch, all groups are of the same one. What is
    left out for its size is named in a warning.

    Args:
        inference: a `ParticleInference` that has particles, or a list of them, of the same model
            and number of particles: one chain each.
        *args: arguments of the model, observations included.
        sites: names of latent and deterministic sites, and patterns such as ``"net.2.*"``; None
            for all. Sites that are not named are exported up to ``max_site_size``.
        max_site_size: largest number of values per particle of a site that is not named.
        groups: which groups to make; None for all.
        max_size: largest number of values of a variable in a group of predictions, densities or
            data, unless ``groups`` names the group.
        predictions: arguments for which new observations are drawn: a tuple for several, a mapping
            for keywords; observations may be left out.
        prior: number of draws from the prior and its predictive; None for none.
        trajectory: whether to export what a `Trajectory` has recorded of the inference, in place of
            its particles now: a chain for each particle, a draw for each recorded step. There are
            then no predictions or densities.
        dims: names of the dimensions of a variable, beside chain and draw: ``{"w": ["feature"]}``.
            Without them, dimensions are named after plates, and numbered outside of plates.
        coords: labels of a dimension's entries: ``{"feature": ["age", "height"]}``.
        chunk_size: how many particles predict at a time; None for all.
        seed: seed of all draws.
        **kwargs: keyword arguments of the model.

    Returns:
        These groups, as far as the model has something for them: ``posterior``;
        ``posterior_predictive``, drawn with the same arguments; ``predictions``;
        ``log_likelihood``, pointwise and not scaled by plates (not where discrete latent sites are
        summed out);
        ``prior`` and ``prior_predictive``; ``observed_data``, ``constant_data`` and
        ``predictions_constant_data``, the tensors among the arguments; and ``sample_stats``: the
        log joint ``lp`` of each particle for these arguments, and of the last measured step (see
        `ParticleInference.diagnostics`) the force norms, the force ratio, effective particles and
        bandwidth.

    Raises:
        MissingDependencyError: if ArviZ is not installed.
        ArgumentError: if sites, dims, coords or groups name something that is not there, or the
            inferences do not fit together.
        StateError: if there are no particles, or with ``trajectory`` no records.

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
    chains = _checked_chains(inference, trajectory)
    for name, number in (("max_site_size", max_site_size), ("max_size", max_size)):
        check_positive_int(name, number)
    if prior is not None:
        check_positive_int("prior", prior)
    if groups is not None and (
        isinstance(groups, str)
        or not isinstance(groups, Collection)
        or any(group not in GROUPS for group in groups)
    ):
        raise ArgumentError(
            f"to_arviz(groups=...) must be a list of names from {list(GROUPS)}, got {groups!r}"
        )
    check_seed(seed)
    labels = Labels({} if dims is None else dims, {} if coords is None else coords)
    # One chain draws from the prior, and has the new arguments and the data.
    request = Request(
        labels,
        sites,
        max_site_size,
        groups,
        max_size // len(chains),
        predictions,
        prior,
        chunk_size,
    )
    exports = []
    for index, chain in enumerate(chains):
        chain.setup(*args, **kwargs)
        with eval_mode(chain._log_joint.module), preserved_rng():
            torch.manual_seed(seed + index)
            prototype = chain.prototype(*args, **kwargs)
            plates = {name: prototype.trace.nodes[name]["value"] for name in prototype.plates}
            export = Exporter(
                chain, args, kwargs, replace(request, prior=prior if index == 0 else None)
            )
            if index == 0:
                labels.check(export.names())
            with SameMinibatch(plates):
                export.trajectory() if trajectory else export.particles()
        exports.append(export)
    _warn_of_omitted(exports[0])
    if trajectory:
        steps = chains[0]._trajectory.steps
        labels = replace(labels, coords={"draw": steps, **labels.coords})
    return _assembled(arviz, exports, labels)


def _checked_chains(inference: Any, trajectory: bool) -> list[Any]:
    """The inferences, one for each chain."""
    chains = list(inference) if isinstance(inference, list | tuple) else [inference]
    for chain in chains:
        if not hasattr(chain, "get_unconstrained"):
            raise ArgumentError(
                f"to_arviz needs a ParticleInference or a list of them, got {type(chain).__name__}"
            )
    if not chains:
        raise ArgumentError("to_arviz got an empty list of inferences")
    if trajectory and len(chains) > 1:
        raise ArgumentError(
            f"to_arviz(trajectory=True) makes a chain of each particle of one inference, got "
            f"{len(chains)} inferences"
        )
    if len({id(chain) for chain in chains}) < len(chains):
        raise ArgumentError(
            "to_arviz got an inference twice; each chain must be a restart of its own, or R-hat "
            "would compare a chain with itself"
        )
    for chain in chains:
        chain._started()
    shapes = [
        {name: (chain.num_particles, *shape) for name, shape in sample_shapes(chain).items()}
        for chain in chains
    ]
    for index, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ArgumentError(
                f"the inferences must have the same sites and number of particles to be chains; "
                f"number 0 has {shapes[0]}, number {index} has {shape}"
            )
    return chains


def _warn_of_omitted(export: Exporter) -> None:
    """Say what is left out for its size, and how to have it."""
    omitted = export.omitted_sites
    if omitted:
        more = f" and {len(omitted) - 3} more" if len(omitted) > 3 else ""
        warnings.warn(
            f"to_arviz left out the sites {', '.join(map(repr, omitted[:3]))}{more} for their "
            f"size (more than {export.request.max_site_size} values per particle); name them in "
            f"sites=[...], or raise max_site_size",
            stacklevel=3,
        )
    if export.omitted:
        warnings.warn(
            f"to_arviz left out {', '.join(export.omitted)} for their size; raise max_size, or "
            f"name the groups you want in groups=[...]",
            stacklevel=3,
        )


def _assembled(arviz: Any, exports: list[Exporter], labels: Labels) -> Any:
    """Chains joined, in what the installed ArviZ takes."""
    first = exports[0]
    datasets = {}
    for group in GROUPS:
        if group not in first.groups:
            continue
        sample = () if group in DATA else ("chain", "draw")
        variables = first.groups[group]
        if sample and not group.startswith("prior"):
            variables = {
                name: _joined([export.groups[group][name] for export in exports])
                for name in variables
                if all(name in export.groups.get(group, {}) for export in exports)
            }
        lenient = group.startswith(("prior", "predictions"))
        datasets[group] = labels.dataset(variables, sample, lenient=lenient)
        datasets[group].attrs.update(
            inference_library="pyro_fordes", inference_library_version=version("pyro-fordes")
        )
    labels.check_coords(datasets.values(), first.dims())
    if first.omitted_sites and "posterior" in datasets:
        datasets["posterior"].attrs["omitted_sites"] = ", ".join(first.omitted_sites)
    if first.measured_step is not None and "sample_stats" in datasets:
        datasets["sample_stats"].attrs["measured_step"] = first.measured_step
    if arviz.__version__.startswith("0."):
        return arviz.InferenceData(**datasets)
    return require("xarray").DataTree.from_dict(datasets)


def _joined(chains: list[Variable]) -> Variable:
    """A variable of several inferences."""
    return np.concatenate([values for values, _ in chains]), chains[0][1]
