"""Evaluation tables against metrics computed in one go, and intervals against theory."""

import json
import math
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import sklearn.metrics
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_fordes import (
    ArgumentError,
    CheckpointError,
    Ensemble,
    MissingDependencyError,
    ModelError,
    NumericalError,
    ParticleInference,
    ParticlePredictive,
    bayesianize,
    compare,
    evaluate,
    init_to_modules,
    metrics,
)
from pyro_fordes.estimates import columns_of, from_means
from pyro_fordes.evaluation import Evaluation
from pyro_fordes.resampling import Counts, Ranking, interval, weighted_means
from pyro_fordes.tables import Table

same = torch.testing.assert_close
DOUBLE = torch.float64


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


class Classifier(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = bayesianize(network().double(), prior=1.0)

    def forward(self, x, y=None):
        logits = self.net(x)
        with pyro.plate("data", 60, subsample_size=len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def data(seed, count=60, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=DOUBLE) + shift
    return x, torch.randint(3, (count,), generator=generator)


def trained(model, *args, particles=4, seed=0, init=None, steps=5):
    options = {} if init is None else {"init_loc_fn": init}
    inference = ParticleInference(
        model, pyro.optim.Adam({"lr": 0.05}), particles, transport=Ensemble(), seed=seed, **options
    )
    inference.run(steps, *args, progress_bar=False)
    return inference


@pytest.fixture(scope="module")
def classifiers():
    """Two methods' ensembles."""
    pyro.set_rng_seed(0)
    x, y = data(0)
    make = init_to_modules(lambda: network().double())
    return [trained(Classifier(), x, y, seed=s, init=make, steps=n) for s, n in ((0, 5), (1, 40))]


def loader(x, *rest, size=16):
    return DataLoader(TensorDataset(x, *rest), batch_size=size)


def sets():
    x, y = data(1)
    return {
        "clean": loader(x, y),
        ("noise", 1): loader(x + 0.1, y),
        ("noise", 2): loader(x + 0.5, y, size=7),
        ("scale", 1): loader(2 * x, y),
        ("scale", 2): loader(4 * x, y),
    }


def scored(inference, metrics=None, **options):
    outside = {"far": loader(data(2, 40, shift=1.0)[0])}
    options = {"resamples": 50, "progress_bar": False, "outside": outside} | options
    return evaluate(inference, sets(), metrics, **options)


def log_probs(inference, x):
    return ParticlePredictive(inference).parameters(x)["y"]["logits"]


ALL = ["nll", "brier", "accuracy", "top-2", "ece", "ece_adaptive", "entropy", "mutual_information",
       "disagreement"]  # fmt: skip


def test_values_are_those_of_the_metrics(classifiers):
    found = scored(classifiers[0], [*ALL, "auroc", "aupr:least_confidence", "fpr95"]).table
    x, y = data(1)
    for name, severity, scale, shift in [
        ("clean", 0, 1, 0.0),
        ("noise", 1, 1, 0.1),
        ("noise", 2, 1, 0.5),
        ("scale", 2, 4, 0.0),
    ]:
        given = log_probs(classifiers[0], scale * x + shift)
        kinds = metrics.uncertainty(given)
        expected = {
            "nll": metrics.nll(given, y),
            "brier": metrics.brier(given, y),
            "accuracy": metrics.accuracy(given, y),
            "top-2": metrics.accuracy(given, y, top_k=2),
            "ece": metrics.ece(given, y),
            "ece_adaptive": metrics.ece(given, y, adaptive=True),
            "entropy": kinds.total.mean(),
            "mutual_information": kinds.epistemic.mean(),
            "disagreement": metrics.disagreement(given),
        }
        rows = found.select(data=name, severity=severity)
        assert rows["metric"] == ALL
        assert rows["points"] == [60] * len(ALL)
        assert dict(zip(ALL, rows["value"], strict=True)) == pytest.approx(
            {metric: value.item() for metric, value in expected.items()}, abs=1e-12
        )
    inside = metrics.uncertainty(log_probs(classifiers[0], x))
    outside = metrics.uncertainty(log_probs(classifiers[0], data(2, 40, shift=1.0)[0]))
    by_entropy = metrics.detection(inside.total, outside.total)
    by_confidence = metrics.detection(inside.least_confidence, outside.least_confidence)
    rows = found.select(data="far")
    assert rows["metric"] == ["auroc:entropy", "aupr:least_confidence", "fpr95:entropy"]
    expected = [by_entropy.auroc, by_confidence.aupr, by_entropy.fpr95]
    assert rows["value"] == pytest.approx([value.item() for value in expected], abs=1e-12)
    assert rows["severity"] == [None] * 3
    assert rows["points"] == [40] * 3
    assert all(low <= high for low, high in zip(found["low"], found["high"], strict=True))


def test_averages_over_severities_and_corruptions(classifiers):
    table = scored(classifiers[0], ["nll", "ece"]).table

    def value(name, severity, metric="nll"):
        (found,) = table.select(data=name, severity=severity, metric=metric)["value"]
        return found

    for metric in ("nll", "ece"):
        noise, scale = ([value(n, s, metric) for s in (1, 2)] for n in ("noise", "scale"))
        assert value("noise", None, metric) == pytest.approx(sum(noise) / 2)
        assert value("corrupted", 2, metric) == pytest.approx((noise[1] + scale[1]) / 2)
        assert value("corrupted", None, metric) == pytest.approx(sum(noise + scale) / 4)


def test_one_loader_and_keyword_batches(classifiers):
    x, y = data(1)
    rows = evaluate(classifiers[0], [{"x": x, "y": y}], resamples=2, progress_bar=False).table
    whole = scored(classifiers[0], chunk_size=3).table.select(data="clean")
    assert rows["data"] == ["data"] * 4
    assert rows["value"] == pytest.approx(whole["value"])


def test_networks_and_random_numbers_are_left_alone(classifiers):
    inference = classifiers[0]
    before = {name: value.clone() for name, value in inference._buffers.items()}
    random = torch.get_rng_state()
    scored(inference)
    assert inference.model.net.training
    assert all(torch.equal(value, before[name]) for name, value in inference._buffers.items())
    same(torch.get_rng_state(), random)


def test_data_stream(classifiers):
    """A batch is let go before the next is asked for but one."""
    x, y = data(1)
    alive, most = [0], [0]

    class Batch(torch.Tensor):
        def __del__(self):
            alive[0] -= 1

    class Stream:
        def __iter__(self):
            for rows in torch.arange(60).split(5):
                alive[0] += 1
                most[0] = max(most[0], alive[0])
                yield [x[rows].as_subclass(Batch), y[rows]]

    evaluate(classifiers[0], {"clean": Stream()}, ["nll"], resamples=2, progress_bar=False)
    assert most[0] <= 3


def test_after_loading_particles(classifiers, tmp_path):
    classifiers[0].save(tmp_path / "particles.pt")
    again = ParticleInference.load(
        tmp_path / "particles.pt", Classifier(), pyro.optim.Adam({"lr": 0.1}), transport=Ensemble()
    )
    assert scored(again).table.columns == scored(classifiers[0]).table.columns


# ---------------------------------------------------------------- kinds of sites


def regression(x, y=None):
    slope = pyro.sample("slope", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
    sd = pyro.sample("sd", dist.LogNormal(torch.zeros((), dtype=DOUBLE), 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(slope * x, sd), obs=y)


def test_regression():
    x = torch.linspace(-1, 1, 30, dtype=DOUBLE)
    y = x + 0.3 * torch.randn(30, dtype=DOUBLE)
    inference = trained(regression, x, y)
    table = evaluate(inference, {"test": loader(x, y)}, resamples=20, progress_bar=False).table
    given = ParticlePredictive(inference).parameters(x)["y"]
    mean, sd = given["loc"], given["scale"]
    expected = {
        "nll": metrics.nll(dist.Normal(mean, sd).log_prob(y)),
        "rmse": metrics.rmse(mean, y),
        "crps": metrics.crps(mean, y, sd),
        "coverage": metrics.coverage(mean, y, sd),
    }
    found = dict(zip(table["metric"], table["value"], strict=True))
    assert found == pytest.approx({name: value.item() for name, value in expected.items()})
    with pytest.raises(ArgumentError, match="class probabilities"):
        evaluate(inference, {"test": loader(x, y)}, outside={"far": loader(x)})


def count_model(x, y=None):
    rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Poisson(rate * x), obs=y)


def test_other_densities():
    x, y = torch.linspace(1, 2, 20), torch.arange(20) % 4
    inference = trained(count_model, x, y.float())
    table = evaluate(inference, [(x, y.float())], resamples=5, progress_bar=False).table
    expected = metrics.nll(ParticlePredictive(inference).log_prob(x, y.float())["y"])
    assert table["metric"] == ["nll"]
    assert table["value"] == [pytest.approx(expected.item(), rel=1e-6)]


@pytest.mark.parametrize("event_dim", [0, 1])
def test_observations_of_several_numbers(event_dim):
    """With event axes a point is a whole observation, else each of its numbers."""

    def model(x, y=None):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        fn = dist.Poisson(rate * x)
        if event_dim:
            with pyro.plate("data", len(x)):
                return pyro.sample("y", fn.to_event(1), obs=y)
        with pyro.plate("numbers", 2), pyro.plate("data", len(x)):
            return pyro.sample("y", fn, obs=y)

    def likelihood(densities):
        return densities.exp().mean(0)

    x, y = torch.linspace(1, 2, 14).reshape(7, 2), torch.arange(14.0).reshape(7, 2) % 4
    inference = trained(model, x, y)
    found = evaluate(inference, [(x, y)], ["nll", likelihood], resamples=5, progress_bar=False)
    densities = ParticlePredictive(inference).log_prob(x, y)["y"].flatten(1)
    expected = [metrics.nll(densities), densities.exp().mean()]
    assert found.table["value"] == pytest.approx([value.item() for value in expected])
    assert found.table["points"] == [7 if event_dim else 14] * 2
    same(found.scores["data", 0]["observed"], y if event_dim else y.flatten())
    assert compare({"a": found, "b": found})["difference"][2:] == [0.0, 0.0]


def binary(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Bernoulli(logits=slope * x), obs=y)


def one_hot(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
    logits = torch.stack([torch.zeros_like(x), slope * x], -1)
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.OneHotCategorical(logits=logits), obs=y)


def test_two_ways_to_say_two_classes():
    x, y = torch.linspace(-2, 2, 20), (torch.arange(20) > 8).long()
    tables = []
    for model, observed in ((binary, y.float()), (one_hot, nn.functional.one_hot(y).float())):
        inference = trained(model, x, observed)
        tables.append(evaluate(inference, [(x, observed)], resamples=5, progress_bar=False).table)
    assert tables[0]["value"] == pytest.approx(tables[1]["value"], rel=1e-5)


def changed_labels(x, y=None):
    """Observes no argument as it is."""
    obs = None if y is None else 1 - y.squeeze(-1)
    return binary(x, obs)


def subsampled(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x), subsample_size=5) as rows:
        obs = None if y is None else y[rows]
        return pyro.sample("y", dist.Bernoulli(logits=slope * x[rows]), obs=obs)


def two_sites(x, y=None, z=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=slope * x), obs=y)
        pyro.sample("z", dist.Bernoulli(logits=-slope * x), obs=z)


def test_observations_are_found_where_they_are_no_argument():
    x, y = torch.linspace(-2, 2, 20), (torch.arange(20) > 8).float()
    expected = evaluate(trained(binary, x, y), [(x, y)], resamples=2, progress_bar=False)
    batches = [(x[:12], 1 - y[:12, None]), (x[12:], 1 - y[12:, None])]
    inference = trained(changed_labels, x, 1 - y.unsqueeze(-1))
    found = evaluate(inference, batches, resamples=2, progress_bar=False)
    assert found.table["value"] == pytest.approx(expected.table["value"])
    same(found.scores["data", 0]["observed"], y.long())


def test_observations_are_found_in_batches_of_any_structure(classifiers):
    x, y = data(1)
    batches = {"tuple": [(x, y)], "mapping": [{"y": y, "x": x}]}
    found = evaluate(classifiers[0], batches, ["nll"], resamples=2, progress_bar=False)
    assert len(set(found.table["value"])) == 1


def test_a_model_that_draws_its_minibatch_is_refused():
    x, y = torch.linspace(-2, 2, 20), (torch.arange(20) > 8).float()
    with pytest.raises(ModelError, match="draws a minibatch"):
        evaluate(trained(subsampled, x, y), [(x, y)], progress_bar=False)


def test_a_site_is_chosen():
    x, y = torch.linspace(-2, 2, 20), (torch.arange(20) > 8).float()
    inference = trained(two_sites, x, y, 1 - y)
    with pytest.raises(ArgumentError, match=r"\['y', 'z'\]; choose one with site="):
        evaluate(inference, [(x, y, 1 - y)], progress_bar=False)
    with pytest.raises(ArgumentError, match="site='w' is not observed"):
        evaluate(inference, [(x, y, 1 - y)], site="w", progress_bar=False)
    found = evaluate(inference, [(x, y, 1 - y)], site="z", resamples=2, progress_bar=False)
    same(found.scores["data", 0]["observed"], (1 - y).long())


def test_log_probabilities_are_checked_once_for_each_batch(classifiers, monkeypatch):
    seen, check = [], metrics._inputs.check_floats

    def counting(name, *args, **options):
        seen.append(name)
        return check(name, *args, **options)

    monkeypatch.setattr(metrics._inputs, "check_floats", counting)
    x, y = data(1)
    outside = {"far": loader(x)}
    evaluate(classifiers[0], [(x, y)] * 2, [*ALL, "auroc"], outside=outside, progress_bar=False)
    assert seen.count("log_probs") == 2 + len(outside["far"])


def test_too_many_classes_are_refused_before_any_batch_is_scored(classifiers):
    class Loader(list):
        read = 0

        def __iter__(self):
            for batch in super().__iter__():
                Loader.read += 1
                yield batch

    with pytest.raises(ArgumentError, match="site 'y' has 3"):
        evaluate(classifiers[0], Loader([data(1)] * 3), ["top-4"], progress_bar=False)
    assert Loader.read == 1


# ---------------------------------------------------------------- masks, and sites of any shape


def masked_regression(x, y=None, mask=True):
    slope = pyro.sample("slope", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
    fn = dist.Normal(slope * x, 0.5)
    with pyro.plate("data", len(x)), poutine.mask(mask=mask):
        return pyro.sample("y", fn, obs=y)


def masked_classes(x, y=None, mask=None):
    slope = pyro.sample("slope", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
    logits = torch.stack([slope * x, -x, torch.zeros_like(x)], -1)
    fn = dist.Categorical(logits=logits)
    with pyro.plate("data", len(x)):
        return pyro.sample("y", fn if mask is None else fn.mask(mask), obs=y)


def masked_counts(x, y=None, mask=True):
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=DOUBLE), 1.0))
    with pyro.plate("data", len(x)), poutine.mask(mask=mask):
        return pyro.sample("y", dist.Poisson(rate * (1 + x.abs())), obs=y)


def masked_pixels(x, y=None, mask=None):
    """The mask is of the elements of an observation."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
    fn = dist.Bernoulli(logits=slope * torch.stack([x, -x, 2 * x], -1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", (fn if mask is None else fn.mask(mask)).to_event(1), obs=y)


MASKED = {
    "handler": (masked_regression, lambda x, classes: x),
    "distribution": (masked_classes, lambda x, classes: classes),
    "density": (masked_counts, lambda x, classes: classes.to(DOUBLE)),
    "elements": (masked_pixels, lambda x, classes: nn.functional.one_hot(classes).to(DOUBLE)),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_points_do_not_count(name):
    """The scores are those of the other points alone; whatever the masked observations are."""
    model, observe = MASKED[name]
    x = torch.linspace(-1, 2, 9, dtype=DOUBLE)
    y = observe(x, torch.arange(9) % 3)
    inference = trained(model, x, y)
    whole = evaluate(inference, [(x, y)], resamples=2, progress_bar=False)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
    if name == "elements":
        mask = (torch.arange(27) % 5 < 3).reshape(9, 3)
    wrong = torch.where(mask, y, (y + 1) % 2)
    batches = [(x[rows], wrong[rows], mask[rows]) for rows in (slice(4), slice(4, 8), slice(8, 9))]
    found = evaluate(inference, batches, resamples=2, progress_bar=False)
    kept = mask.flatten()
    for score, values in found.scores["data", 0].items():
        same(values, whole.scores["data", 0][score][kept])
    assert found.table["points"] == [int(kept.sum())] * len(found.table)
    if name == "distribution":
        far = {"far": [(x, y, mask)]}
        found = evaluate(inference, [(x, y)], ["auroc"], outside=far, progress_bar=False)
        same(found.outside["far"]["entropy"], whole.scores["data", 0]["entropy"][kept])
    with pytest.raises(ArgumentError, match="all points of site 'y' are masked"):
        evaluate(inference, [(x, y, torch.zeros_like(mask))], progress_bar=False)


def test_an_observation_with_masked_elements_counts_by_the_others():
    def model(x, y=None, mask=None):
        rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=DOUBLE), 1.0))
        fn = dist.Poisson(rate * torch.stack([x, 2 * x], -1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", (fn if mask is None else fn.mask(mask)).to_event(1), obs=y)

    x = torch.linspace(1, 2, 3, dtype=DOUBLE)
    y = torch.arange(6.0, dtype=DOUBLE).reshape(3, 2)
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    inference = trained(model, x, y)
    found = evaluate(inference, [(x, y, mask)], resamples=2, progress_bar=False)
    rate = inference.get_samples()["rate"]
    first = dist.Poisson(rate * x[0]).log_prob(y[0, 0])
    third = sum(dist.Poisson(rate * x[2] * (k + 1)).log_prob(y[2, k]) for k in (0, 1))
    same(found.scores["data", 0]["nll"], metrics.classification.point_nll(
        torch.stack([first, third], 1)))  # fmt: skip
    same(found.scores["data", 0]["observed"], y[[0, 2]])


def test_a_mask_that_depends_on_the_particle_is_refused():
    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=x > slope):
            return pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

    x = torch.linspace(-3, 3, 50)
    with pytest.raises(ModelError, match="mask of site 'y' differs between particles"):
        evaluate(trained(model, x, x), [(x, x)], progress_bar=False)


SCALARS = {
    "normal": lambda w, x: dist.Normal(w * x, 1.0),
    "classes": lambda w, x: dist.Categorical(logits=torch.stack([w * x, x, -x])),
    "two classes": lambda w, x: dist.Bernoulli(logits=w * x),
    "density": lambda w, x: dist.Poisson((w * x).exp()),
    "transformed": lambda w, x: dist.LogNormal(w * x, 1.0),
}


@pytest.mark.parametrize("name", SCALARS)
def test_a_site_without_axes_is_one_point(name):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
        return pyro.sample("y", SCALARS[name](w, x), obs=y)

    batches = [(torch.tensor(x, dtype=DOUBLE), torch.tensor(1.0, dtype=DOUBLE)) for x in (1.0, 2.0)]
    if name == "classes":
        batches = [(x, y.long()) for x, y in batches]
    inference = trained(model, *batches[0])
    found = evaluate(inference, batches, ["nll"], resamples=2, progress_bar=False)
    densities = torch.stack([ParticlePredictive(inference).log_prob(*b)["y"] for b in batches], 1)
    assert found.table["value"] == pytest.approx([metrics.nll(densities).item()])
    assert found.table["points"] == [2]


def test_a_distribution_of_fewer_axes_than_its_observations():
    """As models without plates may have it."""

    def model(y=None):
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
        return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    y = torch.linspace(0, 1, 6, dtype=DOUBLE)
    inference = trained(model, y)
    found = evaluate(inference, [y], ["nll", "coverage"], resamples=2, progress_bar=False)
    expected = metrics.nll(ParticlePredictive(inference).log_prob(y)["y"])
    assert found.table["value"][0] == pytest.approx(expected.item())
    assert found.table["points"] == [6, 6]


def test_batches_that_are_one_observation_each():
    """Equal ones are points; others are no points of one kind, and the plate is missing."""

    def model(x, y=None):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        return pyro.sample("y", dist.Poisson(rate * x).to_event(1), obs=y)

    x, y = torch.linspace(1, 2, 7), torch.arange(7.0)
    inference = trained(model, x, y)
    found = evaluate(inference, [(x[:3], y[:3]), (x[3:6], y[3:6])], progress_bar=False)
    assert found.table["points"] == [2]
    with pytest.raises(ArgumentError, match=r"shapes \[\(3,\), \(4,\)\].*pyro.plate"):
        evaluate(inference, [(x[:3], y[:3]), (x[3:], y[3:])], progress_bar=False)


def test_a_transformed_normal_is_scored_by_its_own_density():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.LogNormal(w * x, 1.0), obs=y)

    x = torch.linspace(0, 1, 5)
    inference = trained(model, x, x.exp())
    found = evaluate(inference, [(x, x.exp())], progress_bar=False).table
    expected = metrics.nll(ParticlePredictive(inference).log_prob(x, x.exp())["y"])
    assert found["metric"] == ["nll"]
    assert found["value"] == [pytest.approx(expected.item(), rel=1e-6)]


def test_outside_needs_the_site_without_observations():
    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
        if y is not None:
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Bernoulli(logits=slope * x), obs=y)

    x, y = torch.linspace(-2, 2, 20), (torch.arange(20) > 8).float()
    with pytest.raises(ModelError, match=r"no site 'y'.*obs=None"):
        evaluate(trained(model, x, y), [(x, y)], outside={"far": [x]}, progress_bar=False)


# ---------------------------------------------------------------- functions as metrics


def margin(log_probs, labels):
    top = log_probs.exp().mean(0).topk(2).values
    return top[:, 0] - top[:, 1]


def test_a_function_is_a_metric(classifiers):
    table = scored(classifiers[0], [margin, "nll"], outside=None).table
    x, y = data(1)
    value = margin(log_probs(classifiers[0], x), y).mean().item()
    rows = table.select(data="clean")
    assert rows["metric"] == ["margin", "nll"]
    assert rows["value"][0] == pytest.approx(value)


# ---------------------------------------------------------------- resampling


def test_resampled_metrics_are_those_of_the_repeated_points():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(40, generator=generator, dtype=DOUBLE)
    scores = {
        "confidence": confidence,
        "accuracy": (torch.rand(40, generator=generator) < confidence).double(),
        "squared_error": confidence.square(),
    }
    counts = Counts(6, seed=1)("test", 40)
    bins = torch.bucketize(confidence, torch.arange(1, 15, dtype=DOUBLE) / 15)

    def resampled(metric):
        return from_means(metric, weighted_means(columns_of(metric, scores), counts))

    for row, drawn in enumerate(counts.long()):
        index = torch.arange(40).repeat_interleave(drawn)
        same(resampled("accuracy")[row], scores["accuracy"][index].mean())
        same(resampled("rmse")[row], confidence[index].square().mean().sqrt())
        gaps = (confidence - scores["accuracy"])[index]
        by_bin = torch.zeros(15, dtype=DOUBLE).index_add(0, bins[index], gaps)
        same(resampled("ece")[row], by_bin.abs().sum() / 40)


def test_resampled_rankings_against_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(50, generator=generator).mul(4).round() / 4  # with ties
    outside = torch.randn(30, generator=generator).add(1).mul(4).round() / 4
    draw = Counts(8, seed=2)
    first, second = draw("inside", 50), draw("outside", 30)
    first[0], second[0] = 1.0, 1.0
    found = Ranking(inside, outside, first, second)
    scores = torch.cat([inside, outside]).numpy()
    truth = np.array([0] * 50 + [1] * 30)
    for row in range(8):
        weights = torch.cat([first[row], second[row]]).numpy()
        kept = weights > 0
        given = {"y_true": truth[kept], "sample_weight": weights[kept], "y_score": scores[kept]}
        assert found.auroc[row].item() == pytest.approx(sklearn.metrics.roc_auc_score(**given))
        precision = sklearn.metrics.average_precision_score(**given)
        assert found.aupr[row].item() == pytest.approx(precision)
        repeated = [s.repeat_interleave(w.long()) for s, w in ((inside, first[row]),
                                                               (outside, second[row]))]  # fmt: skip
        assert found.fpr95[row].item() == pytest.approx(metrics.detection(*repeated).fpr95.item())
    whole = [value.item() for value in metrics.detection(inside, outside)]
    values = (found.auroc[0], found.aupr[0], found.fpr95[0])
    assert [value.item() for value in values] == pytest.approx(whole)


def test_infinite_scores_are_infinite_only_where_drawn():
    counts = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    values = torch.tensor([[1.0, 3.0], [math.inf, 5.0]])
    found = weighted_means(values, counts)
    assert found.tolist() == [[math.inf, 4.0], [1.0, 3.0]]
    low, high = interval(torch.tensor([math.inf], dtype=DOUBLE), found[:, :1], 0.9)
    assert low <= high == math.inf


def test_intervals_of_means_cover_as_often_as_they_say():
    """Of 400 intervals of 90 % of a mean, between 85 and 95 % cover.

    Were the coverage exactly 0.89 (percentile intervals of 80 points are slightly narrow), the
    count would leave this range with a probability below 0.01; the seed is fixed.
    """
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(400):
        values = torch.randn(80, generator=generator)
        counts = Counts(300, seed=trial)("test", 80)
        means = weighted_means(values.unsqueeze(1), counts)
        low, high = interval(values.double().mean(0, keepdim=True), means, 0.9)
        covered += bool(low <= 0 <= high)
    assert 0.85 <= covered / 400 <= 0.95


def test_the_interval_of_a_calibration_error_surrounds_it(classifiers):
    """Resamples alone would lie above it, as each has its own noise on top."""
    found = scored(classifiers[1], ["ece"], outside=None, resamples=300)
    (row,) = found.table.select(data="clean").rows()
    scores = found.scores["clean", 0]
    means = weighted_means(columns_of("ece", scores), Counts(300, seed=0)("points", 60))
    resampled = from_means("ece", means)
    assert resampled.mean() > row["value"]
    assert row["low"] < row["value"] < row["high"]


def test_intervals_stay_within_what_a_metric_can_be():
    """Nine of ten points right, confidence 0.9: the shift would carry the error's end below 0."""
    right = torch.tensor([1.0] * 9 + [0.0]).repeat(20)
    scores = {"accuracy": right, "confidence": torch.full((200,), 0.9), "observed": 0 * right}
    found = Evaluation("classes", {("clean", 0): scores}, {}, ("clean", 0), ("accuracy", "ece"))
    accuracy, ece = found.table.rows()
    assert accuracy["low"] < 0.9 < accuracy["high"] <= 1
    assert ece["low"] == 0
    table = compare({"a": found, "b": found}, resamples=50)
    assert table["low"][1] == 0
    assert table["difference_low"][3] == 0


def test_intervals_depend_on_the_seed_alone(classifiers):
    first, again = scored(classifiers[0]), scored(classifiers[0])
    assert first.table.columns == again.table.columns
    other = scored(classifiers[0], seed=1)
    assert other.table["value"] == first.table["value"]
    assert other.table["low"] != first.table["low"]
    narrow = scored(classifiers[0], level=0.5).table
    widths = [
        [high - low for low, high in zip(t["low"], t["high"], strict=True)]
        for t in (narrow, first.table)
    ]
    assert sum(widths[0]) < 0.6 * sum(widths[1])


def test_one_point(classifiers):
    x, y = data(1)
    found = evaluate(classifiers[0], [(x[:1], y[:1])], resamples=3, progress_bar=False).table
    given = log_probs(classifiers[0], x[:1])
    assert found["value"][0] == pytest.approx(metrics.nll(given, y[:1]).item())
    assert found["low"] == pytest.approx(found["value"])
    assert found["high"] == pytest.approx(found["value"])


def test_many_points_are_resampled_in_parts(classifiers, monkeypatch):
    monkeypatch.setattr("pyro_fordes.resampling._ENTRIES", 200)
    table = scored(classifiers[0], resamples=200).table
    assert len(table.select(data="clean")["low"]) == 4
    monkeypatch.undo()
    whole = scored(classifiers[0], resamples=200).table
    assert table["low"] == pytest.approx(whole["low"], abs=0.1)


# ---------------------------------------------------------------- comparing


def test_comparison(classifiers):
    first, second = (scored(one, resamples=400) for one in classifiers)
    table = compare({"short": first, "long": second}, resamples=400)
    assert table.baseline == "short"
    assert table["method"] == ["short"] * len(first.table) + ["long"] * len(second.table)
    for name, evaluation in (("short", first), ("long", second)):
        assert table.select(method=name)["value"] == pytest.approx(evaluation.table["value"])
        rows = table.select(method=name, data="clean")
        for mine, own in zip(rows["low"], evaluation.table.select(data="clean")["low"],
                             strict=True):  # fmt: skip
            assert mine == pytest.approx(own, abs=0.05)
    row, base = (table.select(method=m, data="clean", metric="nll").rows()[0]
                 for m in ("long", "short"))  # fmt: skip
    assert base["difference"] is None
    assert row["difference"] == pytest.approx(row["value"] - base["value"])
    # The interval of the mean of paired differences, by the central limit theorem.
    differences = second.scores["clean", 0]["nll"] - first.scores["clean", 0]["nll"]
    error = differences.std() / 60**0.5
    half = (row["difference_high"] - row["difference_low"]) / 2
    assert half == pytest.approx(1.96 * error.item(), rel=0.2)
    assert row["run_error"] is None


def test_equal_methods_differ_by_nothing(classifiers):
    """Of every metric on every set: all see the same resampled points."""
    table = compare({"one": scored(classifiers[0], ALL, outside=None),
                     "same": scored(classifiers[0], ALL, outside=None)}, resamples=20)  # fmt: skip
    rows = table.select(method="same")
    for column in ("difference", "difference_low", "difference_high"):
        assert rows[column] == [0.0] * len(rows)


def test_corruptions_of_an_image_are_resampled_together(classifiers):
    """So the mean of a set with itself has the interval of the set, not a narrower one."""
    scores = scored(classifiers[0], ["nll"], outside=None).scores["clean", 0]
    twice = {("clean", 0): scores, ("a", 1): scores, ("b", 1): scores}
    table = Evaluation("classes", twice, {}, ("clean", 0), ("nll",)).table
    (single,) = table.select(data="clean").rows()
    (mean,) = table.select(data="corrupted", severity=None).rows()
    assert mean["low"] == pytest.approx(single["low"])
    assert mean["high"] == pytest.approx(single["high"])


def test_several_runs(classifiers):
    one, two = (scored(c, ["nll"], outside=None) for c in classifiers)
    table = compare({"a": [one, two], "b": [two, one]}, baseline="a", resamples=20)
    assert table.runs == 2
    rows = table.select(data="clean").rows()
    values = [e.table.select(data="clean")["value"][0] for e in (one, two)]
    assert [row["value"] for row in rows] == pytest.approx([sum(values) / 2] * 2)
    error = abs(values[0] - values[1]) / 2
    assert [row["run_error"] for row in rows] == pytest.approx([error] * 2)
    assert rows[1]["difference"] == pytest.approx(0.0, abs=1e-12)
    assert rows[1]["difference_run_error"] == pytest.approx(2 * error)


def test_runs_may_be_of_other_points(classifiers):
    others = [
        evaluate(classifiers[0], {"clean": [data(s)]}, resamples=2, progress_bar=False)
        for s in (5, 6)
    ]
    table = compare({"a": others, "b": others}, resamples=10)
    assert table.select(method="b")["difference"] == [0.0] * 4


def test_infinite_scores_in_a_comparison():
    def evaluation(*nll):
        scores = {"nll": torch.tensor(nll), "observed": torch.zeros(len(nll))}
        return Evaluation("density", {("clean", 0): scores}, {}, ("clean", 0), ("nll",))

    methods = {"finite": evaluation(1.0, 2.0), "infinite": evaluation(1.0, math.inf)}
    table = compare(methods, resamples=20)
    assert table["value"] == [1.5, math.inf]
    assert table["difference"][1] == math.inf
    assert not any(math.isnan(v) for v in (*table["low"], *table["high"]))
    assert "inf" in str(table)


# ---------------------------------------------------------------- results


def test_scores_are_saved(classifiers, tmp_path):
    found = scored(classifiers[0])
    found.save(tmp_path / "scores.pt")
    again = Evaluation.load(tmp_path / "scores.pt")
    assert again.table.columns == found.table.columns
    assert compare({"a": found, "b": again}, resamples=5).select(method="b")["difference"][0] == 0
    classifiers[0].save(tmp_path / "particles.pt")
    with pytest.raises(CheckpointError, match="has no evaluation"):
        Evaluation.load(tmp_path / "particles.pt")
    with pytest.raises(CheckpointError):
        classifiers[1].load(tmp_path / "scores.pt")
    content = torch.load(tmp_path / "scores.pt", weights_only=True)
    torch.save({**content, "format": 1}, tmp_path / "old.pt")  # older files have the same content
    assert Evaluation.load(tmp_path / "old.pt").table.columns == found.table.columns
    with pytest.raises(CheckpointError, match="does not exist"):
        Evaluation.load(tmp_path / "nothing.pt")


def test_reliability_of_an_evaluation(classifiers):
    x, y = data(1)
    found = scored(classifiers[0]).reliability("noise", 1, bins=7)
    for mine, expected in zip(
        found, metrics.reliability(log_probs(classifiers[0], x + 0.1), y, bins=7), strict=True
    ):
        same(mine, expected)
    with pytest.raises(ArgumentError, match="no class probabilities were scored on"):
        scored(classifiers[0]).reliability("noise", 3)


def test_tables(classifiers, tmp_path):
    table = compare({"short": scored(classifiers[0]), "long": scored(classifiers[1])}, resamples=9)
    table.save(tmp_path / "table.json")
    assert Table.load(tmp_path / "table.json") == table
    (tmp_path / "other.json").write_text('{"rows": 3}')
    (tmp_path / "text.json").write_text("nll 0.3")
    for name in ("other.json", "text.json"):
        with pytest.raises(CheckpointError, match=r"has no table.*Table.save writes one"):
            Table.load(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot read the table"):
        Table.load(tmp_path / "nothing.json")
    with pytest.raises(CheckpointError, match="cannot write the table"):
        table.save(tmp_path / "text.json" / "table.json")
    assert list(json.loads((tmp_path / "table.json").read_text())["columns"]) == list(table.columns)
    frame = table.to_frame()
    assert list(frame.columns) == list(table.columns)
    assert len(frame) == len(table)
    chosen = frame[(frame.method == "long") & (frame.data == "clean") & (frame.metric == "nll")]
    assert (
        chosen.value.item() == table.select(method="long", data="clean", metric="nll")["value"][0]
    )
    with pytest.raises(ArgumentError, match="no column"):
        table.select(metod="long")
    with pytest.raises(ArgumentError, match="no column"):
        table["metod"]


def test_pandas_is_optional(classifiers, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    table = scored(classifiers[0]).table
    with pytest.raises(MissingDependencyError, match=r"pip install 'pyro-fordes\[eval\]'"):
        table.to_frame()


def test_text_of_an_evaluation(classifiers):
    text = str(scored(classifiers[0], [*ALL, "auroc"]))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    names = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert names == ["value", *["clean", "noise", "scale", "corrupted"] * 3, "far"]
    x, y = data(1)
    value = metrics.nll(log_probs(classifiers[0], x), y).item()
    assert f"{value:.4f} ±" in next(line for line in lines if line.startswith("clean"))


def test_text_of_a_comparison(classifiers):
    runs = {"a method with a name that is far too long": scored(classifiers[0]),
            "long": scored(classifiers[1])}  # fmt: skip
    table = compare(runs, resamples=100)
    lines = str(table).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) < 30
    row = table.select(method="long", data="clean", metric="nll").rows()[0]
    at = next(i for i, line in enumerate(lines) if line.startswith("clean"))
    assert lines[at + 2].startswith("long")
    assert f"{row['value']:.4f}" in lines[at + 2]
    assert lines[at + 3].startswith("  minus a method")
    starred = f"{row['difference']:+.4f} ±" in lines[at + 3] and "*" in lines[at + 3].split("±")[1]
    assert starred == (row["difference_low"] > 0 or row["difference_high"] < 0)


# ---------------------------------------------------------------- errors


def nothing(log_probs, labels):
    return log_probs.mean()


def nll(log_probs, labels):
    return labels.double()


def auroc(log_probs, labels):
    return labels.double()


BAD = {
    "no loader": (lambda i: evaluate(i, {}), "at least one loader"),
    "loader name": (lambda i: evaluate(i, {3: []}), "named by texts"),
    "severity": (lambda i: evaluate(i, {("noise", -1): []}), "severity from 1"),
    "iterator": (lambda i: evaluate(i, {"clean": iter([data(1)])}), "iterated again"),
    "empty loader": (lambda i: evaluate(i, {"clean": []}), "gave no batch"),
    "empty second loader": (
        lambda i: evaluate(i, {"clean": [data(1)], "b": []}, progress_bar=False),
        "gave no batch",
    ),
    "no observations": (lambda i: evaluate(i, [data(1)[0]]), "needs the observations"),
    "unknown metric": (lambda i: scored(i, ["nll", "rmse"]), "'rmse', which .* 'classes'"),
    "metric text": (lambda i: scored(i, "nll"), "list of names"),
    "twice": (lambda i: scored(i, ["nll", "nll"]), "twice"),
    "too many classes": (
        lambda i: evaluate(i, [data(1)] * 2, ["nll", "top-9"], progress_bar=False),
        "'top-9' needs at least 9 classes, but site 'y' has 3",
    ),
    "one name twice": (
        lambda i: evaluate(i, {"clean": [data(1)], ("clean", 0): [data(2)]}),
        r"names \('clean', 0\) twice",
    ),
    "outside list": (lambda i: scored(i, outside=[[data(2)[0]]]), "by name.*got list"),
    "outside key": (lambda i: scored(i, outside={("far", 1): [data(2)[0]]}), "by name"),
    "outside iterator": (
        lambda i: scored(i, outside={"far": iter([data(2)[0]])}), "iterated again"
    ),
    "score of no point": (lambda i: scored(i, [nothing]), r"one score per point.*\(16,\)"),
    "taken name": (lambda i: scored(i, [nll]), "name of another score"),
    "taken name of a detection": (lambda i: scored(i, [auroc]), "name of another score"),
    "mean over corruptions": (
        lambda i: evaluate(i, {("corrupted", 1): [data(1)]}),
        "name of the mean over corruptions",
    ),
    "detection alone": (lambda i: scored(i, ["auroc"], outside=None), "needs data outside"),
    "unknown inside": (lambda i: scored(i, inside="test"), "no loader"),
    "level": (lambda i: scored(i, level=95.0), "between 0 and 1"),
    "seed": (lambda i: scored(i, seed="0"), "seed must be an integer"),
    "comparison seed": (lambda i: compare({"a": scored(i)}, seed=None), "seed must be an integer"),
    "resamples": (lambda i: scored(i, resamples=0), "resamples"),
    "no methods": (lambda i: compare({}), "by method"),
    "method name": (lambda i: compare({1: scored(i)}), "by method"),
    "no evaluation": (lambda i: compare({"a": i}), "evaluate"),
    "comparison level": (lambda i: compare({"a": scored(i)}, level=95), "between 0 and 1"),
    "unknown baseline": (lambda i: compare({"a": scored(i)}, baseline="b"), "none of the methods"),
    "other runs": (lambda i: compare({"a": scored(i), "b": [scored(i)] * 2}), "2 runs"),
    "other metrics": (
        lambda i: compare({"a": scored(i), "b": scored(i, ["nll"], outside=None)}),
        "metrics",
    ),
    "other data": (
        lambda i: compare({"a": scored(i, ["nll"], outside=None),
                           "b": evaluate(i, {"clean": [data(1)]}, ["nll"], progress_bar=False)}),
        "on the same data",
    ),
    "other points": (
        lambda i: compare({"a": evaluate(i, [data(1)], progress_bar=False),
                           "b": evaluate(i, [data(2)], progress_bar=False)}),
        "same points",
    ),
    "fewer points outside": (
        lambda i: compare({"a": scored(i), "b": scored(i, outside={"far": [data(2)[0]]})}),
        "points of 'far'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, classifiers):
    wrong, pattern = BAD[case]
    with pytest.raises((ArgumentError, TypeError), match=pattern):
        wrong(classifiers[0])


def test_one_particle_has_no_disagreement(classifiers):
    x, y = data(0)
    make = init_to_modules(lambda: network().double())
    alone = trained(Classifier(), x, y, particles=1, init=make)
    assert len(scored(alone).table) > 0
    with pytest.raises(ArgumentError, match="disagreement"):
        scored(alone, ["disagreement"])


def test_a_nan_prediction_is_named(classifiers):
    x, y = data(1)
    x = x.clone()
    x[3] = math.nan
    with pytest.raises(NumericalError, match="argument 0 has values that are not finite"):
        evaluate(classifiers[0], [(x[:20], y[:20])], progress_bar=False)
    batches = [(x[4:20], y[4:20]), (x[:4], y[:4])]
    with pytest.raises(NumericalError, match="nan at particle 0, point 3"):
        evaluate(classifiers[0], batches, progress_bar=False)
