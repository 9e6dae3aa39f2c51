r"""Optimisers made for particles: accelerated flows, and Langevin noise.

The driver hands an optimiser the negative velocity :math:`-v` as a gradient, whatever the
transport, so these work with every transport, kernel and space. They are torch optimisers: pass
``optim=lambda params: WAG(params, lr=0.01)`` or ``optim=pyro.optim.PyroOptim(WAG, {"lr": 0.01})``.

All of them move particles by the velocity itself. None is meant to be joined with a preconditioner
such as Adam's: acceleration would need another step size, and noise another covariance.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pyro_fordes._checks import ArgumentError, check_number

# torch declares `Optimizer.step` by overloads that none of its own optimisers repeats, hence the
# `type: ignore[override]` below.
Closure = Callable[[], float]


class WAG(torch.optim.Optimizer):
    r"""Wasserstein accelerated gradient: Nesterov's method on distributions.

    With particles :math:`x`, the places :math:`y` where the velocity :math:`v` is evaluated, step
    size :math:`\epsilon` and :math:`k = 1, 2, \dots`

    .. math:: x_k &= y_{k-1} + \epsilon v(y_{k-1}) \\
        y_k &= x_k + \frac{k - 1}{k} (y_{k-1} - x_{k-1})
            + \frac{k + \alpha - 2}{k} \epsilon v(y_{k-1})

    The tensors given to it hold :math:`y`; :math:`x` is ``state[tensor]["particles"]``, and at rest
    both agree. For large :math:`k` it is stable up to a step size of 4/3 over the largest
    curvature, where plain steps allow 2.

    Source: Liu et al., Understanding and Accelerating Particle-Based Variational Inference, 2019,
    Algorithm 1, with differences of particles of equal index (as in the authors' code) in place of
    inverse exponential maps. It builds on Riemannian accelerated gradient.

    Args:
        params: the particles, or parameter groups.
        lr: step size :math:`\epsilon`.
        alpha: above 3 in the theory; 3.5 to 3.9 in the authors' regressions and networks, 2.1 to
            2.5 in their topic models.

    Raises:
        ArgumentError: if a number is out of range.

    Example:
        >>> y = torch.tensor([1.0], requires_grad=True)
        >>> optimizer = WAG([y], lr=0.1, alpha=3.5)
        >>> for _ in range(50):
        ...     y.grad = y.detach()  # a standard normal target has velocity -y
        ...     optimizer.step()
        >>> bool(y.abs() < 0.1)
        True
    """

    def __init__(self, params: ParamsT, lr: float, alpha: float = 3.5) -> None:
        check_number("WAG(lr=...)", lr, minimum=0.0)
        check_number("WAG(alpha=...)", alpha, minimum=1.0)
        super().__init__(params, {"lr": lr, "alpha": alpha})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Move all tensors once, against their gradients.

        Args:
            closure: evaluates the loss again and returns it; not needed.
        """
        loss = _loss(closure)
        for y, gradient, group, state in _moving(self):
            k = state["step"]
            move = -group["lr"] * gradient
            x = y + move
            momentum = (k - 1) / k * (y - state["particles"])
            momentum += (k + group["alpha"] - 2) / k * move
            y.copy_(x + momentum)
            state["particles"] = x
        return loss


class WNes(torch.optim.Optimizer):
    r"""Wasserstein Nesterov: extrapolate along the particles' last move.

    .. math:: x_k = y_{k-1} + \epsilon v(y_{k-1}), \qquad y_k = x_k + c_k (x_k - x_{k-1})

    With :math:`\mu = H \epsilon` for the target's ``convexity`` :math:`H` and
    :math:`\beta = \mathrm{shrink} \sqrt\mu`,

    .. math:: c = 1 + \beta - \frac{2 (1 + \beta) (2 + \beta) \mu}
        {\sqrt{\beta^2 + 4 (1 + \beta) \mu} - \beta + 2 (1 + \beta) \mu}

    at every step, which is :math:`(1 - \sqrt\mu) / (1 + \sqrt\mu)` for ``shrink=0``. Where no
    convexity is known, :math:`c_k = (k - 1) / (k + 2)`.

    The tensors given to it hold :math:`y`; :math:`x` is ``state[tensor]["particles"]``, and at rest
    both agree. It is stable up to a step size of 4/3 over the largest curvature.

    Source: as for `WAG`; it builds on the Riemannian Nesterov method of Zhang & Sra 2018. The rule
    without convexity is an option of the authors' code.

    Args:
        params: the particles, or parameter groups.
        lr: step size :math:`\epsilon`.
        convexity: smallest curvature of minus the log target, in the velocity's units (over
            ``num_data``, if that is given); a guess will do. Too small oscillates, too large is
            slow. None for the rule that grows with the step.
        shrink: how far the estimate of curvature adapts; 0.2 in the authors' code.

    Raises:
        ArgumentError: if a number is out of range; ``lr * convexity`` must be at most 1.

    Example:
        >>> y = torch.tensor([1.0], requires_grad=True)
        >>> optimizer = WNes([y], lr=0.1, convexity=1.0)
        >>> for _ in range(50):
        ...     y.grad = y.detach()  # a standard normal target has velocity -y
        ...     optimizer.step()
        >>> bool(y.abs() < 1e-4)
        True
    """

    def __init__(
        self, params: ParamsT, lr: float, convexity: float | None = None, shrink: float = 0.2
    ) -> None:
        check_number("WNes(lr=...)", lr, minimum=0.0)
        check_number("WNes(shrink=...)", shrink, minimum=0.0)
        if convexity is not None:
            check_number("WNes(convexity=...)", convexity, minimum=0.0, exclusive=True)
            if lr * convexity > 1:
                raise ArgumentError(
                    f"WNes(lr=..., convexity=...) must have a product of at most 1, got {lr} * "
                    f"{convexity}; convexity is the smallest curvature of minus the log target, "
                    f"and steps beyond 1 over the curvature overshoot"
                )
        super().__init__(params, {"lr": lr, "convexity": convexity, "shrink": shrink})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Move all tensors once, against their gradients.

        Args:
            closure: evaluates the loss again and returns it; not needed.
        """
        loss = _loss(closure)
        for y, gradient, group, state in _moving(self):
            x = y - group["lr"] * gradient
            factor = _extrapolation(state["step"], group)
            y.copy_(x + factor * (x - state["particles"]))
            state["particles"] = x
        return loss


class Langevin(torch.optim.Optimizer):
    r"""Steps along the velocity with Gaussian noise: Langevin dynamics of all particles.

    .. math:: \theta \leftarrow \theta + \epsilon v + \sqrt{2 \epsilon \tau}\, \xi,
        \qquad \xi \sim N(0, I)

    Noise of temperature :math:`\tau` adds :math:`\tau` times the particles' entropy to what is
    maximised, and a repulsion scale of :math:`\lambda` adds :math:`\lambda` times (an estimate of)
    it. The posterior needs 1 in total:

    - with ``transport=Ensemble()`` and ``temperature=1.0`` the particles are parallel, independent
      chains of unadjusted Langevin dynamics (with minibatches, of its stochastic-gradient
      version). For ``p(theta | D)^(1/T)`` give T to the inference, not here.
    - with ``WGD``, ``repulsion_scale=1 - a`` and ``temperature=a`` keep the posterior invariant, in
      the limit of many particles, small steps and an exact estimate of the score. Repulsion at
      scale 1 and noise beside it spread the particles too far.
    - ``SVGD`` smooths its velocity by the kernel, and white noise is not balanced by that; the
      invariant distribution is then another one.

    Step size and noise belong together: where the velocity is divided by ``num_data=N``,
    temperature is ``1 / N`` for the posterior. Steps of finite size widen the distribution: the
    variance of a Gaussian with precision :math:`p` comes out :math:`1 / (1 - \epsilon p / 2)` times
    the right one.

    Noise comes from torch's global generator, which inside a step of `ParticleInference` is the
    inference's own stream. Every tensor gets noise, also parameters that particles share; to spare
    those, give options by name: ``PyroOptim(Langevin, lambda name: {"lr": 0.01, "temperature": 0.0
    if name == "shared" else 1.0})``.

    There is no version with a preconditioner: noise of the same shape as Adam's steps would need
    another drift term, and without it the target changes.

    Source: Welling & Teh, Bayesian Learning via Stochastic Gradient Langevin Dynamics, 2011, Eq. 4
    (with step size :math:`2 \epsilon`).

    Args:
        params: the particles, or parameter groups.
        lr: step size :math:`\epsilon`.
        temperature: :math:`\tau`; 0 for no noise.

    Raises:
        ArgumentError: if a number is out of range.

    Example:
        >>> theta = torch.zeros(10_000, requires_grad=True)
        >>> optimizer = Langevin([theta], lr=0.1)
        >>> for _ in range(100):
        ...     theta.grad = theta.detach()  # a standard normal target has velocity -theta
        ...     optimizer.step()
        >>> bool((theta.var() - 1).abs() < 0.15)
        True
    """

    def __init__(self, params: ParamsT, lr: float, temperature: float = 1.0) -> None:
        check_number("Langevin(lr=...)", lr, minimum=0.0)
        check_number("Langevin(temperature=...)", temperature, minimum=0.0)
        super().__init__(params, {"lr": lr, "temperature": temperature})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Move all tensors once, against their gradients and with noise.

        Args:
            closure: evaluates the loss again and returns it; not needed.
        """
        loss = _loss(closure)
        for group in self.param_groups:
            scale = math.sqrt(2 * group["lr"] * group["temperature"])
            for theta in group["params"]:
                if theta.grad is not None:
                    theta.sub_(theta.grad, alpha=group["lr"])
                    if scale > 0:
                        theta.add_(torch.randn_like(theta), alpha=scale)
        return loss


def _loss(closure: Closure | None) -> float | None:
    """What a closure returns, as torch's optimisers return it."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _moving(
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[Tensor, Tensor, dict[str, Any], dict[str, Any]]]:
    """Tensors with a gradient, their group and their state, in which the step is counted from 1."""
    for group in optimizer.param_groups:
        for y in group["params"]:
            if y.grad is None:
                continue
            state = optimizer.state[y]
            if not state:
                state.update(step=0, particles=y.detach().clone())
            state["step"] += 1
            yield y, y.grad, group, state


def _extrapolation(step: int, group: dict[str, Any]) -> float:
    """The factor c of `WNes`."""
    if group["convexity"] is None:
        return (step - 1) / (step + 2)
    shrink, root = group["shrink"], math.sqrt(group["convexity"] * group["lr"])
    beta = shrink * root
    # The formula with a square root of mu cancelled, so that a step size of 0 is no 0 / 0.
    taken = 2 * (1 + beta) * (2 + beta) * root
    taken /= math.sqrt(shrink**2 + 4 * (1 + beta)) - shrink + 2 * (1 + beta) * root
    return 1 + beta - taken
