"""How far particles end from the exact posterior of a Bayesian linear regression.

Particles interact, so standard errors of independent draws do not apply. This script repeats the
inference for many seeds and records the mean and spread of each statistic in
``linear_regression.json``; ``tests/test_statistics.py`` takes its bounds from there.

Run ``python -m tests.calibration.linear_regression`` to record them anew (2 minutes).
"""

import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

from pyro_fordes import RBF, WGD, Fixed, Median, ParticleInference, Weights

RECORD = Path(__file__).with_suffix(".json")
NUM_SEEDS = 30
NOISE = 0.5


def data(features):
    """Inputs and observations, the same in every run."""
    generator = torch.Generator().manual_seed(features)
    x = torch.randn(20, features, dtype=torch.float64, generator=generator)
    w = torch.linspace(1, -1, features, dtype=torch.float64)
    return x, x @ w + NOISE * torch.randn(20, dtype=torch.float64, generator=generator)


def model(x, y):
    """Linear regression with a standard Normal prior and known noise."""
    zero = x.new_zeros(x.shape[1])
    w = pyro.sample("w", dist.Normal(zero, 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def exact(x, y):
    """Mean and marginal standard deviations of the posterior, in closed form."""
    precision = x.T @ x / NOISE**2 + torch.eye(x.shape[1], dtype=x.dtype)
    covariance = torch.linalg.inv(precision)
    return covariance @ (x.T @ y) / NOISE**2, covariance.diagonal().sqrt()


# One dimension with a bandwidth of 3 % of the posterior's variance (the smoothed density of the
# particles then has the right variance); and the median rule, which shrinks.
CASES = {
    "1-d, fixed small bandwidth": (1, lambda sd: Fixed(0.03 * float(sd[0] ** 2)), 200),
    "1-d, median bandwidth": (1, lambda sd: Median(), 50),
    "3-d, median bandwidth": (3, lambda sd: Median(), 50),
}


def run(case, seed):
    """Statistics of one run: standardised error of the mean, ratios of standard deviations."""
    features, bandwidth, particles = CASES[case]
    x, y = data(features)
    mean, sd = exact(x, y)
    optim = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.996, "clip_norm": 1e9})
    kernel = RBF(Weights(), bandwidth(sd))
    inference = ParticleInference(
        model, optim, particles, kernel=kernel, transport=WGD("kde"), seed=seed
    )
    inference.run(1500, x, y, progress_bar=False)
    w = inference.get_samples()["w"]
    ratio = w.std(0, correction=0) / sd
    return {
        "mean error over sd": ((w.mean(0) - mean) / sd).abs().max().item(),
        "smallest sd ratio": ratio.min().item(),
        "largest sd ratio": ratio.max().item(),
    }


def main():
    """Run every case for every seed and write the record."""
    record = {}
    for case in CASES:
        runs = [run(case, seed) for seed in range(NUM_SEEDS)]
        record[case] = {}
        for name in runs[0]:
            values = torch.tensor([statistics[name] for statistics in runs], dtype=torch.float64)
            record[case][name] = {
                "mean": values.mean().item(),
                "sd": values.std().item(),
                "seeds": NUM_SEEDS,
            }
            print(f"{case:30} {name:20} {values.mean():8.4f} +- {values.std():.4f}")
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
