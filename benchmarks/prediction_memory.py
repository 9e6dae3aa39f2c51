"""Memory of predicting a data set: what lives at the same time, against one batch of activations.

``ParticlePredictive(inference).predict(loader)`` streams 10,000 images through ten ResNet-8.
Counted is what torch allocates meanwhile, storage by storage, so that the numbers are the same on
every machine; the particles themselves are there before. What a convolution's library takes for a
moment is no tensor and is not counted.

"one batch" is the peak of the plain network's forward pass on one batch without gradients, counted
in the same way, times the networks that run at once: one in a loop, ``chunk_size`` under vmap. "all
layers" is what all layers of those networks put out for a batch, which training would keep. "ratio"
is the peak of the prediction over "one batch"; at most two is wanted, however many batches there
are. "result" is the predicted means of all images, part of the peak.

Run as ``python benchmarks/prediction_memory.py``; ``--side 32`` for images of CIFAR's size,
``--chunk-sizes 2`` for a row with two networks at a time.
"""

import argparse
import weakref
from typing import Any

import torch
from scaling import ENSEMBLE, inference_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from pyro_fordes import ParticlePredictive

MIB = 2**20
LIMIT = 2.0


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that are made inside and live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self.live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):
            if storage._cdata in self.live or storage._cdata in given:
                continue  # a view, or in place
            self.live[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.freed, storage._cdata)
            self.peak = max(self.peak, self.now)
        return result

    def freed(self, key: int) -> None:
        """Count a storage no more."""
        self.now -= self.live.pop(key)


def storages(tree: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@torch.no_grad()
def of_forward(network: nn.Module, x: Tensor) -> tuple[int, int]:
    """Peak of a forward pass, and bytes of what all layers put out."""
    outputs = []
    layers = [layer for layer in network.modules() if not list(layer.children())]
    for layer in layers:
        layer.register_forward_hook(lambda _, given, output: outputs.append(output.nbytes))
    with Allocated() as memory:
        network.eval()(x)
    return memory.peak, sum(outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--particles", type=int, default=10)
    parser.add_argument("--chunk-sizes", type=int, nargs="*", default=[], help="of further rows")
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(options.images, 3, options.side, options.side)
    loader = DataLoader(TensorDataset(images), batch_size=options.batch)
    print(f"{options.images} images, 3 x {options.side} x {options.side}, in batches of "
          f"{options.batch}; {options.particles} ResNet-8")  # fmt: skip
    print(f"{'':22}{'networks':>10}{'all layers':>12}{'one batch':>12}{'peak':>10}{'result':>10}"
          f"{'ratio':>8}   MiB")  # fmt: skip
    chunks: list[int | None] = [*options.chunk_sizes, None]
    for vectorize, chunk in [("loop", None), *(("vmap", chunk) for chunk in chunks)]:
        inference = inference_of(ENSEMBLE, options.particles, vectorize=vectorize)
        inference.step(images[:10], torch.arange(10))
        together = 1 if vectorize == "loop" else chunk or options.particles
        one, layers = of_forward(inference.module(0), images[: options.batch])
        predict = ParticlePredictive(inference, chunk_size=chunk)
        with Allocated() as memory:
            found = predict.predict(loader, progress_bar=False)["y"]
        ratio = memory.peak / (one * together)
        name = vectorize if chunk is None else f"{vectorize}, chunk_size={chunk}"
        numbers = (layers * together, one * together, memory.peak, found.nbytes)
        print(f"{name:22}{together:>10}" + "".join(
            f"{number / MIB:>{width}.2f}" for number, width in zip(numbers, (12, 12, 10, 10),
                                                                   strict=True))
            + f"{ratio:>8.2f}   {'ok' if ratio <= LIMIT else 'missed'}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
