"""Successive halving: closed forms, exact continuation, independence of order, failures."""

import gc
import math
import random
import weakref

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, strategies as st
from pyro.infer.autoguide.initialization import init_to_value
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_fordes import (
    RBF,
    ArgumentError,
    Ensemble,
    InputGradients,
    NumericalError,
    ParticleInference,
    Weights,
    bayesianize,
    evaluate,
    init_to_modules,
    tune,
)
from pyro_fordes.tables import Table
from pyro_fordes.tuning import Tuning, rungs
from tests.models import Classifier

DOUBLE = torch.float64
Y = torch.tensor([1.0, 2.0, 4.0], dtype=DOUBLE)
HELD_OUT = torch.tensor([0.5, 2.5], dtype=DOUBLE)
QUIET = {"progress_bar": False}


# ---------------------------------------------------------------- rungs


@given(
    n=st.integers(1, 200),
    epochs=st.integers(1, 500),
    minimum=st.integers(1, 500),
    reduction=st.integers(2, 6),
)
def test_rungs_are_those_of_the_formula(n, epochs, minimum, reduction):
    found = rungs(n, epochs, min(minimum, epochs), reduction)
    for k, (candidates, reached) in enumerate(found):
        assert candidates == max(1, n // reduction**k)
        if k < len(found) - 1:
            assert reached == min(minimum, epochs) * reduction**k < epochs
            assert candidates > 1
    assert found[-1].epochs == epochs
    assert found[-1].candidates == 1 or minimum * reduction ** (len(found) - 1) >= epochs


@given(n=st.integers(1, 200), epochs=st.integers(1, 500), reduction=st.integers(2, 6))
def test_rungs_choose_as_late_as_they_can(n, epochs, reduction):
    found = rungs(n, epochs, None, reduction)
    halvings = max(k for k in range(9) if reduction**k <= n)
    assert len(found) <= halvings + 1
    assert found[0].candidates == n
    first = math.ceil(epochs / reduction**halvings)
    assert found[0].epochs == (epochs if n == 1 else first)
    # A later start would leave the candidates fewer rungs than it takes to part them.
    if len(found) == halvings + 1 and n > 1:
        assert found[-1].candidates < reduction


# ---------------------------------------------------------------- a model with closed forms


def conjugate(prior):
    """A mean with a Normal prior, and observations of unit variance."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), prior))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return model


def descent(lr, prior=1.0):
    """One particle that starts at 0 and follows the gradient."""
    return ParticleInference(
        conjugate(prior),
        pyro.optim.SGD({"lr": lr}),
        1,
        transport=Ensemble(),
        init_loc_fn=init_to_value(values={"mean": torch.zeros((), dtype=DOUBLE)}),
    )


def exact_nll(lr, prior, steps):
    """The held-out score after so many steps of gradient descent on the log joint."""
    curvature = len(Y) + prior**-2
    mean = Y.sum() / curvature * (1 - (1 - lr * curvature) ** steps)
    return (0.5 * math.log(2 * math.pi) + 0.5 * (HELD_OUT - mean).square().mean()).item()


def test_scores_and_choices_are_the_exact_ones():
    grid = {"lr": [0.001, 0.01, 0.1], "prior": [0.5, 2.0, 10.0]}
    found = tune(descent, grid, [Y], [HELD_OUT], epochs=9, **QUIET)
    rows = found.table.rows()
    assert [(row["rung"], row["epochs"]) for row in rows] == [(0, 1)] * 9 + [(1, 3)] * 3 + [(2, 9)]
    for row in rows:
        expected = exact_nll(steps=row["epochs"], **row["candidate"])
        assert row["score"] == pytest.approx(expected, rel=1e-12)
        assert row["error"] is None
    every = [{"lr": lr, "prior": prior} for lr in grid["lr"] for prior in grid["prior"]]
    assert [row["candidate"] for row in rows[:9]] == every  # a grid, the last list fastest
    for steps, count in ((1, 3), (3, 1)):
        previous = [row["candidate"] for row in rows if row["epochs"] == steps]
        best = sorted(previous, key=lambda one: exact_nll(steps=steps, **one))[:count]
        went_on = [row["candidate"] for row in rows if row["epochs"] == 3 * steps]
        assert sorted(went_on, key=str) == sorted(best, key=str)
    assert found.best == rows[-1]["candidate"]
    mean = found.inference.get_samples()["mean"]
    assert (HELD_OUT - mean).square().mean().item() / 2 == pytest.approx(
        rows[-1]["score"] - 0.5 * math.log(2 * math.pi), rel=1e-12
    )


def test_several_left_at_the_last_rung():
    candidates = [{"lr": lr} for lr in (0.02, 0.001, 0.1, 0.01)]
    found = tune(descent, candidates, [Y], [HELD_OUT], epochs=3, reduction=2,
                 minimum_epochs=2, **QUIET)  # fmt: skip
    rows = found.table.rows()
    assert [row["epochs"] for row in rows] == [2, 2, 2, 2, 3, 3]
    last = {row["candidate"]["lr"]: row["score"] for row in rows[4:]}
    assert found.best == {"lr": min(last, key=last.get)}


# ---------------------------------------------------------------- networks


def network():
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)
    ).double()


GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(90, 4, generator=GENERATOR, dtype=DOUBLE)
LABELS = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
VALIDATION = [(X[60:], LABELS[60:])]


def shuffled(generator=None):
    return DataLoader(
        TensorDataset(X[:60], LABELS[:60]), batch_size=20, shuffle=True, generator=generator
    )


def forde(scale, lr=0.05):
    """A network with repulsion, a schedule, dropout and BatchNorm."""
    return ParticleInference(
        Classifier(bayesianize(network(), prior=1.0), num_data=60),
        pyro.optim.StepLR(
            {
                "optimizer": torch.optim.SGD,
                "optim_args": {"lr": lr, "momentum": 0.9},
                "step_size": 2,
                "gamma": 0.5,
            }
        ),
        3,
        kernel=RBF(InputGradients("x", output="logits")),
        init_loc_fn=init_to_modules(network),
        repulsion_scale=scale,
        num_data=60,
    )


def test_training_in_parts_is_training_in_one_go():
    scales = {"scale": [0.0, 1.0, 5.0]}
    found = tune(forde, scales, shuffled(), VALIDATION, epochs=5, minimum_epochs=1, seed=3,
                 reduction=2, **QUIET)  # fmt: skip
    assert found.table["epochs"] == [1, 1, 1, 5]
    pyro.set_rng_seed(3)
    inference = forde(**found.best)
    pyro.set_rng_seed(3)
    inference.fit(shuffled(), 5, **QUIET)
    state = inference.state_dict()
    assert_equal_states(found.inference.state_dict(), state)
    nll = evaluate(inference, VALIDATION, ["nll"], resamples=1, **QUIET).table["value"][0]
    assert found.table["score"][-1] == nll


def assert_equal_states(one, other):
    """Bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal_states(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal_states(left, right)
    else:
        assert one == other or (one != one and other != other)


def with_parameters(lr):
    """A model function and a module whose parameters are shared by all particles."""
    head = nn.Linear(4, 3).double()

    def model(x, y):
        pyro.module("head", head)
        shift = pyro.param("shift", lambda: torch.randn(3, dtype=DOUBLE))
        noise = pyro.sample("noise", dist.Normal(x.new_zeros(3), 0.1).to_event(1))
        with pyro.plate("data", 60, subsample_size=len(x)):
            pyro.sample("y", dist.Categorical(logits=head(x) + shift + noise), obs=y)

    optim = pyro.optim.SGD({"lr": lr})
    return ParticleInference(model, optim, 2, kernel=RBF(Weights()), num_data=60)


@pytest.mark.parametrize("make", [forde, with_parameters])
@pytest.mark.parametrize("own_generator", [True, False])
def test_the_order_of_candidates_does_not_matter(make, own_generator):
    name = "scale" if make is forde else "lr"
    candidates = [{name: value} for value in (0.3, 0.1, 3.0, 0.0 if make is forde else 0.01)]

    def scores(order):
        torch.rand(7)  # whatever was drawn before
        pyro.param("shift", torch.tensor(float(len(order))))
        generator = torch.Generator().manual_seed(5) if own_generator else None
        given = [candidates[i] for i in order]
        found = tune(make, given, shuffled(generator), VALIDATION, epochs=4, reduction=2, **QUIET)
        rows = {(str(r["candidate"]), r["rung"]): r["score"] for r in found.table.rows()}
        shared = {name: value.clone() for name, value in pyro.get_param_store().items()}
        return found.best, rows, shared

    best, rows, shared = scores([0, 1, 2, 3])
    pyro.clear_param_store()
    again, other_rows, other_shared = scores([2, 3, 1, 0])
    assert again == best
    assert other_rows == rows
    assert len(set(rows.values())) == len(rows)  # a score that does not depend on them says nothing
    if make is with_parameters:
        assert_equal_states(dict(shared), dict(other_shared))


def test_a_metric_that_draws_sees_the_same_numbers_for_all():
    def drawn(inference):
        return torch.rand(()).item() + np.random.rand() + random.random()

    found = tune(forde, {"scale": [0.0, 1.0]}, shuffled(), epochs=2, metric=drawn, reduction=2,
                 **QUIET)  # fmt: skip
    assert found.table["rung"] == [0, 0, 1]
    assert len(set(found.table["score"])) == 1


def test_ties_do_not_depend_on_the_order():
    def same(name):
        return descent(0.1)

    for order in (["b", "a", "c"], ["c", "b", "a"]):
        assert tune(same, {"name": order}, [Y], [Y], epochs=3, **QUIET).best == {"name": "a"}


def test_the_shared_parameters_left_are_those_of_the_best():
    pyro.param("other", torch.tensor(7.0))
    found = tune(with_parameters, {"lr": [1e-6, 0.1]}, shuffled(), VALIDATION, epochs=6,
                 reduction=2, **QUIET)  # fmt: skip
    assert found.best == {"lr": 0.1}
    assert sorted(pyro.get_param_store().keys()) == ["head$$$bias", "head$$$weight", "other",
                                                     "shift"]  # fmt: skip
    table = evaluate(found.inference, VALIDATION, ["nll"], resamples=1, **QUIET).table
    assert table["value"][0] == found.table["score"][-1]
    found.inference.fit(shuffled(), 1, **QUIET)


def test_random_states_and_loaders_are_left_as_they_were():
    generator = torch.Generator().manual_seed(5)
    loader = shuffled(generator)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    own = generator.get_state()
    tune(forde, {"scale": [0.0, 1.0]}, loader, VALIDATION, epochs=2, **QUIET)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()
    assert torch.equal(own, generator.get_state())


def test_few_candidates_have_particles_at_a_time():
    """Those that may go on, and the one that is trained."""
    made, most = [], []

    def make(lr):
        inference = descent(lr)
        made.append(weakref.ref(inference))
        return inference

    def count(inference):
        gc.collect()
        alive = [one() for one in made if one() is not None]
        most.append(sum(bool(one._particles) for one in alive))
        return exact_nll(0.1, 1.0, 3) - inference.get_samples()["mean"].item()

    candidates = {"lr": [0.01 * (1 + place) for place in range(9)]}  # each better than the last
    tune(make, candidates, [Y], epochs=9, metric=count, **QUIET)
    assert most == [1, 2, 3, *[4] * 6, 3, 3, 2, 1]
    gc.collect()
    assert sum(one() is not None for one in made) == 0


# ---------------------------------------------------------------- metrics


def test_accuracy_is_maximised_and_data_sets_are_averaged():
    sets = {"clean": VALIDATION, ("shifted", 1): [(X[60:] + 0.5, LABELS[60:])]}
    found = tune(forde, {"scale": [1.0], "lr": [1e-6, 0.1]}, shuffled(), sets, epochs=6,
                 minimum_epochs=3, metric="accuracy", **QUIET)  # fmt: skip
    assert found.larger_is_better
    assert found.best["lr"] == 0.1
    table = evaluate(found.inference, sets, ["accuracy"], resamples=1, **QUIET).table
    values = [
        table.select(data=data, severity=level)["value"][0]
        for data, level in (("clean", 0), ("shifted", 1))
    ]
    assert found.table["score"][-1] == sum(values) / 2
    worst = found.table["score"][0]
    assert worst < found.table["score"][1]
    lines = str(found).splitlines()
    assert lines[0].startswith("accuracy on validation data after 3, 6 epochs")
    assert lines[3].startswith("scale=1.0, lr=0.1")  # the best row comes first


def test_a_function_is_minimised_and_needs_no_validation_data():
    def distance(inference):
        return (inference.get_samples()["mean"] - 1.0).abs().sum()

    found = tune(descent, {"lr": [0.01, 0.05, 0.2]}, [Y], epochs=3, metric=distance, **QUIET)
    assert found.metric == "distance"
    assert not found.larger_is_better
    curvature = len(Y) + 1
    expected = {
        lr: abs(Y.sum().item() / curvature * (1 - (1 - lr * curvature)) - 1)
        for lr in (0.01, 0.05, 0.2)
    }
    assert found.table["score"][:3] == pytest.approx(list(expected.values()), rel=1e-12)
    assert found.best == {"lr": min(expected, key=expected.get)}


def test_metrics_that_do_not_fit_the_model():
    with pytest.raises(ArgumentError, match=r"'accuracy'.*kind 'normal'"):
        tune(descent, {"lr": [0.1]}, [Y], [Y], epochs=1, metric="accuracy", **QUIET)
    with pytest.raises(ArgumentError, match="site='z'"):
        tune(descent, {"lr": [0.1]}, [Y], [Y], epochs=1, site="z", **QUIET)
    with pytest.raises(ArgumentError, match=r"metric <lambda> must return a number, got None"):
        tune(descent, {"lr": [0.1]}, [Y], epochs=1, metric=lambda inference: None, **QUIET)


# ---------------------------------------------------------------- failures


def test_a_candidate_that_breaks_is_the_worst():
    found = tune(descent, {"lr": [1e300, 0.1, 0.01]}, [Y], [HELD_OUT], epochs=6,
                 minimum_epochs=2, **QUIET)  # fmt: skip
    broken, *rest = found.table.rows()
    assert broken["score"] == math.inf
    assert "finite" in broken["error"]
    assert all(row["error"] is None for row in rest)
    assert found.best == {"lr": 0.1}
    lines = str(found).splitlines()
    assert "lr=1e+300    failed" in lines
    assert lines[-1] == f"lr=1e+300: {broken['error']}"


def test_it_is_the_worst_also_where_more_is_better():
    def broken_or_not(scale):
        return forde(scale, lr=1e300 if scale == 2.0 else 0.1)

    found = tune(broken_or_not, {"scale": [2.0, 0.0]}, shuffled(), VALIDATION, epochs=2,
                 metric="accuracy", reduction=2, **QUIET)  # fmt: skip
    assert found.table["score"][0] == -math.inf
    assert found.best == {"scale": 0.0}


def test_a_score_that_is_not_finite_is_a_failure():
    def metric(inference):
        return math.nan if inference.optim.pt_optim_args["lr"] == 0.1 else 1.0

    found = tune(descent, {"lr": [0.1, 0.2]}, [Y], epochs=2, metric=metric, **QUIET)
    assert found.best == {"lr": 0.2}
    assert found.table["error"][0] == "its score is nan"


def test_all_broken():
    with pytest.raises(NumericalError, match=r"all 2 candidates .* 2 epochs.*lr=1e\+300: .*finite"):
        tune(descent, {"lr": [1e300, 1e299]}, [Y], [Y], epochs=4, minimum_epochs=2, **QUIET)


def test_other_errors_end_the_search_and_leave_nothing_behind():
    def make(lr):
        pyro.param("left", torch.tensor(1.0))
        if lr == 2.0:
            raise KeyError("a mistake of the user's")
        return descent(lr)

    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="a mistake"):
        tune(make, {"lr": [0.1, 2.0]}, [Y], [Y], epochs=2, **QUIET)
    assert torch.equal(state, torch.get_rng_state())
    assert not list(pyro.get_param_store().keys())


# ---------------------------------------------------------------- arguments

BAD = {
    "empty list": ({"candidates": []}, "candidates is empty"),
    "empty dict": ({"candidates": {}}, "candidates is empty"),
    "empty values": ({"candidates": {"lr": []}}, "list of values.*'lr': \\[\\]"),
    "a text": ({"candidates": {"lr": "0.1"}}, "list of values.*'0.1'"),
    "no dicts": ({"candidates": [0.1, 0.2]}, "list of dicts.*got \\[0.1, 0.2\\]"),
    "not a list": ({"candidates": 3}, "got 3"),
    "twice": ({"candidates": [{"lr": 1}, {"lr": 0.1}, {"lr": 1.0}]}, "lr=1.0 is there twice"),
    "tensor": ({"candidates": [{"lr": torch.ones(())}]}, "'lr' is .*Tensor; values must be"),
    "function": ({"candidates": {"lr": [(1, print)]}}, "'lr' is .*tuple; values must be"),
    "nan": ({"candidates": {"lr": [math.nan]}}, "'lr' is nan"),
    "unknown": (
        {"candidates": {"lr": [1], "rate": [0.1]}},
        "make\\(lr, .*rate=0.1.*unexpected.*'rate'",
    ),
    "missing": ({"candidates": [{"prior": 1.0}]}, "missing a required argument: 'lr'"),
    "names": ({"candidates": [{3: 1.0}]}, "named by texts, got 3"),
    "make": ({"make": 3}, "make must be a function.*got int"),
    "epochs": ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
    "minimum": ({"minimum_epochs": 0}, "minimum_epochs must be an integer of at least 1"),
    "too many": ({"minimum_epochs": 5}, "minimum_epochs=5 is more than epochs=4"),
    "reduction": ({"reduction": 1}, "reduction must be at least 2"),
    "share": ({"reduction": 0.3}, "reduction must be an integer"),
    "seed": ({"seed": -1}, "seed must be an integer from 0.*got -1"),
    "metric": ({"metric": "loss"}, "'loss' has no better and worse, or is none; choose.*'nll'"),
    "spread": ({"metric": "entropy"}, "'entropy' has no better and worse"),
    "detection": ({"metric": "auroc:entropy"}, "'auroc:entropy' compares two data sets"),
    "metric's type": ({"metric": 3}, "metric must be the name.*got 3"),
    "no train": ({"train": []}, "the loader train gave no batch"),
    "dropped": (
        {"train": DataLoader([torch.ones(1)], batch_size=2, drop_last=True)},
        "the loader train gave no batch",
    ),
    "one pass": ({"train": iter([Y])}, "train must be a list of batches"),
    "no loader": ({"train": 3}, "train must be a list of batches.*got int"),
    "no validation": ({"validation": None}, "'nll' needs validation data"),
    "empty": ({"validation": {"clean": [Y], ("blur", 2): []}}, "the loader blur 2 gave no batch"),
    "no sets": ({"validation": {}}, "at least one loader"),
    "iterator": ({"validation": iter([Y])}, "validation must be a list"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_before_anything_is_made(name):
    changed, message = BAD[name]

    def make(lr, prior=1.0):
        raise RuntimeError("make was called")

    options = {"make": make, "candidates": {"lr": [0.1, 0.2]}, "train": [Y], "validation": [Y],
               "epochs": 4, **QUIET} | changed  # fmt: skip
    with pytest.raises(ArgumentError, match=message):
        tune(**options)


def test_inferences_must_be_separate():
    optim = pyro.optim.SGD({"lr": 0.1})
    one = descent(0.1)

    class Shared(Classifier):
        def __init__(self, net):
            super().__init__(bayesianize(nn.Linear(4, 3).double(), prior=1.0), num_data=60)
            self.before = net

        def forward(self, x, y=None):
            return super().forward(self.before(x), y)

    trained, frozen = nn.Linear(4, 4).double(), nn.Linear(4, 4).double().eval()
    frozen.requires_grad_(False)

    def with_optim(lr):
        return ParticleInference(conjugate(1.0), optim, 1, transport=Ensemble())

    def with_network(net, lr):
        optim = pyro.optim.SGD({"lr": lr})
        return ParticleInference(Shared(net), optim, 2, transport=Ensemble())

    made = {
        "the inference": lambda lr: one,
        "the optimiser": with_optim,
        "the parameter 'before.weight'": lambda lr: with_network(trained, lr),
    }
    for what, make in made.items():
        train, validation = ([Y], [Y]) if "before" not in what else (shuffled(), VALIDATION)
        with pytest.raises(ArgumentError, match=f"{what} of the candidate lr=0.1 once more"):
            tune(make, {"lr": [0.1, 0.2]}, train, validation, epochs=1, **QUIET)
    found = tune(lambda lr: with_network(frozen, lr), {"lr": [0.01, 0.02]}, shuffled(), VALIDATION,
                 epochs=1, **QUIET)  # fmt: skip
    assert len(found.table) == 2
    with pytest.raises(ArgumentError, match=r"what make returned for lr=0\.1 must be a Particle"):
        tune(lambda lr: None, {"lr": [0.1]}, [Y], [Y], epochs=1, **QUIET)


# ---------------------------------------------------------------- the table


def test_the_table_is_printed_selected_and_saved(tmp_path):
    found = tune(descent, {"lr": [0.1, 1e300]}, [Y], [HELD_OUT], epochs=2, **QUIET)
    rows = str(found.table).splitlines()
    assert rows[0].split() == ["candidate", "rung", "epochs", "score", "error"]
    assert len(rows) == 3
    assert len({len(row) for row in rows}) == 1
    assert found.table.select(candidate=found.best)["epochs"] == [2]
    found.table.save(tmp_path / "table.json")
    assert Table.load(tmp_path / "table.json") == found.table
    assert found.table.to_frame().shape == (2, 5)


def test_large_scores_keep_their_columns():
    columns = {"candidate": [{"lr": 0.1}] * 2, "rung": [0, 1], "epochs": [1, 3]}
    columns |= {"score": [-123456.75, -3000.0], "error": [None, None]}
    rows = str(Tuning({"lr": 0.1}, None, Table(columns), "mine")).splitlines()
    assert rows[-2:] == [f"{'':6}{1:13}{3:13}", "lr=0.1 -123456.7500   -3000.0000"]
