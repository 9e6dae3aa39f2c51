r"""Schedules: functions of the step for ``temperature=``, ``repulsion_scale=`` and bandwidths.

A schedule is called with the step (0, 1, ...) and returns a number. Each is a small frozen object
that can be compared and pickled; any function of the step does as well.

Annealing multiplies the driving force by a factor :math:`\gamma` that rises from near 0 to 1
while the repulsion stays as it is, so that particles spread before they settle. That is the target
:math:`p(\theta \mid D)^\gamma`, a temperature of :math:`1 / \gamma`: write
``temperature=Inverse(Tanh(0.01, 1.0, 500))``. The factor must stay above 0, because a temperature
is finite. A ramp of the temperature itself (``Tanh(100.0, 1.0, 500)``) is another path between the
same ends.

Source: D'Angelo & Fortuin, Annealed Stein Variational Gradient Descent, 2021.
"""

import math
from dataclasses import dataclass

from pyro_fordes._checks import ArgumentError, check_number, check_positive_int
from pyro_fordes.particles import Schedule, at_step


@dataclass(frozen=True)
class Constant:
    """The same value at every step, as a plain number would give.

    Args:
        value: the value.

    Raises:
        ArgumentError: if it is no finite number.

    Example:
        >>> Constant(0.5)(1000)
        0.5
    """

    value: float

    def __post_init__(self) -> None:
        """Check the argument."""
        check_number("Constant(value=...)", self.value)

    def __call__(self, step: int) -> float:
        """The value."""
        return float(self.value)


@dataclass(frozen=True)
class Linear:
    r"""A straight line from one value to another.

    .. math:: (1 - u)\,\mathrm{start} + u\,\mathrm{stop},
        \qquad u = \min(1, \max(0, (t - \mathrm{begin}) / \mathrm{num\_steps}))

    Args:
        start: value up to the step ``begin``.
        stop: value from the step ``begin + num_steps`` on.
        num_steps: how many steps the way takes.
        begin: the step at which it begins.

    Raises:
        ArgumentError: if an argument is out of range.

    Example:
        >>> [Linear(0.0, 2.0, num_steps=4)(step) for step in range(6)]
        [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    """

    start: float
    stop: float
    num_steps: int
    begin: int = 0

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_ramp(self)

    def __call__(self, step: int) -> float:
        """Value at a step."""
        return _between(self, _progress(self, step))


@dataclass(frozen=True)
class Tanh:
    r"""A smooth ramp along a hyperbolic tangent: slow, then fast, then slow again.

    .. math:: (1 - w)\,\mathrm{start} + w\,\mathrm{stop}, \qquad
        w = \tanh\left((1.3\,u)^{\mathrm{power}}\right) / \tanh\left(1.3^{\mathrm{power}}\right)

    with the progress :math:`u` of `Linear`. Source: D'Angelo & Fortuin 2021, where the division,
    which makes the end exact, is left out; with their code's power of 10 it changes
    :math:`10^{-12}`.

    Args:
        start: value up to the step ``begin``.
        stop: value from the step ``begin + num_steps`` on.
        num_steps: how many steps the way takes.
        power: the larger, the longer it stays near ``start`` and the steeper it is then.
        begin: the step at which it begins.

    Raises:
        ArgumentError: if an argument is out of range.

    Example:
        >>> ramp = Tanh(0.0, 1.0, num_steps=100)
        >>> [round(ramp(step), 3) for step in (0, 50, 75, 100, 200)]
        [0.0, 0.013, 0.651, 1.0, 1.0]
    """

    start: float
    stop: float
    num_steps: int
    power: float = 10.0
    begin: int = 0

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_ramp(self)
        check_number("Tanh(power=...)", self.power, minimum=0.0, exclusive=True)

    def __call__(self, step: int) -> float:
        """Value at a step."""
        end, here = 1.3**self.power, (1.3 * _progress(self, step)) ** self.power
        return _between(self, math.tanh(here) / math.tanh(end))


@dataclass(frozen=True)
class Cyclic:
    r"""Ramps one after the other, so that particles can leave the modes they are in.

    Within ``num_steps`` the value rises ``cycles`` times from ``start`` towards ``stop`` and falls
    back at once; afterwards it stays at ``stop``.

    .. math:: (1 - w)\,\mathrm{start} + w\,\mathrm{stop}, \qquad
        w = \left(\frac{\mathrm{mod}(t - \mathrm{begin},\, L)}{L}\right)^{\mathrm{power}},
        \quad L = \mathrm{num\_steps} / \mathrm{cycles}

    Source: D'Angelo & Fortuin 2021; five cycles and a power of 10 are their code's.

    Args:
        start: value at the start of each cycle.
        stop: value that a cycle tends to, and from the step ``begin + num_steps`` on.
        num_steps: how many steps all cycles take together.
        cycles: how many cycles.
        power: the larger, the longer a cycle stays near ``start``.
        begin: the step at which the first cycle begins.

    Raises:
        ArgumentError: if an argument is out of range, or a cycle is shorter than two steps.

    Example:
        >>> [Cyclic(0.0, 1.0, num_steps=8, cycles=2, power=1)(step) for step in range(9)]
        [0.0, 0.25, 0.5, 0.75, 0.0, 0.25, 0.5, 0.75, 1.0]
    """

    start: float
    stop: float
    num_steps: int
    cycles: int = 5
    power: float = 10.0
    begin: int = 0

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_ramp(self)
        check_positive_int("Cyclic(cycles=...)", self.cycles)
        check_number("Cyclic(power=...)", self.power, minimum=0.0, exclusive=True)
        if 2 * self.cycles > self.num_steps:
            raise ArgumentError(
                f"Cyclic needs at least two steps per cycle, got num_steps={self.num_steps} and "
                f"cycles={self.cycles}"
            )

    def __call__(self, step: int) -> float:
        """Value at a step."""
        if step - self.begin >= self.num_steps:
            return float(self.stop)
        # In whole numbers, because a cycle need not last a whole number of steps.
        phase = max(0, step - self.begin) * self.cycles % self.num_steps / self.num_steps
        return _between(self, phase**self.power)


@dataclass(frozen=True)
class Inverse:
    r"""One over another schedule: a temperature from a factor of the driving force.

    Args:
        schedule: the schedule (or number) :math:`\gamma`, above 0 at every step.

    Raises:
        ArgumentError: if it is not above 0; for later steps, when they are reached.

    Example:
        >>> temperature = Inverse(Linear(0.25, 1.0, num_steps=3))
        >>> [temperature(step) for step in range(4)]
        [4.0, 2.0, 1.3333333333333333, 1.0]
    """

    schedule: Schedule

    def __post_init__(self) -> None:
        """Check the argument at the first step."""
        self(0)

    def __call__(self, step: int) -> float:
        """One over the value at a step."""
        return 1.0 / at_step("Inverse(schedule=...)", self.schedule, step, exclusive=True)


def _check_ramp(ramp: Linear | Tanh | Cyclic) -> None:
    """Check the arguments that all ramps have."""
    name = type(ramp).__name__
    check_number(f"{name}(start=...)", ramp.start)
    check_number(f"{name}(stop=...)", ramp.stop)
    check_positive_int(f"{name}(num_steps=...)", ramp.num_steps)
    check_number(f"{name}(begin=...)", ramp.begin, minimum=0.0)


def _progress(ramp: Linear | Tanh, step: int) -> float:
    """How much of the way is done, between 0 and 1."""
    return min(1.0, max(0.0, (step - ramp.begin) / ramp.num_steps))


def _between(ramp: Linear | Tanh | Cyclic, weight: float) -> float:
    """Value between start and stop; both ends exact."""
    return (1.0 - weight) * ramp.start + weight * ramp.stop
