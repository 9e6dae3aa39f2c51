"""Regression in one dimension: which repulsion widens the bands between clusters of data?

Two problems. ``sine`` is the toy of Repulsive Deep Ensembles (D'Angelo & Fortuin, NeurIPS 2021):
y = x sin(x), 90 points in two clusters. ``network`` is made in the way of Subspace Inference
(Izmailov et al., UAI 2019), the toy of the FoRDE paper: the function is a random network of the
fitted architecture, here a draw of the prior, with 120 points in three clusters. Both have noise of
standard deviation 0.25. A Bayesian 1-10-10-1 network is fitted with
particles that are compared in weight space, in function space (on the data, and on points over the
whole range), in feature space and by input gradients, at several repulsion scales, all with the
same budget. The reference is NUTS on the same model, stored in ``regression_1d_nuts.json`` and
``regression_1d_network_nuts.json``; ``--nuts`` runs it anew. Prints a table and writes a figure.

What to expect: three minutes on one core. Between the clusters the deep ensemble has less than
half of the posterior's width. Outputs on points of the whole range bring it near that of NUTS at
scale 1, input gradients and outputs at the data at 10, weights and features only beyond. Calibrated
SVGD in weight space has half to three quarters of it everywhere; nothing else opens outside without
being too wide elsewhere. On ``network`` the ensemble has a tenth of the width and the same scales
are the best. ``docs/regression_1d.md`` has tables and figures.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
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
Interval = tuple[float, float]


# ---------------------------------------------------------------- data and model


@dataclass(frozen=True)
class Problem:
    """Where the data lie, and what is asked of the function where they do not."""

    name: str
    whole: Interval
    clusters: tuple[Interval, ...]
    gaps: tuple[Interval, ...]  # the middle of what lies between clusters
    points: int  # in each cluster
    function: Callable[[Tensor], Tensor]
    shown: Interval  # of y, in the figure

    @property
    def stored(self) -> Path:
        """The file of NUTS's mean and standard deviation."""
        middle = "" if self.name == "sine" else f"{self.name}_"
        return Path(__file__).with_name(f"regression_1d_{middle}nuts.json")

    @property
    def grid(self) -> Tensor:
        """Inputs at which functions are compared."""
        return torch.linspace(*self.whole, 141)

    @property
    def regions(self) -> dict[str, Tensor]:
        """Which of the grid's points are inside the clusters, between and outside."""
        grid, ends = self.grid, [end for cluster in self.clusters for end in cluster]
        return {
            "inside": within(grid, self.clusters),
            "between": within(grid, self.gaps),
            "outside": (grid < min(ends)) | (grid > max(ends)),
        }

    def load(self) -> tuple[Tensor, Tensor]:
        """The data. Always the same."""
        generator = torch.Generator().manual_seed(0)
        u = torch.rand(len(self.clusters), self.points, generator=generator)
        low, high = torch.tensor(self.clusters).unsqueeze(-1).unbind(1)
        x = (low + (high - low) * u).flatten()
        return x, self.function(x) + NOISE * torch.randn(len(x), generator=generator)

    def scale(self, x: Tensor) -> Tensor:
        """Inputs of the network: the whole range becomes [-2, 2]."""
        low, high = self.whole
        return (x.unsqueeze(-1) - (low + high) / 2) / ((high - low) / 4)


def within(x: Tensor, intervals: tuple[Interval, ...]) -> Tensor:
    """Which inputs lie in one of the intervals."""
    return torch.stack([(x >= low) & (x <= high) for low, high in intervals]).any(0)


def mlp() -> nn.Sequential:
    """The network, 1-10-10-1."""
    hidden = (nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh())
    return nn.Sequential(*hidden, nn.Linear(10, 1))


def drawn_network(x: Tensor) -> Tensor:
    """A draw of the prior at some inputs. Always the same."""
    generator = torch.Generator().manual_seed(DRAW)
    net = mlp().to(x.dtype)
    weights = {
        name: torch.randn(value.shape, generator=generator).to(x.dtype)
        for name, value in net.named_parameters()
    }
    with torch.no_grad():
        return torch.func.functional_call(net, weights, (NETWORK.scale(x),)).squeeze(-1)


SINE = Problem(
    name="sine",
    whole=(0.0, 7.0),
    clusters=((1.5, 2.5), (4.5, 6.0)),
    gaps=((3.0, 4.0),),
    points=45,
    function=lambda x: x * x.sin(),
    shown=(-9.0, 6.0),
)
NETWORK = Problem(
    name="network",
    whole=(-10.0, 10.0),
    clusters=((-7.2, -4.8), (-1.2, 1.2), (4.8, 7.2)),
    gaps=((-4.0, -2.0), (2.0, 4.0)),
    points=40,
    function=drawn_network,
    shown=(-5.0, 6.0),
)
DRAW = 5  # seed of the weights: the first whose function turns in more than one place
PROBLEMS = {problem.name: problem for problem in (SINE, NETWORK)}


class Regression(PyroModule):
    """Standard normal priors on all weights, known noise."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem
        self.net = bayesianize(mlp(), prior=1.0)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Observations given inputs."""
        mean = self.net(self.problem.scale(x)).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


def functions(samples: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """The function of every sample at some scaled inputs, (sample, point); noise is left out."""
    weights = {name.removeprefix("net."): value for name, value in samples.items()}
    net = mlp()
    outputs = torch.func.vmap(lambda w: torch.func.functional_call(net, w, (inputs,)))(weights)
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


LAYER = "net.3"  # the second hidden layer, after its tanh


def methods(problem: Problem) -> list[Method]:
    """The rows of the table."""
    low, high = problem.whole
    everywhere = torch.linspace(low, high, 30)

    def anywhere() -> Tensor:
        """Random points over the whole range, others at each step."""
        return low + (high - low) * torch.rand(30)

    return [
        Method("deep ensemble", Weights(), Ensemble(), scales=(0.0,)),
        Method("weights", Weights()),
        Method(
            "weights, sge",
            Weights(),
            WGD("sge", whiten="diag", calibrate=True),
            scales=(1.0,),
        ),
        Method("outputs at the data", Outputs()),
        Method("outputs on a grid", Outputs(points=everywhere)),
        Method("outputs, random points", Outputs(points=anywhere), scales=(10.0,)),
        Method("features at the data", Features(LAYER), scales=(100.0,)),
        Method("features on a grid", Features(LAYER, points=everywhere)),
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
    problem: Problem, method: Method, repulsion: float, steps: int, particles: int, seed: int
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
        Regression(problem),
        optim,
        particles,
        kernel=RBF(method.space, method.bandwidth),
        transport=method.transport,
        init_loc_fn=init_to_modules(mlp),
        repulsion_scale=repulsion,  # 1 is the posterior's
        seed=seed,
    )
    inference.fit([problem.load()] * min(steps, 50), epochs)
    return inference


# ---------------------------------------------------------------- reference


@dataclass(frozen=True)
class Bands:
    """Mean and standard deviation of the function on the grid."""

    mean: Tensor
    sd: Tensor


def run_nuts(
    problem: Problem, warmup: int, samples: int, chains: int, depth: int
) -> dict[str, Any]:
    """NUTS in double precision, chain by chain; what is stored."""
    x, y = (data.double() for data in problem.load())
    draws = []
    for chain in range(chains):
        pyro.set_rng_seed(chain)
        model = Regression(problem).double()
        kernel = NUTS(
            model,
            target_accept_prob=0.7,  # longer steps: what is wanted are functions, not weights
            jit_compile=True,
            ignore_jit_warnings=True,
            max_tree_depth=depth,
        )
        mcmc = MCMC(kernel, samples, warmup)
        mcmc.run(x, y)
        draws.append(functions(mcmc.get_samples(), problem.scale(problem.grid.double())))
    values = torch.stack(draws)
    between = problem.regions["between"]
    named = "" if problem is SINE else f" --problem {problem.name}"
    made_by = f"--nuts{named}: {chains} chains of {warmup} + {samples} steps, tree depth {depth}"
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


def print_table(
    regions: dict[str, Tensor], reference: Bands, results: dict[tuple[str, float], Tensor]
) -> None:
    """Mean sd by region, its ratio to the reference's, and the distance of the means."""
    print(f"{'':27}{'sd of the function':>24}{'ratio to NUTS':>24}")
    head = "".join(f"{name:>8}" for name in regions)
    print(f"{'':22}scale{head}{head} RMSE")
    wanted = [reference.sd[region].mean().item() for region in regions.values()]
    print(f"{'NUTS':27}" + "".join(f"{sd:8.3f}" for sd in wanted))
    for (label, repulsion), f in results.items():
        found = [f.std(0)[region].mean().item() for region in regions.values()]
        error = (f.mean(0) - reference.mean).square().mean().sqrt().item()
        cells = "".join(f"{sd:8.3f}" for sd in found)
        cells += "".join(f"{sd / one:8.2f}" for sd, one in zip(found, wanted, strict=True))
        print(f"{label:22}{f'{repulsion:g}' if repulsion else '-':>5}{cells}{error:5.2f}")


def draw(
    problem: Problem,
    reference: Bands,
    results: dict[tuple[str, float], Tensor],
    shown: list[tuple[str, float]],
    path: Path,
) -> None:
    """Bands of the methods over the reference's, and the width between the clusters by scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    inputs, (x, y) = problem.grid, problem.load()
    between = problem.regions["between"]
    figure, grid = plt.subplots(3, 4, figsize=(12, 7.5), layout="constrained")
    for cell, key in zip(grid.flat, shown, strict=False):
        f = results[key]
        mean, sd = f.mean(0), f.std(0)
        cell.fill_between(inputs, mean - 2 * sd, mean + 2 * sd, color="C0", alpha=0.3, linewidth=0)
        cell.plot(inputs, f[:10].T, color="C0", linewidth=0.4)
        for sign in (-2, 2):
            cell.plot(inputs, reference.mean + sign * reference.sd, "k--", linewidth=0.8)
        cell.plot(x, y, ".", color="C3", markersize=2)
        cell.set_ylim(*problem.shown)
        cell.set_xlim(*problem.whole)
        label, repulsion = key
        cell.set_title(f"{label} x{repulsion:g}" if repulsion else label, fontsize=10)
    last = grid.flat[-1]
    for number, method in enumerate(m for m in methods(problem) if len(m.scales) > 2):
        widths = [results[method.label, one].std(0)[between].mean() for one in method.scales]
        last.loglog(method.scales, widths, "o-", color=f"C{number}", label=method.label, ms=3)
    last.axhline(reference.sd[between].mean(), color="black", ls="--", lw=0.8)
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
    parser.add_argument("--problem", choices=PROBLEMS, default="sine", help="the data")
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
        length = {"warmup": 30, "samples": 10, "chains": 1, "depth": 4}
    torch.set_num_threads(1)  # the network is small: more threads only wait for each other
    options.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    problem = PROBLEMS[options.problem]
    stored = problem.stored
    if options.nuts:
        stored = options.out / stored.name
        stored.write_text(json.dumps(run_nuts(problem, **length), indent=1))
    found = json.loads(stored.read_text())
    reference = Bands(torch.tensor(found["mean"]), torch.tensor(found["sd"]))

    results = {}
    for method in methods(problem):
        for repulsion in method.scales:
            tqdm.write(f"{method.label}, scale {repulsion:g}", file=sys.stderr)
            inference = train(
                problem, method, repulsion, options.steps, options.particles, options.seed
            )
            inputs = problem.scale(problem.grid)
            results[method.label, repulsion] = functions(inference.get_samples(), inputs)
    print_table(problem.regions, reference, results)
    _, _, made_by = found["made_by"].partition(": ")
    print(f"R-hat of NUTS: at most {found['rhat']:.3f} ({made_by})")
    name = "regression_1d.png" if problem is SINE else f"regression_1d_{problem.name}.png"
    path = options.out / name
    draw(problem, reference, results, SHOWN, path)
    print(
        f"{options.particles} particles, {options.steps} steps, "
        f"{time.perf_counter() - start:.0f} s; wrote {path}"
    )


if __name__ == "__main__":
    main()
