"""Schedules: exact values, order, periods, bad arguments, and use by the driver and bandwidths."""

import math
import pickle
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings, strategies as st

from pyro_fordes import (
    RBF,
    ArgumentError,
    Constant,
    Cyclic,
    Fixed,
    Inverse,
    Linear,
    Median,
    ParticleInference,
    Tanh,
    Weights,
)

SCHEDULES = [
    Constant(2.0),
    Linear(0.5, 2.0, 10),
    Tanh(0.5, 2.0, 10, power=3.0, begin=2),
    Cyclic(0.5, 2.0, 10, cycles=2, power=2.0),
    Inverse(Cyclic(0.5, 2.0, 10)),
]
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def model(y):
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean.sum(), 1.0), obs=y)


def test_linear_by_hand():
    ramp = Linear(3.0, 1.0, num_steps=4, begin=2)
    assert [ramp(step) for step in range(9)] == [3.0, 3.0, 3.0, 2.5, 2.0, 1.5, 1.0, 1.0, 1.0]


def test_tanh_is_the_papers_ramp_with_exact_ends():
    """Against tanh((1.3 t / T)^p), to which the division adds 1e-12 at p = 10."""
    ramp = Tanh(0.0, 1.0, num_steps=40)
    for step in range(41):
        assert ramp(step) == pytest.approx(math.tanh((1.3 * step / 40) ** 10), abs=3e-12)
    assert (ramp(0), ramp(40), ramp(10**6)) == (0.0, 1.0, 1.0)
    middle = Tanh(1.0, 3.0, num_steps=2, power=1.0, begin=1)(2)
    assert middle == pytest.approx(1 + 2 * math.tanh(0.65) / math.tanh(1.3), rel=1e-14)


def test_cyclic_is_the_papers_schedule():
    """Against (mod(t, T / C) / (T / C))^p; a cycle lasts 7.5 steps, so no two cycles are equal."""
    for power in (1.0, 4.0):
        schedule = Cyclic(0.0, 1.0, num_steps=30, cycles=4, power=power)
        for step in range(30):
            expected = (math.fmod(step, 7.5) / 7.5) ** power
            assert schedule(step) == pytest.approx(expected, rel=1e-12)
        assert schedule(30) == schedule(31) == 1.0


def test_cyclic_repeats_and_waits():
    schedule = Cyclic(0.2, 5.0, num_steps=60, cycles=3, power=2.0, begin=7)
    values = [schedule(step) for step in range(70)]
    assert values[:8] == [0.2] * 8
    assert values[7:27] == values[27:47] == values[47:67]
    assert values[67:] == [5.0] * 3
    assert all(a < b for a, b in pairwise(values[7:27]))


numbers = st.floats(-1e6, 1e6)


@settings(deadline=None)
@given(
    start=numbers,
    stop=numbers,
    num_steps=st.integers(2, 300),
    begin=st.integers(0, 50),
    power=st.floats(0.1, 30),
    steps=st.lists(st.integers(0, 400), min_size=2, max_size=2),
)
def test_ramps_are_exact_at_the_ends_and_monotone(start, stop, num_steps, begin, power, steps):
    ramps = (
        Linear(start, stop, num_steps, begin),
        Tanh(start, stop, num_steps, power, begin),
        Cyclic(start, stop, num_steps, 1, power, begin),
    )
    rounding = 1e-15 * (abs(start) + abs(stop))
    for ramp in ramps:
        assert ramp(0) == ramp(begin) == start
        assert ramp(begin + num_steps) == ramp(10**9) == stop
        early, late = (ramp(step) for step in sorted(steps))
        assert type(early) is float
        assert min(start, stop) - rounding <= early <= max(start, stop) + rounding
        assert (late - early) * (1 if stop >= start else -1) >= -rounding


def test_inverse_is_one_over_the_factor():
    """The start of D'Angelo and Fortuin's annealing: factor 0.01, temperature 100."""
    factor = Tanh(0.01, 1.0, 50)
    temperature = Inverse(factor)
    assert temperature(0) == pytest.approx(100)
    assert temperature(50) == 1.0
    assert all(temperature(step) * factor(step) == pytest.approx(1) for step in range(60))
    assert Inverse(4)(3) == 0.25


@schedules
def test_schedules_are_values(schedule):
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert [copy(step) for step in range(20)] == [schedule(step) for step in range(20)]
    assert hash(copy) == hash(schedule)
    with pytest.raises(AttributeError):
        schedule.anything = 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Constant(math.nan), r"Constant\(value=...\) must be a finite number"),
        (lambda: Constant("1"), r"Constant\(value=...\) must be a number"),
        (lambda: Linear(math.inf, 1.0, 3), r"Linear\(start=...\)"),
        (lambda: Linear(0.0, True, 3), r"Linear\(stop=...\)"),
        (lambda: Linear(0.0, 1.0, 0), r"Linear\(num_steps=...\) must be an integer of at least 1"),
        (lambda: Tanh(0.0, 1.0, 2.5), r"Tanh\(num_steps=...\)"),
        (lambda: Tanh(0.0, 1.0, 3, power=0.0), r"Tanh\(power=...\)"),
        (lambda: Tanh(0.0, 1.0, 3, begin=-1), r"Tanh\(begin=...\)"),
        (lambda: Cyclic(0.0, 1.0, 10, cycles=0), r"Cyclic\(cycles=...\)"),
        (lambda: Cyclic(0.0, 1.0, 10, power=-1.0), r"Cyclic\(power=...\)"),
        (lambda: Cyclic(0.0, 1.0, 9, cycles=5), "two steps per cycle, got num_steps=9"),
        (lambda: Inverse(Linear(0.0, 1.0, 5)), r"Inverse\(schedule=...\)\(0\) .* above 0"),
        (lambda: Inverse(0.0), r"Inverse\(schedule=...\) must be a finite number above 0"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises(ArgumentError, match=message):
        build()


@schedules
def test_every_schedule_fits_everywhere(schedule):
    """As each of the four scheduled numbers at once: the run equals that with plain functions."""
    y = torch.tensor([1.0, 0.5, 2.0])
    runs = []
    for used in (schedule, lambda step: schedule(step)):
        for bandwidth in (Median(factor=used), Fixed(used)):
            inference = ParticleInference(
                model,
                lambda params: torch.optim.SGD(params, lr=0.05),
                4,
                kernel=RBF(Weights(), bandwidth),
                temperature=used,
                repulsion_scale=used,
                seed=0,
            )
            inference.run(15, y, progress_bar=False)
            runs.append(inference.get_samples()["mean"])
    assert (runs[0] == runs[2]).all()
    assert (runs[1] == runs[3]).all()
    assert (runs[0] != runs[1]).any()


def test_annealing_scales_the_driving_force():
    """A factor on the driving force is a temperature of one over it; repulsion is left alone."""
    y = torch.tensor([1.0, 0.5, 2.0])
    found = {}
    for name, temperature in (("cold", 1.0), ("annealed", Inverse(Linear(0.125, 1.0, 10)))):
        inference = ParticleInference(
            model,
            lambda params: torch.optim.SGD(params, lr=0.05),
            4,
            kernel=RBF(Weights()),
            temperature=temperature,
            seed=0,
        )
        inference.step(y)
        found[name] = inference.diagnostics()
    for force, factor in (("driving_force", 0.125), ("repulsive_force", 1.0)):
        torch.testing.assert_close(found["annealed"][force], factor * found["cold"][force])
