"""Particles compared where some have no finite representation, which the others must not see."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_fordes.kernels import Kernel
from pyro_fordes.transports import Repulsion, Transport


def finite_particles(*parts: Tensor | None) -> Bool[Tensor, " particle"]:
    """Whether all that belongs to a particle, in some ``(particle, point, feature)``, is finite."""
    fine = [part.sum((1, 2)).isfinite() for part in parts if part is not None]
    return torch.stack(fine).all(0)


def repel_finite(
    transport: Transport,
    kernel: Kernel,
    everyone: Float[Tensor, "particle point feature"],
    rows: slice,
    step: int,
    *,
    finite: Bool[Tensor, " particle"],
    scores: Float[Tensor, "particle point feature"] | None = None,
    pooled: bool = True,
    static: bool = False,
) -> Repulsion:
    """``transport.repel`` without the particles that are not finite.

    Where shapes may follow from values, the others are compared as if these did not exist. Where
    they may not (on a GPU one would have to wait for the device, and a traced graph cannot ask),
    the first finite particle stands in for each that is not, so that it counts twice.

    Args:
        transport: the update rule.
        kernel: the base kernel.
        everyone: representation of all particles.
        rows: which of them are the local ones.
        step: the step, for schedules.
        finite: which of all particles are to be compared.
        scores: gradient of the log joint by the representation, of all particles.
        pooled: whether points are averaged to one kernel, or have one each.
        static: whether shapes must not follow from values.

    Returns:
        The repulsion, zero for particles that were left out.

    Example:
        >>> from pyro_fordes import WGD, RBF, Fixed, Weights
        >>> r = torch.tensor([[[0.0]], [[float("nan")]], [[1.0]]])
        >>> repel_finite(
        ...     WGD(), RBF(Weights(), Fixed(0.5)), r, slice(None), 0, finite=finite_particles(r)
        ... ).velocity.flatten()
        tensor([-0.5379,  0.0000,  0.5379])
    """

    def repel(everyone: Tensor, scores: Tensor | None) -> Repulsion:
        return transport.repel(kernel, everyone, rows, step, scores=scores, pooled=pooled)

    if not static and rows == slice(None):
        if finite.all():
            return repel(everyone, scores)
        if finite.any():
            kept = finite.nonzero().squeeze(1)
            return _scattered(
                repel(everyone[kept], None if scores is None else scores[kept]),
                kept,
                len(everyone),
            )
    stand_in = finite.to(torch.uint8).argmax()
    found = repel(
        _replaced(everyone, finite, stand_in),
        None if scores is None else _replaced(scores, finite, stand_in),
    )
    return replace(found, finite=finite[rows])


def _replaced(tensor: Tensor, finite: Tensor, stand_in: Tensor) -> Tensor:
    """Rows that are not finite replaced by another; zeros where there is none."""
    row = tensor.index_select(0, stand_in.reshape(1)).nan_to_num(0.0, 0.0, 0.0)
    return torch.where(finite.reshape(-1, 1, 1), tensor, row)


def _scattered(found: Repulsion, kept: Tensor, count: int) -> Repulsion:
    """What some particles got, with zeros for the others."""

    def scatter(part: Tensor) -> Tensor:
        return part.new_zeros(count, *part.shape[1:]).index_copy(0, kept, part)

    finite = torch.zeros(count, dtype=torch.bool, device=kept.device)
    return replace(
        found,
        velocity=scatter(found.velocity),
        driving=None if found.driving is None else scatter(found.driving),
        finite=finite.index_fill(0, kept, True),
        kept=kept,
    )
