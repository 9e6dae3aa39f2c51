"""No rule keeps differences of all pairs of particles: memory grows as the particles do.

Counted is what torch allocates, storage by storage, so that the result is the same everywhere.
"""

import weakref

import pyro
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_fordes import (
    RBF,
    SVGD,
    WGD,
    Additive,
    ParticleInference,
    Weights,
    additive,
    bayesianize,
)
from tests.test_contracts import SPACES, TRANSPORTS, Model, X, Y

MANY = 40  # particles, so that a square of them stands out


class Memory(TorchDispatchMode):
    """Numbers in the largest tensor that is made, and in all that live at the same time."""

    def __init__(self):
        super().__init__()
        self.largest = self.peak = 0
        self.live = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage._cdata for _, storage in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor, storage in storages(result):
            key = storage._cdata
            if key in self.live or key in given:
                continue  # a view, or in place
            self.live[key] = storage.nbytes() // tensor.element_size()
            weakref.finalize(storage, self.live.pop, key)
            self.largest = max(self.largest, self.live[key])
            self.peak = max(self.peak, sum(self.live.values()))
        return result


def storages(tree):
    """Tensors in some arguments with their storage."""
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return [(tensor, tensor.untyped_storage()) for tensor in tensors]


def of_repel(name, shape, pooled=True, kernel=RBF(Weights())):
    """Memory of a transport alone, on a representation of a shape."""
    r, scores = torch.randn(2, *shape).unbind()
    with Memory() as memory:
        TRANSPORTS[name].repel(kernel, r, scores=scores, pooled=pooled)
    return memory


def whitens_fully(name):
    return isinstance(TRANSPORTS[name], WGD | SVGD) and TRANSPORTS[name].whiten == "full"


def test_the_counter_counts():
    """A square of particles with all features is found, and views and freed tensors are not."""
    r = torch.randn(MANY, 7, 5)
    with Memory() as memory:
        for _ in range(3):
            (r[:, None].expand(MANY, MANY, 7, 5) - r[None]).square_().sum(-1)
    assert memory.largest == MANY**2 * 7 * 5
    assert memory.peak == MANY**2 * 7 * (5 + 1)
    assert not memory.live


def kernels(name):
    """How many kernels a transport holds at once."""
    return 2 if name == "HybridSVGD" else 1


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize(
    ("points", "features", "pooled"),
    [(1, 300, True), (7, 60, True), (7, 1, False)],
    ids=["weights", "input gradients", "coordinates"],
)
def test_transport_keeps_no_differences_of_pairs(name, points, features, pooled):
    """The largest tensor is the representation, or a kernel at each point.

    With full whitening it may be the covariance.
    """
    memory = of_repel(name, (MANY, points, features), pooled)
    largest = max(MANY * points * features, MANY**2 * points)
    if whitens_fully(name) and pooled:
        largest = max(largest, (points * features) ** 2)
    assert memory.largest <= largest
    assert memory.peak <= 8 * kernels(name) * largest


@pytest.mark.parametrize("name", [name for name in TRANSPORTS if name != "HybridSVGD"])
@pytest.mark.parametrize(("points", "features"), [(1, 300), (7, 60)])
def test_additive_kernel_keeps_a_block_at_a_time(name, points, features, monkeypatch):
    """HybridSVGD makes its own `RBF` beside the kernel, which is another matter."""
    monkeypatch.setattr(additive, "BLOCK", 0)
    memory = of_repel(name, (MANY, points, features), kernel=Additive(RBF(Weights())))
    largest = max(MANY * points * features + MANY**2, MANY**2 * points)
    if whitens_fully(name):
        largest = max(largest, (points * features) ** 2)
    assert memory.largest <= largest
    assert memory.peak <= 10 * largest


@pytest.mark.parametrize("name", [name for name in TRANSPORTS if not whitens_fully(name)])
def test_memory_in_weight_space_is_linear(name):
    """In the number of particles and in that of their weights."""
    one = of_repel(name, (10, 1, 30_000)).peak
    assert of_repel(name, (10, 1, 60_000)).peak < 2.05 * one
    assert of_repel(name, (20, 1, 30_000)).peak < 2.05 * one


def step_memory(space, transport):
    """Memory of a step with its diagnostics, and how many weights a particle has."""
    model = Model()
    net = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 2)).double()
    model.net = bayesianize(net)
    inference = ParticleInference(
        model, pyro.optim.SGD({"lr": 1e-6}), MANY, kernel=RBF(space), transport=transport, seed=0
    )
    inference.setup(X, Y)
    with Memory() as memory:
        inference.step(X, Y)
    return memory, sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("name", SPACES)
def test_step_in_every_space(name):
    """Model included: its largest tensors here are smaller than kernels at all points."""
    space = SPACES[name]
    memory, weights = step_memory(space, SVGD() if space.has_scores else WGD())
    assert memory.largest <= max(MANY * (weights + MANY), MANY**2 * len(X))


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("group", ["joint", "site", "coordinate"])
def test_step_in_weight_space(name, group):
    """No kernel per coordinate is kept beyond its block, and blocks are small."""
    memory, weights = step_memory(Weights(group=group), TRANSPORTS[name])
    largest = max(MANY * (weights + MANY), weights**2 * whitens_fully(name))
    assert memory.largest <= largest
    assert memory.peak <= 12 * kernels(name) * largest


def test_blocks_of_coordinates_are_the_same_as_all_at_once():
    """Forces and diagnostics; 26 coordinates of 5 particles come in blocks of 6."""
    space = Weights(group="coordinate")
    inference = ParticleInference(
        Model(), pyro.optim.SGD({"lr": 1.0}), 5, kernel=RBF(space), transport=WGD(), seed=0
    )
    inference.setup(X, Y)
    values = inference.get_unconstrained()
    rows = torch.cat([value.flatten(1) for value in values.values()], dim=1)
    blocks = inference._space.split(rows[:, None], values)
    assert [block.shape[1] for block in blocks] == [6, 6, 6, 6, 2]
    whole = WGD().repel(RBF(space), rows[:, :, None], pooled=False)
    inference.step(X, Y)
    found = inference.diagnostics()
    torch.testing.assert_close(found["repulsive_force"], whole.velocity.flatten(1).norm(dim=1))
    assert found["effective_particles"] == pytest.approx(25 / whole.kernel.mean.sum().item())
    assert found["bandwidth"] == pytest.approx(whole.kernel.bandwidth.mean().item())
