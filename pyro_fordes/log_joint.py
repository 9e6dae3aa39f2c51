r"""From a Pyro model to the log joint of stacked unconstrained particles.

For a model :math:`p(D, \theta)` with supports mapped to the real line by
:math:`\theta = T(u)`, a particle :math:`u` has the log joint

.. math:: \log p(D, T(u)) + \log \lvert \det J_T(u) \rvert

on the scale of the full data (plates scale by size over subsample size). All particles of a call
see the same minibatch. The model is run unmodified, once for all particles under
``torch.func.vmap`` or once per particle in a loop.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.utils import _pytree as pytree

from pyro_fordes._checks import ArgumentError, ModelError, describe
from pyro_fordes._random import preserved_rng
from pyro_fordes.arguments import Arguments, substitute
from pyro_fordes.engines import Engine
from pyro_fordes.enumeration import Enumerate, marginal_log_prob
from pyro_fordes.particles import (
    Call,
    Draw,
    Evaluation,
    Latent,
    Setting,
    Subsample,
    Values,
)
from pyro_fordes.perturbation import (
    Activation,
    output_of,
    perturbed,
    rows_of_arguments,
    rows_of_subsamples,
    zeros_like,
)
from pyro_fordes.precision import lower_precision, whole
from pyro_fordes.prototype import (
    Prototype,
    drawing_plates,
    explained,
    latents_of,
    module_of,
    named_buffers,
    run_prototype,
)
from pyro_fordes.randomness import Draws, mixed
from pyro_fordes.runs import Replay, Run
from pyro_fordes.second_order import twice_differentiable
from pyro_fordes.sites import add_shared

_NO_CAPTURE: tuple[()] = ()


class _Wrapped(nn.Module):
    """Makes a call of the model a forward pass, so that ``functional_call`` can swap buffers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


class LogJoint:
    """The log joint of a Pyro model as a function of stacked unconstrained particles.

    Args:
        model: any Pyro callable with continuous latent sites: a function or a ``PyroModule``.
        vectorize: ``"vmap"`` runs the model once for all particles, ``"loop"`` once per particle,
            ``"auto"`` takes the loop for models with recurrent layers or other operations for which
            ``vmap`` has no rule and, on a CPU, with convolutions (which it turns into slower
            grouped ones), and ``vmap`` otherwise.
        max_plate_nesting: how many batch dimensions belong to plates, for models with discrete
            latent sites, which are summed out in the dimensions left of them. None looks at the
            plates of the first run.
        randomness: whether particles draw ``"different"`` random numbers or the ``"same"``, where
            the model draws some beside its sites (dropout).
        autocast: type in which matrix products and convolutions of the model are computed, None
            for that of the tensors.
        share: which share of the batch the model sees, where it is split over processes.

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.LogNormal(0.0, 1.0))
        >>> log_joint = LogJoint(model)
        >>> log_joint.prototype((), {}).latents["z"].shape
        torch.Size([])
        >>> log_joint.evaluate({"z": torch.zeros(3)}, (), {}).log_joint
        tensor([-0.9189, -0.9189, -0.9189])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        vectorize: str = "auto",
        max_plate_nesting: int | None = None,
        randomness: str = "different",
        autocast: torch.dtype | None = None,
        share: int = 0,
    ) -> None:
        self.model = model
        self.share = share
        self.autocast = autocast
        self.randomness = randomness
        self.vectorize = vectorize
        self.max_plate_nesting = max_plate_nesting
        self.arguments = Arguments(model)
        self.module = module_of(model)
        self._wrapped = None if self.module is None else _Wrapped(self.module)
        self._prototypes: dict[Any, Prototype] = {}
        self._first: Prototype | None = None
        self._engine = Engine(self.module, vectorize, randomness)
        # Pyro makes every parameter that it meets require a gradient.
        self._frozen = {
            name
            for name, parameter in self._own_parameters().items()
            if not parameter.requires_grad
        }

    def _own_parameters(self) -> dict[str, Tensor]:
        """The parameters of the model's module, by name."""
        return {} if self.module is None else dict(self.module.named_parameters())

    # ---------------------------------------------------------------- prototype

    def prototype(self, args: tuple, kwargs: Mapping[str, Any]) -> Prototype:
        """Run the model once with validation on, unless it was with arguments of these shapes.

        Random numbers and module buffers are left as they were.

        Raises:
            ModelError: if the model has no latent site, or one that particles cannot represent.
        """
        modules = () if self.module is None else self.module.modules()
        key = _shapes((args, dict(kwargs))), tuple(module.training for module in modules)
        if key not in self._prototypes:
            self.arguments.check(args, kwargs)
            if len(self._prototypes) >= 64:
                self._prototypes.pop(next(iter(self._prototypes)))
            prototype = run_prototype(self.model, args, kwargs, self.max_plate_nesting)
            self._first = self._first or prototype
            _check_supports(prototype.latents, self._first.latents)
            self._prototypes[key] = prototype
        return self._prototypes[key]

    def setting(self, args: tuple, kwargs: Mapping[str, Any], prototype: Prototype) -> Setting:
        """What a space may check itself against."""
        named = () if self.module is None else self.module.named_modules()
        paths = tuple(name for name, _ in named if name)
        return Setting(
            lambda key: self.arguments.locate(key, args, kwargs),
            paths,
            prototype.trace,
            prototype.latents,
            lambda path: self._activation(path, args, kwargs),
        )

    def initial(
        self,
        init: Callable[[Any], Tensor],
        args: tuple,
        kwargs: Mapping[str, Any],
        latents: Mapping[str, Latent],
    ) -> dict[str, Tensor]:
        """Unconstrained values of one new particle, its sites filled by ``init(site)``.

        Raises:
            ModelError: if a site's support depends on the values of others.
            ArgumentError: if ``init`` gives something that is no value of a site.
        """

        def checked(site: Any) -> Tensor:
            if site["name"] not in latents:
                return site["fn"]()  # summed out: any value will do
            value, wanted = init(site), site["fn"].shape()
            if not isinstance(value, Tensor) or value.shape != wanted:
                got = describe(value) if isinstance(value, Tensor) else repr(value)
                raise ArgumentError(
                    f"init_loc_fn gave {got} for site '{site['name']}'; wanted a tensor of shape "
                    f"{tuple(wanted)}"
                )
            latent = latents[site["name"]]
            return value.to(device=latent.device, dtype=latent.dtype)

        buffers = {name: buffer.clone() for name, buffer in named_buffers(self.model).items()}
        with torch.no_grad(), pyro.validation_enabled(False):
            run = poutine.trace(InitMessenger(checked)(self.model)).get_trace
            trace = self._with_buffers(buffers, lambda: run(*args, **kwargs))
        values = {}
        for name, latent in latents.items():
            site = trace.nodes.get(name)
            if site is None:
                raise ModelError(
                    f"latent site '{name}' was missing when the model was run again; the set of "
                    f"sites must not change from run to run"
                )
            # Not zero, which symmetric supports map to the same value.
            point = torch.full(latent.shape, 0.5, dtype=latent.dtype, device=latent.device)
            here = biject_to(site["fn"].support)
            if not torch.equal(here(point), latent.transform(point)):
                raise ModelError(
                    f"the support of site '{name}' changes with the values of other sites; sample "
                    f"it on a fixed support and transform it with pyro.deterministic"
                )
            values[name] = latent.transform.inv(site["value"]).detach().clone()
        return values

    def parameters(self, prototype: Prototype) -> dict[str, Tensor]:
        """The unconstrained tensors behind the model's ``param`` sites, frozen ones left out."""
        own = self._own_parameters()
        found: dict[str, Tensor] = {}
        for name, site in prototype.trace.nodes.items():
            if site["type"] == "param" and name not in self._frozen:
                add_shared(found, name, _parameter(name, site["value"], own))
        return found

    # ---------------------------------------------------------------- evaluation

    def constrain(self, values: Values, latents: Mapping[str, Latent]) -> dict[str, Tensor]:
        """Map stacked unconstrained values to the sites' supports."""
        return {
            name: torch.func.vmap(latents[name].transform)(value) for name, value in values.items()
        }

    def seeds(self, draw: Draw, count: int) -> Tensor:
        """Seeds of all particles, as they follow from a draw."""
        return Draws(draw.seed, 0, self.randomness == "same").seeds(count)

    def streams(
        self, draw: Draw, args: tuple, kwargs: Mapping[str, Any], first: int = 0
    ) -> Draws | None:
        """Random streams of particles from index ``first`` on; None if the model draws nothing."""
        if not self.prototype(args, kwargs).draws:
            return None
        # As one batch draws a mask for each of its rows, so do its shares.
        seed = mixed(draw.seed, -2 - draw.share) if draw.share else draw.seed
        return Draws(seed, first, self.randomness == "same", draw.seeds)

    def draw(self, args: tuple, kwargs: Mapping[str, Any]) -> Draw:
        """Minibatches of the subsampled plates and a seed, from the global generator."""
        subsamples = {
            name: Subsample(_draw(size, count, device, self.share), size)
            for name, (size, count, device) in self.prototype(args, kwargs).plates.items()
        }
        return Draw(subsamples, int(torch.randint(2**62, ())), share=self.share)

    def with_rows(
        self,
        draw: Draw,
        count: Callable[[int], int],
        input: int | str,
        args: tuple,
        kwargs: Mapping[str, Any],
    ) -> Draw:
        """Random numbers with some rows of the batch, which follow from their seed.

        Args:
            draw: what `draw` gave.
            count: how many of so many rows.
            input: argument or submodule whose output has the rows.
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
        """
        value = self._input(input, args, kwargs)
        size = len(value)
        chosen = count(size)
        if chosen >= size:
            return draw
        # From a generator of its own, so that all else is drawn as it is without rows, and on the
        # CPU, so that it is the same on all devices; a copy that does not wait takes them over.
        generator = torch.Generator().manual_seed(mixed(draw.seed, -2))
        rows = torch.randperm(size, generator=generator)[:chosen].sort().values
        return replace(draw, rows=rows.to(value.device, non_blocking=True))

    def _activation(self, path: str, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """What a submodule puts out, its shape only, from a run with the prototype's sites."""
        prototype = self.prototype(args, kwargs)
        if path not in prototype.activations:
            buffers = {name: buffer.clone() for name, buffer in named_buffers(self.model).items()}
            run = poutine.replay(self.model, trace=prototype.trace)
            with preserved_rng(), torch.no_grad(), pyro.validation_enabled(False):
                prototype.activations[path] = output_of(
                    self.module,
                    path,
                    lambda: self._with_buffers(buffers, lambda: run(*args, **kwargs)),
                )
        return prototype.activations[path]

    def _input(self, input: int | str, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """What the model is differentiated by."""
        if isinstance(input, Activation):
            return self._activation(str(input), args, kwargs)
        return self.arguments.locate(input, args, kwargs)[1]

    def evaluate(
        self,
        values: Values,
        args: tuple,
        kwargs: Mapping[str, Any],
        *,
        capture: Callable[[Call], Any] | None = None,
        submodules: tuple[str, ...] = (),
        input: int | str | None = None,
        buffers: Values | None = None,
        draw: Draw | None = None,
        first: int = 0,
    ) -> Evaluation:
        """Log joint of every particle, and what ``capture`` keeps of each run.

        Args:
            values: unconstrained values, ``(particle, *shape)`` each.
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
            capture: function of a particle's `Call` that returns a tree of tensors.
            submodules: paths of submodules whose outputs ``capture`` reads.
            input: argument that gets a particle axis and requires a gradient, or the path of a
                submodule (`Activation`) whose output gets a perturbation of zero.
            buffers: per-particle values of the buffers that the model changes; they are copied.
            draw: what `draw` gave, for several evaluations with equal random numbers; None draws.
                If it has rows, captured is a further run, on these rows of the arguments.
            first: index of the first of these particles among all.

        Raises:
            ModelError: if the model cannot be run for all particles at once.
            NumericalError: if a value is outside a distribution's support (NaN, for one).
        """
        prototype = self.prototype(args, kwargs)
        draw = self.draw(args, kwargs) if draw is None else draw
        draws = self.streams(draw, args, kwargs, first)
        _check_values(values, prototype.latents)
        count = len(next(iter(values.values())))
        plain = Run(args, kwargs, prototype, draw.subsamples)
        shown = plain if draw.rows is None else self._on_rows(plain, draw.rows, input)
        inputs = {}
        if input is not None:
            value = self._input(input, shown.args, shown.kwargs)
            if isinstance(input, Activation):
                stand_ins = zeros_like(value, count)
            else:
                value = value.clone() if value.is_inference() else value.detach()
                stand_ins = value.expand(count, *value.shape)
            inputs[self._name(input, args, kwargs)] = stand_ins.requires_grad_()
        stacked = self.stack_buffers(prototype, count)
        stacked |= {name: buffer.clone() for name, buffer in (buffers or {}).items()}
        shared: dict[str, Tensor] = {}
        own_parameters = self._own_parameters()

        def run(
            particle: Mapping[str, Tensor],
            stand_in: Mapping[str, Tensor],
            own_buffers: dict[str, Tensor],
        ) -> tuple[Tensor, Tensor, Any]:
            constrained, log_det = _constrain(particle, prototype.latents)
            if shown is not plain:  # the run of the step comes first, so its random numbers do
                kept = {name: buffer.clone() for name, buffer in own_buffers.items()}
                with Replay(constrained, plain.subsamples):
                    trace = self._trace(own_buffers, args, kwargs, prototype)
                own_buffers = kept
            with (
                self._perturbed(input, stand_in, shown) as (call_args, call_kwargs),
                self._recorded(submodules) as modules,
                Replay(constrained, shown.subsamples),
            ):
                seen = self._trace(own_buffers, call_args, call_kwargs, shown.prototype)
            if shown is plain:
                trace = seen
            if prototype.enumerated:
                log_density = marginal_log_prob(trace)
            else:
                log_density = trace.log_prob_sum(lambda _, site: not site_is_subsample(site))
            for name, site in trace.nodes.items():
                if site["type"] == "param" and name not in self._frozen:
                    add_shared(shared, name, _parameter(name, site["value"], own_parameters))
            if not isinstance(log_density, Tensor):
                log_density = log_det.new_full((), log_density)
            captured = _NO_CAPTURE if capture is None else capture(Call(seen, modules))
            return log_density.to(log_det.dtype), log_det, self._whole(captured)

        with twice_differentiable() if input is not None else nullcontext():
            (log_density, log_det, captured), stacked = self._engine.map(
                run, values, inputs, stacked, draws=draws
            )
        return Evaluation(
            values, log_density, log_det, captured, inputs, draw.subsamples, stacked, shared
        )

    def _name(self, input: int | str, args: tuple, kwargs: Mapping[str, Any]) -> str:
        """Name of the argument, or the submodule's path."""
        if isinstance(input, Activation):
            return str(input)
        return self.arguments.locate(input, args, kwargs)[0]

    def _on_rows(self, run: Run, rows: Tensor, input: int | str | None) -> Run:
        """A run on some rows of the batch.

        Raises:
            ArgumentError: if the model cannot be run on them.
        """
        size = len(self._input(0 if input is None else input, run.args, run.kwargs))
        args, kwargs = rows_of_arguments(run.args, run.kwargs, size, rows)
        try:
            prototype = self.prototype(args, kwargs)
        except Exception as error:
            raise ArgumentError(
                f"InputGradients(points=...) runs the model on {len(rows)} of the {size} rows of "
                f"its arguments, which failed: {type(error).__name__}: {error}"
            ) from error
        subsamples = rows_of_subsamples(run.subsamples, rows, prototype.plates)
        return Run(args, kwargs, prototype, subsamples)

    @contextmanager
    def _perturbed(
        self, input: int | str | None, stand_in: Mapping[str, Tensor], run: Run
    ) -> Iterator[tuple[tuple, Mapping[str, Any]]]:
        """The arguments of a run, one of them (or a submodule's output) with a particle axis."""
        args, kwargs = run.args, run.kwargs
        if not stand_in or input is None:
            yield args, kwargs
            return
        (tensor,) = stand_in.values()
        if isinstance(input, Activation) and self.module is not None:
            with perturbed(self.module, str(input), tensor):
                yield args, kwargs
        else:
            yield substitute(args, kwargs, self.arguments.place(input, args, kwargs), tensor)

    def replay(
        self,
        values: Values,
        args: tuple,
        kwargs: Mapping[str, Any],
        latents: Mapping[str, Latent],
        *,
        capture: Callable[[Call], Any],
        submodules: tuple[str, ...] = (),
        buffers: Values | None = None,
        draw: bool = False,
        chunk_size: int | None = None,
        template: Values | None = None,
        draws: Draws | None = None,
    ) -> Any:
        """What ``capture`` keeps of each particle's run on arguments without observations.

        Nothing is summed out, no density is computed and the buffers are left as they are.

        Args:
            values: unconstrained values, ``(particle, *shape)`` each.
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
            latents: the latent sites that ``values`` belong to.
            capture: function of a particle's `Call` that returns a tree of tensors.
            submodules: paths of submodules whose outputs ``capture`` reads.
            buffers: per-particle values of the buffers that the model changes.
            draw: whether each particle draws the other sites, one particle after the other, since
                most distributions cannot draw under vmap. If not, they are drawn once, as the first
                particle has them.
            chunk_size: how many particles are run at a time; None for all.
            template: values of the particle that counts as the first, with a particle axis; None
                for that of ``values``.
            draws: seeds of the particles' random numbers; None takes the global generator's.

        Returns:
            The tree, with a leading particle axis.

        Raises:
            ModelError: if the model cannot be run with these arguments.
        """
        self.arguments.check(args, kwargs)
        first, _ = _constrain({n: value[0] for n, value in (template or values).items()}, latents)
        own = {name: buffer.clone() for name, buffer in named_buffers(self.model).items()}
        quiet = pyro.validation_enabled(False)
        with torch.no_grad(), quiet, explained(args, kwargs), Replay(first, {}):
            trace = self._trace(own, args, kwargs)
        missing = [name for name in values if name not in trace.nodes]
        if missing:
            raise ModelError(
                f"with these arguments the model has no sites {missing}, which particles have"
            )
        subsamples = {
            name: Subsample(_draw(size, count, device), size)
            for name, (size, count, device) in drawing_plates(trace).items()
        }
        drawn = {
            name: site["value"]
            for name, site in trace.nodes.items()
            if not draw
            and site["type"] == "sample"
            and not (site["is_observed"] or site_is_subsample(site) or name in values)
        }

        def run(
            particle: Mapping[str, Tensor],
            _: Mapping[str, Tensor],
            own_buffers: dict[str, Tensor],
        ) -> tuple[Any]:
            constrained, _log_det = _constrain(particle, latents)
            given = {**drawn, **constrained}
            with self._recorded(submodules) as modules, Replay(given, subsamples):
                trace = self._trace(own_buffers, args, kwargs)
            return (self._whole(capture(Call(trace, modules))),)

        count = len(next(iter(values.values())))
        parts = []
        for start in range(0, count, chunk_size or count):
            rows = slice(start, start + (chunk_size or count))
            chunk = {name: value[rows] for name, value in values.items()}
            kept = {name: buffer[rows].clone() for name, buffer in (buffers or {}).items()}
            own_draws = draws and replace(draws, first=draws.first + start)
            engine = "loop" if draw else None
            parts.append(self._engine.map(run, chunk, {}, kept, engine, own_draws)[0][0])
        return parts[0] if len(parts) == 1 else pytree.tree_map(lambda *t: torch.cat(t), *parts)

    def latents(
        self, names: Iterable[str], args: tuple, kwargs: Mapping[str, Any]
    ) -> dict[str, Latent]:
        """Latent sites by name, from a run on arguments without observations."""
        with preserved_rng():
            return latents_of(self.prior_trace(args, kwargs), names)

    def prior_trace(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Trace of one run that draws the latent sites from their priors.

        The module's buffers are left as they are.
        """
        self.arguments.check(args, kwargs)
        own = {name: buffer.clone() for name, buffer in named_buffers(self.model).items()}
        with torch.no_grad(), pyro.validation_enabled(False), explained(args, kwargs):
            return self._trace(own, args, kwargs)

    def _trace(
        self,
        buffers: dict[str, Tensor],
        args: tuple,
        kwargs: Mapping[str, Any],
        prototype: Prototype | None = None,
    ) -> Any:
        """Trace of one run, discrete latents enumerated if a prototype with some is given."""
        model, enumerate_ = self.model, nullcontext()
        if prototype is not None and prototype.enumerated:
            model = config_enumerate(model)
            enumerate_ = Enumerate(first_available_dim=-1 - prototype.max_plate_nesting)
        with enumerate_, self._lower():
            return self._with_buffers(
                buffers, lambda: poutine.trace(model).get_trace(*args, **kwargs)
            )

    def stack_buffers(self, prototype: Prototype, count: int) -> dict[str, Tensor]:
        """The buffers that runs of the model change, one copy for each particle."""
        own = named_buffers(self.model)
        return {
            name: own[name].detach().expand(count, *own[name].shape).clone()
            for name in prototype.mutated
        }

    def engine(self, device: torch.device) -> str:
        """The engine that runs on a device: the rule of ``vectorize="auto"``."""
        return self._engine.choose(device)

    def _with_buffers(self, buffers: dict[str, Tensor], run: Callable[[], Any]) -> Any:
        """Run with the model's buffers replaced (and updated in place)."""
        if not buffers or self._wrapped is None:
            return run()
        swapped = {f"model.{name}": buffer for name, buffer in buffers.items()}
        return torch.func.functional_call(self._wrapped, swapped, (run,))

    def _lower(self) -> Any:
        """A context in which the model computes in the lower precision, if one was asked for."""
        if self.autocast is None:
            return nullcontext()
        return lower_precision(self.module, self.autocast)

    def _whole(self, tree: Any) -> Any:
        """A tree of tensors, those in the lower precision in single precision again."""
        return tree if self.autocast is None else whole(tree, self.autocast)

    @contextmanager
    def _recorded(self, submodules: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """Record the outputs of submodules while the model runs."""
        outputs: dict[str, Any] = {}
        if self.module is None:
            yield outputs
            return
        with ExitStack() as stack:
            for path in submodules:

                def hook(module: nn.Module, inputs: Any, output: Any, path: str = path) -> None:
                    outputs[path] = output

                handle = self.module.get_submodule(path).register_forward_hook(hook)
                stack.callback(handle.remove)
            yield outputs


def _shapes(tree: Any) -> Any:
    """Hashable description of call arguments: equal ones give the same prototype."""
    leaves, spec = pytree.tree_flatten(tree)
    described = tuple(
        (leaf.shape, leaf.dtype, leaf.device)
        if isinstance(leaf, Tensor)
        else leaf
        if isinstance(leaf, bool | int | str | None)
        else type(leaf)
        for leaf in leaves
    )
    return described, repr(spec)  # specs have no hash before torch 2.7


def _check_values(values: Values, latents: Mapping[str, Latent]) -> None:
    """Refuse a call of the model whose latent sites are not those of the particles."""
    if set(values) != set(latents):
        extra = [name for name in latents if name not in values]
        hint = f"; was the observation of {extra} left out?" if extra else ""
        raise ModelError(
            f"with these arguments the model has the latent sites {list(latents)}, but particles "
            f"have {list(values)}{hint}"
        )
    for name, value in values.items():
        if value.shape[1:] != latents[name].shape:
            raise ModelError(
                f"with these arguments the latent site '{name}' has the unconstrained shape "
                f"{tuple(latents[name].shape)}, but particles have {tuple(value.shape[1:])}; the "
                f"size of a latent site must not change with the batch"
            )


def _check_supports(latents: Mapping[str, Latent], first: Mapping[str, Latent]) -> None:
    """Refuse a site whose support follows the data: its particles would change their meaning."""
    for name in latents.keys() & first.keys():
        here, there = latents[name], first[name]
        if here.shape != there.shape:
            continue  # `_check_values` says more about it
        point = torch.full(here.shape, 0.5, dtype=here.dtype, device=here.device)
        if not torch.equal(here.transform(point), there.transform(point)):
            raise ModelError(
                f"the support of site '{name}' changes with the model's arguments; sample it on a "
                f"fixed support and transform it with pyro.deterministic"
            )


def _parameter(name: str, value: Any, own: Mapping[str, Tensor]) -> Tensor:
    """The unconstrained tensor behind a ``param`` site, which an optimiser can move.

    A module's own parameter comes before the one of Pyro's store, which may be that of another
    module with the same names.
    """
    parameter = own.get(name.replace("$$$", "."))
    if parameter is not None:
        return parameter
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def _draw(size: int, count: int, device: Any, share: int = 0) -> Tensor:
    """Indices of a minibatch without replacement, as ``pyro.plate`` draws them.

    Those of several shares are parts of one larger minibatch.
    """
    return torch.randperm(size, device=device).roll(-share * count)[:count]


def _constrain(
    values: Mapping[str, Tensor], latents: Mapping[str, Latent]
) -> tuple[dict[str, Tensor], Tensor]:
    """One particle's constrained values and the sum of log determinants."""
    constrained = {}
    log_det: Tensor | float = 0.0
    for name, value in values.items():
        transform = latents[name].transform
        constrained[name] = transform(value)
        if not _is_identity(transform):
            log_det = log_det + transform.log_abs_det_jacobian(value, constrained[name]).sum()
    if not isinstance(log_det, Tensor):
        log_det = next(iter(values.values())).new_zeros(())
    return constrained, log_det


def _is_identity(transform: Any) -> bool:
    """Whether a transform is the identity, also under ``IndependentTransform``."""
    while hasattr(transform, "base_transform"):
        transform = transform.base_transform
    return isinstance(transform, torch.distributions.ComposeTransform) and not transform.parts
