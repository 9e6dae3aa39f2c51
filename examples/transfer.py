"""Transfer learning: ensembles of small heads on the features of a frozen backbone.

As in the FoRDE paper (there with a vision transformer): a pretrained network turns
images into features once, and ensembles of ten heads with three hidden layers and BatchNorm are
trained on them. Input gradients are taken by the features. The images are CIFAR-10's; they are
tested clean and under three corruptions at three severities. Features are kept in ``--out``, so a
second run starts with the heads.

The backbone is one of torchvision's. Nothing is downloaded for it: its weights must be where
``torch.hub`` keeps them, or be named by ``--weights``; ``--random`` does without (random features
are worse, and show the method as well). The data are read from ``--data``, from the folder that
PYRO_FORDES_DATA names, or downloaded by torchvision. Prints a table; writes a figure.

What to expect: half an hour for the features on a good core and ten minutes for the heads, 75
minutes in all on a poor one. The paper reports, in figures without numbers, that FoRDE has the
lowest NLL of all ensembles with its vision transformer. With a random backbone (``--random``) all
methods are weak, and only their differences say something: clean and corrupted NLL were 1.774 and
2.579 for the deep ensemble, 1.734 and 2.541 for FoRDE-PCA at 20 times the published strength, and
within .04 of the ensemble's for the other three (one seed).
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import CIFAR10
from torchvision.io import decode_jpeg
from torchvision.models import get_model, get_model_weights
from torchvision.transforms import v2
from tqdm.auto import tqdm

from pyro_fordes import (
    RBF,
    WGD,
    Ensemble,
    InputGradients,
    ParticleInference,
    ParticlePredictive,
    Weights,
    bayesianize,
    init_to_modules,
    metrics,
    pca_lengthscale,
)

NUM_CLASSES, BATCH = 10, 256
LEARNING_RATE, WEIGHT_DECAY = 0.2, 5e-4


# ---------------------------------------------------------------- images


def images_of(split: str, folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """The first images of CIFAR-10's train or test set, (image, 3, 32, 32) bytes, and labels."""
    packed = folder / "cifar10" / f"cifar10_jpeg_{split}.npz"
    if packed.exists():  # JPEG files end to end
        stored = np.load(packed)
        data, offsets = torch.from_numpy(stored["bytes"]), stored["offsets"]
        count = min(count, len(offsets) - 1)
        images = [decode_jpeg(data[offsets[i] : offsets[i + 1]]) for i in range(count)]
        return torch.stack(images), torch.from_numpy(stored["labels"][:count]).long()
    found = CIFAR10(folder, train=split == "train", download=True)
    images = torch.from_numpy(found.data[:count]).permute(0, 3, 1, 2)
    return images, torch.tensor(found.targets[:count])


def made_up(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise whose colour tells the class, for ``--smoke``."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    colour = torch.randint(256, (NUM_CLASSES, 3), generator=torch.Generator().manual_seed(0))
    noise = 40 * torch.randn(count, 3, 32, 32, generator=generator)
    return (colour[labels][..., None, None] + noise).clamp(0, 255).byte(), labels


CORRUPTIONS: dict[str, tuple[Callable[[float], Callable[[Tensor], Tensor]], tuple[float, ...]]] = {
    "noise": (lambda sigma: v2.GaussianNoise(sigma=sigma), (0.05, 0.1, 0.2)),
    "blur": (lambda sigma: v2.GaussianBlur(7, sigma), (0.7, 1.2, 1.8)),
    "contrast": (
        lambda factor: lambda images: v2.functional.adjust_contrast(images, factor),
        (0.6, 0.35, 0.15),
    ),
}


def corrupt(images: Tensor, name: str, severity: int) -> Tensor:
    """Corrupted images between 0 and 1, the same ones at every call."""
    make, strengths = CORRUPTIONS[name]
    with torch.random.fork_rng():
        torch.manual_seed(severity)
        return make(strengths[severity - 1])(images)


# ---------------------------------------------------------------- backbone


def backbone(
    name: str, weights: Path | None, random: bool, size: int | None
) -> tuple[nn.Module, v2.Compose]:
    """A network whose last linear layer is left out, and what it wants done to images."""
    published = get_model_weights(name).DEFAULT
    torch.manual_seed(0)
    net = get_model(name, weights=None)
    if not random:
        path = weights or Path(torch.hub.get_dir(), "checkpoints", published.url.split("/")[-1])
        if not path.exists():
            sys.exit(
                f"no weights of {name} at {path}; get them from {published.url}, name a file with "
                f"--weights, or use --random"
            )
        net.load_state_dict(torch.load(path, weights_only=True))
    last = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)][-1]
    owner, _, attribute = last.rpartition(".")
    setattr(net.get_submodule(owner), attribute, nn.Identity())
    made = published.transforms()
    normalise = v2.Normalize(made.mean, made.std)
    resize = v2.Resize([size] if size else made.crop_size, antialias=True)
    return net.eval().requires_grad_(False), v2.Compose([resize, normalise])


@torch.inference_mode()
def features_of(net: nn.Module, prepare: v2.Compose, images: Tensor, what: str) -> Tensor:
    """Features of images between 0 and 1, in batches."""
    batches = tqdm(images.split(64), desc=what, unit="batch", leave=False)
    return torch.cat([net(prepare(batch)).flatten(1) for batch in batches])


@dataclass(frozen=True)
class Features:
    """Features of the training set and of every version of the test set, standardised."""

    x: Tensor
    y: Tensor
    tests: dict[tuple[str, int], Tensor]
    test_y: Tensor


def extract(options: argparse.Namespace) -> Features:
    """All features, from the file of an earlier run where there is one."""
    kind = "random" if options.random else "pretrained"
    size = f"{options.train}-{options.test}-{options.size}{'-smoke' if options.smoke else ''}"
    path = options.out / f"features-{options.backbone}-{kind}-{size}.pt"
    if path.exists():
        found = torch.load(path, weights_only=True)
    else:
        net, prepare = backbone(options.backbone, options.weights, options.random, options.size)
        if options.smoke:
            (train, y), (test, test_y) = made_up(options.train, 1), made_up(options.test, 2)
        else:
            train, y = images_of("train", options.data, options.train)
            test, test_y = images_of("test", options.data, options.test)
        train, test = train.float() / 255, test.float() / 255
        tests = {"clean 0": features_of(net, prepare, test, "test")}
        for name in CORRUPTIONS:
            for severity in (1, 2, 3):
                changed = corrupt(test, name, severity)
                tests[f"{name} {severity}"] = features_of(net, prepare, changed, name)
        x = features_of(net, prepare, train, "train")
        found = {"x": x, "y": y, "tests": tests, "test_y": test_y}
        torch.save(found, path)
    mean, sd = found["x"].mean(0), found["x"].std(0) + 1e-6
    tests = {}
    for key, value in found["tests"].items():
        name, severity = key.rsplit(" ", 1)
        tests[name, int(severity)] = (value - mean) / sd
    return Features((found["x"] - mean) / sd, found["y"], tests, found["test_y"])


# ---------------------------------------------------------------- heads


def head(inputs: int, width: int) -> nn.Sequential:
    """Three hidden layers with BatchNorm."""

    def layers() -> Iterator[nn.Module]:
        before = inputs
        for _ in range(3):
            yield from (nn.Linear(before, width), nn.BatchNorm1d(width), nn.ReLU())
            before = width
        yield nn.Linear(width, NUM_CLASSES)

    return nn.Sequential(*layers())


class Classifier(PyroModule):
    """The Bayesian head; weight decay w beside a mean loss is a prior of precision N w."""

    def __init__(self, inputs: int, width: int, num_data: int) -> None:
        super().__init__()
        self.num_data = num_data
        self.net = bayesianize(head(inputs, width), prior=(num_data * WEIGHT_DECAY) ** -0.5)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Labels given features; the plate scales a batch to the whole training set."""
        logits = self.net(x)
        with pyro.plate("data", self.num_data, subsample_size=len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


@dataclass(frozen=True)
class Method:
    """What differs between the rows of the table; the budget does not."""

    label: str
    transport: Any
    space: Callable[[Tensor], Any] = lambda features: Weights()
    strength: float = 1.0  # in units of the published repulsion


def identity(features: Tensor) -> InputGradients:
    """Gradients of the true class's raw logit by the features."""
    return InputGradients("x", output="net")


def pca(features: Tensor) -> InputGradients:
    """The same in the metric of the features' principal components."""
    return InputGradients("x", output="net", lengthscale=pca_lengthscale(features))


ENSEMBLE = "deep ensemble"
METHODS = [
    Method(ENSEMBLE, Ensemble()),
    Method("weight repulsion x1", WGD()),
    Method("FoRDE-identity x1", WGD(), identity),
    Method("FoRDE-PCA x1", WGD(), pca),
    Method("FoRDE-PCA x20", WGD(), pca, strength=20),
]


def train(method: Method, data: Features, options: argparse.Namespace) -> ParticleInference:
    """SGD with Nesterov momentum; the rate falls from 0.2 to 0.002 between 50 and 90 %."""
    num_data, inputs = data.x.shape
    epochs = options.epochs
    loader = DataLoader(
        TensorDataset(data.x, data.y),
        batch_size=min(BATCH, num_data),
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(options.seed),
    )
    optim = pyro.optim.LambdaLR(
        {
            "optimizer": torch.optim.SGD,
            "optim_args": {"lr": LEARNING_RATE, "momentum": 0.9, "nesterov": True},
            "lr_lambda": lambda epoch: 1 - 0.99 * min(max((epoch / epochs - 0.5) / 0.4, 0), 1),
        }
    )
    inference = ParticleInference(
        Classifier(inputs, options.width, num_data),
        optim,
        options.particles,
        kernel=RBF(method.space(data.x)),
        transport=method.transport,
        init_loc_fn=init_to_modules(lambda: head(inputs, options.width)),
        num_data=num_data,
        repulsion_scale=method.strength * num_data / min(BATCH, num_data),
        seed=options.seed,
    )
    inference.fit(loader, epochs)
    return inference


# ---------------------------------------------------------------- evaluation


Scores = dict[tuple[str, int], dict[str, float]]


def evaluate(inference: ParticleInference, data: Features) -> Scores:
    """NLL, accuracy, calibration error and mutual information on every version of the test set."""
    predict, scores = ParticlePredictive(inference), {}
    for key, x in data.tests.items():
        log_probs = predict.parameters(x)["y"]["logits"].log_softmax(-1)
        scores[key] = {
            "NLL": metrics.nll(log_probs, data.test_y).item(),
            "acc": metrics.accuracy(log_probs, data.test_y).item(),
            "ECE": metrics.ece(log_probs, data.test_y).item(),
            "MI": metrics.uncertainty(log_probs).epistemic.mean().item(),
        }
    return scores


def mean_over(scores: Scores, metric: str, wanted: Callable[[int], bool]) -> float:
    """Mean of a metric over the versions of some severities."""
    values = [one[metric] for (_, severity), one in scores.items() if wanted(severity)]
    return sum(values) / len(values)


def print_table(results: dict[str, Scores]) -> None:
    """Clean, and the mean over corruptions and severities."""
    names = ("NLL", "acc", "ECE", "MI")
    print(f"{'':22}{'clean':>32}{'corrupted':>32}")
    print(f"{'':22}" + "".join(f"{name:>8}" for name in names * 2))
    for label, scores in results.items():
        values = [scores["clean", 0][name] for name in names]
        values += [mean_over(scores, name, lambda severity: severity > 0) for name in names]
        print(f"{label:22}" + "".join(f"{value:8.3f}" for value in values))
    print("MI: mutual information of label and particle in nats, what the particles disagree about")


def draw(results: dict[str, Scores], path: Path) -> None:
    """NLL and mutual information by severity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, cells = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for cell, metric in zip(cells, ("NLL", "MI"), strict=True):
        for label, scores in results.items():
            curve = [mean_over(scores, metric, lambda s, wanted=s: s == wanted) for s in range(4)]
            cell.plot(range(4), curve, "o-", markersize=3, label=label)
        cell.set_xticks(range(4))
        cell.set_xlabel("severity of the corruption (0: clean)")
    cells[0].set_ylabel("negative log likelihood (nats)")
    cells[1].set_ylabel("mutual information (nats)")
    cells[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


# ---------------------------------------------------------------- main


def main() -> None:
    shared = Path(__file__).parents[2] / "shared" / "data"
    data = Path(os.environ.get("PYRO_FORDES_DATA", shared if shared.is_dir() else "data"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18", help="a classifier of torchvision's")
    parser.add_argument("--weights", type=Path, help="file with the backbone's state")
    parser.add_argument("--random", action="store_true", help="a backbone with random weights")
    parser.add_argument("--size", type=int, help="side of the images; None for the backbone's")
    parser.add_argument("--data", type=Path, default=data, help="folder of CIFAR-10")
    parser.add_argument("--train", type=int, default=10_000, help="number of training images")
    parser.add_argument("--test", type=int, default=2000, help="number of test images")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--width", type=int, default=256, help="width of the heads")
    parser.add_argument("--particles", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.random, options.size = True, 32
        options.train, options.test, options.epochs = 128, 64, 4
        options.particles, options.width = 3, 16
    options.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    features = extract(options)
    results = {}
    for method in METHODS:
        tqdm.write(method.label, file=sys.stderr)
        results[method.label] = evaluate(train(method, features, options), features)
    print_table(results)
    path = options.out / "transfer.png"
    draw(results, path)
    print(
        f"{options.particles} heads on {options.backbone}"
        f"{' with random weights' if options.random else ''}, {options.train} images, "
        f"{options.epochs} epochs, {time.perf_counter() - start:.0f} s; wrote {path}"
    )


if __name__ == "__main__":
    main()
