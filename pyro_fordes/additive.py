r"""A kernel that compares particles as a whole and coordinate by coordinate.

Its gradient is a sum over parts, one for the joint distance and one for each coordinate, so it is
no one slope times :math:`r - r'`. The parts of coordinates are made in blocks that are no larger
than the particles (or some constant), and made again where they are needed twice.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import ArgumentError, check_number, check_part
from pyro_fordes.kernels import KernelMatrix

# So many numbers per block of kernels are no burden. A few coordinates then need only one block,
# which is kept.
BLOCK = 2**17


class Part(NamedTuple):
    """Kernels of some features at some points: those are the points of ``matrix``, in order."""

    points: slice
    features: slice
    matrix: KernelMatrix

    def by_feature(self, flat: Tensor, axis: int) -> Tensor:
        """An axis over the points of ``matrix`` as two, over points and features."""
        return flat.unflatten(axis, (self.points.stop - self.points.start, -1))


@dataclass(frozen=True)
class AdditiveMatrix(KernelMatrix):
    """A kernel matrix with a part for the joint distance and parts for single features.

    Attributes:
        value: the kernel, all parts together.
        slope: that of the joint part, times its weight.
        bandwidth: weighted mean over parts.
        share: weight of the mean over features.
        parts: gives the kernels of single features, block by block.
    """

    share: float = 0.0
    parts: Callable[[], Iterable[Part]] = tuple

    def gradient_sum(
        self,
        weights: Float[Tensor, "#group #local #particle"],
        left: Float[Tensor, "#group outer local"] | None = None,
    ) -> Float[Tensor, "outer point feature"]:
        """Weighted sum of gradients by the first argument; see `KernelMatrix.gradient_sum`."""
        total = super().gradient_sum(weights)
        num_points, num_features = total.shape[1:]
        scale = self.share / num_features / (num_points if self.pooled else 1)
        for part in self.parts():
            own = weights
            if len(weights) > 1:
                repeats = part.features.stop - part.features.start
                own = weights[part.points].repeat_interleave(repeats, 0)
            sums = part.by_feature(part.matrix.gradient_sum(own).squeeze(2), 1)
            total[:, part.points, part.features] += scale * sums
        if left is None:
            return total
        flat = total.flatten(1).unsqueeze(0) if len(left) == 1 else total.transpose(0, 1)
        found = left @ flat
        if len(left) == 1:
            return found[0].unflatten(1, (num_points, num_features))
        return found.transpose(0, 1)

    def transposed(self, rows: slice) -> "AdditiveMatrix":
        """The kernel as a function of its second argument; see `KernelMatrix.transposed`."""
        return replace(
            self,
            value=self.value.mT[:, rows],
            slope=self.slope.mT[:, rows],
            rows=rows,
            parts=lambda: (
                part._replace(matrix=part.matrix.transposed(rows)) for part in self.parts()
            ),
        )


@dataclass(frozen=True)
class Additive:
    r"""Mean of a kernel of all features and of the same kernel of single features.

    .. math:: \kappa(r, r') = (1 - a)\, \kappa_0(r, r')
        + \frac{a}{D} \sum_{d=1}^D \kappa_d(r_d, r'_d)

    with the share :math:`a`. Every part has a bandwidth of its own, by the same rule. The joint
    part knows how features depend on each other, the others see each one's distribution in full
    resolution: in many dimensions a joint kernel cannot. It is for posteriors with long tails, in
    weight space, with the calibrated rule and more particles than dimensions, better ten times as
    many (``docs/calibration.md``)::

        kernel = Additive(RBF(Weights()))
        transport = WGD("sge", whiten="full", calibrate=True)  # or SVGD with these two

    It depends on the choice of axes, so full whitening takes coordinates that lie as near to the
    original ones as can be (see `WGD`).

    Kernels of single features take as much memory as the particles, or up to a megabyte; time is
    that of ``Weights(group="coordinate")`` in addition to the joint kernel's.

    Args:
        kernel: `RBF`, `IMQ`, a `Mixture` or another kernel; its space is where particles are
            compared.
        share: :math:`a`, above 0 and at most 1.

    Raises:
        ArgumentError: if an argument is of the wrong kind or out of range.

    Example:
        >>> from pyro_fordes import RBF, Fixed, Weights
        >>> kernel = Additive(RBF(Weights(), Fixed(0.5)), share=0.5)
        >>> r = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]]])
        >>> kernel.evaluate(r).mean[0, 1]  # the parts are exp(-1), and exp(-1) and 1
        tensor(0.5259)
    """

    kernel: Any
    share: float = 0.3
    isotropic = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_part("Additive(kernel=...)", self.kernel, "evaluate", "a kernel such as RBF(...)")
        if isinstance(self.kernel, Additive):
            raise ArgumentError(
                "Additive(kernel=...) is Additive already; give it RBF(...), IMQ(...) or a Mixture"
            )
        if not 0 < check_number("Additive(share=...)", self.share) <= 1:
            raise ArgumentError(
                f"Additive(share=...) must be above 0 and at most 1, got {self.share}; 0 is the "
                f"kernel alone"
            )

    @property
    def space(self) -> Any:
        """Where particles are compared."""
        return self.kernel.space

    def evaluate(
        self,
        everyone: Float[Tensor, "particle point feature"],
        rows: slice = slice(None),
        step: int = 0,
        *,
        pooled: bool = True,
    ) -> AdditiveMatrix:
        """Kernel between the local and all particles, from the joint and the single distances."""
        joint = self.kernel.evaluate(everyone, rows, step, pooled=pooled)
        parts = _parts(self.kernel, joint.everyone, rows, step)
        each = self.share / everyone.shape[2]
        value = (1 - self.share) * joint.value
        width = (1 - self.share) * joint.bandwidth
        for part in parts():
            value[part.points] += each * part.by_feature(part.matrix.value, 0).sum(1)
            width[part.points] += each * part.by_feature(part.matrix.bandwidth, 0).sum(1)
        slope = (1 - self.share) * joint.slope
        return AdditiveMatrix(value, slope, width, rows, joint.everyone, pooled, self.share, parts)


def _parts(
    kernel: Any, everyone: Float[Tensor, "particle point feature"], rows: slice, step: int
) -> Callable[[], Iterable[Part]]:
    """A function that gives a kernel for each feature at each point, block by block."""
    count, num_points, num_features = everyone.shape
    most = max(-(-num_points * num_features // count), BLOCK // count**2, 1)
    per_block, at_once = (max(most // num_features, 1), min(most, num_features))
    blocks = [
        (
            slice(point, min(point + per_block, num_points)),
            slice(feature, min(feature + at_once, num_features)),
        )
        for point in range(0, num_points, per_block)
        for feature in range(0, num_features, at_once)
    ]

    def evaluate(points: slice, features: slice) -> Part:
        block = everyone[:, points, features].flatten(1).unsqueeze(2)
        return Part(points, features, kernel.evaluate(block, rows, step, pooled=False))

    if len(blocks) == 1:
        only = evaluate(*blocks[0])
        return lambda: (only,)
    return lambda: (evaluate(*block) for block in blocks)
