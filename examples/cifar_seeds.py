"""CIFAR-10 at the size of one core, seed by seed: what does FoRDE gain on a deep ensemble?

The networks, data and recipe of ``cifar.py`` with ``--budget minutes``: four PreActResNets of three
blocks, 4,000 training images, 1,000 test images, clean and under seven corruptions. A seed is a
start and an order of batches, the same for every method (crops and flips, too, where no noise is
drawn between them), so that differences are paired. FoRDE repels at a quarter of a batch's points,
at the published strength, three and ten times that, with three lengthscales. ``--validate`` tests
on training images that are left over: with it, noise and weight decay of the deep ensemble were
chosen.

Each method is a JSON file in ``--runs`` that grows by one seed at a time: the script may be killed
and started again, and goes on where it was. ``python benchmarks/results.py`` makes the section of
docs/results.md from these files.

What to expect: twenty minutes to an hour per seed on one core. At the published strength clean NLL
is lower by half a percent and nothing else is settled; at three times that, with PCA lengthscales,
accuracy rises under noise and that on clean images does not move; at ten times, it rises more under
noise and blur and falls on clean images. With the identity as metric strength does harm under
noise, and tuned lengthscales are between the two.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import cifar
import pyro
import torch
from _run_files import opened, write
from tqdm.auto import tqdm

from pyro_fordes import evaluate

METRICS = ("nll", "accuracy", "ece")
BASE = "deep ensemble"
FORDE = ("--method", "forde-pca", "--points", "0.25")
ROWS: dict[str, tuple[str, ...]] = {
    BASE: ("--method", "ensemble"),
    "FoRDE-PCA x1": FORDE,
    "FoRDE-PCA x10": (*FORDE, "--strength", "10"),
    "weight-RDE x1": ("--method", "weights"),
    "deep ensemble, noise .2": ("--method", "ensemble", "--noise", "0.2"),
    "deep ensemble, noise .4": ("--method", "ensemble", "--noise", "0.4"),
    "deep ensemble, noise .8": ("--method", "ensemble", "--noise", "0.8"),
    "deep ensemble, weight decay x4": ("--method", "ensemble", "--weight-decay", "2e-3"),
    "deep ensemble, weight decay x16": ("--method", "ensemble", "--weight-decay", "8e-3"),
    "FoRDE-PCA x10, noise .2": (*FORDE, "--strength", "10", "--noise", "0.2"),
    "FoRDE-PCA x3": (*FORDE, "--strength", "3"),
    "FoRDE-identity x1": ("--method", "forde-identity", "--points", "0.25"),
    "FoRDE-identity x10": ("--method", "forde-identity", "--points", "0.25", "--strength", "10"),
    "FoRDE-tuned x1": ("--method", "forde-tuned", "--points", "0.25"),
    "FoRDE-tuned x10": ("--method", "forde-tuned", "--points", "0.25", "--strength", "10"),
    "FoRDE-identity x3": ("--method", "forde-identity", "--points", "0.25", "--strength", "3"),
    "FoRDE-tuned x3": ("--method", "forde-tuned", "--points", "0.25", "--strength", "3"),
}
"""The options of ``cifar.py`` for each method."""


class Data:
    """Images of a data set, decoded once; the test images are corrupted once."""

    def __init__(self, folder: Path, dataset: str, budget: cifar.Budget, validate: bool) -> None:
        images, labels = cifar.SOURCES[dataset].read(folder, True)
        self.images, self.labels = images[: budget.train], labels[: budget.train]
        if validate:  # on training images that are not trained on
            images, labels = images[budget.train :], labels[budget.train :]
        else:
            images, labels = cifar.SOURCES[dataset].read(folder, False)
        self.test_images, self.test_labels = images[: budget.test], labels[: budget.test]
        self.budget = budget
        self.batches: dict[Any, Any] = {}

    def test(self, options: argparse.Namespace, scale: Any) -> dict[Any, Any]:
        """Test batches by kind and severity."""
        if not self.batches:
            found = cifar.test_loaders(
                options, self.budget, self.test_images, self.test_labels, scale
            )
            self.batches = {key: list(loader) for key, loader in found.items()}
        return self.batches


def one(options: argparse.Namespace, data: Data) -> dict[str, Any]:
    """Train one ensemble, and what it scores: clean, by corruption, and the mean of these."""
    begin = time.process_time()
    pyro.set_rng_seed(options.seed)  # crops and flips
    inference, scale = cifar.train(options, data.budget, data.images, data.labels)
    ratio = inference.diagnostics()["force_ratio"]
    seconds = time.process_time() - begin
    found = evaluate(inference, data.test(options, scale), METRICS, resamples=1, progress_bar=False)
    scores: dict[str, dict[str, float]] = {}
    for row in found.table.rows():
        name = f"{row['data']} {row['severity']}" if row["severity"] else row["data"]
        scores.setdefault(name, {})[row["metric"]] = round(row["value"], 5)
    return {
        "seed": options.seed,
        "force_ratio": round(ratio, 5),
        "cpu_seconds": round(seconds, 1),
        "scores": scores,
    }


def run_file(label: str, seeds: int, data: Data, given: argparse.Namespace) -> dict[str, Any]:
    """The run file of a method, continued to the wanted number of seeds."""
    dataset, device = ("invented" if given.smoke else "cifar10"), "cpu"
    path = given.runs / f"{list(ROWS).index(label):02}-{label.replace(' ', '-')}.json"
    head = {"example": "cifar", "method": label, "options": " ".join(ROWS[label])}
    settings = {"dataset": dataset, **vars(data.budget)}
    if given.validate:
        settings["tested"] = "on training images that were not trained on"
    content = opened(path, head, settings, "seeds")
    for seed in range(len(content["seeds"]), seeds):
        command = ["--dataset", dataset, "--device", device, *ROWS[label], "--seed", str(seed)]
        options = cifar.arguments().parse_args(command)
        options.out = given.out / f"{label.replace(' ', '-')}-seed{seed}"
        content["seeds"].append(one(options, data))
        write(path, content)
    return content


def print_table(runs: list[dict[str, Any]]) -> None:
    """Means over seeds, and the paired difference to the first row with its standard error."""
    print(f"{'':32}" + "".join(f"{name:>18}{'minus ensemble':>20}" for name in
                              ("clean NLL", "corrupted NLL", "corrupted accuracy")))  # fmt: skip
    for run in runs:
        line = f"{run['method']:32}"
        for data, metric in (("clean", "nll"), ("corrupted", "nll"), ("corrupted", "accuracy")):
            values, base = (
                torch.tensor([seed["scores"][data][metric] for seed in kept["seeds"]])
                for kept in (run, runs[0])
            )
            gain = values - base
            error = gain.std() / len(gain) ** 0.5 if len(gain) > 1 else torch.nan
            line += f"{values.mean():18.4f}" + f"{f'{gain.mean():+.4f} ± {error:.4f}':>20}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of repetitions")
    parser.add_argument("--methods", nargs="+", choices=ROWS, default=list(ROWS), help="rows")
    parser.add_argument("--validate", action="store_true", help="test on spare training images")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data")
    parser.add_argument("--runs", type=Path, default=Path("out/cifar/runs"), help="run files")
    parser.add_argument("--out", type=Path, default=Path("out/cifar"), help="checkpoints")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    given = parser.parse_args()
    if given.smoke:
        given.seeds = 2
        if given.validate:
            parser.error("--smoke trains on all of its images; --validate has none left")
    torch.set_num_threads(1)  # the networks are small: more threads only wait for each other
    given.runs.mkdir(parents=True, exist_ok=True)
    budget = cifar.BUDGETS["smoke" if given.smoke else "minutes"]
    data = Data(given.data, "invented" if given.smoke else "cifar10", budget, given.validate)
    # Seed by seed, so that a run that is stopped has the same seeds of all rows but the last one.
    with tqdm(total=given.seeds * len(given.methods), unit="fit") as bar:
        for seeds in range(1, given.seeds + 1):
            runs = []
            for label in given.methods:
                bar.set_postfix_str(f"seed {seeds - 1}, {label}")
                runs.append(run_file(label, seeds, data, given))
                bar.update()
    print_table(runs)


if __name__ == "__main__":
    main()
