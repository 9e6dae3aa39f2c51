"""Kernels and bandwidths: closed forms against autograd, finite differences and typed formulas."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_fordes import RBF, WGD, Fixed, InputGradients, Lengthscale, Median, Weights
from tests import naive

GOLDEN = json.loads((Path(__file__).parent / "golden" / "forde_repulsion.json").read_text())


def representation(particles, points, features, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(particles, points, features, dtype=dtype, generator=generator)


@pytest.mark.parametrize("per", ["point", "particle"])
@pytest.mark.parametrize("particles", [2, 3, 4, 5, 8])
def test_median_equals_the_typed_out_formula(per, particles):
    r = representation(particles, 6, 3)
    matrix = RBF(Weights(), Median(per=per)).evaluate(r)
    h = matrix.bandwidth.expand(6, particles, particles)[:, 0, :]
    torch.testing.assert_close(h, naive.bandwidth(r, per), rtol=1e-12, atol=0)


def test_median_constant_is_that_of_the_paper():
    """k = exp(-d log M / median), FoRDE section 3.4 and the authors' code alike."""
    r = representation(5, 1, 4)
    d = torch.cdist(r[:, 0], r[:, 0]) ** 2
    expected = torch.exp(-d * math.log(5) / d.flatten().median())
    value = RBF(Weights()).evaluate(r).mean
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("per", ["point", "particle"])
def test_force_equals_autograd_of_the_log_kernel_sum(per):
    r = representation(6, 5, 4).requires_grad_()
    loss = naive.log_kernel_sum(r, naive.bandwidth(r.detach(), per))
    (expected,) = torch.autograd.grad(-loss, r)
    velocity = WGD().repel(RBF(Weights(), Median(per=per)), r.detach()).velocity
    torch.testing.assert_close(velocity, expected, rtol=1e-10, atol=1e-14)


def test_force_equals_finite_differences():
    r = representation(4, 3, 2)
    h = naive.bandwidth(r, "point")
    velocity = WGD().repel(RBF(Weights()), r).velocity
    delta = 1e-6
    for index in [(0, 0, 0), (1, 2, 1), (3, 1, 0)]:

        def value(shift, index=index):
            i = index[0]
            moved = r[i].clone()
            moved[index[1], index[2]] += shift
            k = [torch.exp(-((moved - r[j]) ** 2).sum(-1) / (2 * h[:, j])).mean() for j in range(4)]
            return torch.stack(k).sum().log()

        slope = (value(delta) - value(-delta)) / (2 * delta)
        assert velocity[index].item() == pytest.approx(-slope.item(), rel=1e-7)


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_agrees_with_the_published_code(case):
    """Numbers from AaltoPML/FoRDE's train_forde.py, run with JAX in single precision.

    Its term is (1/B) sum_i log sum_j mean_b k, added to a loss that is a mean over the batch.
    """
    g = torch.tensor(case["gradients"], dtype=torch.float32).requires_grad_()
    if case["rotation"] is None:
        metric = Lengthscale()
    else:
        metric = Lengthscale(
            torch.tensor(case["sqrt_eigenvalues"]) ** 2, torch.tensor(case["rotation"])
        )
    s = g / (g.square().sum(-1, keepdim=True) + case["eps"]).sqrt()
    space = InputGradients(eps=math.sqrt(case["eps"]), lengthscale=metric)
    r = metric(s)
    local = r.detach()
    repulsion = WGD().repel(RBF(space, Median(per="particle")), local)
    (gradient,) = torch.autograd.grad((-repulsion.velocity * r).sum() / case["batch_size"], g)
    expected = torch.tensor(case["repulsion_gradient"])
    assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()
    value = repulsion.kernel.mean.sum(1).log().sum() / case["batch_size"]
    assert value.item() == pytest.approx(case["repulsion_value"], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per", ["point", "particle"])
def test_edge_cases_are_finite(dtype, per):
    kernel = RBF(Weights(), Median(per=per))

    alone = representation(1, 3, 2, dtype)
    assert (WGD().repel(kernel, alone).velocity == 0).all()

    pair = representation(2, 3, 2, dtype)
    repulsion = WGD().repel(kernel, pair)
    assert repulsion.velocity.isfinite().all()
    assert (repulsion.velocity != 0).any()
    # Two particles: the median is half of their distance, so k = exp(-2 log 2).
    torch.testing.assert_close(
        repulsion.kernel.value[:, 0, 1], torch.full((3,), 0.25, dtype=dtype), rtol=1e-4, atol=0
    )

    same = alone.expand(5, 3, 2)
    assert (WGD().repel(kernel, same).velocity.abs() < 1e-5).all()

    zero = torch.zeros(4, 3, 2, dtype=dtype)
    assert (WGD().repel(kernel, zero).velocity == 0).all()

    mostly_same = same.clone()
    mostly_same[4] += 1.0
    velocity = WGD().repel(kernel, mostly_same).velocity
    assert velocity.isfinite().all()
    assert velocity.abs().max() < 10


def test_nearly_equal_particles_keep_their_digits():
    """A large common offset must not drown small differences (centring, DESIGN section 7)."""
    small = representation(6, 2, 3)
    far = (small * 1e-3 + 1e3).float()
    expected = WGD().repel(RBF(Weights()), far.double()).velocity
    velocity = WGD().repel(RBF(Weights()), far).velocity
    torch.testing.assert_close(velocity.double(), expected, rtol=1e-4, atol=1e-4 * 1e3)


def test_local_rows_equal_rows_of_the_whole():
    r = representation(7, 4, 3)
    kernel = RBF(Weights())
    whole = WGD().repel(kernel, r).velocity
    for rows in (slice(0, 2), slice(2, 7), slice(6, 7)):
        part = WGD().repel(kernel, r, rows).velocity
        torch.testing.assert_close(part, whole[rows], rtol=1e-12, atol=1e-14)


class _LargestTensor(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, tuple | list) else [out]:
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
        return out


def test_no_tensor_of_particle_squared_times_feature():
    particles, points, features = 8, 3, 64
    r = representation(particles, points, features)
    with _LargestTensor() as mode:
        WGD().repel(RBF(Weights()), r)
    assert mode.largest <= particles * points * features


def test_bandwidth_factor_and_schedules():
    r = representation(4, 2, 3)
    base = RBF(Weights()).evaluate(r).bandwidth
    doubled = RBF(Weights(), Median(factor=2.0)).evaluate(r).bandwidth
    torch.testing.assert_close(doubled, 2 * base)
    scheduled = RBF(Weights(), Median(factor=lambda step: 1.0 + step)).evaluate(r, step=2).bandwidth
    torch.testing.assert_close(scheduled, 3 * base)
    fixed = RBF(Weights(), Fixed(lambda step: 0.5 + step)).evaluate(r, step=1).bandwidth
    torch.testing.assert_close(fixed, torch.full_like(fixed, 1.5))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    particles=st.integers(2, 9),
    points=st.integers(1, 5),
    features=st.integers(1, 6),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    per=st.sampled_from(["point", "particle"]),
)
def test_scale_and_translation(particles, points, features, scale, per):
    """The median makes the kernel blind to scale and origin; the force scales inversely."""
    r = representation(particles, points, features, seed=particles)
    kernel = RBF(Weights(), Median(per=per))
    base = WGD().repel(kernel, r)
    moved = r * scale + scale
    other = WGD().repel(kernel, moved)
    torch.testing.assert_close(other.kernel.value, base.kernel.value, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(other.velocity * scale, base.velocity, rtol=1e-6, atol=1e-9)
