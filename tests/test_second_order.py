"""Convolutions and normalisation that are differentiated twice, against torch's own."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck
from torch.nn import functional as F

from pyro_fordes.second_order import twice_differentiable

LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "conv1d, padded by name": (nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 7)),
    "conv1d, no batch": (nn.Conv1d(4, 6, 3), (4, 7)),
    "conv2d": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 6)),
    "conv2d, no bias, stride": (nn.Conv2d(3, 4, 3, (2, 1), (1, 0), bias=False), (2, 3, 5, 6)),
    "conv2d, dilated": (nn.Conv2d(3, 4, 2, dilation=(1, 2)), (2, 3, 5, 6)),
    "conv2d, groups": (nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 6, 5)),
    "conv2d, depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 5, 5)),
    "conv2d, reflected": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
    "transposed": (nn.ConvTranspose2d(3, 2, 3, stride=2), (2, 3, 4, 3)),
    "batch norm 1d": (nn.BatchNorm1d(4), (5, 4)),
    "batch norm 1d, long": (nn.BatchNorm1d(4, momentum=None), (3, 4, 6)),
    "batch norm 2d": (nn.BatchNorm2d(3, eps=0.1, momentum=0.3), (4, 3, 2, 5)),
    "batch norm 2d, no affine": (nn.BatchNorm2d(3, affine=False), (4, 3, 2, 5)),
    "batch norm 2d, no statistics": (nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 5)),
    "batch norm 2d, evaluated": (nn.BatchNorm2d(3).eval(), (4, 3, 2, 5)),
    "batch norm 3d": (nn.BatchNorm3d(2), (2, 2, 3, 2, 2)),
}


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A layer in double precision with weights of its own, and an input."""
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer, torch.randn(shape, dtype=torch.float64, requires_grad=True)


def derivatives(name: str, context: object, *, by_input_only: bool) -> list[torch.Tensor]:
    """Output, buffers, first derivatives and those of a weighted sum of them."""
    layer, x = made(name)
    for module in layer.modules():
        if hasattr(module, "reset_running_stats"):
            module.reset_running_stats()
    parameters = list(layer.parameters())
    # Not leaves, as in the engines.
    own = {name: parameter * 1 for name, parameter in layer.named_parameters()}
    with context:
        y = torch.func.functional_call(layer, own, (x * 1,))
    loss = (y * torch.randn_like(y)).sum() + y.pow(3).sum()
    inputs = [x] if by_input_only else [x, *parameters]
    first = grad(loss, inputs, create_graph=True)
    sum_of_first = sum((part * torch.randn_like(part)).sum() for part in first)
    second = grad(loss + sum_of_first, [x, *parameters], allow_unused=True)
    return [y, *layer.buffers(), *first, *second]


@pytest.mark.parametrize("by_input_only", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_both_derivatives_are_torchs(name, by_input_only):
    wanted = derivatives(name, nullcontext(), by_input_only=by_input_only)
    found = derivatives(name, twice_differentiable(), by_input_only=by_input_only)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("name", ["conv2d, groups", "batch norm 2d", "batch norm 1d"])
def test_both_derivatives_are_those_of_finite_differences(name):
    layer, x = made(name)
    names = [key for key, _ in layer.named_parameters()]

    def run(x, *values):
        with twice_differentiable():
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = (x, *layer.parameters())
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


def test_no_work_is_done_for_gradients_that_nobody_asks_for():
    masks = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution_backward.default:
                masks.append(args[-1])
            return func(*args, **(kwargs or {}))

    layer, x = made("conv2d")
    own = {name: parameter * 1 for name, parameter in layer.named_parameters()}
    with twice_differentiable():
        y = torch.func.functional_call(layer, own, (x * 1,))
    with Watch():
        (g,) = grad(y.pow(2).sum(), x, create_graph=True)
        grad(g.sum(), list(layer.parameters()), allow_unused=True)
    assert masks[0] == [True, False, False]
    assert [False, True, False] in masks
    assert all(mask[0] + mask[1] < 2 for mask in masks)


# What torch has no vectorised form of is left out.
VECTORISED = [name for name in LAYERS if name != "batch norm 1d, long"]


@pytest.mark.parametrize("stacked", ["all", "values", "input"])
@pytest.mark.parametrize("name", VECTORISED)
def test_vectorised_over_particles(name, stacked):
    """Values, buffers, derivatives and those of derivatives, as by torch under vmap."""

    def run(context):
        layer, x = made(name)
        values = {key: parameter.detach() for key, parameter in layer.named_parameters()}
        buffers = {
            key: buffer.expand(3, *buffer.shape).clone() for key, buffer in layer.named_buffers()
        }
        if stacked != "values":
            x = torch.randn(3, *x.shape).double()
        if stacked != "input":
            values = {key: torch.randn(3, *value.shape).double() for key, value in values.items()}
        x.requires_grad_()
        values = {key: value.requires_grad_() for key, value in values.items()}
        axes = (None if stacked == "input" else 0, None if stacked == "values" else 0, 0)

        def one(values, x, buffers):
            return torch.func.functional_call(layer, {**values, **buffers}, (x,))

        with context:
            y = torch.func.vmap(one, axes)({k: v * 1 for k, v in values.items()}, x * 1, buffers)
        (g,) = grad(y.pow(3).sum(), x, create_graph=True)
        second = grad(g.pow(2).sum(), [x, *values.values()], allow_unused=True)
        return [y, *buffers.values(), g, *second]

    for one, other in zip(run(twice_differentiable()), run(nullcontext()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-9)


def test_vectorised_twice():
    weight = torch.randn(2, 3, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 5, 3, 6, dtype=torch.float64, requires_grad=True)

    def run(context):
        with context:
            y = torch.func.vmap(torch.func.vmap(F.conv1d))(x, weight)
        (g,) = grad(y.pow(3).sum(), x, create_graph=True)
        return [y, g, *grad(g.pow(2).sum(), [x, weight])]

    for one, other in zip(run(twice_differentiable()), run(nullcontext()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("name", ["conv2d", "batch norm 2d"])
def test_a_layer_that_all_particles_share_under_vmap(name):
    layer, x = made(name)
    factors = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def run(context):
        with context:
            y = torch.func.vmap(lambda factor: factor * layer(x))(factors)
        (g,) = grad(y.pow(3).sum(), x, create_graph=True)
        return [y, g, *grad(g.pow(2).sum(), [x, factors, layer.weight])]

    for one, other in zip(run(twice_differentiable()), run(nullcontext()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-9)


def test_a_model_that_differentiates_is_left_to_torch():
    layer, x = made("conv2d")

    def run(context):
        with context:
            return torch.func.vmap(torch.func.grad(lambda x: layer(x[None]).pow(3).sum()))(x)

    torch.testing.assert_close(run(twice_differentiable()), run(nullcontext()))


def normalised(x, weight, bias, *_):
    """Batch normalisation by plain operations: torch's own has no third derivative."""
    dims = [0, *range(2, x.dim())]
    mean, variance = x.mean(dims, keepdim=True), x.var(dims, correction=0, keepdim=True)
    shape = mean.shape
    return (x - mean) / (variance + 0.1).sqrt() * weight.view(shape) + bias.view(shape)


@pytest.mark.parametrize("name", ["batch norm 2d", "conv2d, groups"])
def test_the_third_derivative_is_right_too(name):
    def third(run, context):
        layer, x = made(name)
        with context:
            y = run(layer, x)
        (first,) = grad(y.pow(3).sum(), x, create_graph=True)
        (second,) = grad(first.pow(2).sum(), x, create_graph=True)
        return grad(second.pow(2).sum(), [x, layer.weight])

    def plainly(layer, x):
        norm = isinstance(layer, nn.BatchNorm2d)
        return normalised(x, layer.weight, layer.bias) if norm else layer(x)

    found = third(lambda layer, x: layer(x), twice_differentiable())
    for one, other in zip(found, third(plainly, nullcontext()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def cast_by_the_user(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


def forwards(layer, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.cos()))).tangent


def with_complex_weights(_, x):
    weight = torch.randn(2, 3, 2, 2, dtype=torch.complex128)
    return F.conv2d(x.to(torch.complex128), weight).abs()


OTHER_CALLS = {
    "autocast of the user's own": cast_by_the_user,
    "differentiated forwards": forwards,
    "complex": with_complex_weights,
    "a stride of numpy's": lambda layer, x: F.conv2d(x, layer[1].weight, stride=np.int64(2)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it
@pytest.mark.parametrize("name", OTHER_CALLS)
def test_what_torch_can_do_beside_stays_possible(name):
    def run(context):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(5, 5), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        layer = layer if name == "autocast of the user's own" else layer.double()
        x = torch.randn(2, 3, 6, 5, dtype=layer[0].weight.dtype, requires_grad=True)
        with context:
            y = OTHER_CALLS[name](layer, x)
        return [y, *grad(y.float().pow(2).sum(), x)]

    for one, other in zip(run(twice_differentiable()), run(nullcontext()), strict=True):
        torch.testing.assert_close(one, other)


def test_on_the_meta_device():
    with twice_differentiable(), torch.device("meta"):
        assert nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))(torch.ones(2, 3, 5, 5)).is_meta


def test_a_batch_of_one_number_is_refused_as_by_torch():
    with twice_differentiable(), pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(3)(torch.ones(1, 3))


def test_attention_has_a_second_derivative():
    q = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    with twice_differentiable():
        y = F.scaled_dot_product_attention(q, q, q)
    (first,) = grad(y.pow(2).sum(), q, create_graph=True)
    assert grad(first.pow(2).sum(), q)[0].abs().sum() > 0
