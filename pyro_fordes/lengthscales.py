r"""Metrics on the sphere of normalised input gradients.

A metric is a diagonal :math:`\Sigma` in the basis of the data's principal components :math:`U`:
the kernel sees :math:`(U^T s - U^T s')^T \Sigma^{-1} (U^T s - U^T s')` (FoRDE, Eq. 14). Directions
with a large entry of :math:`\Sigma^{-1}` repel strongly.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import (
    ArgumentError,
    check_choice,
    check_number,
    check_positive_int,
    describe,
)


@dataclass(frozen=True, eq=False)
class Lengthscale:
    r"""A metric: rotate, then scale by the square roots of the inverse squared lengthscales.

    Attributes:
        precision: the diagonal of :math:`\Sigma^{-1}`, or None for the identity.
        rotation: principal components in columns, all or the leading ones; None for the identity.

    Example:
        >>> Lengthscale(precision=torch.tensor([4.0, 1.0]))(torch.tensor([0.6, 0.8]))
        tensor([1.2000, 0.8000])
    """

    precision: Float[Tensor, " component"] | None = None
    rotation: Float[Tensor, "feature component"] | None = None

    @property
    def num_features(self) -> int | None:
        """Length of the gradients it fits, None if any."""
        fitted = self.precision if self.rotation is None else self.rotation
        return None if fitted is None else len(fitted)

    def to(self, like: Tensor) -> "Lengthscale":
        """The same metric with the dtype and device of a tensor."""
        return Lengthscale(
            None if self.precision is None else self.precision.to(like),
            None if self.rotation is None else self.rotation.to(like),
        )

    def __call__(
        self, gradients: Float[Tensor, "*batch feature"]
    ) -> Float[Tensor, "*batch component"]:
        """Map normalised gradients so that Euclidean distance becomes the metric's distance."""
        if self.rotation is not None:
            gradients = gradients @ self.rotation
        return gradients if self.precision is None else gradients * self.precision.sqrt()


def identity_lengthscale() -> Lengthscale:
    r"""Metric :math:`\Sigma = I` (FoRDE-Identity).

    Example:
        >>> identity_lengthscale()(torch.tensor([0.6, 0.8]))
        tensor([0.6000, 0.8000])
    """
    return Lengthscale()


def pca_lengthscale(
    data: Tensor | Iterable, *, center: bool = True, num_components: int | float | None = None
) -> Lengthscale:
    r"""Metric :math:`\Sigma^{-1} = \Lambda` from the data's covariance :math:`U\Lambda U^T`.

    FoRDE-PCA (Section 4.2, Eq. 14): functions are pushed apart most along the directions in which
    the inputs vary most. The published code does not centre the data (``center=False``).

    With ``num_components`` the leading components are kept alone, and kernel, rotation and what
    ranks exchange shrink by as much. Of a squared distance between unit gradients at most four
    times the largest eigenvalue that was left out is then missing.

    Args:
        data: training inputs ``(point, ...)``, or an iterable of batches of them, such as a data
            loader; of a batch that is a tuple or list the first entry is taken. Batches are
            streamed: memory is that of one batch and the covariance.
        center: whether to subtract the mean of each feature.
        num_components: how many components are kept: a number, or as in scikit-learn's ``PCA`` a
            share of the variance, between 0 and 1, that they have at least; None for all.

    Returns:
        The metric, in double precision (a driver casts it to its particles).

    Raises:
        ArgumentError: if there are fewer than two points, no tensor, values are not finite, or
            ``num_components`` is out of range.

    Example:
        >>> data = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> pca_lengthscale(data).precision
        tensor([2.6667, 0.6667], dtype=torch.float64)
        >>> pca_lengthscale(data, num_components=0.7).precision
        tensor([2.6667], dtype=torch.float64)
    """
    _check_components(num_components)
    eigenvalues, rotation = _principal_components(data, center)
    if num_components is None:
        return Lengthscale(eigenvalues, rotation)
    keep = _how_many(num_components, eigenvalues)
    return Lengthscale(eigenvalues[:keep].clone(), rotation[:, :keep].clone())


def tuned_lengthscale(
    data: Tensor | Iterable, alpha: float, average: str = "precision", *, center: bool = True
) -> Lengthscale:
    r"""Metric between the identity (``alpha=0``) and PCA (``alpha=1``): FoRDE-Tuned.

    The sources differ in what is averaged. ``average="precision"`` is the authors' web page and
    poster, :math:`\Sigma^{-1} = (1-\alpha) I + \alpha \Lambda`. ``average="lengthscale"`` is the
    paper's appendix D.4, :math:`\Sigma = (1-\alpha) I + \alpha \Lambda^{-1}`. They agree at 0 and 1
    only. The scale of the data matters in between.

    Args:
        data: as for `pca_lengthscale`.
        alpha: weight of the PCA part, 0 to 1.
        average: ``"precision"`` or ``"lengthscale"``.
        center: whether to subtract the mean of each feature.

    Raises:
        ArgumentError: if an argument is out of range or the data unfit.

    Example:
        >>> data = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> tuned_lengthscale(data, 0.5).precision
        tensor([1.8333, 0.8333], dtype=torch.float64)
        >>> tuned_lengthscale(data, 0.5, average="lengthscale").precision
        tensor([1.4545, 0.8000], dtype=torch.float64)
    """
    check_choice("tuned_lengthscale(average=...)", average, ("precision", "lengthscale"))
    alpha = check_number("tuned_lengthscale(alpha=...)", alpha, minimum=0.0)
    if alpha > 1:
        raise ArgumentError(f"tuned_lengthscale(alpha=...) must be between 0 and 1, got {alpha}")
    eigenvalues, rotation = _principal_components(data, center)
    if average == "precision":
        precision = (1 - alpha) + alpha * eigenvalues
    elif alpha == 0:
        precision = torch.ones_like(eigenvalues)
    else:  # 1 / (alpha / eigenvalue + 1 - alpha), which is 0 where the eigenvalue is
        precision = eigenvalues / (alpha + (1 - alpha) * eigenvalues)
    return Lengthscale(precision, rotation)


def _check_components(wanted: int | float | None) -> None:
    name = "pca_lengthscale(num_components=...)"
    if isinstance(wanted, int):
        check_positive_int(name, wanted)
    elif wanted is not None and not (isinstance(wanted, float) and 0 < wanted < 1):
        raise ArgumentError(
            f"{name} must be a number of components, a share of the variance between 0 and 1, or "
            f"None for all, got {wanted!r}"
        )


def _how_many(wanted: int | float, eigenvalues: Float[Tensor, " feature"]) -> int:
    """A number of components, from that or a share of the variance."""
    if isinstance(wanted, float):
        # Rounding must not ask for more than there is.
        share = eigenvalues.cumsum(0) / eigenvalues.sum().clamp_min(1e-300)
        return min(int((share < wanted).sum()) + 1, len(eigenvalues))
    if wanted > len(eigenvalues):
        raise ArgumentError(
            f"pca_lengthscale(num_components=...) is {wanted}, but the data have "
            f"{len(eigenvalues)} features"
        )
    return wanted


def _batches(data: Tensor | Iterable) -> Iterable[Tensor]:
    """The batches of inputs, flattened to ``(point, feature)`` in double precision."""
    if not isinstance(data, Iterable):
        raise ArgumentError(
            f"the data of a lengthscale must be a tensor (point, feature, ...) or an iterable of "
            f"such batches, got {type(data).__name__}"
        )
    for batch in [data] if isinstance(data, Tensor) else data:
        inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(inputs, Tensor) or inputs.dim() < 2:
            got = describe(inputs) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise ArgumentError(
                f"the data of a lengthscale must be a tensor (point, feature, ...) or an iterable "
                f"of such batches, got {got}"
            )
        yield inputs.detach().flatten(1).double()


def _principal_components(data: Tensor | Iterable, center: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending, not negative) and eigenvectors of the covariance, streamed.

    Means and scatter matrices are merged batch by batch (Chan, Golub & LeVeque 1983), which keeps
    the digits that a running sum of squares loses.
    """
    count = 0
    mean = scatter = torch.zeros(0)
    for inputs in _batches(data):
        size = len(inputs)
        if size == 0:
            continue
        batch_mean = inputs.mean(0) if center else torch.zeros_like(inputs[0])
        residual = inputs - batch_mean
        batch_scatter = residual.T @ residual
        if count == 0:
            count, mean, scatter = size, batch_mean, batch_scatter
            continue
        if batch_scatter.shape != scatter.shape:
            raise ArgumentError(
                f"batches of a lengthscale's data must have the same number of features, got "
                f"{len(scatter)} and {len(batch_scatter)}"
            )
        shift = batch_mean - mean
        scatter = (
            scatter + batch_scatter + torch.outer(shift, shift) * (count * size / (count + size))
        )
        mean = mean + shift * (size / (count + size))
        count += size
    if count < 2:
        raise ArgumentError(f"a lengthscale needs at least two data points, got {count}")
    if not scatter.isfinite().all():
        raise ArgumentError("the data of a lengthscale has values that are not finite")
    eigenvalues, rotation = torch.linalg.eigh(scatter / (count - 1))
    return eigenvalues.flip(0).clamp_min(0.0), rotation.flip(1)
