"""A model's matrix products and convolutions in lower precision, everything else in single.

What the networks of a model put out is single precision again before the model goes on, so that
log-sum-exps, log densities and all that is captured are computed in it.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pyro_fordes._checks import ArgumentError
from pyro_fordes.randomness import opened_attention

_PRODUCTS = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    F.scaled_dot_product_attention,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.addmm,
    torch.baddbmm,
    torch.einsum,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    Tensor.mm,
    Tensor.bmm,
}
_NORMS = {F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm}


class _Products(TorchFunctionMode):
    """Inside, matrix products and convolutions take their operands in a type.

    torch's autocast does not do it for all of them under vmap, and does not normalise a tensor of
    lower precision by weights of single precision there: that is done in single precision.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function, its operands cast if it is a product."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:  # torch leaves the mode before it calls this method
                return opened_attention(*args, **kwargs)
        if func in _PRODUCTS:
            args, kwargs = pytree.tree_map(self._cast, (args, dict(kwargs)))
        if func in _NORMS and args and isinstance(args[0], Tensor) and args[0].dtype == self.dtype:
            return func(args[0].float(), *args[1:], **kwargs).to(self.dtype)
        return func(*args, **kwargs)

    def _cast(self, leaf: Any) -> Any:
        single = isinstance(leaf, Tensor) and leaf.dtype == torch.float32
        return leaf.to(self.dtype) if single else leaf


def check_autocast(dtype: Any) -> torch.dtype | None:
    """Refuse types that need more than autocast, such as a scaled loss.

    Example:
        >>> check_autocast(torch.bfloat16)
        torch.bfloat16
    """
    if dtype in (None, torch.bfloat16) and not isinstance(dtype, bool):
        return dtype
    raise ArgumentError(
        f"autocast must be torch.bfloat16 or None, got {dtype!r}; half precision would need its "
        f"gradients scaled, and other types are what .to(...) of the model and the data is for"
    )


@contextmanager
def lower_precision(module: nn.Module | None, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the model computes what torch's autocast lists in the type.

    Args:
        module: the model; what its children put out is made single precision.
        dtype: the type.
    """

    def hook(_: nn.Module, inputs: Any, output: Any) -> Any:
        return whole(output, dtype)

    with ExitStack() as stack:
        # Without the cache, which knows weights by identity: each particle has its own.
        for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
        stack.enter_context(_Products(dtype))
        for child in [] if module is None else module.children():
            stack.callback(child.register_forward_hook(hook, prepend=True).remove)
        yield


def whole(tree: Any, dtype: torch.dtype) -> Any:
    """A tree of tensors, those of a lower precision in single precision.

    Example:
        >>> whole((torch.ones(1, dtype=torch.bfloat16), 2), torch.bfloat16)
        (tensor([1.]), 2)
    """
    return pytree.tree_map(
        lambda leaf: leaf.float() if isinstance(leaf, Tensor) and leaf.dtype == dtype else leaf,
        tree,
    )
