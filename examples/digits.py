"""Handwritten digits: do particles that look at different features make a better ensemble?

Trains ensembles of ten small Bayesian networks on 1,200 of scikit-learn's digits, all with the same
budget: a deep ensemble, a repulsive one in weight space, FoRDE with two metrics at the repulsion
of the paper and at twenty times that, and the deep ensemble and FoRDE once more with noise on the
training inputs, which is the fairer pair. Evaluates on the other 597, clean and under five
corruptions at five severities. Prints a table; writes a netCDF file for ArviZ and a figure.

What to expect: a minute on one core. With five seeds (``--seeds 5``), FoRDE-PCA x20 has a fifth to
a quarter lower negative log likelihood than the deep ensemble, clean and corrupted; at the
published strength it is a tenth. Noise on the inputs alone gives more on clean digits; on top of
it, repulsion still gains a sixth under corruption and nothing on clean ones. ``--tune`` adds a row
whose strength and alpha are chosen on a quarter of the training digits, a minute more per seed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.transforms import v2
from tqdm.auto import tqdm

from pyro_fordes import (
    RBF,
    WGD,
    Ensemble,
    InputGradients,
    Median,
    ParticleInference,
    Weights,
    bayesianize,
    init_to_modules,
    metrics,
    pca_lengthscale,
    to_arviz,
    tune,
    tuned_lengthscale,
)

NUM_TRAIN, BATCH = 1200, 100
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Digits:
    """One split of the digits. Images are pixels between 0 and 1; `scale` makes them inputs."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def scale(self, images: Tensor) -> Tensor:
        """Images as inputs of the network: flat, with mean 0 and standard deviation 1."""
        return ((images - self.images.mean()) / self.images.std()).flatten(1)


def load(seed: int) -> Digits:
    """Split the 1,797 scans at random into 1,200 for training and 597 held out."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16
    labels = torch.tensor(labels)[order]
    return Digits(images[:NUM_TRAIN], labels[:NUM_TRAIN], images[NUM_TRAIN:], labels[NUM_TRAIN:])


def salt_and_pepper(images: Tensor, share: float) -> Tensor:
    """Make a share of the pixels black or white, half each."""
    draw = torch.rand(images.shape)
    return torch.where(draw < share / 2, 0.0, torch.where(draw > 1 - share / 2, 1.0, images))


# What each corruption does at severity 1 to 5.
CORRUPTIONS: dict[str, tuple[Callable[[float], Callable[[Tensor], Tensor]], Sequence[float]]] = {
    "Gaussian noise": (lambda sigma: v2.GaussianNoise(sigma=sigma), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "Gaussian blur": (lambda sigma: v2.GaussianBlur(5, sigma), (0.5, 0.7, 0.9, 1.1, 1.3)),
    "contrast": (
        lambda factor: lambda images: v2.functional.adjust_contrast(images, factor),
        (0.75, 0.6, 0.45, 0.3, 0.15),
    ),
    "salt and pepper": (
        lambda share: lambda images: salt_and_pepper(images, share),
        (0.04, 0.08, 0.12, 0.16, 0.2),
    ),
    "rotation": (
        lambda angle: (
            lambda images: v2.functional.rotate(images, angle, v2.InterpolationMode.BILINEAR)
        ),
        (10.0, 20.0, 30.0, 40.0, 50.0),
    ),
}


def corrupt(images: Tensor, name: str, severity: int) -> Tensor:
    """Corrupted images, the same ones at every call."""
    make, strengths = CORRUPTIONS[name]
    with torch.random.fork_rng():
        torch.manual_seed(severity)
        return make(strengths[severity - 1])(images)


# ---------------------------------------------------------------- model and methods


def mlp() -> nn.Sequential:
    """A freshly initialised network, 64-64-64-10."""
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


class Classifier(PyroModule):
    """The Bayesian network; weight decay w beside a mean loss is a prior of precision N w."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bayesianize(mlp(), prior=(NUM_TRAIN * WEIGHT_DECAY) ** -0.5)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Labels given images; the plate scales a batch to the whole training set."""
        logits = self.net(x)
        with pyro.plate("data", NUM_TRAIN, subsample_size=len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


@dataclass(frozen=True)
class Method:
    """What differs between the rows of the table; the budget does not."""

    label: str
    transport: Any
    space: Callable[[Tensor], Any] = lambda inputs: Weights()
    strength: float = 1.0  # in units of the published repulsion
    noise: float = 0.0  # standard deviation of noise on the training inputs
    bandwidth: Any = field(default_factory=Median)
    every: int = 1  # repel at every so many steps
    batch: int = BATCH
    model: Callable[[], PyroModule] = Classifier


def identity(inputs: Tensor) -> InputGradients:
    """Input gradients of the raw logit of the true class, as in the paper."""
    return InputGradients("x", output="net")


def pca(inputs: Tensor) -> InputGradients:
    """The same, compared in the metric of the data's principal components."""
    return InputGradients("x", output="net", lengthscale=pca_lengthscale(inputs))


ENSEMBLE, FORDE, TUNED = "deep ensemble", "FoRDE-PCA x20", "FoRDE tuned"
METHODS = [
    Method(ENSEMBLE, Ensemble()),
    Method("weight repulsion x1", WGD()),
    Method("FoRDE-identity x1", WGD(), identity),
    Method("FoRDE-PCA x1", WGD(), pca),
    Method(FORDE, WGD(), pca, strength=20),
    Method("deep ensemble + noise", Ensemble(), noise=0.4),
    Method("FoRDE-PCA x20 + noise", WGD(), pca, strength=20, noise=0.4),
]


def batches(method: Method, data: Digits, seed: int) -> DataLoader:
    """The training digits, with the method's noise."""

    def noisy(batch: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        x, y = default_collate(batch)
        return [x + method.noise * torch.randn(x.shape, generator=generator), y]

    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        TensorDataset(data.scale(data.images), data.labels),
        batch_size=method.batch,
        shuffle=True,
        drop_last=True,
        generator=generator,
        collate_fn=noisy,
    )


def build(
    method: Method, data: Digits, epochs: int, particles: int, seed: int
) -> ParticleInference:
    """An ensemble: SGD with Nesterov momentum, the rate linear to 1 % from half to 90 %."""
    optim = pyro.optim.LambdaLR(
        {
            "optimizer": torch.optim.SGD,
            "optim_args": {"lr": LEARNING_RATE, "momentum": MOMENTUM, "nesterov": True},
            "lr_lambda": lambda epoch: 1 - 0.99 * min(max((epoch / epochs - 0.5) / 0.4, 0), 1),
        }
    )
    return ParticleInference(
        method.model(),
        optim,
        particles,
        kernel=RBF(method.space(data.scale(data.images)), method.bandwidth),
        transport=method.transport,
        init_loc_fn=init_to_modules(mlp),  # each starts as PyTorch would start it
        num_data=NUM_TRAIN,  # learning rates as for a mean loss
        # 1 is the exact posterior's; the published code repels this many times harder.
        repulsion_scale=method.strength * NUM_TRAIN / method.batch,
        repulsion_every=method.every,
        seed=seed,
    )


def train(
    method: Method,
    data: Digits,
    epochs: int,
    particles: int,
    seed: int,
    progress_bar: bool = True,
) -> ParticleInference:
    """Train one ensemble."""
    inference = build(method, data, epochs, particles, seed)
    inference.fit(batches(method, data, seed), epochs, progress_bar=progress_bar)
    return inference


def choose(data: Digits, epochs: int, particles: int, seed: int) -> Method:
    """FoRDE with the strength and alpha that do best on a quarter of the training digits."""
    rows = NUM_TRAIN * 3 // 4
    part = Digits(data.images[:rows], data.labels[:rows], data.images[rows:], data.labels[rows:])

    def method(strength: float, alpha: float) -> Method:
        def space(inputs: Tensor) -> InputGradients:
            return replace(identity(inputs), lengthscale=tuned_lengthscale(inputs, alpha))

        return Method(TUNED, WGD(), space, strength)

    found = tune(
        lambda **chosen: build(method(**chosen), part, epochs, particles, seed),
        {"strength": [1, 5, 20, 80], "alpha": [0.2, 1.0]},
        batches(METHODS[0], part, seed),
        [(part.scale(part.test_images), part.test_labels)],
        epochs=epochs,
        minimum_epochs=epochs // 2,  # strong repulsion pays late
        seed=seed,
    )
    print(f"seed {seed}: {found}\n")
    return method(**found.best)


# ---------------------------------------------------------------- evaluation


def particle_logits(inference: ParticleInference, x: Tensor) -> Tensor:
    """Logits of every particle, (particle, point, class)."""
    weights = {name.removeprefix("net."): w for name, w in inference.get_samples().items()}
    net = mlp()
    return torch.func.vmap(lambda w: torch.func.functional_call(net, w, (x,)))(weights)


def score(inference: ParticleInference, x: Tensor, y: Tensor) -> dict[str, float]:
    """NLL, accuracy and calibration error of the mean of the particles' probabilities."""
    log_probs = particle_logits(inference, x).log_softmax(-1)
    return {
        "NLL": metrics.nll(log_probs, y).item(),
        "accuracy": metrics.accuracy(log_probs, y).item(),
        "ECE": metrics.ece(log_probs, y).item(),
    }


Scores = dict[tuple[str, int], dict[str, float]]


def evaluate(inference: ParticleInference, data: Digits, severities: Sequence[int]) -> Scores:
    """Scores on the held-out third: clean (severity 0) and corrupted."""
    scores = {("clean", 0): score(inference, data.scale(data.test_images), data.test_labels)}
    for name in CORRUPTIONS:
        for severity in severities:
            x = data.scale(corrupt(data.test_images, name, severity))
            scores[name, severity] = score(inference, x, data.test_labels)
    return scores


def summarise(scores: Scores) -> dict[str, float]:
    """The table's columns: each metric clean, and as mean over corruptions and severities."""
    columns = {}
    for metric in ("NLL", "accuracy", "ECE"):
        corrupted = [s[metric] for (_, severity), s in scores.items() if severity > 0]
        columns[f"clean {metric}"] = scores["clean", 0][metric]
        columns[f"corrupted {metric}"] = sum(corrupted) / len(corrupted)
    return columns


def print_table(results: dict[str, list[Scores]]) -> None:
    """Means over seeds; with several, the paired difference to the deep ensemble below."""
    rows = {label: [summarise(scores) for scores in runs] for label, runs in results.items()}
    columns = list(rows[ENSEMBLE][0])
    seeds = len(rows[ENSEMBLE])
    print(f"{'':24}" + "".join(f"{column:>20}" for column in columns))
    for label, runs in rows.items():
        values = torch.tensor([[run[c] for c in columns] for run in runs], dtype=torch.float64)
        print(f"{label:24}" + "".join(f"{value:20.4f}" for value in values.mean(0)))
        if seeds > 1 and label != ENSEMBLE:
            base = torch.tensor([[run[c] for c in columns] for run in rows[ENSEMBLE]])
            difference = values - base
            error = difference.std(0) / seeds**0.5
            cells = [f"{d:+.4f} ± {e:.4f}" for d, e in zip(difference.mean(0), error, strict=True)]
            print(f"{'  minus deep ensemble':24}" + "".join(f"{cell:>20}" for cell in cells))


# ---------------------------------------------------------------- figure


def input_gradients(inference: ParticleInference, x: Tensor, label: int) -> Tensor:
    """Unit gradients of the true-class logit at one image, (particle, 8, 8)."""
    stacked = x.expand(inference.num_particles, *x.shape).clone().requires_grad_()
    weights = {name.removeprefix("net."): w for name, w in inference.get_samples().items()}
    net = mlp()
    logits = torch.func.vmap(lambda w, one: torch.func.functional_call(net, w, (one,)))(
        weights, stacked
    )
    (gradient,) = torch.autograd.grad(logits[..., label].sum(), stacked)
    return nn.functional.normalize(gradient, dim=-1).reshape(-1, 8, 8)


def draw(
    results: dict[str, list[Scores]],
    inferences: dict[str, ParticleInference],
    data: Digits,
    path: Path,
) -> None:
    """Left: NLL by severity. Right: what five particles look at, without and with repulsion."""
    figure = plt.figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    axes = left.subplots()
    severities = sorted({severity for _, severity in results[ENSEMBLE][0]})
    styles = {
        ENSEMBLE: {"color": "black", "marker": "o"},
        "FoRDE-PCA x1": {"color": "C0", "marker": "s", "linestyle": ":"},
        FORDE: {"color": "C0", "marker": "s"},
        "deep ensemble + noise": {"color": "black", "linestyle": "--"},
        "FoRDE-PCA x20 + noise": {"color": "C0", "linestyle": "--"},
    }
    for label, style in styles.items():
        curve = [
            statistics.fmean(
                values["NLL"]
                for scores in results[label]
                for (_, level), values in scores.items()
                if level == severity
            )
            for severity in severities
        ]
        axes.plot(severities, curve, label=label, markersize=4, **style)
    axes.set_xlabel("severity of the corruption (0: clean)")
    axes.set_ylabel("negative log likelihood (nats per digit)")
    axes.set_title("Held-out digits, mean over five corruptions")
    axes.set_xticks(severities)
    axes.set_ylim(0)
    axes.legend(frameon=False)

    index = 0
    image, label = data.test_images[index], int(data.test_labels[index])
    shown = [ENSEMBLE, FORDE]
    count = min(5, inferences[ENSEMBLE].num_particles)
    grid = right.subplots(len(shown), count + 1, squeeze=False)
    for row, name in enumerate(shown):
        gradients = input_gradients(inferences[name], data.scale(image[None])[0], label)
        flat = gradients.flatten(1)
        cosine = (flat @ flat.T)[~torch.eye(len(flat), dtype=torch.bool)].mean()
        grid[row, 0].imshow(image[0], cmap="gray_r")
        grid[row, 0].set_ylabel(f"{name}\nmean cosine {cosine:.2f}")
        grid[row, 0].set_title(f"a held-out {label}", fontsize=9)
        limit = flat.abs().max().item()
        for particle in range(count):
            cell = grid[row, particle + 1]
            cell.imshow(gradients[particle], cmap="RdBu_r", vmin=-limit, vmax=limit)
            cell.set_title(f"particle {particle + 1}", fontsize=9)
    for cell in grid.flat:
        cell.set_xticks([])
        cell.set_yticks([])
    right.suptitle(f"Gradient of the logit of '{label}' by the pixels (red: more ink helps)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="number of repetitions")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--particles", type=int, default=10)
    parser.add_argument("--tune", action="store_true", help="a row with strength and alpha chosen")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.epochs, options.particles = 2, 3
    severities = (3,) if options.smoke else (1, 2, 3, 4, 5)
    torch.set_num_threads(1)  # the networks are small: more threads only wait for each other
    options.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    labels = [*(method.label for method in METHODS), *([TUNED] if options.tune else [])]
    results: dict[str, list[Scores]] = {label: [] for label in labels}
    for seed in range(options.seeds):
        data = load(seed)
        inferences = {}
        tuned = [choose(data, options.epochs, options.particles, seed)] if options.tune else []
        for method in (*METHODS, *tuned):
            tqdm.write(f"seed {seed}: {method.label}", file=sys.stderr)
            inference = train(method, data, options.epochs, options.particles, seed)
            results[method.label].append(evaluate(inference, data, severities))
            inferences[method.label] = inference
    print_table(results)

    x = data.scale(data.test_images)
    exported = to_arviz(inferences[FORDE], x, data.test_labels, sites=["net.4.*"])
    exported.to_netcdf(str(options.out / "digits.nc"))
    draw(results, inferences, data, options.out / "digits.png")
    print(
        f"{options.particles} particles, {options.epochs} epochs, {options.seeds} seed(s), "
        f"{time.perf_counter() - start:.0f} s; wrote {options.out / 'digits.nc'} and "
        f"{options.out / 'digits.png'}"
    )


if __name__ == "__main__":
    main()
