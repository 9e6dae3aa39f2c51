r"""Transports: how the particles' representations become a velocity that spreads them.

A transport sees tensors only, never Pyro, the model or the optimiser. The driver adds the velocity,
pulled back to the particles, to the gradient of the log joint (`WGD`), or takes both from the
transport (`SVGD`).

Notation: :math:`K_{ij} = k(r_i, r_j)` between :math:`M` particles, and
:math:`G_i = \sum_j \nabla_{r_i} k(r_i, r_j)`, the gradient by the first argument.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pyro_fordes._checks import (
    ArgumentError,
    check_choice,
    check_number,
    check_positive_int,
)
from pyro_fordes.kernels import Kernel, KernelMatrix

# How far full whitening shrinks the covariance to its diagonal: enough for a Cholesky factor in
# single precision with fewer particles than dimensions. More does harm. In coordinates that are not
# white calibration, which has one factor, trades small directions for large ones.
SHRINKAGE = 1e-3


@dataclass(frozen=True)
class Repulsion:
    """What a transport gives the driver.

    Attributes:
        velocity: repulsive part of the local representations' ascent direction.
        kernel: the kernel it was computed from.
        driving: the other part, where the transport replaces the log joint's gradient; else None.
        finite: which of the local particles could be compared; None for all.
        kept: the particles that ``kernel`` is between, where some were left out; None for all.
    """

    velocity: Float[Tensor, "local point feature"]
    kernel: KernelMatrix
    driving: Float[Tensor, "local point feature"] | None = None
    finite: Bool[Tensor, " local"] | None = None
    kept: Int[Tensor, " kept"] | None = None

    @property
    def weight(self) -> Float[Tensor, " particle"]:
        """Mean weight that the kernel gives each of all particles, 0 for those left out."""
        weight = self.kernel.mean.mean(0)
        if self.kept is None:
            return weight
        return weight.new_zeros(len(self.velocity)).index_copy(0, self.kept, weight)


class Transport(Protocol):
    """An update rule."""

    @property
    def repulsive(self) -> bool:
        """Whether particles are compared; if not, no representation is computed."""
        ...

    @property
    def uses_scores(self) -> bool:
        """Whether `repel` wants the log joint's gradient, and returns a driving part."""
        ...

    def check(self, space: Any) -> None:
        """Raise an `ArgumentError` if the rule is not defined in a space."""
        ...

    def repel(
        self,
        kernel: Kernel,
        everyone: Float[Tensor, "particle point feature"],
        rows: slice = slice(None),
        step: int = 0,
        *,
        scores: Float[Tensor, "particle point feature"] | None = None,
        pooled: bool = True,
    ) -> Repulsion:
        """Velocity of the local particles' representations.

        Args:
            kernel: the base kernel.
            everyone: representation of all particles.
            rows: which of them are the local ones.
            step: the step, for schedules.
            scores: gradient of the log joint by the representation, of all particles.
            pooled: whether points are averaged to one kernel, or have one each.
        """
        ...


def _check_calibrate(rule: str, calibrate: Any) -> None:
    """Words such as "no" count as true in Python."""
    if not isinstance(calibrate, bool):
        raise ArgumentError(f"{rule}(calibrate=...) must be True or False, got {calibrate!r}")


def _check_own_values(rule: str, wanted: Any, space: Any) -> None:
    """Whitening and calibration are about the particles' own values."""
    if wanted and not space.own_values:
        raise ArgumentError(
            f"{rule}(whiten=..., calibrate=...) are defined in weight space only, got "
            f"{type(space).__name__}; leave them out, or use RBF(Weights())"
        )


@dataclass(frozen=True)
class WGD:
    r"""Wasserstein gradient descent: the log joint's gradient minus an estimate of the score.

    .. math:: v_i = \nabla \log p(\theta_i \mid D) - \widehat{\nabla \log q}(\theta_i)

    The estimate, from the particles alone:

    ========  =======================================================================
    kde       :math:`G_i / \sum_j K_{ij}`: the score of a kernel density estimate
    blob      :math:`\sum_j (1/K_i + 1/K_j) \nabla_{r_i} K_{ij}` with :math:`K_i = \sum_j K_{ij}`
    sge       :math:`(K + \eta I)^{-1} G`, Stein's estimator (also called GFSF)
    ssge      :math:`K \tilde K^{-2} G` over the leading eigenpairs of :math:`\tilde K = K + \eta I`
    ========  =======================================================================

    Sources: D'Angelo & Fortuin 2021 (kde, sge, ssge); FoRDE 2024, Eq. 8 (kde); Liu et al. 2019
    (GFSD = kde, GFSF = sge, Blob); Shi, Sun & Zhu 2018 (ssge).

    Every estimate smooths, and so shrinks or flattens the posterior, more in more dimensions. In
    weight space two remedies apply: ``WGD("sge", whiten="full", calibrate=True)`` is the rule to
    take for posteriors near a Gaussian. ``docs/calibration.md`` says when, and when `SVGD` with
    the same two.

    ``whiten`` computes the estimate in coordinates :math:`z = L^{-1}(x - \bar x)` in which the
    particles have unit covariance, and maps it back by :math:`L^{-T}`. The rule is then equivariant
    to affine maps, up to the shrinkage of the covariance, and exactly to scalings (``"diag"``: to
    scalings only). With an `Additive` kernel the axes matter: :math:`L` is then the product of the
    standard deviations and the symmetric root of the correlations, and the rule is equivariant to
    scalings and to the order of the coordinates.

    ``calibrate`` rescales the estimate so that Stein's identity
    :math:`E_q[(x - m) \cdot \nabla \log q(x)] = -D` holds on the particles themselves:

    .. math:: \hat s \leftarrow \hat s \cdot
        \frac{D}{-\frac{1}{M-1} \sum_i (x_i - \bar x) \cdot \hat s_i}

    For independent draws from q the sum's expectation is :math:`-(M-1) D`, the mean being estimated
    too, so exact scores need the factor 1 on average. The sum is the same in whitened coordinates.
    At rest on a Gaussian target with covariance :math:`\Sigma` the estimate is
    :math:`-\Sigma^{-1}(x_i - m)`, so the particles' covariance S (with :math:`M - 1`) has
    :math:`\mathrm{tr}(\Sigma^{-1} S) = D` exactly, whatever kernel, estimator and whitening.

    Args:
        estimator: ``"kde"``, ``"blob"``, ``"sge"`` or ``"ssge"``.
        ridge: :math:`\eta` of sge and ssge.
        num_eigenpairs: how many leading eigenpairs ssge keeps; None for all.
        whiten: None, ``"diag"`` or ``"full"``; weight space only. The full covariance is shrunk to
            its diagonal by 0.001, so that it has an inverse with fewer particles than dimensions.
            It has dimension x dimension numbers, so it is for models of at most some thousand
            values.
        calibrate: whether to rescale the estimate by Stein's identity; weight space only.

    Raises:
        ArgumentError: if an argument is unknown or out of range.

    Example:
        >>> from pyro_fordes import RBF, Fixed, Weights
        >>> r = torch.tensor([[[0.0]], [[1.0]]])
        >>> WGD().repel(RBF(Weights(), Fixed(0.5)), r).velocity.flatten()
        tensor([-0.5379,  0.5379])
        >>> calibrated = WGD("sge", calibrate=True).repel(RBF(Weights(), Fixed(0.5)), r)
        >>> calibrated.velocity.flatten().round(decimals=3)
        tensor([-1.,  1.])
    """

    estimator: str = "kde"
    ridge: float = 0.01
    num_eigenpairs: int | None = None
    whiten: str | None = None
    calibrate: bool = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_choice("WGD(estimator=...)", self.estimator, ("kde", "blob", "sge", "ssge"))
        check_number("WGD(ridge=...)", self.ridge, minimum=0.0)
        if self.num_eigenpairs is not None:
            check_positive_int("WGD(num_eigenpairs=...)", self.num_eigenpairs)
            if self.estimator != "ssge":
                raise ArgumentError(
                    f"WGD(num_eigenpairs=...) belongs to the estimator 'ssge', got "
                    f"{self.estimator!r}"
                )
        if self.whiten is not None:
            check_choice("WGD(whiten=...)", self.whiten, ("diag", "full"))
        _check_calibrate("WGD", self.calibrate)

    @property
    def repulsive(self) -> bool:
        """True: particles are compared."""
        return True

    @property
    def uses_scores(self) -> bool:
        """False: the log joint's gradient is used as it is."""
        return False

    def check(self, space: Any) -> None:
        """Whitening and calibration need the particles' own values."""
        _check_own_values("WGD", self.whiten or self.calibrate, space)

    def repel(
        self,
        kernel: Kernel,
        everyone: Float[Tensor, "particle point feature"],
        rows: slice = slice(None),
        step: int = 0,
        *,
        scores: Float[Tensor, "particle point feature"] | None = None,
        pooled: bool = True,
    ) -> Repulsion:
        """Minus the estimated score, by representation."""
        if self.whiten is None or len(everyone) == 1:
            velocity, matrix = self._estimate(kernel, everyone, rows, step, pooled)
            return Repulsion(velocity, matrix)
        white = _whiten(everyone, self.whiten if pooled else "diag", kernel)
        velocity, matrix = self._estimate(kernel, white.values, rows, step, pooled)
        return Repulsion(white.back(velocity), matrix)

    def _estimate(
        self, kernel: Kernel, everyone: Tensor, rows: slice, step: int, pooled: bool
    ) -> tuple[Tensor, KernelMatrix]:
        """Minus the estimated score at the rows, calibrated if asked for."""
        # Calibration averages over all particles, and the other estimators invert their kernel.
        alone = self.estimator == "kde" and not self.calibrate
        matrix = kernel.evaluate(everyone, rows if alone else slice(None), step, pooled=pooled)
        velocity = self._minus_score(matrix)
        if self.calibrate and len(everyone) > 1:
            velocity = velocity * _stein_factor(matrix.everyone, velocity, pooled)
        return (velocity if alone else velocity[rows]), matrix

    def _minus_score(self, matrix: KernelMatrix) -> Float[Tensor, "local point feature"]:
        k = matrix.between
        if self.estimator == "kde":
            return matrix.gradient_sum(-1 / k.sum(-1, keepdim=True))
        if not matrix.symmetric:
            raise ArgumentError(
                f"WGD({self.estimator!r}) needs a symmetric kernel, but the bandwidth differs from "
                f"particle to particle; use Median(per='point') or WGD('kde')"
            )
        if self.estimator == "blob":
            sums = k.sum(-1)
            return matrix.gradient_sum(-1 / sums.unsqueeze(-1) - 1 / sums.unsqueeze(-2))
        regular = k + self.ridge * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
        if self.estimator == "sge":
            inverse = torch.linalg.inv(regular)
        else:
            values, vectors = torch.linalg.eigh(regular)
            keep = self.num_eigenpairs or len(regular[0])
            values, vectors = values[:, -keep:], vectors[:, :, -keep:]
            inverse = k @ (vectors / values.unsqueeze(-2).square()) @ vectors.mT
        return matrix.gradient_sum(k.new_full((1, 1, 1), -1.0), inverse)


@dataclass(frozen=True)
class SVGD:
    r"""Stein variational gradient descent: both forces smoothed by the kernel.

    .. math:: v_i = \frac1M \sum_j \left[ k(\theta_j, \theta_i) \nabla \log p(\theta_j \mid D)
        + \nabla_{\theta_j} k(\theta_j, \theta_i) \right]

    Source: Liu & Wang 2016, Eq. 8. In weight space, `RBF` with one joint bandwidth is the textbook
    rule; ``Weights(group="coordinate")`` has one kernel per coordinate, as Pyro's SVGD does by
    default. In function space (`Outputs`) it is f-SVGD.

    In D dimensions the sum over j has the particle's own gradient in full and of the repulsion
    only a share of about :math:`\log M / D`, so the particles shrink. In weight space two remedies
    apply, and ``SVGD(whiten="full", calibrate=True)`` with a wide kernel,
    ``RBF(Weights(), Median(factor=4.0))``, is the rule for ordinary models whose posterior is far
    from a Gaussian (``docs/calibration.md``).

    ``whiten`` evaluates the sum in coordinates :math:`z = L^{-1}(x - \bar x)` of unit covariance,
    with the scores that belong to them, and maps it back by :math:`L^{-T}`, as in `WGD`.

    ``calibrate`` multiplies the repulsion by the one number with which a Gaussian target that has
    the particles' own mean and covariance S would neither widen nor narrow them. Its scores are
    :math:`-S^+ (x - \bar x)`, so with the centred particles X in rows

    .. math:: a = \frac{(M - 1)\, \mathrm{tr}(K P)}
        {\sum_{ij} (x_i - \bar x) \cdot \nabla_{x_j} k(x_j, x_i)}, \quad P = X (X^T X)^+ X^T

    times :math:`D / \mathrm{tr}\, P`, which is 1 unless there are too few particles for D
    dimensions. In any coordinates, white or not, a Gaussian target whose moments the particles have
    then leaves their size alone, with every kernel. For other targets it is an approximation: with
    many particles the factor tends to 1 only as far as they look like a Gaussian to the kernel. The
    rule is ours: ``docs/calibration.md`` has its derivation and what it was measured to do.

    Args:
        whiten: None, ``"diag"`` or ``"full"``; weight space only. See `WGD` for its size. A `Fixed`
            bandwidth is then one of white coordinates.
        calibrate: whether to rescale the repulsion; weight space only.

    Raises:
        ArgumentError: if an argument is unknown.

    Example:
        >>> from pyro_fordes import RBF, Fixed, Weights
        >>> r = torch.tensor([[[0.0]], [[1.0]]])
        >>> found = SVGD().repel(RBF(Weights(), Fixed(0.5)), r, scores=-r)
        >>> (found.driving + found.velocity).flatten()
        tensor([-0.5518, -0.1321])
        >>> r = torch.tensor([[[-1.0]], [[0.0]], [[1.0]]])
        >>> found = SVGD(whiten="full", calibrate=True).repel(RBF(Weights()), r, scores=-r)
        >>> bool((found.driving + found.velocity).abs().max() < 1e-6)  # unit variance is right
        True
    """

    whiten: str | None = None
    calibrate: bool = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.whiten is not None:
            check_choice("SVGD(whiten=...)", self.whiten, ("diag", "full"))
        _check_calibrate("SVGD", self.calibrate)

    @property
    def repulsive(self) -> bool:
        """True: particles are compared."""
        return True

    @property
    def uses_scores(self) -> bool:
        """True: the kernel smooths the log joint's gradient."""
        return True

    def check(self, space: Any) -> None:
        """What is smoothed is the gradient of the log joint by what is compared."""
        if not space.has_scores:
            raise ArgumentError(
                f"SVGD() needs the log likelihood as a function of what is compared. It is known "
                f"in Weights() and, for the observed sites on the batch, in Outputs(), but not in "
                f"{type(space).__name__} as given; use one of these, or WGD() in this space"
            )
        _check_own_values("SVGD", self.whiten or self.calibrate, space)

    def repel(
        self,
        kernel: Kernel,
        everyone: Float[Tensor, "particle point feature"],
        rows: slice = slice(None),
        step: int = 0,
        *,
        scores: Float[Tensor, "particle point feature"] | None = None,
        pooled: bool = True,
    ) -> Repulsion:
        """Smoothed scores, and the kernel's gradient by the other particle."""
        if scores is None:
            raise ArgumentError("SVGD().repel needs scores=, the gradients of the log joint")
        if self.whiten is None or len(everyone) == 1:
            k, velocity, matrix = self._apart(kernel, everyone, rows, step, pooled)
            driving = _from_groups(k @ _by_group(scores, pooled), scores)
            return Repulsion(velocity, matrix, driving)
        white = _whiten(everyone, self.whiten if pooled else "diag", kernel)
        k, velocity, matrix = self._apart(kernel, white.values, rows, step, pooled)
        driving = _from_groups(k @ _by_group(white.scores(scores), pooled), scores)
        return Repulsion(white.back(velocity), matrix, white.back(driving))

    def _apart(
        self, kernel: Kernel, everyone: Tensor, rows: slice, step: int, pooled: bool
    ) -> tuple[Tensor, Tensor, KernelMatrix]:
        """What smooths at the rows, and the repulsion there, calibrated if asked for."""
        matrix = kernel.evaluate(everyone, slice(None), step, pooled=pooled)
        count = len(everyone)
        # Calibration averages over all particles.
        wanted = slice(None) if self.calibrate else rows
        # k(theta_j, theta_i) has the first argument in rows, so both sums run over rows.
        k = matrix.between.mT[:, wanted] / count
        velocity = matrix.transposed(wanted).gradient_sum(k.new_full((1, 1, 1), -1 / count))
        if self.calibrate and count > 1:
            velocity = velocity * _gaussian_factor(matrix.everyone, k, velocity, pooled)
        return (k[:, rows], velocity[rows], matrix) if self.calibrate else (k, velocity, matrix)


@dataclass(frozen=True)
class Ensemble:
    """No repulsion: each particle climbs the log joint alone, which is a (MAP) deep ensemble.

    The kernel of the driver is not evaluated.

    Example:
        >>> Ensemble().repulsive
        False
    """

    @property
    def repulsive(self) -> bool:
        """False: particles are not compared."""
        return False

    @property
    def uses_scores(self) -> bool:
        """False: the log joint's gradient is used as it is."""
        return False

    def check(self, space: Any) -> None:
        """Any space will do, since none is used."""

    def repel(
        self,
        kernel: Kernel,
        everyone: Float[Tensor, "particle point feature"],
        rows: slice = slice(None),
        step: int = 0,
        *,
        scores: Float[Tensor, "particle point feature"] | None = None,
        pooled: bool = True,
    ) -> Repulsion:
        """Zero velocity."""
        matrix = kernel.evaluate(everyone, rows, step, pooled=pooled)
        return Repulsion(torch.zeros_like(everyone[rows]), matrix)


def _by_group(
    r: Float[Tensor, "particle point feature"], pooled: bool
) -> Float[Tensor, "group particle entry"]:
    """One matrix for the one kernel, or one per point."""
    return r.flatten(1).unsqueeze(0) if pooled else r.transpose(0, 1)


def _from_groups(
    flat: Float[Tensor, "group local entry"], like: Float[Tensor, "particle point feature"]
) -> Float[Tensor, "local point feature"]:
    """Undo `_by_group`."""
    return flat[0].reshape(-1, *like.shape[1:]) if len(flat) == 1 else flat.transpose(0, 1)


def _stein_factor(
    centred: Float[Tensor, "particle point feature"],
    velocity: Float[Tensor, "particle point feature"],
    pooled: bool,
) -> Float[Tensor, "1 #point 1"]:
    """Factor that makes Stein's identity hold, one per kernel.

    Between 1/1000 and 1000 D: far from rest, an estimate may carry no information on the scale.
    With a joint median bandwidth D dimensions need some D / log M.
    """
    dims = (0, 1, 2) if pooled else (0, 2)
    found = (centred * velocity).sum(dims, keepdim=True) / (len(centred) - 1)
    wanted = centred[0].numel() if pooled else centred.shape[2]
    return wanted / found.clamp(min=1e-3, max=wanted * 1e3)


def _gaussian_factor(
    centred: Float[Tensor, "particle point feature"],
    kernel: Float[Tensor, "group particle particle"],
    velocity: Float[Tensor, "particle point feature"],
    pooled: bool,
) -> Float[Tensor, "1 #point 1"]:
    """Factor with which repulsion balances the smoothed scores of the particles' Gaussian.

    With Z the centred particles in rows, S their covariance and P the projection on the columns of
    Z, that Gaussian's scores are -Z S^+, and Z S^+ Z^T = (M - 1) P. The trace of P, which is the
    smaller of D and M - 1, is scaled to D, so that fewer particles than dimensions end with the
    variance that all dimensions have together.

    Args:
        centred: the particles minus their mean.
        kernel: the matrix that smooths.
        velocity: the repulsion.
        pooled: whether there is one kernel.
    """
    dims = (0, 1, 2) if pooled else (0, 2)
    z = _by_group(centred, pooled)
    count, dimension = z.shape[1:]
    # Coordinates of one size, so that one ridge will do for all. It is far above rounding, and far
    # below what particles of a posterior have in any direction.
    size = z.square().sum(1, keepdim=True).sqrt()
    z = z / torch.where(size > 0, size, torch.ones_like(size))
    # P is Z (Z^T Z + e)^-1 Z^T = (Z Z^T + e)^-1 Z Z^T: by the smaller matrix of the two.
    small = dimension < count
    inner = z.mT @ z if small else z @ z.mT
    regular = inner.clone()
    trace = inner.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    regular.diagonal(dim1=1, dim2=2).add_(1e-6 * torch.where(trace > 0, trace, 1.0))
    projection = torch.linalg.solve(regular, inner)
    rank = projection.diagonal(dim1=1, dim2=2).sum(1)
    if small:
        smoothed = torch.linalg.solve(regular, z.mT @ kernel @ z).diagonal(dim1=1, dim2=2).sum(1)
    else:
        smoothed = (kernel * projection.mT).sum((1, 2))
    wanted = (count - 1) * dimension * smoothed / rank.clamp_min(0.5)
    found = (centred * velocity).sum(dims, keepdim=True)
    least = torch.finfo(found.dtype).tiny
    # Within bounds, for the reason and of the size of those of `_stein_factor`.
    return (wanted.reshape(found.shape) / found.clamp_min(least)).clamp(1e-3, 1e3 * dimension)


@dataclass(frozen=True)
class _White:
    """Coordinates z in which the particles have unit covariance.

    Attributes:
        values: the particles in these.
        back: makes scores by z scores by the particles' own values.
        scores: the inverse of ``back``.
    """

    values: Float[Tensor, "particle point feature"]
    back: Callable[[Tensor], Tensor]
    scores: Callable[[Tensor], Tensor]


def _whiten(everyone: Float[Tensor, "particle point feature"], how: str, kernel: Kernel) -> _White:
    """Coordinates with unit covariance, and how scores change with them.

    With S = A A^T and z = A^-1 (x - m), a score transforms as A^-T. Any such A will do for a kernel
    that sees distances only, and the Cholesky factor is the cheapest. Of all A, the product of the
    standard deviations and the symmetric root of the correlations has the z that correlate most
    with the x, so that single coordinates of z mean those of x; it depends on neither order nor
    scale of the coordinates.
    """
    count, num_points, num_features = everyone.shape
    x = everyone.flatten(1)
    x = x - x.mean(0)
    variance = x.square().sum(0) / (count - 1)
    # A coordinate in which particles agree, but for rounding, has no scale of its own.
    apart = variance > (16 * torch.finfo(x.dtype).eps * everyone.abs().amax(0).flatten()).square()
    x, variance = x * apart, torch.where(apart, variance, torch.ones_like(variance))
    scale = variance.sqrt()
    if how == "diag":
        each = scale.reshape(num_points, num_features)
        white = (x / scale).reshape(everyone.shape)
        return _White(white, lambda v: v / each, lambda v: v * each)
    if not getattr(kernel, "isotropic", True):
        root, inverse = _roots(x / scale)
        return _White(
            (x / scale @ inverse).reshape(everyone.shape),
            lambda v: (v.flatten(1) @ inverse / scale).reshape(v.shape),
            lambda v: (v.flatten(1) * scale @ root).reshape(v.shape),
        )
    covariance = (1 - SHRINKAGE) * (x.T @ x) / (count - 1) + SHRINKAGE * variance.diag()
    factor = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(factor, x.T, upper=False).T.reshape(everyone.shape)

    def back(v: Tensor) -> Tensor:
        flat = v.flatten(1)
        return torch.linalg.solve_triangular(factor.T, flat.T, upper=True).T.reshape(v.shape)

    return _White(white, back, lambda v: (v.flatten(1) @ factor).reshape(v.shape))


def _roots(
    standard: Float[Tensor, "particle param"],
) -> tuple[Float[Tensor, "param param"], Float[Tensor, "param param"]]:
    """Symmetric root, and its inverse, of the shrunk correlations of particles of unit variance."""
    correlation = (1 - SHRINKAGE) * (standard.T @ standard) / (len(standard) - 1)
    ridge = SHRINKAGE * torch.eye(len(correlation), dtype=standard.dtype, device=standard.device)
    values, vectors = torch.linalg.eigh(correlation + ridge)
    # They are at least the shrinkage; rounding must not make them smaller.
    values = values.clamp_min(max(SHRINKAGE / 2, torch.finfo(values.dtype).eps))
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T
