"""Regression in one dimension: which repulsion widens the bands between two clusters of data?

The toy of Repulsive Deep Ensembles (D'Angelo & Fortuin, NeurIPS 2021): y = x sin(x) with noise of
standard deviation 0.25, 90 points in two clusters. A Bayesian 1-10-10-1 network is fitted with
particles that are compared in weight space, in function space (on the data, and on points over the
whole range), in feature space and by input gradients, at several repulsion scales, all with the
same budget. The reference is NUTS on the same model, stored in ``regression_1d_nuts.json``;
``--nuts`` runs it anew. Prints a table and writes a figure.

What to expect: three minutes on one core. Between the clusters the deep ensemble has less than
half of the posterior's width. Outputs on points of the whole range bring it near that of NUTS at
scale 1, input gradients and outputs at the data at 10, weights and features only beyond. Calibrated
SVGD in weight space has half to three quarters of it everywhere; nothing else opens outside without
being too wide elsewhere. ``docs/regression_1d.md`` has the table and the figure.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.nn import PyroModule
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_fordes import (
    RBF,
    SVGD,
    WGD,
    Ensemble,
    Features,
    InputGradients,
    Median,
    Outputs,
    ParticleInference,
    Weights,
    bayesianize,
    init_to_modules,
)

NOISE = 0.25
STORED = Path(__file__).with_name("regression_1d_nuts.json")
GRID = torch.linspace(0, 7, 141)
REGIONS = {
    "inside": ((GRID >= 1.5) & (GRID <= 2.5)) | ((GRID >= 4.5) & (GRID <= 6)),
    "between": (GRID >= 3) & (GRID <= 4),
    "outside": (GRID < 1.5) | (GRID > 6),
}


# ---------------------------------------------------------------- data and model


def load() -> tuple[Tensor, Tensor]:
    """90 points, half of them in [1.5, 2.5], the others in [4.5, 6]. Always the same."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(90, generator=generator)
    x = torch.cat([1.5 + u[:45], 4.5 + 1.5 * u[45:]])
    return x, x * x.sin() + NOISE * torch.randn(90, generator=generator)


def mlp() -> nn.Sequential:
    """The network, 1-10-10-1."""
    hidden = (nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh())
    return nn.Sequential(*hidden, nn.Linear(10, 1))


def scale(x: Tensor) -> Tensor:
    """Inputs of the network: [0, 7] becomes [-2, 2]."""
    return (x.unsqueeze(-1) - 3.5) / 1.75


class Regression(PyroModule):
    """Standard normal priors on all weights, known noise."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bayesianize(mlp(), prior=1.0)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Observations given inputs."""
        mean = self.net(scale(x)).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


def functions(samples: dict[str, Tensor], x: Tensor) -> Tensor:
    """The function of every sample at some inputs, (sample, point); noise is left out."""
    weights = {name.removeprefix("net."): value for name, value in samples.items()}
    net = mlp()
    outputs = torch.func.vmap(lambda w: torch.func.functional_call(net, w, (scale(x),)))(weights)
    return outputs.squeeze(-1)


# ---------------------------------------------------------------- methods


KDE = WGD()


@dataclass(frozen=True)
class Method:
    """What differs between the rows of the table; the budget does not."""

    label: str
    space: Any
    transport: Any = KDE
    scales: tuple[float, ...] = (1.0, 10.0, 100.0)
    bandwidth: Any = field(default_factory=Median)


def anywhere() -> Tensor:
    """Random points over the whole range, others at each step."""
    return 7 * torch.rand(30)


EVERYWHERE = torch.linspace(0, 7, 30)
LAYER = "net.3"  # the second hidden layer, after its tanh
METHODS = [
    Method("deep ensemble", Weights(), Ensemble(), scales=(0.0,)),
    Method("weights", Weights()),
    Method(
        "weights, sge",
        Weights(),
        WGD("sge", whiten="diag", calibrate=True),
        scales=(1.0,),
    ),
    Method("outputs at the data", Outputs()),
    Method("outputs on a grid", Outputs(points=EVERYWHERE)),
    Method("outputs, random points", Outputs(points=anywhere), scales=(10.0,)),
    Method("features at the data", Features(LAYER), scales=(100.0,)),
    Method("features on a grid", Features(LAYER, points=EVERYWHERE)),
    Method("input gradients", InputGradients("x", normalize=False)),
    Method("SVGD, weights", Weights(), SVGD(), scales=(1.0,)),
    Method(
        "SVGD calibrated",
        Weights(),
        SVGD(whiten="diag", calibrate=True),
        scales=(1.0,),
        bandwidth=Median(factor=4.0),
    ),
    Method("f-SVGD, outputs", Outputs(), SVGD(), scales=(1.0,)),
]


def train(
    method: Method, repulsion: float, x: Tensor, y: Tensor, steps: int, particles: int, seed: int
) -> ParticleInference:
    """Full-batch Adam from PyTorch's initialisation; the rate falls from 0.02 to 0.001.

    Draws of the prior would be the wider start, and what is left of it after a short training
    would look like uncertainty.
    """
    epochs = max(steps // 50, 1)
    optim = pyro.optim.ExponentialLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": 0.02},
            "gamma": 0.05 ** (1 / epochs),
        }
    )
    inference = ParticleInference(
        Regression(),
        optim,
        particles,
        kernel=RBF(method.space, method.bandwidth),
        transport=method.transport,
        init_loc_fn=init_to_modules(mlp),
        repulsion_scale=repulsion,  # 1 is the posterior's
        seed=seed,
    )
    inference.fit([(x, y)] * min(steps, 50), epochs)
    return inference


# ---------------------------------------------------------------- reference


@dataclass(frozen=True)
class Bands:
    """Mean and standard deviation of the function on the grid."""

    mean: Tensor
    sd: Tensor


def run_nuts(
    x: Tensor, y: Tensor, warmup: int, samples: int, chains: int, depth: int
) -> dict[str, Any]:
    """NUTS in double precision, chain by chain; what is stored."""
    x, y, draws = x.double(), y.double(), []
    for chain in range(chains):
        pyro.set_rng_seed(chain)
        model = Regression().double()
        kernel = NUTS(
            model,
            target_accept_prob=0.7,  # longer steps: what is wanted are functions, not weights
            jit_compile=True,
            ignore_jit_warnings=True,
            max_tree_depth=depth,
        )
        mcmc = MCMC(kernel, samples, warmup)
        mcmc.run(x, y)
        draws.append(functions(mcmc.get_samples(), GRID.double()))
    values = torch.stack(draws)
    between = REGIONS["between"]
    made_by = f"--nuts: {chains} chains of {warmup} + {samples} steps, tree depth {depth}"
    return {
        "made_by": made_by,
        "rhat": round(split_gelman_rubin(values).max().item(), 3),
        # Chains that agree have means that differ by little of the posterior's width.
        "sd_between_by_chain": [round(v, 3) for v in values.std(1)[:, between].mean(1).tolist()],
        "mean_between_by_chain": [round(v, 3) for v in values.mean(1)[:, between].mean(1).tolist()],
        "mean": [round(v, 4) for v in values.flatten(0, 1).mean(0).tolist()],
        "sd": [round(v, 4) for v in values.flatten(0, 1).std(0).tolist()],
    }


# ---------------------------------------------------------------- table and figure


def print_table(reference: Bands, results: dict[tuple[str, float], Tensor]) -> None:
    """Mean sd by region, its ratio to the reference's, and the distance of the means."""
    print(f"{'':27}{'sd of the function':>24}{'ratio to NUTS':>24}")
    head = "".join(f"{name:>8}" for name in REGIONS)
    print(f"{'':22}scale{head}{head} RMSE")
    wanted = [reference.sd[region].mean().item() for region in REGIONS.values()]
    print(f"{'NUTS':27}" + "".join(f"{sd:8.3f}" for sd in wanted))
    for (label, repulsion), f in results.items():
        found = [f.std(0)[region].mean().item() for region in REGIONS.values()]
        error = (f.mean(0) - reference.mean).square().mean().sqrt().item()
        cells = "".join(f"{sd:8.3f}" for sd in found)
        cells += "".join(f"{sd / one:8.2f}" for sd, one in zip(found, wanted, strict=True))
        print(f"{label:22}{f'{repulsion:g}' if repulsion else '-':>5}{cells}{error:5.2f}")


def draw(
    x: Tensor,
    y: Tensor,
    reference: Bands,
    results: dict[tuple[str, float], Tensor],
    shown: list[tuple[str, float]],
    path: Path,
) -> None:
    """Bands of the methods over the reference's, and the width between the clusters by scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(3, 4, figsize=(12, 7.5), layout="constrained")
    for cell, key in zip(grid.flat, shown, strict=False):
        f = results[key]
        mean, sd = f.mean(0), f.std(0)
        cell.fill_between(GRID, mean - 2 * sd, mean + 2 * sd, color="C0", alpha=0.3, linewidth=0)
        cell.plot(GRID, f[:10].T, color="C0", linewidth=0.4)
        for sign in (-2, 2):
            cell.plot(GRID, reference.mean + sign * reference.sd, "k--", linewidth=0.8)
        cell.plot(x, y, ".", color="C3", markersize=2)
        cell.set_ylim(-9, 6)
        cell.set_xlim(0, 7)
        label, repulsion = key
        cell.set_title(f"{label} x{repulsion:g}" if repulsion else label, fontsize=10)
    last = grid.flat[-1]
    for number, method in enumerate(m for m in METHODS if len(m.scales) > 2):
        widths = [
            results[method.label, one].std(0)[REGIONS["between"]].mean() for one in method.scales
        ]
        last.loglog(method.scales, widths, "o-", color=f"C{number}", label=method.label, ms=3)
    last.axhline(reference.sd[REGIONS["between"]].mean(), color="black", ls="--", lw=0.8)
    last.set_title("sd between the clusters by scale", fontsize=10)
    last.legend(frameon=False, fontsize=6)
    figure.savefig(path, dpi=68)
    plt.close(figure)


SHOWN = [
    ("deep ensemble", 0.0),
    ("weights", 100.0),
    ("weights, sge", 1.0),
    ("outputs at the data", 1.0),
    ("outputs at the data", 10.0),
    ("outputs on a grid", 1.0),
    ("outputs on a grid", 10.0),
    ("features on a grid", 100.0),
    ("input gradients", 10.0),
    ("SVGD calibrated", 1.0),
    ("f-SVGD, outputs", 1.0),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--particles", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    parser.add_argument("--nuts", action="store_true", help="run NUTS and write its file to --out")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args()
    length = {"warmup": 300, "samples": 1000, "chains": 4, "depth": 8}
    if options.smoke:
        options.steps, options.particles = 20, 4
        length = {"warmup": 20, "samples": 10, "chains": 1, "depth": 4}
    torch.set_num_threads(1)  # the network is small: more threads only wait for each other
    options.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    x, y = load()
    stored = STORED
    if options.nuts:
        stored = options.out / STORED.name
        stored.write_text(json.dumps(run_nuts(x, y, **length), indent=1))
    found = json.loads(stored.read_text())
    reference = Bands(torch.tensor(found["mean"]), torch.tensor(found["sd"]))

    results = {}
    for method in METHODS:
        for repulsion in method.scales:
            tqdm.write(f"{method.label}, scale {repulsion:g}", file=sys.stderr)
            inference = train(
                method, repulsion, x, y, options.steps, options.particles, options.seed
            )
            results[method.label, repulsion] = functions(inference.get_samples(), GRID)
    print_table(reference, results)
    print(f"R-hat of NUTS: at most {found['rhat']:.3f} ({found['made_by'][8:]})")
    path = options.out / "regression_1d.png"
    draw(x, y, reference, results, SHOWN, path)
    print(
        f"{options.particles} particles, {options.steps} steps, "
        f"{time.perf_counter() - start:.0f} s; wrote {path}"
    )


if __name__ == "__main__":
    main()
