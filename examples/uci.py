"""Six UCI regression sets: test log likelihood and RMSE of every method on the standard splits.

A network with one hidden layer of 50 units, 20 particles, and a noise scale that is latent as well,
on the 20 splits of Hernández-Lobato & Adams (2015). All methods have the same model, start,
optimiser and number of steps, on minibatches of 100. Each row of the table, one method on one set,
is a JSON file in ``--runs`` that grows by one split at a time: the script may be killed and started
again, and goes on where it was. ``python benchmarks/results.py`` makes ``docs/results.md`` from
these files.

The row ``pyro.infer.SVGD`` is Pyro's class with its default kernel, on the same log joint with one
latent site (as its rows mix particles where there are several), the minibatches and starts of the
others. ``SVGD, by coordinate`` is the same rule by this library.

Data are read from ``--data``, from the folder that PYRO_FORDES_DATA names, or from
``../shared/data``: ``uci/NAME.npz`` with ``x``, ``y`` and ``test_indices`` (split, row).

What to expect: five hours on one core for everything, five seconds to a minute per method and
split. Standard errors over splits are larger than most differences; those of a split are paired,
and the figure and docs/results.md show them so.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _run_files import opened, write
from pyro.infer import SVGD as PyroSVGD
from pyro.infer.svgd import RBFSteinKernel
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import biject_to
from tqdm.auto import tqdm

from pyro_fordes import (
    RBF,
    SVGD,
    WGD,
    Ensemble,
    InputGradients,
    Median,
    Outputs,
    ParticleInference,
    Weights,
    bayesianize,
    metrics,
    pca_lengthscale,
)

SETS = ("boston", "concrete", "energy", "power", "wine", "yacht")
BATCH = 100
RATE, LAST_RATE = 0.01, 0.001
NOISE = dist.LogNormal(-1.0, 1.0)  # of the standardised targets


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Split:
    """Inputs and targets standardised by the training rows; `scale` is the targets' unit."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    scale: float


def load(path: Path, number: int) -> Split:
    """One of the standard splits."""
    stored = np.load(path)
    x, y = (torch.tensor(stored[name], dtype=torch.float64) for name in ("x", "y"))
    test = torch.zeros(len(y), dtype=torch.bool)
    test[torch.from_numpy(stored["test_indices"][number]).long()] = True
    mean, sd = x[~test].mean(0), x[~test].std(0)
    x = (x - mean) / torch.where(sd > 0, sd, 1.0)
    middle, scale = y[~test].mean(), y[~test].std()
    y = (y - middle) / scale
    return Split(x[~test].float(), y[~test].float(), x[test].float(), y[test].float(), scale.item())


def made_up(number: int) -> Split:
    """A small problem for ``--smoke``."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(150, 3, generator=generator)
    y = x[:, 0].sin() + 0.1 * torch.randn(150, generator=generator)
    return Split(x[:120], y[:120], x[120:], y[120:], 1.0)


# ---------------------------------------------------------------- model


def mlp(inputs: int) -> nn.Sequential:
    """50 hidden units."""
    return nn.Sequential(nn.Linear(inputs, 50), nn.ReLU(), nn.Linear(50, 1))


def prior(name: str, value: Tensor) -> float:
    """Weights are scaled by the number of inputs of their layer, so that outputs are of order 1."""
    return value.shape[1] ** -0.5 if name.endswith("weight") else 1.0


class Regression(PyroModule):
    """The network and its noise."""

    def __init__(self, inputs: int, num_data: int) -> None:
        super().__init__()
        self.num_data = num_data
        self.net = bayesianize(mlp(inputs), prior=prior)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Targets given inputs; the plate scales a batch to the whole training set."""
        noise = pyro.sample("noise", NOISE)
        mean = self.net(x).squeeze(-1)
        with pyro.plate("data", self.num_data, subsample_size=len(x)):
            return pyro.sample("y", dist.Normal(mean, noise), obs=y)


def batches(data: Split, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Minibatches, the same for every method."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(data.y), generator=generator).split(BATCH):
            if len(rows) == min(BATCH, len(data.y)):
                yield data.x[rows], data.y[rows]
                steps -= 1
            if steps == 0:
                return


# ---------------------------------------------------------------- methods


def gradients(data: Split) -> InputGradients:
    """Input gradients of the mean, in the metric of the data's principal components."""
    return InputGradients("x", output="net", lengthscale=pca_lengthscale(data.x))


def around(data: Split) -> Callable[[], Tensor]:
    """Points around the data: rows with noise, others at each step."""

    def points() -> Tensor:
        rows = torch.randint(len(data.x), (BATCH,))
        return data.x[rows] + 0.5 * torch.randn(BATCH, data.x.shape[1])

    return points


@dataclass(frozen=True)
class Method:
    """What differs between the rows; `strength` None stands for N / B, the FoRDE paper's."""

    space: Callable[[Split], Any] = lambda data: Weights()
    transport: Any = None
    strength: float | None = 1.0
    bandwidth: Any = field(default_factory=Median)


METHODS = {
    "deep ensemble": Method(transport=Ensemble()),
    "pyro.infer.SVGD": Method(),
    "SVGD, by coordinate": Method(lambda data: Weights(group="coordinate"), SVGD()),
    "SVGD, weights": Method(transport=SVGD()),
    "WGD, weights": Method(transport=WGD()),
    "WGD, weights, calibrated": Method(transport=WGD("sge", whiten="diag", calibrate=True)),
    "SVGD, weights, calibrated": Method(
        transport=SVGD(whiten="diag", calibrate=True), bandwidth=Median(factor=4.0)
    ),
    "WGD, outputs": Method(lambda data: Outputs("net"), WGD()),
    "WGD, outputs around the data": Method(
        lambda data: Outputs("net", points=around(data)), WGD(), None
    ),
    "FoRDE-PCA": Method(gradients, WGD()),
    "FoRDE-PCA, N/B": Method(gradients, WGD(), None),
}


def start(data: Split, particles: int, seed: int) -> dict[str, Tensor]:
    """Initial particles, the same for every method: PyTorch's networks, the noise near 0.4.

    Pyro's kernel divides by the median distance of each coordinate, so no two may be equal.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        nets = [mlp(data.x.shape[1]) for _ in range(particles)]
        noise = 0.4 * torch.exp(0.1 * torch.randn(particles))
    names = [name for name, _ in nets[0].named_parameters()]
    values = {
        f"net.{name}": torch.stack([net.get_parameter(name).detach() for net in nets])
        for name in names
    }
    return {"noise": noise, **values}


@dataclass(frozen=True)
class Given:
    """Starts each particle from given values of all sites."""

    values: dict[str, Tensor]

    def for_particle(self, index: int, shapes: dict[str, torch.Size]) -> Callable[[Any], Tensor]:
        """Init function of one particle."""
        return lambda site: self.values[site["name"]][index].clone()


def decayed(steps: int) -> dict[str, float]:
    """Adam's rate falls from 0.01 to 0.001."""
    lrd = (LAST_RATE / RATE) ** (1 / steps)
    return {"lr": RATE, "lrd": lrd, "clip_norm": 1e9}


def fit(
    method: Method, data: Split, steps: int, particles: int, seed: int
) -> tuple[dict[str, Tensor], float]:
    """Samples of one method, and the seconds it took."""
    begin = time.perf_counter()
    inference = ParticleInference(
        Regression(data.x.shape[1], len(data.y)),
        pyro.optim.ClippedAdam(decayed(steps)),
        particles,
        kernel=RBF(method.space(data), method.bandwidth),
        transport=method.transport,
        init_loc_fn=Given(start(data, particles, seed)),
        repulsion_scale=len(data.y) / BATCH if method.strength is None else method.strength,
        num_data=len(data.y),
        seed=seed,
    )
    for x, y in batches(data, steps, seed):
        inference.step(x, y)
    return inference.get_samples(), time.perf_counter() - begin


# ---------------------------------------------------------------- Pyro's SVGD


def shapes_of(inputs: int) -> dict[str, torch.Size]:
    """Shapes of all sites."""
    net = mlp(inputs)
    return {"noise": torch.Size([])} | {
        f"net.{name}": value.shape for name, value in net.named_parameters()
    }


def unpack(packed: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Unconstrained values of all sites from vectors, (*batch, size)."""
    parts = packed.split([shape.numel() for shape in shapes.values()], -1)
    return {
        name: part.reshape(part.shape[:-1] + shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def network(values: dict[str, Tensor], x: Tensor) -> Tensor:
    """Outputs of many networks at once, (*batch, point)."""
    w, b = values["net.0.weight"], values["net.0.bias"]
    hidden = (x @ w.mT + b.unsqueeze(-2)).relu()
    return (hidden @ values["net.2.weight"].mT + values["net.2.bias"].unsqueeze(-2)).squeeze(-1)


def one_site(x: Tensor, y: Tensor, num_data: int) -> None:
    """The log joint of `Regression` with one latent vector, written to broadcast."""
    shapes = shapes_of(x.shape[1])
    size = sum(shape.numel() for shape in shapes.values())
    flat = dist.Normal(torch.zeros(size), 1.0).to_event(1).mask(False)
    packed = pyro.sample("packed", flat)
    values = unpack(packed, shapes)
    to_noise = biject_to(NOISE.support)
    noise = to_noise(values["noise"])
    log_prior = NOISE.log_prob(noise) + to_noise.log_abs_det_jacobian(values["noise"], noise)
    for name, shape in shapes.items():
        if name != "noise":
            sd = prior(name, torch.empty(shape))
            log_prior = log_prior + dist.Normal(0.0, sd).log_prob(values[name]).flatten(
                packed.dim() - 1
            ).sum(-1)
    log_likelihood = dist.Normal(network(values, x), noise.unsqueeze(-1)).log_prob(y).sum(-1)
    pyro.factor("log_joint", log_prior + num_data / len(y) * log_likelihood)


def fit_pyro(data: Split, steps: int, particles: int, seed: int) -> tuple[dict[str, Tensor], float]:
    """Pyro's own class, started where the others are."""
    begin = time.perf_counter()
    pyro.clear_param_store()
    shapes = shapes_of(data.x.shape[1])
    values = start(data, particles, seed)
    values["noise"] = biject_to(NOISE.support).inv(values["noise"])
    packed = torch.cat([values[name].reshape(particles, -1) for name in shapes], dim=1)
    # Its driving force is on the scale of all data, its optimiser sees no num_data.
    optim = pyro.optim.ClippedAdam(decayed(steps))
    svgd = PyroSVGD(one_site, RBFSteinKernel(), optim, particles, max_plate_nesting=0)
    for step, (x, y) in enumerate(batches(data, steps, seed)):
        if step == 0:  # its particles exist after the first call of the guide
            svgd.guide(x, y, len(data.y))
            pyro.param("svgd_particles").data.copy_(packed.reshape(-1))
        svgd.step(x, y, len(data.y))
    found = unpack(pyro.param("svgd_particles").detach().reshape(particles, -1), shapes)
    pyro.clear_param_store()
    return {**found, "noise": biject_to(NOISE.support)(found["noise"])}, (
        time.perf_counter() - begin
    )


# ---------------------------------------------------------------- scores


def score(samples: dict[str, Tensor], data: Split) -> dict[str, float]:
    """Mean log density of the test targets, in their own unit, and RMSE of the mean prediction."""
    means = network(samples, data.test_x)
    log_density = dist.Normal(means, samples["noise"].reshape(-1, 1)).log_prob(data.test_y)
    mixture = log_density.logsumexp(0) - math.log(len(means))
    rmse = metrics.rmse(means, data.test_y).item() * data.scale
    return {"log_likelihood": mixture.mean().item() - math.log(data.scale), "rmse": rmse}


def row(
    name: str, label: str, options: argparse.Namespace, read: Callable[[int], Split]
) -> dict[str, Any]:
    """The run file of one method on one set, continued to the wanted number of splits."""
    settings = {"steps": options.steps, "particles": options.particles, "batch": BATCH}
    path = options.runs / f"{name}-{label.replace(' ', '_').replace('/', '')}.json"
    head = {"example": "uci", "set": name, "method": label, "command": "python examples/uci.py"}
    content = opened(path, head, settings, "splits")
    method = METHODS[label]
    for number in range(len(content["splits"]), options.splits):
        data = read(number)
        if label == "pyro.infer.SVGD":
            samples, seconds = fit_pyro(data, options.steps, options.particles, seed=number)
        else:
            samples, seconds = fit(method, data, options.steps, options.particles, seed=number)
        found = {"split": number, **score(samples, data), "seconds": round(seconds, 2)}
        content["splits"].append(found)
        write(path, content)
        bar.update()
    return content


bar: Any = None


def print_table(rows: dict[tuple[str, str], dict[str, Any]], names: list[str]) -> None:
    """Means over splits and their standard errors."""
    for key, title in {"log_likelihood": "test log likelihood", "rmse": "test RMSE"}.items():
        print(f"{title:30}" + "".join(f"{name:>18}" for name in names))
        for label in METHODS:
            cells = []
            for name in names:
                values = torch.tensor([one[key] for one in rows[name, label]["splits"]])
                error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.nan
                cells.append(f"{values.mean():.3f} ± {error:.3f}")
            print(f"{label:30}" + "".join(f"{cell:>18}" for cell in cells))
        print()


def draw(rows: dict[tuple[str, str], dict[str, Any]], names: list[str], path: Path) -> None:
    """Log likelihood less the deep ensemble's, split by split."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, cells = plt.subplots(
        1, len(names), figsize=(1.2 + 1.7 * len(names), 3.4), layout="constrained", squeeze=False
    )
    labels = [label for label in METHODS if label != "deep ensemble"]
    for cell, name in zip(cells[0], names, strict=True):
        lists = {
            label: torch.tensor([one["log_likelihood"] for one in rows[name, label]["splits"]])
            for label in METHODS
        }
        gains = torch.stack([lists[label] - lists["deep ensemble"] for label in labels])
        error = gains.std(1) / gains.shape[1] ** 0.5 if gains.shape[1] > 1 else 0 * gains[:, 0]
        height = torch.arange(len(labels)).flip(0)
        cell.errorbar(gains.mean(1), height, xerr=error, fmt="o", markersize=3)
        cell.axvline(0, color="black", linewidth=0.8)
        cell.set_title(name, fontsize=10)
        cell.set_yticks(height, labels if name == names[0] else [], fontsize=8)
        cell.tick_params(axis="x", labelsize=7)
    figure.supxlabel("test log likelihood less the deep ensemble's, mean and standard error")
    figure.savefig(path, dpi=80)
    plt.close(figure)


# ---------------------------------------------------------------- main


def main() -> None:
    global bar
    shared = Path(__file__).parents[2] / "shared" / "data"
    data = Path(os.environ.get("PYRO_FORDES_DATA", shared))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--particles", type=int, default=20)
    parser.add_argument("--data", type=Path, default=data, help="folder that has uci/NAME.npz")
    parser.add_argument("--runs", type=Path, default=Path("out/uci"), help="folder of run files")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figure")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.sets, options.splits, options.steps, options.particles = ["made_up"], 2, 20, 4
    torch.set_num_threads(1)  # the networks are small: more threads only wait for each other
    for folder in (options.runs, options.out):
        folder.mkdir(parents=True, exist_ok=True)

    begin = time.perf_counter()
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    with tqdm(total=len(options.sets) * len(METHODS) * options.splits, unit="fit") as bar:
        for name in options.sets:
            path = options.data / "uci" / f"{name}.npz"
            if not options.smoke and not path.exists():
                sys.exit(f"no {path}; name the folder with --data or PYRO_FORDES_DATA")
            read = made_up if options.smoke else (lambda number, path=path: load(path, number))
            for label in METHODS:
                bar.set_postfix_str(f"{name}, {label}")
                rows[name, label] = row(name, label, options, read)
    print_table(rows, options.sets)
    draw(rows, options.sets, options.out / "uci.png")
    print(f"{time.perf_counter() - begin:.0f} s; run files in {options.runs}")


if __name__ == "__main__":
    main()
