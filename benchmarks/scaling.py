"""Time and bytes of a step as ranks are added: measured with gloo on this machine, and predicted.

``python benchmarks/scaling.py`` starts 1, 2 and 4 processes of one thread each that train eight
ResNet-8 together, and prints steps per second, bytes sent and what of a step was waiting. Only
ranks that have a core of their own are a test of the method; the machine must be idle. The CPU
time of a rank depends less on what else runs; its ratio to that of one rank is the speed-up that
the work itself allows.
``--predict`` prints the tables of `docs/scaling.md` for GPUs, which follow from the formulas there
and need no measurement.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_fordes import (
    RBF,
    SVGD,
    Ensemble,
    InputGradients,
    ParticleInference,
    Weights,
    bayesianize,
    init_to_modules,
)
from pyro_fordes.distributed import Ranks, step_bytes

FORDE, ENSEMBLE, WEIGHTS, STEIN = "FoRDE", "deep ensemble", "weight-space RDE", "SVGD"
NUM_DATA = 50_000


# -------------------------------------------------------------------- the model that is measured


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(fan_out)
        self.second = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(fan_out)
        self.shortcut = nn.Conv2d(fan_in, fan_out, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Add them."""
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


def resnet8() -> nn.Sequential:
    """The smallest of the ResNets for 32 x 32 images: 78,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16, 16, 1),
        Block(16, 32, 2),
        Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class Classifier(PyroModule):
    """The network with a prior on its weights, and labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bayesianize(resnet8(), prior=1.0)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Labels given images; the plate scales a batch to the whole training set."""
        logits = self.net(x)
        with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


METHODS: dict[str, Callable[[], dict[str, Any]]] = {
    FORDE: lambda: {"kernel": RBF(InputGradients("x", output="net"))},
    ENSEMBLE: lambda: {"transport": Ensemble()},
    WEIGHTS: lambda: {"kernel": RBF(Weights())},
    STEIN: lambda: {"kernel": RBF(Weights()), "transport": SVGD()},
}


def inference_of(method: str, particles: int, **options: Any) -> ParticleInference:
    return ParticleInference(
        Classifier(),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        particles,
        init_loc_fn=init_to_modules(resnet8),
        num_data=NUM_DATA,
        seed=0,
        diagnostics_every=options.pop("diagnostics_every", 10**6),
        **METHODS[method](),
        **options,
    )


# -------------------------------------------------------------------- measuring


def written() -> int:
    """Bytes that this process has written to files and sockets (Linux)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def measure(args: argparse.Namespace) -> None:
    """What one of the processes does; rank 0 prints a line of JSON."""
    torch.set_num_threads(1)
    ranks, found = Ranks(), {}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.batch, 3, 32, 32, generator=generator)
    y = torch.randint(10, (args.batch,), generator=generator)
    for method in args.methods:
        inference = inference_of(method, args.particles, gather=ranks)
        for _ in range(2):  # the first is measured, which takes longer
            inference._update((x, y), {})
        times, waits = [], watch(inference)
        before, worked = written(), time.process_time()
        for _ in range(args.steps):
            start = time.perf_counter()
            inference._update((x, y), {})
            times.append(time.perf_counter() - start)
        found[method] = {
            "seconds": statistics.median(times),
            "cpu": (time.process_time() - worked) / args.steps,
            "waiting": sum(waits) / args.steps,
            "bytes": (written() - before) / args.steps,
            "sites": len(inference.get_unconstrained()),
            "parameters": sum(v[0].numel() for v in inference.get_unconstrained().values()),
        }
    if args.apart and ranks.size == 1:
        found["forces apart"] = apart(args, x, y)
    if ranks.size > 1:
        found["all-gather"] = links(inference)
    if ranks.rank == 0:
        print(json.dumps(found), flush=True)


def watch(inference: ParticleInference) -> list[float]:
    """A list that is filled with the seconds of every wait for other ranks."""
    link = getattr(inference._gather, "link", None)
    waits: list[float] = []
    if link is not None:
        wait = type(link)._wait

        def timed(work: Any, sent: Tensor | None = None) -> None:
            start = time.perf_counter()
            wait(link, work, sent)
            waits.append(time.perf_counter() - start)

        link._wait = timed
    return waits


def apart(args: argparse.Namespace, x: Tensor, y: Tensor) -> float:
    """How much longer a step takes whose two forces are differentiated one after the other.

    That is what it costs to hide the all-gather behind the likelihood's backward pass.
    """
    pair = [inference_of(FORDE, args.particles, diagnostics_every=every) for every in (1, 10**6)]
    for inference in pair:
        inference._update((x, y), {})
    ratios = []
    for _ in range(args.steps):
        taken = []
        for inference in pair:
            start = time.perf_counter()
            inference._update((x, y), {})
            taken.append(time.perf_counter() - start)
        ratios.append(taken[0] / taken[1])
    return statistics.median(ratios)


def links(inference: ParticleInference) -> dict[str, float]:
    """Latency of an all-gather, and the rate at which a rank sends in a large one."""
    link = inference._gather.link

    def seconds(size: int, repeats: int) -> float:
        block, times = torch.zeros(size, dtype=torch.uint8), []
        for _ in range(repeats):
            start = time.perf_counter()
            link.gather(block)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    small, large = seconds(64, 200), seconds(2**24, 10)
    return {"latency": small, "rate": (link.size - 1) * 2**24 / (large - small)}


def start(args: argparse.Namespace, size: int) -> dict[str, Any]:
    """Run `measure` in so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, __file__, "--worker", *sys.argv[1:]]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    # Memory that was freed is kept, for one rank as for several: else glibc gives it back to the
    # system in each step, and to take it again costs half the particles more than half the time.
    kept = {name: str(2**33) for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")}
    environment = {**os.environ, **kept, **shared, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(size)
    ]
    printed = [process.communicate()[0] for process in processes]
    return json.loads(printed[0].splitlines()[-1])


def main(args: argparse.Namespace) -> None:
    rounds = [{size: start(args, size) for size in args.ranks} for _ in range(args.rounds)]
    results = {
        size: {
            method: {
                key: statistics.median(one[size][method][key] for one in rounds)
                for key in rounds[0][size][method]
            }
            for method in args.methods
        }
        for size in args.ranks
    }
    print(
        f"{args.particles} ResNet-8, batch {args.batch} of 3 x 32 x 32, one thread per rank, "
        f"{os.cpu_count()} cores, torch {torch.__version__}"
    )
    print(f"{'':18}{'ranks':>6}{'s/step':>9}{'steps/s':>9}{'speed-up':>10}", end="")
    print(f"{'CPU s':>8}{'ratio':>7}", end="")
    print(f"{'waiting':>9}{'bytes sent':>13}{'formula':>13}")
    for method in args.methods:
        for size in args.ranks:
            one = results[size][method]
            base, work = (results[args.ranks[0]][method][key] for key in ("seconds", "cpu"))
            print(
                f"{method:18}{size:>6}{one['seconds']:>9.3f}{1 / one['seconds']:>9.3f}"
                f"{base / one['seconds']:>10.2f}{one['cpu']:>8.3f}{work / one['cpu']:>7.2f}"
                f"{one['waiting'] / one['seconds']:>9.1%}"
                f"{one['bytes']:>13,.0f}{formula(method, args, size, one):>13,}"
            )
    for size in args.ranks[1:]:
        link = {
            k: statistics.median(one[size]["all-gather"][k] for one in rounds)
            for k in ("latency", "rate")
        }
        print(
            f"all-gather of {size} ranks: {1e6 * link['latency']:.0f} microseconds, "
            f"{link['rate'] / 1e9:.2f} GB/s sent by each"
        )
    if args.apart:
        ratio = statistics.median(one[1]["forces apart"] for one in rounds if 1 in one)
        print(f"FoRDE with its forces differentiated apart: {ratio:.2f} times a step's time")


def formula(method: str, args: argparse.Namespace, size: int, one: dict[str, float]) -> int:
    """What `step_bytes` says."""
    points, features = {
        FORDE: (args.batch, 3 * 32 * 32),
        ENSEMBLE: (0, 0),
        WEIGHTS: (1, int(one["parameters"])),
        STEIN: (1, int(one["parameters"])),
    }[method]
    sites, scores = int(one["sites"]), method == STEIN
    return step_bytes(args.particles, size, points, features, num_sites=sites, scores=scores)


# -------------------------------------------------------------------- predicting


@dataclass(frozen=True)
class Case:
    """A network, its data and the batch that all particles see.

    Attributes:
        name: what it is called.
        parameters: number of weights.
        flops: multiply-adds of a forward pass of one point, times two.
        features: size of the input that is differentiated by.
        batch: points of a step.
    """

    name: str
    parameters: float
    flops: float
    features: int
    batch: int


@dataclass(frozen=True)
class Machine:
    """GPUs and their links.

    Attributes:
        speed: floating-point operations per second that networks reach.
        product: those that the kernel's matrix products reach.
        inside: bytes per second that a GPU receives from others of its node.
        outside: the same from other nodes.
        latency: seconds of one message of a ring.
        node: GPUs of a node.
    """

    speed: float = 100e12
    product: float = 50e12
    inside: float = 200e9
    outside: float = 20e9
    latency: float = 10e-6
    node: int = 8


CASES = (
    Case("ResNet-18, CIFAR", 11.2e6, 1.11e9, 3 * 32 * 32, 128),
    Case("ResNet-50, ImageNet", 25.6e6, 8.2e9, 3 * 224 * 224, 64),
    Case("ViT-L/16, ImageNet", 304e6, 123e9, 3 * 224 * 224, 64),
    Case("7 B parameters, 512 tokens", 7e9, 7.2e12, 512 * 4096, 4),
)


def received(case: Case, particles: int, ranks: int, method: str) -> float:
    """Bytes that a rank receives in a step, in single precision: formula 1 of the page."""
    numbers = {
        ENSEMBLE: 0,
        FORDE: case.batch * case.features,
        WEIGHTS: case.parameters,
        STEIN: 2 * case.parameters,
    }[method]
    return 4 * numbers * (particles - particles / ranks)


def seconds(
    case: Case, particles: int, ranks: int, method: str, machine: Machine
) -> dict[str, float]:
    """Parts of a step's time: formulas 2 to 4 of the page."""
    own = particles / ranks
    passes = 6 if method == FORDE else 3
    size = {FORDE: case.batch * case.features, ENSEMBLE: 0}.get(method, case.parameters)
    rate = machine.inside if ranks <= machine.node else machine.outside
    travel = received(case, particles, ranks, method) / rate
    wait = 2 * (ranks - 1) * machine.latency if method != ENSEMBLE else 0.0
    products = 2 * size * particles * (particles + (2 if method == STEIN else 1) * own)
    return {
        "networks": own * passes * case.flops * case.batch / machine.speed,
        "gather": travel + wait,
        "kernel": products / machine.product,
    }


def predict() -> None:
    """Tables of weak scaling: one particle per GPU."""
    machine = Machine()
    for case in CASES:
        share = case.batch * case.features / case.parameters
        print(f"\n{case.name}: a FoRDE message is {share:.3g} times the weights")
        print(f"{'GPUs = particles':>17}{ENSEMBLE:>16}", end="")
        print(f"{'FoRDE: networks':>17}{'gather':>9}{'kernel':>9}{'sum':>9}", end="")
        print(f"{WEIGHTS:>18}{STEIN:>10}   milliseconds")
        for ranks in (8, 16, 32, 64, 128, 256, 512, 1024):
            parts = {m: seconds(case, ranks, ranks, m, machine) for m in METHODS}
            total = {m: 1e3 * sum(one.values()) for m, one in parts.items()}
            forde = {name: 1e3 * value for name, value in parts[FORDE].items()}
            print(f"{ranks:>17}{total[ENSEMBLE]:>16.1f}", end="")
            print(f"{forde['networks']:>17.1f}{forde['gather']:>9.1f}", end="")
            print(f"{forde['kernel']:>9.1f}{total[FORDE]:>9.1f}", end="")
            print(f"{total[WEIGHTS]:>18.1f}{total[STEIN]:>10.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--predict", action="store_true", help="print the tables for GPUs only")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6, help="steps of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements; medians are printed")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--apart", action="store_true", help="the cost of differentiating apart")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.predict:
        predict()
    elif options.worker:
        measure(options)
    else:
        main(options)
