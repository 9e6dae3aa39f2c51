"""Pictures of predictions on one or two inputs."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_fordes._checks import (
    ArgumentError,
    check_choice,
    check_number,
    check_positive_int,
    describe,
    require,
)
from pyro_fordes.metrics._inputs import check_log_probs
from pyro_fordes.metrics.uncertainty import uncertainty
from pyro_fordes.plots._parts import LABELS, check_shape, new_axes, to_array


def regression_band(
    x: Tensor,
    predictions: Tensor,
    sd: Tensor | float | None = None,
    *,
    data: tuple[Tensor, Tensor] | None = None,
    lines: int = 5,
    title: str = "Predictions of the particles",
    axes: Any = None,
) -> Any:
    """Predictive band of a regression on one input.

    Args:
        x: inputs, ``(point,)``.
        predictions: functions of the particles, ``(particle, point)``.
        sd: standard deviation of the noise, ``(particle, point)`` or a number; the outer band then
            includes it.
        data: observed inputs and outputs.
        lines: how many particles are drawn as lines.
        title: of the axes.
        axes: where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ArgumentError: if shapes do not fit.
        MissingDependencyError: if matplotlib is not installed.
    """
    check_shape("x", x, 1)
    check_shape("predictions", predictions, 2)
    if predictions.shape[1] != len(x):
        raise ArgumentError(
            f"predictions must be (particle, {len(x)}) to fit x, got {describe(predictions)}"
        )
    if isinstance(lines, bool) or not isinstance(lines, int) or lines < 0:
        raise ArgumentError(f"lines must be an integer of at least 0, got {lines!r}")
    noise = None if sd is None else _noise(sd, predictions)
    if data is not None:
        _check_data(data)
    axes = new_axes(axes, (6.4, 4.0))
    order = x.argsort()
    x, predictions = x[order], predictions[:, order]
    mean, variance = predictions.mean(0), predictions.var(0, correction=0)
    places = to_array(x)

    def band(deviation: Tensor, alpha: float, label: str) -> None:
        low, high = to_array(mean - 2 * deviation), to_array(mean + 2 * deviation)
        axes.fill_between(places, low, high, color="C0", alpha=alpha, linewidth=0, label=label)

    if noise is not None:
        total = (variance + noise[:, order].square().mean(0)).sqrt()
        band(total, 0.18, "± 2 sd with noise")
    band(variance.sqrt(), 0.35, "± 2 sd of the particles")
    for function in predictions[:lines]:
        axes.plot(places, to_array(function), color="C0", linewidth=0.6, alpha=0.8)
    axes.plot(places, to_array(mean), color="C0", linewidth=1.8, label="mean")
    if data is not None:
        axes.plot(*map(to_array, data), ".", color="C3", markersize=4, label="data")
    axes.set(title=title, xlabel="input x", ylabel="output y", xlim=(places[0], places[-1]))
    axes.legend(frameon=False, ncols=2, fontsize="small")
    return axes


def decision_map(
    log_probs: Callable[[Tensor], Tensor],
    points: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.3,
    size: int = 120,
    title: str = "Most probable class and each particle's boundary",
    axes: Any = None,
) -> Any:
    """Classes of a classifier on two inputs, and where the particles put the boundaries.

    The fainter the colour, the lower the mean probability of the class. Thin lines are the
    boundaries of single particles (of the first class against the others where there are several).

    Args:
        log_probs: gives log probabilities ``(particle, point, class)`` at inputs ``(point, 2)``,
            such as ``lambda x: ParticlePredictive(inference).parameters(x)["y"]["logits"]``.
        points: observed inputs, ``(point, 2)``.
        labels: their classes, ``(point,)``.
        margin: how far the map goes beyond the points, in units of their range.
        size: rows and columns of the map.
        title: of the axes.
        axes: where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ArgumentError: if shapes do not fit.
        MissingDependencyError: if matplotlib is not installed.
    """
    grid = _Grid(points, margin, size)
    values = grid.evaluate(log_probs)
    axes = new_axes(axes, (5.4, 4.6))
    probs = values.exp().mean(0)
    classes = probs.shape[-1]
    colors = require("matplotlib.colors")
    shades = torch.tensor([colors.to_rgb(f"C{number % 10}") for number in range(classes)])
    highest, chosen = probs.max(-1)
    strength = ((highest - 1 / classes) / (1 - 1 / classes)).unsqueeze(-1).cpu() * 0.7
    image = 1 - strength * (1 - shades[chosen.cpu()])
    axes.imshow(
        to_array(grid.image(image)), extent=grid.extent, origin="lower", aspect="auto", zorder=0
    )
    first = values[..., 0] - values[..., 1:].logsumexp(-1)
    for particle in first:
        axes.contour(
            *grid.ticks, to_array(grid.image(particle)), [0.0], colors="0.25", linewidths=0.5
        )
    _scatter(axes, points, labels, classes)
    axes.plot([], [], color="0.25", linewidth=0.5, label="a particle's boundary")
    axes.set(title=title, xlabel="input 1", ylabel="input 2")
    axes.legend(frameon=True, framealpha=0.8, fontsize="small", loc="upper right")
    return axes


def uncertainty_map(
    log_probs: Callable[[Tensor], Tensor],
    points: Tensor,
    labels: Tensor,
    *,
    kind: str = "epistemic",
    vmax: float | None = None,
    margin: float = 0.3,
    size: int = 120,
    title: str = "",
    axes: Any = None,
) -> Any:
    """How uncertain a classifier on two inputs is.

    Args:
        log_probs: gives log probabilities ``(particle, point, class)`` at inputs ``(point, 2)``.
        points: observed inputs, ``(point, 2)``.
        labels: their classes, ``(point,)``.
        kind: ``"epistemic"``, ``"aleatoric"``, ``"total"`` or ``"least_confidence"``, as in
            `metrics.Uncertainty`.
        vmax: where the colours end; None for the largest value that is possible, so that maps of
            several methods can be compared.
        margin: how far the map goes beyond the points, in units of their range.
        size: rows and columns of the map.
        title: of the axes; empty for one that names the kind.
        axes: where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ArgumentError: if shapes do not fit or there is no such kind.
        MissingDependencyError: if matplotlib is not installed.
    """
    check_choice("kind", kind, ("epistemic", "aleatoric", "total", "least_confidence"))
    if vmax is not None:
        check_number("vmax", vmax, minimum=0.0, exclusive=True)
    grid = _Grid(points, margin, size)
    values = grid.evaluate(log_probs)
    classes = values.shape[-1]
    largest = 1 - 1 / classes if kind == "least_confidence" else math.log(classes)
    axes = new_axes(axes, (5.8, 4.6))
    picture = axes.imshow(
        to_array(grid.image(getattr(uncertainty(values), kind))),
        extent=grid.extent,
        origin="lower",
        aspect="auto",
        cmap="viridis",
        vmin=0.0,
        vmax=largest if vmax is None else vmax,
    )
    axes.figure.colorbar(picture, ax=axes, label=LABELS[kind])
    _scatter(axes, points, labels, classes, edge="white")
    names = {"least_confidence": "Least confidence"}
    name = names.get(kind, f"{kind.capitalize()} uncertainty")
    axes.set(title=title or name, xlabel="input 1", ylabel="input 2")
    axes.legend(frameon=True, framealpha=0.8, fontsize="small", loc="upper right")
    return axes


# ---------------------------------------------------------------- parts


def _noise(sd: Any, predictions: Tensor) -> Tensor:
    """Standard deviations of the noise, of the shape of the predictions."""
    if not isinstance(sd, Tensor):
        sd = torch.tensor(check_number("sd", sd))
    if sd.dim() and sd.shape != predictions.shape:
        raise ArgumentError(
            f"sd must be a number or of the shape of predictions, {tuple(predictions.shape)}, "
            f"got {describe(sd)}"
        )
    check_shape("sd", sd, sd.dim())
    return sd.to(predictions).expand_as(predictions)


def _check_data(data: Any) -> None:
    """Observed inputs and outputs must be two tensors of one length."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise ArgumentError("data must be a pair of tensors, inputs and outputs")
    for name, values in zip(("inputs in data", "outputs in data"), data, strict=True):
        check_shape(name, values, 1)
    if len(data[0]) != len(data[1]):
        raise ArgumentError(f"data must have as many inputs as outputs, got {len(data[0])} and "
                            f"{len(data[1])}")  # fmt: skip


class _Grid:
    """A grid of inputs around some points."""

    def __init__(self, points: Tensor, margin: float, size: int) -> None:
        check_shape("points", points, 2)
        check_number("margin", margin, minimum=0.0)
        if check_positive_int("size", size) < 2:
            raise ArgumentError("size must be at least 2, got 1")
        if points.shape[1] != 2:
            raise ArgumentError(f"points must have two inputs, (point, 2), got {describe(points)}")
        low, high = points.min(0).values, points.max(0).values
        low, high = low - margin * (high - low), high + margin * (high - low)
        columns, rows = (
            torch.linspace(float(a), float(b), size, dtype=points.dtype, device=points.device)
            for a, b in zip(low, high, strict=True)
        )
        self.size = size
        self.ticks = to_array(columns), to_array(rows)
        self.extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
        self.points = torch.cartesian_prod(rows, columns).flip(1)

    def evaluate(self, log_probs: Callable[[Tensor], Tensor]) -> Tensor:
        """Log probabilities on the grid."""
        if not callable(log_probs):
            raise ArgumentError(
                f"log_probs must be a function of inputs (point, 2), got {type(log_probs).__name__}"
            )
        values = log_probs(self.points)
        wanted = f"(particle, {len(self.points)}, class)"
        if not isinstance(values, Tensor) or values.dim() != 3:
            got = describe(values) if isinstance(values, Tensor) else type(values).__name__
            raise ArgumentError(f"log_probs must give {wanted}, got {got}")
        if values.shape[1] != len(self.points):
            raise ArgumentError(f"log_probs must give {wanted}, got {describe(values)}")
        values = check_log_probs(values.detach())
        if values.shape[2] < 2:
            raise ArgumentError("log_probs must be of at least 2 classes, got 1")
        return values

    def image(self, values: Tensor) -> Tensor:
        """Values of the points as rows and columns."""
        return values.reshape(self.size, self.size, *values.shape[1:])


def _scatter(axes: Any, points: Tensor, labels: Tensor, classes: int, edge: str = "black") -> None:
    """Observed points, by class."""
    if not isinstance(labels, Tensor) or labels.shape != points.shape[:1]:
        got = describe(labels) if isinstance(labels, Tensor) else type(labels).__name__
        raise ArgumentError(f"labels must be a tensor ({len(points)},), got {got}")
    if not torch.isin(labels, torch.arange(classes, device=labels.device).to(labels)).all():
        raise ArgumentError(f"labels must be integers between 0 and {classes - 1}, as log_probs "
                            f"has {classes} classes")  # fmt: skip
    for number in range(classes):
        chosen = points[labels == number]
        axes.scatter(*to_array(chosen).T, s=14, color=f"C{number % 10}", edgecolors=edge,
                     linewidths=0.5, label=f"class {number}")  # fmt: skip
