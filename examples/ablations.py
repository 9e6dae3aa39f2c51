"""Digits once more: which part of FoRDE does what?

The networks, data and scores of ``digits.py``. The base is FoRDE-PCA at twenty times the published
repulsion, with the median bandwidth per point, normalised gradients of the raw logit, at all points
of a batch and at every step; each further row changes one of these. Each row is a JSON file in
``--runs`` that grows by one seed at a time: the script may be killed and started again, and goes on
where it was. ``python benchmarks/results.py`` makes the table of docs/results.md from these files.

A seed is a split of the data, a start and an order of batches, the same for all rows, so that
differences are paired. Nothing is chosen on the held-out digits; the base was known from
``digits.py`` to do well there.

What to expect: two minutes per seed on one core.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import digits
import torch
from _run_files import opened, write
from digits import ENSEMBLE, FORDE, METHODS, Method
from torch import Tensor
from tqdm.auto import tqdm

from pyro_fordes import Fixed, HeatEquation, InputGradients, Median, tuned_lengthscale

BASE = replace(next(one for one in METHODS if one.label == FORDE), label="base: FoRDE-PCA x20")


@dataclass(frozen=True)
class Changed:
    """The base's space with other arguments, for the data's inputs."""

    arguments: Callable[[Tensor], dict[str, Any]]

    def __call__(self, inputs: Tensor) -> InputGradients:
        """The space."""
        return replace(BASE.space(inputs), **self.arguments(inputs))


def metric(alpha: float) -> Changed:
    """Another lengthscale; alpha is 0 for the identity."""
    return Changed(
        lambda inputs: {"lengthscale": tuned_lengthscale(inputs, alpha) if alpha else None}
    )


def changed(label: str, **fields: Any) -> Method:
    """The base with one thing changed."""
    return replace(BASE, label=label, **fields)


ROWS = [
    next(one for one in METHODS if one.label == ENSEMBLE),
    BASE,
    changed("strength x1", strength=1),
    changed("lengthscale: identity", space=metric(0.0)),
    changed("lengthscale: tuned .2", space=metric(0.2)),
    changed("lengthscale: tuned .4", space=metric(0.4)),
    changed("bandwidth: median per particle", bandwidth=Median(per="particle")),
    # What the median was in the base after two epochs, and at the end.
    changed("bandwidth: fixed, 0.2", bandwidth=Fixed(0.2)),
    changed("bandwidth: fixed, 1.5", bandwidth=Fixed(1.5)),
    changed("bandwidth: heat equation", bandwidth=HeatEquation()),
    changed("not normalised", space=Changed(lambda inputs: {"normalize": False})),
    changed("log probability, not logit", space=Changed(lambda inputs: {"output": None})),
    changed("a quarter of the points", space=Changed(lambda inputs: {"points": 0.25})),
    changed("every 4th step", every=4),
]


def run_file(method: Method, options: argparse.Namespace, bar: Any) -> dict[str, Any]:
    """The run file of a row, continued to the wanted number of seeds."""
    settings = {"epochs": options.epochs, "particles": options.particles}
    kept = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in method.label)
    path = options.runs / f"{ROWS.index(method):02}-{kept}.json"
    head = {"example": "ablations", "method": method.label}
    content = opened(path, head, settings, "seeds")
    severities = (3,) if options.smoke else (1, 2, 3, 4, 5)
    for seed in range(len(content["seeds"]), options.seeds):
        bar.set_postfix_str(f"seed {seed}, {method.label}")
        data = digits.load(seed)
        inference = digits.train(method, data, options.epochs, options.particles, seed, False)
        found = digits.summarise(digits.evaluate(inference, data, severities))
        content["seeds"].append({name: round(value, 6) for name, value in found.items()})
        write(path, content)
        bar.update()
    return content


def print_table(runs: list[dict[str, Any]]) -> None:
    """Means over seeds, and the paired difference to the deep ensemble with its standard error."""
    columns = ("clean NLL", "corrupted NLL")
    print(f"{'':32}" + "".join(f"{name:>14}{'minus ensemble':>20}" for name in columns))
    for run in runs:
        line = f"{run['method']:32}"
        for name in columns:
            values, base = (
                torch.tensor([seed[name] for seed in one["seeds"]]) for one in (run, runs[0])
            )
            gain = values - base
            error = gain.std() / len(gain) ** 0.5 if len(gain) > 1 else torch.nan
            line += f"{values.mean():14.4f}" + f"{f'{gain.mean():+.4f} ± {error:.4f}':>20}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of repetitions")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--particles", type=int, default=10)
    parser.add_argument("--runs", type=Path, default=Path("out/ablations"), help="run files")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.epochs, options.particles = 2, 1, 3
    torch.set_num_threads(1)  # the networks are small: more threads only wait for each other
    options.runs.mkdir(parents=True, exist_ok=True)
    # Seed by seed, so that a run that is stopped has the same seeds of all rows but the last one.
    wanted = options.seeds
    with tqdm(total=wanted * len(ROWS), unit="fit") as bar:
        for options.seeds in range(1, wanted + 1):
            runs = [run_file(method, options, bar) for method in ROWS]
    print_table(runs)


if __name__ == "__main__":
    main()
