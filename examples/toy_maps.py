"""Two toys and their pictures: a band on one input, decision and uncertainty maps on two.

Fits ten small Bayesian networks to a noisy curve with a gap, and ten to two half moons, each as a
deep ensemble and with repulsion (by input gradients; on the moons ten times the published
strength). Writes three pictures: where data are missing, repulsion keeps the particles apart. Takes
half a minute on one core.
"""

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from PIL import Image
from pyro.nn import PyroModule
from sklearn.datasets import make_moons
from torch import Tensor, nn

from pyro_fordes import (
    RBF,
    WGD,
    Ensemble,
    InputGradients,
    ParticleInference,
    ParticlePredictive,
    bayesianize,
    init_to_modules,
    plots,
)

NOISE = 0.1


def mlp(inputs: int, outputs: int) -> Callable[[], nn.Sequential]:
    """Makes fresh networks with two hidden layers of 32."""
    return lambda: nn.Sequential(
        nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, outputs)
    )


class Curve(PyroModule):
    """Regression on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bayesianize(mlp(1, 1)(), prior=1.0)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Observations given inputs."""
        mean = self.net(x.unsqueeze(-1)).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


class Moons(PyroModule):
    """Classification on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bayesianize(mlp(2, 2)(), prior=1.0)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Labels given inputs."""
        logits = self.net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def curve() -> tuple[Tensor, Tensor]:
    """60 points in two clusters."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(60, generator=generator)
    x = torch.cat([-1.5 + u[:30], 0.5 + u[30:]])
    return x, (2 * x).sin() + NOISE * torch.randn(60, generator=generator)


def moons() -> tuple[Tensor, Tensor]:
    """120 points on two half moons."""
    x, y = make_moons(120, noise=0.1, random_state=0)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def train(
    model: PyroModule, make: Callable[[], nn.Module], steps: int, repulsion: float, *args: Tensor
) -> ParticleInference:
    """Full-batch Adam; a repulsion of 0 is a deep ensemble."""
    inference = ParticleInference(
        model,
        pyro.optim.Adam({"lr": 0.01}),
        num_particles=10,
        kernel=RBF(InputGradients("x", output="net", normalize=args[0].dim() > 1)),
        transport=WGD() if repulsion else Ensemble(),
        init_loc_fn=init_to_modules(make),
        repulsion_scale=repulsion,
        seed=0,
    )
    inference.run(steps, *args)
    return inference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the pictures")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.steps = 20
    torch.set_num_threads(1)  # the networks are small: more threads only wait for each other
    options.out.mkdir(parents=True, exist_ok=True)

    def save(figure: Any, name: str) -> None:
        path = options.out / f"toy_{name}.png"
        raw = io.BytesIO()
        figure.savefig(raw, dpi=80)
        Image.open(raw).convert("RGB").quantize(200).save(path)
        plt.close(figure)
        print(f"wrote {path}")

    x, y = curve()
    grid = torch.linspace(-2.2, 2.2, 200)
    figure, cells = plt.subplots(1, 2, figsize=(9.6, 3.8), sharey=True, layout="constrained")
    for cell, (name, repulsion) in zip(
        cells, {"Deep ensemble": 0.0, "Input gradients, scale 10": 10.0}.items(), strict=True
    ):
        inference = train(Curve(), mlp(1, 1), options.steps, repulsion, x, y)
        found = ParticlePredictive(inference).parameters(grid)["y"]
        plots.regression_band(grid, found["loc"], NOISE, data=(x, y), title=name, axes=cell)
        cell.set_ylim(-2.2, 2.2)
    save(figure, "band")

    x, y = moons()
    figures = [
        plt.subplots(1, 2, figsize=(10.0, 4.2), sharey=True, layout="constrained") for _ in range(2)
    ]
    for column, (name, repulsion) in enumerate({"deep ensemble": 0.0, "FoRDE x10": 10.0}.items()):
        inference = train(Moons(), mlp(2, 2), options.steps, repulsion, x, y)
        predict = ParticlePredictive(inference)

        def log_probs(points: Tensor, predict: ParticlePredictive = predict) -> Tensor:
            return predict.parameters(points)["y"]["logits"]

        options_ = {"margin": 0.6}
        plots.decision_map(
            log_probs, x, y, title=f"Class, {name}", axes=figures[0][1][column], **options_
        )
        plots.uncertainty_map(
            log_probs, x, y, title=f"Mutual information, {name}", axes=figures[1][1][column],
            **options_,
        )  # fmt: skip
    save(figures[0][0], "decisions")
    save(figures[1][0], "uncertainty")


if __name__ == "__main__":
    main()
