"""The engines that run a function of one particle for all of them: vmap, or a loop."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_fordes._checks import ArgumentError, ModelError, NumericalError
from pyro_fordes._random import preserved_rng
from pyro_fordes.particles import Values
from pyro_fordes.randomness import Draws, Stream


class Engine:
    """Runs a function of one particle for all particles.

    Args:
        module: the model's module, None for a plain function.
        vectorize: ``"vmap"``, ``"loop"`` or ``"auto"``; see `LogJoint`.
        randomness: ``"different"`` or ``"same"``; see `LogJoint`.
    """

    def __init__(self, module: nn.Module | None, vectorize: str, randomness: str) -> None:
        self.module = module
        self.vectorize = vectorize
        self.randomness = randomness
        self._vectorises: bool | None = None  # not known before the first attempt

    def choose(self, device: torch.device) -> str:
        """The engine that runs on a device: the rule of ``vectorize="auto"``."""
        if self.vectorize != "auto":
            return self.vectorize
        if self._vectorises is False:
            return "loop"
        modules = [] if self.module is None else list(self.module.modules())
        if any(isinstance(module, nn.RNNBase) for module in modules):
            return "loop"
        has_convolution = any(isinstance(module, nn.modules.conv._ConvNd) for module in modules)
        return "loop" if has_convolution and device.type == "cpu" else "vmap"

    def map(
        self,
        run: Callable[..., Any],
        values: Values,
        inputs: Values,
        stacked: dict[str, Tensor],
        engine: str | None = None,
        draws: Draws | None = None,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run a function of one particle for all; returns its results and the buffers after it.

        Args:
            run: function of a particle's values, inputs and buffers.
            values: unconstrained values.
            inputs: model arguments with a particle axis.
            stacked: buffers, changed in place under vmap.
            engine: ``"vmap"`` or ``"loop"``; None for the rule of ``vectorize``.
            draws: seeds of the particles' random numbers; None if they draw none.
        """
        first = next(iter(values.values()))
        engine = engine or self.choose(first.device)
        # What a first attempt may leave half changed.
        first_attempt = engine == "vmap" and self._vectorises is None
        untouched = {k: v.clone() for k, v in stacked.items()} if first_attempt else {}
        seeds = {} if draws is None else {"seed": draws.seeds(len(first))}
        outside = nullcontext() if draws is None else preserved_rng()
        try:
            with pyro.validation_enabled(False), outside, _no_recomputation():
                if engine == "loop":
                    return _loop(_drawing(run), values, inputs, stacked, seeds, draws, len(first))
                if draws is not None:  # for functions that know no streams
                    torch.manual_seed(draws.seed)
                results = torch.func.vmap(_drawing(run), randomness=self.randomness)(
                    dict(values), inputs, stacked, seeds
                )
                self._vectorises = True
                return results, stacked
        except (ModelError, ArgumentError):
            raise
        except ValueError as error:
            if "to be within the support" not in str(error) and "constraint" not in str(error):
                raise ModelError(f"the model failed when run with particles: {error}") from error
            raise NumericalError(
                f"a particle's value is outside the support of its distribution: "
                f"{str(error).splitlines()[0]}; a NaN here is most often a learning rate that is "
                f"too large"
            ) from error
        except RuntimeError as error:
            if first_attempt and self.vectorize == "auto" and _has_no_vectorised_form(error):
                self._vectorises = False
                return self.map(run, values, inputs, untouched, "loop", draws)
            raise self._explain(error) from error

    def _explain(self, error: RuntimeError) -> Exception:
        """A `ModelError` for what vmap cannot do; other errors of the model as they are."""
        text = str(error)
        if "running_mean" in text:
            hint = (
                "the model updates a tensor in place (BatchNorm in a plain function?); write the "
                "model as a PyroModule so that its buffers can be kept per particle"
            )
        elif "in-place" in text or "inplace" in text:
            hint = (
                "it writes what belongs to a particle into a tensor that does not; use "
                "vectorize='loop', or make the tensor by torch.stack or torch.where"
            )
        elif "requires_grad_()" in text:
            hint = (
                "it turns gradients on for a tensor on the way, as torch.utils.checkpoint does in "
                "torch 2.8; switch that off, and bound memory with ParticleInference(chunk_size=1)"
            )
        elif _has_no_vectorised_form(error):
            hint = "some operation has no vectorised form; use vectorize='loop'"
        else:
            return ModelError(f"the model failed when run with particles: {text}")
        return ModelError(f"the model cannot be vectorised over particles: {hint}. torch: {text}")


@contextmanager
def _no_recomputation() -> Iterator[None]:
    """Inside, a network that would compute its activations again in its backward pass is refused.

    It would do so outside of Pyro's handlers and the particle's random stream, with other weights
    and masks.
    """
    message = (
        "it uses torch.utils.checkpoint or other hooks of saved tensors, with which its backward "
        "pass would run it again without the particle's weights and random numbers; switch that "
        "off, and bound memory with ParticleInference(chunk_size=1)"
    )
    with ExitStack() as stack:
        with suppress(RuntimeError):  # the caller's own hooks, around a whole step, may stay
            stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(message))
        yield


def _has_no_vectorised_form(error: RuntimeError) -> bool:
    """Whether an error is vmap's, about an operation that a loop could run."""
    text = str(error)
    if "running_mean" in text:
        return False
    signs = ("vmap", "Batching rule", "data-dependent", "BatchedTensor", "setup_context")
    return any(sign in text for sign in signs)


def _drawing(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one particle that draws its random numbers from the particle's stream."""

    def with_stream(*groups: Any) -> Any:
        *rest, seeds = groups
        with Stream(seeds["seed"]) if seeds else nullcontext():
            return run(*rest)

    return with_stream


def _loop(
    run: Callable[..., Any],
    values: Values,
    inputs: Values,
    buffers: Values,
    seeds: Values,
    draws: Draws | None,
    count: int,
) -> tuple[Any, dict[str, Tensor]]:
    """Run one particle after the other and stack the results, as vmap would."""
    # One unbind per tensor: the backward of indexing would allocate a full zero tensor each time.
    parts = [
        {name: tensor.unbind(0) for name, tensor in group.items()}
        for group in (values, inputs, buffers, seeds)
    ]
    numbers = [] if draws is None else draws.numbers(count)
    results, updated = [], []
    for i in range(count):
        particle, stand_in, own, seed = (
            {name: tensors[i] for name, tensors in group.items()} for group in parts
        )
        own = {name: buffer.clone() for name, buffer in own.items()}
        if draws is not None:  # for functions that know no streams
            torch.manual_seed(numbers[i])
        results.append(run(particle, stand_in, own, seed))
        updated.append(own)
    leaves, specs = zip(*(pytree.tree_flatten(result) for result in results), strict=True)
    stacked = [torch.stack(column) for column in zip(*leaves, strict=True)]
    new_buffers = {name: torch.stack([own[name] for own in updated]) for name in buffers}
    return pytree.tree_unflatten(stacked, specs[0]), new_buffers
