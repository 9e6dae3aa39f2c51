r"""Base kernels between representations.

Convention: a radial kernel is a function of the squared distance over a bandwidth :math:`h`
in squared units,

.. math:: \kappa(r, r') = \exp\left(-\frac{\lVert r - r' \rVert^2}{2h}\right),

and the kernel between two particles is the average over points (FoRDE, Eq. 11). Values and
gradients are closed forms; nothing of size particle x particle x point x feature is built, because
:math:`\nabla_r \kappa = \mathrm{slope} \cdot (r - r')` needs only matrix products.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import ArgumentError, check_number, check_part
from pyro_fordes.bandwidths import Bandwidth, Median


@dataclass(frozen=True)
class KernelMatrix:
    r"""A kernel evaluated between the local particles and all particles, point by point.

    Attributes:
        value: :math:`\kappa(r_{ib}, r_{jb})`.
        slope: the number for which :math:`\nabla_{r_{ib}} \kappa = \mathrm{slope}\,
            (r_{ib} - r_{jb})`.
        bandwidth: what the rule gave (for a mixture the weighted mean), broadcastable against the
            above.
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

    def gradient_sum(
        self,
        weights: Float[Tensor, "#group #local #particle"],
        left: Float[Tensor, "#group outer local"] | None = None,
    ) -> Float[Tensor, "outer point feature"]:
        r"""Weighted sum of gradients by the first argument.

        .. math:: \sum_j w_{ij} \nabla_{r_{ib}} k(r_i, r_j) =
            \frac1B \sum_j w_{ij}\,\mathrm{slope}_{ijb} (r_{ib} - r_{jb})

        Args:
            weights: :math:`w_{ij}`, for each kernel of `between` where there are several.
            left: a matrix for each of them, by which the sums of all particles are multiplied.
        """
        matrix = self._laplacian(weights)
        if left is not None:
            # Matrices between particles first: the product with all features is the dear one.
            matrix = left @ matrix
        return (matrix @ self.everyone.transpose(0, 1)).transpose(0, 1)

    def _laplacian(
        self, weights: Float[Tensor, "#group #local #particle"]
    ) -> Float[Tensor, "point local particle"]:
        """The graph Laplacian of the weighted slopes: one product with it gives all sums."""
        slope = self.slope * (weights / len(self.slope) if self.pooled else weights)
        laplacian = -slope
        own = laplacian[..., self.rows].diagonal(dim1=-2, dim2=-1)
        own += slope.sum(-1)
        return laplacian

    def transposed(self, rows: slice) -> "KernelMatrix":
        """The kernel of all particles as a function of its second argument, which is in rows."""
        return replace(self, value=self.value.mT[:, rows], slope=self.slope.mT[:, rows], rows=rows)


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

    Uses :math:`|a|^2 + |b|^2 - 2ab`, all three from one product. Rows must have been centred over
    particles (as `RBF` does), else digits are lost by cancellation.

    Example:
        >>> squared_distances(torch.tensor([[[-1.0]], [[1.0]]]))
        tensor([[[0., 4.],
                 [4., 0.]]])
    """
    r = everyone.transpose(0, 1)
    products = r @ r.mT
    squares = products.diagonal(dim1=-2, dim2=-1)
    sums = squares.unsqueeze(-1) + squares.unsqueeze(-2)
    distances = sums.sub_(products, alpha=2.0).clamp_min_(0.0)
    distances.diagonal(dim1=-2, dim2=-1).zero_()
    return distances


def rbf_profile(distances: Tensor, bandwidth: Tensor) -> tuple[Tensor, Tensor]:
    """Value and slope of `RBF` at squared distances."""
    value = torch.exp(distances / (-2 * bandwidth))
    return value, value / -bandwidth


def imq_profile(distances: Tensor, bandwidth: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Value and slope of `IMQ` at squared distances."""
    base = 1 + distances / (2 * bandwidth)
    value = base**beta
    return value, beta * value / (base * bandwidth)


@dataclass(frozen=True)
class RBF:
    r"""Gaussian kernel :math:`\exp(-\lVert r - r'\rVert^2 / (2h))`, averaged over points.

    Source: FoRDE (Trinh, Heinonen, Acerbi, Kaski, ICLR 2024), Eq. 9 to 11. Lengthscales belong to
    the space, which scales the representation.

    Args:
        space: where particles are compared, such as `Weights` or `InputGradients`.
        bandwidth: rule for :math:`h`; `Median`, `Fixed` or `HeatEquation`.

    Raises:
        ArgumentError: if ``space`` or ``bandwidth`` is of the wrong kind.

    Example:
        >>> from pyro_fordes import Fixed, Weights
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
        return rbf_profile(distances, bandwidth)

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
        bandwidth: rule for :math:`h`; `Median`, `Fixed` or `HeatEquation`.
        beta: the exponent, between -1 and 0.

    Raises:
        ArgumentError: if an argument is of the wrong kind or out of range.

    Example:
        >>> from pyro_fordes import Fixed, Weights
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
        return imq_profile(distances, bandwidth, self.beta)

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
class Mixture:
    r"""Weighted mean of kernels in one space, each with a bandwidth of its own.

    .. math:: \kappa(r, r') = \sum_m w_m \kappa_m(r, r'), \qquad \sum_m w_m = 1

    A sum over several bandwidths acts at several distances at once.

    Args:
        kernels: `RBF` and `IMQ` kernels, all with the same space.
        weights: positive numbers, one per kernel, which are divided by their sum; equal if None.

    Raises:
        ArgumentError: if an argument is of the wrong kind or the spaces differ.

    Example:
        >>> from pyro_fordes import Fixed, Weights
        >>> kernels = [RBF(Weights(), Fixed(0.5)), IMQ(Weights(), Fixed(0.5))]
        >>> mixture = Mixture(kernels, weights=[3, 1])
        >>> mixture.evaluate(torch.tensor([[[0.0]], [[1.0]]])).mean
        tensor([[1.0000, 0.4527],
                [0.4527, 1.0000]])
    """

    kernels: Sequence[Any]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check the arguments and make them tuples, weights with sum 1."""
        if not isinstance(self.kernels, list | tuple) or not self.kernels:
            raise ArgumentError(
                f"Mixture(kernels=...) must be a list of kernels such as [RBF(Weights()), "
                f"IMQ(Weights())], got {self.kernels!r}"
            )
        for index, kernel in enumerate(self.kernels):
            name = f"Mixture(kernels=...)[{index}]"
            check_part(name, kernel, "profile", "a kernel such as RBF(...) or IMQ(...)")
            if kernel.space != self.space:
                raise ArgumentError(
                    f"{name} compares particles in {kernel.space!r}, the first kernel in "
                    f"{self.space!r}; give all kernels of a mixture the same space object"
                )
        weights = [1.0] * len(self.kernels) if self.weights is None else self.weights
        if not isinstance(weights, list | tuple) or len(weights) != len(self.kernels):
            raise ArgumentError(
                f"Mixture(weights=...) must be a list of {len(self.kernels)} numbers, one per "
                f"kernel, got {weights!r}"
            )
        numbers = [
            check_number(f"Mixture(weights=...)[{index}]", weight, minimum=0.0, exclusive=True)
            for index, weight in enumerate(weights)
        ]
        object.__setattr__(self, "kernels", tuple(self.kernels))
        object.__setattr__(self, "weights", tuple(number / sum(numbers) for number in numbers))

    @property
    def space(self) -> Any:
        """Where particles are compared: the space of all kernels."""
        return self.kernels[0].space

    def evaluate(
        self,
        everyone: Float[Tensor, "particle point feature"],
        rows: slice = slice(None),
        step: int = 0,
        *,
        pooled: bool = True,
    ) -> KernelMatrix:
        """Kernel between the local and all particles, from distances computed once."""
        everyone = everyone - everyone.mean(0, keepdim=True)
        distances = squared_distances(everyone)
        value: Any = 0.0
        slope: Any = 0.0
        bandwidth: Any = 0.0
        for weight, kernel in zip(self.weights or (), self.kernels, strict=True):
            part = kernel.bandwidth(distances, step, everyone.shape[-1])
            values, slopes = kernel.profile(distances[:, rows], part)
            value = value + weight * values
            slope = slope + weight * slopes
            bandwidth = bandwidth + weight * part
        return KernelMatrix(value, slope, bandwidth, rows, everyone, pooled)


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
    bandwidth = kernel.bandwidth(distances, step, everyone.shape[-1])
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
