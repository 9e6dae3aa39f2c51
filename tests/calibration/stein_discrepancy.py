"""How large the squared kernel Stein discrepancy of exact, independent draws is.

Its distribution is skewed and has no simple quantiles, so the largest value of many seeds is
recorded in ``stein_discrepancy.json``: one more seed exceeds the largest of n with probability
1 / (n + 1). ``tests/test_diagnostics.py`` takes its bound from there.

Run ``python -m tests.calibration.stein_discrepancy`` to record it anew (1 minute).
"""

import json
from pathlib import Path

import torch

from pyro_fordes.diagnostics import kernel_stein_discrepancy

RECORD = Path(__file__).with_suffix(".json")
NUM_SEEDS = 99_999
PARTICLES, SIZE, BANDWIDTH = 50, 2, 1.0
KERNELS = ("imq", "rbf")


def draws(seed):
    """Exact draws from a standard Normal, whose score is minus the draw."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(PARTICLES, SIZE, dtype=torch.float64, generator=generator)


def statistic(x, kernel):
    """Squared discrepancy to the standard Normal, as the test measures it."""
    return kernel_stein_discrepancy(x, -x, kernel=kernel, bandwidth=BANDWIDTH).item()


def main():
    """Record the largest value and the mean of each kernel."""
    torch.set_num_threads(1)
    record = {}
    for kernel in KERNELS:
        values = [statistic(draws(seed), kernel) for seed in range(NUM_SEEDS)]
        record[kernel] = {
            "largest": max(values),
            "mean": sum(values) / NUM_SEEDS,
            "seeds": NUM_SEEDS,
        }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
