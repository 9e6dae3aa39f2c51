"""Every transport in weight space against closed forms, with bounds from recorded calibrations.

A statistic of one more seed falls outside mean +- t * sd * sqrt(1 + 1/n) of n = 20 recorded seeds
with probability FAILURE_RATE (Student's t with 19 degrees of freedom). With 234 checks the
false-alarm rate of this file is below 1e-5, and with ``test_statistics.py`` below 1e-4. The
quantile is about 9, so that statistics with tails heavier than a Normal's are covered too.
"""

import json
import math
from pathlib import Path

import pytest
from scipy.stats import t as student

from tests.calibration import closed_forms

FAILURE_RATE = 4e-8
RECORD = json.loads(closed_forms.RECORD.read_text())
# Runs converge far below the spread between seeds, which can be as small as rounding.
RESOLUTION = 1e-3
PAGE = Path(__file__).parent.parent / "docs" / "calibration.md"
QUANTILE = student.ppf(1 - FAILURE_RATE / 2, closed_forms.NUM_SEEDS - 1)


def test_failure_rates_add_up():
    assert len(closed_forms.CASES) * 3 * FAILURE_RATE < 1e-5


@pytest.mark.parametrize(("target", "transport"), closed_forms.CASES)
def test_transport_ends_where_it_did(target, transport):
    found = closed_forms.run(target, transport, seed=closed_forms.NUM_SEEDS + 1)
    for name, statistic in found.items():
        record = RECORD[target][transport][name]
        width = QUANTILE * record["sd"] * math.sqrt(1 + 1 / closed_forms.NUM_SEEDS) + RESOLUTION
        assert abs(statistic - record["mean"]) <= width, (name, statistic, record)


@pytest.mark.parametrize("target", closed_forms.TARGETS)
def test_advised_rule_is_right(target):
    """sge or SVGD, calibrated: mean within .1 sd and standard deviations within 5 %."""
    whiten = "diag" if target in closed_forms.ONE_DIMENSION else "full"
    svgd = [f"SVGD, {how}, calibrated, wide kernel" for how in {"diag", whiten}]
    for rule in (f"sge, {whiten}, calibrated", *svgd):
        record = RECORD[target][rule]
        assert record["mean error over sd"]["mean"] < 0.1
        assert record["smallest sd ratio"]["mean"] > 0.95
        assert record["largest sd ratio"]["mean"] < 1.05


def test_page_shows_the_record():
    assert closed_forms.table(RECORD) in PAGE.read_text()
