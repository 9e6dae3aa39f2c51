"""Priors on an unmodified ``nn.Module``, and particles that start from networks."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn

from pyro_fordes._checks import ArgumentError, check_number

Prior = float | torch.distributions.Distribution | Callable[[str, Tensor], Any]
"""A standard deviation, a distribution, or a function of a parameter's name and value."""


class _CentredNormal(dist.Normal):
    """A zero-mean Normal of one standard deviation, with the log density in two passes.

    torch's broadcasts location and scale to every weight first, and takes six.
    """

    @classmethod
    def of(cls, scale: float, anchor: Tensor) -> "_CentredNormal":
        """On the device and dtype of a tensor."""
        made = cls(anchor.new_zeros(()), anchor.new_full((), scale), validate_args=False)
        made._sd = scale
        return made

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same with another batch shape."""
        new = super().expand(batch_shape, _instance)
        new._sd = self._sd
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, elementwise."""
        if value.shape[value.dim() - len(self.batch_shape) :] != self.batch_shape:
            return super().log_prob(value)
        z = value / self._sd if self._sd != 1 else value
        constant = z.new_full((), -math.log(self._sd) - math.log(2 * math.pi) / 2)
        return torch.addcmul(constant, z, z, value=-0.5)


class _PriorFor:
    """The prior of one parameter, built on the device and dtype its module has now."""

    def __init__(self, scale: float | None, given: Any, shape: torch.Size) -> None:
        self.scale = scale
        self.given = given
        self.shape = shape
        self._built: tuple[Any, Any] = (None, None)

    def __call__(self, module: nn.Module) -> Any:
        anchor = module.get_buffer("_prior_anchor")
        key = (anchor.device, anchor.dtype)
        if self._built[0] != key:
            self._built = (key, self._build(anchor))
        return self._built[1]

    def _build(self, anchor: Tensor) -> Any:
        # The particles are checked by the prototype run and by the driver; checks inside the
        # distribution would be repeated at every step.
        prior = self.given if self.scale is None else _CentredNormal.of(self.scale, anchor)
        batch_shape = self.shape[: len(self.shape) - prior.event_dim]
        prior = prior.expand(batch_shape)
        return prior.to_event(len(batch_shape)) if batch_shape else prior


def bayesianize(net: nn.Module, prior: Prior = 1.0) -> PyroModule:
    """Put priors on the parameters of a network.

    Every parameter becomes a latent site named by its path, such as ``"net.0.weight"`` where the
    result is the attribute ``net`` of a model. A parameter that is tied (one tensor at several
    places) is one site, named by the first of its paths. The network itself is left as it was.

    Args:
        net: any ``nn.Module``.
        prior: the standard deviation of a zero-mean Normal; or a distribution, expanded to each
            parameter's shape; or a function of the parameter's name and value that returns either,
            or None to leave the parameter as it is: shared by all particles, and trained unless
            ``requires_grad`` is False, as it is in frozen parts.

    Returns:
        A copy of the network as a ``PyroModule``, to be called or used inside another one.

    Raises:
        ArgumentError: if a prior is of the wrong kind or does not fit a parameter's shape.

    Example:
        >>> net = bayesianize(nn.Linear(2, 1), prior=0.5)
        >>> from pyro import poutine
        >>> trace = poutine.trace(net).get_trace(torch.zeros(3, 2))
        >>> {name: tuple(trace.nodes[name]["value"].shape) for name in ("weight", "bias")}
        {'weight': (1, 2), 'bias': (1,)}
    """
    if not isinstance(net, nn.Module):
        raise ArgumentError(f"bayesianize(net) needs an nn.Module, got {type(net).__name__}")
    _check_net(net)
    module = copy.deepcopy(net)
    to_pyro_module_(module)
    _name_once(module)
    owners = dict(module.named_modules())
    for path, attribute, first in _tied_places(net):
        place, _, name = first.rpartition(".")
        _tie(owners[path], attribute, type(net.get_submodule(path)), (owners[place], name))
    count = 0
    for name, parameter in list(module.named_parameters()):
        path, _, attribute = name.rpartition(".")
        value: Any = prior
        if _is_rule(prior):
            value = _call_rule(prior, name, parameter)
        if value is None:
            continue
        built = _check_prior(name, value, parameter)
        owner = owners[path]
        if not hasattr(owner, "_prior_anchor"):
            owner.register_buffer("_prior_anchor", parameter.new_zeros(()), persistent=False)
        setattr(owner, attribute, PyroSample(built))
        count += 1
    if count == 0:
        raise ArgumentError(
            f"bayesianize put no prior: {type(net).__name__} has no parameter"
            + (" for which prior(name, value) is not None" if _is_rule(prior) else "")
        )
    # In a tuple, so that it is no submodule: `plain_module` copies it.
    object.__setattr__(module, "_plain", (copy.deepcopy(net),))
    return module


def plain_module(
    model: nn.Module, path: str | None, values: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> nn.Module:
    """A bayesianized network of a model as the plain module it was made from.

    Args:
        model: the model's module.
        path: the network's path in it; None for the only one.
        values: one particle's values of the latent sites.
        buffers: one particle's buffers, by name in the model.

    Raises:
        ArgumentError: if there is no such network, or several and no path.
    """
    nets = {name: module for name, module in model.named_modules() if hasattr(module, "_plain")}
    if path is None and len(nets) == 1:
        path = next(iter(nets))
    if path not in nets:
        raise ArgumentError(
            f"module(..., path={path!r}) needs the path of one of the model's bayesianized "
            f"networks: {', '.join(map(repr, nets)) or 'it has none'}"
        )
    net, source = copy.deepcopy(nets[path]._plain[0]), nets[path]
    prefix = f"{path}." if path else ""
    current = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            own = values.get(prefix + name, buffers.get(prefix + name))
            tensor.copy_(current[name] if own is None else own)
    return net.train(source.training)


def _check_net(net: nn.Module) -> None:
    """Refuse networks with parameters that have no shape yet, naming the first."""
    for name, parameter in net.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ArgumentError(
                f"parameter '{name}' has no shape yet; run the network once on an example before "
                f"bayesianize(net)"
            )


def _name_once(root: PyroModule) -> None:
    """Let a module that stands at several places be named by the first, not by the last."""
    places: dict[nn.Module, list[str]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(path)
    for module, paths in places.items():
        if len(paths) > 1:
            module.__dict__["_pyro_set_supermodule"] = partial(_named, module, tuple(paths))
    root._pyro_set_supermodule("", root._pyro_context)


def _named(module: Any, paths: tuple[str, ...], name: str, context: Any) -> None:
    """Take the name that Pyro gives a module at one of its places, if that is the first."""
    here = [path for path in paths if f".{name}".endswith(f".{path}")]
    if max(here, key=len, default=paths[0]) == paths[0]:
        type(module)._pyro_set_supermodule(module, name, context)


def _tied_places(net: nn.Module) -> list[tuple[str, str, str]]:
    """Where parameters stand that have a name elsewhere: module, attribute and first name."""
    first: dict[int, str] = {}
    tied = []
    for path, module in net.named_modules():
        for attribute, parameter in module._parameters.items():
            name = f"{path}.{attribute}" if path else attribute
            if parameter is not None and first.setdefault(id(parameter), name) != name:
                tied.append((path, attribute, first[id(parameter)]))
    return tied


_TIED: dict[type, type] = {}


class _NewTied:
    """Makes an empty object of the class below, for copies and pickles."""

    def __init__(self, kind: type) -> None:
        self.__class__ = _tied_class(kind)


def _tied_class(kind: type) -> type:
    """A module's class, its tied parameters read where they stand first."""
    if kind not in _TIED:
        base: Any = PyroModule[kind]

        class Tied(base):
            def __getattr__(self, name: str) -> Any:
                place = self.__dict__.get("_tied", {}).get(name)
                return super().__getattr__(name) if place is None else getattr(*place)

            def __reduce__(self) -> Any:
                return _NewTied, (kind,), self.__dict__.copy()

        Tied.__name__ = base.__name__
        _TIED[kind] = Tied
    return _TIED[kind]


def _tie(owner: Any, attribute: str, kind: type, place: tuple[nn.Module, str]) -> None:
    """Make a parameter of a module, made from one of a kind, that of another module."""
    delattr(owner, attribute)
    owner.__class__ = _tied_class(kind)
    # In a dict, so that the other module is no submodule.
    owner.__dict__.setdefault("_tied", {})[attribute] = place


def _call_rule(prior: Any, name: str, parameter: Tensor) -> Any:
    """What a rule gives for a parameter, or an error that names the parameter."""
    if isinstance(prior, type):
        raise ArgumentError(
            f"prior must be a standard deviation, a distribution or a function of name and value; "
            f"got the class {prior.__name__}; write {prior.__name__}(...)"
        )
    try:
        return prior(name, parameter.detach())
    except Exception as error:
        raise ArgumentError(
            f"prior(name, value) raised {type(error).__name__} for parameter '{name}': {error}"
        ) from error


def _is_rule(prior: Any) -> bool:
    """Whether a prior is a function of a parameter's name and value."""
    return callable(prior) and not isinstance(prior, torch.distributions.Distribution)


def _check_prior(name: str, value: Any, parameter: Tensor) -> _PriorFor:
    """The prior of one parameter, or an error that names it."""
    if isinstance(value, torch.distributions.Distribution):
        shape = parameter.shape
        batch = shape[: len(shape) - len(value.event_shape)]
        if batch + value.event_shape != shape:
            raise ArgumentError(
                f"the prior of parameter '{name}' has event shape {tuple(value.event_shape)}, "
                f"which does not end the parameter's shape {tuple(shape)}"
            )
        try:
            value.expand(batch)
        except (RuntimeError, NotImplementedError) as error:
            raise ArgumentError(
                f"the prior of parameter '{name}' has batch shape {tuple(value.batch_shape)}, "
                f"which cannot be expanded to {tuple(batch)}"
            ) from error
        return _PriorFor(None, value, shape)
    try:
        scale = check_number(f"the prior of parameter '{name}'", value, minimum=0.0, exclusive=True)
    except ArgumentError as error:
        raise ArgumentError(
            f"{error}; give a standard deviation, a distribution, or a function of name and value"
        ) from None
    return _PriorFor(scale, None, parameter.shape)


@dataclass(frozen=True)
class FromNetwork:
    """Initial values of one particle: a function of a site.

    Attributes:
        values: values of sites, by name; other sites are drawn from their priors.
        rest: what the network has beside: buffers, and parameters that are no sites, by the name
            that they have in the model.
        complete: whether everything in ``rest`` must be something in the model.
    """

    values: Mapping[str, Tensor]
    rest: Mapping[str, Tensor]
    complete: bool

    def __call__(self, site: Any) -> Tensor:
        """Value of a site."""
        value = self.values.get(site["name"])
        return init_to_sample(site) if value is None else value.detach().clone()


Network = nn.Module | Mapping[str, Tensor]
"""A network or its state dict."""


@dataclass(frozen=True)
class InitToModules:
    """Initial values from networks, one per particle; see `init_to_modules`."""

    nets: Callable[[], Network] | tuple[Network, ...]

    def for_particle(self, index: int, shapes: Mapping[str, torch.Size]) -> FromNetwork:
        """Init function of one particle.

        Args:
            index: the particle, counted from 0.
            shapes: shape of each latent site of the model.

        Raises:
            ArgumentError: if there is no such network, or its parameters match no sites.
        """
        if callable(self.nets):
            net = self.nets()
        elif index < len(self.nets):
            net = self.nets[index]
        else:
            raise ArgumentError(
                f"init_to_modules got {len(self.nets)} networks, too few for particle {index + 1}; "
                f"give one per particle, or a factory"
            )
        if isinstance(net, nn.Module):
            tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
            names = [name for name, _ in net.named_parameters()]
        elif isinstance(net, Mapping):
            tensors = {name: value for name, value in net.items() if isinstance(value, Tensor)}
            names = [name for name in tensors if name in shapes] or list(tensors)
        else:
            raise ArgumentError(
                f"init_to_modules needs nn.Modules or state dicts, got {type(net).__name__} for "
                f"particle {index}"
            )
        prefix = _matching_prefix({name: tensors[name] for name in names}, shapes)
        named = {prefix + name: tensor for name, tensor in tensors.items()}
        values = {name: tensor for name, tensor in named.items() if name in shapes}
        rest = {name: tensor for name, tensor in named.items() if name not in shapes}
        return FromNetwork(values, rest, not isinstance(net, nn.Module))


def init_to_modules(
    nets: Callable[[], Network] | Iterable[Network],
) -> InitToModules:
    """Start each particle from its own network.

    Parameter names of the networks are matched to the sites of the bayesianized submodule by full
    path; sites outside it are drawn from their priors. Buffers that differ from particle to
    particle (running statistics of BatchNorm) are taken from the network, too. Parameters without a
    prior stay those of the model.

    Args:
        nets: a function that builds a freshly initialised network, called once per particle, or
            an iterable of networks (trained ones, for instance), one per particle. A state dict
            may stand for a network.

    Returns:
        A value for ``ParticleInference(init_loc_fn=...)``.

    Raises:
        ArgumentError: if ``nets`` is neither.

    Example:
        >>> init = init_to_modules(lambda: nn.Linear(2, 1))
        >>> shapes = {"net.weight": torch.Size([1, 2]), "net.bias": torch.Size([1])}
        >>> callable(init.for_particle(0, shapes))
        True
    """
    if isinstance(nets, nn.Module | Mapping):
        raise ArgumentError(
            f"init_to_modules got one {'nn.Module' if isinstance(nets, nn.Module) else 'dict'}, "
            f"from which all particles would start equal; give a function that builds a new one, "
            f"or a list with one per particle"
        )
    if callable(nets):
        return InitToModules(nets)
    try:
        return InitToModules(tuple(nets))
    except TypeError:
        raise ArgumentError(
            f"init_to_modules needs a function or an iterable of networks, got "
            f"{type(nets).__name__}"
        ) from None


def take_buffers(
    start: FromNetwork,
    index: int,
    stacked: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    parameters: Iterable[str],
) -> None:
    """Write the buffers of the network that a particle starts from into the particle's.

    Args:
        start: where the particle starts.
        index: its row.
        stacked: per-particle buffers of the model, changed.
        buffers: all buffers of the model.
        parameters: names of the model's parameters.

    Raises:
        ArgumentError: if the network has a buffer of another shape, or of another value where the
            model has one for all particles; or if a state dict has something else left over.
    """
    known = {*buffers, *parameters}
    for name, tensor in start.rest.items():
        if name in buffers and tensor.shape != buffers[name].shape:
            raise ArgumentError(
                f"buffer '{name}' of the network for particle {index} has shape "
                f"{tuple(tensor.shape)}, the model's {tuple(buffers[name].shape)}"
            )
        if name in stacked:
            with torch.no_grad():
                stacked[name][index].copy_(tensor)
        elif name in buffers and not torch.equal(buffers[name], tensor.to(buffers[name])):
            raise ArgumentError(
                f"buffer '{name}' of the network for particle {index} is not that of the model, "
                f"which all particles share, since the model does not change it; give the model "
                f"the value that is right"
            )
        elif start.complete and name not in known and not _is_tied(tensor, start):
            raise ArgumentError(
                f"init_to_modules found '{name}' in the state dict for particle {index}, which is "
                f"neither a latent site nor a parameter nor a buffer of the model"
            )


def _is_tied(tensor: Tensor, start: FromNetwork) -> bool:
    """Whether an entry of a state dict is a site's value under another name."""
    return any(v.shape == tensor.shape and torch.equal(v, tensor) for v in start.values.values())


def _matching_prefix(parameters: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> str:
    """The path under which every site has a parameter of its name and shape."""
    candidates = set()
    for name in parameters:
        for site in shapes:
            if site == name or site.endswith("." + name):
                candidates.add(site[: len(site) - len(name)])
    matches = {}
    for prefix in candidates:
        below = [site for site in shapes if site.startswith(prefix)]
        fits = [
            site
            for site in below
            if site.removeprefix(prefix) in parameters
            and parameters[site.removeprefix(prefix)].shape == shapes[site]
        ]
        # At the root, sites beside the network (a noise scale, say) are allowed.
        if fits and (len(fits) == len(below) or (prefix == "" and len(fits) == len(parameters))):
            matches[prefix] = len(fits)
    best = [prefix for prefix, size in matches.items() if size == max(matches.values())]
    if len(best) != 1:
        raise ArgumentError(
            f"init_to_modules cannot match the network's parameters ({_some(parameters)}) to the "
            f"model's latent sites ({_some(shapes)}): "
            + (f"they fit under each of {sorted(best)}" if best else "names or shapes differ")
        )
    return best[0]


def _some(names: Iterable[str]) -> str:
    """The first names of many, for a message."""
    names = list(names)
    return ", ".join(names[:4]) + (f", ... {len(names)} in all" if len(names) > 4 else "")
