r"""Transports: how the particles' representations become a velocity that spreads them.

A transport sees tensors only, never Pyro, the model or the optimiser. The driver adds the velocity,
pulled back to the particles, to the gradient of the log joint.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import check_choice
from pyro_fordes.kernels import KernelMatrix


@dataclass(frozen=True)
class Repulsion:
    """What a transport gives the driver.

    Attributes:
        velocity: ascent direction of each local particle's representation.
        kernel: the kernel it was computed from.
    """

    velocity: Float[Tensor, "local point feature"]
    kernel: KernelMatrix


class Transport(Protocol):
    """An update rule. ``repulsive`` says whether it compares particles at all."""

    @property
    def repulsive(self) -> bool:
        """Whether `repel` is to be called; if not, no representation is computed."""
        ...

    def repel(
        self,
        kernel: Any,
        everyone: Float[Tensor, "particle point feature"],
        rows: slice = slice(None),
        step: int = 0,
    ) -> Repulsion:
        """Velocity of the local particles' representations away from the others."""
        ...


@dataclass(frozen=True)
class WGD:
    r"""Wasserstein gradient descent with a kernel density estimate of the particles' density.

    .. math:: v_i = \nabla \log p(\theta_i \mid D)
        - \frac{\sum_j \nabla_{\theta_i} k(\theta_i, \theta_j)}{\sum_j k(\theta_i, \theta_j)}

    over all particles, :math:`i` included; the gradient acts on the first argument only. Source:
    D'Angelo & Fortuin 2021 (kde-WGD); FoRDE 2024, Eq. 8; GFSD of Liu et al. 2019.

    Args:
        estimator: ``"kde"``.

    Raises:
        ArgumentError: if the estimator is unknown.

    Example:
        >>> from pyro_fordes import RBF, Fixed, Weights
        >>> r = torch.tensor([[[0.0]], [[1.0]]])
        >>> WGD().repel(RBF(Weights(), Fixed(0.5)), r).velocity.flatten()
        tensor([-0.5379,  0.5379])
    """

    estimator: str = "kde"

    def __post_init__(self) -> None:
        """Check the argument."""
        check_choice("WGD(estimator=...)", self.estimator, ("kde",))

    @property
    def repulsive(self) -> bool:
        """True: particles are compared."""
        return True

    def repel(
        self,
        kernel: Any,
        everyone: Float[Tensor, "particle point feature"],
        rows: slice = slice(None),
        step: int = 0,
    ) -> Repulsion:
        """Minus the score of the density estimate, by representation."""
        matrix = kernel.evaluate(everyone, rows, step)
        weights = -1 / matrix.mean.sum(-1, keepdim=True)
        return Repulsion(matrix.gradient_sum(weights), matrix)


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

    def repel(
        self,
        kernel: Any,
        everyone: Float[Tensor, "particle point feature"],
        rows: slice = slice(None),
        step: int = 0,
    ) -> Repulsion:
        """Zero velocity."""
        matrix = kernel.evaluate(everyone, rows, step)
        return Repulsion(torch.zeros_like(everyone[rows]), matrix)
