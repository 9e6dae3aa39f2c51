"""FashionMNIST with MNIST as what the networks have never seen.

Trains ensembles of five small convolutional networks with BatchNorm on 6,000 images, all with the
same budget of 8 epochs: a deep ensemble, repulsion in weight space, FoRDE with PCA lengthscales at
the published strength, and at a stronger one that is chosen beforehand on validation data: other
images, another seed, and kinds of corruption that the test does not have. Evaluates on 2,000 test
images, clean and under five corruptions at five severities, and asks how well 2,000 digits are told
from clothes. Prints a table with paired bootstrap intervals; writes pictures and a run file.

Everything is kept in ``--out``: a run that was cut off goes on where it was. The table comes from
the run file: ``--report FILE.md`` puts it into a page, without training anything.

The data are the four files of FashionMNIST in ``fashion-mnist/`` and the two test files of MNIST in
``mnist/``, as they are published, in the folder given by ``--data``. What to expect: twenty minutes
to an hour on one core with ``--seeds 5``; less would not tell methods apart.
``docs/fashion_ood.md`` says what came out.
"""

import argparse
import gzip
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from PIL import Image
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from pyro_fordes import (
    RBF,
    WGD,
    Ensemble,
    InputGradients,
    ParticleInference,
    Weights,
    bayesianize,
    compare,
    corruptions,
    evaluate,
    init_to_modules,
    pca_lengthscale,
    plots,
)
from pyro_fordes.evaluation import Evaluation
from pyro_fordes.tables import Table

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
TEST_KINDS = ("gaussian_noise", "impulse_noise", "gaussian_blur", "contrast", "rotation")
VALIDATION_KINDS = ("shot_noise", "elastic", "posterize")  # none of them in the test
SELECTION_SEED = 100
METRICS = ["nll", "accuracy", "ece", "disagreement"]
DETECTIONS = ["auroc:entropy", "auroc:mutual_information", "auroc:least_confidence", "fpr95"]


@dataclass(frozen=True)
class Budget:
    """Sizes of everything; a run file of another budget is not gone on with."""

    train: int = 6_000
    validation: int = 2_000
    test: int = 2_000
    batch: int = 100
    epochs: int = 8
    particles: int = 5
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    strengths: tuple[float, ...] = (1.0, 3.0, 10.0, 40.0, 160.0)
    resamples: int = 1000


SMOKE = Budget(200, 40, 40, 50, 1, 2, (1, 4), (10.0, 40.0), 50)


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Fashion:
    """Images as bytes (image, 1, 28, 28), and labels."""

    images: Tensor
    labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    digits: Tensor

    @cached_property
    def mean(self) -> Tensor:
        """Mean of the training pixels."""
        return (self.images.float() / 255).mean()

    @cached_property
    def sd(self) -> Tensor:
        """Standard deviation of the training pixels."""
        return (self.images.float() / 255).std()

    def scale(self, images: Tensor) -> Tensor:
        """Images between 0 and 1 as inputs: mean 0, standard deviation 1 over the training set."""
        return (images - self.mean) / self.sd


def read(path: Path) -> Tensor:
    """A file in the format of MNIST: a magic number that says how many axes, sizes, bytes."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">i4", axes, offset=4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * axes).copy()).reshape(
        *shape
    )


def load(folder: Path, budget: Budget) -> Fashion:
    """The first images for training, the next for validation, the first of the test set to test."""
    fashion, digits = folder / "fashion-mnist", folder / "mnist"
    images = read(fashion / "train-images-idx3-ubyte.gz").unsqueeze(1)
    labels = read(fashion / "train-labels-idx1-ubyte.gz").long()
    n, m = budget.train, budget.train + budget.validation
    return Fashion(
        images[:n],
        labels[:n],
        images[n:m],
        labels[n:m],
        read(fashion / "t10k-images-idx3-ubyte.gz").unsqueeze(1)[: budget.test],
        read(fashion / "t10k-labels-idx1-ubyte.gz").long()[: budget.test],
        read(digits / "t10k-images-idx3-ubyte.gz").unsqueeze(1)[: budget.test],
    )


def invent(budget: Budget) -> Fashion:
    """Blurred blocks in place of clothes, to see that everything runs."""
    generator = torch.Generator().manual_seed(0)
    patterns = (200 * torch.rand(10, 1, 4, 4, generator=generator)).repeat_interleave(7, 2)
    patterns = patterns.repeat_interleave(7, 3)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(10, (count,), generator=generator)
        noise = 50 * torch.rand(count, 1, 28, 28, generator=generator)
        return (patterns[labels] + noise).to(torch.uint8), labels

    outside = (255 * torch.rand(budget.test, 1, 28, 28, generator=generator)).to(torch.uint8)
    train, validation, test = map(draw, (budget.train, budget.validation, budget.test))
    return Fashion(*train, *validation, *test, outside)


Batches = list[tuple[Tensor, ...]]


def batches(data: Fashion, images: Tensor, *labels: Tensor) -> Batches:
    """Inputs of the network in batches."""
    return list(DataLoader(TensorDataset(data.scale(images.float() / 255), *labels), 250))


def corrupted(
    data: Fashion, images: Tensor, labels: Tensor, kinds: Sequence[str], severities: Sequence[int]
) -> dict[Any, Batches]:
    """Clean batches and those under each corruption; made once, kept for all methods."""
    found: dict[Any, Batches] = {"clean": batches(data, images, labels)}
    made = corruptions.loaders(
        TensorDataset(images, labels), kinds, severities, batch_size=250, transform=data.scale
    )
    for key, loader in tqdm(made.items(), desc="corruptions", unit="set"):
        found[key] = [tuple(batch) for batch in loader]
    return found


# ---------------------------------------------------------------- model and methods


def cnn() -> nn.Sequential:
    """A freshly initialised network of 21 thousand weights."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


class Classifier(PyroModule):
    """The Bayesian network; weight decay w beside a mean loss is a prior of precision N w."""

    def __init__(self, num_data: int) -> None:
        super().__init__()
        self.num_data = num_data
        self.net = bayesianize(cnn(), prior=(num_data * WEIGHT_DECAY) ** -0.5)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Labels given images; the plate scales a batch to the whole training set."""
        logits = self.net(x)
        with pyro.plate("data", self.num_data, subsample_size=len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


@dataclass(frozen=True)
class Method:
    """What differs between the rows of the table; the budget does not."""

    label: str
    transport: Any
    space: Callable[[Tensor], Any] = lambda inputs: Weights()
    strength: float = 1.0  # in units of the published repulsion


def pca(inputs: Tensor) -> InputGradients:
    """Input gradients of the raw logit of the true class, in the metric of the data's PCA."""
    return InputGradients("x", output="net", lengthscale=pca_lengthscale(inputs.flatten(1)))


ENSEMBLE = "deep ensemble"
METHODS = [
    Method(ENSEMBLE, Ensemble()),
    Method("weight-RDE x1", WGD()),
    Method("FoRDE-PCA x1", WGD(), pca),
]


def stronger(strength: float) -> Method:
    """FoRDE at more than the published strength."""
    return Method(f"FoRDE-PCA x{strength:g} (tuned)", WGD(), pca, strength)


def train(
    method: Method, data: Fashion, budget: Budget, seed: int, folder: Path
) -> tuple[ParticleInference, list[dict[str, Any]]]:
    """Train one ensemble, or take the finished one from its checkpoint.

    SGD with Nesterov momentum; the rate falls linearly to 1 % from half to 90 % of the training.
    """
    inputs = data.scale(data.images.float() / 255)
    loader = DataLoader(
        TensorDataset(inputs, data.labels),
        batch_size=budget.batch,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )
    epochs = budget.epochs
    optim = pyro.optim.LambdaLR(
        {
            "optimizer": torch.optim.SGD,
            "optim_args": {"lr": LEARNING_RATE, "momentum": MOMENTUM, "nesterov": True},
            "lr_lambda": lambda epoch: 1 - 0.99 * min(max((epoch / epochs - 0.5) / 0.4, 0), 1),
        }
    )
    inference = ParticleInference(
        Classifier(budget.train),
        optim,
        budget.particles,
        kernel=RBF(method.space(inputs)),
        transport=method.transport,
        init_loc_fn=init_to_modules(cnn),  # each starts as PyTorch would start it
        num_data=budget.train,  # learning rates as for a mean loss
        # 1 is the exact posterior's; the published code repels this many times harder.
        repulsion_scale=method.strength * budget.train / budget.batch,
        seed=seed,
        diagnostics_every=20,
    )
    records: list[dict[str, Any]] = []

    def record(inference: ParticleInference, step: int, loss: float) -> None:
        measured = inference.diagnostics()
        if not records or records[-1]["step"] != measured["step"]:
            kept = ("step", "force_ratio", "effective_particles")
            joint = measured["log_joint"].tolist()
            records.append({**{name: measured[name] for name in kept}, "log_joint": joint})

    inference.fit(loader, epochs, callback=record, checkpoint=folder / "checkpoints", keep=1)
    file = folder / "records.json"
    if records:
        earlier = json.loads(file.read_text()) if file.exists() else []
        file.write_text(json.dumps(earlier + records))
    return inference, json.loads(file.read_text())


# ---------------------------------------------------------------- the run


def place(out: Path, method: Method, seed: int) -> Path:
    """The folder of one training."""
    return out / f"{method.label.split(' (')[0].replace(' ', '-')}-seed{seed}"


def select(data: Fashion, budget: Budget, out: Path) -> dict[str, float]:
    """NLL on validation data by strength, mean of clean images and three other corruptions."""
    file = out / "selection.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    sets: dict[Any, Batches] = {}
    for strength in budget.strengths:
        if f"{strength:g}" in found:
            continue
        sets = sets or corrupted(
            data, data.validation_images, data.validation_labels, VALIDATION_KINDS, (3,)
        )
        method = stronger(strength)
        tqdm.write(f"selection: {method.label}", file=sys.stderr)
        inference, _ = train(method, data, budget, SELECTION_SEED, place(out, method, 100))
        table = evaluate(inference, sets, ["nll"], resamples=1).table
        keys = [("clean", 0), *((kind, 3) for kind in VALIDATION_KINDS)]
        values = [table.select(data=name, severity=level)["value"][0] for name, level in keys]
        found[f"{strength:g}"] = round(sum(values) / len(values), 4)
        file.write_text(json.dumps(found))
    return found


def run(data: Fashion, budget: Budget, seeds: int, out: Path) -> dict[str, Any]:
    """Train and evaluate everything that is not there yet; the content of the run file."""
    selection = select(data, budget, out)
    # That of the paper has a row of its own.
    best = min((s for s in selection if float(s) > 1), key=lambda strength: selection[strength])
    methods = [*METHODS, stronger(float(best))]
    sets: dict[Any, Batches] = {}
    found: dict[str, list[Evaluation]] = {method.label: [] for method in methods}
    for seed in range(seeds):
        for method in methods:
            folder = place(out, method, seed)
            scores = folder / "scores.pt"
            if not scores.exists():
                tqdm.write(f"seed {seed}: {method.label}", file=sys.stderr)
                inference, _ = train(method, data, budget, seed, folder)
                sets = sets or corrupted(
                    data, data.test_images, data.test_labels, TEST_KINDS, budget.severities
                )
                outside = {"MNIST": batches(data, data.digits)}
                metrics = [*METRICS, *DETECTIONS]
                evaluate(inference, sets, metrics, outside=outside).save(scores)
            found[method.label].append(Evaluation.load(scores))
    table = compare(found, baseline=ENSEMBLE, resamples=budget.resamples)
    draw(data, budget, methods, {name: runs[0] for name, runs in found.items()}, table, out)
    columns = {name: [short(v) for v in column] for name, column in table.columns.items()}
    return {
        "budget": json.loads(json.dumps(vars(budget))),
        "seeds": seeds,
        "selection": selection,
        "table": {
            "columns": columns,
            "level": table.level,
            "baseline": table.baseline,
            "runs": table.runs,
        },
    }


def short(value: Any) -> Any:
    """A number with six digits."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


# ---------------------------------------------------------------- pictures


def draw(
    data: Fashion,
    budget: Budget,
    methods: Sequence[Method],
    first: dict[str, Evaluation],
    table: Table,
    out: Path,
) -> None:
    """All pictures; those of single ensembles are of the first seed."""

    def save(figure: Any, name: str) -> None:
        raw = io.BytesIO()
        figure.savefig(raw, dpi=80)
        small = Image.open(raw).convert("RGB").quantize(200)
        small.save(out / f"fashion_{name}.png")
        plt.close(figure)

    figure, cells = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    plots.corruption_curves(table, "nll", axes=cells[0])
    plots.corruption_curves(table, "accuracy", axes=cells[1])
    save(figure, "curves")

    severity = budget.severities[-2]
    figure, cells = plt.subplots(1, 2, figsize=(9.6, 4.8), layout="constrained")
    for cell, key in zip(cells, (("clean", 0), ("gaussian_noise", severity)), strict=True):
        title = "Clean images" if key[1] == 0 else f"Gaussian noise, severity {key[1]}"
        plots.reliability(
            {name: one.reliability(*key) for name, one in first.items()}, title=title, axes=cell
        )
    save(figure, "reliability")

    figure, cells = plt.subplots(
        1, 2, figsize=(9.6, 3.8), layout="constrained", sharex=True, sharey=True
    )
    for cell, method in zip(cells, (methods[0], methods[-1]), strict=True):
        one = first[method.label]
        plots.ood_histograms(
            one.scores["clean", 0]["entropy"],
            {"MNIST": one.outside["MNIST"]["entropy"]},
            name="FashionMNIST",
            title=method.label,
            axes=cell,
        )
    save(figure, "histograms")

    trained = {m.label: train(m, data, budget, 0, place(out, m, 0)) for m in methods}
    records = {name: found for name, (_, found) in trained.items() if name != ENSEMBLE}
    save(plots.training(records)[0].figure, "training")

    x, y = batches(data, data.test_images, data.test_labels)[0]
    x, y = x[:100], y[:100]
    space = pca(data.scale(data.images.float() / 255))
    shown = [methods[0], methods[-1]]
    figure, cells = plt.subplots(1, 2, figsize=(10.0, 4.4), layout="compressed")
    for cell, method in zip(cells, shown, strict=True):
        inference = trained[method.label][0]
        representation = inference.representation(x, y, space=space)
        plots.kernel_matrix(RBF(space).evaluate(representation).mean, title=method.label, axes=cell)
    save(figure, "kernel")

    index = int((y == 8).nonzero()[0]) if (y == 8).any() else 0  # a bag, if there is one
    raw = InputGradients("x", output="net")
    count = min(5, budget.particles) + 1
    figure, grid = plt.subplots(
        2, count, figsize=(1.5 * count, 3.5), layout="compressed", squeeze=False
    )
    for cells, method in zip(grid, shown, strict=True):
        inference = trained[method.label][0]
        gradients = inference.representation(x, y, space=raw)[: count - 1, index]
        plots.input_gradients(
            gradients.unflatten(-1, (28, 28)),
            data.test_images[index],
            name=method.label,
            axes=cells,
        )
    figure.suptitle("Gradient of the true class's logit by the pixels (red: light helps)")
    save(figure, "gradients")


# ---------------------------------------------------------------- report


def report(found: dict[str, Any]) -> str:
    """The run file as text: sizes, selection, table, and the differences by corruption."""
    table, sizes = Table(**found["table"]), found["budget"]
    by_strength = sorted(found["selection"].items(), key=lambda pair: float(pair[0]))
    picks = ", ".join(f"x{strength}: {nll:.3f}" for strength, nll in by_strength)
    lines = [
        f"{sizes['particles']} members, {sizes['train']:,} training images, {sizes['epochs']} "
        f"epochs, {sizes['test']:,} test images, {found['seeds']} seed(s).",
        f"Validation NLL by strength (seed {SELECTION_SEED}): {picks}.",
        "",
        str(table),
        "",
        "NLL minus the deep ensemble's, mean over severities ± standard error over seeds:",
        "",
    ]
    kinds = [*dict.fromkeys(row["data"] for row in table.rows() if row["severity"])][:-1]
    shown = ["clean", *kinds, "corrupted"]
    heads = [kind.replace("gaussian_", "").replace("_", " ") for kind in shown]
    lines.append(f"{'':22}" + "".join(f"{head:>14}" for head in heads))
    for method in dict.fromkeys(table["method"]):
        if method == table.baseline:
            continue
        cells = []
        for kind in shown:
            severity = 0 if kind == "clean" else None
            (row,) = table.select(method=method, data=kind, severity=severity, metric="nll").rows()
            error = row["difference_run_error"]
            cells.append(f"{row['difference']:+.3f}" + (f" ±{error:.3f}" if error else ""))
        lines.append(f"{method:22}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


BEGIN, END = "<!-- from the run file: begin -->", "<!-- end -->"


def write_report(page: Path, text: str) -> None:
    """Put the report between the marks of a page, which is made if it is not there."""
    old = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    head, rest = old.split(BEGIN)
    _, tail = rest.split(END)
    page.write_text(f"{head}{BEGIN}\n\n```\n{text}\n```\n\n{END}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="number of repetitions")
    parser.add_argument("--data", type=Path, default=None, help="folder of the data")
    parser.add_argument("--out", type=Path, default=Path("out/fashion_ood"), help="results")
    parser.add_argument("--run-file", type=Path, default=None, help="default: run.json in --out")
    parser.add_argument("--report", type=Path, default=None, help="page to put the table into")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small: more threads only wait for each other
    file = options.run_file or options.out / "run.json"

    if options.report is not None:
        found = json.loads(file.read_text())
        write_report(options.report, report(found))
        print(f"wrote the table of {file} into {options.report}")
        return

    start = time.perf_counter()
    budget = SMOKE if options.smoke else Budget()
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = options.out / "budget.json"
    wanted = json.loads(json.dumps(vars(budget)))
    if sizes.exists() and json.loads(sizes.read_text()) != wanted:
        parser.error(f"{options.out} has a run of other sizes; choose another --out")
    sizes.write_text(json.dumps(wanted))
    candidates = [options.data] if options.data else [Path("../shared/data"), Path("data")]
    folder = next((one for one in candidates if (one / "fashion-mnist").is_dir()), None)
    if folder is not None and not options.smoke:
        data = load(folder, budget)
    elif options.smoke:
        data = invent(budget)
    else:
        parser.error(f"there is no fashion-mnist folder in {[*map(str, candidates)]}; use --data")
    found = run(data, budget, options.seeds, options.out)
    file.write_text(json.dumps(found))
    print(report(found))
    print(f"\n{time.perf_counter() - start:.0f} s; wrote {file} and fashion_*.png beside it")


if __name__ == "__main__":
    main()
