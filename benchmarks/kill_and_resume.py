"""Kill a run again and again, also while it saves, and compare its end with an undisturbed run's.

    python benchmarks/kill_and_resume.py               # four settings, 20 kills each
    python benchmarks/kill_and_resume.py --kills 3 --settings "CNN, torch SGD"

Each run is a process that fits an ensemble with a checkpoint after every step. It gets SIGKILL
after a random number of steps and a random part of a second, which is often in the middle of
writing a checkpoint; a new process then makes everything anew and calls `fit` with the same
arguments. At the end particles, buffers, optimiser state, random states and the loss of every step
must be those of a run that nobody killed, bit for bit. The exit status is 1 if anything differs.
POSIX only, since the processes are forked.
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pyro_fordes import RBF, InputGradients, ParticleInference, bayesianize

NUM_DATA, BATCH = 24, 6


class Images(Dataset):
    """Random images and labels, with noise from every global generator, as augmentations have."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(NUM_DATA, 1, 6, 6, generator=generator)
        self.y = torch.arange(NUM_DATA) % 3

    def __len__(self):
        return NUM_DATA

    def __getitem__(self, index):
        noise = torch.randn(1, 6, 6) + np.random.randn() + random.random()
        return self.x[index] + 0.01 * noise.float(), self.y[index]


class Classifier(PyroModule):
    """A network of logits."""

    def __init__(self, net):
        super().__init__()
        self.net = bayesianize(net)

    def forward(self, x, y=None):
        """Logits, and the labels' likelihood."""
        logits = pyro.deterministic("logits", self.net(x))
        with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def mlp():
    """A small network with dropout."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3)
    )


def cnn():
    """A small network with BatchNorm and dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(12, 3),
    )


def scheduled():
    """An optimiser of Pyro whose learning rate falls at the end of each epoch."""
    adam = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}}
    return pyro.optim.StepLR({**adam, "step_size": 1, "gamma": 0.97})


def sgd():
    """An optimiser of torch with momentum."""
    return lambda params: torch.optim.SGD(params, lr=0.005, momentum=0.9)


SETTINGS = {
    "MLP, Pyro's scheduler": (mlp, scheduled),
    "MLP, torch SGD": (mlp, sgd),
    "CNN, Pyro's scheduler": (cnn, scheduled),
    "CNN, torch SGD": (cnn, sgd),
}


def train(name, folder, epochs, tell):
    """What a user's script does: make everything, fit, keep the result."""
    net, optim = SETTINGS[name]
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    inference = ParticleInference(
        Classifier(net()),
        optim(),
        3,
        kernel=RBF(InputGradients("x", output="logits")),
        num_data=NUM_DATA,
        seed=5,
    )
    loader = DataLoader(Images(), batch_size=BATCH, shuffle=True, num_workers=2)
    losses = inference.fit(
        loader,
        epochs,
        progress_bar=False,
        callback=lambda inference, step, loss: tell(),
        checkpoint=folder / "checkpoints",
        checkpoint_every=1,
    )
    torch.save({"losses": losses, "state": inference.state_dict()}, folder / "result.pt")


def started(name, folder, epochs):
    """Fork a process that trains; returns its id and a pipe with a byte for each step."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.close(read)
        status = 1
        try:
            train(name, folder, epochs, lambda: os.write(write, b".") and None)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    return child, read


def killed(name, folder, epochs, steps, pause):
    """Train, but SIGKILL after some steps and a pause; False if the run was over before that."""
    child, read = started(name, folder, epochs)
    done = 0
    while done != steps and os.read(read, 1):
        done += 1
    if done == steps:
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):  # a loader's worker may outlive its parent
        os.killpg(child, signal.SIGKILL)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status) != 0:
        raise SystemExit(f"{name}: a run ended with status {os.WEXITSTATUS(status)}")
    return False


def different(a, b, path=""):
    """Places where two trees differ in anything."""
    if type(a) is not type(b):
        return [path]
    if isinstance(a, torch.Tensor):
        alike = (a.dtype, a.shape) == (b.dtype, b.shape)
        return [] if alike and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) else [path]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [path]
        return [d for key in a for d in different(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [path]
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in different(x, y, f"{path}/{i}")]
    return [] if a == b else [path]


def trial(name, kills, epochs, seed, folder):
    """Run a setting undisturbed and killed; returns the differences and a line about the kills."""
    moments = random.Random(seed)
    whole, cut = folder / "whole", folder / "cut"
    killed(name, whole, epochs, -1, 0)
    total = epochs * NUM_DATA // BATCH
    done = saving = 0
    while done < kills:
        steps = moments.randint(1, max(int(1.4 * total / (kills + 1)), 1))
        if not killed(name, cut, epochs, steps, moments.uniform(0.0, 0.03)):
            break
        done += 1
        saving += bool(list((cut / "checkpoints").glob(".step-*")))
    at = sorted((cut / "checkpoints").glob("step-*"))[-1].stem
    killed(name, cut, epochs, -1, 0)
    results = [torch.load(path / "result.pt", weights_only=True) for path in (whole, cut)]
    line = f"{done} kills, {saving} of them while saving; the last left {at} of {total}"
    return different(*results) + ([] if done == kills else ["too few kills"]), line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    options = parser.parse_args()
    failed = False
    for name in options.settings:
        with tempfile.TemporaryDirectory() as folder:
            found, line = trial(name, options.kills, options.epochs, options.seed, Path(folder))
        print(f"{name:24s} {line}: {found or 'bit-equal'}", flush=True)
        failed |= bool(found)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
