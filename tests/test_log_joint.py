"""The log joint of stacked particles against a plain loop with Pyro's own handlers."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_uniform
from pyro.infer.reparam import LocScaleReparam
from pyro.infer.util import is_validation_enabled
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.nn.module import to_pyro_module_
from pyro.poutine.util import site_is_subsample
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyro_fordes import (
    RBF,
    Ensemble,
    InputGradients,
    LogJoint,
    ModelError,
    NumericalError,
    ParticleInference,
    Weights,
    bayesianize,
)
from pyro_fordes.particles import ravel, unravel
from tests import naive

PARTICLES = 4


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


X = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = X[:, 0] - 0.5 * X[:, 1]


def supports(x, y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    tail = pyro.sample("tail", dist.HalfCauchy(2.0))
    share = pyro.sample("share", dist.Beta(2.0, 3.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(4)))
    corr = pyro.sample("corr", dist.LKJCholesky(3, 1.0))
    w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    bounded = pyro.sample("bounded", dist.Uniform(-1.0, 3.0))
    mean = x @ w + bounded * share + weights[0] * corr[1, 0]
    pyro.sample("y", dist.Normal(mean, scale + rate + tail).to_event(1), obs=y)


def plates(x, y):
    with pyro.plate("outer", 3, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("inner", 2, dim=-1):
            b = pyro.sample("b", dist.LogNormal(a, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a.sum() + b.sum(), 1.0), obs=y)


def scaled_and_masked(x, y):
    with poutine.scale(scale=0.3):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)), poutine.mask(mask=y > 0):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def deterministic_and_factor(x, y):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    half = pyro.deterministic("half", z / 2)
    pyro.factor("bonus", -(half**2).sum())
    pyro.sample("y", dist.Normal(x @ half, 1.0).to_event(1), obs=y)


def smaller_batch(x, y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 50, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(z * x[:, 0], 1.0), obs=y)


def by_keyword(x, *, y=None, scale=1.0):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(z, scale), obs=y)


def parameters(x, y):
    scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(z, scale), obs=y)


class Network(PyroModule):
    """Priors on one layer of an ordinary network; the other layer is trained."""

    def __init__(self):
        super().__init__()
        self.hidden = PyroModule[nn.Linear](2, 3)
        self.hidden.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
        self.out = PyroModule[nn.Linear](3, 1)
        self.noise = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

    def forward(self, x, y):
        mean = self.out(torch.tanh(self.hidden(x))).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, self.noise), obs=y)


def converted():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    to_pyro_module_(net)
    for module in net.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            prior = dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())
            setattr(module, name, PyroSample(prior))

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, y):
            mean = self.net(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return Model()


MODELS = {
    "constrained supports": (lambda: supports, (X, Y), {}),
    "nested plates": (lambda: plates, (X, Y), {}),
    "scale and mask": (lambda: scaled_and_masked, (X, Y), {}),
    "deterministic and factor": (lambda: deterministic_and_factor, (X, Y), {}),
    "a batch of a larger set": (lambda: smaller_batch, (X[:5], Y[:5]), {}),
    "keyword arguments": (lambda: by_keyword, (X,), {"y": Y, "scale": 2.0}),
    "parameters": (lambda: parameters, (X, Y), {}),
    "partly Bayesian network": (Network, (X, Y), {}),
    "converted network": (converted, (X, Y), {}),
}


def random_values(log_joint, args, kwargs, count=PARTICLES):
    latents = log_joint.prototype(args, kwargs).latents
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(count, *latent.shape, generator=generator).requires_grad_()
        for name, latent in latents.items()
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_equals_a_loop_with_pyros_handlers(name, vectorize):
    make, args, kwargs = MODELS[name]
    model = make()
    log_joint = LogJoint(model, vectorize)
    values = random_values(log_joint, args, kwargs)
    latents = log_joint.prototype(args, kwargs).latents
    found = log_joint.evaluate(values, args, kwargs)
    density, log_det = [], []
    for i in range(PARTICLES):
        transforms = {n: latent.transform for n, latent in latents.items()}
        one = {n: value[i] for n, value in values.items()}
        subsamples = {n: torch.arange(5) for n in log_joint.prototype(args, kwargs).plates}
        d, j, _ = naive_log_joint(model, one, transforms, args, kwargs, subsamples)
        density.append(d)
        log_det.append(torch.as_tensor(j))
    torch.testing.assert_close(found.log_density, torch.stack(density), rtol=1e-10, atol=0)
    torch.testing.assert_close(found.log_det, torch.stack(log_det), rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad(found.log_joint.sum(), list(values.values()))
    total = torch.stack(density).sum() + torch.stack(log_det).sum()
    expected = torch.autograd.grad(total, list(values.values()))
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


def naive_log_joint(model, one, transforms, args, kwargs, subsamples):
    """As `naive.log_joint_of_one`, by Pyro's own sum, which knows masks."""
    density, log_det, trace = naive.log_joint_of_one(
        model, one, transforms, args, kwargs, subsamples
    )
    return trace.log_prob_sum(), log_det, density


def subsampling(x, seen):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=4) as rows:
        seen.append(rows)
        pyro.sample("y", dist.Normal(z, 1.0), obs=x[rows, 0])


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_particles_share_one_minibatch_that_changes_from_call_to_call(vectorize):
    seen = []

    def model(x):
        subsampling(x, seen)

    log_joint = LogJoint(model, vectorize)
    x = torch.randn(30, 2)
    values = random_values(log_joint, (x,), {})
    drawn = []
    for _ in range(5):
        seen.clear()
        found = log_joint.evaluate(values, (x,), {})
        rows = found.subsamples["data"].indices
        assert all((torch.as_tensor(indices) == rows).all() for indices in seen)
        assert len(set(rows.tolist())) == 4
        z = values["z"].unsqueeze(-1)
        likelihood = dist.Normal(z, 1.0).log_prob(x[rows, 0]).sum(-1) * 30 / 4
        expected = likelihood + dist.Normal(0.0, 1.0).log_prob(values["z"])
        torch.testing.assert_close(found.log_density, expected, rtol=1e-10, atol=0)
        drawn.append(tuple(rows.tolist()))
    assert len(set(drawn)) > 1


def test_last_batch_may_be_smaller():
    log_joint = LogJoint(smaller_batch)
    values = random_values(log_joint, (X, Y), {})
    for size in (6, 6, 2):
        found = log_joint.evaluate(values, (X[:size], Y[:size]), {}).log_density
        mean = values["z"][:, None] * X[:size, 0]
        expected = dist.Normal(mean, 1.0).log_prob(Y[:size]).sum(1) * 50 / size
        expected = expected + dist.Normal(0.0, 1.0).log_prob(values["z"])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


# ------------------------------------------------------------------- shared parameters


def test_shared_parameters_follow_the_mean_gradient_and_no_repulsion():
    """One SGD step of a ``pyro.param`` and of module parameters against autograd by hand."""
    model = Network()
    inference = ParticleInference(
        model,
        pyro.optim.SGD({"lr": 0.01}),
        PARTICLES,
        kernel=RBF(Weights()),
        repulsion_scale=100.0,
        seed=0,
    )
    inference.setup(X, Y)
    weight = inference.get_samples()["hidden.weight"]
    out = {n: p.detach().clone().requires_grad_() for n, p in model.out.named_parameters()}
    bias = model.hidden.bias.detach().clone().requires_grad_()
    noise = torch.tensor(0.5).log().requires_grad_()
    loss = 0.0
    for w in weight:
        mean = (torch.tanh(X @ w.T + bias) @ out["weight"].T + out["bias"]).squeeze(-1)
        loss = loss - dist.Normal(mean, noise.exp()).log_prob(Y).sum() / PARTICLES
    expected = torch.autograd.grad(loss, [out["weight"], out["bias"], bias, noise])
    inference.step(X, Y)
    moved = [model.out.weight, model.out.bias, model.hidden.bias, model.noise.log()]
    before = [out["weight"], out["bias"], bias, noise]
    for now, old, gradient in zip(moved, before, expected, strict=True):
        wanted = old.detach() - 0.01 * gradient
        torch.testing.assert_close(now.detach(), wanted, rtol=1e-9, atol=1e-12)


def test_shared_parameters_are_the_only_thing_in_the_store():
    inference = ParticleInference(
        parameters, pyro.optim.Adam({"lr": 0.05}), PARTICLES, kernel=RBF(Weights()), seed=0
    )
    inference.run(200, X, Y, progress_bar=False)
    assert list(pyro.get_param_store().keys()) == ["scale"]
    # The scale goes to where the expected squared residual is.
    z = inference.get_samples()["z"]
    residual = ((Y[None] - z[:, None]) ** 2).mean().sqrt()
    assert abs(pyro.param("scale").item() - residual.item()) < 0.05


# ------------------------------------------------------------------- randomness and buffers


class Noisy(PyroModule):
    def __init__(self, *layers):
        super().__init__()
        self.net = bayesianize(nn.Sequential(nn.Linear(2, 8), *layers, nn.Linear(8, 1)))

    def forward(self, x, y):
        mean = pyro.deterministic("mean", self.net(x).squeeze(-1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_dropout_differs_between_particles_and_follows_the_seed(vectorize):
    log_joint = LogJoint(Noisy(nn.Dropout(0.5)), vectorize)
    values = random_values(log_joint, (X, Y), {})
    equal = {n: v[:1].expand(PARTICLES, *v.shape[1:]) for n, v in values.items()}
    torch.manual_seed(0)
    first = log_joint.evaluate(equal, (X, Y), {}).log_density
    second = log_joint.evaluate(equal, (X, Y), {}).log_density
    torch.manual_seed(0)
    again = log_joint.evaluate(equal, (X, Y), {}).log_density
    assert len(set(first.tolist())) == PARTICLES
    assert (first != second).all()
    torch.testing.assert_close(first, again, rtol=0, atol=0)


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_batch_norm_statistics_are_those_of_networks_trained_alone(vectorize):
    """Per-particle buffers, updated once per step; the module's own stay as they were."""

    def make():
        return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = bayesianize(make(), prior=1.0)

        def forward(self, x, y):
            mean = self.net(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    model = Model()
    inference = ParticleInference(
        model,
        pyro.optim.SGD({"lr": 0.01}),
        PARTICLES,
        transport=Ensemble(),
        vectorize=vectorize,
        seed=0,
    )
    inference.setup(X, Y)
    nets = []
    for i in range(PARTICLES):
        net = make()
        weights = {n.removeprefix("net."): v[i] for n, v in inference.get_samples().items()}
        net.load_state_dict(weights, strict=False)
        nets.append(net)
    inference.run(3, X, Y, progress_bar=False)
    for i, net in enumerate(nets):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            loss = -dist.Normal(net(X).squeeze(-1), 1.0).log_prob(Y).sum()
            loss = loss - sum(dist.Normal(0.0, 1.0).log_prob(p).sum() for p in net.parameters())
            loss.backward()
            optimizer.step()
        samples = {n.removeprefix("net."): v[i] for n, v in inference.get_samples().items()}
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(samples[name], parameter.detach(), rtol=1e-9, atol=1e-11)
        for name, buffer in net.named_buffers():
            own = inference._buffers[f"net.{name}"][i]
            torch.testing.assert_close(own, buffer, rtol=1e-9, atol=1e-11)
    assert model.net[1].num_batches_tracked == 0
    assert (model.net[1].running_mean == 0).all()
    before = {n: b.clone() for n, b in inference._buffers.items()}
    inference.evaluate_loss(X, Y)
    assert all((inference._buffers[n] == b).all() for n, b in before.items())


def test_prototype_draws_nothing_and_changes_no_buffer():
    model = Noisy(nn.BatchNorm1d(8), nn.Dropout(0.5))
    state = torch.get_rng_state()
    prototype = LogJoint(model).prototype((X, Y), {})
    assert (torch.get_rng_state() == state).all()
    assert set(prototype.mutated) == {
        "net.1.running_mean",
        "net.1.running_var",
        "net.1.num_batches_tracked",
    }
    assert (model.net[1].running_mean == 0).all()
    assert model.net[1].num_batches_tracked == 0


def test_the_prototype_keeps_no_graph():
    """It is kept, one for each shape of arguments, and so would be all that led to its numbers."""
    model = Noisy(nn.Tanh())
    model.net = bayesianize(
        nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)),
        prior=lambda name, value: 1.0 if name.startswith("2") else None,
    )
    trace = LogJoint(model).prototype((X, Y), {}).trace
    assert all(parameter.requires_grad for parameter in model.net[0].parameters())
    found = [site["log_prob"] for site in trace.nodes.values() if "log_prob" in site]
    assert found
    assert all(tensor.grad_fn is None for tensor in found)


def test_a_buffer_that_is_replaced_is_refused_and_put_back():
    class Counting(Noisy):
        def forward(self, x, y=None):
            self.net[1].running_mean = self.net[1].running_mean + 1.0
            return super().forward(x, y)

    model = Counting(nn.BatchNorm1d(8))
    before = model.net[1].running_mean
    with pytest.raises(ModelError, match=r"replaces the buffers .*write buffer.copy_"):
        LogJoint(model).prototype((X, Y), {})
    assert model.net[1].running_mean is before
    assert (before == 0).all()


# ------------------------------------------------------------------- validation


@pytest.mark.parametrize("setting", [True, False])
def test_validation_switch_is_left_as_it_was(setting):
    before = is_validation_enabled()
    pyro.enable_validation(setting)
    try:
        log_joint = LogJoint(smaller_batch)
        values = random_values(log_joint, (X, Y), {})
        log_joint.evaluate(values, (X, Y), {})
        assert is_validation_enabled() is setting
        assert torch.distributions.Distribution._validate_args is setting
        with pytest.raises(ValueError, match="broadcastable"):
            log_joint.evaluate(values, (X, Y[:3]), {})
        with pytest.raises(ZeroDivisionError):
            log_joint.evaluate(values, (X, Y), {}, capture=lambda call: 1 / 0)
        assert is_validation_enabled() is setting
        assert torch.distributions.Distribution._validate_args is setting
    finally:
        pyro.enable_validation(before)


def test_pyros_own_shape_errors_reach_the_user():
    def missing_event(x, y):
        with pyro.plate("data", 5):
            pyro.sample("w", dist.Normal(torch.zeros(2, 5), 1.0))

    def wrong_plate(x, y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"to_event"):
        LogJoint(missing_event).prototype((X, Y), {})
    with pytest.raises(ValueError, match=r"y"):
        LogJoint(wrong_plate).prototype((X, Y), {})


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_undeclared_batch_dimensions(vectorize):
    """Outside of plates NUTS sums over them, as eight schools of Pyro's examples needs."""

    def bare(y):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 1.0))
        pyro.sample("y", dist.Normal(0.0, z), obs=y)

    def declared(y):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, z).to_event(1), obs=y)

    values = {"z": torch.randn(3, 2, dtype=torch.float64)}
    found, wanted = (
        LogJoint(model, vectorize).evaluate(values, (torch.ones(4, 2).double(),), {}).log_joint
        for model in (bare, declared)
    )
    torch.testing.assert_close(found, wanted)


def test_a_prior_draw_that_the_model_cannot_take_stops_nothing():
    """A logistic function typed out overflows under a wide prior, and fails where it starts."""

    def model(y):
        z = pyro.sample("z", dist.Normal(torch.tensor(1000.0), 1.0))
        p = z.exp() / (1 + z.exp())
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    assert list(LogJoint(model).prototype((torch.ones(5),), {}).latents) == ["z"]
    adam = pyro.optim.Adam({"lr": 0.01})
    with pytest.raises(NumericalError, match=r"outside the support|init_loc_fn"):
        ParticleInference(model, adam, 3, kernel=RBF(Weights())).step(torch.ones(5))
    start = init_to_uniform(radius=1.0)
    ParticleInference(model, adam, 3, kernel=RBF(Weights()), init_loc_fn=start).step(torch.ones(5))


def test_broadcast_of_value_and_distribution_is_refused():
    """The classic mistake: a column of means and a row of observations, without a plate."""

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z * torch.ones(len(y), 1), 1.0), obs=y)

    with pytest.raises(ModelError, match=r"'y'.*\(5,\).*\(5, 1\).*broadcast to \(5, 5\)"):
        LogJoint(model).prototype((torch.ones(5),), {})


# ------------------------------------------------------------------- shapes at random


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    shapes=st.lists(st.lists(st.integers(1, 3), max_size=3), min_size=1, max_size=4),
    particles=st.integers(1, 5),
    vectorize=st.sampled_from(["vmap", "loop"]),
)
def test_any_site_shapes(shapes, particles, vectorize):
    def model():
        for i, shape in enumerate(shapes):
            pyro.sample(f"z{i}", dist.LogNormal(torch.zeros(shape), 1.0).to_event(len(shape)))

    log_joint = LogJoint(model, vectorize)
    values = random_values(log_joint, (), {}, particles)
    found = log_joint.evaluate(values, (), {})
    assert found.log_joint.shape == (particles,)
    # LogNormal with the log determinant of exp is a Normal.
    expected = sum(
        dist.Normal(0.0, 1.0).log_prob(value).reshape(particles, -1).sum(1)
        for value in values.values()
    )
    torch.testing.assert_close(found.log_joint, expected, rtol=1e-9, atol=1e-10)
    constrained = log_joint.constrain(values, log_joint.prototype((), {}).latents)
    for name, value in values.items():
        torch.testing.assert_close(constrained[name], value.exp())


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    shapes=st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=5),
    particles=st.integers(1, 6),
)
def test_ravel_and_unravel_are_inverse(shapes, particles):
    values = {f"z{i}": torch.randn(particles, *shape) for i, shape in enumerate(shapes)}
    flat = ravel(values)
    assert flat.shape == (particles, sum(v[0].numel() for v in values.values()))
    for name, value in unravel(flat, values).items():
        assert (value == values[name]).all()


# ------------------------------------------------------------------- more models

ENGINES = ["vmap", "loop"]
engines = pytest.mark.parametrize("vectorize", ENGINES)
kernels = pytest.mark.parametrize(
    "kernel", [RBF(Weights()), RBF(InputGradients("x"))], ids=["weights", "gradients"]
)


def sgd(params):
    return torch.optim.SGD(params, lr=1e-3)


def check(model, args, kwargs=None, vectorize="vmap"):
    """Compare value and gradient with Pyro's handlers, one particle after the other."""
    kwargs = kwargs or {}
    log_joint = LogJoint(model, vectorize)
    values = random_values(log_joint, args, kwargs)
    found = log_joint.evaluate(values, args, kwargs)
    transforms = {n: v.transform for n, v in log_joint.prototype(args, kwargs).latents.items()}
    rows = {name: drawn.indices for name, drawn in found.subsamples.items()}
    wanted = []
    for i in range(PARTICLES):
        one = {name: value[i] for name, value in values.items()}
        _, log_det, trace = naive.log_joint_of_one(model, one, transforms, args, kwargs, rows)
        wanted.append(log_det + trace.log_prob_sum(lambda _, site: not site_is_subsample(site)))
    wanted = torch.stack(wanted)
    torch.testing.assert_close(found.log_joint, wanted, rtol=1e-10, atol=1e-12)
    sites = list(values.values())
    pairs = zip(
        torch.autograd.grad(found.log_joint.sum(), sites),
        torch.autograd.grad(wanted.sum(), sites),
        strict=True,
    )
    for gradient, expected in pairs:
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    return found


def hierarchy(y):
    """A local latent in a full plate, and a scale that it depends on."""
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


def sequential(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    for i in pyro.plate("steps", 3):
        pyro.sample(f"y{i}", dist.Normal(z * i, 1.0), obs=y[i])


def two_minibatches(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    first = pyro.plate("first", 3, subsample_size=2, dim=-1)
    second = pyro.plate("second", 2, subsample_size=1, dim=-2)
    with first as i, second as j:
        pyro.sample("y", dist.Normal(z, 1.0), obs=y.reshape(2, 3)[j][:, i])


def given_rows(y, rows):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 50, subsample=rows):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])


def scales_and_masks(y):
    with poutine.scale(scale=0.25):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        with poutine.scale(scale=3.0), pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
    with poutine.mask(mask=False):
        pyro.sample("ignored", dist.Normal(z, 1.0), obs=y[0])


def partly_observed(y):
    """Pyro makes a latent site of the entries that ``obs_mask`` leaves out."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y, obs_mask=y > 0)


def mixture(y):
    share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
    means = pyro.sample("means", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        fn = dist.MixtureSameFamily(dist.Categorical(share), dist.Normal(means, 1.0))
        pyro.sample("y", fn, obs=y)


def by_star(*args, **options):
    by_keyword(*args, **options)


def by_containers(batch, sizes):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", sizes[0]):
        pyro.sample("y", dist.Normal(z * batch["x"][:, 0], 1.0), obs=batch["targets"][0])


MORE = {
    "hierarchy": (hierarchy, (Y,)),
    "sequential plate": (sequential, (Y,)),
    "two subsampled plates": (two_minibatches, (Y,)),
    "rows from outside": (given_rows, (Y, torch.tensor([3, 0, 5]))),
    "scales within scales": (scales_and_masks, (Y,)),
    "partly observed": (partly_observed, (Y,)),
    "mixture": (mixture, (Y,)),
    "star": (by_star, (X, Y)),
    "containers": (by_containers, ({"x": X, "targets": [Y]}, (6,))),
    "reparametrised": (
        poutine.reparam(hierarchy, config={"theta": LocScaleReparam(0.0)}),
        (Y,),
    ),
    "scaled from outside": (poutine.scale(hierarchy, scale=0.5), (Y,)),
    "conditioned from outside": (
        poutine.condition(hierarchy, data={"tau": torch.tensor(0.7, dtype=torch.float64)}),
        (Y,),
    ),
}


@engines
@pytest.mark.parametrize("name", MORE)
def test_more_models_equal_a_loop(name, vectorize):
    model, args = MORE[name]
    kwargs = {"y": Y, "scale": 0.7} if name == "star" else {}
    check(model, args[:1] if name == "star" else args, kwargs, vectorize)


def test_minibatches_are_unbiased():
    """Their mean over many draws is the log joint of the full data."""
    log_joint = LogJoint(lambda x: subsampling(x, []))
    values = {"z": torch.linspace(-1, 1, PARTICLES)}
    x = torch.randn(30, 2)
    draws = torch.stack([log_joint.evaluate(values, (x,), {}).log_joint for _ in range(300)])
    exact = dist.Normal(values["z"][:, None], 1.0).log_prob(x[:, 0]).sum(1)
    exact = exact + dist.Normal(0.0, 1.0).log_prob(values["z"])
    error = draws.std(0) / 300**0.5
    assert ((draws.mean(0) - exact).abs() < 4 * error).all()


def test_unconstrained_shapes_and_constrained_values():
    log_joint = LogJoint(supports)
    latents = log_joint.prototype((X, Y), {}).latents
    assert latents["weights"].shape == (3,)  # a simplex of four
    assert latents["corr"].shape == (3,)  # a Cholesky factor of 3 x 3
    values = random_values(log_joint, (X, Y), {})
    constrained = log_joint.constrain(values, latents)
    assert constrained["weights"].shape == (PARTICLES, 4)
    assert constrained["corr"].shape == (PARTICLES, 3, 3)
    for name, value in constrained.items():
        for i in range(PARTICLES):
            assert latents[name].transform.codomain.check(value[i]).all(), name


# ------------------------------------------------------------------- engines


class Normed(PyroModule):
    """Batch norm after a layer with priors: each particle has statistics of its own."""

    def __init__(self, momentum=0.1):
        super().__init__()
        norm = nn.BatchNorm1d(4, momentum=momentum)
        self.net = bayesianize(nn.Sequential(nn.Linear(2, 4), norm, nn.Tanh(), nn.Linear(4, 1)))

    def forward(self, x, y=None):
        mean = self.net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def statistics(samples, batches, momentum=0.1):
    """Statistics of plain networks with the particles' weights, over some batches."""
    stacked = []
    for i in range(PARTICLES):
        norm = nn.BatchNorm1d(4, momentum=momentum)
        for (x, _), weights in zip(batches, samples, strict=True):
            norm(x @ weights["net.0.weight"][i].T + weights["net.0.bias"][i])
        stacked.append(dict(norm.named_buffers()))
    return {f"net.1.{n}": torch.stack([one[n] for one in stacked]) for n in stacked[0]}


def start(model, *args, **options):
    inference = ParticleInference(model, sgd, PARTICLES, seed=0, **options)
    inference.setup(*args)
    return inference


@kernels
@pytest.mark.parametrize("model", [Network, Normed])
def test_engines_give_the_same_training(model, kernel):
    """Losses, particles, shared parameters and statistics after some steps."""
    results = []
    for vectorize in ENGINES:
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        net = model()
        inference = start(net, X, Y, kernel=kernel, vectorize=vectorize)
        losses = inference.run(4, X, Y, progress_bar=False)
        parameters = {name: value.detach() for name, value in net.named_parameters()}
        samples, buffers = inference.get_samples(), inference._buffers
        results.append({"losses": losses, **samples, **buffers, **parameters})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-9, atol=1e-11)


def test_auto_takes_the_loop_for_convolutions_on_a_cpu():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    convolution = bayesianize(nn.Conv1d(1, 1, 1))
    assert LogJoint(hierarchy).engine(cpu) == "vmap"
    assert LogJoint(convolution).engine(cpu) == "loop"
    assert LogJoint(convolution).engine(cuda) == "vmap"
    assert LogJoint(convolution, "vmap").engine(cpu) == "vmap"


def test_what_cannot_be_vectorised_says_so_and_runs_in_a_loop():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mean = z if z > 0 else -z
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    with pytest.raises(ModelError, match="vectorize='loop'"):
        LogJoint(model, "vmap").evaluate({"z": torch.ones(3)}, (Y,), {})
    check(model, (Y,), vectorize="loop")


@engines
def test_a_network_that_recomputes_its_activations_is_refused(vectorize):
    """The second run would draw weights from the prior, and masks from the global generator."""

    class Saving(nn.Linear):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model = Noisy(Saving(8, 8), nn.Dropout(0.5))
    with pytest.raises(ModelError, match=r"torch.utils.checkpoint .*chunk_size=1"):
        ParticleInference(
            model, pyro.optim.Adam({"lr": 0.1}), 3, kernel=RBF(Weights()), vectorize=vectorize
        ).step(X, Y)
    # Hooks around a step are the caller's.
    plain = ParticleInference(
        Noisy(), pyro.optim.Adam({"lr": 0.1}), 3, kernel=RBF(Weights()), vectorize=vectorize
    )
    with torch.autograd.graph.save_on_cpu():
        assert math.isfinite(plain.step(X, Y))


# ------------------------------------------------------------------- buffers in every mode


@kernels
@engines
def test_statistics_move_with_steps_only(kernel, vectorize):
    """Once per step, whatever else is asked between steps and whatever the step measures."""
    options = {"diagnostics_every": 2, "vectorize": vectorize}
    inference = start(Normed(), X, Y, kernel=kernel, **options)
    batches = [(X + i, Y) for i in range(4)]
    samples = []
    for batch in batches:
        samples.append(inference.get_samples())
        inference.evaluate_loss(*batch)
        inference.log_likelihood(*batch)
        inference.log_joint(*batch)
        inference.step(*batch)
    for name, wanted in statistics(samples, batches).items():
        torch.testing.assert_close(inference._buffers[name], wanted, rtol=1e-10, atol=1e-12)
    assert inference.model.net[1].num_batches_tracked == 0


def test_cumulative_statistics():
    """With ``momentum=None`` torch reads a counter as a Python number, which vmap cannot."""
    options = {"kernel": RBF(Weights())}
    inference = start(Normed(momentum=None), X, Y, vectorize="loop", **options)
    samples = [inference.get_samples()]
    inference.step(X, Y)
    samples.append(inference.get_samples())
    inference.step(X, Y)
    for name, wanted in statistics(samples, [(X, Y)] * 2, momentum=None).items():
        torch.testing.assert_close(inference._buffers[name], wanted, rtol=1e-10, atol=1e-12)
    model = Normed(momentum=None)
    with pytest.raises(ModelError, match="vectorize='loop'"):
        start(model, X, Y, vectorize="vmap", **options)
    assert model.net[1].num_batches_tracked == 0


@engines
def test_switch_between_eval_and_train(vectorize):
    """The mode is that of each call; the statistics are the particles' in either."""
    model = Normed().eval()
    inference = start(model, X, Y, kernel=RBF(Weights()), vectorize=vectorize)
    inference.step(X, Y)  # the prototype saw no statistics change
    model.train()
    samples = [inference.get_samples()]
    inference.step(X, Y)
    model.eval()
    inference.step(X, Y)
    assert model.net[1].num_batches_tracked == 0
    assert torch.equal(model.net[1].running_mean, torch.zeros(4))
    for name, wanted in statistics(samples, [(X, Y)]).items():
        torch.testing.assert_close(inference._buffers[name], wanted, rtol=1e-10, atol=1e-12)


@engines
def test_statistics_that_happen_not_to_change_at_first(vectorize):
    """A first batch of mean exactly 0 leaves running_mean as it is; later ones do not."""

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(self.norm(x * w).squeeze(-1), 1.0), obs=x[:, 0])

    x = torch.tensor([[-1.0], [1.0]])
    inference = start(Model(), x, kernel=RBF(Weights()), vectorize=vectorize)
    w = inference.get_samples()["w"]
    inference.step(x + 1)
    assert torch.equal(inference.model.norm.running_mean, torch.zeros(1))
    found = inference._buffers["norm.running_mean"].squeeze(-1)
    torch.testing.assert_close(found, 0.1 * w, rtol=1e-12, atol=0)


@engines
def test_evaluate_without_buffers_leaves_the_modules_own(vectorize):
    """Who calls the log joint directly gets the module's statistics, and does not change them."""
    log_joint = LogJoint(Normed(), vectorize)
    values = random_values(log_joint, (X, Y), {})
    log_joint.evaluate(values, (X, Y), {})
    assert log_joint.model.net[1].num_batches_tracked == 0


# ------------------------------------------------------------------- parameters, side effects


def test_frozen_parameters_stay():
    """Pyro itself unfreezes them when a PyroModule reads them; particle inference must not."""
    model = Network()
    model.out.weight.requires_grad_(False)
    before = model.out.weight.clone()
    start(model, X, Y, kernel=RBF(Weights())).step(X, Y)
    assert torch.equal(model.out.weight, before)


def test_parameters_of_a_second_instance_are_trained():
    """Pyro's store knows one parameter of each name; both models must train their own."""
    for seed in range(2):
        pyro.set_rng_seed(seed)
        model = Network()
        before = copy.deepcopy(model)
        start(model, X, Y, kernel=RBF(Weights())).step(X, Y)
        for name in ("hidden.bias", "out.weight"):
            assert not torch.equal(model.get_parameter(name), before.get_parameter(name)), seed


@engines
def test_parameters_that_are_local_to_their_module(vectorize):
    """``module_local_params`` keeps them out of the store; they are trained all the same."""
    moved = []
    for local in (False, True):
        with pyro.settings.context(module_local_params=local):
            pyro.set_rng_seed(0)
            pyro.clear_param_store()
            model = Network()
            inference = start(model, X, Y, kernel=RBF(Weights()), vectorize=vectorize)
            inference.run(2, X, Y, progress_bar=False)
            moved.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert not list(pyro.get_param_store().keys())
    for name, value in moved[0].items():
        torch.testing.assert_close(moved[1][name], value, rtol=1e-10, atol=1e-12)


def test_the_shared_gradient_is_divided_by_num_data():
    moved = []
    for num_data in (None, 10):
        pyro.clear_param_store()
        inference = start(parameters, X, Y, transport=Ensemble(), num_data=num_data)
        inference.step(X, Y)
        moved.append(pyro.param("scale").detach().log() - torch.tensor(0.7).log())
    torch.testing.assert_close(moved[0], 10 * moved[1], rtol=1e-9, atol=0)


def test_the_prototype_runs_once_for_arguments_of_the_same_shapes():
    runs = []

    def model(y, flag=True):
        runs.append(len(y))
        hierarchy(y)

    log_joint = LogJoint(model)
    for y in (Y, 2 * Y, Y[:3], Y):
        log_joint.prototype((y,), {})
    # Each time once more to see whether it draws random numbers.
    assert runs == [6, 6, 3, 3]
    log_joint.prototype((Y,), {"flag": False})
    assert len(runs) == 6


@engines
def test_evaluation_leaves_values_arguments_and_the_store_alone(vectorize):
    log_joint = LogJoint(hierarchy, vectorize)
    values = random_values(log_joint, (Y,), {})
    before, y = {name: value.clone() for name, value in values.items()}, Y.clone()
    log_joint.evaluate(values, (y,), {}, input=0)
    assert all(torch.equal(values[name], before[name]) for name in before)
    assert torch.equal(y, Y)
    assert not y.requires_grad
    assert not list(pyro.get_param_store().keys())


@engines
def test_validation_is_left_as_found_when_the_model_raises(vectorize):
    """In the prototype, in a particle's run, and through the driver."""

    class Told(Exception):
        pass

    def model(y):
        hierarchy(y)
        if fail:
            raise Told

    fail = False
    before = is_validation_enabled()
    log_joint = LogJoint(model, vectorize)
    values = random_values(log_joint, (Y,), {})
    fail = True
    with pytest.raises(Told):
        log_joint.evaluate(values, (Y,), {})
    assert is_validation_enabled() is before
    with pytest.raises(Told):
        LogJoint(model, vectorize).prototype((Y,), {})
    assert is_validation_enabled() is before
    with pytest.raises(Told):
        start(model, Y, kernel=RBF(Weights()))
    assert is_validation_enabled() is before


def test_a_support_that_follows_the_data_is_refused():
    def model(y):
        top = pyro.sample("top", dist.Uniform(0.0, y.abs().max() + 1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(top, 1.0), obs=y)

    log_joint = LogJoint(model)
    log_joint.prototype((Y,), {})
    with pytest.raises(ModelError, match="support of site 'top' changes with the model's argu"):
        log_joint.prototype((10 * Y[:4],), {})


def test_auto_takes_the_loop_where_vmap_has_no_rule():
    """An old-style autograd function, and a branch on a value; buffers change once only."""

    class Branching(PyroModule):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2, affine=False)
            self.w = PyroSample(dist.Normal(torch.zeros(2), 1.0).to_event(1))

        def forward(self, x, y):
            h = self.norm(x)
            w = self.w
            mean = h @ w if w.sum() > 0 else 2 * (h @ w)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    def old_style(x, y):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(pyro.ops.special.safe_log(rate), 1.0), obs=y)

    for model in (Branching(), old_style):
        found = {}
        for vectorize in ("auto", "loop"):
            inference = ParticleInference(
                model,
                pyro.optim.SGD({"lr": 0.01}),
                3,
                kernel=RBF(Weights()),
                vectorize=vectorize,
                seed=0,
            )
            losses = inference.run(3, X, Y, progress_bar=False)
            found[vectorize] = losses, inference.get_samples(), inference._buffers
        assert (found["auto"][0] == found["loop"][0]).all()
        for name, value in found["auto"][1].items():
            assert (value == found["loop"][1][name]).all()
        for name, value in found["auto"][2].items():
            assert (value == found["loop"][2][name]).all()
        inference = ParticleInference(
            model, pyro.optim.SGD({"lr": 0.01}), 3, kernel=RBF(Weights()), vectorize="vmap"
        )
        with pytest.raises(ModelError, match="use vectorize='loop'"):
            inference.setup(X, Y)
