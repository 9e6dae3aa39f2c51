"""How far every transport in weight space ends from posteriors known in closed form.

Each case runs for NUM_SEEDS seeds; the mean and spread of three statistics go to
``closed_forms.json``, from which ``tests/test_closed_forms.py`` takes its bounds and
``docs/calibration.md`` its table. Particles start uniformly in (-2, 2), unconstrained. Standard
deviations have M - 1 in the denominator and are of the constrained values.

Run ``python -m tests.calibration.closed_forms`` to record them anew (15 minutes), or with the names
of some transports to record these only.
"""

import json
import math
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_uniform

from pyro_fordes import RBF, SVGD, WGD, Median, ParticleInference, Weights

RECORD = Path(__file__).with_suffix(".json")
NUM_SEEDS = 20
PARTICLES = 40
# The noise's precision starts far from its posterior.
STEPS = {"linear regression, unknown noise": 240}
FEWEST_STEPS = 120


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------ models, with their posteriors


def gaussian_2d():
    """Correlation .8, standard deviations 1 and 2."""
    covariance = tensor([1.0, 1.6], [1.6, 4.0])
    mean = tensor(1.0, -1.0)

    def model():
        pyro.sample("x", dist.MultivariateNormal(mean, covariance))

    return model, mean, covariance.diagonal().sqrt()


def gaussian_20d():
    """Independent coordinates with standard deviations from .3 to 3."""
    sd = torch.logspace(math.log10(0.3), math.log10(3), 20, dtype=torch.float64)

    def model():
        pyro.sample("x", dist.Normal(torch.zeros_like(sd), sd).to_event(1))

    return model, torch.zeros_like(sd), sd


def gamma_poisson():
    """A rate with a Gamma(2, 1) prior and five counts: the posterior is Gamma(14, 6)."""
    y = tensor(3.0, 1.0, 4.0, 2.0, 2.0)

    def model():
        rate = pyro.sample("rate", dist.Gamma(tensor(2.0)[0], tensor(1.0)[0]))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    return model, tensor(14 / 6), tensor(math.sqrt(14) / 6)


def beta_bernoulli():
    """A probability with a Beta(2, 2) prior, 3 of 10 successes: the posterior is Beta(5, 9)."""
    y = torch.cat([torch.ones(3), torch.zeros(7)]).double()

    def model():
        p = pyro.sample("p", dist.Beta(tensor(2.0)[0], tensor(2.0)[0]))
        with pyro.plate("data", 10):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    return model, tensor(5 / 14), tensor(math.sqrt(5 * 9 / 15) / 14)


def lognormal():
    """A scale with a LogNormal(0, 1) prior and four LogNormal(log scale, 1) observations."""
    logs = tensor(0.3, 1.1, -0.4, 0.8)
    mean, variance = logs.sum() / 5, 1 / 5

    def model():
        scale = pyro.sample("scale", dist.LogNormal(tensor(0.0)[0], tensor(1.0)[0]))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.LogNormal(scale.log(), 1.0), obs=logs.exp())

    first = (mean + variance / 2).exp()
    return model, first[None], first[None] * math.sqrt(math.expm1(variance))


def linear_regression():
    """Two weights and the noise's precision: the posterior is Normal-Gamma.

    Precision ~ Gamma(3, 1), weights ~ Normal(0, 1 / precision), y ~ Normal(x w, 1 / precision).
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(15, 2, dtype=torch.float64, generator=generator)
    noise = 0.7 * torch.randn(15, dtype=torch.float64, generator=generator)
    y = x @ tensor(1.0, -0.5) + noise

    def model():
        precision = pyro.sample("precision", dist.Gamma(tensor(3.0)[0], tensor(1.0)[0]))
        sd = precision.rsqrt()
        w = pyro.sample("w", dist.Normal(torch.zeros_like(x[0]), sd).to_event(1))
        with pyro.plate("data", 15):
            pyro.sample("y", dist.Normal((x * w).sum(-1), sd), obs=y)

    inverse = torch.linalg.inv(x.T @ x + torch.eye(2, dtype=x.dtype))
    mean = inverse @ (x.T @ y)
    shape, rate = 3 + 15 / 2, 1 + (y @ y - y @ x @ mean) / 2
    # The weights' marginal is Student's t with twice the shape's degrees of freedom.
    sd = (inverse.diagonal() * rate / (shape - 1)).sqrt()
    return (
        model,
        torch.cat([shape / rate[None], mean]),
        torch.cat([math.sqrt(shape) / rate[None], sd]),
    )


TARGETS = {
    "Gaussian 2-d, correlation .8": gaussian_2d,
    "Gaussian 20-d, sd .3 to 3": gaussian_20d,
    "Gamma-Poisson": gamma_poisson,
    "Beta-Bernoulli": beta_bernoulli,
    "LogNormal": lognormal,
    "linear regression, unknown noise": linear_regression,
}
ONE_DIMENSION = ("Gamma-Poisson", "Beta-Bernoulli", "LogNormal")

ESTIMATORS = ("kde", "blob", "sge", "ssge")
JOINT, WIDE = RBF(Weights()), RBF(Weights(), Median(factor=4.0))
# name: transport and kernel
TRANSPORTS = {
    **{name: (WGD(name), JOINT) for name in ESTIMATORS},
    **{
        f"{name}, {whiten}, calibrated": (WGD(name, whiten=whiten, calibrate=True), JOINT)
        for whiten in ("diag", "full")
        for name in ESTIMATORS
    },
    "SVGD, joint": (SVGD(), JOINT),
    "SVGD, coordinate": (SVGD(), RBF(Weights(group="coordinate"))),
    **{
        f"SVGD, {whiten}, calibrated, wide kernel": (SVGD(whiten, calibrate=True), WIDE)
        for whiten in ("diag", "full")
    },
}
# In one dimension full whitening is diagonal whitening, and one coordinate is all of them.
SAME_IN_ONE = {name for name in TRANSPORTS if "full" in name or "coordinate" in name}
CASES = [
    (target, transport)
    for target in TARGETS
    for transport in TRANSPORTS
    if target not in ONE_DIMENSION or transport not in SAME_IN_ONE
]


def run(target, transport, seed):
    """Statistics of one run: error of the mean in sd, ratios of sd to the exact one."""
    model, mean, sd = TARGETS[target]()
    rule, kernel = TRANSPORTS[transport]
    steps = STEPS.get(target, FEWEST_STEPS)
    # A short memory of squared gradients: those of the start are far larger than all later ones.
    options = {"lr": 0.25, "lrd": 0.01 ** (1 / steps), "betas": (0.9, 0.95), "clip_norm": 1e9}
    inference = ParticleInference(
        model,
        pyro.optim.ClippedAdam(options),
        PARTICLES,
        kernel=kernel,
        transport=rule,
        # Not from the prior, which for the Gaussian targets is the answer.
        init_loc_fn=init_to_uniform,
        seed=seed,
    )
    inference.run(steps, progress_bar=False)
    x = torch.cat([value.reshape(PARTICLES, -1) for value in inference.get_samples().values()], 1)
    ratio = x.std(0) / sd
    return {
        "mean error over sd": ((x.mean(0) - mean) / sd).abs().max().item(),
        "smallest sd ratio": ratio.min().item(),
        "largest sd ratio": ratio.max().item(),
    }


def table(record):
    """The record as a Markdown table: error of the mean; smallest to largest sd ratio."""
    lines = ["| transport | " + " | ".join(TARGETS) + " |", "|---" * (len(TARGETS) + 1) + "|"]
    for transport in TRANSPORTS:
        cells = []
        for target in TARGETS:
            found = record[target].get(transport)
            if found is None:
                cells.append("")
                continue
            error, low, high = (f"{statistic['mean']:.2f}" for statistic in found.values())
            cells.append(f"{error}; {low}" + (f" to {high}" if high != low else ""))
        lines.append(f"| {transport} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    """Run every case, or those of the transports named, for every seed and write the record."""
    wanted = sys.argv[1:] or list(TRANSPORTS)
    if unknown := set(wanted) - set(TRANSPORTS):
        sys.exit(f"no transports {sorted(unknown)}; there are {list(TRANSPORTS)}")
    record = json.loads(RECORD.read_text()) if sys.argv[1:] else {}
    for target, transport in CASES:
        if transport not in wanted:
            continue
        runs = [run(target, transport, seed) for seed in range(NUM_SEEDS)]
        found = {}
        for name in runs[0]:
            values = torch.tensor([statistics[name] for statistics in runs], dtype=torch.float64)
            found[name] = {
                "mean": round(values.mean().item(), 6),
                "sd": round(values.std().item(), 6),
            }
        record.setdefault(target, {})[transport] = found
        shown = "  ".join(f"{v['mean']:7.3f} +- {v['sd']:.3f}" for v in found.values())
        print(f"{target:33} {transport:36} {shown}", flush=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
