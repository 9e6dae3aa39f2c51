"""Steps of deep networks: FoRDE against a deep ensemble, ours against one written by hand.

Prints four tables of ratios, each measured side by side in one process: competitors take turns, and
a ratio is the median over rounds of two competitors' times in the same round. On a CPU time is the
processor time of the process (one thread), on a GPU that of the clock after it has been waited for.

* networks: steps of an MLP, a ResNet-18 with the stem for small images and a small ViT. "floor" is
  the ratio that passes through the network make unavoidable: a forward pass and a backward pass by
  inputs or by weights count 1 each, so an ensemble's step is 3 and FoRDE's 6; repulsion at a share
  q of the points (a further, smaller run) adds 6 q, one particle at a time up to 2. "MiB" is how
  far the peak of a step lies above what is there before it: of the resident size, in a process of
  its own, on a CPU; of torch's allocator on a GPU.
* engines: vmap over loop, by width, batch and number of particles.
* particles: time per particle and step, over that of five particles, and the kernel's share.
* compiled: eager over compiled steps; left out unless asked for, since compiling takes minutes.

Losses and forces of the ensemble by hand are compared with ours before anything is timed.
``pyro.infer.SVGD`` and NumPyro are in ``step_time.py``. On a GPU, in one command:

    python benchmarks/deep.py --device cuda --autocast --channels-last --tables all

Image networks have 4 particles and batches of 16 on a CPU, 10 and 128 on a GPU, unless
``--particles`` and ``--batch`` say otherwise: ``--particles 10 --batch 64`` takes hours on a core.

Run as ``python benchmarks/deep.py``; ``--help`` lists the options.
"""

import argparse
import copy
import ctypes
import gc
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torchvision
from pyro.nn import PyroModule
from step_time import _resident, keep_freed_memory, processor
from torch import Tensor, nn
from torch.nn import functional as F

import pyro_fordes
from pyro_fordes import (
    RBF,
    WGD,
    Ensemble,
    InputGradients,
    ParticleInference,
    Weights,
    bayesianize,
    init_to_modules,
)

NUM_DATA, RATE, MOMENTUM = 50_000, 1e-4, 0.9


# -------------------------------------------------------------------- networks


def mlp(width: int = 100) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise((64, width, width, 10)):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def resnet18() -> nn.Module:
    """With the stem for small images."""
    net = torchvision.models.resnet18(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return net


def vit() -> nn.Module:
    """ViT-tiny (192 features, 12 layers, 3 heads) with patches of 4 pixels."""
    net = torchvision.models.VisionTransformer(32, 4, 12, 3, 192, 768, num_classes=10)
    nn.init.normal_(net.heads.head.weight, std=0.02)  # zero would leave nothing to compare
    return net


def cnn(width: int = 16) -> nn.Module:
    """Two convolutions with BatchNorm."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((3, width), (width, 2 * width)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, 2, 1), nn.BatchNorm2d(fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


@dataclass(frozen=True)
class Network:
    """What is trained: a network, its inputs, batch and number of particles, and where."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    particles: int
    device: str = "cpu"
    autocast: bool = False
    channels_last: bool = False

    def data(self) -> tuple[Tensor, Tensor]:
        """A minibatch."""
        torch.manual_seed(0)
        x, y = torch.randn(self.batch, *self.shape), torch.randint(10, (self.batch,))
        if self.channels_last and x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        return x.to(self.device), y.to(self.device)

    def nets(self) -> list[nn.Module]:
        """Initial networks, one per particle."""
        torch.manual_seed(1)
        return [self.make().to(self.device) for _ in range(self.particles)]


# -------------------------------------------------------------------- competitors


class Classifier(PyroModule):
    """The model as a user writes it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = bayesianize(net, prior=1.0)

    def forward(self, x: Tensor, y: Tensor) -> None:
        """Observe the labels."""
        logits = self.net(x)
        with pyro.plate("data", NUM_DATA, subsample_size=len(x), device=x.device):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def ours(network: Network, points: float | None = None, **options: object) -> Callable[[], object]:
    """A step of ``ParticleInference``, which does not wait for a GPU; by default FoRDE's."""
    nets, data = network.nets(), network.data()
    inference = ParticleInference(
        Classifier(nets[0]),
        pyro.optim.SGD({"lr": RATE, "momentum": MOMENTUM}),
        network.particles,
        kernel=RBF(InputGradients("x", output="net", points=points)),
        init_loc_fn=init_to_modules(nets),
        num_data=NUM_DATA,
        diagnostics_every=10**9,  # so rare that it is not in the time
        autocast=torch.bfloat16 if network.autocast else None,
        seed=0,
        **options,
    )
    inference.step(*data)  # measured
    return lambda: inference._update(data, {})


def by_hand(network: Network, nets: list[nn.Module] | None = None) -> Callable[[], object]:
    """A deep ensemble in torch: one network after the other, the prior as a penalty."""
    nets, (x, y) = nets or network.nets(), network.data()
    optims = [torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM) for net in nets]

    def step() -> Tensor:
        losses = []
        for net, optim in zip(nets, optims, strict=True):
            optim.zero_grad()
            with torch.autocast(x.device.type, torch.bfloat16, enabled=network.autocast):
                logits = net(x)
            nll = F.cross_entropy(logits.float(), y)
            penalty = sum(p.square().sum() for p in net.parameters()) / (2 * NUM_DATA)
            loss = nll + penalty
            loss.backward()
            optim.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    return step


ENSEMBLE, HAND, FORDE = "ours: Ensemble", "by hand: deep ensemble", "ours: FoRDE"
STEPS: dict[str, tuple[Callable[[Network], Callable[[], object]], float]] = {
    ENSEMBLE: (lambda n: ours(n, transport=Ensemble()), 1.0),
    HAND: (by_hand, 1.0),
    FORDE: (ours, 2.0),
    "FoRDE, every 4th step": (lambda n: ours(n, repulsion_every=4), 1.25),
    "FoRDE, a quarter of points": (lambda n: ours(n, points=0.25), 1.5),
    "FoRDE, an eighth of points": (lambda n: ours(n, points=0.125), 1.25),
    "FoRDE, one particle at a time": (lambda n: ours(n, chunk_size=1), 8 / 3),
}


def check() -> None:
    """Raise unless an ensemble's step by hand is ours, in double precision."""
    torch.set_default_dtype(torch.float64)
    network = Network(cnn, (3, 8, 8), 16, 2)
    nets, data = network.nets(), network.data()
    inference = ParticleInference(
        Classifier(copy.deepcopy(nets[0])),
        pyro.optim.SGD({"lr": RATE, "momentum": MOMENTUM}),
        2,
        transport=Ensemble(),
        init_loc_fn=init_to_modules(nets),
        num_data=NUM_DATA,
        seed=0,
    )
    by_themselves = network.nets()
    hand = by_hand(network, by_themselves)
    for _ in range(3):
        inference.step(*data)
        hand()
    for i, net in enumerate(by_themselves):
        torch.testing.assert_close(inference.module(i).state_dict(), net.state_dict())
    torch.set_default_dtype(torch.float32)


# -------------------------------------------------------------------- measuring


def seconds(step: Callable[[], object], count: int, device: str) -> float:
    """Time per step."""
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count
    start = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - start) / count


def rounds_of(
    steps: dict[str, Callable[[], object]], rounds: int, count: int, device: str
) -> dict[str, list[float]]:
    """Times per step of each competitor, one per round, the competitors taking turns."""
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            # A step in four repels where only every fourth does.
            several = max(count, 4) if "every" in name else count
            found[name].append(seconds(step, several, device))
    return found


def ratio(one: list[float], other: list[float]) -> float:
    """Median over rounds."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def networks(options: argparse.Namespace) -> dict[str, Network]:
    """The networks that are compared, as large as asked for."""
    on_cpu = options.device == "cpu"
    particles = options.particles or (4 if on_cpu else 10)
    batch = options.batch or (16 if on_cpu else 128)
    place = {
        "device": options.device,
        "autocast": options.autocast,
        "channels_last": options.channels_last,
    }
    if options.smoke:
        return {"CNN": Network(cnn, (3, 8, 8), 4, 2, **place)}
    found = {
        "MLP 64-100-100-10": Network(mlp, (64,), 128, options.particles or 10, **place),
        "ResNet-18": Network(resnet18, (3, 32, 32), batch, particles, **place),
        "ViT-tiny": Network(vit, (3, 32, 32), batch, particles, **place),
    }
    return {name: one for name, one in found.items() if name.split()[0] in options.networks}


def peak(name: str, label: str, options: argparse.Namespace) -> float:
    """MiB by which memory rises in a step, in a process of its own; NaN where it is not known."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name, label]
    result = subprocess.run(command, capture_output=True, text=True)
    return float(result.stdout.split()[-1]) if result.returncode == 0 else float("nan")


def peak_here(name: str, label: str, options: argparse.Namespace) -> float:
    """The same in this process."""
    network = networks(options)[name]
    step = STEPS[label][0](network)
    step()
    gc.collect()
    if network.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


# -------------------------------------------------------------------- tables


def header(title: str, first: str, columns: tuple[str, ...]) -> None:
    print(f"\n{title}\n{first:32}" + "".join(f"{column:>12}" for column in columns), flush=True)


def table_of_networks(options: argparse.Namespace) -> None:
    columns = ("ms", "/ Ensemble", "floor", "/ by hand", "MiB")
    for name, network in networks(options).items():
        title = f"{name}, {network.particles} particles, batch {network.batch}"
        header(title, "", columns)
        count = 20 if name.startswith("MLP") else 1
        same = {label: STEPS[label][0](network) for label in (ENSEMBLE, HAND)}
        for label, (make, floor) in STEPS.items():
            # No more than three at a time, which memory would not hold.
            steps = same if label in same else {**same, label: make(network)}
            found = rounds_of(steps, options.rounds, count, network.device)
            own = found[label]
            del steps
            gc.collect()
            risen = float("nan") if options.smoke and label != FORDE else peak(name, label, options)
            print(
                f"{label:32}{1e3 * statistics.median(own):12.2f}"
                f"{ratio(own, found[ENSEMBLE]):12.2f}{floor:12.2f}{ratio(own, found[HAND]):12.2f}"
                f"{risen:12.0f}",
                flush=True,
            )


def table_of_engines(options: argparse.Namespace) -> None:
    header("FoRDE: time under vmap over that in a loop", "", ("vmap / loop", "loop ms"))
    cases = [("MLP", mlp, (64,), width, 128, 10) for width in (32, 100, 400)]
    cases += [("MLP", mlp, (64,), 100, batch, 10) for batch in (16, 512)]
    cases += [("MLP", mlp, (64,), 100, 128, count) for count in (2, 30)]
    cases += [("CNN", cnn, (3, 32, 32), width, 16, 5) for width in (8, 32)]
    cases += [("CNN", cnn, (3, 32, 32), 16, batch, 5) for batch in (16, 64)]
    cases += [("CNN", cnn, (3, 32, 32), 16, 16, count) for count in (2, 10)]
    for kind, make, shape, width, batch, particles in cases[:1] if options.smoke else cases:
        network = Network(lambda m=make, w=width: m(w), shape, batch, particles, options.device)
        steps = {engine: ours(network, vectorize=engine) for engine in ("vmap", "loop")}
        found = rounds_of(steps, options.rounds, 4, network.device)
        label = f"{kind} width {width}, batch {batch}, {particles} particles"
        loop = 1e3 * statistics.median(found["loop"])
        print(f"{label:44}{ratio(found['vmap'], found['loop']):12.2f}{loop:12.2f}", flush=True)


def table_of_particles(options: argparse.Namespace) -> None:
    """Every number of particles beside five, in turns."""
    counts = (2, 5) if options.smoke else (2, 5, 10, 20, 50, 100)
    for kind, make, shape, batch in (("MLP", mlp, (64,), 128), ("CNN", cnn, (3, 32, 32), 16)):
        columns = ("ms each", "/ five", "kernel share")
        header(f"{kind}: FoRDE's time per particle, by the number of particles", "", columns)
        for count in counts:
            steps = {
                str(number): ours(Network(make, shape, batch, number, options.device))
                for number in dict.fromkeys((5, count))
            }
            found = rounds_of(steps, options.rounds, 4, options.device)
            each = [value / count for value in found[str(count)]]
            five = [value / 5 for value in found["5"]]
            share = kernel_time(count, batch, shape, options) / statistics.median(each) / count
            print(
                f"{count:<32}{1e3 * statistics.median(each):12.2f}{ratio(each, five):12.2f}"
                f"{share:12.2f}",
                flush=True,
            )


def kernel_time(
    count: int, batch: int, shape: tuple[int, ...], options: argparse.Namespace
) -> float:
    """Time of the transport's own work on representations of this size."""
    r = torch.randn(count, batch, int(torch.tensor(shape).prod()), device=options.device)
    kernel, transport = RBF(Weights()), WGD()
    found = rounds_of(
        {"": lambda: transport.repel(kernel, r, slice(None), 0)}, 3, 8, options.device
    )
    return statistics.median(found[""])


def table_of_compiled(options: argparse.Namespace) -> None:
    header("Eager over compiled steps", "", ("eager / compiled", "compiled ms"))
    for name, network in networks(options).items():
        for label, transport in ((FORDE, None), (ENSEMBLE, Ensemble())):
            given = {} if transport is None else {"transport": transport}
            steps = {
                "eager": ours(network, **given),
                "compiled": ours(network, compile=True, **given),
            }
            count = 20 if name.startswith("MLP") else 1
            found = rounds_of(steps, options.rounds, count, network.device)
            taken = 1e3 * statistics.median(found["compiled"])
            print(
                f"{name + ', ' + label:32}{ratio(found['eager'], found['compiled']):16.2f}"
                f"{taken:12.2f}",
                flush=True,
            )


TABLES = {
    "networks": table_of_networks,
    "engines": table_of_engines,
    "particles": table_of_particles,
    "compiled": table_of_compiled,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", choices=(*TABLES, "all"), default=None)
    kinds = ("MLP", "ResNet-18", "ViT-tiny")
    parser.add_argument("--networks", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--particles", type=int)
    parser.add_argument("--batch", type=int, help="of the image networks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    if options.peak_of:
        print(peak_here(*options.peak_of, options))
        return
    if options.smoke:
        options.rounds = 1
    keep_freed_memory()
    where = processor() if options.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"pyro_fordes {pyro_fordes.__version__}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, pyro {pyro.__version__}; {where}"
        + (", bfloat16" if options.autocast else "")
        + (", channels last" if options.channels_last else ""),
        flush=True,
    )
    check()
    chosen = options.tables or ["networks", "engines", "particles"]
    for name in TABLES if "all" in chosen else chosen:
        TABLES[name](options)


if __name__ == "__main__":
    main()
