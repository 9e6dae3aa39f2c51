"""One run of the model before any particle moves: its sites, plates and buffers, all checked."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide.initialization import (
    InitMessenger,
    init_to_sample,
    init_to_uniform,
)
from pyro.poutine.messenger import unwrap
from pyro.poutine.util import site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.utils import _pytree as pytree

from pyro_fordes._checks import FordesError, ModelError, NumericalError, describe
from pyro_fordes._random import preserved_rng, random_state
from pyro_fordes.enumeration import Enumerate, marginal_log_prob
from pyro_fordes.particles import Latent
from pyro_fordes.sites import enumerated_sites, latent_sites, observed_sites


@dataclass(frozen=True)
class Prototype:
    """One run of the model with Pyro's validation on, for arguments of given shapes.

    Attributes:
        trace: the run's trace, with log probabilities.
        plates: size, subsample size and device of each plate that draws a minibatch.
        latents: the continuous latent sites.
        mutated: names of the module buffers that runs change: each particle has its own.
        enumerated: the discrete latent sites, which are summed out.
        max_plate_nesting: how many batch dimensions belong to plates; the sum uses those left of
            them.
        draws: whether runs draw random numbers beside their sites, as dropout does.
        activations: what submodules put out, as far as it was asked for, by path.
    """

    trace: Any
    plates: Mapping[str, tuple[int, int, Any]]
    latents: Mapping[str, Latent]
    mutated: tuple[str, ...]
    enumerated: tuple[str, ...] = ()
    max_plate_nesting: int = 0
    draws: bool = False
    activations: dict[str, Tensor] = field(default_factory=dict)


def module_of(model: Callable[..., Any]) -> nn.Module | None:
    """The module that a model is, also inside Pyro's handlers; None for a function.

    Example:
        >>> module = pyro.nn.PyroModule[nn.Linear](2, 1)
        >>> module_of(poutine.scale(module, 2.0)) is module
        True
    """
    inner = unwrap(model)
    return inner if isinstance(inner, nn.Module) else None


def named_buffers(model: Callable[..., Any]) -> dict[str, Tensor]:
    """The module buffers of a model, by name (none for a plain function)."""
    module = module_of(model)
    return {} if module is None else dict(module.named_buffers())


def run_prototype(
    model: Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any],
    max_plate_nesting: int | None = None,
) -> Prototype:
    """Run a model once with validation on; random state and buffers are left as they were.

    Args:
        model: a Pyro callable.
        args: its positional arguments.
        kwargs: its keyword arguments.
        max_plate_nesting: see `Prototype`; None looks at the plates of this run.

    Raises:
        ModelError: if it has no latent site, or one that particles cannot represent, or discrete
            ones that cannot be summed out, or data of another device or dtype.
        NumericalError: if an observation is not finite.
    """
    buffers = named_buffers(model)
    saved = {name: (buffer, buffer.clone()) for name, buffer in buffers.items()}
    try:
        # Without a graph: the trace is kept, and a graph would keep all that the network computed.
        quiet = warnings.catch_warnings(action="ignore")
        with preserved_rng(), torch.no_grad(), pyro.validation_enabled(True), quiet:
            with explained(args, kwargs):
                trace = _validated_trace(model, args, kwargs)
            enumerated = tuple(enumerated_sites(trace))
            nesting = _plate_nesting(trace) if max_plate_nesting is None else max_plate_nesting
            if enumerated:
                _check_enumeration(model, args, kwargs, enumerated, nesting)
            draws = _draws(model, args, kwargs, trace)
        now = named_buffers(model)
        # By value: batch_norm's kernel changes its statistics without counting a version.
        statistics = _running_statistics(model)
        mutated = tuple(
            name
            for name, (buffer, before) in saved.items()
            if now.get(name) is buffer and (name in statistics or not torch.equal(buffer, before))
        )
        replaced = [name for name, (buffer, *_) in saved.items() if now.get(name) is not buffer]
        if replaced:
            raise ModelError(
                f"the model replaces the buffers {replaced} instead of updating them in "
                f"place, which cannot be kept per particle; write buffer.copy_(new)"
            )
    finally:
        with torch.no_grad():
            for buffer, before in saved.values():
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        now = named_buffers(model)
        for name, buffer in buffers.items():
            if now.get(name) is not buffer:
                _put_back(model, name, buffer)
    return Prototype(
        trace,
        drawing_plates(trace),
        latents_of(trace, latent_sites(trace)),
        mutated,
        enumerated,
        nesting,
        draws,
    )


def _put_back(model: Callable[..., Any], name: str, buffer: Tensor) -> None:
    """Make a buffer that a run has replaced that of the model again."""
    path, _, attribute = name.rpartition(".")
    module = module_of(model)
    if module is not None:
        module.get_submodule(path)._buffers[attribute] = buffer


def _draws(model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], trace: Any) -> bool:
    """Whether a run with the sites of a trace draws random numbers."""
    cpu, cuda = random_state()
    with pyro.validation_enabled(False):
        poutine.replay(model, trace=trace)(*args, **kwargs)
    cpu_after, cuda_after = random_state()
    if cuda is not None and cuda_after is not None and not torch.equal(cuda, cuda_after):
        return True
    return not torch.equal(cpu, cpu_after)


def drawing_plates(trace: Any) -> dict[str, tuple[int, int, Any]]:
    """Size, subsample size and device of each plate of a trace that draws a minibatch."""
    return {
        name: (site["fn"].size, site["fn"].subsample_size, site["fn"].device)
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and site_is_subsample(site)
        and site["fn"].subsample_size not in (None, site["fn"].size)
    }


def _plate_nesting(trace: Any) -> int:
    """How many dimensions the plates of a trace take."""
    dims = [
        frame.dim
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    return -min(dims, default=0)


def _check_enumeration(
    model: Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any],
    names: tuple[str, ...],
    max_plate_nesting: int,
) -> None:
    """Sum the discrete sites out once, with validation on."""
    try:
        with Enumerate(first_available_dim=-1 - max_plate_nesting):
            trace = poutine.trace(InitMessenger(init_to_sample)(config_enumerate(model))).get_trace(
                *args, **kwargs
            )
        marginal_log_prob(trace)
        trace.compute_log_prob()
        for site in trace.nodes.values():  # rows without a plate would be taken for branches
            if site["type"] == "sample" and not site_is_subsample(site):
                check_site_shape(site, max_plate_nesting)
    except Exception as error:
        raise ModelError(
            f"the discrete latent sites {list(names)} could not be summed out in parallel: "
            f"{type(error).__name__}: {error}. Their values get extra dimensions on the left, "
            f"which the model must broadcast (pyro.ops.indexing.Vindex helps), and every other "
            f"dimension needs a plate or to_event; check also "
            f"max_plate_nesting, here {max_plate_nesting}"
        ) from error


def _running_statistics(model: Callable[..., Any]) -> set[str]:
    """Buffers of normalisation layers, which change in train mode though not in this run."""
    root = module_of(model)
    if root is None:
        return set()
    return {
        f"{path}.{name}" if path else name
        for path, module in root.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for name, _ in module.named_buffers(recurse=False)
        if name in ("running_mean", "running_var", "num_batches_tracked")
    }


_KINDS = (ValueError, TypeError, IndexError, AttributeError)


@contextmanager
def explained(args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """What tensors and distributions refuse in a run of the model becomes an error of the model.

    Other exceptions are the model's own, and reach the user as they are.

    Args:
        args: positional arguments of the run.
        kwargs: keyword arguments of the run.
    """
    try:
        yield
    except FordesError:
        raise
    except (RuntimeError, ZeroDivisionError, *_KINDS) as error:
        given = [*map(_in_words, args), *(f"{n}={_in_words(v)}" for n, v in kwargs.items())]
        raise _also(error)(
            f"the model cannot be run with the arguments ({', '.join(given)}): "
            f"{type(error).__name__}: {error}"
        ) from error


def _also(error: Exception) -> type[ModelError]:
    """`ModelError` that is caught as an error of the built-in kind as well."""
    for kind in _KINDS:
        if isinstance(error, kind):
            return type("ModelError", (ModelError, kind), {"__module__": ModelError.__module__})
    return ModelError


def _in_words(value: Any) -> str:
    return describe(value) if isinstance(value, Tensor) else type(value).__name__


def _validated_trace(model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """A trace with log probabilities and checked shapes.

    What Pyro and the model itself have to say reaches the user as it is, after the two mistakes
    that they report badly: mixed types, and observations that are not finite.
    """
    trace = _run(model, args, kwargs)
    _check_sites(trace)
    check_data(args, kwargs, _latent_values(trace))
    for name in observed_sites(trace):
        if not torch.as_tensor(trace.nodes[name]["value"]).isfinite().all():
            raise NumericalError(
                f"the observations of site '{name}' have values that are not finite; remove them, "
                f"or mask them with poutine.mask and put any finite value in their place"
            )
    trace.compute_log_prob()
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            _check_shape(name, site)
    return trace


def _run(model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """One run with draws from the prior, or near zero where the model cannot take such a draw.

    Particles may start elsewhere; that wide priors overflow says nothing about them.
    """
    try:
        return _trace(model, args, kwargs, init_to_sample)
    except ValueError as first:
        try:
            return _trace(model, args, kwargs, init_to_uniform(radius=0.1))
        except ValueError:
            raise first from None


def _trace(
    model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], init: Callable[[Any], Any]
) -> Any:
    """One run, its latent sites filled by ``init``; says of a failure what Pyro does not."""
    tracer = poutine.trace()
    try:
        with tracer:
            InitMessenger(init)(model)(*args, **kwargs)
    except Exception:
        check_data(args, kwargs, _latent_values(tracer.trace))
        _check_finite_data(args, kwargs)
        raise
    return tracer.trace


def _check_shape(name: str, site: Any) -> None:
    """Refuse a log probability of a shape that the model did not mean.

    In plates Pyro's own check says so. Outside of them many models leave batch dimensions
    undeclared, as NUTS lets them; the sum is right, unless value and distribution were broadcast
    against each other.
    """
    if site["cond_indep_stack"]:
        check_site_shape(site, math.inf)
        return
    fn, shape = site["fn"], site["log_prob"].shape
    value = torch.as_tensor(site["value"])
    batch = value.shape[: value.dim() - fn.event_dim]
    if shape not in (fn.batch_shape, batch):
        raise ModelError(
            f"at site '{name}' a value of batch shape {tuple(batch)} and a distribution of batch "
            f"shape {tuple(fn.batch_shape)} were broadcast to {tuple(shape)}, so that each value "
            f"counts more than once; give both the same shape"
        )


def _check_finite_data(args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Name the first argument with a value that is not finite."""
    for name, tensor in _named_arguments(args, kwargs):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NumericalError(
                f"{name} has values that are not finite, and the model failed on it; remove or "
                f"replace them"
            )


def _latent_values(trace: Any) -> dict[str, Tensor]:
    """Values of the latent sites of a trace, which may have ended early."""
    return {name: trace.nodes[name]["value"] for name in latent_sites(trace)}


def _check_sites(trace: Any) -> None:
    """Refuse latent sites that particles cannot represent, naming them."""
    names = latent_sites(trace)
    for name in names:
        site = trace.nodes[name]
        fn = site["fn"]
        if fn.support.is_discrete:
            raise ModelError(
                f"latent site '{name}' is discrete ({type(fn).__name__}); particles move by "
                f"gradients, and only discrete sites with a finite support that Pyro enumerates in "
                f"parallel are summed out. Marginalise it in the model, or observe it"
            )
        for frame in site["cond_indep_stack"]:
            full = getattr(frame, "full_size", None)
            if full is not None and full != frame.size:
                raise ModelError(
                    f"latent site '{name}' is local to plate '{frame.name}', which subsamples "
                    f"{frame.size} of {full}: a particle has one value per row of the whole plate. "
                    f"Use the full plate, or marginalise the site"
                )
    if not names:
        sites = [name for name, site in trace.nodes.items() if site["type"] == "sample"]
        raise ModelError(
            f"the model has no latent site, so there is nothing to infer (sites: "
            f"{', '.join(sites) or 'none'}); give its parameters priors, with PyroSample or "
            f"bayesianize(net)"
        )


def latents_of(trace: Any, names: Iterable[str]) -> dict[str, Latent]:
    """Sites of a trace as latent ones.

    Raises:
        ModelError: if one is missing, or its support cannot be mapped to the real line.
    """
    latents = {}
    for name in names:
        site = trace.nodes.get(name)
        if site is None:
            raise ModelError(f"with these arguments the model has no site '{name}'")
        try:
            transform = biject_to(site["fn"].support)
        except NotImplementedError:
            raise ModelError(
                f"latent site '{name}' has support {site['fn'].support}, which torch cannot map "
                f"to the real line; use a distribution with another support"
            ) from None
        value = transform.inv(site["value"])
        latents[name] = Latent(name, transform, value.shape, value.dtype, value.device)
    return latents


def check_data(args: tuple, kwargs: Mapping[str, Any], latents: Mapping[str, Tensor]) -> None:
    """Refuse latents or data that mix devices or floating-point types, naming the first.

    Args:
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        latents: latent values, by site.

    Raises:
        ModelError: if something lies on another device or has another floating-point type.
    """
    if not latents:
        return
    reference_name, reference = next(iter(latents.items()))
    named = [(f"latent site '{name}'", value) for name, value in latents.items()]
    named += _named_arguments(args, kwargs)
    for name, tensor in named:
        if tensor.device != reference.device or (
            tensor.is_floating_point() and tensor.dtype != reference.dtype
        ):
            raise ModelError(
                f"{name} is {describe(tensor)}, but latent site '{reference_name}' is "
                f"{describe(reference)}; bring both to one device and dtype with .to(...)"
            )


def _named_arguments(args: tuple, kwargs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """The tensors among the arguments, with names for messages."""
    return [
        (f"model argument {_argument_name(path)}", leaf)
        for path, leaf in pytree.tree_flatten_with_path((args, dict(kwargs)))[0]
        if isinstance(leaf, Tensor)
    ]


def _argument_name(path: tuple) -> str:
    """Readable place of a leaf in ``(args, kwargs)``."""
    keys = [getattr(key, "key", getattr(key, "idx", key)) for key in path]
    return " ".join(repr(key) for key in keys[1:])
