"""Posterior predictive against loops by hand and Pyro's own Predictive."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import nn

from pyro_fordes import (
    RBF,
    ArgumentError,
    Ensemble,
    ModelError,
    ParticleInference,
    ParticlePredictive,
    Weights,
    bayesianize,
)
from tests.models import Classifier

PARTICLES = 4
X = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NEW = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
GROUP = torch.tensor([0, 1, 2, 0, 1])
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0])


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    mean = pyro.deterministic("mean", x @ w)
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(mean, scale), obs=y)


def hierarchy(x, group, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", 3):
        effect = pyro.sample("effect", dist.Normal(mu, tau))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Bernoulli(logits=effect[group] * x[:, 0]), obs=y)


def classifier():
    net = nn.Sequential(
        nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 3)
    )
    return Classifier(bayesianize(net))


def fitted(name, **options):
    """A few steps, and arguments for prediction with and without observations."""
    model, train, new, y = {
        "regression": (regression, (X, X.sum(1)), (NEW,), NEW.sum(1)),
        "classifier": (classifier(), (X, LABELS), (NEW,), LABELS[:5]),
        "hierarchy": (
            hierarchy,
            (NEW, GROUP, (NEW[:, 1] > 0).double()),
            (NEW, GROUP),
            (NEW[:, 1] > 0).double(),
        ),
    }[name]
    inference = ParticleInference(
        model, pyro.optim.Adam({"lr": 0.05}), PARTICLES, kernel=RBF(Weights()), seed=0, **options
    )
    inference.run(5, *train, progress_bar=False)
    return inference, new, y


NAMES = ["regression", "classifier", "hierarchy"]


def by_hand(inference, new, y=None):
    """The observed site's distribution for each particle, by Pyro's handlers in a loop."""
    module = inference._log_joint.module
    samples, found = inference.get_samples(), []
    for i in range(PARTICLES):
        data = {name: value[i] for name, value in samples.items()}
        buffers = {f"model.{name}": b[i].clone() for name, b in inference._buffers.items()}
        if module is not None:
            module.eval()

        def run(data=data):
            return poutine.trace(poutine.condition(inference.model, data)).get_trace(*new, y)

        wrapped = inference._log_joint._wrapped
        trace = run() if not buffers else torch.func.functional_call(wrapped, buffers, (run,))
        if module is not None:
            module.train()
        found.append(trace.nodes["y"]["fn"])
    return found


def probabilities_or_mean(fn):
    return fn.probs if isinstance(fn, dist.Categorical) else fn.mean


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_means_and_densities_are_those_of_a_loop(name, chunk_size, vectorize):
    inference, new, y = fitted(name, vectorize=vectorize)
    buffers = {key: value.clone() for key, value in inference._buffers.items()}
    predict = ParticlePredictive(inference, chunk_size=chunk_size)
    fns = by_hand(inference, new)
    expected = torch.stack([probabilities_or_mean(fn) for fn in fns]).mean(0)
    torch.testing.assert_close(predict.mean(*new)["y"], expected, rtol=1e-10, atol=1e-12)
    expected = torch.stack([fn.log_prob(y) for fn in fns])
    torch.testing.assert_close(predict.log_prob(*new, y)["y"], expected, rtol=1e-10, atol=1e-12)
    # With observations given, the predictive is the same.
    torch.testing.assert_close(predict.mean(*new, y)["y"], predict.mean(*new)["y"])
    for key, value in buffers.items():
        assert (inference._buffers[key] == value).all()


def test_the_module_is_in_its_own_mode_again():
    inference, new, _ = fitted("classifier")
    module = inference.model
    module.net[1].eval()
    before = {path: one.training for path, one in module.named_modules()}
    statistics = module.net[1].running_mean.clone()
    ParticlePredictive(inference).mean(*new)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ParticlePredictive(inference).mean(NEW[:, :1])
    assert {path: one.training for path, one in module.named_modules()} == before
    assert (module.net[1].running_mean == statistics).all()


@pytest.mark.parametrize("name", ["regression", "hierarchy"])
def test_same_numbers_as_pyros_predictive(name):
    inference, new, _ = fitted(name)
    ours = ParticlePredictive(inference)(*new)
    theirs = Predictive(inference.model, posterior_samples=inference.get_samples())(*new)
    assert set(ours) == set(theirs)
    assert ours["y"].shape == theirs["y"].shape
    if name == "regression":
        # Pyro gives sites outside of plates a dimension for each plate.
        theirs = theirs["mean"].reshape(ours["mean"].shape)
        torch.testing.assert_close(ours["mean"], theirs, rtol=1e-10, atol=1e-12)


def test_draws_follow_the_distributions():
    """4,000 copies of a row: means within 5 standard errors (false alarm below 1e-5 for 4)."""
    inference, _, _ = fitted("regression")
    x = NEW[:1].expand(4000, 2)
    draws = ParticlePredictive(inference)(x)["y"]
    fns = by_hand(inference, (x,))
    for drawn, fn in zip(draws, fns, strict=True):
        assert abs(drawn.mean() - fn.mean[0]) < 5 * fn.stddev[0] / 4000**0.5
        assert abs(drawn.std() / fn.stddev[0] - 1) < 5 / 8000**0.5
    assert draws.unique().numel() == draws.numel()  # particles draw for themselves


def test_sites_can_be_chosen():
    inference, new, _ = fitted("regression")
    chosen = ParticlePredictive(inference, return_sites=["mean", "_RETURN", "w"])(*new)
    assert list(chosen) == ["mean", "_RETURN", "w"]
    torch.testing.assert_close(chosen["w"], inference.get_samples()["w"])
    torch.testing.assert_close(chosen["mean"], chosen["w"] @ NEW.T)
    with pytest.raises(ArgumentError, match=r"return_sites names .'nothing'.*'mean', 'y'"):
        ParticlePredictive(inference, return_sites=["nothing"])(*new)


def test_parameters_are_the_distributions_own():
    inference, new, _ = fitted("regression")
    found = ParticlePredictive(inference).parameters(*new)["y"]
    s = inference.get_samples()
    torch.testing.assert_close(found["loc"], s["w"] @ NEW.T)
    torch.testing.assert_close(found["scale"], s["scale"][:, None].expand(4, 5))


@pytest.mark.parametrize("name", ["classifier", "hierarchy"])
def test_entropy_is_split(name):
    inference, new, _ = fitted(name)
    found = ParticlePredictive(inference).entropy(*new)["y"]
    fns = by_hand(inference, new)
    if name == "hierarchy":
        p = torch.stack([torch.stack([1 - fn.probs, fn.probs], -1) for fn in fns])
    else:
        p = torch.stack([fn.probs for fn in fns])
    torch.testing.assert_close(found["total"], -(p.mean(0) * p.mean(0).log()).sum(-1))
    torch.testing.assert_close(found["aleatoric"], -(p * p.log()).sum(-1).mean(0))
    torch.testing.assert_close(found["epistemic"], found["total"] - found["aleatoric"])
    assert (found["epistemic"] > 0).all()
    inference, new, _ = fitted("regression")
    with pytest.raises(ModelError, match="the model observes none"):
        ParticlePredictive(inference).entropy(*new)


def test_a_loader_gives_the_means_of_all_rows():
    inference, _, _ = fitted("classifier")
    predict = ParticlePredictive(inference)
    batches = [(X[:3], LABELS[:3]), {"x": X[3:6]}, X[6:]]
    found = predict.predict(batches, progress_bar=False)["y"]
    torch.testing.assert_close(found, predict.mean(X)["y"])
    with pytest.raises(ArgumentError, match="gave no batch"):
        predict.predict([], progress_bar=False)


@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_there_right_after_loading(name, tmp_path):
    inference, new, y = fitted(name)
    inference.save(tmp_path / "state.pt")
    model = classifier() if name == "classifier" else inference.model
    fresh = ParticleInference.load(
        tmp_path / "state.pt", model, pyro.optim.Adam({"lr": 0.1}), kernel=RBF(Weights())
    )
    for method, args in {"mean": new, "log_prob": (*new, y)}.items():
        expected = getattr(ParticlePredictive(inference), method)(*args)["y"]
        found = getattr(ParticlePredictive(fresh), method)(*args)["y"]
        assert (found == expected).all()


def test_a_wrong_call_says_so():
    inference, new, _ = fitted("regression")
    predict = ParticlePredictive(inference)
    with pytest.raises(ArgumentError, match="log_prob needs the observations"):
        predict.log_prob(*new)
    with pytest.raises(ArgumentError, match="the model takes"):
        predict()
    with pytest.raises(ArgumentError, match="needs a ParticleInference, got str"):
        ParticlePredictive("inference")
    with pytest.raises(ArgumentError, match=r"write .'y'."):
        ParticlePredictive(inference, return_sites="y")
    with pytest.raises(ArgumentError, match="chunk_size"):
        ParticlePredictive(inference, chunk_size=0)
    alone = ParticleInference(regression, pyro.optim.Adam({"lr": 0.1}), 3, transport=Ensemble())
    with pytest.raises(RuntimeError, match="no particles yet"):
        ParticlePredictive(alone)(*new)
