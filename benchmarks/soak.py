"""A long run of a small FoRDE fit with checkpoints: memory, open files and speed over time.

    python benchmarks/soak.py                     # 20,000 steps, a few minutes
    python benchmarks/soak.py --steps 2000 --every 50

Prints a line per window of steps and whether memory grew by less than 2 % after the first quarter,
whether the number of open files is what it was, and the slowest window against the median one. The
exit status is 1 if memory or files grew. Linux only: it reads /proc.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_fordes import RBF, InputGradients, ParticleInference, bayesianize


class Classifier(PyroModule):
    """A small network on ten features."""

    def __init__(self, num_data):
        super().__init__()
        net = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
        self.net = bayesianize(net)
        self.num_data = num_data

    def forward(self, x, y=None):
        """Logits, and the labels' likelihood."""
        logits = pyro.deterministic("logits", self.net(x))
        with pyro.plate("data", self.num_data, subsample_size=len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def resident():
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def handles():
    """Number of open files."""
    return len(os.listdir("/proc/self/fd"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--windows", type=int, default=20)
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(512, 10)
    y = (x[:, :3] + 0.5 * torch.randn(512, 3)).argmax(1)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    inference = ParticleInference(
        Classifier(len(x)),
        pyro.optim.Adam({"lr": 1e-3}),
        5,
        kernel=RBF(InputGradients("x", output="logits")),
        num_data=len(x),
        nan="skip",
        clip_norm=10.0,
        seed=0,
    )
    size = options.steps // options.windows
    seen = []
    clock = time.perf_counter()

    def callback(inference, step, loss):
        nonlocal clock
        if (step + 1) % size == 0:
            now = time.perf_counter()
            gc.collect()
            seen.append((resident(), handles(), size / (now - clock)))
            print(
                f"step {step + 1:6d}  loss {loss:8.2f}  memory {seen[-1][0]:7.1f} MB  "
                f"files {seen[-1][1]:3d}  {seen[-1][2]:6.1f} steps/s",
                flush=True,
            )
            clock = time.perf_counter()
        return step + 1 >= options.steps

    with tempfile.TemporaryDirectory() as folder:
        losses = inference.fit(
            loader,
            options.steps // len(loader) + 1,
            progress_bar=False,
            callback=callback,
            checkpoint=folder,
            checkpoint_every=options.every,
        )
        files = sorted(path.name for path in Path(folder).iterdir())

    warm = seen[len(seen) // 4]
    growth = max(memory for memory, _, _ in seen[len(seen) // 4 :]) / warm[0] - 1
    leaked = seen[-1][1] - warm[1]
    speeds = [speed for _, _, speed in seen]
    print(f"{len(losses)} steps, {options.steps // options.every} checkpoints, kept: {files}")
    print(f"memory grew by {growth:.2%} after the first quarter (bound 2 %)")
    print(f"open files grew by {leaked}")
    print(
        f"speed: median {statistics.median(speeds):.1f} steps/s, first window {speeds[0]:.1f}, "
        f"last {speeds[-1]:.1f}, slowest {min(speeds):.1f}"
    )
    if growth >= 0.02 or leaked > 0:
        sys.exit(1)


if __name__ == "__main__":
    main()
