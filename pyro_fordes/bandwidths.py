r"""Rules for the bandwidth of a kernel, from the squared distances between representations.

The bandwidth :math:`h` is in squared units: a radial kernel is a function of the squared distance
over :math:`2h`. No gradient flows through it.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import check_choice, check_number
from pyro_fordes.particles import Schedule, at_step


class Bandwidth(Protocol):
    """A rule for the bandwidth, from all squared distances."""

    def __call__(
        self, distances: Float[Tensor, "point particle particle"], step: int, features: int
    ) -> Float[Tensor, "point 1 #particle"]:
        """Bandwidth per point (and second particle, where the rule has one per particle).

        Args:
            distances: squared distances between all particles.
            step: the step, for schedules.
            features: how many features the distances sum over.
        """
        ...


@torch.library.custom_op(
    "pyro_fordes::middle",
    mutates_args=(),
    schema="(Tensor values, SymInt low, SymInt high) -> Tensor",
)
def _order_mean(values: Tensor, low: int, high: int) -> Tensor:
    """Mean of two order statistics (0-based ranks) along the last axis.

    An operator, because tracing then takes it as a whole.
    """
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        # numpy sorts by vector instructions, seven times as fast as torch selects.
        ordered = torch.from_numpy(np.sort(values.numpy(), axis=-1))
        return ordered[..., low : high + 1].mean(-1)
    # Selecting twice is faster than sorting, and than kthvalue, which selects one at a time.
    smallest = values.topk(high + 1, dim=-1, largest=False, sorted=False).values
    return smallest.topk(high - low + 1, dim=-1, sorted=False).values.mean(-1)


@_order_mean.register_fake
def _(values: Tensor, low: int, high: int) -> Tensor:
    return values.new_empty(values.shape[:-1])


def _middle(values: Tensor, ranks: tuple[int, int]) -> Tensor:
    """Mean of two order statistics, with no gradient: bandwidths have none."""
    return _order_mean(values.detach(), *ranks)


@dataclass(frozen=True)
class Median:
    r"""Median heuristic: :math:`h = \mathrm{factor} \cdot m / (2 \log M)`.

    :math:`m` is the median of the squared distances, zeros of a particle to itself included and
    the mean of the two middle values where their number is even, and :math:`M` the number of
    particles; then :math:`\sum_j k_{ij} \approx 1 + M \cdot M^{-1}`. FoRDE (Section 3.4) takes the
    median over all pairs at each point. Its published code takes it over the first particle only,
    so that each second particle has its own bandwidth at each point and the kernel is not
    symmetric: ``per="particle"``. The last three arguments are for the medians of other libraries
    (see the table in ``docs/conventions.md``).

    Where more than half of the distances are zero the median says nothing, and their mean takes
    its place; where all are zero, or there is one particle, the bandwidth is 1 (and no force acts).

    Args:
        per: ``"point"`` (the paper) or ``"particle"`` (its code).
        factor: a positive number, or a function of the step that gives one.
        log1p: whether :math:`\log(M + 1)` takes the place of :math:`\log M`.
        diagonal: whether the zeros of a particle to itself are counted.
        interpolation: which median of an even number of distances: ``"midpoint"`` of the two middle
            ones, the ``"lower"`` or the ``"higher"``.

    Raises:
        ArgumentError: if an argument is out of range.

    Example:
        >>> distances = torch.tensor([[[0.0, 4.0], [4.0, 0.0]]])
        >>> Median()(distances, step=0, features=1) * 2 * math.log(2)
        tensor([[[2.]]])
        >>> Median(diagonal=False)(distances, step=0, features=1) * 2 * math.log(2)
        tensor([[[4.]]])
    """

    per: str = "point"
    factor: Schedule = 1.0
    log1p: bool = field(default=False, kw_only=True)
    diagonal: bool = field(default=True, kw_only=True)
    interpolation: str = field(default="midpoint", kw_only=True)

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_choice("Median(per=...)", self.per, ("point", "particle"))
        check_choice(
            "Median(interpolation=...)", self.interpolation, ("midpoint", "lower", "higher")
        )
        if not callable(self.factor):
            check_number("Median(factor=...)", self.factor, minimum=0.0, exclusive=True)

    def __call__(
        self, distances: Float[Tensor, "point particle particle"], step: int, features: int
    ) -> Float[Tensor, "point 1 #particle"]:
        """Bandwidth per point, or per point and second particle."""
        count = distances.shape[-1]
        if count == 1:
            return torch.ones_like(distances)
        factor = at_step("Median(factor=...)", self.factor, step, exclusive=True)
        if self.per == "particle":
            skip = 0 if self.diagonal else 1
            low, high = self._ranks(count - skip)
            middle = _middle(distances.mT, (low + skip, high + skip)).unsqueeze(-2)
            mean = distances.mean(-2, keepdim=True)
        else:
            middle = self._median_of_pairs(distances)[:, None, None]
            mean = distances.mean((-2, -1), keepdim=True)
        # Rounding leaves distances of this order between equal representations.
        noise = 16 * torch.finfo(distances.dtype).eps * distances.amax((-2, -1), keepdim=True)
        spread = torch.where(middle > noise, middle, mean)
        bandwidth = factor * spread / (2 * math.log(count + 1 if self.log1p else count))
        return torch.where(bandwidth > 0, bandwidth, torch.ones_like(bandwidth))

    def _ranks(self, total: int) -> tuple[int, int]:
        """Ranks of the middle values of so many, counted from 0."""
        low, high = (total - 1) // 2, total // 2
        return {"midpoint": (low, high), "lower": (low, low), "higher": (high, high)}[
            self.interpolation
        ]

    def _median_of_pairs(
        self, distances: Float[Tensor, "point particle particle"]
    ) -> Float[Tensor, " point"]:
        """Median of the whole symmetric matrix from its upper triangle (half the work)."""
        count = distances.shape[-1]
        # In the sorted matrix the diagonal's zeros come first, then each pair twice.
        zeros = count if self.diagonal else 0
        low, high = ((rank - zeros) // 2 for rank in self._ranks(count**2 - count + zeros))
        if low < 0:  # two particles: zeros are in the middle
            return _middle(distances.flatten(1), self._ranks(count**2))
        rows, columns = torch.triu_indices(count, count, offset=1, device=distances.device)
        pairs = distances.flatten(1).index_select(1, rows * count + columns)
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
        >>> Fixed(0.5)(torch.zeros(1, 3, 3), step=0, features=1)
        tensor([[[0.5000]]])
    """

    value: Schedule

    def __post_init__(self) -> None:
        """Check the argument."""
        if not callable(self.value):
            check_number("Fixed(value=...)", self.value, minimum=0.0, exclusive=True)

    def __call__(
        self, distances: Float[Tensor, "point particle particle"], step: int, features: int
    ) -> Float[Tensor, "point 1 #particle"]:
        """The value, as one bandwidth per point."""
        value = at_step("Fixed(value=...)", self.value, step, exclusive=True)
        return value * distances.new_ones((len(distances), 1, 1))


@dataclass(frozen=True)
class HeatEquation:
    r"""Bandwidth with which the particles spread as heat does (the HE method).

    Let :math:`q(x) = h^{-D/2} \sum_j e^{-\lVert x - x_j\rVert^2 / (2h)}` in :math:`D` dimensions.
    Particles that move by :math:`-\nabla \log q` should change their density by the heat equation
    :math:`\partial_t q = \Delta q`; the rule minimises by how much they miss it,

    .. math:: h^{D+2} \sum_k \lambda(x_k)^2, \qquad
        \lambda(x) = \Delta q(x) + \sum_j \nabla_{x_j} q(x) \cdot \nabla \log q(x_j).

    The power of :math:`h` makes it free of units. A golden-section search on a log scale, of a
    fixed length, finds a minimum between 1/16 and 4 times the `Median` bandwidth, to 2 %. Each of
    its 13 evaluations costs a product of particle x particle matrices per point.

    It is derived for `RBF` as a density estimate, and for one to three dimensions. With more,
    particles are too far apart for any bandwidth to come near the heat equation, and `Median` keeps
    more spread.

    Source: Liu, Zhuo, Cheng, Zhang & Zhu, Understanding and Accelerating Particle-Based Variational
    Inference, ICML 2019 (the HE method; the criterion is the one without units in their code).
    Theirs is one step of a line search per iteration, from the last bandwidth; this one keeps no
    state.

    Example:
        >>> x = torch.tensor([-1.0, -0.3, 0.3, 1.0])
        >>> distances = (x[:, None] - x).square()[None]
        >>> HeatEquation()(distances, step=0, features=1).shape
        torch.Size([1, 1, 1])
    """

    def __call__(
        self, distances: Float[Tensor, "point particle particle"], step: int, features: int
    ) -> Float[Tensor, "point 1 #particle"]:
        """The best bandwidth found, one per point."""
        start = Median()(distances, step, features)
        if distances.shape[-1] == 1:
            return start

        def error(exponent: Tensor) -> Tensor:
            residual = heat_residual(distances, start * exponent.exp2(), features)
            return residual.square().sum((-2, -1), keepdim=True)

        golden = (math.sqrt(5) - 1) / 2
        low, high = torch.full_like(start, -4.0), torch.full_like(start, 2.0)
        left, right = high - golden * (high - low), low + golden * (high - low)
        error_left, error_right = error(left), error(right)
        for _ in range(11):
            # All points at once: the kept inner exponent of each becomes the other inner one.
            go_left = error_left < error_right
            low, high = torch.where(go_left, low, left), torch.where(go_left, right, high)
            kept = torch.where(go_left, left, right)
            error_kept = torch.where(go_left, error_left, error_right)
            new = low + high - kept
            error_new = error(new)
            left, right = torch.where(go_left, new, kept), torch.where(go_left, kept, new)
            error_left = torch.where(go_left, error_new, error_kept)
            error_right = torch.where(go_left, error_kept, error_new)
        return start * ((low + high) / 2).exp2()


def heat_residual(
    distances: Float[Tensor, "point particle particle"],
    bandwidth: Float[Tensor, "point 1 1"],
    features: int,
) -> Float[Tensor, "point particle 1"]:
    r"""What the particles' own motion lacks of the heat equation: :math:`h^{D/2+1} \lambda(x_k)`.

    See `HeatEquation`. From distances alone, since
    :math:`2 (x_k - x_j) \cdot (x_j - x_l) = d_{kl} - d_{kj} - d_{jl}`.

    Args:
        distances: squared distances between all particles.
        bandwidth: :math:`h`, per point.
        features: :math:`D`.

    Example:
        >>> heat_residual(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), features=2)
        tensor([[[-2.]]])
    """
    kernel = torch.exp(distances / (-2 * bandwidth))
    sums = kernel.sum(-1, keepdim=True)
    shares = kernel / sums
    squares = ((3 * kernel - kernel @ shares) * distances).sum(-1, keepdim=True)
    squares = squares + kernel @ (shares * distances).sum(-1, keepdim=True)
    return squares / (2 * bandwidth) - features * sums
