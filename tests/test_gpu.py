"""On a CUDA device: the CPU's numbers, for every engine, space and transport; no waiting.

``PYRO_FORDES_TEST_DEVICE=cpu`` runs what does not need CUDA on the CPU, to test the tests.
"""

import os

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from pyro_fordes import (
    RBF,
    SVGD,
    WGD,
    Ensemble,
    InputGradients,
    Langevin,
    Outputs,
    ParticleInference,
    ParticlePredictive,
    Weights,
    bayesianize,
    pca_lengthscale,
)
from tests.models import Classifier
from tests.test_contracts import SPACES, TRANSPORTS, Model, X, Y
from tests.test_engines import IMAGES, LABELS, dropping, residual, works

DEVICE = os.environ.get("PYRO_FORDES_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
    ),
]
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="is about CUDA")


def moved(tree, device):
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tree)


def started(device, make, data, **options):
    """An inference whose particles start from the same values on all devices."""
    torch.manual_seed(0)
    model = make().to(device)
    shapes = {}

    def init(site):
        shapes.setdefault(site["name"], site["fn"].shape())
        return 0.5 * torch.randn(site["fn"].shape(), dtype=X.dtype)

    options.setdefault("kernel", RBF(InputGradients("x", output="net")))
    options.setdefault("diagnostics_every", 2)
    optim = options.pop("optim", pyro.optim.Adam({"lr": 0.02}))
    inference = ParticleInference(model, optim, 4, init_loc_fn=init, seed=1, **options)
    inference.setup(*moved(data, device))
    return inference


def trained(device, make, data, steps=3, **options):
    """An inference after some steps, and on the CPU all that it computed."""
    inference = started(device, make, data, **options)
    losses = inference.run(steps, *moved(data, device), progress_bar=False)
    samples = inference.get_samples()
    assert {value.device.type for value in samples.values()} == {device}
    state = (losses, samples, dict(inference._buffers), inference.diagnostics())
    return inference, moved(state, "cpu")


def classifier(net):
    return lambda: Classifier(bayesianize(net()), num_data=30)


DATA = {"network": (X, Y), "images": (IMAGES, LABELS)}
CLOSE = {"rtol": 1e-7, "atol": 1e-9, "equal_nan": True}
OPTIONS = [
    {"vectorize": "vmap"},
    {"vectorize": "loop"},
    {"vectorize": "vmap", "chunk_size": 3},
    {"vectorize": "loop", "chunk_size": 1},
    {"compile": True},
    {"repulsion_every": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", ["residual network", "MLP"])
def test_engines(case, options):
    """BatchNorm's buffers included."""
    make, data = (classifier(residual), DATA["images"]) if case != "MLP" else (Model, (X, Y))
    _, wanted = trained("cpu", make, data)
    if "repulsion_every" in options:
        _, wanted = trained("cpu", make, data, **options)
    _, found = trained(DEVICE, make, data, **options)
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize(
    ("name", "transport"),
    [(n, t) for n in SPACES for t in TRANSPORTS if works(TRANSPORTS[t], SPACES[n])],
)
def test_spaces_and_transports(name, transport):
    """The velocities of one step, before an optimiser blows up what rounding left of a zero."""
    space = SPACES[name]
    found = []
    for device in ("cpu", DEVICE):
        options = {"kernel": RBF(space), "transport": TRANSPORTS[transport]}
        inference = started(device, Model, (X, Y), **options)
        data = moved((X, Y), device)
        torch.manual_seed(0)
        forces = inference._forces(data, {}, True)
        found.append(moved((forces.gradients, forces.diagnostics), "cpu"))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("options", OPTIONS[1:5], ids=str)
def test_dropout_is_the_same_in_all_engines(options):
    """A device has random numbers of its own, but all engines the same."""
    _, wanted = trained(DEVICE, classifier(dropping), (X, Y), vectorize="vmap")
    _, found = trained(DEVICE, classifier(dropping), (X, Y), **options)
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_autocast(vectorize, compiled):
    """Near the numbers in single precision; representations of unit length, so 0.2 is near."""

    def make():
        return Classifier(bayesianize(residual().float()), num_data=30)

    data = IMAGES.float(), LABELS
    found = []
    for device, autocast in (("cpu", None), (DEVICE, torch.bfloat16)):
        inference = started(
            device,
            make,
            data,
            vectorize=vectorize,
            autocast=autocast,
            compile=compiled and autocast is not None,
            optim=pyro.optim.SGD({"lr": 1e-5}),
        )
        r = inference.representation(*moved(data, device))
        losses = inference.run(2, *moved(data, device), progress_bar=False)
        assert {value.dtype for value in inference.get_samples().values()} == {torch.float32}
        found.append(moved((losses, r), "cpu"))
    (losses, r), (low_losses, low_r) = found
    torch.testing.assert_close(low_losses, losses, rtol=0.05, atol=0)
    assert (low_r - r).norm() < 0.2 * r.norm()


def test_predictions_and_what_is_read():
    """Predictive, lengthscales, modules, checkpoints, samples and scores stay on the device."""
    lengthscale = pca_lengthscale(X.to(DEVICE))
    kernel = RBF(InputGradients("x", output="net", lengthscale=lengthscale, points=4))
    results = []
    for device in ("cpu", DEVICE):
        inference, _ = trained(device, Model, (X, Y), kernel=kernel)
        data = moved((X, Y), device)
        predict = ParticlePredictive(inference)
        resumed = started(device, Model, (X, Y), kernel=kernel)
        resumed.load_state_dict(inference.state_dict())
        assert resumed.step(*data) == inference.step(*data)
        results.append(
            moved(
                (
                    predict.mean(data[0]),
                    predict.log_prob(*data),
                    inference.scores(*data),
                    inference.log_likelihood(*data),
                    inference.module(1)(data[0]),
                    torch.tensor(inference.evaluate_loss(*data)),
                ),
                "cpu",
            )
        )
    torch.testing.assert_close(results[1], results[0], **CLOSE)


class Drawing(Model):
    """Draws a minibatch itself."""

    def forward(self, x, y=None):
        data = pyro.plate("data", len(x), subsample_size=4, device=x.device)
        with data as rows:
            x, y = x[rows], y[rows]
        logits = self.net(x)  # outside: its weights are no data
        with data:
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)


RANDOM = {
    "minibatches of a plate": (Drawing, pyro.optim.Adam({"lr": 0.02})),
    "noise of an optimiser": (Model, lambda parameters: Langevin(parameters, lr=1e-3)),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_repeat_on_the_device(name):
    make, optim = RANDOM[name]
    options = {"kernel": RBF(Weights()), "optim": optim}
    runs = [trained(DEVICE, make, (X, Y), **options)[1] for _ in range(2)]
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------- no waiting

RULES = {
    "FoRDE": (RBF(InputGradients("x", output="net")), WGD()),
    "FoRDE at some points": (RBF(InputGradients("x", output="net", points=4)), WGD()),
    "weights": (RBF(Weights()), WGD()),
    "f-SVGD": (RBF(Outputs()), SVGD()),
    "Ensemble": (RBF(Weights()), Ensemble()),
}


@needs_cuda
@pytest.mark.parametrize("options", OPTIONS[:5], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("net", [residual, dropping], ids=["residual network", "dropout"])
def test_no_update_waits_for_the_device(net, rule, options):
    """torch raises where an operation would wait; diagnostics are measured in one of the steps."""
    data = moved(DATA["images"] if net is residual else (X, Y), DEVICE)
    kernel, transport = RULES[rule]
    inference = started(
        DEVICE, classifier(net), data, kernel=kernel, transport=transport, **options
    )
    for _ in range(3):
        inference._update(data, {})
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            loss = inference._update(data, {})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.device.type == "cuda"
    assert loss.isfinite()


@needs_cuda
def test_switches_for_tf32_are_left_alone():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        trained(DEVICE, Model, (X, Y))
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32 == before[1]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before[0]


@needs_cuda
def test_memory_of_a_step_in_chunks():
    """Peak beside what is there before: one network's step and all gradients, as on the CPU."""

    def net():
        layers = [nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(16 * 36, 3)).double()

    def peak(**options):
        data = moved((IMAGES.repeat(20, 1, 1, 1), LABELS.repeat(20)), DEVICE)
        inference = started(DEVICE, classifier(net), data, **options)
        for _ in range(3):
            inference._update(data, {})
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        inference._update(data, {})
        return torch.cuda.max_memory_allocated() - before

    assert peak(chunk_size=1) < 0.6 * peak()
