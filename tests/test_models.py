"""Models as users of Pyro write them: handlers, reparametrisation, hierarchies, local latents."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import initialization
from pyro.infer.reparam import AutoReparam, LocScaleReparam, TransformReparam
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_fordes import (
    RBF,
    SVGD,
    WGD,
    Ensemble,
    InputGradients,
    Outputs,
    ParticleInference,
    Weights,
    bayesianize,
)
from tests.models import Regression


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


Y = torch.tensor([28.0, 8.0, -3.0, 7.0], dtype=torch.float64)
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0], dtype=torch.float64)
X = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGETS = X.sum(1)


def start(model, *data, space=None, transport=None, **options):
    inference = ParticleInference(
        model,
        pyro.optim.Adam({"lr": 0.05}),
        4,
        kernel=RBF(space or Weights()),
        transport=transport or WGD(),
        seed=0,
        **options,
    )
    inference.setup(*data)
    return inference


def schools(y, sigma):
    """Local latents in a full plate under a hierarchy."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


REPARAMS = {
    "LocScale": {"theta": LocScaleReparam(0.0)},
    "LocScale, learnt": {"theta": LocScaleReparam()},
    "Auto": AutoReparam(centered=0.0),
}


@pytest.mark.parametrize("name", REPARAMS)
@pytest.mark.parametrize("transport", [WGD(), SVGD()])
def test_reparametrised_models_train(name, transport):
    model = poutine.reparam(schools, config=REPARAMS[name])
    with pyro.get_param_store().scope():
        inference = start(model, Y, SIGMA, transport=transport)
        assert "theta" not in inference.get_samples()
        assert "theta_decentered" in inference.get_samples()
        losses = inference.run(30, Y, SIGMA, progress_bar=False)
    assert losses[-1] < losses[0]


def test_reparametrised_density_is_that_of_the_values_it_makes():
    """Non-centred: log p(mu, tau, z) differs from the centred one by the Jacobian, 4 log tau."""
    model = poutine.reparam(schools, config=REPARAMS["LocScale"])
    inference = start(model, Y, SIGMA)
    s = inference.get_samples()
    theta = s["mu"][:, None] + s["tau"][:, None] * s["theta_decentered"]
    expected = dist.Normal(0.0, 5.0).log_prob(s["mu"]) + dist.HalfCauchy(5.0).log_prob(s["tau"])
    expected += dist.Normal(0.0, 1.0).log_prob(s["theta_decentered"]).sum(1)
    expected += dist.Normal(theta, SIGMA).log_prob(Y).sum(1) + s["tau"].log()
    torch.testing.assert_close(inference.log_joint(Y, SIGMA), expected)


def test_transform_reparam_moves_the_base():
    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        pyro.sample("y", dist.Normal(0.0, scale).expand([4]).to_event(1), obs=y)

    inference = start(poutine.reparam(model, config={"scale": TransformReparam()}), Y)
    assert list(inference.get_samples()) == ["scale_base"]


HANDLERS = {
    "scale": lambda model: poutine.scale(model, 3.0),
    "mask": lambda model: poutine.mask(model, torch.tensor(True)),
    "condition": lambda model: poutine.condition(model, {"net.bias": torch.zeros(1)}),
    "two of them": lambda model: poutine.scale(poutine.condition(model, {}), 2.0),
}


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("space", [InputGradients("x"), InputGradients("x", output="net")])
def test_a_handled_module_is_still_a_module(handler, space):
    """Argument names, submodules and buffers are found through Pyro's handlers."""
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))
    module = Regression(bayesianize(net))
    before = module.net[1].running_mean.clone()
    inference = start(HANDLERS[handler](module), X, TARGETS, space=space)
    losses = inference.run(20, X, TARGETS, progress_bar=False)
    assert losses[-1] < losses[0]
    assert (module.net[1].running_mean == before).all()
    statistics = inference._buffers["net.1.running_mean"]
    assert (statistics[0] != statistics[1]).any()
    assert (statistics != 0).all()


def test_conditioned_sites_are_no_particles():
    model = poutine.condition(Regression(bayesianize(nn.Linear(2, 1))), {"net.bias": torch.ones(1)})
    assert list(start(model, X, TARGETS).get_samples()) == ["net.weight"]


class Hierarchy(PyroModule):
    """Priors on the scales of priors, in modules within modules."""

    def __init__(self):
        super().__init__()
        self.layer = PyroModule[nn.Linear](2, 1)
        self.layer.scale = PyroSample(dist.HalfNormal(1.0))
        self.layer.weight = PyroSample(
            lambda layer: dist.Normal(0.0, layer.scale).expand([1, 2]).to_event(2)
        )
        self.layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        self.noise = PyroSample(dist.LogNormal(0.0, 1.0))

    def forward(self, x, y=None):
        mean = self.layer(x).squeeze(-1)
        noise = self.noise
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, noise), obs=y)


@pytest.mark.parametrize(
    "space", [Weights(), Weights(group="site"), Outputs(), InputGradients("x")]
)
@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_priors_on_scales_of_priors(space, vectorize):
    inference = start(Hierarchy(), X, TARGETS, space=space, vectorize=vectorize)
    s = inference.get_samples()
    assert set(s) == {"layer.scale", "layer.weight", "layer.bias", "noise"}
    mean = (X @ s["layer.weight"].mT).squeeze(-1) + s["layer.bias"]
    expected = (
        dist.HalfNormal(1.0).log_prob(s["layer.scale"])
        + s["layer.scale"].log()
        + dist.Normal(0.0, s["layer.scale"][:, None, None]).log_prob(s["layer.weight"]).sum((1, 2))
        + dist.Normal(0.0, 1.0).log_prob(s["layer.bias"]).sum(1)
        + dist.LogNormal(0.0, 1.0).log_prob(s["noise"])
        + s["noise"].log()
        + dist.Normal(mean, s["noise"][:, None]).log_prob(TARGETS).sum(1)
    )
    torch.testing.assert_close(inference.log_joint(X, TARGETS), expected)
    losses = inference.run(30, X, TARGETS, progress_bar=False)
    assert losses[-1] < losses[0]


STRATEGIES = {
    "init_to_sample": initialization.init_to_sample,
    "init_to_uniform": initialization.init_to_uniform,
    "init_to_median": initialization.init_to_median(num_samples=3),
    "init_to_value of one site": initialization.init_to_value(values={"mu": torch.tensor(3.0)}),
    "init_to_generated": initialization.init_to_generated(
        generate=lambda: initialization.init_to_uniform(radius=0.5)
    ),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_that_draw_start_particles_apart(name):
    inference = start(schools, Y, SIGMA, init_loc_fn=STRATEGIES[name])
    theta = inference.get_samples()["theta"]
    assert len(theta.unique(dim=0)) == 4
    if "value" in name:  # given in single precision, and brought to the site's
        assert (inference.get_samples()["mu"] == 3.0).all()
    inference.run(3, Y, SIGMA, progress_bar=False)


def test_an_ensemble_of_a_local_model_is_its_mode():
    """Full plates of local latents: each particle climbs to the closed-form mode."""

    def model(y, sigma):
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, 10.0))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    inference = ParticleInference(
        model, pyro.optim.SGD({"lr": 20.0}), 3, transport=Ensemble(), seed=0
    )
    inference.run(400, Y, SIGMA, progress_bar=False)
    mode = Y / SIGMA**2 / (1 / SIGMA**2 + 1 / 100)
    torch.testing.assert_close(inference.get_samples()["theta"], mode.expand(3, 4))
