"""Runs functions in several processes, and the functions.

Under torchrun: ``tests/ranks.py NAME OUT OPTIONS``, options as JSON.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).parent.parent


# Imports once, and forks: starting Python for every rank would take most of the time.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pyro_fordes", "torch.utils.data", "tests.models"])
# An exit code can be read once, and starting a process reads those of all others, too: where two
# threads do so, one of them is told 255.
_EXIT_CODES = threading.Lock()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_ranks(name, out, size, *, stuck=(), timeout=90, **options):
    """Run a function of this file in so many processes; returns exit codes and what they printed.

    Args:
        stuck: ranks that are not expected to end.
    """
    port = free_port()
    logs = [Path(out).with_suffix(f".{rank}.log") for rank in range(size)]
    processes = [
        _CONTEXT.Process(
            target=_in_rank, args=(name, str(out), rank, size, port, logs[rank], options)
        )
        for rank in range(size)
    ]
    until = time.monotonic() + timeout
    try:
        with _EXIT_CODES:
            for process in processes:
                process.start()
        for rank, process in enumerate(processes):
            if rank not in stuck:
                wait([process.sentinel], max(0.1, until - time.monotonic()))
        with _EXIT_CODES:
            codes = [process.exitcode for process in processes]
    finally:
        with _EXIT_CODES:
            for process in processes:
                process.kill()
                process.join()
    return codes, [log.read_text() for log in logs]


def _in_rank(name, out, rank, size, port, log, options):
    """What a process does: as under torchrun, what it prints in a file."""
    import torch

    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(variables, RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    globals()[name](out, **options)


def torchrun(size, script, *arguments, options=(), timeout=240):
    """Run a script under torchrun; returns what it printed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    if "--standalone" not in options:
        command += ["--master-port", free_port()]
    command += [*options, str(script), *map(str, arguments)]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


# ---------------------------------------------------------------- what they run


def data():
    import torch

    generator = torch.Generator().manual_seed(7)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    return x, (x.sum(1) > 0).long()


def model(dropout=0.0, batch_norm=False, shared=False):
    """A small classifier with what can go wrong: dropout, BatchNorm, a shared parameter."""
    import pyro
    import torch
    from torch import nn

    from pyro_fordes import bayesianize
    from tests.models import Classifier

    torch.manual_seed(0)
    layers = [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)]
    if batch_norm:
        layers.insert(1, nn.BatchNorm1d(5))
    if dropout:
        layers.insert(-1, nn.Dropout(dropout))
    net = Classifier(bayesianize(nn.Sequential(*layers).double()), num_data=24)
    if not shared:
        return net

    def with_shared(x, y=None):
        shift = pyro.param("shift", torch.zeros(3, dtype=torch.float64))
        return net(x + shift, y)

    return with_shared


def cases():
    """Inferences to compare, by name: arguments, and arguments of the model."""
    import pyro
    import torch

    from pyro_fordes import (
        RBF,
        SVGD,
        WGD,
        Ensemble,
        Features,
        Fixed,
        InputGradients,
        Langevin,
        Outputs,
        Weights,
    )

    gradients = InputGradients("x", output="logits")
    elsewhere = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)
    return {
        "ensemble": ({"transport": Ensemble()}, {}),
        "wgd weights": ({"kernel": RBF(Weights())}, {}),
        "wgd weights calibrated": (
            {
                "kernel": RBF(Weights()),
                "transport": WGD("sge", whiten="diag", calibrate=True),
            },
            {},
        ),
        "wgd gradients": ({"kernel": RBF(gradients)}, {}),
        "wgd gradients blob": ({"kernel": RBF(gradients), "transport": WGD("blob")}, {}),
        "wgd gradients chunks": (
            {"kernel": RBF(gradients), "chunk_size": 2, "vectorize": "loop"},
            {"dropout": 0.3},
        ),
        "wgd gradients dropout": (
            {"kernel": RBF(gradients), "repulsion_every": 2, "clip_norm": 1.0},
            {"dropout": 0.3, "batch_norm": True},
        ),
        "batch norm": ({"kernel": RBF(Weights())}, {"batch_norm": True}),
        "svgd weights": ({"kernel": RBF(Weights()), "transport": SVGD()}, {}),
        "svgd calibrated": (
            {
                "kernel": RBF(Weights()),
                "transport": SVGD(whiten="diag", calibrate=True),
            },
            {},
        ),
        "svgd coordinates": (
            {"kernel": RBF(Weights(group="coordinate")), "transport": SVGD()},
            {"shared": True},
        ),
        "svgd outputs": ({"kernel": RBF(Outputs()), "transport": SVGD()}, {}),
        "svgd outputs by point": (
            {"kernel": RBF(Outputs(group="point"), Fixed(0.5)), "transport": SVGD()},
            {},
        ),
        "wgd outputs elsewhere": ({"kernel": RBF(Outputs(points=(elsewhere,)), Fixed(0.5))}, {}),
        "wgd features": ({"kernel": RBF(Features("net.0"))}, {}),
        "shared": ({"kernel": RBF(Weights())}, {"shared": True}),
        "langevin": (
            {
                "transport": Ensemble(),
                "optim": pyro.optim.PyroOptim(Langevin, {"lr": 1e-3}),
            },
            {},
        ),
    }


def share_of(ranks, *tensors):
    """The rows of a batch that a rank sees."""
    return [tensor.chunk(ranks.data)[ranks.data_rank] for tensor in tensors]


def check_rows(inference, ranks):
    """Ranks with the same particles have the same values, buffers and optimiser states."""
    import torch.distributed as dist

    from pyro_fordes.agreement import fingerprint

    stepper = inference._stepper.state_dict({**inference._particles, **inference._shared})
    own = fingerprint((inference._particles, inference._buffers, stepper, inference._step))
    found = [None] * ranks.size
    dist.all_gather_object(found, own)
    rows = [found[first : first + ranks.data] for first in range(0, ranks.size, ranks.data)]
    assert [len(set(row)) for row in rows] == [1] * len(rows), rows
    assert len(set(found)) == len(rows)


def compare(out, num_steps=20, num_particles=7, only=None, data_ranks=1):
    """Take steps in every case, and note everything that comes out."""
    import pyro
    import torch

    from pyro_fordes import ParticleInference, ParticlePredictive
    from pyro_fordes.distributed import Ranks

    ranks = Ranks(data=data_ranks)
    found = {}
    whole = data()[0]
    x, y = share_of(ranks, *data())
    for name, (arguments, options) in cases().items():
        if only is not None and name not in only:
            continue
        pyro.clear_param_store()
        arguments = {
            "optim": pyro.optim.Adam({"lr": 0.05}),
            "diagnostics_every": 7,
            "seed": 3,
            "gather": ranks,
            **arguments,
        }
        inference = ParticleInference(model(**options), num_particles=num_particles, **arguments)
        losses = inference.run(num_steps, x, y, progress_bar=False)
        if data_ranks > 1:
            check_rows(inference, ranks)
        torch.manual_seed(5)
        predict = ParticlePredictive(inference)
        found[name] = {
            "losses": losses,
            **{f"sample {k}": v for k, v in inference.get_samples(gather=True).items()},
            **{f"diagnostics {k}": torch.as_tensor(v) for k, v in inference.diagnostics().items()},
            **{f"mean {k}": v for k, v in predict.mean(whole).items()},
            **{f"draw {k}": v.double() for k, v in predict(whole).items()},
            **{f"likelihood {k}": v for k, v in inference.log_likelihood(x, y).items()},
            **{
                f"summary {site.name}": torch.tensor([site.mean, site.sd, site.low, site.high])
                for site in inference.summary().sites
            },
            **{f"score {k}": inference._gather(v) for k, v in inference.scores(x, y).items()},
            "log_joint": inference.log_joint(x, y),
            "representation": inference.representation(x, y),
            "loss": torch.tensor(inference.evaluate_loss(x, y)),
            "drawn": next(iter(inference.get_samples(5, gather=True).values())),
            **{f"buffer {k}": inference._gather(v) for k, v in inference._buffers.items()},
            **{f"shared {k}": v.detach() for k, v in inference._shared.items()},
        }
    if ranks.rank == 0:
        torch.save(found, out)


def fail(how, patched, rank, step):
    """Make something go wrong in one rank at a step, before a method of the link does its work."""
    import torch.distributed as dist

    from pyro_fordes.link import Link

    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    original = getattr(Link, patched)

    def patch(self, *args, **kwargs):
        if dist.get_rank() == rank and not again and STEP[0] == step:
            if how == "raise":
                raise ValueError("no more")
            if how == "hang":
                time.sleep(1000)
            os.kill(os.getpid(), getattr(signal, how))
            time.sleep(0.1)
        return original(self, *args, **kwargs)

    setattr(Link, patched, patch)


STEP = [0]


def train(
    out,
    num_particles=5,
    epochs=4,
    failure=None,
    checkpoint=None,
    data_of=None,
    patience=60,
    silence=20,
):
    """Fit with a loader that shuffles; ``failure`` says what goes wrong and when."""
    import pyro
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from pyro_fordes import RBF, InputGradients, ParticleInference
    from pyro_fordes.distributed import Ranks

    ranks = Ranks(timeout=timedelta(seconds=patience), silence=timedelta(seconds=silence))
    if failure is not None:
        fail(*failure)
    torch.manual_seed(11 + ranks.rank)  # rank 0 decides on the order of the data
    x, y = data()
    if data_of == ranks.rank:
        x = x + 1
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    inference = ParticleInference(
        model(dropout=0.2, batch_norm=True),
        pyro.optim.Adam({"lr": 0.05}),
        num_particles,
        kernel=RBF(InputGradients("x", output="logits")),
        seed=3,
        gather=ranks,
    )

    def callback(inference, step, loss):
        STEP[0] = step + 1

    losses = inference.fit(
        loader,
        epochs,
        progress_bar=False,
        callback=callback,
        checkpoint=checkpoint,
        checkpoint_every=None if checkpoint is None else 2,
    )
    samples = inference.get_samples(gather=True)
    state = inference.state_dict()
    if ranks.rank == 0:
        torch.save({"losses": losses, **samples, "state": state}, out)


def example(out, *, arguments):
    """Run the example as its command does."""
    import runpy

    sys.argv = ["distributed.py", *arguments, "--out", out]
    runpy.run_path(str(ROOT / "examples" / "distributed.py"), run_name="__main__")


class Batches:
    """A loader without a length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def train_shares(out, epochs=3, data_ranks=1, checkpoint=None, odd=None, nan="raise"):
    """Fit on shares of shuffled batches of four; ``odd`` says what is wrong with the last rank."""
    import pyro
    import torch
    from pyro.infer.autoguide.initialization import init_to_sample
    from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

    from pyro_fordes import RBF, InputGradients, NumericalError, ParticleInference
    from pyro_fordes.distributed import Ranks

    ranks = Ranks(timedelta(seconds=20), timedelta(seconds=10), data=data_ranks)
    wrong = odd is not None and ranks.rank == ranks.size - 1
    x, y = data()
    if wrong and odd == "data":
        x = x + 1
    dataset = TensorDataset(x, y)
    sampler = DistributedSampler(dataset, data_ranks, ranks.data_rank)
    if wrong and odd == "sampler":
        sampler = DistributedSampler(Subset(dataset, range(8)), data_ranks, ranks.data_rank)
    loader = DataLoader(dataset, 4 // data_ranks, sampler=sampler)
    if odd in ("end", "shapes", "nan"):
        batches = list(loader)
        if wrong and odd == "end":
            batches.pop()
        if wrong and odd == "shapes":
            batches[1] = [part[:1] for part in batches[1]]
        if ranks.data_rank and odd == "nan":
            batches[1] = [batches[1][0] * torch.nan, batches[1][1]]
        loader = Batches(batches)

    def init(site):
        return init_to_sample(site) + (wrong and odd == "start")

    inference = ParticleInference(
        model(),
        pyro.optim.Adam({"lr": 0.05}),
        5,
        kernel=RBF(InputGradients("x", output="logits")),
        init_loc_fn=init,
        nan=nan,
        diagnostics_every=2,
        seed=3,
        gather=ranks,
    )
    after = {}

    def callback(inference, step, loss):
        after[step] = inference.get_samples(gather=True)

    options = {"progress_bar": False, "callback": callback, "checkpoint": checkpoint}
    try:
        losses = inference.fit(loader, epochs, **options)
    except NumericalError as error:
        for name, value in inference.get_samples(gather=True).items():
            assert value.equal(after[0][name])  # as it was before the second step
        print(type(error).__name__, error)
        losses = inference.run(2, *share_of(ranks, *data()), progress_bar=False)
    if data_ranks > 1:
        check_rows(inference, ranks)
    samples = inference.get_samples(gather=True)
    faults = inference.diagnostics()["faults"]
    if ranks.rank == 0:
        torch.save({"losses": losses, "faults": faults, **samples}, out)


def count_bytes(out, num_particles=5, num_features=50, num_points=10, svgd=False, data_ranks=1):
    """What a step sends: payload of the messages, and all that the process wrote."""
    import pyro
    import pyro.distributions as dist
    import torch

    from pyro_fordes import RBF, SVGD, InputGradients, ParticleInference, Weights, distributed, link

    def model(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        with pyro.plate("data", len(x) * data_ranks, subsample_size=len(x)):
            pyro.sample("y", dist.Normal((x @ weight).tanh(), 1.0), obs=y)

    payload, sent, summed = [0], link._all_gather, link._all_reduce

    def counted(received, block, group):
        payload[0] += (received.numel() - block.numel()) * block.element_size()
        return sent(received, block, group)

    def counted_sum(tensor, group):
        """In a ring every rank sends what it has got so far, piece by piece, and then the sums."""
        size = torch.distributed.get_world_size(group)
        payload[0] += 2 * (size - 1) * tensor.numel() * tensor.element_size() // size
        return summed(tensor, group)

    def written():
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["wchar"])

    link._all_gather, link._all_reduce = counted, counted_sum
    x, y = torch.randn(num_points, num_features, generator=torch.Generator().manual_seed(0)), None
    y = torch.zeros(num_points)
    kind = (
        {"transport": SVGD(), "kernel": RBF(Weights())}
        if svgd
        else {"kernel": RBF(InputGradients("x"))}
    )
    inference = ParticleInference(
        model,
        pyro.optim.Adam({"lr": 0.1}),
        num_particles,
        seed=0,
        gather=distributed.Ranks(data=data_ranks),
        **kind,
    )
    inference.run(2, x, y, progress_bar=False)
    payload[0], before, steps = 0, written(), 20
    for _ in range(steps):
        inference._update((x, y), {})
    after = written()
    if distributed.Ranks().rank == 0:
        torch.save({"payload": payload[0] / steps, "written": (after - before) / steps}, out)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    globals()[sys.argv[1]](sys.argv[2], **json.loads(sys.argv[3]))
