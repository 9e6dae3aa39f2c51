"""Kernels and bandwidths: closed forms against autograd, finite differences and typed formulas."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from pyro.infer.svgd import IMQSteinKernel, RBFSteinKernel
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_fordes import (
    IMQ,
    RBF,
    SVGD,
    WGD,
    Additive,
    ArgumentError,
    Fixed,
    HeatEquation,
    InputGradients,
    Lengthscale,
    Median,
    Mixture,
    Weights,
    additive,
    kernels,
)
from pyro_fordes.bandwidths import heat_residual
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


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (lambda f: Fixed(f), r"Fixed\(value=...\)\(2\)"),
        (lambda f: Median(factor=f), r"Median\(factor=...\)\(2\)"),
    ],
)
def test_schedules_that_reach_zero_are_refused(rule, name):
    kernel = RBF(Weights(), rule(lambda step: 2.0 - step))
    r = representation(4, 2, 3)
    assert (kernel.evaluate(r, step=1).bandwidth > 0).all()
    with pytest.raises(ArgumentError, match=name + " must be a finite number above 0.0, got 0.0"):
        kernel.evaluate(r, step=2)


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


# -------------------------------------------------------------------- medians of other libraries


def all_pairs(r, b=0):
    return ((r[:, None, b] - r[None, :, b]) ** 2).sum(-1)


@pytest.mark.parametrize("particles", [2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("interpolation", ["midpoint", "lower", "higher"])
@pytest.mark.parametrize("diagonal", [True, False])
def test_median_options_equal_typed_out_quantiles(particles, interpolation, diagonal):
    r = representation(particles, 2, 3)
    d = torch.stack([all_pairs(r, b) for b in range(2)])
    off = ~torch.eye(particles, dtype=torch.bool)
    options = {"diagonal": diagonal, "interpolation": interpolation, "log1p": True}
    whole = Median(**options)(d, 0, 3)[:, 0, 0]
    columns = Median(per="particle", **options)(d, 0, 3)[:, 0]
    for b in range(2):
        values = d[b].flatten() if diagonal else d[b][off]
        if (median := values.quantile(0.5, interpolation=interpolation)) == 0:
            median = d[b].mean()  # two particles, lower of 0 0 d d
        expected = median / (2 * math.log(particles + 1))
        torch.testing.assert_close(whole[b], expected, rtol=1e-12, atol=0)
        for j in range(particles):
            values = d[b][:, j] if diagonal else d[b][:, j][off[:, j]]
            if (median := values.quantile(0.5, interpolation=interpolation)) == 0:
                median = d[b][:, j].mean()
            expected = median / (2 * math.log(particles + 1))
            found = columns[b].expand(particles)[j]
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("particles", [6, 7])
def test_kernels_of_other_libraries(particles):
    """Every line of the table in docs/conventions.md that has an exact translation."""
    r = representation(particles, 1, 3)
    d, n = all_pairs(r), particles
    median = d.flatten().quantile(0.5)
    higher = d.flatten().quantile(0.5, interpolation="higher")
    first = d.quantile(0.5, dim=0)
    algorithm = (d / 2).flatten().quantile(0.5) / (2 * math.log(n))
    cases = {
        "FoRDE paper, section 3.4": (torch.exp(-d * math.log(n) / median), Median()),
        "FoRDE paper, Algorithm 1": (torch.exp(-(d / 2) / algorithm), Median(factor=0.5)),
        "FoRDE code": (torch.exp(-d * math.log(n) / first), Median(per="particle")),
        "RDE repository, SVGD code": (
            torch.exp(-d * math.log(n + 1) / median),
            Median(log1p=True),
        ),
        "AWGF": (
            torch.exp(-d / (2 * (0.5 * higher / math.log(n + 1)))),
            Median(log1p=True, interpolation="higher"),
        ),
    }
    if n % 2:
        h = d.sqrt().flatten().quantile(0.5) ** 2 / math.log(n)
        cases["NumPyro"] = torch.exp(-d / h), Median()
    for name, (expected, rule) in cases.items():
        found = RBF(Weights(), rule).evaluate(r).mean
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("particles", [4, 5, 8, 10])
def test_kernels_of_pyro(particles):
    """Pyro's own kernels, one per coordinate; IMQ is the same up to a constant."""
    x = representation(particles, 3, 1)
    options = {"log1p": True, "diagonal": False, "interpolation": "lower"}
    log_kernel, grad = RBFSteinKernel(bandwidth_factor=0.7).log_kernel_and_grad(x[..., 0])
    kernel = RBF(Weights(), Median(factor=0.7, **options))
    found = SVGD().repel(kernel, x, scores=torch.zeros_like(x), pooled=False)
    torch.testing.assert_close(found.kernel.value, log_kernel.exp().permute(2, 0, 1))
    # Pyro adds this to the gradient of a loss.
    descent = (log_kernel.exp() * grad).sum(1) / particles
    torch.testing.assert_close(found.velocity[..., 0], -descent)
    log_kernel, _ = IMQSteinKernel(bandwidth_factor=0.7).log_kernel_and_grad(x[..., 0])
    found = IMQ(Weights(), Median(factor=0.35, **options)).evaluate(x, pooled=False).value
    torch.testing.assert_close(found * math.sqrt(2), log_kernel.exp().permute(2, 0, 1))


# -------------------------------------------------------------------- heat equation


@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("h", [0.1, 0.8, 3.0])
def test_heat_residual_equals_autograd_of_the_density(features, h):
    r = representation(6, 2, features)
    d = torch.stack([all_pairs(r, b) for b in range(2)])
    found = heat_residual(d, torch.full((2, 1, 1), h, dtype=d.dtype), features)
    for b in range(2):
        expected = naive.heat_error(r[:, b], h)
        torch.testing.assert_close(found[b].square().sum(), expected, rtol=1e-9, atol=0)


def quantiles(particles):
    """Evenly spread particles of a standard Normal, (particle, 1, 1)."""
    p = (torch.arange(particles, dtype=torch.float64) + 0.5) / particles
    return torch.distributions.Normal(0.0, 1.0).icdf(p)[:, None, None]


@pytest.mark.parametrize("particles", [10, 50, 200])
def test_heat_equation_finds_the_minimum(particles):
    """On evenly spread particles, where there is one, against a fine grid."""
    r = quantiles(particles)
    d = all_pairs(r)[None]
    found = HeatEquation()(d, 0, 1).item()
    grid = Median()(d, 0, 1) * torch.linspace(-4, 2, 601, dtype=d.dtype).exp2()[:, None, None]
    errors = heat_residual(d.expand(601, -1, -1), grid, 1).square().sum((-2, -1))
    assert found == pytest.approx(grid[errors.argmin()].item(), rel=0.03)


def test_heat_equation_shrinks_with_more_particles():
    """As a density estimate must; at 200 particles the smoothing is 4 % of the variance."""
    found = [HeatEquation()(all_pairs(quantiles(m))[None], 0, 1).item() for m in (10, 50, 200)]
    assert found == sorted(found, reverse=True)
    assert 0.02 < found[2] < 0.06


def test_heat_equation_is_blind_to_scale_and_treats_points_alone():
    r = representation(9, 4, 2)
    d = torch.stack([all_pairs(r, b) for b in range(4)])
    found = HeatEquation()(d, 0, 2)
    torch.testing.assert_close(HeatEquation()(d * 1e6, 0, 2), found * 1e6, rtol=1e-9, atol=0)
    for b in range(4):
        alone = HeatEquation()(d[b : b + 1], 0, 2)
        torch.testing.assert_close(alone, found[b : b + 1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_heat_equation_edge_cases_are_finite(dtype):
    kernel = RBF(Weights(), HeatEquation())
    alone = representation(1, 3, 2, dtype)
    same = alone.expand(5, 3, 2)
    mostly = same.clone()
    mostly[4] += 1.0
    for r in (alone, same, mostly, representation(2, 3, 2, dtype), 1e-12 * same):
        found = WGD().repel(kernel, r)
        assert found.kernel.bandwidth.isfinite().all()
        assert found.velocity.isfinite().all()
        assert found.velocity.dtype == dtype
    assert (WGD().repel(kernel, alone).velocity == 0).all()


# -------------------------------------------------------------------- mixtures


def test_mixture_is_the_weighted_mean_of_its_kernels():
    r = representation(6, 3, 2)
    parts = [
        RBF(Weights(), Median(factor=0.3)),
        IMQ(Weights(), Fixed(lambda step: 1.0 + step)),
        RBF(Weights(), Median(per="particle")),
    ]
    found = Mixture(parts, weights=[1, 2, 5]).evaluate(r, slice(1, 4), step=2)
    matrices = [part.evaluate(r, slice(1, 4), step=2) for part in parts]
    for name in ("value", "slope", "bandwidth"):
        a, b, c = (getattr(matrix, name) for matrix in matrices)
        torch.testing.assert_close(getattr(found, name), (a + 2 * b + 5 * c) / 8)
    assert not found.symmetric
    equal = Mixture(parts[:2]).evaluate(r)
    torch.testing.assert_close(equal.mean, sum(part.evaluate(r).mean for part in parts[:2]) / 2)
    assert equal.symmetric


def test_mixture_computes_distances_once(monkeypatch):
    calls = []

    def counted(everyone, original=kernels.squared_distances):
        calls.append(len(everyone))
        return original(everyone)

    monkeypatch.setattr(kernels, "squared_distances", counted)
    Mixture([RBF(Weights(), Median(factor=f)) for f in (0.5, 1.0, 2.0)]).evaluate(
        representation(5, 2, 3)
    )
    assert calls == [5]


# -------------------------------------------------------------------- additive kernels


@pytest.mark.parametrize(("points", "features"), [(1, 30), (9, 4), (9, 30)])
def test_additive_kernel_in_blocks_is_the_same(points, features, monkeypatch):
    """Blocks of some features of a point, or of some points; one block is kept, more are not."""
    r = representation(6, points, features)
    kernel = Additive(RBF(Weights()), share=0.7)
    weights = representation(6, 6, 1, seed=1).permute(2, 0, 1)
    whole = kernel.evaluate(r, slice(1, 5))
    assert len(list(whole.parts())) == 1
    monkeypatch.setattr(additive, "BLOCK", 0)
    found = kernel.evaluate(r, slice(1, 5))
    sizes = [part.matrix.value.shape[0] for part in found.parts()]
    assert len(sizes) > 4
    assert sum(sizes) == points * features
    assert max(sizes) <= -(-points * features // 6)  # kernels no larger than the particles
    for name in ("value", "bandwidth"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name))
    local = weights[:, 1:5]
    torch.testing.assert_close(found.gradient_sum(local), whole.gradient_sum(local))
    found = kernel.evaluate(r).transposed(slice(1, 5))
    monkeypatch.undo()
    whole = kernel.evaluate(r).transposed(slice(1, 5))
    torch.testing.assert_close(found.gradient_sum(local), whole.gradient_sum(local))


def test_additive_kernel_of_one_feature_is_the_kernel():
    r = representation(6, 3, 1)
    for pooled in (True, False):
        plain = RBF(Weights()).evaluate(r, pooled=pooled)
        found = Additive(RBF(Weights()), share=0.4).evaluate(r, pooled=pooled)
        ones = torch.ones(1, 6, 6, dtype=r.dtype)
        torch.testing.assert_close(found.value, plain.value)
        torch.testing.assert_close(found.bandwidth, plain.bandwidth)
        torch.testing.assert_close(found.gradient_sum(ones), plain.gradient_sum(ones))


def test_additive_kernel_follows_the_step():
    r = representation(6, 1, 2)
    kernel = Additive(RBF(Weights(), Fixed(lambda step: 1.0 + step)))
    assert kernel.evaluate(r, step=2).bandwidth.item() == pytest.approx(3.0)


def test_mixtures_take_no_additive_kernels():
    with pytest.raises(ArgumentError, match="must be a kernel such as RBF"):
        Mixture([Additive(RBF(Weights()))])
