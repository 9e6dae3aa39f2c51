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

from pyro_fordes._checks import ArgumentError, check_choice, check_number, check_part
from pyro_fordes.particles import Schedule, at_step


class Bandwidth(Protocol):
    """A rule for the bandwidth, from all squared distances."""

    def __call__(
        self, distances: Float[Tensor, "point particle particle"], step: int
    ) -> Float[Tensor, "point 1 #particle"]:
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
        rows: which of all particles are the local ones.
        everyone: representation of all particles, centred.
        pooled: whether points are averaged to one kernel between particles; if not, each point is a
            kernel of its own (one per coordinate in weight space, for instance).
    """

    value: Float[Tensor, "point local particle"]
    slope: Float[Tensor, "point local particle"]
    bandwidth: Float[Tensor, "point 1 #particle"]
    rows: slice
    everyone: Float[Tensor, "particle point feature"]
    pooled: bool = True

    @property
    def between(self) -> Float[Tensor, "group local particle"]:
        """Kernels between particles: one, or one per point where points are not pooled."""
        return self.value.mean(0, keepdim=True) if self.pooled else self.value

    @property
    def symmetric(self) -> bool:
        """Whether the bandwidth is the same for both particles of a pair."""
        return self.bandwidth.shape[-1] == 1

    @property
    def mean(self) -> Float[Tensor, "local particle"]:
        r"""Kernel between particles: :math:`k_{ij} = \frac1B \sum_b \kappa_{ijb}`."""
        return self.value.mean(0)

    def laplacian(
        self, weights: Float[Tensor, "#group #local #particle"]
    ) -> Float[Tensor, "point local particle"]:
        """Matrix :math:`L_b` with which `gradient_sum` is :math:`L_b r_b`, point by point.

        Small, so what is to be done to every particle's sum is best done to this.
        """
        slope = self.slope * (weights / len(self.slope) if self.pooled else weights)
        # The graph Laplacian of the slopes, so that one product does it all.
        laplacian = -slope
        own = laplacian[..., self.rows].diagonal(dim1=-2, dim2=-1)
        own += slope.sum(-1)
        return laplacian

    def gradient_sum(
        self, weights: Float[Tensor, "#group #local #particle"]
    ) -> Float[Tensor, "local point feature"]:
        r"""Weighted sum of gradients by the first argument.

        .. math:: \sum_j w_{ij} \nabla_{r_{ib}} k(r_i, r_j) =
            \frac1B \sum_j w_{ij}\,\mathrm{slope}_{ijb} (r_{ib} - r_{jb})

        Args:
            weights: :math:`w_{ij}`, for each kernel of `between` where there are several.
        """
        return self.product(self.laplacian(weights))

    def product(
        self, matrix: Float[Tensor, "point local particle"]
    ) -> Float[Tensor, "local point feature"]:
        """A matrix per point times the representations there."""
        return (matrix @ self.everyone.transpose(0, 1)).transpose(0, 1)


class Kernel(Protocol):
    """A base kernel with the space in which it compares particles."""

    @property
    def space(self) -> Any:
        """Where particles are compared."""
        ...

    def evaluate(
        self,
        everyone: Float[Tensor, "particle point feature"],
        rows: slice = slice(None),
        step: int = 0,
        *,
        pooled: bool = True,
    ) -> KernelMatrix:
        """Kernel between the local particles (``rows``) and all particles."""
        ...


def squared_distances(
    everyone: Float[Tensor, "particle point feature"],
) -> Float[Tensor, "point particle particle"]:
    r"""Squared Euclidean distances between representations, point by point.

    Uses :math:`|a|^2 + |b|^2 - 2ab`. Rows must have been centred over particles (as `RBF` does),
    else digits are lost by cancellation.

    Example:
        >>> squared_distances(torch.tensor([[[-1.0]], [[1.0]]]))
        tensor([[[0., 4.],
                 [4., 0.]]])
    """
    r = everyone.transpose(0, 1)
    squares = torch.linalg.vecdot(r, r)
    sums = squares.unsqueeze(-1) + squares.unsqueeze(-2)
    distances = torch.baddbmm(sums, r, r.mT, alpha=-2.0).clamp_min_(0.0)
    distances.diagonal(dim1=-2, dim2=-1).zero_()
    return distances


def _middle(values: Tensor, ranks: tuple[int, int]) -> Tensor:
    """Mean of two order statistics (0-based ranks) along the last axis."""
    low, high = ranks
    # Selecting twice is faster than sorting, and than kthvalue, which selects one at a time.
    smallest = values.topk(high + 1, dim=-1, largest=False, sorted=False).values
    return smallest.topk(high - low + 1, dim=-1, sorted=False).values.mean(-1)


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
    ) -> Float[Tensor, "point 1 #particle"]:
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
        pairs = distances.flatten(1).index_select(1, rows * count + columns)
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
    ) -> Float[Tensor, "point 1 #particle"]:
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
        >>> kernel.evaluate(r).mean
        tensor([[1.0000, 0.3679],
                [0.3679, 1.0000]])
    """

    space: Any
    bandwidth: Bandwidth = field(default_factory=Median)

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_parts("RBF", self.space, self.bandwidth)

    def profile(self, distances: Tensor, bandwidth: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope at squared distances (the slope is twice the derivative by them)."""
        value = torch.exp(distances / (-2 * bandwidth))
        return value, value / -bandwidth

    def evaluate(
        self,
        everyone: Float[Tensor, "particle point feature"],
        rows: slice = slice(None),
        step: int = 0,
        *,
        pooled: bool = True,
    ) -> KernelMatrix:
        """Kernel between the local and all particles; see `evaluate_radial`."""
        return evaluate_radial(self, everyone, rows, step, pooled)


@dataclass(frozen=True)
class IMQ:
    r"""Inverse multiquadric kernel, averaged over points.

    .. math:: \kappa(r, r') = \left(1 + \frac{\lVert r - r'\rVert^2}{2h}\right)^{\beta}

    Its tails are heavier than those of `RBF`, so distant particles still feel each other. Source:
    Gorham & Mackey, Measuring Sample Quality with Kernels, 2017.

    Args:
        space: where particles are compared, such as `Weights` or `InputGradients`.
        bandwidth: rule for :math:`h`; `Median` or `Fixed`.
        beta: the exponent, between -1 and 0.

    Raises:
        ArgumentError: if an argument is of the wrong kind or out of range.

    Example:
        >>> from pyro_fordes import Weights
        >>> kernel = IMQ(Weights(), bandwidth=Fixed(0.5))
        >>> kernel.evaluate(torch.tensor([[[0.0]], [[1.0]]])).mean
        tensor([[1.0000, 0.7071],
                [0.7071, 1.0000]])
    """

    space: Any
    bandwidth: Bandwidth = field(default_factory=Median)
    beta: float = -0.5

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_parts("IMQ", self.space, self.bandwidth)
        if not -1 < check_number("IMQ(beta=...)", self.beta) < 0:
            raise ArgumentError(f"IMQ(beta=...) must be between -1 and 0, got {self.beta}")

    def profile(self, distances: Tensor, bandwidth: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope at squared distances (the slope is twice the derivative by them)."""
        base = 1 + distances / (2 * bandwidth)
        value = base**self.beta
        return value, self.beta * value / (base * bandwidth)

    def evaluate(
        self,
        everyone: Float[Tensor, "particle point feature"],
        rows: slice = slice(None),
        step: int = 0,
        *,
        pooled: bool = True,
    ) -> KernelMatrix:
        """Kernel between the local and all particles; see `evaluate_radial`."""
        return evaluate_radial(self, everyone, rows, step, pooled)


def evaluate_radial(
    kernel: Any,
    everyone: Float[Tensor, "particle point feature"],
    rows: slice = slice(None),
    step: int = 0,
    pooled: bool = True,
) -> KernelMatrix:
    """Evaluate a kernel that is a function (its ``profile``) of distance over bandwidth.

    Args:
        kernel: a kernel with ``profile`` and ``bandwidth``.
        everyone: representation of all particles.
        rows: which of them are the local ones, the kernel's first argument.
        step: the step, for schedules.
        pooled: whether the kernel between particles is the average over points.

    Returns:
        Value and slope per point, local particle and particle.
    """
    everyone = everyone - everyone.mean(0, keepdim=True)
    distances = squared_distances(everyone)
    bandwidth = kernel.bandwidth(distances, step)
    value, slope = kernel.profile(distances[:, rows], bandwidth)
    return KernelMatrix(value, slope, bandwidth, rows, everyone, pooled)


def _check_parts(name: str, space: Any, bandwidth: Any) -> None:
    """Check the arguments that all kernels have."""
    check_part(
        f"{name}(space=...)", space, "represent", "a space such as Weights() or InputGradients()"
    )
    if isinstance(bandwidth, type) or not callable(bandwidth):
        raise ArgumentError(
            f"{name}(bandwidth=...) must be a rule such as Median() or Fixed(0.5), got "
            f"{bandwidth!r}"
        )
