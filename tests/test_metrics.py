"""Metrics against scikit-learn, torchmetrics, SciPy or cases typed out."""

import math
import sys
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
import sklearn.calibration
import sklearn.metrics
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    multiclass_accuracy,
    multiclass_calibration_error,
)
from torchmetrics.functional.regression import continuous_ranked_probability_score

from pyro_fordes import ArgumentError, MissingDependencyError, NumericalError, metrics

PARTICLES, POINTS, CLASSES = 5, 200, 7


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


LOGITS = 2 * rand(PARTICLES, POINTS, CLASSES) + 2 * rand(POINTS, CLASSES, seed=1)
LOG_PROBS = LOGITS.log_softmax(-1)
MEAN = LOG_PROBS.exp().mean(0)
# Class 6 never occurs. Labels are drawn as predicted, so that bins err to both sides.
LABELS = torch.multinomial(MEAN[:, :6], 1, generator=torch.Generator().manual_seed(2)).squeeze(1)
# Two particles, certain of different classes at the first point and of the same at the second.
CERTAIN = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]]).log().double()

PREDICTIONS, SD = rand(PARTICLES, 40, seed=3), 0.2 + rand(PARTICLES, 40, seed=4).square()
TARGETS = 1.5 * rand(40, seed=5)

same = torch.testing.assert_close


def test_log_likelihood():
    same(metrics.nll(LOG_PROBS, LABELS), -MEAN[torch.arange(POINTS), LABELS].log().mean())
    expected = sklearn.metrics.log_loss(LABELS, MEAN, labels=range(CLASSES))
    assert metrics.nll(LOG_PROBS, LABELS).item() == pytest.approx(expected, rel=1e-12)


def test_log_likelihood_of_densities():
    log_densities = Normal(PREDICTIONS, SD).log_prob(TARGETS)
    weights = Categorical(torch.ones(PARTICLES, dtype=torch.float64))
    mixtures = [
        MixtureSameFamily(weights, Normal(m, s)) for m, s in zip(PREDICTIONS.T, SD.T, strict=True)
    ]
    expected = [d.log_prob(y) for d, y in zip(mixtures, TARGETS, strict=True)]
    same(metrics.nll(log_densities), -torch.stack(expected).mean())


def test_far_tails_do_not_underflow():
    logits = torch.tensor([[[0.0, -2000.0]], [[0.0, -1000.0]]])
    value = metrics.nll(logits, torch.tensor([1]))
    same(value, torch.tensor(1000 + math.log(2)))


def test_probabilities_of_zero_and_one():
    agreed = torch.tensor([0, 0])
    assert metrics.nll(CERTAIN, agreed).item() == pytest.approx(math.log(2) / 2)  # 1/2 and 1
    assert metrics.nll(CERTAIN, torch.tensor([0, 1])) == math.inf
    assert metrics.brier(CERTAIN[:1], agreed) == 0
    assert metrics.brier(CERTAIN[:1], 1 - agreed) == 2
    assert metrics.ece(CERTAIN[:1], agreed) == 0
    assert metrics.ece(CERTAIN[:1], 1 - agreed, adaptive=True) == 1
    assert metrics.disagreement(CERTAIN) == 0.5
    assert metrics.pairwise_kl(CERTAIN) == math.inf
    assert metrics.pairwise_kl(CERTAIN[:, 1:]) == 0


def test_brier():
    expected = sklearn.metrics.brier_score_loss(
        LABELS, MEAN, labels=range(CLASSES), scale_by_half=False
    )
    assert metrics.brier(LOG_PROBS, LABELS).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_accuracy(k):
    value = metrics.accuracy(LOG_PROBS, LABELS, top_k=k)
    options = {"num_classes": CLASSES, "average": "micro", "top_k": k}
    same(value, multiclass_accuracy(MEAN, LABELS, **options).double(), atol=1e-7, rtol=0)
    expected = sklearn.metrics.top_k_accuracy_score(LABELS, MEAN, k=k, labels=range(CLASSES))
    assert value.item() == pytest.approx(expected, abs=1e-12)
    assert metrics.accuracy(LOG_PROBS, LABELS, top_k=CLASSES) == 1


def grouped_error(groups, confidence, correct):
    """Calibration error of lists of points."""
    gaps = [abs(confidence[g].mean() - correct[g].double().mean()) * len(g) for g in groups]
    return sum(gaps) / len(confidence)


@pytest.mark.parametrize("bins", [1, 3, 15, 1000])
def test_calibration_error(bins):
    confidence, predicted = MEAN.max(-1)
    correct = predicted == LABELS
    value = metrics.ece(LOG_PROBS, LABELS, bins=bins)
    theirs = multiclass_calibration_error(MEAN, LABELS, num_classes=CLASSES, n_bins=bins)
    same(value.float(), theirs, atol=1e-6, rtol=0)
    index = (confidence * bins).ceil()
    same(value, grouped_error([torch.where(index == i)[0] for i in index.unique()],
                              confidence, correct))  # fmt: skip
    value = metrics.ece(LOG_PROBS, LABELS, bins=bins, adaptive=True)
    order, ends = confidence.argsort(), [math.ceil(i * POINTS / bins) for i in range(bins + 1)]
    groups = [order[start:end] for start, end in pairwise(ends) if start < end]
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    same(value, grouped_error(groups, confidence, correct))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("bins", [1, 6, 15])
def test_reliability(bins, adaptive):
    confidence, predicted = MEAN.max(-1)
    found = metrics.reliability(LOG_PROBS, LABELS, bins=bins, adaptive=adaptive)
    assert found.points.sum() == POINTS
    assert (found.confidence.diff() > 0).all()
    same((found.confidence * found.points).sum(), confidence.sum())
    same((found.accuracy * found.points).sum(), (predicted == LABELS).double().sum())
    gaps = (found.confidence - found.accuracy).abs()
    same((gaps * found.points).sum() / POINTS,
         metrics.ece(LOG_PROBS, LABELS, bins=bins, adaptive=adaptive))  # fmt: skip
    if not adaptive:
        accuracy, mean = sklearn.calibration.calibration_curve(
            predicted == LABELS, confidence, n_bins=bins
        )
        same(found.accuracy, torch.tensor(accuracy))
        same(found.confidence, torch.tensor(mean))


def test_a_confidence_of_one_is_in_the_last_bin():
    log_probs = torch.tensor([[[1.0, 0.0], [0.98, 0.02]]]).log()
    same(metrics.ece(log_probs, torch.tensor([1, 0])), torch.tensor(0.49))


def test_adaptive_bins_do_not_depend_on_the_order_of_ties():
    log_probs = torch.tensor([0.6, 0.6, 0.6, 0.6, 0.9]).log()
    log_probs = torch.stack([log_probs, (1 - log_probs.exp()).log()], -1).unsqueeze(0)
    for labels in set(permutations([0, 0, 1, 1])):
        value = metrics.ece(log_probs, torch.tensor([*labels, 0]), bins=3, adaptive=True)
        same(value, torch.tensor((4 * 0.1 + 0.1) / 5))


def test_uncertainty():
    result = metrics.uncertainty(LOG_PROBS)
    total = scipy.stats.entropy(MEAN, axis=-1)
    aleatoric = scipy.stats.entropy(LOG_PROBS.exp(), axis=-1).mean(0)
    same(result.total, torch.tensor(total))
    same(result.aleatoric, torch.tensor(aleatoric))
    divergences = kl_divergence(Categorical(logits=LOG_PROBS), Categorical(probs=MEAN))
    same(result.epistemic, divergences.mean(0))
    same(result.least_confidence, 1 - MEAN.max(-1).values)
    one = metrics.uncertainty(LOG_PROBS[:1])
    assert (one.epistemic == 0).all()
    equal = metrics.uncertainty(LOG_PROBS[:1].float().expand(7, -1, -1)).epistemic
    assert (equal >= 0).all()
    assert (equal < 1e-5).all()
    log2 = torch.tensor([math.log(2), 0.0]).double()
    same(metrics.uncertainty(CERTAIN), metrics.Uncertainty(log2, 0 * log2, log2, log2.sign() / 2))


def test_least_confidence_keeps_its_digits():
    logits = torch.tensor([[[0.0, -25.0, -26.0]], [[0.0, -24.0, -27.0]]])
    narrow = metrics.uncertainty(logits.log_softmax(-1)).least_confidence
    wide = metrics.uncertainty(logits.double().log_softmax(-1)).least_confidence
    same(narrow, wide.float(), rtol=1e-5, atol=0)


def test_detection():
    inside, outside = rand(60, seed=6), 1 + rand(45, seed=7)
    inside, outside = inside.mul(4).round() / 4, outside.mul(4).round() / 4  # with ties
    result = metrics.detection(inside, outside)
    above = (outside[:, None] > inside).double() + (outside[:, None] == inside).double() / 2
    same(result.auroc, above.mean())
    thresholds = torch.cat([inside, outside]).unique().flip(0)
    first = next(t for t in thresholds if (outside >= t).sum() / 45 >= 0.95)
    same(result.fpr95, (inside >= first).double().mean())
    assert 0 < result.fpr95 < 1
    recalls = [(outside >= t).double().mean() for t in thresholds]
    precisions = [(outside >= t).sum() / (torch.cat([inside, outside]) >= t).sum()
                  for t in thresholds]  # fmt: skip
    steps = np.diff([0.0, *recalls])
    assert result.aupr.item() == pytest.approx(float(steps @ np.array(precisions)), rel=1e-6)
    unit = torch.cat([inside, outside]).sub(-4).div(9)
    truth = torch.tensor([0] * 60 + [1] * 45)
    same(result.auroc, binary_auroc(unit, truth).double(), atol=1e-6, rtol=0)
    same(result.aupr, binary_average_precision(unit, truth).double(), atol=1e-6, rtol=0)
    swapped = metrics.detection(-outside, -inside)
    same(swapped.auroc, result.auroc)
    assert swapped.fpr95 != result.fpr95


def test_detection_at_its_ends():
    low, high = torch.tensor([0.0, 1e-9]), torch.tensor([40.0, 41.0])
    assert metrics.detection(low, high) == (1, 1, 0)
    assert metrics.detection(high, low)[::2] == (0, 1)
    assert metrics.detection(low[:1], low[:1]) == (0.5, 0.5, 1)
    ramp = torch.arange(20.0)
    same(metrics.detection(ramp, ramp).fpr95, torch.tensor(0.95))
    # A sigmoid in single precision would make these the same.
    assert metrics.detection(high[:1], high[1:]).auroc == 1


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'pyro-fordes\[eval\]'"):
        metrics.detection(torch.zeros(1), torch.ones(1))
    metrics.ece(LOG_PROBS, LABELS)  # needs none


def test_diversity():
    named = LOG_PROBS.argmax(-1)
    pairs = list(combinations(range(PARTICLES), 2))
    different = torch.stack([(named[i] != named[j]).double().mean() for i, j in pairs]).mean()
    same(metrics.disagreement(LOG_PROBS), different)
    ordered = [kl_divergence(Categorical(logits=LOG_PROBS[i]), Categorical(logits=LOG_PROBS[j]))
               for i, j in permutations(range(PARTICLES), 2)]  # fmt: skip
    same(metrics.pairwise_kl(LOG_PROBS), torch.stack(ordered).mean())
    half = torch.tensor([[[0.5, 0.5, 0.0]], [[0.25, 0.75, 0.0]]], dtype=torch.float64)
    expected = (math.log(2) / 2 + math.log(2 / 3) / 2 - math.log(2) / 4 + 0.75 * math.log(1.5)) / 2
    assert metrics.pairwise_kl(half.log()).item() == pytest.approx(expected)


def test_root_mean_squared_error():
    expected = sklearn.metrics.root_mean_squared_error(TARGETS, PREDICTIONS.mean(0))
    assert metrics.rmse(PREDICTIONS, TARGETS).item() == pytest.approx(expected)


def mixture_cdf(x, n):
    return scipy.stats.norm.cdf(x, PREDICTIONS[:, n].numpy(), SD[:, n].numpy()).mean()


def test_ranked_probability_score_of_normals_against_its_integral():
    values = []
    for n, y in enumerate(TARGETS.tolist()):
        below, _ = scipy.integrate.quad(lambda x, n=n: mixture_cdf(x, n) ** 2, -30, y, limit=200)
        above, _ = scipy.integrate.quad(
            lambda x, n=n: (1 - mixture_cdf(x, n)) ** 2, y, 30, limit=200
        )
        values.append(below + above)
    assert SD.max() < 10  # no tail beyond the limits
    assert metrics.crps(PREDICTIONS, TARGETS, SD).item() == pytest.approx(np.mean(values), rel=1e-8)


def test_ranked_probability_score_of_samples():
    value = metrics.crps(PREDICTIONS, TARGETS)
    same(value, continuous_ranked_probability_score(PREDICTIONS.T, TARGETS))
    pairs = (PREDICTIONS.unsqueeze(0) - PREDICTIONS.unsqueeze(1)).abs().mean((0, 1))
    same(value, ((PREDICTIONS - TARGETS).abs().mean(0) - pairs / 2).mean())
    same(value, metrics.crps(PREDICTIONS, TARGETS, torch.full_like(SD, 1e-12)))
    same(metrics.crps(PREDICTIONS[:1], TARGETS), (PREDICTIONS[0] - TARGETS).abs().mean())


@pytest.mark.parametrize("level", [0.3, 0.77, 0.95])
def test_coverage(level):
    tails = ((1 - level) / 2, (1 + level) / 2)
    draws = rand(17, 40, seed=8)
    low, high = np.quantile(draws, tails, axis=0, method="inverted_cdf")
    targets = TARGETS.clone()
    targets[:4], targets[4:8] = torch.tensor(low[:4]), torch.tensor(high[4:8])  # ends count
    expected = ((targets.numpy() >= low) & (targets.numpy() <= high)).mean()
    assert 0.2 < expected < 1
    assert metrics.coverage(draws, targets, level=level).item() == pytest.approx(expected)
    ends = [[scipy.optimize.brentq(lambda x, n=n, tail=tail: mixture_cdf(x, n) - tail, -40, 40)
             for tail in tails] for n in range(40)]  # fmt: skip
    expected = np.mean([a <= y <= b for (a, b), y in zip(ends, TARGETS.tolist(), strict=True)])
    value = metrics.coverage(PREDICTIONS, TARGETS, SD, level=level).item()
    assert 0.2 < value == pytest.approx(expected)


CLASSIFICATION = [metrics.nll, metrics.brier, metrics.accuracy, metrics.ece]
REGRESSION = [metrics.rmse, metrics.crps, metrics.coverage]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_types_and_half_precision(dtype):
    expected = torch.float32 if dtype.itemsize < 4 else dtype
    tolerance = {"rtol": 0, "atol": 30 * torch.finfo(dtype).eps}
    log_probs = LOGITS.to(dtype).log_softmax(-1)
    for function in (metrics.nll, metrics.brier):
        result = function(log_probs, LABELS.int())
        assert result.shape == ()
        assert result.dtype == expected
        same(result, function(LOG_PROBS, LABELS).to(expected), **tolerance)
    for function in (metrics.accuracy, metrics.ece):
        assert function(log_probs, LABELS.int()).dtype == expected
    for function in (metrics.disagreement, metrics.pairwise_kl):
        assert function(log_probs).dtype == expected
    for result in metrics.uncertainty(log_probs):
        assert result.dtype == expected
    scores = PREDICTIONS[0].to(dtype)
    assert all(r.dtype == expected for r in metrics.detection(scores, TARGETS))
    for function in REGRESSION:
        assert function(PREDICTIONS.to(dtype), TARGETS).dtype == expected
    result = metrics.crps(PREDICTIONS.to(dtype), TARGETS, SD)
    same(result, metrics.crps(PREDICTIONS, TARGETS, SD).to(expected), **tolerance)


@pytest.mark.parametrize("function", CLASSIFICATION)
def test_one_point_and_one_particle(function):
    value = function(LOG_PROBS[:1, :1], LABELS[:1])
    p, y = LOG_PROBS[0, 0].exp(), LABELS[0]
    right = float(p.argmax() == y)
    expected = {
        metrics.nll: -p[y].log(),
        metrics.brier: p.square().sum() - 2 * p[y] + 1,
        metrics.accuracy: right,
        metrics.ece: (p.max() - right).abs(),
    }
    same(value, torch.as_tensor(expected[function]).double())


def broken(tensor, value, *index):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


NAN = broken(LOG_PROBS, math.nan, 1, 2, 3)
BAD = {
    "NaN": (lambda: metrics.ece(NAN, LABELS), NumericalError,
            r"log_probs has the value nan at particle 1, point 2, class 3"),
    "NaN without labels": (lambda: metrics.uncertainty(NAN), NumericalError, "log_probs"),
    "NaN target": (lambda: metrics.rmse(PREDICTIONS, broken(TARGETS, math.nan, 7)),
                   NumericalError, "targets has the value nan at point 7"),
    "NaN score": (lambda: metrics.detection(TARGETS, broken(TARGETS, math.nan, 0)),
                  NumericalError, "outside has the value nan at point 0"),
    "infinite prediction": (lambda: metrics.crps(broken(PREDICTIONS, math.inf, 0, 0), TARGETS),
                            NumericalError, "predictions has the value inf"),
    "infinite density": (lambda: metrics.nll(broken(PREDICTIONS, math.inf, 0, 0)),
                         NumericalError, "log_probs has the value inf"),
    "logits": (lambda: metrics.nll(LOGITS, LABELS), ArgumentError, "log_softmax"),
    "probabilities": (lambda: metrics.nll(LOG_PROBS.exp(), LABELS), ArgumentError, "probs.log"),
    "no class possible": (lambda: metrics.uncertainty(torch.full((1, 1, 2), -math.inf)),
                          ArgumentError, "sum to 0"),
    "no particles": (lambda: metrics.brier(LOG_PROBS[0], LABELS), ArgumentError, "particle, point"),
    "no points": (lambda: metrics.brier(LOG_PROBS[:, :0], LABELS[:0]), ArgumentError, "not empty"),
    "no tensor": (lambda: metrics.brier([[0.5]], LABELS), ArgumentError, "got list"),
    "classes without labels": (lambda: metrics.nll(LOG_PROBS), ArgumentError, "need labels="),
    "densities with labels": (lambda: metrics.nll(PREDICTIONS, LABELS), ArgumentError, "class"),
    "float labels": (lambda: metrics.nll(LOG_PROBS, LABELS.double()), ArgumentError, "integers"),
    "label list": (lambda: metrics.nll(LOG_PROBS, LABELS.tolist()), ArgumentError, "got list"),
    "fewer labels": (lambda: metrics.nll(LOG_PROBS, LABELS[:5]), ArgumentError, r"\(200,\)"),
    "label too large": (lambda: metrics.nll(LOG_PROBS, broken(LABELS, 7, 0)), ArgumentError,
                        "between 0 and 6.*got 7"),
    "label below 0": (lambda: metrics.nll(LOG_PROBS, broken(LABELS, -1, 0)), ArgumentError,
                      "got -1"),
    "top_k": (lambda: metrics.accuracy(LOG_PROBS, LABELS, top_k=8), ArgumentError, "at most.* 7"),
    "bins": (lambda: metrics.ece(LOG_PROBS, LABELS, bins=0), ArgumentError, "bins"),
    "one particle": (lambda: metrics.disagreement(LOG_PROBS[:1]), ArgumentError, "at least 2"),
    "one particle, KL": (lambda: metrics.pairwise_kl(LOG_PROBS[:1]), ArgumentError, "at least 2"),
    "one class absent": (lambda: metrics.detection(TARGETS, TARGETS[:0]), ArgumentError,
                         "outside must be .* not empty"),
    "targets": (lambda: metrics.rmse(PREDICTIONS, TARGETS[:1]), ArgumentError, "40 points"),
    "sd of 0": (lambda: metrics.crps(PREDICTIONS, TARGETS, 0 * SD), ArgumentError, "above 0"),
    "sd of another shape": (lambda: metrics.coverage(PREDICTIONS, TARGETS, SD[:1]), ArgumentError,
                            "expand"),
    "level": (lambda: metrics.coverage(PREDICTIONS, TARGETS, level=90.0), ArgumentError, "0.9"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    wrong, error, pattern = BAD[case]
    with pytest.raises(error, match=pattern):
        wrong()


EVERY = {
    "nll": lambda p, y: metrics.nll(p, y),
    "brier": metrics.brier,
    "accuracy": metrics.accuracy,
    "ece": metrics.ece,
    "adaptive ece": lambda p, y: metrics.ece(p, y, adaptive=True),
    "reliability": metrics.reliability,
    "uncertainty": lambda p, y: metrics.uncertainty(p),
    "disagreement": lambda p, y: metrics.disagreement(p),
    "pairwise_kl": lambda p, y: metrics.pairwise_kl(p),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_metric_of_classes_names_a_nan_and_takes_one_point(name):
    with pytest.raises(NumericalError, match="nan at particle 1, point 2, class 3"):
        EVERY[name](NAN, LABELS)
    found = EVERY[name](LOG_PROBS[:, :1], LABELS[:1])
    for value in found if isinstance(found, tuple) else [found]:
        assert value.isfinite().all()


@pytest.mark.parametrize("function", REGRESSION)
def test_every_metric_of_numbers_names_a_nan_and_takes_one_point(function):
    with pytest.raises(NumericalError, match="predictions has the value nan at particle 2"):
        function(broken(PREDICTIONS, math.nan, 2, 1), TARGETS)
    if function is not metrics.rmse:
        with pytest.raises(NumericalError, match="sd has the value nan"):
            function(PREDICTIONS, TARGETS, broken(SD, math.nan, 0, 0))
    assert function(PREDICTIONS[:, :1], TARGETS[:1]).isfinite()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_results_stay_on_the_device():
    log_probs, predictions, sd = LOG_PROBS.cuda(), PREDICTIONS.cuda(), SD.cuda()
    results = [f(log_probs, LABELS) for f in CLASSIFICATION]
    results += [metrics.ece(log_probs, LABELS, adaptive=True)]
    results += [f(predictions, TARGETS) for f in REGRESSION]
    results += [f(predictions, TARGETS, sd) for f in (metrics.crps, metrics.coverage)]
    results += [metrics.disagreement(log_probs), metrics.pairwise_kl(log_probs)]
    results += [*metrics.uncertainty(log_probs), *metrics.detection(predictions[0], TARGETS)]
    assert all(result.is_cuda for result in results)
    same(results[0].cpu(), metrics.nll(LOG_PROBS, LABELS))
