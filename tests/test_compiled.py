"""compile=True: the graph of a step gives the numbers of the step, and nothing is frozen in it.

Tracing is tested for all spaces and transports with the graph run as it is; Inductor, which takes
a while, for two networks.
"""

import warnings

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyro_fordes import (
    RBF,
    SVGD,
    ArgumentError,
    Fixed,
    InputGradients,
    Linear,
    Median,
    ParticleInference,
    Weights,
    bayesianize,
)
from tests.models import Classifier
from tests.test_contracts import SPACES, TRANSPORTS, Model, X, Y
from tests.test_engines import CASES, assert_same, trained, works


@pytest.fixture
def traced(monkeypatch):
    """Leave out Inductor, and count the graphs."""
    graphs = []

    def keep(graph, **options):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", keep)
    return graphs


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("case", CASES)
def test_compiled_by_inductor(case):
    """Losses, particles, BatchNorm's buffers, dropout and the random stream."""
    found = trained(case, "FoRDE", vectorize="vmap", compile=True)
    assert [graph is not None for graph in found[0]._compiled._graphs.values()] == [True]
    assert_same(found, trained(case, "FoRDE", vectorize="loop"))


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("rule", ["FoRDE", "f-SVGD", "weights", "Ensemble"])
@pytest.mark.parametrize("case", CASES)
def test_traced_networks(case, rule, vectorize, traced):
    found = trained(case, rule, vectorize=vectorize, compile=True)
    assert_same(found, trained(case, rule, vectorize="loop"))
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("name", "transport"),
    [(n, t) for n in SPACES for t in TRANSPORTS if works(TRANSPORTS[t], SPACES[n])],
)
def test_traced_rules(name, transport, traced):
    def run(**options):
        inference = ParticleInference(
            Model(),
            pyro.optim.SGD({"lr": 0.02}),
            5,
            kernel=RBF(SPACES[name]),
            transport=TRANSPORTS[transport],
            seed=0,
            diagnostics_every=100,
            **options,
        )
        losses = inference.run(4, X, Y, progress_bar=False)
        return losses, inference.get_samples()

    torch.testing.assert_close(run(compile=True), run(), rtol=1e-9, atol=1e-11)
    assert len(traced) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": lambda step: 1.0 + step},
        {"repulsion_scale": Linear(0.0, 5.0, num_steps=4)},
        {"kernel": RBF(Weights(), Median(factor=lambda step: 0.5 + step))},
        {"kernel": RBF(Weights(group="site"), Fixed(lambda step: 0.1 + step))},
        {"repulsion_every": 2},
    ],
    ids=["temperature", "repulsion scale", "bandwidth", "fixed", "every second"],
)
def test_nothing_that_follows_the_step_is_frozen(options, traced):
    def run(**more):
        given = {"kernel": RBF(InputGradients("x", output="logits")), **options}
        optim = pyro.optim.SGD({"lr": 0.05})
        inference = ParticleInference(Model(), optim, 4, seed=0, **given, **more)
        losses = inference.run(5, X, Y, progress_bar=False)
        return losses, inference.get_samples()

    torch.testing.assert_close(run(compile=True), run(), rtol=1e-9, atol=1e-11)
    assert len(traced) == (2 if "repulsion_every" in options else 1)


def test_minibatches_dropout_and_trained_parameters_are_not_frozen(traced):
    """Indices that a plate draws, a dropout mask, and a parameter that all particles share."""

    def model(x, y):
        offset = pyro.param("offset", torch.tensor(0.5, dtype=x.dtype))
        slope = pyro.sample("slope", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            mean = F.dropout(x[rows], 0.5) @ slope + offset
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[rows])

    def run(**options):
        pyro.clear_param_store()
        optim = pyro.optim.SGD({"lr": 0.01})
        inference = ParticleInference(
            model, optim, 4, kernel=RBF(Weights()), seed=0, diagnostics_every=100, **options
        )
        losses = inference.run(6, X, X.sum(1), progress_bar=False)
        return losses, inference.get_samples(), pyro.param("offset").detach().clone()

    found = run(compile=True)
    torch.testing.assert_close(found, run(), rtol=1e-9, atol=1e-11)
    assert len(traced) == 1
    assert found[2] != 0.5


def test_another_shape_is_traced_again_and_said_once(traced):
    inference = ParticleInference(Model(), pyro.optim.SGD({"lr": 0.1}), 3, compile=True, seed=0)
    other = ParticleInference(Model(), pyro.optim.SGD({"lr": 0.1}), 3, seed=0)
    sizes = [6, 6, 4, 6, 4, 5]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = [inference.step(X[:size], Y[:size]) for size in sizes]
    assert losses == pytest.approx([other.step(X[:size], Y[:size]) for size in sizes], rel=1e-9)
    assert len(traced) == 3
    assert [str(w.message).split(",")[0] for w in caught] == [
        "compile=True compiles the step again for arguments of another shape or value"
    ]


def scaled(y, scale):
    z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    pyro.sample("y", dist.Normal(z, float(scale)).expand([3]).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("scales", "said", "graphs"),
    [
        ([1.0, 2.0, 1.0], ["compiles the step again"], 2),
        ([1.0 + i for i in range(20)], ["compiles the step again", "16 kinds"], 16),
        ([numpy.array(1.0), numpy.array(2.0)], ["nor hashable"], 0),
    ],
    ids=["two", "many", "array"],
)
def test_what_is_said_of_arguments_that_change(scales, said, graphs, traced):
    def run(**options):
        optim = pyro.optim.SGD({"lr": 0.1})
        rule = {"kernel": RBF(Weights()), "seed": 0, "diagnostics_every": 100}
        inference = ParticleInference(scaled, optim, 4, **rule, **options)
        return [inference.step(torch.tensor([0.3, 1.0, 2.0]), scale) for scale in scales]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(compile=True)
    assert found == pytest.approx(run(), rel=1e-5)
    assert len(caught) == len(said)
    for warning, text in zip(caught, said, strict=True):
        assert text in str(warning.message)
    assert len(traced) == graphs


def test_arguments_that_are_no_tensors_are_not_frozen(traced):
    def model(y, scale, wide=False):
        z = pyro.sample("z", dist.Normal(0.0, 2.0 if wide else 1.0))
        pyro.sample("y", dist.Normal(z, scale).expand([3]).to_event(1), obs=y)

    def run(**options):
        optim = pyro.optim.SGD({"lr": 0.1})
        rule = {"kernel": RBF(Weights()), "seed": 0, "diagnostics_every": 100}
        inference = ParticleInference(model, optim, 4, **rule, **options)
        calls = [(1.0, False), (2.0, False), (2.0, True), (1.0, False)]
        y = torch.tensor([0.3, 1.0, 2.0])
        return [inference.step(y, scale, wide=wide) for scale, wide in calls]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(compile=True) == pytest.approx(run(), rel=1e-6)
    assert len(traced) == 3


def test_modes_of_modules_are_not_frozen(traced):
    model = Classifier(bayesianize(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()))
    options = {"transport": SVGD(), "kernel": RBF(Weights()), "seed": 0, "diagnostics_every": 100}
    a = ParticleInference(model, pyro.optim.SGD({"lr": 0.1}), 3, compile=True, **options)
    b = ParticleInference(model, pyro.optim.SGD({"lr": 0.1}), 3, **options)
    for mode in (True, False, True):
        model.train(mode)
        assert a.step(X, Y) == pytest.approx(b.step(X, Y), rel=1e-9)
    assert len(traced) == 2
    torch.testing.assert_close(a._buffers, b._buffers)


class Annealed:
    """A bandwidth rule that computes with the step itself."""

    def __call__(self, distances, step, features):
        return distances.new_full((len(distances), 1, 1), 1.0 / (1 + step))


def branching(y):
    z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    pyro.sample("y", dist.Normal(z if y.sum() > 0 else -z, 1.0).expand([3]).to_event(1), obs=y)


def test_what_cannot_be_traced_runs_as_it_is(traced):
    def run(**options):
        optim = pyro.optim.SGD({"lr": 0.1})
        inference = ParticleInference(
            branching, optim, 4, kernel=RBF(Weights()), seed=0, diagnostics_every=100, **options
        )
        y = torch.tensor([0.3, 1.0, 2.0])
        return [inference.step(sign * y) for sign in (1, -1, 1)]

    with pytest.warns(UserWarning, match="could not be compiled and runs as it is") as caught:
        found = run(compile=True)
    assert len(caught) == 1
    assert found == run()


def test_a_step_that_is_used_as_a_number_is_not_compiled(traced):
    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=y)

    def run(**options):
        kernel = RBF(Weights(), Annealed())
        optim = pyro.optim.SGD({"lr": 0.1})
        inference = ParticleInference(model, optim, 4, kernel=kernel, seed=0, **options)
        return inference.run(4, torch.tensor([0.3, 1.0, 2.0]), progress_bar=False)

    with pytest.warns(UserWarning, match="a number that depends on the step"):
        found = run(compile=True)
    assert torch.equal(found, run())


def test_resumed_runs_are_the_same(traced, tmp_path):
    """The state knows nothing of graphs: a new one is made."""

    def start():
        model = Classifier(bayesianize(CASES["dropout"][0]()))
        optim = pyro.optim.Adam({"lr": 0.02})
        kernel = RBF(InputGradients("x", output="logits"))
        return ParticleInference(model, optim, 3, kernel=kernel, seed=0, compile=True)

    whole = start()
    losses = whole.run(6, X, Y, progress_bar=False)
    first = start()
    first.run(3, X, Y, progress_bar=False)
    first.save(tmp_path / "state.pt")
    second = start()
    second.load(tmp_path / "state.pt")
    assert torch.equal(second.run(3, X, Y, progress_bar=False), losses[3:])
    for name, value in whole.get_samples().items():
        assert torch.equal(second.get_samples()[name], value)


def test_options_that_do_not_go_together():
    for options in ({"chunk_size": 2}, {"compile": 1}):
        with pytest.raises(ArgumentError, match="compile"):
            ParticleInference(
                Model(), pyro.optim.SGD({"lr": 1.0}), 2, **{"compile": True} | options
            )
