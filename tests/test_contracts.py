"""Contracts that every kernel, space and transport keeps; a new one is a line in a table."""

import inspect
import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_fordes import (
    IMQ,
    RBF,
    SVGD,
    WGD,
    Additive,
    ArgumentError,
    Ensemble,
    Features,
    Fixed,
    HeatEquation,
    InputGradients,
    Median,
    Mixture,
    Outputs,
    ParticleInference,
    Weights,
    bayesianize,
    pca_lengthscale,
    tuned_lengthscale,
)
from pyro_fordes.forces import evaluate_in
from pyro_fordes.kernels import squared_distances

X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 1, 0, 1, 0])


def documented(name):
    """An instance of a class that docs/extending.md defines, with its default arguments."""
    text = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
    namespace = {"__name__": "docs"}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "extending.md", "exec"), namespace)
        if name in namespace:
            return namespace[name]()
    raise AssertionError(f"docs/extending.md defines no {name}")


# name: (kernel, whether it is symmetric)
KERNELS = {
    "RBF, median per point": (RBF(Weights()), True),
    "RBF, median per particle": (RBF(Weights(), Median(per="particle")), False),
    "RBF, fixed": (RBF(Weights(), Fixed(0.7)), True),
    "IMQ": (IMQ(Weights()), True),
    "IMQ, fixed, beta": (IMQ(Weights(), Fixed(0.7), beta=-0.3), True),
    "RBF, heat equation": (RBF(Weights(), HeatEquation()), True),
    "Mixture of bandwidths": (
        Mixture([RBF(Weights(), Median(factor=0.2)), RBF(Weights(), Fixed(2.0))]),
        True,
    ),
    "Mixture, not symmetric": (
        Mixture([RBF(Weights(), Median(per="particle")), IMQ(Weights())], weights=[3, 1]),
        False,
    ),
    "Additive": (Additive(RBF(Weights())), True),
    "Additive, features only": (Additive(IMQ(Weights(), Fixed(0.7)), share=1.0), True),
    "Additive of a mixture": (
        Additive(Mixture([RBF(Weights(), Median(factor=0.2)), IMQ(Weights())], [1, 2]), share=0.6),
        True,
    ),
    "Additive, not symmetric": (Additive(RBF(Weights(), Median(per="particle"))), False),
}
SPACES = {
    "Weights": Weights(),
    "Weights of one site": Weights(sites=["net.0.weight"]),
    "Weights by site": Weights(group="site"),
    "Weights by coordinate": Weights(group="coordinate"),
    "InputGradients of a site": InputGradients("x", output="logits"),
    "InputGradients of a submodule": InputGradients("x", output="net"),
    "InputGradients of the log probability": InputGradients("x"),
    "InputGradients of a function": InputGradients(
        0, output=lambda trace: trace.nodes["logits"]["value"].logsumexp(-1)
    ),
    "InputGradients, raw": InputGradients("x", output="logits", normalize=False),
    "InputGradients, PCA": InputGradients("x", output="logits", lengthscale=pca_lengthscale(X)),
    "InputGradients, two components": InputGradients(
        "x", output="logits", lengthscale=pca_lengthscale(X, num_components=2)
    ),
    "InputGradients, tuned": InputGradients(
        "x", output="logits", lengthscale=tuned_lengthscale(X, 0.3)
    ),
    "InputGradients by a submodule": InputGradients("net.0", output="net"),
    "InputGradients at some points": InputGradients("x", output="net", points=4),
    "InputGradients by a submodule at some points": InputGradients(
        "net.0", output="logits", points=0.5, normalize=False
    ),
    "Outputs": Outputs(),
    "Outputs, point by point": Outputs(group="point"),
    "Outputs of a site": Outputs("logits"),
    "Outputs of a submodule": Outputs("net"),
    "Outputs of a function": Outputs(lambda trace: trace.nodes["logits"]["value"].tanh()),
    "Outputs on other points": Outputs(points=X[:3] + 1.0, group="point"),
    "Features": Features("net.1"),
    "Features on other points": Features("net.1", points={"x": X[:2] - 1.0}),
}
TRANSPORTS = {
    "WGD(kde)": WGD("kde"),
    "WGD(blob)": WGD("blob"),
    "WGD(sge)": WGD("sge"),
    "WGD(ssge)": WGD("ssge"),
    "WGD(ssge), few eigenpairs": WGD("ssge", num_eigenpairs=2),
    "WGD(kde), calibrated": WGD("kde", whiten="full", calibrate=True),
    "WGD(sge), calibrated": WGD("sge", whiten="full", calibrate=True),
    "WGD(sge), calibrated diag": WGD("sge", whiten="diag", calibrate=True),
    "SVGD": SVGD(),
    "SVGD, calibrated": SVGD(whiten="full", calibrate=True),
    "SVGD, calibrated diag": SVGD(whiten="diag", calibrate=True),
    "HybridSVGD": documented("HybridSVGD"),
    "Ensemble": Ensemble(),
}

kernels = pytest.mark.parametrize("name", KERNELS)
spaces = pytest.mark.parametrize("name", SPACES)
transports = pytest.mark.parametrize("name", TRANSPORTS)


def representation(particles=5, points=4, features=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(particles)
    return torch.randn(particles, points, features, dtype=dtype, generator=generator)


# -------------------------------------------------------------------- kernels


@kernels
def test_kernel_is_one_at_itself_and_at_most_one(name):
    r = representation()
    matrix = KERNELS[name][0].evaluate(r)
    torch.testing.assert_close(matrix.mean.diagonal(), torch.ones(5, dtype=r.dtype))
    assert (matrix.value <= 1).all()
    assert (matrix.value > 0).all()


@kernels
def test_kernel_symmetry_and_positive_definiteness(name):
    kernel, symmetric = KERNELS[name]
    r = representation(8)
    k = kernel.evaluate(r).mean
    if symmetric:
        torch.testing.assert_close(k, k.T)
        assert torch.linalg.eigvalsh(k).min() > -1e-12
    else:
        assert not torch.allclose(k, k.T)


def values(kernel, local, r):
    """The kernel's formula with explicit differences: (point, local, particle)."""
    if isinstance(kernel, Mixture):
        members = zip(kernel.weights, kernel.kernels, strict=True)
        return sum(weight * values(member, local, r) for weight, member in members)
    if isinstance(kernel, Additive):
        features = zip(local.split(1, -1), r.split(1, -1), strict=True)
        single = torch.stack([values(kernel.kernel, *feature) for feature in features]).mean(0)
        return (1 - kernel.share) * values(kernel.kernel, local, r) + kernel.share * single
    distances = ((local[:, None] - r[None, :]) ** 2).sum(-1).permute(2, 0, 1)
    return kernel.profile(distances, kernel.evaluate(r).bandwidth)[0]


@kernels
def test_kernel_gradient_is_that_of_its_value(name):
    """``gradient_sum`` against autograd of the value by the first argument, any weights."""
    kernel = KERNELS[name][0]
    r = representation()
    weights = representation(5, 1, 5)[:, 0]
    matrix = kernel.evaluate(r)
    local = r.clone().requires_grad_()
    value = values(kernel, local, r)
    torch.testing.assert_close(value, matrix.value)
    (expected,) = torch.autograd.grad((weights * value.mean(0)).sum(), local)
    found = matrix.gradient_sum(weights[None])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    left = representation(5, 5, 1).transpose(0, 2)
    multiplied = torch.einsum("oi,ibf->obf", left[0], expected)
    found = matrix.gradient_sum(weights[None], left)
    torch.testing.assert_close(found, multiplied, rtol=1e-9, atol=1e-12)


@kernels
def test_points_of_a_kernel_are_kernels_of_their_own_if_not_pooled(name):
    """Values and weighted, multiplied gradients: each point alone gives what all together give."""
    kernel = KERNELS[name][0]
    r = representation(6)
    weights, left = representation(6, 6, 8).permute(2, 0, 1).split(4)
    together = kernel.evaluate(r, pooled=False)
    sums = together.gradient_sum(weights, left)
    for b in range(4):
        alone = kernel.evaluate(r[:, b : b + 1], pooled=False)
        torch.testing.assert_close(together.between[b], alone.between[0], rtol=1e-9, atol=1e-12)
        found = alone.gradient_sum(weights[b : b + 1], left[b : b + 1])
        torch.testing.assert_close(sums[:, b : b + 1], found, rtol=1e-9, atol=1e-12)


@kernels
@pytest.mark.parametrize("rows", [slice(None), slice(1, 3)])
def test_kernel_as_a_function_of_its_second_argument(name, rows):
    """``transposed``: what `SVGD` sums, against autograd; -sum_j w_ij grad_j k(r_j, r_i)."""
    kernel = KERNELS[name][0]
    r = representation()
    matrix = kernel.evaluate(r)
    weights = torch.randn(5, 5, dtype=r.dtype, generator=torch.Generator().manual_seed(0))[rows]
    torch.testing.assert_close(matrix.transposed(rows).mean, matrix.mean.T[rows])
    found = matrix.transposed(rows).gradient_sum(weights[None])
    first = r.clone().requires_grad_()
    weighted = (weights * values(kernel, first, r).mean(0).T[rows]).sum(1)
    for i, total in enumerate(weighted):
        (gradients,) = torch.autograd.grad(total, first, retain_graph=True)
        torch.testing.assert_close(found[i], -gradients.sum(0), rtol=1e-9, atol=1e-12)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_keeps_dtype_and_arguments(name, dtype):
    r = representation(dtype=dtype)
    before = r.clone()
    matrix = KERNELS[name][0].evaluate(r)
    assert matrix.value.dtype == matrix.slope.dtype == dtype
    assert (r == before).all()


def test_parts_are_frozen_and_have_one_form():
    for kernel, _ in KERNELS.values():
        assert list(inspect.signature(kernel.evaluate).parameters) == [
            "everyone",
            "rows",
            "step",
            "pooled",
        ]
    for transport in TRANSPORTS.values():
        names = list(inspect.signature(transport.repel).parameters)
        assert names == ["kernel", "everyone", "rows", "step", "scores", "pooled"]
        assert isinstance(transport.repulsive, bool)
    for space in SPACES.values():
        for method in ("prepare", "capture", "represent"):
            assert callable(getattr(space, method))
    for part in [k for k, _ in KERNELS.values()] + [*SPACES.values(), *TRANSPORTS.values()]:
        with pytest.raises(AttributeError):
            part.anything = 1


# -------------------------------------------------------------------- transports


def repel(name, r, rows=slice(None), base=RBF(Weights()), pooled=True):
    """Velocity of a transport, the same made-up scores for all that want some."""
    scores = (r - 0.3).sin() if TRANSPORTS[name].uses_scores else None
    found = TRANSPORTS[name].repel(base, r, rows, scores=scores, pooled=pooled)
    assert (found.driving is not None) == TRANSPORTS[name].uses_scores
    return found


@transports
def test_one_particle_feels_no_repulsion(name):
    r = representation(1)
    found = repel(name, r)
    assert (found.velocity == 0).all()
    if found.driving is not None:
        torch.testing.assert_close(found.driving, (r - 0.3).sin())


def needs_symmetry(name):
    transport = TRANSPORTS[name]
    return isinstance(transport, WGD) and transport.estimator != "kde"


@transports
@pytest.mark.parametrize("kernel", KERNELS)
def test_transport_is_equivariant_and_local(name, kernel):
    """Permuting particles permutes velocities; shifting all changes nothing; rows are rows."""
    base, symmetric = KERNELS[kernel]
    r = representation(9, 1)
    if needs_symmetry(name) and not symmetric:
        with pytest.raises(ArgumentError, match="symmetric kernel"):
            repel(name, r, base=base)
        return
    velocity = repel(name, r, base=base).velocity
    assert velocity.shape == r.shape
    order = torch.tensor([3, 0, 5, 1, 4, 2, 8, 7, 6])
    permuted = repel(name, r[order], base=base).velocity
    torch.testing.assert_close(permuted, velocity[order], rtol=1e-8, atol=1e-11)
    shifted = repel(name, r + 5.0, base=base).velocity
    torch.testing.assert_close(shifted, velocity, rtol=1e-7, atol=1e-10)
    rows = repel(name, r, slice(2, 4), base=base)
    torch.testing.assert_close(rows.velocity, velocity[2:4], rtol=1e-9, atol=1e-12)
    if rows.driving is not None:
        torch.testing.assert_close(rows.driving, repel(name, r, base=base).driving[2:4])


@transports
def test_points_that_are_not_pooled_have_kernels_of_their_own(name):
    """Each point alone gives the same as all together."""
    r = representation(7, 4, 1)
    together = repel(name, r, pooled=False)
    for b in range(4):
        alone = repel(name, r[:, b : b + 1], pooled=False)
        found = together.velocity[:, b : b + 1]
        torch.testing.assert_close(found, alone.velocity, rtol=1e-9, atol=1e-12)
        if alone.driving is not None:
            torch.testing.assert_close(together.driving[:, b : b + 1], alone.driving)


@transports
def test_repulsive_transports_push_pairs_apart(name):
    r = torch.tensor([[[0.0, 0.0]], [[1.0, 2.0]]], dtype=torch.float64)
    first, second = repel(name, r).velocity
    away = ((first - second) * (r[0] - r[1])).sum()
    assert (away > 0) == TRANSPORTS[name].repulsive
    torch.testing.assert_close(first, -second)


@transports
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transport_keeps_dtype_and_arguments(name, dtype):
    r = representation(dtype=dtype, points=1)
    before = r.clone()
    velocity = repel(name, r).velocity
    assert velocity.dtype == dtype
    assert velocity.isfinite().all()
    assert (r == before).all()


@transports
def test_equal_particles_give_finite_velocities(name):
    same = representation(1, 1).expand(5, 1, 3)
    assert repel(name, same).velocity.abs().max() < 1e-6
    mostly = same.clone()
    mostly[0] += 1.0
    assert repel(name, mostly).velocity.isfinite().all()


# -------------------------------------------------------------------- spaces


class Model(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = bayesianize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())

    def forward(self, x, y=None):
        logits = pyro.deterministic("logits", self.net(x))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def represented(space, vectorize="vmap", order=None, num_particles=4):
    """Representation of the initial particles, with the particles it came from."""
    inference = ParticleInference(
        Model(),
        pyro.optim.SGD({"lr": 0.1}),
        num_particles,
        kernel=RBF(space),
        seed=0,
        vectorize=vectorize,
    )
    inference.setup(X, Y)
    particles = inference._particles
    if order is not None:
        particles = {n: v.detach()[order].requires_grad_() for n, v in particles.items()}
    ready = inference._space
    torch.manual_seed(0)  # some spaces draw points
    evaluation = evaluate_in(ready, inference._log_joint, particles, {}, (X, Y), {})
    return ready.represent(evaluation), particles


@spaces
def test_space_has_three_axes_and_equals_the_loop(name):
    r, _ = represented(SPACES[name])
    assert r.dim() == 3
    assert r.shape[0] == 4
    assert r.isfinite().all()
    looped, _ = represented(SPACES[name], "loop")
    torch.testing.assert_close(looped, r, rtol=1e-10, atol=1e-12)


@spaces
def test_space_follows_a_permutation_of_particles(name):
    order = torch.tensor([2, 0, 3, 1])
    r, _ = represented(SPACES[name])
    permuted, _ = represented(SPACES[name], order=order)
    torch.testing.assert_close(permuted, r[order], rtol=1e-12, atol=0)


@spaces
def test_space_reaches_its_own_particle_only(name):
    """The derivative of one particle's representation by another particle is zero."""
    r, particles = represented(SPACES[name])
    weight = particles["net.0.weight"]
    for i in range(4):
        (gradient,) = torch.autograd.grad(r[i].square().cos().sum(), weight, retain_graph=True)
        others = torch.arange(4) != i
        assert (gradient[others] == 0).all()
        assert (gradient[i] != 0).any()


@spaces
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_space_trains_with_every_transport(name, transport):
    rule, space = TRANSPORTS[transport], SPACES[name]
    inference = ParticleInference(
        Model(), pyro.optim.Adam({"lr": 0.02}), 4, kernel=RBF(space), transport=rule, seed=0
    )
    calibrated = isinstance(rule, WGD | SVGD) and rule.calibrate
    if (rule.uses_scores and not space.has_scores) or (calibrated and not space.own_values):
        with pytest.raises(ArgumentError, match=r"weight space only|needs the log likelihood"):
            inference.setup(X, Y)
        return
    losses = inference.run(30, X, Y, progress_bar=False)
    assert losses.isfinite().all()
    assert losses[-1] < losses[0]


def test_shapes_of_annotations_are_checked_in_tests():
    """Guards the option in pyproject.toml that turns the checks on."""
    with pytest.raises(TypeError, match="parameter 'everyone'"):
        squared_distances(torch.zeros(1, 2))
