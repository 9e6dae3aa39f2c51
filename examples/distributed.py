"""Particles on several processes: the same script on one process and under ``torchrun``.

    python examples/distributed.py
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/distributed.py
    torchrun --standalone --nproc-per-node 4 examples/distributed.py --data 2

Trains a repulsive ensemble (FoRDE) of small Bayesian networks on scikit-learn's digits. Each
process owns some of the particles; only input gradients travel between them in a step. The first
two commands give the same ensemble, up to rounding. The third has two processes for every particle,
each of which sees half of a batch; it differs from the others by its dropout masks alone. With
``--checkpoint FOLDER`` a run that was cut off, or restarted by ``torchrun`` after a process failed,
goes on from the last checkpoint, with any number of processes.

What to expect: test accuracy 0.95 or more, after half a minute on one core.
"""

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyro_fordes import (
    RBF,
    InputGradients,
    ParticleInference,
    ParticlePredictive,
    bayesianize,
    init_to_modules,
    pca_lengthscale,
)
from pyro_fordes.distributed import Ranks

NUM_TRAIN = 1200


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))


class Classifier(PyroModule):
    """The Bayesian network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bayesianize(network(), prior=1.0)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Labels given images; the plate scales a batch to the whole training set."""
        logits = self.net(x)
        with pyro.plate("data", NUM_TRAIN, subsample_size=len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def load() -> tuple[Tensor, Tensor]:
    """Images as rows of mean 0 and standard deviation 1, and labels, in an order that is fixed."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels, dtype=torch.float32)[order]
    images = (images - images[:NUM_TRAIN].mean()) / images[:NUM_TRAIN].std()
    return images, torch.tensor(labels)[order]


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(0)
    ranks = Ranks(data=args.data)
    torch.set_default_dtype(torch.float64)  # for the comparison of numbers of processes
    x, y = (part.double() if part.is_floating_point() else part for part in load())
    train = TensorDataset(x[:NUM_TRAIN], y[:NUM_TRAIN])
    inference = ParticleInference(
        Classifier(),
        pyro.optim.Adam({"lr": 1e-3}),
        args.particles,
        kernel=RBF(InputGradients("x", output="net", lengthscale=pca_lengthscale(x[:NUM_TRAIN]))),
        init_loc_fn=init_to_modules(network),
        num_data=NUM_TRAIN,
        seed=0,
        gather=ranks,
    )
    # It shuffles, in another order in every epoch, and gives each share of a batch its own rows.
    sampler = DistributedSampler(train, num_replicas=ranks.data, rank=ranks.data_rank)
    loader = DataLoader(train, batch_size=100 // ranks.data, sampler=sampler)
    inference.fit(
        loader, 1 if args.smoke else 30, checkpoint=args.checkpoint, progress_bar=not args.smoke
    )
    # All processes ask the same, and all get what all particles say.
    probabilities = ParticlePredictive(inference).mean(x[NUM_TRAIN:])["y"]
    samples = inference.get_samples(gather=True)
    if ranks.rank == 0:
        accuracy = (probabilities.argmax(-1) == y[NUM_TRAIN:]).double().mean()
        shares = f" with {ranks.data} shares of a batch" if ranks.data > 1 else ""
        where = f"{ranks.size} processes{shares}"
        print(f"{args.particles} particles on {where}, accuracy {accuracy:.3f}")
        if args.out is not None:
            torch.save(samples, args.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, default=9)
    parser.add_argument("--data", type=int, default=1, help="into how many shares a batch is split")
    parser.add_argument("--checkpoint", type=Path, help="folder; a run goes on from what it holds")
    parser.add_argument("--out", type=Path, help="file for the samples of all particles")
    parser.add_argument("--smoke", action="store_true", help="one epoch")
    main(parser.parse_args())
