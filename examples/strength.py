"""Digits once more: how hard should particles repel, and what is it worth beside simpler remedies?

The networks, data and scores of ``digits.py``, FoRDE-PCA at five strengths from none (which is the
deep ensemble) to 320 times the published one, under a number of conditions: other batches, numbers
of networks and bandwidths, and with what a deep ensemble may be given as well: noise on
the inputs, more weight decay, a penalty on the gradient by the input. The number of steps is the
same everywhere. Each condition and strength is a JSON file in ``--runs`` that grows by one seed at
a time: the script may be killed and started again, and goes on where it was. ``python
benchmarks/results.py`` makes the tables of docs/results.md from these files.

A seed is a split of the data, a start and an order of batches, the same for all strengths, so that
differences are paired. Nothing is chosen on the held-out digits.

What to expect: five minutes per seed on one core.
"""

import argparse
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import digits
import pyro
import torch
from _run_files import opened, write
from digits import FORDE, METHODS, Method
from torch import Tensor
from tqdm.auto import tqdm

from pyro_fordes import Ensemble, Median, ParticleInference

BASE = next(one for one in METHODS if one.label == FORDE)
STRENGTHS = (0, 1, 20, 80, 320)


class Regularised(digits.Classifier):
    """The Bayesian network with another prior, and a penalty on what the input changes.

    The penalty is the squared gradient of the label's log probability by the image, a mean over
    images beside the mean loss.
    """

    def __init__(self, decay: float = digits.WEIGHT_DECAY, penalty: float = 0.0) -> None:
        super().__init__()
        self.penalty = penalty
        precision = digits.NUM_TRAIN * decay
        self.net = digits.bayesianize(digits.mlp(), prior=precision**-0.5)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Labels given images, and the penalty where there are labels."""
        if self.penalty and y is not None:

            def log_probability(x: Tensor) -> Tensor:
                return self.net(x).log_softmax(-1).gather(-1, y[:, None]).sum()

            gradient = torch.func.grad(log_probability)(x)
            scale = digits.NUM_TRAIN / len(x)
            pyro.factor("penalty", -self.penalty * scale * gradient.square().sum())
        return super().forward(x, y)


@dataclass(frozen=True)
class Condition:
    """What differs from ``digits.py`` at every strength."""

    label: str
    changes: dict[str, Any] = field(default_factory=dict)
    particles: int = 10


CONDITIONS = [
    Condition("as in digits.py"),
    Condition("batches of 25", {"batch": 25}),
    Condition("batches of 200", {"batch": 200}),
    Condition("4 networks", particles=4),
    Condition("a quarter of the bandwidth", {"bandwidth": Median(factor=0.25)}),
    Condition("noise .2 on inputs", {"noise": 0.2}),
    Condition("noise .6 on inputs", {"noise": 0.6}),
    Condition("weight decay x 4", {"model": lambda: Regularised(decay=2e-3)}),
    Condition("gradient penalty .01", {"model": lambda: Regularised(penalty=0.01)}),
]


def method(condition: Condition, strength: float) -> Method:
    """FoRDE under a condition, or the deep ensemble at strength 0."""
    found = replace(BASE, label=condition.label, strength=strength, **condition.changes)
    return found if strength else replace(found, transport=Ensemble())


def train(one: Method, condition: Condition, epochs: int, seed: int) -> dict[str, float]:
    """Train and score one ensemble."""
    data = digits.load(seed)
    epochs = max(1, round(epochs * one.batch / digits.BATCH))  # the same number of steps
    inference = digits.build(one, data, epochs, condition.particles, seed)
    ratios: list[float] = []

    def record(inference: ParticleInference, step: int, loss: float) -> None:
        ratios.append(inference.diagnostics()["force_ratio"])

    inference.fit(digits.batches(one, data, seed), epochs, progress_bar=False, callback=record)
    scores = digits.summarise(digits.evaluate(inference, data, (1, 2, 3, 4, 5)))
    # Half of the training is at the full learning rate: what the forces are there.
    return {**scores, "force ratio": statistics.median(ratios[: max(1, len(ratios) // 2)])}


def path_of(folder: Path, condition: Condition, strength: float) -> Path:
    """The run file."""
    kept = "".join(letter if letter.isalnum() else "-" for letter in condition.label)
    return folder / f"{CONDITIONS.index(condition):02}-{kept}-x{strength:03}.json"


def print_table(runs: dict[tuple[str, float], dict[str, Any]], strengths: list[int]) -> None:
    """NLL of the deep ensemble, and differences to it by strength, means over seeds."""
    for name in ("clean NLL", "corrupted NLL"):
        print(f"{name:30}" + "".join(f"{f'x{strength}':>10}" for strength in strengths))
        for condition in CONDITIONS:
            rows = [runs[condition.label, strength]["seeds"] for strength in strengths]
            values = [statistics.fmean(seed[name] for seed in row) for row in rows]
            cells = [values[0], *(value - values[0] for value in values[1:])]
            print(f"{condition.label:30}" + "".join(f"{value:>10.4f}" for value in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of repetitions")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--runs", type=Path, default=Path("out/strength"), help="run files")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args()
    conditions, strengths = CONDITIONS, list(STRENGTHS)
    if options.smoke:
        options.seeds, options.epochs, strengths = 1, 1, [0, 20]
        conditions = [replace(one, particles=3) for one in CONDITIONS]
    torch.set_num_threads(1)  # the networks are small: more threads only wait for each other
    options.runs.mkdir(parents=True, exist_ok=True)
    runs: dict[tuple[str, float], dict[str, Any]] = {}
    # Seed by seed, so that a run that is stopped has the same seeds everywhere but the last one.
    with tqdm(total=options.seeds * len(conditions) * len(strengths), unit="fit") as bar:
        for seed in range(options.seeds):
            for known, condition in zip(CONDITIONS, conditions, strict=True):
                for strength in strengths:
                    bar.set_postfix_str(f"seed {seed}, {condition.label}, x{strength}")
                    path = path_of(options.runs, known, strength)
                    head = {
                        "example": "strength", "condition": condition.label, "strength": strength
                    }  # fmt: skip
                    settings = {"epochs": options.epochs, "particles": condition.particles}
                    content = opened(path, head, settings, "seeds")
                    if len(content["seeds"]) <= seed:
                        one = method(condition, strength)
                        found = train(one, condition, options.epochs, seed)
                        rounded = {name: round(value, 6) for name, value in found.items()}
                        content["seeds"].append(rounded)
                        write(path, content)
                    runs[condition.label, strength] = content
                    bar.update()
    print_table(runs, strengths)


if __name__ == "__main__":
    main()
