"""The forces of a step as one compiled graph.

``make_fx`` runs a step once and notes every tensor operation: Pyro's handlers, vmap and both
backward passes leave nothing else behind. Everything that changes from step to step is an input of
the graph: particles, buffers, arguments, minibatch indices, the particles' seeds, temperature,
repulsion scale and schedules.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from pyro_fordes._random import preserved_rng
from pyro_fordes.forces import Forces, Rule, compute_forces, draw_for
from pyro_fordes.log_joint import LogJoint
from pyro_fordes.particles import Draw, Evaluation, OpenStep, Subsample

# A run with ever new arguments would do nothing but compile.
LIMIT = 16


@dataclass(frozen=True)
class _Graph:
    """A compiled kind of step."""

    run: Callable[..., Any]
    schedules: list[Callable[[int], float]]
    shared: Mapping[str, Tensor]


class CompiledForces:
    """`compute_forces`, compiled for each kind of step when it first comes.

    Kinds differ in the shapes of the arguments, in arguments that are no tensors, in the modules'
    modes and in whether particles repel.
    """

    def __init__(self) -> None:
        self._graphs: dict[Any, _Graph | None] = {}
        self._said: set[str] = set()

    def __call__(
        self,
        log_joint: LogJoint,
        particles: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        args: tuple,
        kwargs: Mapping[str, Any],
        rule: Rule,
        *,
        measure: bool,
        chunk_size: int | None = None,
    ) -> Forces:
        """See `compute_forces`."""
        draw = draw_for(rule.space if rule.repulsive else None, log_joint, args, kwargs)
        if not measure:
            step = _Step(log_joint, particles, buffers, args, kwargs, rule, draw)
            graph = self._graph(step)
            if graph is not None:
                return step.run(graph)
        return compute_forces(
            log_joint, particles, buffers, args, kwargs, rule, measure=measure, draw=draw
        )

    def _graph(self, step: "_Step") -> _Graph | None:
        """The graph of a kind of step, None if there can be none."""
        key = step.key()
        try:
            if key in self._graphs:
                return self._graphs[key]
        except TypeError:
            self._say(
                "compile=True cannot tell arguments apart that are neither tensors nor hashable; "
                "steps with them run as they are. Pass tensors, numbers or texts"
            )
            return None
        if len(self._graphs) == LIMIT:
            self._say(
                f"compile=True has compiled {LIMIT} kinds of steps, and others run as they are; "
                f"pass numbers that change as tensors, and batches of few sizes"
            )
            return None
        if self._graphs and all(key[:2] != other[:2] for other in self._graphs):
            self._say(
                "compile=True compiles the step again for arguments of another shape or value, "
                "which takes as long as the first time; DataLoader(drop_last=True) gives batches "
                "of one size"
            )
        self._graphs[key] = self._compile(step)
        return self._graphs[key]

    def _say(self, message: str) -> None:
        """Warn once."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=8)

    def _compile(self, step: "_Step") -> _Graph | None:
        try:
            with preserved_rng(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", module=r"torch\.")  # torch's about itself
                return step.compile()
        except Exception as error:
            reason = str(error).strip().splitlines() or [""]
            warnings.warn(
                f"compile=True: the step could not be compiled and runs as it is "
                f"({type(error).__name__}: {reason[0]}); leave compile out, or write the model "
                f"without values that depend on data in Python",
                stacklevel=8,
            )
            return None


@dataclass(frozen=True)
class _Step:
    """One step's model, particles, arguments and rule."""

    log_joint: LogJoint
    particles: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    args: tuple
    kwargs: Mapping[str, Any]
    rule: Rule
    draw: Draw

    def key(self) -> Any:
        """What the graph depends on."""
        leaves, spec = pytree.tree_flatten((self.args, dict(self.kwargs)))
        described = tuple(
            (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        )
        module = self.log_joint.module
        modes = () if module is None else tuple(part.training for part in module.modules())
        return described, repr(spec), modes, self.rule.repulsive

    def inputs(self, schedules: list[Callable[[int], float]], step: int) -> dict[str, Any]:
        """Everything that changes from step to step."""
        like = next(iter(self.particles.values()))
        leaves = pytree.tree_flatten((self.args, dict(self.kwargs)))[0]
        rule = self.rule
        draws = self.log_joint.prototype(self.args, self.kwargs).draws
        numbers: list[Any] = [
            rule.temperature,
            rule.repulsion_scale,
            *(at(step) for at in schedules),
        ]
        return {
            "particles": {name: value.detach() for name, value in self.particles.items()},
            "buffers": dict(self.buffers),
            "arguments": [leaf for leaf in leaves if isinstance(leaf, Tensor)],
            "indices": {name: drawn.indices for name, drawn in self.draw.subsamples.items()},
            "rows": self.draw.rows,
            "seeds": self.log_joint.seeds(self.draw, len(like)) if draws else None,
            # Filled where they are: a copy to a GPU would wait for it.
            "numbers": [like.new_full((), number) for number in numbers],
        }

    def trace(self, inputs: dict[str, Any], step: OpenStep) -> Forces:
        """`compute_forces` on the inputs of a graph."""
        leaves, spec = pytree.tree_flatten((self.args, dict(self.kwargs)))
        given = iter(inputs["arguments"])
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        temperature, scale = inputs["numbers"][:2]
        drawn = self.draw.subsamples.items()
        subsamples = {
            name: Subsample(inputs["indices"][name], subsample.size) for name, subsample in drawn
        }
        particles = {
            name: value.detach().requires_grad_() for name, value in inputs["particles"].items()
        }
        rule = replace(
            self.rule, temperature=temperature, repulsion_scale=scale, step=step, static=True
        )
        with torch.enable_grad():
            return compute_forces(
                self.log_joint,
                particles,
                inputs["buffers"],
                args,
                kwargs,
                rule,
                measure=False,
                draw=Draw(subsamples, self.draw.seed, inputs["seeds"], inputs["rows"]),
            )

    def compile(self) -> _Graph:
        """Trace and compile."""
        like = next(iter(self.particles.values()))
        known = OpenStep(like)
        shared = self.trace(self.inputs([], 0), known).evaluation.shared
        inputs = self.inputs(known.schedules, self.rule.step)
        leaves, spec = pytree.tree_flatten(inputs)

        def outputs(*leaves: Tensor) -> list[Any]:
            inputs = pytree.tree_unflatten(list(leaves), spec)
            forces = self.trace(inputs, OpenStep(like, inputs["numbers"][2:]))
            evaluation = forces.evaluation
            tree = (
                evaluation.log_density,
                evaluation.log_det,
                dict(evaluation.buffers),
                forces.gradients,
                forces.shared_gradients,
                () if forces.compared is None else (forces.compared,),
            )
            return pytree.tree_map(torch.detach, tree)

        graph = make_fx(outputs)(*leaves)
        mode = "reduce-overhead" if like.device.type == "cuda" else "default"
        compiled = torch.compile(graph, fullgraph=True, dynamic=False, mode=mode)
        with torch.no_grad():
            compiled(*leaves)
        return _Graph(compiled, known.schedules, shared)

    def run(self, graph: _Graph) -> Forces:
        """The forces by a graph."""
        leaves = pytree.tree_flatten(self.inputs(graph.schedules, self.rule.step))[0]
        with torch.no_grad():
            tree = graph.run(*leaves)
            if leaves[0].device.type == "cuda":  # memory that the next step's graph writes to
                tree = pytree.tree_map(torch.clone, tree)
        log_density, log_det, buffers, gradients, shared_gradients, compared = tree
        evaluation = Evaluation(
            self.particles,
            log_density,
            log_det,
            (),
            {},
            self.draw.subsamples,
            buffers,
            graph.shared,
        )
        return Forces(evaluation, gradients, shared_gradients, None, *compared)
