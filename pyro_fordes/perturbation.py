"""What a model is differentiated by beside its arguments, and runs on some rows of a batch.

The gradient by what a submodule puts out is that by a perturbation of zero which a forward hook
adds to it: the perturbation has a particle axis and lies outside of the vectorised call, as a model
argument does.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_fordes._checks import ArgumentError, ModelError, describe
from pyro_fordes.particles import Subsample


class Activation(str):
    """Path of a submodule whose output takes the place of a model argument.

    Example:
        >>> Activation("embed") == "embed"
        True
    """

    __slots__ = ()


@contextmanager
def perturbed(module: nn.Module, path: str, perturbation: Tensor) -> Iterator[None]:
    """Inside, add a tensor to what a submodule puts out.

    Args:
        module: the model.
        path: the submodule's path.
        perturbation: what is added.

    Raises:
        ModelError: on a call of the submodule whose output is not of the tensor's shape.
    """

    def hook(_: nn.Module, inputs: Any, output: Any) -> Tensor:
        _check_output(path, output)
        if output.shape != perturbation.shape:
            raise ModelError(
                f"submodule '{path}' put out {describe(output)}, but shape "
                f"{tuple(perturbation.shape)} in the first run with such arguments; shapes must "
                f"follow from the arguments' shapes"
            )
        return output + perturbation

    handle = module.get_submodule(path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def output_of(module: nn.Module | None, path: str, run: Callable[[], Any]) -> Tensor:
    """What a submodule puts out in a run of its model: the shape, at no memory.

    Args:
        module: the model.
        path: the submodule's path.
        run: runs the model.

    Raises:
        ModelError: if the submodule is not called exactly once, or gives no floating-point tensor.
    """
    outputs: list[Any] = []
    if module is None:
        raise ArgumentError(f"a plain function has no submodule '{path}'")
    handle = module.get_submodule(path).register_forward_hook(
        lambda _, inputs, output: outputs.append(output)
    )
    try:
        run()
    finally:
        handle.remove()
    if len(outputs) != 1:
        raise ModelError(
            f"submodule '{path}' is called {len(outputs)} times in a run of the model, so its "
            f"output is no single thing to differentiate by; name one that is called once"
        )
    output = _check_output(path, outputs[0])
    return output.new_zeros(()).expand(output.shape)


def _check_output(path: str, output: Any) -> Tensor:
    """A floating-point tensor with points, or an error."""
    if isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 0:
        return output
    got = describe(output) if isinstance(output, Tensor) else type(output).__name__
    raise ModelError(
        f"submodule '{path}' puts out {got}; gradients by it need a floating-point tensor "
        f"(point, ...)"
    )


def rows_of_arguments(
    args: tuple, kwargs: Mapping[str, Any], size: int, rows: Int[Tensor, " row"]
) -> tuple[tuple, dict[str, Any]]:
    """The call's arguments with some rows of every tensor whose first axis has a given size.

    Args:
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        size: number of rows in the batch.
        rows: which of them.

    Example:
        >>> args, kwargs = rows_of_arguments((torch.arange(3), 5), {}, 3, torch.tensor([2, 0]))
        >>> args
        (tensor([2, 0]), 5)
    """

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size:
            return leaf.index_select(0, rows)
        return leaf

    return pytree.tree_map(take, (args, dict(kwargs)))


def rows_of_subsamples(
    subsamples: Mapping[str, Subsample],
    rows: Int[Tensor, " row"],
    plates: Mapping[str, tuple[int, int, Any]],
) -> dict[str, Subsample]:
    """Minibatches of a run on some rows, from those of the run on all.

    Args:
        subsamples: what the plates drew, by plate.
        rows: which rows of the batch.
        plates: size, subsample size and device of each plate in the run on the rows.

    Raises:
        ArgumentError: if a plate draws another number of rows than there are.
    """
    found = {}
    for name, (size, count, _) in plates.items():
        drawn = subsamples.get(name)
        counts = () if drawn is None or drawn.size != size else (len(drawn.indices), len(rows))
        if drawn is None or count not in counts:
            raise ArgumentError(
                f"InputGradients(points=...) runs the model on {len(rows)} rows of its arguments, "
                f"where plate '{name}' draws {count} of {size}; give the plate "
                f"subsample_size=len(x)"
            )
        whole = count == len(drawn.indices)
        found[name] = drawn if whole else Subsample(drawn.indices[rows], size)
    return found


def zeros_like(value: Tensor, count: int) -> Float[Tensor, "particle *point"]:
    """A perturbation for each of so many particles, at no memory."""
    return value.new_zeros(()).expand(count, *value.shape)
