"""What an installation must be able to do with the core dependencies alone: ``make smoke``.

Needs no pytest. Run it outside the checkout's folder, so that the installed package is the one that
is imported.
"""

import doctest
import importlib
import importlib.util
import io
import math
import pkgutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

import pyro_fordes
from pyro_fordes import (
    RBF,
    InputGradients,
    MissingDependencyError,
    ParticleInference,
    ParticlePredictive,
    bayesianize,
    init_to_modules,
    metrics,
    pca_lengthscale,
    to_arviz,
)


class Runner(doctest.DocTestRunner):
    """Notes which examples asked for an optional package that is not there."""

    unavailable = False

    def report_unexpected_exception(self, out, test, example, exc_info):
        """As usual, and remember the reason."""
        self.unavailable |= issubclass(exc_info[0], MissingDependencyError)
        super().report_unexpected_exception(out, test, example, exc_info)


def network() -> nn.Module:
    """A small classifier."""
    return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))


class Classifier(PyroModule):
    """The usual model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bayesianize(network(), prior=1.0)

    def forward(self, x, y=None):
        """Labels given inputs."""
        logits = self.net(x)
        with pyro.plate("data", 200, subsample_size=len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def check_training() -> None:
    """FoRDE on a separable problem, saved, loaded and predicting."""
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] + x[:, 1] > 0).long()
    kernel = RBF(InputGradients("x", output="net", lengthscale=pca_lengthscale(x)))
    options = {"kernel": kernel, "num_data": 200, "repulsion_scale": 10.0}
    inference = ParticleInference(
        Classifier(),
        pyro.optim.Adam({"lr": 0.05}),
        5,
        init_loc_fn=init_to_modules(network),
        seed=0,
        **options,
    )
    inference.run(100, x, y, progress_bar=False)
    log_probs = ParticlePredictive(inference).parameters(x)["y"]["logits"]
    found = metrics.accuracy(log_probs, y).item()
    if found < 0.95:
        sys.exit(f"accuracy {found:.2f} on a separable problem")
    with tempfile.TemporaryDirectory() as folder:
        inference.save(Path(folder) / "state.pt")
        again = ParticleInference(Classifier(), pyro.optim.Adam({"lr": 0.05}), 5, **options)
        again.load(Path(folder) / "state.pt")
    if again.step(x, y) != inference.step(x, y):
        sys.exit("a loaded inference does not go on as the saved one")
    if importlib.util.find_spec("arviz") is None:
        try:
            to_arviz(inference, x, y)
        except MissingDependencyError as error:
            print(f"without ArviZ: {error}")
        else:
            sys.exit("to_arviz found ArviZ where there is none")


def check_doctests() -> int:
    """Examples of all docstrings that need no optional package."""
    names = {"math": math, "torch": torch, "nn": nn}
    finder, tries, wrong, skipped = doctest.DocTestFinder(), 0, [], []
    for module in pkgutil.iter_modules(pyro_fordes.__path__, "pyro_fordes."):
        for test in finder.find(importlib.import_module(module.name), extraglobs=names):
            pyro.clear_param_store()
            runner = Runner(optionflags=doctest.NORMALIZE_WHITESPACE)
            printed = io.StringIO()
            failed, attempted = runner.run(test, out=printed.write)
            tries += attempted
            if failed and runner.unavailable:
                skipped.append(test.name)
            elif failed:
                wrong.append(printed.getvalue())
    print(f"left out for want of optional packages: {', '.join(skipped) or 'none'}")
    if wrong:
        sys.exit("\n".join(wrong))
    return tries


def main() -> None:
    """Run everything and say what was tested."""
    torch.set_num_threads(1)
    check_training()
    tries = check_doctests()
    where = Path(pyro_fordes.__file__).parent
    packages = ("torch", "pyro-ppl", "numpy", "jaxtyping", "tqdm")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    print(f"pyro_fordes {pyro_fordes.__version__} in {where}: {tries} lines of examples, all right")


if __name__ == "__main__":
    main()
