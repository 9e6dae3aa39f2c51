"""Particles against closed-form posteriors, with bounds from recorded calibrations.

A statistic of one more seed falls outside mean +- t * sd * sqrt(1 + 1/n) of n recorded seeds with
probability FAILURE_RATE (Student's t); with three statistics in each of three cases the false-alarm
rate of the file is below 2e-5.
"""

import json
import math

import pytest
from scipy.stats import t as student

from tests.calibration import linear_regression

FAILURE_RATE = 2e-6
RECORD = json.loads(linear_regression.RECORD.read_text())
# Runs converge far below the spread between seeds, which can be as small as rounding.
RESOLUTION = 1e-3


@pytest.mark.parametrize("case", linear_regression.CASES)
def test_linear_regression_recovers_the_posterior(case):
    found = linear_regression.run(case, seed=linear_regression.NUM_SEEDS + 1)
    for name, statistic in found.items():
        record = RECORD[case][name]
        quantile = student.ppf(1 - FAILURE_RATE / 2, record["seeds"] - 1)
        width = quantile * record["sd"] * math.sqrt(1 + 1 / record["seeds"]) + RESOLUTION
        assert abs(statistic - record["mean"]) <= width, (name, statistic, record)


def test_record_says_what_is_right_and_what_is_known_to_shrink():
    """The mean is right everywhere; the spread is with a small bandwidth in one dimension."""
    for case in RECORD.values():
        assert case["mean error over sd"]["mean"] < 0.01
    small = RECORD["1-d, fixed small bandwidth"]
    assert abs(small["smallest sd ratio"]["mean"] - 1) < 0.05
    # KDE with one joint median bandwidth shrinks, more so in more dimensions (known bias).
    one, three = RECORD["1-d, median bandwidth"], RECORD["3-d, median bandwidth"]
    assert 0.85 < one["smallest sd ratio"]["mean"] < 1
    assert 0.6 < three["smallest sd ratio"]["mean"] < one["smallest sd ratio"]["mean"]
