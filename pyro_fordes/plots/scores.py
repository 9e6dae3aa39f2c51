"""Pictures of calibration, robustness and detection, from evaluations."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_fordes._checks import ArgumentError, check_positive_int
from pyro_fordes.metrics.classification import Reliability
from pyro_fordes.plots._parts import LABELS, check_shape, new_axes, to_array
from pyro_fordes.tables import Table

_MARKERS = "osD^vP*X"


def reliability(
    found: Reliability | Mapping[str, Reliability],
    *,
    title: str = "Reliability of the most probable class",
    axes: Any = None,
) -> Any:
    """Accuracy by confidence, for one method or several.

    Points above the diagonal are underconfident, points below overconfident; their area is the
    share of predictions in the bin.

    Source: Niculescu-Mizil & Caruana, Predicting Good Probabilities With Supervised Learning, 2005.

    Args:
        found: what `metrics.reliability` or ``Evaluation.reliability`` gives; several by name.
        title: of the axes.
        axes: where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ArgumentError: if nothing is given.
        MissingDependencyError: if matplotlib is not installed.
    """
    several = {"": found} if isinstance(found, Reliability) else found
    if (
        not isinstance(several, Mapping)
        or not several
        or not all(isinstance(one, Reliability) for one in several.values())
    ):
        got = several if isinstance(several, Mapping) and not several else type(found).__name__
        raise ArgumentError("reliability(...) needs a Reliability, or several by name; "
                            f"got {got or 'none'}")  # fmt: skip
    axes = new_axes(axes, (5.0, 4.6))
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="calibrated")
    for number, (name, bins) in enumerate(several.items()):
        share = bins.points / bins.points.sum()
        error = float(((bins.confidence - bins.accuracy).abs() * share).sum())
        label = f"{name} (ECE {error:.3f})".strip()
        color = f"C{number}"
        x, y = to_array(bins.confidence), to_array(bins.accuracy)
        axes.plot(x, y, color=color, linewidth=1.2, alpha=0.8)
        axes.scatter(x, y, s=to_array(12 + 250 * share), color=color, alpha=0.7, linewidths=0)
        axes.plot([], [], color=color, marker="o", linewidth=1.2, label=label)
    axes.set(xlim=(0, 1.01), ylim=(0, 1.01), title=title)
    axes.set_xlabel("confidence (largest mean probability)")
    axes.set_ylabel("accuracy (share of the bin)")
    axes.set_aspect("equal")
    axes.legend(frameon=False, loc="upper left", fontsize="small")
    return axes


def corruption_curves(
    table: Table,
    metric: str = "nll",
    *,
    corruption: str = "corrupted",
    clean: str = "",
    title: str = "",
    axes: Any = None,
) -> Any:
    """A metric by severity of the corruption, one curve per method, with intervals.

    Args:
        table: what `compare` gives, or the ``table`` of an `Evaluation`.
        metric: which metric.
        corruption: which one; ``"corrupted"`` for the mean of all.
        clean: name of the data that severity 0 shows; empty for the first.
        title: of the axes; empty for one that names the corruption.
        axes: where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ArgumentError: if the table has no such metric, corruption or data.
        MissingDependencyError: if matplotlib is not installed.
    """
    if not isinstance(table, Table):
        raise ArgumentError(
            f"table must be what compare(...) gives, or an evaluation's .table, got "
            f"{type(table).__name__}"
        )
    rows = [
        row
        for row in table.select(metric=metric).rows()
        if row["data"] == corruption and row["severity"] is not None
    ]
    if not rows:
        found = sorted({row["data"] for row in table.rows() if row["severity"]})
        raise ArgumentError(
            f"the table has no {metric!r} of {corruption!r} by severity; it has corruptions "
            f"{found} and metrics {sorted(set(table['metric']))}"
        )
    at_zero = table.select(metric=metric, severity=0).rows()
    clean = clean or (at_zero[0]["data"] if at_zero else "")
    rows = [row for row in at_zero if row["data"] == clean] + rows
    axes = new_axes(axes, (6.0, 4.2))
    methods = list(dict.fromkeys(row.get("method", "") for row in rows))
    for number, method in enumerate(methods):
        curve = sorted(
            (row["severity"], row["value"], row["low"], row["high"])
            for row in rows
            if row.get("method", "") == method
        )
        severity, value, low, high = map(list, zip(*curve, strict=True))
        marker = _MARKERS[number % len(_MARKERS)]
        axes.fill_between(severity, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
        axes.plot(
            severity, value, color=f"C{number}", marker=marker, markersize=4, label=method or metric
        )
    axes.set_xticks(sorted({row["severity"] for row in rows}))
    axes.set_xlabel(f"severity (0: {clean})" if clean else "severity")
    axes.set_ylabel(LABELS.get(metric, metric))
    named = "mean over corruptions" if corruption == "corrupted" else corruption.replace("_", " ")
    short = {"accuracy": "Accuracy", "brier": "Brier score"}.get(metric, metric.upper())
    axes.set_title(title or f"{short} by severity, {named}")
    axes.text(0.99, 0.02, f"bands: {table.level:.0%} intervals over points", fontsize="x-small",
              color="0.4", ha="right", transform=axes.transAxes)  # fmt: skip
    axes.legend(frameon=False)
    return axes


def ood_histograms(
    inside: Tensor,
    outside: Tensor | Mapping[str, Tensor],
    *,
    score: str = "entropy",
    name: str = "test",
    bins: int = 40,
    title: str = "Uncertainty inside and outside the distribution",
    axes: Any = None,
) -> Any:
    """Histograms of a score on data inside and outside the training distribution.

    Args:
        inside: scores of points like the training data, ``(point,)``, such as
            ``evaluation.scores["clean", 0]["entropy"]``.
        outside: scores of other points; several by name.
        score: what the scores are, for the axis.
        name: of the inside points.
        bins: how many.
        title: of the axes.
        axes: where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ArgumentError: if there are no scores or they are not finite.
        MissingDependencyError: if matplotlib is not installed.
    """
    several = {"outside": outside} if isinstance(outside, Tensor) else outside
    if not isinstance(several, Mapping):
        raise ArgumentError(
            f"outside must be a tensor, or several by name, got {type(outside).__name__}"
        )
    check_positive_int("bins", bins)
    sets = [(name, inside), *several.items()]
    for which, values in sets:
        check_shape(f"scores of {which!r}", values, 1)
    low = min(float(values.min()) for _, values in sets)
    high = max(float(values.max()) for _, values in sets)
    high = high if high > low else low + 1.0
    axes = new_axes(axes, (6.0, 4.0))
    for number, (which, values) in enumerate(sets):
        heights = torch.histc(values.detach().double().cpu(), bins, low, high) / len(values)
        edges = torch.linspace(low, high, bins + 1)
        axes.stairs(to_array(heights), to_array(edges), fill=True, color=f"C{number}", alpha=0.3)
        label = f"{which} (mean {float(values.double().mean()):.2f})"
        axes.stairs(
            to_array(heights), to_array(edges), color=f"C{number}", linewidth=1.3, label=label
        )
    axes.set(title=title, xlabel=LABELS.get(score, score), ylabel="share of points per bin")
    axes.legend(frameon=False)
    return axes
