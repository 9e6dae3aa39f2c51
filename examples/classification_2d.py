"""Classification in two dimensions: where does each method know that it does not know?

The toy of Repulsive Deep Ensembles (D'Angelo & Fortuin, NeurIPS 2021): five Gaussian classes on a
ring, 40 points each. A Bayesian 2-10-10-5 network is fitted with particles that are compared in
weight space, in function space (on the data, and on points all over the plane), in feature space
and by input gradients, all with the same budget. The reference is NUTS on the same model, stored in
``classification_2d_nuts.json``; ``--nuts`` runs it anew. Prints a table; writes a figure with maps
of the entropy.

What to expect: two minutes on one core. All classify the test set equally well. NUTS is unsure far
from the data and inside the ring; the deep ensemble and every repulsion in weight space are sure
nearly everywhere, along boundaries that they share. Outputs compared all over the plane come
closest to NUTS (the error of the map is half the ensemble's at scale 5), then input gradients
at scale 10. None is as unsure as NUTS.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.nn import PyroModule
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_fordes import (
    RBF,
    SVGD,
    WGD,
    Ensemble,
    Features,
    InputGradients,
    Outputs,
    ParticleInference,
    Weights,
    bayesianize,
    init_to_modules,
    metrics,
)

STORED = Path(__file__).with_name("classification_2d_nuts.json")
NUM_CLASSES, RADIUS, REACH = 5, 5.0, 15.0
AXIS = torch.linspace(-REACH, REACH, 41)
GRID = torch.cartesian_prod(AXIS, AXIS)
REGIONS = {
    "centre": GRID.norm(dim=1) < 2,  # inside the ring, no class near
    "ring": (GRID.norm(dim=1) - RADIUS).abs() < 1.5,
    "far": GRID.norm(dim=1) > 10,
}


# ---------------------------------------------------------------- data and model


def load(per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of every class, standard deviation 1 about its centre. Always the same."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(NUM_CLASSES).repeat_interleave(per_class)
    angle = 2 * math.pi * y / NUM_CLASSES
    centre = RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
    return centre + torch.randn(len(y), 2, generator=generator), y


def mlp() -> nn.Sequential:
    """The network, 2-10-10-5."""
    hidden = (nn.Linear(2, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh())
    return nn.Sequential(*hidden, nn.Linear(10, NUM_CLASSES))


class Classifier(PyroModule):
    """Standard normal priors on all weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bayesianize(mlp(), prior=1.0)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Classes given points of the plane."""
        logits = self.net(x / RADIUS)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def log_probs(samples: dict[str, Tensor], x: Tensor) -> Tensor:
    """Log probabilities of the classes under every sample, (sample, point, class)."""
    weights = {name.removeprefix("net."): value for name, value in samples.items()}
    net, x = mlp(), (x / RADIUS).to(next(iter(weights.values())))
    logits = torch.func.vmap(lambda w: torch.func.functional_call(net, w, (x,)))(weights)
    return logits.log_softmax(-1)


# ---------------------------------------------------------------- methods


KDE = WGD()


@dataclass(frozen=True)
class Method:
    """What differs between the rows of the table; the budget does not."""

    label: str
    space: Any
    transport: Any = KDE
    repulsion: float = 1.0  # 1 is the posterior's


def anywhere() -> Tensor:
    """Random points all over the plane, others at each step."""
    return REACH * (2 * torch.rand(60, 2) - 1)


GRADIENTS = InputGradients("x", output="net")  # of the raw logit of the true class
METHODS = [
    Method("deep ensemble", Weights(), Ensemble()),
    Method("weights", Weights()),
    Method("weights, sge calibrated", Weights(), WGD("sge", whiten="diag", calibrate=True)),
    Method("outputs at the data", Outputs()),
    Method("outputs anywhere", Outputs(points=anywhere)),
    Method("outputs anywhere x5", Outputs(points=anywhere), repulsion=5),
    Method("features anywhere x10", Features("net.3", points=anywhere), repulsion=10),
    Method("input gradients", GRADIENTS),
    Method("input gradients x10", GRADIENTS, repulsion=10),
    Method("SVGD, weights", Weights(), SVGD()),
    Method("f-SVGD, outputs", Outputs(), SVGD()),
]


def train(
    method: Method, x: Tensor, y: Tensor, steps: int, particles: int, seed: int
) -> ParticleInference:
    """Full-batch Adam from PyTorch's initialisation; the rate falls from 0.02 to 0.001."""
    epochs = max(steps // 50, 1)
    optim = pyro.optim.ExponentialLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": 0.02},
            "gamma": 0.05 ** (1 / epochs),
        }
    )
    inference = ParticleInference(
        Classifier(),
        optim,
        particles,
        kernel=RBF(method.space),
        transport=method.transport,
        init_loc_fn=init_to_modules(mlp),
        repulsion_scale=method.repulsion,
        seed=seed,
    )
    inference.fit([(x, y)] * min(steps, 50), epochs)
    return inference


# ---------------------------------------------------------------- reference


@dataclass(frozen=True)
class Result:
    """Entropy and mutual information on the grid, and scores on the test set."""

    entropy: Tensor
    epistemic: Tensor
    nll: float
    accuracy: float


def summarise(samples: dict[str, Tensor], x: Tensor, y: Tensor) -> Result:
    """What is compared, of the equal mixture of the samples' predictions."""
    split = metrics.uncertainty(log_probs(samples, GRID))
    logs = log_probs(samples, x)
    nll, accuracy = metrics.nll(logs, y).item(), metrics.accuracy(logs, y).item()
    return Result(split.total.float(), split.epistemic.float(), nll, accuracy)


def run_nuts(
    data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], length: dict[str, int]
) -> dict[str, Any]:
    """NUTS in double precision, chain by chain; what is stored."""
    x, y = data[0].double(), data[1]
    found = []
    for chain in range(length["chains"]):
        pyro.set_rng_seed(chain)
        model = Classifier().double()
        kernel = NUTS(
            model,
            target_accept_prob=0.7,  # longer steps: what is wanted are functions, not weights
            jit_compile=True,
            ignore_jit_warnings=True,
            max_tree_depth=length["depth"],
        )
        mcmc = MCMC(kernel, length["samples"], length["warmup"])
        mcmc.run(x, y)
        found.append(mcmc.get_samples())
    # R-hat of the predictions, not of the weights, whose modes are permutations of each other.
    probs = torch.stack([log_probs(one, GRID).exp() for one in found])
    within, between = probs.var(1).mean(0), probs.mean(1).var(0) if len(found) > 1 else 0.0
    rhat = (1 - 1 / length["samples"] + between / within.clamp_min(1e-6)).sqrt()
    joined = {name: torch.cat([one[name] for one in found]) for name in found[0]}
    result = summarise(joined, *test)
    return {
        "made_by": f"--nuts: {length}",
        "rhat of the predictions on the grid, median, 95 % and largest": [
            round(float(value), 3) for value in (*rhat.flatten().quantile(QUANTILES), rhat.max())
        ],
        "nll": round(result.nll, 4),
        "accuracy": round(result.accuracy, 4),
        "entropy": [round(value, 3) for value in result.entropy.tolist()],
        "epistemic": [round(value, 3) for value in result.epistemic.tolist()],
    }


QUANTILES = torch.tensor([0.5, 0.95], dtype=torch.float64)


# ---------------------------------------------------------------- table and figure


def print_table(results: dict[str, Result]) -> None:
    """Scores, mean entropies by region, and the distance of the maps to NUTS's."""
    regions = "".join(f"{name:>8}" for name in REGIONS)
    print(f"{'':26}{'test':>16}{'entropy':>24}{'mutual information':>24}")
    print(f"{'':26}{'NLL':>8}{'acc':>8}{regions}{regions}   RMSE")
    wanted = results["NUTS"].entropy
    for label, found in results.items():
        maps = (found.entropy, found.epistemic)
        means = [one[region].mean().item() for one in maps for region in REGIONS.values()]
        error = (found.entropy - wanted).square().mean().sqrt().item()
        cells = "".join(f"{value:8.3f}" for value in (found.nll, found.accuracy, *means))
        print(f"{label:26}{cells}{error:7.3f}")
    print(f"RMSE: of the entropy on the grid against NUTS. The largest is {math.log(5):.3f}.")


def draw(x: Tensor, y: Tensor, results: dict[str, Result], path: Path) -> None:
    """Maps of the predictive entropy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(3, 4, figsize=(11.5, 8.4), layout="constrained")
    for cell, (label, found) in zip(grid.flat, results.items(), strict=True):
        image = cell.imshow(
            found.entropy.reshape(len(AXIS), -1).T,
            origin="lower",
            extent=(-REACH, REACH, -REACH, REACH),
            vmin=0,
            vmax=math.log(NUM_CLASSES),
            cmap="viridis",
        )
        cell.scatter(*x.T, c=y, s=2, cmap="Set1")
        cell.set_title(label, fontsize=10)
        cell.set_xticks([])
        cell.set_yticks([])
    figure.colorbar(image, ax=grid, shrink=0.6, label="entropy of the prediction (nats)")
    figure.savefig(path, dpi=70)
    plt.close(figure)


# ---------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--particles", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    parser.add_argument("--nuts", action="store_true", help="run NUTS and write its file to --out")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args()
    length = {"chains": 4, "warmup": 200, "samples": 300, "depth": 7}
    if options.smoke:
        options.steps, options.particles = 20, 4
        length = {"chains": 2, "warmup": 5, "samples": 5, "depth": 3}
    torch.set_num_threads(1)  # the network is small: more threads only wait for each other
    options.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    data, test = load(40, seed=0), load(20, seed=1)
    stored = STORED
    if options.nuts:
        stored = options.out / STORED.name
        stored.write_text(json.dumps(run_nuts(data, test, length)))
    found = json.loads(stored.read_text())
    maps = (torch.tensor(found["entropy"]), torch.tensor(found["epistemic"]))
    results = {"NUTS": Result(*maps, found["nll"], found["accuracy"])}
    for method in METHODS:
        tqdm.write(method.label, file=sys.stderr)
        inference = train(method, *data, options.steps, options.particles, options.seed)
        results[method.label] = summarise(inference.get_samples(), *test)
    print_table(results)
    path = options.out / "classification_2d.png"
    draw(*data, results, path)
    print(
        f"{options.particles} particles, {options.steps} steps, "
        f"{time.perf_counter() - start:.0f} s; wrote {path}"
    )


if __name__ == "__main__":
    main()
