"""Input gradients by a submodule's output, and at a random part of the batch."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_fordes import (
    RBF,
    ArgumentError,
    Ensemble,
    Fixed,
    InputGradients,
    ModelError,
    ParticleInference,
    bayesianize,
    pca_lengthscale,
)
from pyro_fordes.forces import draw_for, evaluate_in
from tests.models import Classifier
from tests.naive import unit

TOKENS = torch.tensor([[0, 3, 1], [2, 2, 4], [4, 0, 0], [1, 3, 3]])
LABELS = torch.tensor([0, 1, 1, 0])
X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 1, 0, 1, 0])


class Reader(nn.Module):
    """Token embeddings, a transformer, a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(4, 2)

    def after(self, embedded):
        return self.head(self.encoder(embedded).mean(1))

    def forward(self, tokens):
        return self.after(self.embed(tokens))


class Transfer(nn.Module):
    """A backbone that is frozen in the tests, and a head of two layers."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.backbone.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x):
        return self.head(self.backbone(x))


def head_only(name, _):
    return 1.0 if name.startswith("head") else None


MODELS = {
    "token embeddings": (
        lambda: Classifier(bayesianize(Reader().double())),
        (TOKENS, LABELS),
        "net.embed",
        lambda net, data: (net.embed(data), net.after),
    ),
    "backbone features": (
        lambda: Classifier(bayesianize(Transfer().double(), head_only)),
        (X, Y),
        "net.backbone",
        lambda net, data: (net.backbone(data), net.head),
    ),
}


def started(make, data, space, num_particles=3, **options):
    torch.manual_seed(0)
    options.setdefault("optim", pyro.optim.SGD({"lr": 0.1}))
    inference = ParticleInference(
        make(), options.pop("optim"), num_particles, kernel=RBF(space), seed=0, **options
    )
    inference.setup(*data)
    return inference


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_by_a_submodules_output(name, vectorize):
    """Against autograd on each particle's plain network; second derivatives by its weights too."""
    make, data, path, parts = MODELS[name]
    inference = started(make, data, InputGradients(path, output="net"), vectorize=vectorize)
    particles = inference._particles
    log_joint = inference._log_joint
    evaluation = evaluate_in(inference._space, log_joint, particles, inference._buffers, data, {})
    found = inference._space.represent(evaluation)
    weights = torch.randn(found.shape, dtype=found.dtype)
    sites = ["net.head.weight"] if name == "token embeddings" else ["net.head.0.weight"]
    by_weights = torch.autograd.grad((weights * found).sum(), [particles[s] for s in sites])
    for i in range(3):
        net = inference.module(i)
        activation, rest = parts(net, data[0])
        activation = activation.detach().requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            picked = rest(activation).gather(1, data[1][:, None])
        (gradient,) = torch.autograd.grad(picked.sum(), activation, create_graph=True)
        expected = unit(gradient.flatten(1))
        torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=1e-12)
        for site, gradient in zip(sites, by_weights, strict=True):
            parameter = net.get_parameter(site.removeprefix("net."))
            (wanted,) = torch.autograd.grad((weights[i] * expected).sum(), parameter)
            torch.testing.assert_close(gradient[i], wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_models_with_such_gradients_train(name):
    make, data, path, _ = MODELS[name]
    space = InputGradients(path, output="net")
    optim = pyro.optim.Adam({"lr": 0.02})
    inference = started(make, data, space, optim=optim, diagnostics_every=1)
    losses = inference.run(20, *data, progress_bar=False)
    assert losses[-1] < losses[0]
    assert (inference.diagnostics()["repulsive_force"] > 0).all()
    assert not any(m._forward_hooks for m in inference.model.modules())
    torch.testing.assert_close(
        inference.representation(*data, space=space), inference.representation(*data)
    )


def test_the_drive_is_that_of_the_model():
    """The perturbation is zero: losses and running statistics are those of an ensemble."""
    make, data, path, _ = MODELS["backbone features"]
    space = InputGradients(path, output="net")
    found = []
    for options in ({"transport": Ensemble()}, {"repulsion_scale": 0.0}):
        inference = started(make, data, space, **options)
        losses = inference.run(3, *data, progress_bar=False)
        found.append((losses, inference.get_samples(), inference._buffers))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)
    assert inference._buffers["net.backbone.1.num_batches_tracked"].tolist() == [3, 3, 3]


def test_lengthscales_of_activations():
    """Fitted to what the backbone puts out, of any number of batches."""
    make, data, path, _ = MODELS["backbone features"]
    backbone = make().net.backbone
    features = pca_lengthscale([backbone(X[:3]), backbone(X[3:])])
    inference = started(make, data, InputGradients(path, output="net", lengthscale=features))
    assert inference.representation(*data).shape == (3, 6, 5)
    wrong = InputGradients(path, output="net", lengthscale=pca_lengthscale(X))
    with pytest.raises(ArgumentError, match=r"fitted to 3 features.*'net.backbone' has 5 per"):
        started(make, data, wrong)


def test_an_argument_comes_before_a_submodule_of_its_name():
    class Same(Classifier):
        def forward(self, net, y=None):
            return super().forward(net, y)

    model = Same(bayesianize(nn.Linear(3, 2).double()))
    inference = started(lambda: model, (X, Y), InputGradients("net", output="net"))
    assert inference.representation(X, Y).shape == (3, 6, 3)


class Odd(PyroModule):
    """Submodules that cannot be differentiated by."""

    def __init__(self):
        super().__init__()
        self.net = bayesianize(nn.Linear(3, 2).double())
        self.twice, self.pair, self.unused = nn.Identity(), nn.LSTM(3, 3).double(), nn.Identity()
        self.single = nn.Linear(2, 1).double()

    def forward(self, x, y=None):
        x = self.twice(self.twice(self.pair(x)[0]))
        logits = self.net(x)
        self.single(logits)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


@pytest.mark.parametrize(
    ("path", "error", "pattern"),
    [
        ("nett", ArgumentError, r"no argument 'nett'.*nor is it the path of a submodule \(net, "),
        ("twice", ModelError, "'twice' is called 2 times"),
        ("unused", ModelError, "'unused' is called 0 times"),
        ("pair", ModelError, "'pair' puts out tuple"),
        ("single", ArgumentError, "submodule 'single' has a single feature"),
    ],
)
def test_paths_that_do_not_fit(path, error, pattern):
    with pytest.raises(error, match=pattern):
        started(Odd, (X, Y), InputGradients(path, output="net"))


def test_an_output_below_the_input_has_no_gradient():
    make, data, _, _ = MODELS["backbone features"]
    with pytest.raises(ModelError, match=r"does not depend on the input 'net\.head'"):
        started(make, data, InputGradients("net.head", output="net.backbone"))


def test_tokens_ask_for_a_submodule():
    make, data, _, _ = MODELS["token embeddings"]
    with pytest.raises(ArgumentError, match=r"torch.int64.*a submodule \(that embeds it\)"):
        started(make, data, InputGradients(output="net"))


# ---------------------------------------------------------------- some points of a batch


def mlp():
    return Classifier(
        bayesianize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    )


INPUTS = {"argument": "x", "submodule": "net.0"}


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("input", INPUTS)
@pytest.mark.parametrize("points", [4, 0.5, 1, 0.01])
def test_some_points_are_rows_of_all(points, input, vectorize):
    """The same rows for all particles; others in the next step."""
    whole = InputGradients(INPUTS[input], output="net")
    some = InputGradients(INPUTS[input], output="net", points=points)
    inference = started(mlp, (X, Y), some, vectorize=vectorize)
    everything = inference.representation(X, Y, space=whole)
    seen = set()
    for _ in range(8):
        draw = draw_for(inference._space, inference._log_joint, (X, Y), {})
        assert len(draw.rows) == {4: 4, 0.5: 3, 1: 1, 0.01: 1}[points]
        assert (draw.rows.diff() > 0).all()
        evaluation = evaluate_in(
            inference._space, inference._log_joint, inference._particles, {}, (X, Y), {}, draw=draw
        )
        found = inference._space.represent(evaluation)
        torch.testing.assert_close(found, everything[:, draw.rows], rtol=1e-10, atol=1e-12)
        seen.add(tuple(draw.rows.tolist()))
        torch.testing.assert_close(
            evaluation.log_joint, inference.log_joint(X, Y), rtol=1e-12, atol=0
        )
    assert len(seen) > 1


@pytest.mark.parametrize("points", [6, 7, 1.0])
def test_as_many_points_as_there_are_cost_no_run_of_their_own(points):
    found = []
    for space in (
        InputGradients("x", output="net", points=points),
        InputGradients("x", output="net"),
    ):
        inference = started(mlp, (X, Y), space)
        assert draw_for(inference._space, inference._log_joint, (X, Y), {}).rows is None
        found.append((inference.run(3, X, Y, progress_bar=False), inference.get_samples()))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_the_average_force_is_that_of_all_points():
    """Kernel: exactly. Force: up to the curvature of the logarithm of a mean, as in minibatches."""
    inference = started(mlp, (X, Y), InputGradients("x", output="net", points=3), num_particles=4)
    kernel, space = RBF(inference._space, Fixed(1.0)), inference._space
    transport = inference.transport
    log_joint, particles = inference._log_joint, inference._particles
    leaves = list(particles.values())

    def force(rows):
        draw = draw_for(space, log_joint, (X, Y), {})
        evaluation = evaluate_in(
            space, log_joint, particles, {}, (X, Y), {}, draw=type(draw)({}, 0, None, rows)
        )
        r = space.represent(evaluation)
        repulsion = transport.repel(kernel, r.detach(), slice(None), 0)
        gradients = torch.autograd.grad(
            (repulsion.velocity * r).sum(), leaves, materialize_grads=True
        )
        return repulsion.kernel.mean, torch.cat([g.flatten(1) for g in gradients], 1)

    subsets = [torch.tensor(rows) for rows in itertools.combinations(range(6), 3)]
    parts = [force(rows) for rows in subsets]
    mean_kernel, mean_force = (torch.stack(part).mean(0) for part in zip(*parts, strict=True))
    whole_kernel, whole_force = force(None)
    torch.testing.assert_close(mean_kernel, whole_kernel, rtol=1e-12, atol=0)
    error = (mean_force - whole_force).norm() / whole_force.norm()
    spread = torch.stack([part[1] for part in parts]).sub(whole_force).flatten(1).norm(dim=1).mean()
    assert error < 0.05
    assert spread / whole_force.norm() > 4 * error


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.norm, self.out = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.out(self.drop(torch.tanh(self.norm(self.lin(x)))))


@pytest.mark.parametrize("options", [{}, {"vectorize": "loop"}, {"chunk_size": 2}], ids=str)
def test_running_statistics_and_dropout_of_the_drive_are_those_of_the_batch(options):
    """With no repulsion, the run on some points leaves no trace: an ensemble's numbers."""

    def make():
        return Classifier(bayesianize(Normalised().double()), num_data=20)

    def run(points, **options):
        space = InputGradients("x", output="net", points=points)
        inference = started(make, (X, Y), space, **options)
        losses = inference.run(3, X, Y, progress_bar=False)
        return losses, inference._buffers

    found = run(3, repulsion_scale=0.0, **options)
    assert found[1]["net.norm.num_batches_tracked"].tolist() == [3, 3, 3]
    torch.testing.assert_close(found, run(None, transport=Ensemble()), rtol=1e-10, atol=1e-12)


def plates(size_of_plate, draws):
    def model(x, y=None):
        weight = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
        size = size_of_plate or len(x)
        with pyro.plate("data", size, subsample_size=draws or len(x)) as rows:
            x, y = (x[rows], y[rows]) if draws else (x, y)
            mean = torch.tanh(x) @ weight
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return model


def test_plates_of_the_batch_shrink_with_it():
    space = InputGradients("x", points=2)
    y = X.sum(1)
    inference = started(lambda: plates(60, None), (X, y), space)
    everything = inference.representation(X, y, space=InputGradients("x"))
    draw = draw_for(inference._space, inference._log_joint, (X, y), {})
    values = inference._particles
    found = evaluate_in(inference._space, inference._log_joint, values, {}, (X, y), {}, draw=draw)
    torch.testing.assert_close(inference._space.represent(found), everything[:, draw.rows])


def test_plates_that_do_not_shrink_are_an_error():
    """The model is on the full data, of which its plate draws a minibatch."""
    y = X.sum(1)
    with pytest.raises(ArgumentError, match="plate 'data' draws 4 of 5; give the plate"):
        started(lambda: plates(None, 4), (X, y), InputGradients("x", points=5))
    with pytest.raises(ArgumentError, match="on 2 of the 6 rows of its arguments, which failed"):
        started(lambda: plates(6, 4), (X, y), InputGradients("x", points=2))


@pytest.mark.parametrize("points", [0, -1, 1.5, 0.0, True, "3", float("nan")])
def test_numbers_of_points_are_checked(points):
    with pytest.raises(ArgumentError, match=r"points=...\) must be a number of points"):
        InputGradients("x", points=points)
