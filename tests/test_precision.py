"""autocast: networks in lower precision, log densities, kernels and particles in single."""

import pyro
import pytest
import torch
from torch import nn

from pyro_fordes import (
    RBF,
    WGD,
    ArgumentError,
    Ensemble,
    Features,
    InputGradients,
    Outputs,
    ParticleInference,
    ParticlePredictive,
    Weights,
    bayesianize,
)
from tests.models import Classifier
from tests.test_engines import dropping, residual

IMAGES = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(3))
ROWS = torch.randn(8, 3, generator=torch.Generator().manual_seed(4))
LABELS = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
NETS = {"residual": (residual, IMAGES), "dropout": (dropping, ROWS)}
SPACES = {
    "InputGradients": InputGradients("x", output="net"),
    "InputGradients by a submodule": InputGradients("net.0", output="net"),
    "InputGradients at some points": InputGradients("x", output="net", points=6),
    "InputGradients of an inner layer": InputGradients("x", output="net.0"),
    "Outputs": Outputs(),
    "Features": Features("net.0"),
    "Weights": Weights(),
}


def started(net, x, space, autocast, **options):
    make, _ = NETS[net]
    inference = ParticleInference(
        Classifier(bayesianize(make().float()), num_data=20),
        pyro.optim.SGD({"lr": 1e-4}),
        3,
        kernel=RBF(space),
        seed=0,
        autocast=autocast,
        diagnostics_every=1,
        **options,
    )
    inference.setup(x, LABELS)
    return inference


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("net", NETS)
def test_steps_are_near_those_in_single_precision(net, space, vectorize):
    """bfloat16 has 8 bits: errors of some per cent, but neither equal nor elsewhere."""
    x = NETS[net][1]
    found = []
    for autocast in (None, torch.bfloat16):
        inference = started(net, x, SPACES[space], autocast, vectorize=vectorize)
        r = inference.representation(x, LABELS)
        loss = inference.step(x, LABELS)
        found.append((r, torch.tensor(loss), inference.get_samples(), inference._buffers))
        for tensor in (r, *found[-1][2].values()):
            assert tensor.dtype == torch.float32
        assert inference.diagnostics()["log_joint"].dtype == torch.float32
    (r, loss, samples, buffers), (low_r, low_loss, low_samples, low_buffers) = found
    assert abs(low_loss / loss - 1) < 0.02
    assert space == "Weights" or 0 < (low_r - r).norm() / r.norm() < 0.2
    for name, value in buffers.items():
        assert low_buffers[name].dtype == value.dtype
        torch.testing.assert_close(low_buffers[name], value, rtol=0.05, atol=0.05)
    moved = torch.cat([(a - low_samples[n]).flatten() for n, a in samples.items()])
    assert 0 < moved.norm() < 1.0


class Seen(nn.Module):
    """Notes the types of what its products put out."""

    def __init__(self):
        super().__init__()
        self.lin, self.conv = nn.Linear(3, 3), nn.Conv1d(1, 2, 1)
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.types = []

    def forward(self, x):
        first = self.lin(x)
        second = self.conv(x[:, None])
        third = self.attention(x[None], x[None], x[None], need_weights=False)[0]
        fourth = x @ x.T
        self.types += [out.dtype for out in (first, second, third, fourth)]
        return first + second.sum(1) + third[0]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's attention under vmap
@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_products_are_in_lower_precision_and_log_sum_exp_is_not(vectorize, monkeypatch):
    net = Seen()
    inference = ParticleInference(
        Classifier(bayesianize(net)),
        pyro.optim.SGD({"lr": 1e-3}),
        2,
        transport=Ensemble(),
        seed=0,
        autocast=torch.bfloat16,
        vectorize=vectorize,
    )
    x = ROWS
    inference.setup(x, LABELS)
    types = inference.model.net.types
    types.clear()
    seen = []
    original = torch.Tensor.logsumexp
    monkeypatch.setattr(
        torch.Tensor, "logsumexp", lambda t, *a, **k: seen.append(t.dtype) or original(t, *a, **k)
    )
    inference.step(x, LABELS)
    assert set(types) == {torch.bfloat16}
    assert set(seen) == {torch.float32}
    assert not any(m._forward_hooks for m in inference.model.modules())
    assert not torch.is_autocast_enabled("cpu")
    types.clear()
    logits = ParticlePredictive(inference).parameters(x)["y"]["logits"]
    assert logits.dtype == torch.float32
    assert set(types) == {torch.bfloat16}
    assert torch.allclose(logits.exp().sum(-1), torch.ones(()), atol=1e-6)


@pytest.mark.parametrize("options", [{"chunk_size": 1}, {"vectorize": "loop"}], ids=str)
def test_engines_and_chunks_in_lower_precision(options):
    """The same masks and nearly the same products."""
    results = []
    for given in ({}, options):
        inference = started(
            "dropout", ROWS, SPACES["InputGradients"], torch.bfloat16, transport=WGD(), **given
        )
        losses = inference.run(3, ROWS, LABELS, progress_bar=False)
        results.append((losses, inference._buffers))
    torch.testing.assert_close(results[0], results[1], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, True, "bfloat16"])
def test_other_types_are_refused(dtype):
    with pytest.raises(ArgumentError, match=r"autocast must be torch\.bfloat16 or None"):
        ParticleInference(Classifier(nn.Identity()), pyro.optim.SGD({}), 2, autocast=dtype)


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_channels_last_images_give_the_same_numbers(vectorize):
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = IMAGES.double().contiguous(memory_format=memory_format)
        torch.manual_seed(0)
        inference = ParticleInference(
            Classifier(bayesianize(residual()), num_data=20),
            pyro.optim.SGD({"lr": 1e-4}),
            3,
            kernel=RBF(SPACES["InputGradients"]),
            seed=0,
            vectorize=vectorize,
        )
        losses = inference.run(2, x, LABELS, progress_bar=False)
        found.append((losses, inference.get_samples(), inference._buffers))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
