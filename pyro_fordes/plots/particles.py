"""Pictures of how particles differ, and of what keeps them apart while they train."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import ArgumentError, describe, require
from pyro_fordes.plots._parts import check_axes, check_shape, new_axes, to_array


def input_gradients(
    gradients: Tensor,
    image: Tensor | None = None,
    *,
    name: str = "",
    title: str = "What each particle's output depends on",
    axes: Sequence[Any] | None = None,
) -> Any:
    """Input gradients of the particles at one image, side by side.

    Args:
        gradients: ``(particle, height, width)`` or ``(particle, channel, height, width)``, whose
            channels are averaged. `ParticleInference.representation` gives them flat.
        image: the image, ``(height, width)`` or ``(channel, height, width)``; shown first.
        name: of the method, at the left.
        title: of the whole row; empty for none.
        axes: one for each picture; None for a new figure.

    Returns:
        The axes, an array.

    Raises:
        ArgumentError: if shapes do not fit, or there are not as many axes as pictures.
        MissingDependencyError: if matplotlib is not installed.
    """
    if not isinstance(gradients, Tensor) or gradients.dim() not in (3, 4):
        got = describe(gradients) if isinstance(gradients, Tensor) else type(gradients).__name__
        raise ArgumentError(f"gradients must be (particle, height, width) or (particle, channel, "
                            f"height, width), got {got}")  # fmt: skip
    check_shape("gradients", gradients, gradients.dim())
    if image is not None:
        _check_image(image)
    if gradients.dim() == 4:
        gradients = gradients.mean(1)
    count = len(gradients) + (image is not None)
    fresh = axes is None
    if fresh:
        plt = require("matplotlib.pyplot")
        size = (1.35 * count + 0.9, 2.3)
        figure, axes = plt.subplots(1, count, figsize=size, layout="compressed", squeeze=False)
        axes = axes[0]
    cells = check_axes(axes, count)
    shown = cells
    if image is not None:
        picture = image.movedim(0, -1).squeeze(-1) if image.dim() == 3 else image
        cells[0].imshow(to_array(picture), cmap="gray")
        cells[0].set_title("image", fontsize="small")
        shown = cells[1:]
    limit = max(gradients.abs().max().item(), 1e-30)
    options = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    for number, (cell, gradient) in enumerate(zip(shown, gradients, strict=True)):
        picture = cell.imshow(to_array(gradient), **options)
        cell.set_title(f"particle {number + 1}", fontsize="small")
    for cell in cells:
        cell.set(xticks=[], yticks=[])
    cells[0].set_ylabel(_with_cosine(name, gradients), fontsize="small")
    if fresh:
        figure.colorbar(picture, ax=cells, label="gradient", shrink=0.7)
        if title:
            figure.suptitle(title, fontsize="medium")
    return axes


def kernel_matrix(
    matrix: Tensor, *, title: str = "Kernel between particles", axes: Any = None
) -> Any:
    """The kernel between particles as a picture, with its numbers where they can be read.

    Args:
        matrix: ``(particle, particle)``, such as
            ``inference.kernel.evaluate(inference.representation(x, y)).mean``.
        title: of the axes.
        axes: where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ArgumentError: if it is no square matrix.
        MissingDependencyError: if matplotlib is not installed.
    """
    check_shape("matrix", matrix, 2)
    count = len(matrix)
    if matrix.shape[1] != count:
        raise ArgumentError(f"matrix must be (particle, particle), got {describe(matrix)}")
    axes = new_axes(axes, (5.0, 4.2))
    values = to_array(matrix)
    picture = axes.imshow(values, cmap="viridis", vmin=0.0, vmax=max(1.0, float(values.max())))
    axes.figure.colorbar(picture, ax=axes, label="kernel (1: the same)")
    if count <= 12:
        for row in range(count):
            for column in range(count):
                dark = values[row, column] < 0.6
                axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center",
                          color="white" if dark else "black", fontsize=8)  # fmt: skip
        ticks = range(count)
        axes.set_xticks(ticks, [str(tick + 1) for tick in ticks])
        axes.set_yticks(ticks, [str(tick + 1) for tick in ticks])
    effective = count**2 / values.sum()
    axes.set(title=f"{title}\n{effective:.2f} effective of {count}")
    axes.set(xlabel="particle", ylabel="particle")
    return axes


def training(
    records: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    title: str = "Repulsion over training",
    axes: Sequence[Any] | None = None,
) -> Any:
    """Force ratio and effective particles over training, one above the other.

    Args:
        records: what `ParticleInference.diagnostics` gave while training, for one run or several by
            name. A callback keeps it: ``lambda inference, step, loss:
            records.append(inference.diagnostics())``. Steps that were not measured repeat the last
            one, and are drawn once.
        title: of the upper axes.
        axes: two of them; None for a new figure.

    Returns:
        The two axes.

    Raises:
        ArgumentError: if nothing was recorded.
        MissingDependencyError: if matplotlib is not installed.
    """
    runs = dict(records) if isinstance(records, Mapping) else {"": records}
    for run in runs.values():
        _check_records(run)
    if not runs or not all(len(run) for run in runs.values()):
        raise ArgumentError("training(...) needs records of inference.diagnostics(); got none")
    if axes is None:
        plt = require("matplotlib.pyplot")
        _, axes = plt.subplots(2, 1, figsize=(6.4, 5.0), sharex=True, layout="constrained")
    upper, lower = check_axes(axes, 2)
    largest = 1
    for number, (name, run) in enumerate(runs.items()):
        measured = {record["step"]: record for record in run}
        steps = sorted(measured)
        style = {"color": f"C{number}", "label": name or None, "linewidth": 1.3}
        if len(steps) == 1:
            style["marker"] = "o"
        upper.plot(steps, [measured[step]["force_ratio"] for step in steps], **style)
        lower.plot(steps, [measured[step]["effective_particles"] for step in steps], **style)
        largest = max(largest, *(len(record["log_joint"]) for record in measured.values()))
    upper.axhline(1.0, color="0.6", linestyle="--", linewidth=0.8, label="balance")
    upper.set_yscale("log")
    upper.set(title=title, ylabel="force ratio\n(repulsive / driving)")
    lower.axhline(largest, color="0.6", linestyle="--", linewidth=0.8, label="all particles")
    lower.set(xlabel="step", ylabel="effective particles")
    lower.set_ylim(0.9, largest + 0.4)
    for cell in (upper, lower):
        cell.legend(frameon=False, fontsize="small")
    return axes


def _check_image(image: Any) -> None:
    """An image must be (height, width), or have 1, 3 or 4 channels first."""
    fits = isinstance(image, Tensor) and (
        image.dim() == 2 or (image.dim() == 3 and len(image) in (1, 3, 4))
    )
    if not fits:
        got = describe(image) if isinstance(image, Tensor) else type(image).__name__
        raise ArgumentError(
            f"image must be (height, width) or (channel, height, width) with 1 or 3 channels, got "
            f"{got}"
        )
    check_shape("image", image, image.dim())


def _check_records(run: Any) -> None:
    """Records of a run must be what ``diagnostics`` gives."""
    wanted = ("step", "force_ratio", "effective_particles", "log_joint")
    if not isinstance(run, Sequence) or not all(
        isinstance(record, Mapping) and all(name in record for name in wanted) for record in run
    ):
        raise ArgumentError(
            f"training(...) needs lists of what inference.diagnostics() gave, mappings with "
            f"{list(wanted)}"
        )


def _with_cosine(name: str, gradients: Float[Tensor, "particle height width"]) -> str:
    """A method's name with the mean cosine between its particles' gradients."""
    if len(gradients) < 2:
        return name
    unit = torch.nn.functional.normalize(gradients.flatten(1), dim=1)
    others = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    return f"{name}\nmean cosine {float((unit @ unit.T)[others].mean()):.2f}".strip()
