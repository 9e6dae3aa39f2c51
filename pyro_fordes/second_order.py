r"""Layers whose backward pass is itself gone back through, as fast as the layers themselves.

The gradient of a repulsion between input gradients is a second derivative. torch has it for all
that a network is made of but fused attention, and slowly for two layers, which are computed here by
torch's own first-order operations:

* A convolution's second derivative by its weight, where torch convolves with the images as kernels,
  is the first derivative by its weight at another input.
* That of batch normalisation is a weighted sum of three tensors, where torch makes some twenty.

Let :math:`\hat x = (x - m) s` be the normalised input and :math:`g` the gradient by the output. The
gradient by the input is :math:`\gamma s (g - \bar g - \hat x\, \overline{g \hat x})`, and its
product with some :math:`u`, summed over the N entries of a channel, is :math:`\gamma s A` with

.. math:: A = \sum u g - \tfrac1N U G - \tfrac1N P Q, \quad U = \sum u,\ G = \sum g,\
    P = \sum u \hat x,\ Q = \sum g \hat x.

The gradient by the input is that of Ioffe & Szegedy 2015, Section 3, its sums over the batch
written as means; the rest is derived from it. The derivative of the product by :math:`\gamma` is
:math:`s A`, that by :math:`g` is what the layer's own backward pass makes of :math:`u`, and that by
:math:`x` is

.. math:: -\tfrac1N \gamma s^2 \left[ Q (u - \bar u) + P (g - \bar g)
    + (A - \tfrac2N P Q)\, \hat x \right].
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten
_CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, what is computed can be differentiated twice, and fast.

    Attention is computed by plain operations: its fused kernels have no second derivative.

    Example:
        >>> x = torch.ones(1, 1, 3, requires_grad=True)
        >>> weight = torch.full((1, 1, 2), 2.0, requires_grad=True)
        >>> with twice_differentiable():
        ...     y = torch.nn.functional.conv1d(x, weight).square().sum()
        >>> (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        >>> torch.autograd.grad(gradient.sum(), weight)[0]
        tensor([[[32., 32.]]])
    """
    with sdpa_kernel(SDPBackend.MATH), _Layers():
        yield


class _Layers(TorchFunctionMode):
    """Inside, convolutions and batch normalisation are those of this module."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function, or what stands for it here."""
        kwargs = kwargs or {}
        # A model's own torch.func.grad has its own rules. torch has no public way to ask for it.
        inside = _functorch.peek_interpreter_stack()
        if inside is not None and inside.key() != _functorch.TransformType.Vmap:
            return func(*args, **kwargs)
        if func in _CONVOLUTIONS:
            return _convolve(func, *args, **kwargs)
        if func is F.batch_norm:
            return _normalise(*args, **kwargs)
        return func(*args, **kwargs)


def _convolve(
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution, by the class below where it is one on a batch and padded by numbers."""
    dims = _CONVOLUTIONS[func]
    padded_by_name = isinstance(padding, str)
    if padded_by_name or input.dim() != dims + 2 or not _is_ours(input, weight, bias, cast=True):
        return func(input, weight, bias, stride, padding, dilation, groups)
    sizes = [
        list(n) if isinstance(n, Sequence) else [n] * dims for n in (stride, padding, dilation)
    ]
    return _apply(_Convolution, input, weight, bias, *sizes, False, [0] * dims, groups)


def _normalise(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation, by the class below where it is by the batch's own statistics."""
    ours = training and _is_ours(input, weight, bias, running_mean)
    if not ours or input.numel() <= input.shape[1]:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if weight is None:
        weight = input.new_ones(input.shape[1])
    parts = (input, weight, bias, running_mean, running_var, momentum, eps)
    return _apply(_Normalisation, *parts)


def _apply(layer: type[torch.autograd.Function], *args: Any) -> Tensor:
    """Call a layer, or under vmap what makes one layer of those of all particles."""
    if _functorch.peek_interpreter_stack() is None:
        return layer.apply(*args)
    over_particles = _OVER_PARTICLES[layer]
    if any(isinstance(part, Tensor) and _functorch.is_batchedtensor(part) for part in args):
        return over_particles.apply(*args)
    return over_particles.forward(*args)  # a layer that all particles share, on the same input


def _is_ours(*tensors: Tensor | None, cast: bool = False) -> bool:
    """Whether the classes below take some tensors: real, of one type, not differentiated forwards.

    Args:
        *tensors: the operands.
        cast: whether autocast changes the type of what torch computes here; it does not go into
            the classes.
    """
    first, *others = [tensor for tensor in tensors if tensor is not None]
    if not first.is_floating_point() or any(one.dtype != first.dtype for one in others):
        return False
    device = first.device.type
    under = cast and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if under and first.dtype not in (torch.float64, torch.get_autocast_dtype(device)):
        return False
    return forward_ad._current_level < 0


class _Convolution(torch.autograd.Function):
    """A convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *sizes: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias, ctx.sizes = None if bias is None else list(bias.shape), sizes
        return _aten.convolution(x, weight, bias, *sizes)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        mask = _wanted(ctx, 2 if ctx.bias is None else 3)
        found = _ConvolutionBackward.apply(g, x, weight, ctx.bias, mask, *ctx.sizes)
        return (*found, *[None] * len(ctx.sizes))


class _ConvolutionBackward(torch.autograd.Function):
    """The backward pass of a convolution, and the derivative of that."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: list[int] | None,
        mask: list[bool],
        *sizes: Any,
    ) -> tuple:
        ctx.save_for_backward(g, x, weight)
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)
        return _aten.convolution_backward(g, x, weight, bias, *sizes, mask)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, b: Tensor | None) -> tuple:
        """From what is wanted of the gradients by input (u), weight (v) and bias (b)."""
        g, x, weight = ctx.saved_tensors
        by_g, by_x, by_weight = _wanted(ctx, 3)
        parts: list[Tensor] = []
        x_gradient = weight_gradient = None
        if u is not None and by_g:
            parts.append(_aten.convolution(u, weight, None, *ctx.sizes))
        if u is not None and by_weight:
            mask = [False, True, False]
            weight_gradient = _aten.convolution_backward(g, u, weight, None, *ctx.sizes, mask)[1]
        if v is not None and by_g:
            parts.append(_aten.convolution(x, v, None, *ctx.sizes))
        if v is not None and by_x:
            mask = [True, False, False]
            x_gradient = _aten.convolution_backward(g, x, v, None, *ctx.sizes, mask)[0]
        if b is not None and by_g:
            parts.append(b.view(-1, *[1] * (g.dim() - 2)).expand_as(g))
        g_gradient = sum(parts[1:], parts[0]) if parts else None
        return (g_gradient, x_gradient, weight_gradient, *[None] * (2 + len(ctx.sizes)))


class _Normalisation(torch.autograd.Function):
    """Normalisation by mean and variance of the batch; running statistics change in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, mean, inverse_sd = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(x, weight, mean, inverse_sd)
        ctx.has_bias, ctx.eps = bias is not None, eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        by_x, by_weight, by_bias = _NormalisationBackward.apply(g, *ctx.saved_tensors, ctx.eps)
        return by_x, by_weight, by_bias if ctx.has_bias else None, None, None, None, None


class _NormalisationBackward(torch.autograd.Function):
    """The backward pass of the normalisation, and the derivative of that."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        inverse_sd: Tensor,
        eps: float,
    ) -> tuple:
        found = _normalisation_backward(g, x, weight, mean, inverse_sd, eps)
        ctx.save_for_backward(g, x, weight, mean, inverse_sd, *found[1:])
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, b: Tensor | None) -> tuple:
        """From what is wanted of the gradients by input (u), weight (v) and bias (b)."""
        g, x, weight, mean, s, *sums = ctx.saved_tensors
        u = torch.zeros_like(x) if u is None else u
        shape = (-1, *[1] * (x.dim() - 2))
        count = x.numel() // x.shape[1]
        # The backward pass adds up what the derivative needs of a gradient: with the normalised
        # input, and by itself.
        g_gradient, p, u_sum = _normalisation_backward(u, x, weight, mean, s, ctx.eps)
        q, g_sum = sums
        dims = [0, *range(2, x.dim())]
        if torch.is_grad_enabled():  # for third derivatives, all that depends on the input
            mean, s = x.mean(dims), (x.var(dims, correction=0) + ctx.eps).rsqrt()
            normal = (x - mean.view(shape)) * s.view(shape)
            p, u_sum, q, g_sum = (t.sum(dims) for t in (u * normal, u, g * normal, g))
            rest = u - (u_sum.view(shape) + normal * p.view(shape)) / count
            g_gradient = (weight * s).view(shape) * rest
        a = (u * g).sum(dims) - (u_sum * g_sum + p * q) / count
        scale = -weight * s * s / count
        of_u, of_g, of_x = scale * q, scale * p, scale * (a - 2 * p * q / count)
        if v is not None:  # against the gradient by the weight, the sum of g with normalised x
            of_g, of_x = of_g + v * s, of_x - v * s * q / count
            by_x = (v * s).view(shape)
            g_gradient = g_gradient + by_x * (x - mean.view(shape))
        if b is not None:  # against the gradient by the bias, the sum of g
            g_gradient = g_gradient + b.view(shape)
        of_x = of_x * s
        constant = -(of_u * u_sum + of_g * g_sum) / count - of_x * mean
        x_gradient = torch.addcmul(constant.view(shape), x, of_x.view(shape))
        x_gradient.addcmul_(u, of_u.view(shape)).addcmul_(g, of_g.view(shape))
        return g_gradient, x_gradient, s * a, None, None, None


class _Convolutions(torch.autograd.Function):
    """Convolutions of all particles under vmap, as one with groups."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _aten.convolution(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        """Nothing is kept: vmap calls the layer itself."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
        """Particles beside channels."""
        x, weight, bias, *sizes, groups = args
        of_x, of_weight, of_bias = in_dims[:3]
        count = info.batch_size
        bias = None if bias is None else _stacked(bias, of_bias, count).flatten()
        if of_weight is None and bias is None:  # particles beside points
            y = _apply(_Convolution, x.movedim(of_x, 0).flatten(0, 1), weight, bias, *sizes, groups)
            return y.unflatten(0, (count, -1)), 0
        weight = _stacked(weight, of_weight, count).flatten(0, 1)
        if of_x is None and groups == 1:  # each particle's channels from the same input
            y = _apply(_Convolution, x, weight, bias, *sizes, 1)
        else:
            x = _stacked(x, of_x, count, 1).flatten(1, 2)
            y = _apply(_Convolution, x, weight, bias, *sizes, groups * count)
        return y.unflatten(1, (count, -1)), 1


class _Normalisations(torch.autograd.Function):
    """Normalisations of all particles under vmap, as one with more channels."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        x, weight, bias, mean, variance, momentum, eps = args
        return F.batch_norm(x, mean, variance, weight, bias, True, momentum, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        """Nothing is kept: vmap calls the layer itself."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
        """Particles beside channels."""
        x, *parts, momentum, eps = args
        count = info.batch_size
        stacked = [
            part if part is None else _stacked(part, dim, count).flatten()
            for part, dim in zip(parts, in_dims[1:5], strict=True)
        ]
        x = _stacked(x, in_dims[0], count, 1).flatten(1, 2)
        y = _apply(_Normalisation, x, *stacked, momentum, eps)
        return y.unflatten(1, (count, -1)), 1


_OVER_PARTICLES = {_Convolution: _Convolutions, _Normalisation: _Normalisations}


def _stacked(part: Tensor, dim: int | None, count: int, place: int = 0) -> Tensor:
    """A tensor with its axis of particles at a place."""
    if dim is not None:
        return part.movedim(dim, place)
    part = part.unsqueeze(place)
    return part.expand(*part.shape[:place], count, *part.shape[place + 1 :])


def _normalisation_backward(
    g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse_sd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by input, weight and bias."""
    return _aten.native_batch_norm_backward(
        g, x, weight, None, None, mean, inverse_sd, True, eps, [True, True, True]
    )


def _wanted(ctx: Any, count: int) -> list[bool]:
    """By which of the first inputs, all of them tensors, a backward pass has to differentiate.

    ``ctx.needs_input_grad`` says which require a gradient. When a network is differentiated by its
    input alone, the weights do, and nobody asks for theirs: a third of the work.
    """
    mask = list(ctx.needs_input_grad[:count])
    for i, (node, _) in enumerate(ctx.next_functions[:count]):
        if mask[i]:
            with suppress(RuntimeError):  # torch does not say it of a leaf
                mask[i] = torch._C._will_engine_execute_node(node)
    return [*mask, *[False] * (3 - count)]
