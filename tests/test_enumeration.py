"""Discrete latent sites, summed out, against Pyro's evaluator and typed-out sums."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.ops.indexing import Vindex

from pyro_fordes import (
    RBF,
    SVGD,
    WGD,
    InputGradients,
    LogJoint,
    ModelError,
    ParticleInference,
    ParticlePredictive,
    Weights,
    to_arviz,
)
from pyro_fordes.particles import unravel

PARTICLES = 3


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


Y = torch.tensor([-2.0, -1.5, 0.3, 1.8, 2.2, 2.5], dtype=torch.float64)


def mixture(y):
    """Local assignments in a plate."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        means = pyro.sample("means", dist.Normal(0.0, 5.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(means[z], scale), obs=y)


def switch(y):
    """One global assignment that every observation depends on."""
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    z = pyro.sample("z", dist.Bernoulli(p))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc[..., 0] + z * loc[..., 1], 1.0), obs=y)


def markov(y):
    """A hidden Markov model."""
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(3, 3)).to_event(1))
    means = pyro.sample("means", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    x = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        x = pyro.sample(f"x{t}", dist.Categorical(transition[x]))
        pyro.sample(f"y{t}", dist.Normal(means[x], 1.0), obs=y[t])


def nested(y):
    """Assignments in two plates, the inner one depending on the outer."""
    p = pyro.sample("p", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    with pyro.plate("groups", 2, dim=-2):
        a = pyro.sample("a", dist.Categorical(torch.tensor([0.3, 0.7])))
        with pyro.plate("data", 3, dim=-1):
            b = pyro.sample("b", dist.Categorical(Vindex(p)[a]))
            pyro.sample("y", dist.Normal(1.0 * b, 1.0), obs=y.reshape(2, 3))


MODELS = {"mixture": mixture, "switch": switch, "markov": markov, "nested": nested}


def start(model, vectorize="auto", **options):
    inference = ParticleInference(
        model,
        pyro.optim.Adam({"lr": 0.05}),
        PARTICLES,
        kernel=RBF(Weights()),
        vectorize=vectorize,
        seed=0,
        **options,
    )
    inference.setup(Y)
    return inference


def log_joint_by_pyro(inference, model, nesting):
    """What Pyro's NUTS evaluates, particle by particle."""
    latents = inference.prototype(Y).latents
    found = []
    for i in range(PARTICLES):
        values = {name: value[i] for name, value in inference._particles.items()}
        constrained = {name: latents[name].transform(value) for name, value in values.items()}
        log_det = sum(
            latents[name].transform.log_abs_det_jacobian(value, constrained[name]).sum()
            for name, value in values.items()
        )
        conditioned = poutine.condition(config_enumerate(model), constrained)
        enumerated = poutine.enum(conditioned, first_available_dim=-1 - nesting)
        trace = poutine.trace(enumerated).get_trace(Y)
        found.append(TraceEinsumEvaluator(trace, True, nesting).log_prob(trace) + log_det)
    return torch.stack(found)


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize(
    ("name", "nesting"), [("mixture", 1), ("switch", 1), ("markov", 0), ("nested", 2)]
)
def test_log_joint_is_what_nuts_evaluates(name, nesting, vectorize):
    inference = start(MODELS[name], vectorize)
    assert inference.prototype(Y).max_plate_nesting == nesting
    expected = log_joint_by_pyro(inference, MODELS[name], nesting)
    torch.testing.assert_close(inference.log_joint(Y), expected.detach(), rtol=1e-12, atol=1e-12)


def test_gradients_of_both_engines_agree():
    for model in MODELS.values():
        forces = [
            start(model, vectorize)._forces((Y,), {}, measure=True).gradients
            for vectorize in ("vmap", "loop")
        ]
        for name in forces[0]:
            torch.testing.assert_close(forces[0][name], forces[1][name], rtol=1e-9, atol=1e-10)


def test_mixture_is_a_typed_out_sum():
    inference = start(mixture)
    s = inference.get_samples()
    density = dist.Normal(s["means"][:, None], s["scale"][:, None, None]).log_prob(Y[:, None])
    expected = (density + s["weights"].log()[:, None]).logsumexp(-1).sum(-1)
    expected += dist.Dirichlet(torch.ones(2)).log_prob(s["weights"])
    expected += dist.Normal(0.0, 5.0).log_prob(s["means"]).sum(-1)
    expected += dist.LogNormal(0.0, 1.0).log_prob(s["scale"])
    evaluation = inference._log_joint.evaluate(inference._particles, (Y,), {})
    torch.testing.assert_close(evaluation.log_density.detach(), expected)
    assert set(s) == {"weights", "means", "scale"}


def test_subsampling_scales_outside_the_sum():
    """A plate's scale multiplies the log of the sum, not the terms in it."""

    def subsampled(y):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("data", len(y), subsample_size=4) as index:
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(4.0 * z - 2.0, 1.0), obs=y[index])

    log_joint = LogJoint(subsampled)
    logits = torch.tensor([[-1.0], [0.5]])
    latents = log_joint.prototype((Y,), {}).latents
    evaluation = log_joint.evaluate(unravel(logits, {"weights": logits}), (Y,), {})
    weights = log_joint.constrain({"weights": logits}, latents)["weights"]
    y = Y[evaluation.subsamples["data"].indices]
    density = dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).log_prob(y[:, None])
    expected = 1.5 * (density + weights.log()[:, None]).logsumexp(-1).sum(-1)
    expected += dist.Dirichlet(torch.ones(2)).log_prob(weights)
    torch.testing.assert_close(evaluation.log_density, expected)


def test_given_nesting_gives_the_same_number():
    expected = start(mixture).log_joint(Y)
    torch.testing.assert_close(start(mixture, max_plate_nesting=3).log_joint(Y), expected)


@pytest.mark.parametrize("transport", [WGD(), WGD("sge", whiten="full", calibrate=True), SVGD()])
def test_mixture_trains_and_finds_the_clusters(transport):
    y = torch.cat([Y - 10.0, Y + 10.0])
    inference = ParticleInference(
        mixture,
        pyro.optim.Adam({"lr": 0.1}),
        8,
        kernel=RBF(Weights()),
        transport=transport,
        init_loc_fn=lambda site: (
            pyro.infer.autoguide.init_to_sample(site)
            if site["name"] != "means"
            else torch.tensor([-8.0, 8.0]) + 0.5 * torch.randn(2)
        ),
        seed=1,
    )
    losses = inference.run(120, y, progress_bar=False)
    assert losses[-1] < losses[0]
    means = inference.get_samples()["means"].mean(0)
    # A cluster's mean has a posterior sd of about .7.
    torch.testing.assert_close(means, torch.tensor([-9.45, 10.55]), rtol=0, atol=1.0)


def test_single_observations_have_no_likelihood():
    inference = start(mixture)
    with pytest.raises(ModelError, match="are summed out"):
        inference.log_likelihood(Y)
    exported = to_arviz(inference, Y)
    assert not hasattr(exported, "log_likelihood")
    assert math.isclose(float(exported.sample_stats["lp"][0, 0]), inference.log_joint(Y)[0].item())


def test_predictions_are_drawn_not_conditioned_on_one_draw():
    def model(y=None):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Categorical(weights))
            return pyro.sample("y", dist.Normal(10.0 * z - 5.0, 1.0), obs=y)

    inference = ParticleInference(
        model, pyro.optim.Adam({"lr": 0.05}), PARTICLES, kernel=RBF(Weights()), seed=0
    )
    inference.setup(Y)
    predict = ParticlePredictive(inference)
    drawn = predict()
    assert set(drawn) == {"z", "y"}
    assert ((drawn["y"] > 0) == (drawn["z"] == 1)).all()
    for method in (predict.mean, predict.parameters, predict.entropy):
        with pytest.raises(ModelError, match="were summed out"):
            method()


def test_input_gradients_refuse_a_site_with_enumerated_dimensions():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(x @ w + 3 * z, 1.0), obs=y)

    inference = ParticleInference(
        model, pyro.optim.Adam({"lr": 0.1}), 3, kernel=RBF(InputGradients("x")), seed=0
    )
    with pytest.raises(ModelError, match="has 2 points, but the input has 6 rows"):
        inference.setup(torch.randn(6, 2), Y)
