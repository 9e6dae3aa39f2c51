"""Plots take and return axes, name what they show, and draw the numbers that they are given."""

import math
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pyro_fordes import ArgumentError, MissingDependencyError, compare, metrics, plots
from pyro_fordes.evaluation import Evaluation

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


LOG_PROBS = (4 * rand(3, 100, 3)).log_softmax(-1)
LABELS = torch.arange(100) % 3
RELIABILITY = metrics.reliability(LOG_PROBS, LABELS, bins=5)
POINTS = rand(20, 2)


def classifier(x):
    """Three particles, two classes, boundaries at x1 = 0.3, 0.5 and 0.7."""
    logits = torch.stack([8 * (x[:, 0] - edge) for edge in (0.3, 0.5, 0.7)])
    return torch.stack([torch.zeros_like(logits), logits], -1).log_softmax(-1)


def evaluation(shift):
    def scores(severity):
        return {"nll": rand(50, seed=severity) + severity + shift, "observed": torch.zeros(50)}

    sets = {("test", 0): scores(0)}
    sets |= {(name, s): scores(s) for name in ("fog", "snow") for s in (1, 2, 3)}
    return Evaluation("density", sets, {}, ("test", 0), ("nll",))


TABLE = compare({"one": evaluation(0.0), "two": evaluation(1.0)}, resamples=20)
RECORDS = [
    {"step": s, "force_ratio": 0.01 + s / 100, "effective_particles": 1 + s / 10,
     "log_joint": torch.zeros(4)} for s in (0, 0, 10, 20)
]  # fmt: skip

PLOTS = {
    "reliability": lambda axes: plots.reliability(RELIABILITY, axes=axes),
    "reliability of two": lambda axes: plots.reliability(
        {"one": RELIABILITY, "two": RELIABILITY}, axes=axes
    ),
    "band": lambda axes: plots.regression_band(rand(9), rand(4, 9), axes=axes),
    "band with noise": lambda axes: plots.regression_band(
        rand(9), rand(4, 9), rand(4, 9), data=(rand(3), rand(3)), axes=axes
    ),
    "decisions": lambda axes: plots.decision_map(
        classifier, POINTS, (POINTS[:, 0] > 0.5).long(), size=20, axes=axes
    ),
    "uncertainty": lambda axes: plots.uncertainty_map(
        classifier, POINTS, (POINTS[:, 0] > 0.5).long(), size=20, axes=axes
    ),
    "curves": lambda axes: plots.corruption_curves(TABLE, axes=axes),
    "curves of an evaluation": lambda axes: plots.corruption_curves(
        evaluation(0.0).table, corruption="fog", axes=axes
    ),
    "histograms": lambda axes: plots.ood_histograms(rand(50), rand(30) + 0.5, axes=axes),
    "histograms of two": lambda axes: plots.ood_histograms(
        rand(50), {"a": rand(30) + 0.5, "b": rand(9)}, score="mutual_information", axes=axes
    ),
    "kernel": lambda axes: plots.kernel_matrix(torch.eye(4), axes=axes),
}


@pytest.mark.parametrize("case", PLOTS)
def test_axes_are_taken_and_returned_with_names(case):
    given = plt.figure().subplots()
    assert PLOTS[case](given) is given
    fresh = PLOTS[case](None)
    assert fresh is not given
    for axes in (given, fresh):
        assert axes.get_title()
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert axes.get_legend() is not None or case == "kernel"
        axes.figure.canvas.draw()  # no warning of a layout that does not fit


def test_several_axes():
    for axes in (plt.figure().subplots(2, 1), None):
        upper, lower = plots.training({"one": RECORDS, "two": RECORDS[:1]}, axes=axes)
        assert axes is None or upper is axes[0]
        assert upper.get_title()
        assert upper.get_ylabel()
        assert lower.get_ylabel()
        assert lower.get_xlabel() == "step"
        assert [t.get_text() for t in upper.get_legend().get_texts()] == ["one", "two", "balance"]
    image = rand(3, 4, 4)
    for axes in (plt.figure().subplots(1, 3), None):
        found = plots.input_gradients(rand(2, 3, 4, 4), image, name="one", axes=axes)
        assert axes is None or found is axes
        assert len(found) == 3
        assert [cell.get_title() for cell in found] == ["image", "particle 1", "particle 2"]
        assert found[0].get_ylabel().startswith("one\nmean cosine")
    assert len(plots.input_gradients(rand(2, 4, 4))) == 2


def test_what_is_drawn():
    x, predictions = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 5.0]])
    axes = plots.regression_band(x, predictions, 2.0, lines=0)
    (mean,) = axes.lines
    np.testing.assert_allclose(mean.get_xydata(), [[0, 2], [1, 4], [2, 2]])
    outer, inner = (band.get_paths()[0].vertices for band in axes.collections)
    assert inner[:, 1].max() == pytest.approx(4 + 2 * 1)  # the particles' sd at 1 is 1
    assert outer[:, 1].max() == pytest.approx(4 + 2 * math.sqrt(1 + 4))

    axes = plots.corruption_curves(TABLE)
    curves = {line.get_label(): line.get_xydata() for line in axes.lines}
    for method, curve in curves.items():
        rows = TABLE.select(method=method)
        values = [rows.select(data="test", severity=0)["value"][0]]
        values += [rows.select(data="corrupted", severity=s)["value"][0] for s in (1, 2, 3)]
        np.testing.assert_allclose(curve, np.column_stack([range(4), values]))

    axes = plots.ood_histograms(torch.tensor([0.0, 0.1, 0.1]), torch.tensor([1.0]), bins=2)
    heights = [patch.get_data().values for patch in axes.patches]
    np.testing.assert_allclose(heights[0], [1, 0])
    np.testing.assert_allclose(heights[-1], [0, 1])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["test (mean 0.07)", "outside (mean 1.00)"]
    axes = plots.ood_histograms(torch.zeros(2), {"test": torch.ones(2)})
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["test (mean 0.00)", "test (mean 1.00)"]

    axes = plots.reliability(RELIABILITY)
    points = axes.collections[0].get_offsets()
    np.testing.assert_allclose(points[:, 0], RELIABILITY.confidence, rtol=1e-6)
    np.testing.assert_allclose(points[:, 1], RELIABILITY.accuracy, rtol=1e-6)
    error = metrics.ece(LOG_PROBS, LABELS, bins=5)
    assert f"ECE {error:.3f}" in axes.get_legend().get_texts()[1].get_text()

    upper, _ = plots.training(RECORDS)
    np.testing.assert_allclose(upper.lines[0].get_xydata(), [[0, 0.01], [10, 0.11], [20, 0.21]])

    cosine = plots.input_gradients(torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]]))[0].get_ylabel()
    assert cosine == "mean cosine 0.71"
    title = plots.kernel_matrix(torch.eye(4)).get_title()
    assert title.endswith("4.00 effective of 4")


def test_maps_are_the_right_way_up():
    """Class 1 is at the right, and uncertainty is largest between the particles' boundaries."""
    labels = (POINTS[:, 0] > 0.5).long()
    axes = plots.decision_map(classifier, POINTS, labels, size=30)
    image = axes.images[0].get_array()
    assert image.shape == (30, 30, 3)
    assert axes.images[0].origin == "lower"
    blue, orange = matplotlib.colors.to_rgb("C0"), matplotlib.colors.to_rgb("C1")

    def distance(pixels, color):
        return np.abs(pixels - np.array(color)).sum(-1).mean()

    left, right = image[:, 0], image[:, -1]
    assert distance(left, blue) < distance(left, orange)
    assert distance(right, orange) < distance(right, blue)
    low, high = axes.images[0].get_extent()[:2]
    span = POINTS[:, 0].max() - POINTS[:, 0].min()
    assert high - low == pytest.approx(1.6 * span.item(), rel=1e-5)
    for kind in ("epistemic", "aleatoric", "total", "least_confidence"):
        axes = plots.uncertainty_map(classifier, POINTS, labels, kind=kind, size=30)
        picture = axes.images[0]
        values = picture.get_array().mean(0)  # by column
        columns = np.linspace(low, high, 30)
        assert abs(columns[values.argmax()] - 0.5) < 0.25
        limit = 0.5 if kind == "least_confidence" else math.log(2)
        assert picture.get_clim() == pytest.approx((0.0, limit))


def vertical(x):
    """Depends on the second input only."""
    return torch.stack([torch.zeros(len(x)), 8 * (x[:, 1] - 0.5)], -1).log_softmax(-1)[None]


def test_rows_of_maps_are_the_second_input():
    axes = plots.decision_map(vertical, POINTS, torch.zeros(20, dtype=torch.long), size=30)
    image = axes.images[0].get_array()
    blue = np.array(matplotlib.colors.to_rgb("C0"))
    assert np.abs(image[0] - blue).sum() < np.abs(image[-1] - blue).sum()


BAD = {
    "no reliability": (lambda: plots.reliability({}), "got none"),
    "band": (lambda: plots.regression_band(rand(5), rand(3, 4)), r"particle, 5"),
    "band noise": (lambda: plots.regression_band(rand(5), rand(3, 5), rand(5)), "sd must be"),
    "band axes": (lambda: plots.regression_band(rand(5), rand(5)), "2 axes"),
    "three inputs": (lambda: plots.decision_map(classifier, rand(4, 3), LABELS[:4]), "two inputs"),
    "one particle": (
        lambda: plots.decision_map(lambda x: classifier(x)[0], POINTS, LABELS[:20]), "must give"
    ),
    "labels": (lambda: plots.uncertainty_map(classifier, POINTS, LABELS, size=5), r"\(20,\)"),
    "kind": (lambda: plots.uncertainty_map(classifier, POINTS, LABELS, kind="both"), "kind must"),
    "metric": (lambda: plots.corruption_curves(TABLE, "accuracy"), "no 'accuracy'"),
    "corruption": (lambda: plots.corruption_curves(TABLE, corruption="rain"), "'fog', 'snow'"),
    "gradients": (lambda: plots.input_gradients(rand(4)), "particle, height"),
    "too few axes": (
        lambda: plots.input_gradients(rand(2, 4, 4), axes=[plt.figure().subplots()]), "2 axes"
    ),
    "no square": (lambda: plots.kernel_matrix(rand(2, 3)), "particle, particle"),
    "no reliability but a tensor": (lambda: plots.reliability(rand(3)), "got Tensor"),
    "no reliability by name": (lambda: plots.reliability({"a": 3}), "needs a Reliability"),
    "no axes": (lambda: plots.kernel_matrix(torch.eye(2), axes=3), "axes of matplotlib.*int"),
    "NaN band": (lambda: plots.regression_band(rand(5), rand(3, 5) * math.nan), "15 are not"),
    "band data": (lambda: plots.regression_band(rand(5), rand(3, 5), data=rand(4)), "a pair"),
    "band data lengths": (
        lambda: plots.regression_band(rand(5), rand(3, 5), data=(rand(4), rand(3))), "4 and 3"
    ),
    "lines": (lambda: plots.regression_band(rand(5), rand(3, 5), lines=-1), "lines must be"),
    "noise text": (lambda: plots.regression_band(rand(5), rand(3, 5), "a"), "sd must be a number"),
    "label of no class": (
        lambda: plots.decision_map(classifier, POINTS, LABELS[:20] + 7, size=5), "between 0 and"
    ),
    "label list": (lambda: plots.decision_map(classifier, POINTS, [0] * 20, size=5), "got list"),
    "logits": (
        lambda: plots.decision_map(lambda x: classifier(x) + 1, POINTS, LABELS[:20]), "normalised"
    ),
    "one class": (
        lambda: plots.decision_map(lambda x: 0 * classifier(x)[..., :1], POINTS, LABELS[:20]),
        "at least 2 classes",
    ),
    "size": (lambda: plots.decision_map(classifier, POINTS, LABELS[:20], size=1), "at least 2"),
    "margin": (lambda: plots.decision_map(classifier, POINTS, LABELS[:20], margin="a"), "margin"),
    "no function": (lambda: plots.decision_map(POINTS, POINTS, LABELS[:20]), "a function"),
    "NaN points": (lambda: plots.decision_map(classifier, POINTS * math.nan, LABELS), "finite"),
    "vmax": (lambda: plots.uncertainty_map(classifier, POINTS, LABELS[:20], vmax=0), "vmax"),
    "no table": (lambda: plots.corruption_curves(3), "table must be.*got int"),
    "image": (lambda: plots.input_gradients(rand(2, 4, 4), rand(2, 4, 4)), "1 or 3 channels"),
    "no gradients": (lambda: plots.input_gradients(rand(0, 4, 4)), "some values"),
    "NaN kernel": (lambda: plots.kernel_matrix(torch.eye(3) * math.nan), "finite"),
    "other records": (lambda: plots.training([{"step": 1}]), "effective_particles"),
    "records": (lambda: plots.training(3), "lists of what"),
    "bins": (lambda: plots.ood_histograms(rand(3), rand(3), bins=0), "bins must be"),
    "outside list": (lambda: plots.ood_histograms(rand(3), [rand(3)]), "got list"),
    "no records": (lambda: plots.training([]), "got none"),
    "NaN scores": (lambda: plots.ood_histograms(rand(3), rand(3) * math.nan), "3 are not"),
    "no scores": (lambda: plots.ood_histograms(rand(0), rand(3)), "some values"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    wrong, pattern = BAD[case]
    with pytest.raises(ArgumentError, match=pattern):
        wrong()


def test_scores_may_be_integers():
    axes = plots.ood_histograms(torch.arange(4), torch.arange(3))
    assert axes.get_legend_handles_labels()[1] == ["test (mean 1.50)", "outside (mean 1.00)"]


def test_matplotlib_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'pyro-fordes\[plots\]'"):
        plots.kernel_matrix(torch.eye(2))
