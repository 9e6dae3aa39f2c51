r"""Base kernels between representations, and rules for their bandwidth.

Convention: a radial kernel is a function of the squared distance over a bandwidth :math:`h`
in squared units,

.. math:: \kappa(r, r') = \exp\left(-\frac{\lVert r - r' \rVert^2}{2h}\right),

and the kernel between two particles is the average over points (FoRDE, Eq. 11). Values and
gradients are closed forms; nothing of size particle x particle x point x feature is built, because
:math:`\nabla_r \kappa = \mathrm{slope} \cdot (r - r')` needs only matrix products.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import ArgumentError, check_choice, check_number
from pyro_fordes.particles import Schedule, at_step


class Bandwidth(Protocol):
    """A rule for the bandwidth, from all squared distances."""

    def __call__(
        self, distances: Float[Tensor, "point particle particle"], step: int
    ) -> Float[Tensor, "point #particle #particle"]:
        """Bandwidth per point (and second particle, where the rule has one per particle)."""
        ...


@dataclass(frozen=True)
class KernelMatrix:
    r"""A kernel evaluated between the local particles and all particles, point by point.

    Attributes:
        value: :math:`\kappa(r_{ib}, r_{jb})`.
        slope: the number for which :math:`\nabla_{r_{ib}} \kappa = \mathrm{slope}\,
            (r_{ib} - r_{jb})`.
        bandwidth: what the rule gave, broadcastable against the above.
        local: representation of the local particles.
        everyone: representation of all particles.
    """

    value: Float[Tensor, "point local particle"]
    slope: Float[Tensor, "point local particle"]
    bandwidth: Float[Tensor, "point #local #particle"]
    local: Float[Tensor, "local point feature"]
    everyone: Float[Tensor, "particle point feature"]

    @property
    def mean(self) -> Float[Tensor, "local particle"]:
        r"""Kernel between particles: :math:`k_{ij} = \frac1B \sum_b \kappa_{ijb}`."""
        return self.value.mean(0)

    def gradient_sum(
        self, weights: Float[Tensor, "#local #particle"]
    ) -> Float[Tensor, "local point feature"]:
        r"""Weighted sum of gradients by the first argument.

        .. math:: \sum_j w_{ij} \nabla_{r_{ib}} k(r_i, r_j) =
            \frac1B \sum_j w_{ij}\,\mathrm{slope}_{ijb} (r_{ib} - r_{jb})

        Args:
            weights: :math:`w_{ij}`.
        """
        slope = self.slope * (weights / len(self.slope))
        local, everyone = self.local.transpose(0, 1), self.everyone.transpose(0, 1)
        total = slope.sum(-1, keepdim=True) * local - slope @ everyone
        return total.transpose(0, 1)


def squared_distances(
    local: Float[Tensor, "local point feature"], everyone: Float[Tensor, "particle point feature"]
) -> Float[Tensor, "point local particle"]:
    r"""Squared Euclidean distances between representations, point by point.

    Uses :math:`|a|^2 + |b|^2 - 2ab`. Rows must have been centred over particles (as `RBF` does),
    else digits are lost by cancellation.

    Example:
        >>> squared_distances(torch.zeros(1, 1, 2), torch.ones(1, 1, 2))
        tensor([[[2.]]])
    """
    a, b = local.transpose(0, 1), everyone.transpose(0, 1)
    squares = (a * a).sum(-1).unsqueeze(-1) + (b * b).sum(-1).unsqueeze(-2)
    return torch.baddbmm(squares, a, b.mT, alpha=-2.0).clamp_min_(0.0)


def _middle(values: Tensor, ranks: tuple[int, int]) -> Tensor:
    """Mean of two order statistics (0-based ranks) along the last axis."""
    low, high = ranks
    lower = values.kthvalue(low + 1, dim=-1).values
    return lower if low == high else (lower + values.kthvalue(high + 1, dim=-1).values) / 2


@dataclass(frozen=True)
class Median:
    r"""Median heuristic: :math:`h = \mathrm{factor} \cdot m / (2 \log M)`.

    :math:`m` is the median of the squared distances, zeros of a particle to itself included and
    the mean of the two middle values where their number is even, and :math:`M` the number of
    particles; then :math:`\sum_j k_{ij} \approx 1 + M \cdot M^{-1}`. FoRDE (Section 3.4) takes the
    median over all pairs at each point. Its published code takes it over the first particle only,
    so that each second particle has its own bandwidth at each point and the kernel is not
    symmetric: ``per="particle"``. No gradient flows through the bandwidth.

    Where more than half of the distances are zero the median says nothing, and their mean takes
    its place; where all are zero, or there is one particle, the bandwidth is 1 (and no force acts).

    Args:
        per: ``"point"`` (the paper) or ``"particle"`` (its code).
        factor: a positive number, or a function of the step that gives one.

    Raises:
        ArgumentError: if an argument is out of range.

    Example:
        >>> distances = torch.tensor([[[0.0, 4.0], [4.0, 0.0]]])
        >>> Median()(distances, step=0) * 2 * math.log(2)
        tensor([[[2.]]])
    """

    per: str = "point"
    factor: Schedule = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_choice("Median(per=...)", self.per, ("point", "particle"))
        if not callable(self.factor):
            check_number("Median(factor=...)", self.factor, minimum=0.0, exclusive=True)

    def __call__(
        self, distances: Float[Tensor, "point particle particle"], step: int
    ) -> Float[Tensor, "point #particle #particle"]:
        """Bandwidth per point, or per point and second particle."""
        count = distances.shape[-1]
        if count == 1:
            return torch.ones_like(distances)
        factor = at_step("Median(factor=...)", self.factor, step, exclusive=True)
        if self.per == "particle":
            middle = _middle(distances.mT, ((count - 1) // 2, count // 2)).unsqueeze(-2)
            mean = distances.mean(-2, keepdim=True)
        else:
            middle = self._median_of_pairs(distances)[:, None, None]
            mean = distances.mean((-2, -1), keepdim=True)
        # Rounding leaves distances of this order between equal representations.
        noise = 16 * torch.finfo(distances.dtype).eps * distances.amax((-2, -1), keepdim=True)
        spread = torch.where(middle > noise, middle, mean)
        bandwidth = factor * spread / (2 * math.log(count))
        return torch.where(bandwidth > 0, bandwidth, torch.ones_like(bandwidth))

    @staticmethod
    def _median_of_pairs(
        distances: Float[Tensor, "point particle particle"],
    ) -> Float[Tensor, " point"]:
        """Median of the whole symmetric matrix from its upper triangle (half the work)."""
        count = distances.shape[-1]
        rows, columns = torch.triu_indices(count, count, offset=1, device=distances.device)
        pairs = distances[:, rows, columns]
        # In the sorted matrix the diagonal's zeros come first, then each pair twice.
        low, high = ((rank - count) // 2 for rank in ((count**2 - 1) // 2, count**2 // 2))
        if low < 0:  # two particles: a zero and the only pair are in the middle
            return pairs[:, 0] / 2
        return _middle(pairs, (low, high))


@dataclass(frozen=True)
class Fixed:
    """A bandwidth given by the user, in squared units of the representation.

    In weight space it is the variance of the kernel density estimate's components.

    Args:
        value: a positive number, or a function of the step that gives one.

    Raises:
        ArgumentError: if the value is not positive.

    Example:
        >>> Fixed(0.5)(torch.zeros(1, 3, 3), step=0)
        tensor([[[0.5000]]])
    """

    value: Schedule

    def __post_init__(self) -> None:
        """Check the argument."""
        if not callable(self.value):
            check_number("Fixed(value=...)", self.value, minimum=0.0, exclusive=True)

    def __call__(
        self, distances: Float[Tensor, "point particle particle"], step: int
    ) -> Float[Tensor, "point #particle #particle"]:
        """The value, as one bandwidth per point."""
        value = at_step("Fixed(value=...)", self.value, step, exclusive=True)
        return distances.new_full((len(distances), 1, 1), value)


@dataclass(frozen=True)
class RBF:
    r"""Gaussian kernel :math:`\exp(-\lVert r - r'\rVert^2 / (2h))`, averaged over points.

    Source: FoRDE (Trinh, Heinonen, Acerbi, Kaski, ICLR 2024), Eq. 9 to 11. Lengthscales belong to
    the space, which scales the representation.

    Args:
        space: where particles are compared, such as `Weights` or `InputGradients`.
        bandwidth: rule for :math:`h`; `Median` or `Fixed`.

    Raises:
        ArgumentError: if ``space`` or ``bandwidth`` is of the wrong kind.

    Example:
        >>> from pyro_fordes import Weights
        >>> kernel = RBF(Weights(), bandwidth=Fixed(0.5))
        >>> r = torch.tensor([[[0.0]], [[1.0]]])
        >>> kernel.evaluate(r, r, step=0).mean
        tensor([[1.0000, 0.3679],
                [0.3679, 1.0000]])
    """

    space: Any
    bandwidth: Bandwidth = field(default_factory=Median)

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not hasattr(self.space, "represent"):
            raise ArgumentError(
                f"RBF(space=...) must be a space such as Weights() or InputGradients(), got "
                f"{self.space!r}"
            )
        if not callable(self.bandwidth):
            raise ArgumentError(
                f"RBF(bandwidth=...) must be a rule such as Median() or Fixed(0.5), got "
                f"{self.bandwidth!r}"
            )

    def evaluate(
        self,
        local: Float[Tensor, "local point feature"],
        everyone: Float[Tensor, "particle point feature"],
        step: int,
    ) -> KernelMatrix:
        """Kernel between the local and all particles.

        Args:
            local: representation of the particles of this process.
            everyone: representation of all particles; the same object where that is one process.
            step: the step, for schedules.

        Returns:
            Value and slope per point, local particle and particle.
        """
        alone = local is everyone
        centre = everyone.mean(0, keepdim=True)
        everyone = everyone - centre
        local = everyone if alone else local - centre
        distances = squared_distances(everyone, everyone)
        distances.diagonal(dim1=-2, dim2=-1).zero_()
        bandwidth = self.bandwidth(distances, step)
        if not alone:
            distances = squared_distances(local, everyone)
        value = torch.exp(distances / (-2 * bandwidth))
        return KernelMatrix(value, value / -bandwidth, bandwidth, local, everyone)
