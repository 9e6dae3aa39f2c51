r"""How well particles stand for the posterior, and whether they have collapsed onto each other.

The **squared kernel Stein discrepancy** compares particles with the posterior by its score alone.
**Effective particles**, **distances** between particles and the **force ratio** tell of collapse.
The last is what `ParticleInference.diagnostics` measures: the mean norm over particles of the
repulsive force over that of the driving force. Near 0, nothing keeps particles apart; near 1, the
forces are in balance, as at the end of a flow.

Functions take tensors, or a `ParticleInference`; all see the particles of this process.
"""

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import (
    ArgumentError,
    NumericalError,
    check_choice,
    check_number,
    describe,
)
from pyro_fordes.bandwidths import Bandwidth, Fixed, Median
from pyro_fordes.kernels import imq_profile, rbf_profile, squared_distances
from pyro_fordes.particles import ravel


@torch.no_grad()
def kernel_stein_discrepancy(
    particles: Tensor,
    scores: Tensor,
    *,
    kernel: str = "imq",
    bandwidth: float | Bandwidth | None = None,
    beta: float = -0.5,
    unbiased: bool = False,
) -> Float[Tensor, ""]:
    r"""Squared kernel Stein discrepancy between particles and a density, from its scores.

    .. math:: \mathrm{KSD}^2 = \frac1{M^2} \sum_{ij} u(\theta_i, \theta_j), \qquad
        u(\theta, \theta') = \kappa\, s \cdot s' + s \cdot \nabla_{\theta'} \kappa
        + s' \cdot \nabla_\theta \kappa + \nabla_\theta \cdot \nabla_{\theta'} \kappa

    with the score :math:`s = \nabla \log p(\theta)` and the kernel :math:`\kappa` of `RBF` or
    `IMQ`. Needs O(M^2) memory beside the arguments and O(M^2 D) operations.

    This V-statistic is never negative, and for M independent exact draws its mean is
    :math:`\mathbb E\, u(\theta, \theta) / M`. The U-statistic (``unbiased``) leaves out the pairs
    of a particle with itself: its mean is then 0, and it can be negative. Only values of the same
    kernel and bandwidth can be compared, and the median follows the particles: give a number to
    compare several sets of them.

    Source: Liu, Lee & Jordan, A Kernelized Stein Discrepancy for Goodness-of-fit Tests, 2016
    (arXiv 1602.03253); Gorham & Mackey, Measuring Sample Quality with Kernels, 2017 (arXiv
    1703.01717), who show that with light-tailed kernels such as `RBF` it can vanish in three or
    more dimensions though the particles do not converge, and not with `IMQ`.

    Args:
        particles: one row per particle, ``(particle, param)``.
        scores: gradient of the log density at each particle, of the same shape.
        kernel: ``"imq"`` for :math:`(1 + d / (2h))^\beta`, ``"rbf"`` for
            :math:`\exp(-d / (2h))`, with the squared distance :math:`d`.
        bandwidth: :math:`h`, a number or a rule with one bandwidth for all pairs; None for
            `Median`.
        beta: exponent of ``"imq"``, between -1 and 0.
        unbiased: whether to return the U-statistic.

    Returns:
        The squared discrepancy, without gradient.

    Raises:
        ArgumentError: if an argument is of the wrong kind, shape or range.
        NumericalError: if a particle or score is not finite.

    Example:
        >>> x = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> kernel_stein_discrepancy(x, -x, kernel="rbf", bandwidth=1.0)
        tensor(0.0454)
    """
    _check_pair(particles, scores)
    count, size = particles.shape
    if unbiased and count == 1:
        raise ArgumentError("unbiased=True needs at least 2 particles, got 1")
    # Only differences of particles, and of scores in the mixed term, matter; centred, they keep
    # their digits.
    x, s = particles - particles.mean(0), scores - scores.mean(0)
    distances = squared_distances(x.unsqueeze(1)).squeeze(0)
    h = _one_bandwidth(bandwidth, distances, size)
    value, slope, curvature = _profile(kernel, distances, h, beta)
    products = s @ x.T
    own = products.diagonal()
    mixed = own + own.unsqueeze(1) - products - products.T
    stein = value * (scores @ scores.T) - slope * (mixed + size) - 2 * curvature * distances
    if unbiased:
        return (stein.sum() - stein.diagonal().sum()) / (count * (count - 1))
    return stein.mean()


def ksd(
    inference: Any,
    *args: Any,
    sites: Collection[str] | None = None,
    kernel: str = "imq",
    bandwidth: float | Bandwidth | None = None,
    beta: float = -0.5,
    unbiased: bool = False,
    **kwargs: Any,
) -> Float[Tensor, ""]:
    """Squared kernel Stein discrepancy between an inference's particles and the posterior.

    Particles are compared in unconstrained space with the posterior of the full data. The
    temperature is not included: tempered particles are measured against the posterior itself. A
    model that draws minibatches gives noisy scores, and they make the value larger; give all rows.

    With ``sites``, kernel and scores are those of these sites alone. The value is 0 for the
    posterior, but tells nothing of the other sites.

    Args:
        inference: a `ParticleInference`.
        *args: arguments of the model.
        sites: names of the latent sites, None for all.
        kernel: see `kernel_stein_discrepancy`.
        bandwidth: see `kernel_stein_discrepancy`.
        beta: see `kernel_stein_discrepancy`.
        unbiased: see `kernel_stein_discrepancy`.
        **kwargs: keyword arguments of the model.

    Returns:
        The squared discrepancy, without gradient.

    Raises:
        ArgumentError: if an argument cannot be used or a site is unknown.
        NumericalError: if a score is not finite.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_fordes import RBF, ParticleInference, Weights
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> inference = ParticleInference(
        ...     model, pyro.optim.Adam({"lr": 0.1}), 20, kernel=RBF(Weights()), seed=0
        ... )
        >>> inference.setup()
        >>> before = ksd(inference, bandwidth=1.0)
        >>> losses = inference.run(100, progress_bar=False)
        >>> bool(ksd(inference, bandwidth=1.0) < before)
        True
    """
    if isinstance(sites, str):
        raise ArgumentError(f"sites must be a list of site names, got {sites!r}; write [{sites!r}]")
    scores = inference.scores(*args, **kwargs)
    particles = inference.get_unconstrained()
    names = list(particles if sites is None else sites)
    unknown = [name for name in names if name not in particles]
    if unknown or not names:
        raise ArgumentError(
            f"sites got {unknown or 'no site'}, but the model's latent sites are {list(particles)}"
        )
    for name in names:
        _check_finite(f"the score of site '{name}'", scores[name])
    return kernel_stein_discrepancy(
        ravel({name: particles[name] for name in names}),
        ravel({name: scores[name] for name in names}),
        kernel=kernel,
        bandwidth=bandwidth,
        beta=beta,
        unbiased=unbiased,
    )


def effective_particles(kernel_matrix: Tensor) -> Float[Tensor, ""]:
    r"""Number of particles that differ, as a kernel sees them: :math:`M^2 / \sum_{ij} k_{ij}`.

    With a kernel of at most 1, and 1 between equal particles, it is M where all are far apart and
    1 where all are the same.

    Args:
        kernel_matrix: kernel between particles, ``(particle, particle)``; or between some and all
            of them, which gives an estimate.

    Raises:
        ArgumentError: if it is no matrix.

    Example:
        >>> effective_particles(torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        tensor(1.8000)
    """
    if not isinstance(kernel_matrix, Tensor) or kernel_matrix.dim() != 2:
        got = describe(kernel_matrix) if isinstance(kernel_matrix, Tensor) else repr(kernel_matrix)
        raise ArgumentError(f"kernel_matrix must be a tensor (particle, particle), got {got}")
    return kernel_matrix.numel() / kernel_matrix.sum()


def distances(
    inference: Any, *args: Any, space: Any = None, **kwargs: Any
) -> Float[Tensor, "particle particle"]:
    """Distances between an inference's particles in a space, root mean square over points.

    Args:
        inference: a `ParticleInference`.
        *args: arguments of the model.
        space: any space, such as `Weights` or `InputGradients`; None for that of the inference's
            kernel.
        **kwargs: keyword arguments of the model.

    Returns:
        Euclidean distances, zero on the diagonal.

    Raises:
        FordesError: if the space does not fit the model and its arguments.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_fordes import RBF, ParticleInference, Weights
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> inference = ParticleInference(
        ...     model, pyro.optim.Adam({"lr": 0.1}), 3, kernel=RBF(Weights()), seed=0
        ... )
        >>> distances(inference).shape
        torch.Size([3, 3])
    """
    return _rms_distances(inference.representation(*args, space=space, **kwargs))


def summary(inference: Any, *args: Any, space: Any = None, **kwargs: Any) -> dict[str, float]:
    """A few numbers that tell whether particles collapsed or do not fit the posterior.

    Args:
        inference: a `ParticleInference` that has taken a step.
        *args: arguments of the model.
        space: where distances are taken, None for the space of the inference's kernel.
        **kwargs: keyword arguments of the model.

    Returns:
        ``squared_ksd``, that of `ksd` with its defaults; ``effective_particles`` by the inference's
        kernel over all that the space compares, now; ``force_ratio`` of the last measured step;
        ``minimum_distance``, ``median_distance`` and ``maximum_distance`` over pairs of particles.

    Raises:
        StateError: if no step has been taken.
        ArgumentError: if there is only one particle.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_fordes import RBF, ParticleInference, Weights
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> inference = ParticleInference(
        ...     model, pyro.optim.Adam({"lr": 0.1}), 3, kernel=RBF(Weights()), seed=0
        ... )
        >>> loss = inference.step()
        >>> list(summary(inference))[:3]
        ['squared_ksd', 'effective_particles', 'force_ratio']
    """
    measured = inference.diagnostics()
    representation = inference.representation(*args, space=space, **kwargs)
    count = len(representation)
    if count == 1:
        raise ArgumentError("a summary compares particles and needs at least 2, got 1")
    rows, columns = torch.triu_indices(count, count, offset=1, device=representation.device)
    pairs = _rms_distances(representation)[rows, columns]
    return {
        "squared_ksd": ksd(inference, *args, **kwargs).item(),
        "effective_particles": effective_particles(
            inference.kernel.evaluate(representation, step=measured["step"]).mean
        ).item(),
        "force_ratio": measured["force_ratio"],
        "minimum_distance": pairs.min().item(),
        "median_distance": pairs.median().item(),
        "maximum_distance": pairs.max().item(),
    }


def _rms_distances(
    representation: Float[Tensor, "particle point feature"],
) -> Float[Tensor, "particle particle"]:
    """Root mean square over points of the distances between particles."""
    r = representation.transpose(0, 1)
    # By differences, not by a matrix product: equal particles are then exactly 0 apart.
    between = torch.cdist(r, r, compute_mode="donot_use_mm_for_euclid_dist")
    return between.square().mean(0).sqrt()


def _profile(
    kernel: str, distances: Tensor, h: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel's value and slope at squared distances, and the slope's derivative by them."""
    check_choice("kernel", kernel, ("imq", "rbf"))
    if kernel == "rbf":
        value, slope = rbf_profile(distances, h)
        return value, slope, slope / (-2 * h)
    if not -1 < check_number("beta", beta) < 0:
        raise ArgumentError(f"beta must be between -1 and 0, got {beta}")
    value, slope = imq_profile(distances, h, beta)
    return value, slope, (beta - 1) * slope / (2 * h + distances)


def _one_bandwidth(
    bandwidth: float | Bandwidth | None,
    distances: Float[Tensor, "particle particle"],
    features: int,
) -> Float[Tensor, ""]:
    """The bandwidth of all pairs from a number, a rule or None."""
    if bandwidth is None:
        rule: Bandwidth = Median()
    elif callable(bandwidth):
        rule = bandwidth
    else:
        rule = Fixed(check_number("bandwidth", bandwidth, minimum=0.0, exclusive=True))
    h = rule(distances.unsqueeze(0), 0, features)
    if h.numel() != 1:
        raise ArgumentError(
            f"bandwidth must be a number or a rule with one bandwidth for all pairs, such as "
            f"Median(); got {bandwidth!r}, which gives {describe(h)}, and the kernel would not be "
            f"symmetric"
        )
    return h.reshape(())


def _check_pair(particles: Tensor, scores: Tensor) -> None:
    """Particles and scores must be finite matrices of the same shape."""
    for name, tensor in (("particles", particles), ("scores", scores)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 2 or tensor.numel() == 0:
            got = describe(tensor) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ArgumentError(f"{name} must be a tensor (particle, param), got {got}")
        if not tensor.is_floating_point():
            raise ArgumentError(f"{name} must be of a floating-point type, got {describe(tensor)}")
    if particles.shape != scores.shape or particles.dtype != scores.dtype:
        raise ArgumentError(
            f"scores must have the shape and type of particles, {describe(particles)}; got "
            f"{describe(scores)}"
        )
    _check_finite("particles", particles)
    _check_finite("scores", scores)


def _check_finite(name: str, tensor: Tensor) -> None:
    """Raise a `NumericalError` that names the first particle with a value that is not finite."""
    bad = ~tensor.reshape(len(tensor), -1).isfinite().all(1)
    if bad.any():
        raise NumericalError(
            f"{name} must be finite, but particle {int(bad.nonzero()[0])} has a value that is not; "
            f"check the model's gradients there, or leave the particle out"
        )
