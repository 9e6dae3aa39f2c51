"""Posterior predictive against loops by hand and Pyro's own Predictive."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import nn
from torch.distributions.transforms import SigmoidTransform
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

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
from tests.test_memory import Memory

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


def test_bad_arguments_are_refused_by_errors_of_ours():
    """What torch says of them is told, as an error that can be caught as any of ours."""
    inference, _, _ = fitted("hierarchy")
    predict = ParticlePredictive(inference)
    with pytest.raises(ModelError, match=r"\(5, 2\) tensor.*must match the size"):
        predict(NEW, GROUP[:3])
    with pytest.raises(ModelError, match="cannot be run with the arguments"):
        predict.mean("x", GROUP)
    for loader in (3, None):
        with pytest.raises(ArgumentError, match="loader must be an iterable of batches"):
            predict.predict(loader, progress_bar=False)
    for sites in (3, [3], [None]):
        with pytest.raises(ArgumentError, match="return_sites must be a list of names"):
            ParticlePredictive(inference, return_sites=sites)


RETURNED = {
    "number": (lambda y: 1.5, None),
    "tree": (lambda y: {"twice": 2 * y, "both": (y, 3)}, None),
    "nothing": (lambda y: None, "the model returns nothing"),
    "distribution": (lambda y: dist.Normal(y, 1.0), "the model returns Normal"),
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_the_model_returns(name):
    make, message = RETURNED[name]

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            return make(pyro.sample("y", dist.Normal(w * x, 1.0), obs=y))

    inference = ParticleInference(
        model, pyro.optim.Adam({"lr": 0.1}), 3, transport=Ensemble(), seed=0
    )
    inference.step(X[:, 0], X[:, 1])
    predict = ParticlePredictive(inference, ["y", "_RETURN"])
    if message is not None:
        with pytest.raises(ArgumentError, match=message):
            predict(X[:, 0])
        return
    found = predict(X[:, 0])
    expected = make(found["y"])
    if name == "number":
        assert found["_RETURN"].tolist() == [expected] * 3
    else:
        torch.testing.assert_close(found["_RETURN"]["twice"], expected["twice"])
        torch.testing.assert_close(found["_RETURN"]["both"][0], expected["both"][0])
        assert found["_RETURN"]["both"][1].tolist() == [3] * 3


def test_a_distribution_without_a_mean_is_named():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        fn = dist.TransformedDistribution(dist.Normal(w * x, 1.0), [SigmoidTransform()])
        with pyro.plate("data", len(x)):
            return pyro.sample("y", fn, obs=y)

    inference = ParticleInference(
        model, pyro.optim.Adam({"lr": 0.1}), 3, transport=Ensemble(), seed=0
    )
    inference.step(X[:, 0], X[:, 1].sigmoid())
    with pytest.raises(ModelError, match="no mean of the TransformedDistribution of site 'y'"):
        ParticlePredictive(inference).mean(X[:, 0])


# ---------------------------------------------------------------- beside pyro.infer.Predictive


def spelled_out(fn, y):
    """An observed site, and sites with its mean (or probabilities) and log density."""
    pyro.deterministic("expected", probabilities_or_mean(fn), event_dim=0)
    if y is not None:
        pyro.deterministic("density", fn.log_prob(y), event_dim=0)
    with pyro.plate("data", fn.batch_shape[0]):
        return pyro.sample("y", fn, obs=y)


def spelled_regression(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    return spelled_out(dist.Normal(x @ w, scale), y)


def spelled_hierarchy(x, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", 3):
        effect = pyro.sample("effect", dist.Normal(mu, tau))
    return spelled_out(dist.Poisson((effect[torch.arange(len(x)) % 3] * x[:, 0]).exp()), y)


class SpelledClassifier(Classifier):
    def forward(self, x, y=None):
        return spelled_out(dist.Categorical(logits=self.net(x)), y)


def spelled_classifier():
    layers = nn.Linear(2, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 3)
    return SpelledClassifier(bayesianize(nn.Sequential(*layers)))


SPELLED = {
    "regression": (lambda: spelled_regression, X.sum(1), NEW.sum(1)),
    "classification": (spelled_classifier, LABELS, LABELS[:5]),
    "hierarchy": (lambda: spelled_hierarchy, X[:, 1].abs().round(), NEW[:, 1].abs().round()),
}


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("name", SPELLED)
def test_means_and_densities_are_those_of_pyros_predictive(name, vectorize):
    """The three ways to one number: ours, Pyro's Predictive and its handlers in a loop."""
    make, y, new_y = SPELLED[name]
    inference = ParticleInference(
        make(),
        pyro.optim.Adam({"lr": 0.05}),
        PARTICLES,
        kernel=RBF(Weights()),
        vectorize=vectorize,
        seed=0,
    )
    inference.run(5, X, y, progress_bar=False)
    predict = ParticlePredictive(inference)
    if isinstance(inference.model, nn.Module):
        inference.model.eval()  # Pyro's Predictive leaves that to the user
    theirs = Predictive(inference.model, posterior_samples=inference.get_samples())(NEW, new_y)
    fns = by_hand(inference, (NEW,))
    expected = torch.stack([probabilities_or_mean(fn) for fn in fns])
    density = torch.stack([fn.log_prob(new_y) for fn in fns])
    close = {"rtol": 1e-10, "atol": 1e-10}
    # Pyro gives sites outside of plates a dimension for each plate.
    torch.testing.assert_close(theirs["expected"].reshape(expected.shape), expected, **close)
    torch.testing.assert_close(theirs["density"].reshape(density.shape), density, **close)
    torch.testing.assert_close(predict.mean(NEW)["y"], expected.mean(0), **close)
    torch.testing.assert_close(predict.log_prob(NEW, new_y)["y"], density, **close)
    ours = predict(NEW, new_y)
    for site in ("expected", "density", "y"):
        torch.testing.assert_close(
            ours[site], theirs[site].reshape(ours[site].shape).to(ours[site].dtype), **close
        )


# ---------------------------------------------------------------- chunks, files, memory


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_independent_of_chunks(name):
    inference, new, _ = fitted(name)
    methods = ["__call__", "parameters", "mean"] + ["entropy"] * (name != "regression")
    for method in methods:
        found = []
        for chunk_size in (None, 1, 3, PARTICLES):
            pyro.set_rng_seed(7)
            predict = ParticlePredictive(inference, chunk_size=chunk_size)
            found.append(tree_leaves(getattr(predict, method)(*new)))
        for other in found[1:]:
            for one, two in zip(found[0], other, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_draws_are_identical_after_loading(name, tmp_path):
    inference, new, _ = fitted(name)
    inference.save(tmp_path / "state.pt")
    model = classifier() if name == "classifier" else inference.model
    fresh = ParticleInference.load(
        tmp_path / "state.pt", model, pyro.optim.Adam({"lr": 0.1}), kernel=RBF(Weights())
    )
    draws = []
    for one in (inference, fresh):
        pyro.set_rng_seed(3)
        draws.append(ParticlePredictive(one)(*new))
    assert set(draws[0]) == set(draws[1])
    for site, values in draws[0].items():
        assert (values == draws[1][site]).all()


class Residual(nn.Module):
    """A residual block with BatchNorm."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


def residual_network():
    blocks = [Residual(8) for _ in range(4)]
    return nn.Sequential(nn.Conv2d(1, 8, 1), *blocks, nn.Flatten(), nn.Linear(8 * 36, 3))


def activations(network, x):
    """Numbers that all layers of one network put out for a batch."""
    sizes = []
    hooks = [
        layer.register_forward_hook(lambda _, given, output: sizes.append(output.numel()))
        for layer in network.modules()
        if not list(layer.children()) or isinstance(layer, Residual)
    ]
    with torch.no_grad():
        network.eval()(x)
    for hook in hooks:
        hook.remove()
    return sum(sizes)


@pytest.mark.parametrize(
    ("vectorize", "chunk_size", "networks"),
    [("loop", None, 1), ("vmap", 1, 1), ("vmap", 2, 2), ("vmap", None, PARTICLES)],
)
def test_predicting_a_data_set_holds_two_batches_of_activations(vectorize, chunk_size, networks):
    """However many batches there are: of one network in a loop, of a chunk of them under vmap."""
    images = torch.randn(64 * 12, 1, 6, 6)
    inference = ParticleInference(
        Classifier(bayesianize(residual_network())),
        pyro.optim.Adam({"lr": 1e-3}),
        PARTICLES,
        transport=Ensemble(),
        vectorize=vectorize,
        seed=0,
    )
    inference.step(images[:6], torch.arange(6) % 3)
    batch = activations(inference.module(0), images[:64])
    weights = sum(value.numel() for value in inference.get_samples().values())
    predict = ParticlePredictive(inference, chunk_size=chunk_size)
    peaks = {}
    for batches in (4, 12):
        loader = DataLoader(TensorDataset(images[: 64 * batches]), batch_size=64)
        with Memory() as memory:
            found = predict.predict(loader, progress_bar=False)["y"]
        assert found.shape == (64 * batches, 3)
        peaks[batches] = memory.peak
    outputs = 64 * 12 * 3
    assert weights + 2 * outputs < batch  # what may be held beside activations is small
    assert peaks[12] <= 2 * networks * batch
    assert peaks[12] - peaks[4] <= 2 * outputs
