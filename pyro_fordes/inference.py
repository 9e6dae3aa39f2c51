r"""`ParticleInference`: the driver, and the only object that changes.

.. math:: \text{velocity} = \frac1T \nabla \log p(D, \theta) + \nabla \log\lvert\det J\rvert
    + \lambda \left(\frac{\partial r}{\partial \theta}\right)^T V(r)

with temperature :math:`T`, repulsion scale :math:`\lambda`, representation :math:`r` and the
transport's velocity :math:`V`. It is ascent on the log joint; the optimiser gets its negative.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor

from pyro_fordes._checks import (
    ArgumentError,
    CheckpointError,
    ModelError,
    StateError,
    check_part,
    check_positive_int,
)
from pyro_fordes._random import RandomStream, preserved_rng
from pyro_fordes.bnn import plain_module
from pyro_fordes.checkpoint import write
from pyro_fordes.compiled import CompiledForces
from pyro_fordes.faults import Faults
from pyro_fordes.forces import Forces, Rounds, compute_scores, draw_for, evaluate_all, represent_all
from pyro_fordes.initial import check_shares, initial_particles, share_parameters
from pyro_fordes.input_gradients import InputGradients
from pyro_fordes.kernels import RBF, Kernel
from pyro_fordes.log_joint import LogJoint
from pyro_fordes.loops import Callback, Position, fit_epochs, run_steps, size_of
from pyro_fordes.optimizers import Optim, stepper
from pyro_fordes.options import check_options
from pyro_fordes.particles import (
    Call,
    Evaluation,
    Gather,
    Latent,
    OneProcess,
    Schedule,
    local_row,
)
from pyro_fordes.precision import check_autocast
from pyro_fordes.prototype import Prototype
from pyro_fordes.rollback import Before
from pyro_fordes.sites import pointwise_log_prob
from pyro_fordes.spaces import Space
from pyro_fordes.state import (
    Load,
    copied,
    fall_back,
    finish_loading,
    samples_of,
    share_loaded,
    state_of,
    take_state,
)
from pyro_fordes.summary import LossHistory, Summary, summarize
from pyro_fordes.transports import WGD, Transport
from pyro_fordes.update import check_start, forces_of, read_faults, update


class ParticleInference:
    """Particle-based variational inference for any Pyro model.

    Moves ``num_particles`` samples of the latent sites by Wasserstein gradient descent (or another
    transport) and keeps them apart with a kernel in a space of choice. It takes the place of
    ``pyro.infer.SVI`` or ``SVGD`` with the same model and optimiser.

    Args:
        model: any Pyro callable: a function or a ``PyroModule``.
        optim: a ``pyro.optim`` optimiser (schedulers included), or a function of a list of tensors
            that returns a ``torch.optim.Optimizer``.
        num_particles: number of particles.
        kernel: base kernel with its space; the default compares input gradients (FoRDE).
        transport: update rule: `WGD`, `SVGD` or `Ensemble`.
        init_loc_fn: how particles start: a function from ``pyro.infer.autoguide.initialization``,
            or `init_to_modules`.
        repulsion_scale: factor of the repulsive force, a number or a function of the step. 1 is
            the posterior-correct flow on the full-data scale; the FoRDE paper's is
            ``num_data / batch_size``.
        repulsion_every: repel at every n-th step only, n times as hard, so that the average is
            unchanged; the steps between cost no more than those of `Ensemble`. Not with `SVGD`,
            whose kernel acts on the log joint's gradient too.
        temperature: T of the target p(theta | D)^(1/T), a number or a function of the step.
        num_data: divide the velocity by this number, so that learning rates of the
            deep-learning literature apply. None for 1.
        vectorize: ``"vmap"``, ``"loop"`` or ``"auto"``; see `LogJoint`.
        chunk_size: evaluate so many particles at a time, so that a step holds the activations of
            one chunk only. Spaces that compare what the model computes (`InputGradients`,
            `Outputs`, `Features`) then cost one more forward pass per chunk but the last. The
            numbers do not change. On a CPU no copy of the particles is kept either, so that an
            optimiser that fails in its step may leave some sites moved. None evaluates all
            together.
        randomness: whether dropout and other random numbers in the model are ``"different"`` for
            each particle or the ``"same"`` for all.
        autocast: ``torch.bfloat16`` computes matrix products and convolutions of the model in it;
            particles, log densities, representations and kernel stay in single precision.
        compile: trace each kind of step (model, both backward passes, kernel) to one graph and
            compile it with Inductor. The first step takes half a minute or longer, and so does the
            first with arguments of another shape. Steps whose forces are measured apart (see
            ``diagnostics_every``) are not compiled. What the model computes in Python (a counter,
            an attribute that changes) is frozen at the first step; a model that cannot be traced
            runs as it is, with a warning.
        max_plate_nesting: how many batch dimensions plates use, for models with discrete latent
            sites, which are summed out as Pyro's NUTS does it; None looks at the first run.
        seed: seed of the inference's own random numbers (initial particles, minibatches, dropout).
            None draws one from torch's global generator, so ``pyro.set_rng_seed`` works.
        diagnostics_every: how many steps apart the two forces are measured separately, which costs
            one more backward pass.
        nan: what becomes of a particle whose log joint, force or value is not finite, while the
            others go on: ``"raise"`` raises a `NumericalError` with all as it was before the step,
            ``"skip"`` leaves the particle out of the step, ``"reset"`` draws it again near one of
            the others. See ``docs/faults.md``.
        clip_norm: bound of the norm, over all sites, of what the optimiser gets as a particle's
            gradient: the whole velocity, both forces, divided by ``num_data``. The gradients of
            shared parameters have the same bound, together. None clips nothing.
        gather: `distributed.Ranks` spreads the particles over the processes that ``torchrun`` has
            started; the default keeps them all here.

    Raises:
        ArgumentError: if an argument cannot be used; nothing has run by then.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_fordes import ParticleInference, RBF, Weights
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> inference = ParticleInference(
        ...     model, pyro.optim.Adam({"lr": 0.5}), 20, kernel=RBF(Weights()), seed=0
        ... )
        >>> losses = inference.run(200, torch.tensor([1.0, 2.0, 3.0]), progress_bar=False)
        >>> inference.get_samples()["mean"].mean().round(decimals=1)
        tensor(2.)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        optim: Optim,
        num_particles: int,
        *,
        kernel: Kernel = RBF(InputGradients()),
        transport: Transport = WGD(),
        init_loc_fn: Any = init_to_sample,
        repulsion_scale: Schedule = 1.0,
        repulsion_every: int = 1,
        temperature: Schedule = 1.0,
        num_data: int | None = None,
        vectorize: str = "auto",
        chunk_size: int | None = None,
        randomness: str = "different",
        autocast: torch.dtype | None = None,
        compile: bool = False,
        max_plate_nesting: int | None = None,
        seed: int | None = None,
        diagnostics_every: int = 50,
        nan: str = "raise",
        clip_norm: float | None = None,
        gather: Gather = OneProcess(),
    ) -> None:
        check_options(
            model=model,
            num_particles=num_particles,
            kernel=kernel,
            transport=transport,
            init_loc_fn=init_loc_fn,
            repulsion_scale=repulsion_scale,
            repulsion_every=repulsion_every,
            temperature=temperature,
            num_data=num_data,
            vectorize=vectorize,
            chunk_size=chunk_size,
            randomness=randomness,
            compile=compile,
            max_plate_nesting=max_plate_nesting,
            seed=seed,
            diagnostics_every=diagnostics_every,
            nan=nan,
            clip_norm=clip_norm,
            gather=gather,
        )
        self.model, self.optim, self.num_particles = model, optim, num_particles
        self.kernel, self.transport, self.init_loc_fn = kernel, transport, init_loc_fn
        self.repulsion_scale, self.repulsion_every = repulsion_scale, repulsion_every
        self.temperature, self.num_data = temperature, num_data
        self.chunk_size, self.diagnostics_every = chunk_size, diagnostics_every
        self.clip_norm, self.compile = clip_norm, compile
        self._stepper = stepper(optim)
        self._faults = Faults(nan, num_particles)
        self._gather = gather.split(num_particles)
        self._faults.check_split(self._gather != OneProcess())
        self._stepper.check_split(self._gather != OneProcess())
        if compile and (chunk_size is not None or self._gather != OneProcess()):
            raise ArgumentError(
                f"compile=True makes one graph of a step of all particles in one process, which "
                f"chunk_size={chunk_size} or gather={gather!r} would cut; leave one of them out"
            )
        if seed is None:
            seed = self._gather.first(lambda: int(torch.randint(2**62, ())))
        self._seed = seed
        self._random = RandomStream(seed)
        self._compiled = CompiledForces() if compile else None
        autocast = check_autocast(autocast)
        self._log_joint = LogJoint(
            model, vectorize, max_plate_nesting, randomness, autocast, self._gather.share
        )
        self._space = kernel.space
        self._particles: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._before = Before()
        self._last: tuple[tuple, Mapping[str, Any]] | None = None  # arguments of faults not read
        self._latents: Mapping[str, Latent] = {}
        self._diagnostics: dict[str, Any] | None = None
        self._trajectory: Any = None  # the last one that recorded this inference
        self._losses = LossHistory()
        self._batches_per_epoch = 0
        self._step = 0
        self._shared: dict[str, Tensor] = {}
        self._enumerated: tuple[str, ...] = ()
        self._loaded: dict[str, Any] | None = None  # a state that waits for the model's arguments
        self._fallback: dict[str, Any] = {}  # what it replaced, till it is known to fit
        self._position: Position | None = None  # of the fit that is under way
        self._resumable: Position | None = None  # of the last one

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Run the model once, check everything and draw the initial particles.

        The first `step`, `run`, `fit` or `evaluate_loss` does this; calling it again does nothing.

        Args:
            *args: arguments of the model.
            **kwargs: keyword arguments of the model.

        Raises:
            FordesError: if model, data, space and particles do not fit together.
        """
        if self._particles and self._loaded is None:
            return
        self._log_joint.arguments.check(args, kwargs)
        space = self._space
        if self.transport.repulsive:
            self.transport.check(space)
            space = self._prepare(space, args, kwargs, scores=self.transport.uses_scores)
        prototype = self._log_joint.prototype(args, kwargs)
        latents = prototype.latents
        check_shares(prototype, space if self.transport.repulsive else None, self._gather)
        share_parameters(self._log_joint, prototype, self._gather)
        if self._loaded is not None:
            try:
                finish_loading(self, self._loaded, space, prototype)
            except CheckpointError:
                fall_back(self)
                raise
            return
        particles, buffers = initial_particles(
            self._log_joint,
            self.init_loc_fn,
            self.num_particles,
            self._seed,
            args,
            kwargs,
            prototype,
            self._gather,
        )
        self._space, self._particles, self._buffers = space, particles, buffers
        self._latents, self._enumerated = latents, prototype.enumerated
        try:
            with preserved_rng():
                check_start(self, args, kwargs)
        except BaseException:
            self._space, self._particles, self._buffers = self.kernel.space, {}, {}
            raise

    def _prepare(
        self, space: Space, args: tuple, kwargs: Mapping[str, Any], *, scores: bool = False
    ) -> Space:
        """A space made ready for the model, or an error that says why it does not fit."""
        space.check(lambda key: self._log_joint.arguments.locate(key, args, kwargs))
        prototype = self._log_joint.prototype(args, kwargs)
        setting = self._log_joint.setting(args, kwargs, prototype)
        return space.prepare(replace(setting, scores=scores))

    def _together(self, what: str, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """A context in which all processes do the same with the same arguments."""

        def content() -> dict[str, Any]:
            random = self._random.state_dict()
            return {"data": (args, dict(kwargs)), "random numbers (seed=...)": random}

        return self._gather.together(what, content)

    def _forces(self, args: tuple, kwargs: Mapping[str, Any], measure: bool) -> Forces:
        """The negative velocity of every site."""
        return forces_of(self, args, kwargs, measure)

    def _update(self, args: tuple, kwargs: Mapping[str, Any]) -> Float[Tensor, ""]:
        """One update; returns the loss before it, on the particles' device."""
        return update(self, args, kwargs)

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Move all particles once.

        Args:
            *args: arguments of the model.
            **kwargs: keyword arguments of the model.

        Returns:
            The loss: mean over particles of the negative log joint before the update, on the
            full-data scale.

        Raises:
            FordesError: if something does not fit or is not finite; the particles are then
                unchanged.
        """
        loss = update(self, args, kwargs)
        self._read_faults()
        return loss.item()

    def _read_faults(self) -> None:
        """Report what a device has found since the last time; on a CPU there is nothing left."""
        read_faults(self)

    def _rounds(self, args: tuple, kwargs: Mapping[str, Any], space: Space | None = None) -> Rounds:
        """Evaluations of the particles on some arguments, with random numbers of their own."""
        draw = draw_for(space, self._log_joint, args, kwargs)
        first, particles = self._gather.rows.start or 0, self._particles
        return Rounds(self._log_joint, particles, self._buffers, args, kwargs, draw, space, first)

    def _evaluate(
        self, args: tuple, kwargs: Mapping[str, Any], capture: Callable[[Call], Any] | None = None
    ) -> Evaluation:
        """The model at all particles, without a graph."""
        return evaluate_all(self._rounds(args, kwargs), self.chunk_size, capture, self._gather)

    @torch.no_grad()
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss that `step` would return, without an update or a random number used up.

        Args:
            *args: arguments of the model.
            **kwargs: keyword arguments of the model.

        Returns:
            Mean over particles of the negative log joint.
        """
        with self._together("evaluate_loss", args, kwargs):
            with torch.enable_grad():
                self.setup(*args, **kwargs)
            with self._random.looked_at():
                evaluation = self._evaluate(args, kwargs)
            return -self._gather(evaluation.log_joint).mean().item()

    def run(
        self,
        num_steps: int,
        *args: Any,
        progress_bar: bool = True,
        callback: Callback | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, " step"]:
        """Take ``num_steps`` steps on the same arguments.

        Args:
            num_steps: number of steps.
            *args: arguments of the model.
            progress_bar: whether to show one, with the loss and the force ratio.
            callback: called as ``callback(inference, step, loss)`` after each step; returning True
                stops.
            **kwargs: keyword arguments of the model.

        Returns:
            The loss of each step taken.
        """
        with self._gather.together("run"):
            return run_steps(self, num_steps, args, kwargs, progress_bar, callback)

    def fit(
        self,
        loader: Iterable[Any],
        num_epochs: int,
        *,
        progress_bar: bool = True,
        callback: Callback | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int | timedelta | None = None,
        keep: int = 3,
    ) -> Float[Tensor, " step"]:
        """Take one step per batch of a data loader, for some epochs.

        A batch that is a tuple or list becomes the model's positional arguments, a mapping its
        keyword arguments, anything else its only argument. A ``pyro.optim`` learning-rate scheduler
        is stepped at the end of each epoch.

        With ``checkpoint``, a run that was cut off goes on as if nothing had happened: the same
        call in a new process finds the newest checkpoint that can be read, brings the loader to the
        batch that comes next (with its order and random state) and continues. ``num_epochs`` is
        then the total. SIGTERM and Ctrl-C let the step finish and save before the process ends.

        Args:
            loader: an iterable of batches that can be iterated once per epoch.
            num_epochs: number of passes.
            progress_bar: whether to show one, with the loss and the force ratio.
            callback: called as ``callback(inference, step, loss)`` after each step; returning True
                stops.
            checkpoint: folder for checkpoints.
            checkpoint_every: a number of steps, or a ``datetime.timedelta``; None for five minutes.
                One is also written at the end.
            keep: how many of the newest checkpoints stay.

        Returns:
            The loss of each step, those before an interruption included.

        Raises:
            ArgumentError: if the loader cannot be iterated (again) or is empty.
            CheckpointError: if none of the checkpoints in the folder can be used, if the folder
                cannot be written to, or if the last checkpoint cannot be written. One on the way
                that cannot be written is a warning, and the run goes on.
        """
        with self._gather.together("fit", lambda: size_of(loader)):
            return fit_epochs(
                self, loader, num_epochs, progress_bar, callback, checkpoint, checkpoint_every, keep
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to continue bit for bit.

        Particles, buffers and shared parameters, the optimiser's (and scheduler's) state, the step,
        the place in the random streams, how far `fit` has come, and what `diagnostics` and
        `summary` show: tensors, numbers and texts in dicts, lists and tuples. Model, data,
        schedules and options are not in it.

        Raises:
            StateError: if there are no particles yet.
        """
        return copied(self._state(self._gather))

    def _state(self, join: Callable[[Tensor], Any] | None = None) -> dict[str, Any]:
        """What `state_dict` copies, at the first process only unless it is joined otherwise."""
        self._started()
        with self._gather.together("state", lambda: {"particles": self._particles}):
            return state_of(self, join or self._gather.collect)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, here or in another process.

        `get_samples` answers at once. What needs the model is checked at the next call that has
        its arguments. Global random states are restored by `fit(..., checkpoint=...)` only.

        Args:
            state: what `state_dict` gave.

        Raises:
            CheckpointError: if it is of another number of particles, of other sites, or no state
                at all. If that turns out at the next call only, that call raises it. The inference
                is then what it was before.
        """
        take_state(self, state)

    def save(self, path: str | Path) -> None:
        """Write `state_dict` to a file, atomically and with a checksum.

        ``torch.load(path, weights_only=True)`` reads it, too.

        Raises:
            CheckpointError: if it cannot be written; an older file of that name is unchanged.
        """
        state = self._state()
        self._gather.first(lambda: str(write(path, state)))

    load = Load()

    def _started(self) -> None:
        self._read_faults()
        if not self._particles:
            raise StateError(
                "there are no particles yet; call step, run, fit or setup with the model's "
                "arguments first"
            )

    @torch.no_grad()
    def get_samples(
        self, num_samples: int | None = None, *, gather: bool = False
    ) -> dict[str, Tensor]:
        """Values of the latent sites in their supports, particle axis first.

        Args:
            num_samples: draw this many particles with replacement, as ``MCMC.get_samples`` does;
                None gives each particle once.
            gather: whether to give the particles of all processes, where there are several. All of
                them must ask then; if not, each gets its own particles.

        Returns:
            ``{site: (particle, *site shape)}``, detached.

        Raises:
            StateError: if there are no particles yet.
            ArgumentError: if samples are to be drawn from the particles of one of many processes.
        """
        self._started()
        samples = samples_of(self, gather)
        if num_samples is None:
            return samples
        check_positive_int("num_samples", num_samples)
        if not gather and self._gather != OneProcess():
            raise ArgumentError(
                "get_samples(num_samples) draws from all particles, which are in several "
                "processes; call get_samples(num_samples, gather=True) in all of them"
            )
        with self._random.active():
            chosen = torch.randint(self.num_particles, (num_samples,))
        return {name: value[chosen.to(value.device)] for name, value in samples.items()}

    def get_named_particles(self) -> dict[str, Tensor]:
        """The same as `get_samples`, under the name that ``pyro.infer.SVGD`` uses."""
        return self.get_samples()

    def module(self, index: int, path: str | None = None) -> torch.nn.Module:
        """A particle's network as a plain ``nn.Module``, with its weights and buffers.

        Args:
            index: which particle.
            path: path of the network that `bayesianize` made, in the model; None for the only one.

        Returns:
            A copy of the network that was bayesianized, in the mode the model's is in. Parameters
            without a prior are the shared ones.

        Raises:
            ArgumentError: if there is no such particle or network.
            StateError: if there are no particles yet.
        """
        self._started()
        module = self._log_joint.module
        row = local_row(index, self.num_particles, self._gather)
        if module is None:
            raise ArgumentError("module(index) needs a model with a network, got a plain function")
        share_loaded(self)
        values = {name: value[row] for name, value in self.get_samples().items()}
        return plain_module(module, path, values, {n: b[row] for n, b in self._buffers.items()})

    def get_unconstrained(self) -> dict[str, Tensor]:
        """Values of the latent sites in unconstrained space, where particles move.

        Returns:
            ``{site: (particle, *unconstrained shape)}``, detached; of the particles here.

        Raises:
            StateError: if there are no particles yet.
        """
        self._started()
        return {name: value.detach().clone() for name, value in self._particles.items()}

    def diagnostics(self) -> dict[str, Any]:
        r"""What the last measured step showed (every ``diagnostics_every``-th is measured).

        Returns:
            ``step``; ``log_joint`` per particle before the update; ``driving_force`` and
            ``repulsive_force``, the norms per particle of the two parts of the velocity (full-data
            scale, repulsion scale included); ``force_ratio``, the mean of the second over the mean
            of the first; ``effective_particles``, :math:`M^2 / \sum_{ij} k_{ij}`;
            ``bandwidth``, the mean over points; and ``faults``, at how many steps so far something
            about each particle was not finite. Effective particles and bandwidth are NaN for
            transports that compare nothing.

        Raises:
            StateError: if no step has been taken.
        """
        if self._diagnostics is None:
            raise StateError("no step has been measured yet; call step, run or fit first")
        self._read_faults()
        return {
            name: value.item() if isinstance(value, Tensor) and value.dim() == 0 else value
            for name, value in {**self._diagnostics, "faults": self._faults.count.clone()}.items()
        }

    def summary(self, max_sites: int = 20) -> Summary:
        """A table of sites, diagnostics and warnings, to be printed or read by name.

        It is of all particles: where they are in several processes, all of those must ask.

        Args:
            max_sites: how many sites the text has at most.

        Returns:
            A `Summary`: ``sites``, ``diagnostics`` of the last measured step, and ``warnings`` of
            particles that collapsed, repulsion that is negligible or dominates, a likelihood scale
            that looks wrong, and a loss that still moves. Each rule says when it warns:
            ``pyro_fordes.summary``. Its text has one line for each.

        Raises:
            StateError: if there are no particles yet.
        """
        return summarize(self, max_sites)

    @torch.no_grad()
    def log_likelihood(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Pointwise log likelihood of the observed sites under each particle.

        Not scaled by plates or ``poutine.scale``; masked entries are 0.

        Args:
            *args: arguments of the model, observations included.
            **kwargs: keyword arguments of the model.

        Returns:
            ``{site: (particle, *batch shape)}``.

        Raises:
            ModelError: if the model has discrete latent sites, which are summed out over all
                observations together.
        """
        with self._together("log_likelihood", args, kwargs), torch.enable_grad():
            self.setup(*args, **kwargs)
        summed = self.prototype(*args, **kwargs).enumerated
        if summed:
            raise ModelError(
                f"the log likelihood of single observations is not known where the discrete sites "
                f"{list(summed)} are summed out; log_joint(...) gives that of all"
            )
        with preserved_rng(self._gather.first):
            found = self._evaluate(args, kwargs, pointwise_log_prob).captured
        return {name: self._gather(value) for name, value in found.items()}

    @torch.no_grad()
    def log_joint(self, *args: Any, **kwargs: Any) -> Float[Tensor, " particle"]:
        """Log joint of each particle on the full-data scale, in unconstrained space.

        Args:
            *args: arguments of the model.
            **kwargs: keyword arguments of the model.
        """
        with self._together("log_joint", args, kwargs):
            with torch.enable_grad():
                self.setup(*args, **kwargs)
            with preserved_rng(self._gather.first):
                return self._gather(self._evaluate(args, kwargs).log_joint)

    @torch.enable_grad()
    def scores(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Gradient of the log joint, as `log_joint` gives it, by the unconstrained values.

        The temperature is not included. Particles, buffers and random numbers stay as they are.

        Args:
            *args: arguments of the model.
            **kwargs: keyword arguments of the model.

        Returns:
            ``{site: (particle, *unconstrained shape)}``, detached; zero where the log joint does
            not depend on a value. Of the particles here.
        """
        self.setup(*args, **kwargs)
        with preserved_rng(self._gather.first):
            return compute_scores(self._rounds(args, kwargs), self.chunk_size, self._gather)

    @torch.enable_grad()
    def representation(
        self, *args: Any, space: Space | None = None, **kwargs: Any
    ) -> Float[Tensor, "particle point feature"]:
        """What a space compares of each particle.

        Particles, buffers and random numbers stay as they are.

        Args:
            *args: arguments of the model.
            space: any space; None for that of the kernel.
            **kwargs: keyword arguments of the model.

        Returns:
            The representation, detached.

        Raises:
            FordesError: if the space does not fit the model and its arguments.
        """
        with self._together("representation", args, kwargs):
            self.setup(*args, **kwargs)
        if space is None and self.transport.repulsive:
            space = self._space
        else:
            space = self.kernel.space if space is None else space
            check_part("space", space, "represent", "a space such as Weights()")
            space = self._prepare(space, args, kwargs)
        with preserved_rng(self._gather.first):
            rounds = self._rounds(args, kwargs, space)
            return represent_all(rounds, self.chunk_size, self._gather)

    def prototype(self, *args: Any, **kwargs: Any) -> Prototype:
        """The model's prototype run for these arguments: its trace, plates and latent sites."""
        return self._log_joint.prototype(args, kwargs)
