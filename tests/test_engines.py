"""Particles give the same numbers together, one by one and in chunks, random ones included."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyro_fordes import (
    RBF,
    SVGD,
    WGD,
    ArgumentError,
    Ensemble,
    InputGradients,
    Outputs,
    ParticleInference,
    Weights,
    bayesianize,
)
from pyro_fordes.randomness import Draws
from tests.models import Classifier
from tests.test_contracts import SPACES, TRANSPORTS, Model, X, Y
from tests.test_memory import Memory

IMAGES = torch.randn(6, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 2, 1, 0, 1, 2])


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.tanh(x + self.norm(self.conv(x)))


def residual():
    """A small residual network with BatchNorm, for images."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), Block(3), *head).double()


class Noise(nn.Module):
    """Draws by functions that know no layer."""

    def forward(self, x):
        gate = torch.bernoulli(torch.full_like(x, 0.8))
        keep = torch.empty(len(x), 1, dtype=x.dtype).bernoulli_(0.9)
        return x * gate * keep + 0.1 * torch.randn_like(x) * torch.rand(x.shape[1], dtype=x.dtype)


def dropping():
    """A network that draws random numbers in several ways, for rows."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), Noise()]
    return nn.Sequential(*layers, nn.AlphaDropout(0.2), nn.Linear(8, 2)).double()


CASES = {
    "residual network": (residual, (IMAGES, LABELS), "logits"),
    "dropout": (dropping, (X, Y), "logits"),
}
RULES = {
    "FoRDE": (WGD(), lambda output: InputGradients("x", output=output)),
    "f-SVGD": (SVGD(), lambda output: Outputs()),
    "weights": (WGD(), lambda output: Weights()),
    "Ensemble": (Ensemble(), lambda output: InputGradients("x", output=output)),
}


def trained(case, rule, steps=3, num_particles=4, **options):
    net, data, output = CASES[case]
    transport, space = RULES[rule]
    inference = ParticleInference(
        Classifier(bayesianize(net()), num_data=30),
        pyro.optim.Adam({"lr": 0.02}),
        num_particles,
        kernel=RBF(space(output)),
        transport=transport,
        seed=1,
        diagnostics_every=2,
        **options,
    )
    losses = inference.run(steps, *data, progress_bar=False)
    return inference, losses


def assert_same(found, wanted):
    """Losses, particles, buffers, diagnostics and the place in the random stream."""
    (inference, losses), (reference, reference_losses) = found, wanted
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(losses, reference_losses, **close)
    for name in ("_particles", "_buffers", "_shared"):
        torch.testing.assert_close(getattr(inference, name), getattr(reference, name), **close)
    torch.testing.assert_close(inference.diagnostics(), reference.diagnostics(), equal_nan=True)
    states = [part._random.state_dict()["cpu"] for part in (inference, reference)]
    assert torch.equal(*states)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "options",
    [
        {"vectorize": "vmap"},
        {"vectorize": "loop", "chunk_size": 1},
        {"vectorize": "loop", "chunk_size": 3},
        {"vectorize": "vmap", "chunk_size": 3},
        {"vectorize": "vmap", "chunk_size": 4},
    ],
    ids=lambda options: ", ".join(str(value) for value in options.values()),
)
def test_engines_and_chunks_are_the_same(case, rule, options):
    assert_same(trained(case, rule, **options), trained(case, rule, vectorize="loop"))


def works(rule, space):
    """Whether a transport is defined in a space."""
    calibrated = isinstance(rule, WGD | SVGD) and rule.calibrate
    return (space.has_scores or not rule.uses_scores) and (space.own_values or not calibrated)


@pytest.mark.parametrize(
    ("name", "transport"),
    [(n, t) for n in SPACES for t in TRANSPORTS if works(TRANSPORTS[t], SPACES[n])],
)
def test_every_rule_in_chunks(name, transport):
    """One step of any space and transport, with forces measured apart."""
    rule, space = TRANSPORTS[transport], SPACES[name]
    found = []
    for chunk_size in (None, 3):
        inference = ParticleInference(
            Model(),
            pyro.optim.SGD({"lr": 0.1}),
            5,
            kernel=RBF(space),
            transport=rule,
            seed=0,
            chunk_size=chunk_size,
        )
        inference.setup(X, Y)
        forces = []
        for measure in (False, True):
            torch.manual_seed(0)  # some spaces draw points
            forces.append(inference._forces((X, Y), {}, measure))
        found.append([(part.gradients, part.evaluation.log_joint) for part in forces])
        found[-1].append(forces[1].diagnostics)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11, equal_nan=True)
    torch.testing.assert_close(found[0][0], found[0][1], rtol=1e-9, atol=1e-11)


def shared_model(x, y=None):
    """Latent slope, a trained offset and a minibatch drawn by the plate."""
    offset = pyro.param("offset", torch.tensor(0.5, dtype=torch.float64))
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        mean = F.dropout(x[rows], 0.5) @ slope + offset
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[rows])


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_shared_parameters_and_minibatches_in_chunks(chunk_size):
    def moved(**options):
        pyro.clear_param_store()
        rule = {"kernel": RBF(Weights()), "seed": 2}
        optim = pyro.optim.SGD({"lr": 0.01})
        inference = ParticleInference(shared_model, optim, 5, **rule, **options)
        losses = inference.run(4, X, X.sum(1), progress_bar=False)
        return inference.get_samples()["slope"], losses, pyro.param("offset").detach().clone()

    wanted = moved(vectorize="vmap")
    torch.testing.assert_close(moved(vectorize="loop"), wanted, rtol=1e-9, atol=0)
    torch.testing.assert_close(moved(chunk_size=chunk_size), wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_of_particles_does_not_depend_on_chunks(case):
    data = CASES[case][1]
    inference, _ = trained(case, "FoRDE")
    inference._random.load_state_dict({"seed": 5, "cpu": None, "cuda": None})

    def read():
        torch.manual_seed(0)
        return (
            inference.log_joint(*data),
            inference.log_likelihood(*data),
            inference.scores(*data),
            inference.representation(*data),
        )

    wanted = read()
    before = {name: buffer.clone() for name, buffer in inference._buffers.items()}
    for inference.chunk_size in (1, 3, 9):
        torch.testing.assert_close(read(), wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(inference._buffers, before, rtol=0, atol=0)


# ---------------------------------------------------------------------- memory


def step_peak(num_particles, chunk_size):
    """Numbers that live during a step beside those that were there before, and weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), Block(8), Block(8), nn.Flatten())
    net.append(nn.Linear(8 * 36, 3))
    inference = ParticleInference(
        Classifier(bayesianize(net)),
        pyro.optim.SGD({"lr": 1e-3, "momentum": 0.9}),
        num_particles,
        kernel=RBF(InputGradients("x", output="logits")),
        seed=0,
        chunk_size=chunk_size,
    )
    data = IMAGES.float().repeat(20, 1, 1, 1), LABELS.repeat(20)
    inference.run(2, *data, progress_bar=False)  # the optimiser has its state, and copies are there
    with Memory() as memory:
        inference.step(*data)
    return memory.peak, sum(parameter.numel() for parameter in net.parameters())


def test_chunks_bound_memory_by_one_network():
    """Beside gradients of all particles, a step holds little more than one network's step."""
    one, weights = step_peak(1, None)
    bounded, _ = step_peak(6, 1)
    together, _ = step_peak(6, None)
    assert bounded < 6 * weights + 1.3 * one
    assert together > 4 * one  # so the bound says something


# --------------------------------------------------------------------- streams


ROWS = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
CAUSAL = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
attention = nn.MultiheadAttention(5, 1, dropout=0.4, batch_first=True, dtype=torch.float64)
attention.requires_grad_(False)
FUNCTIONS = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout in place": lambda x: F.dropout(x.clone(), 0.3, inplace=True),
    "dropout of everything": lambda x: F.dropout(x, 1.0),
    "dropout1d": lambda x: F.dropout1d(x[None], 0.5),
    "dropout2d": lambda x: F.dropout2d(x[None, :, :, None], 0.5),
    "dropout3d": lambda x: F.dropout3d(x[None, :, :, None, None], 0.5),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.3, training=True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x[None], 0.3, training=True),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.4),
    "rand": lambda x: x + torch.rand(3, 5, dtype=x.dtype),
    "rand of a shape": lambda x: x + torch.rand((3, 5), dtype=x.dtype),
    "randn": lambda x: x + torch.randn(x.shape, dtype=x.dtype),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "normal": lambda x: torch.normal(x, 0.1),
    "normal of two tensors": lambda x: torch.normal(x[:, :1], x.exp()),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.4),
    "bernoulli_ of empty": lambda x: x * torch.empty(3, 5, dtype=x.dtype).bernoulli_(0.4),
    "uniform_": lambda x: torch.empty(3, 5, dtype=x.dtype).uniform_(-1, 2),
    "normal_": lambda x: torch.empty(3, 5, dtype=x.dtype).normal_(mean=3.0, std=0.1),
    "multi-head attention": lambda x: attention(x[None], x[None], x[None])[0],
    "multi-head attention, causal": lambda x: attention(
        x[None], x[None], x[None], need_weights=False, attn_mask=CAUSAL, is_causal=True
    )[0],
    "nn.Dropout": lambda x: nn.Dropout(0.5)(x),
}


def in_stream(seed, x, function):
    with Draws.stream(seed):
        return function(x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_streams_are_the_same_under_vmap_and_alone(name):
    function, seeds = FUNCTIONS[name], Draws(11).seeds(4)
    state = torch.get_rng_state()
    alone = torch.stack([in_stream(seeds[i], ROWS[i], function) for i in range(4)])
    later = in_stream(Draws(11, first=2).seeds(1)[0], ROWS[2], function)
    together = torch.func.vmap(lambda seed, x: in_stream(seed, x, function), randomness="error")
    torch.testing.assert_close(together(seeds, ROWS), alone, rtol=1e-12, atol=0)
    assert torch.equal(later, alone[2])
    assert torch.equal(torch.get_rng_state(), state)
    if name != "dropout of everything":
        other = in_stream(Draws(12).seeds(1)[0], ROWS[0], function)
        assert not torch.equal(other, alone[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_streams_keep_the_distribution(name):
    """Means and squares over 4,000 streams against torch's own; one test in 1e5 fails by chance.

    5 standard errors of the difference for each of two numbers.
    """
    function, x = FUNCTIONS[name], ROWS[0]
    torch.manual_seed(0)
    own = torch.stack([in_stream(seed, x, function) for seed in Draws(3).seeds(4000)])
    torchs = torch.stack([function(x) for _ in range(4000)])
    for power in (1, 2):
        a, b = ((part**power).flatten(1).sum(1) for part in (own, torchs))
        error = math.sqrt((a.var() + b.var()) / 4000)
        assert abs(a.mean() - b.mean()) <= 5 * error + 1e-12


def test_what_a_stream_leaves_alone():
    """Without training nothing is drawn, and a generator of the user's own is used."""
    x, generator = ROWS[0], torch.Generator()
    with Draws.stream(torch.tensor(3)) as stream:
        assert F.dropout(x, 0.5, training=False) is x
        assert torch.equal(nn.Dropout(0.5).eval()(x), x)
        assert torch.equal(F.alpha_dropout(x, 0.5), x)
        assert torch.equal(F.dropout(x, 0.0), x)
        plain = F.scaled_dot_product_attention(x[None], x[None], x[None])
        generator.manual_seed(5)
        found = torch.rand(3, generator=generator)
    assert stream.count == 0
    torch.testing.assert_close(plain, F.scaled_dot_product_attention(x[None], x[None], x[None]))
    assert torch.equal(found, torch.rand(3, generator=generator.manual_seed(5)))
    with pytest.raises(ValueError, match="probability"), Draws.stream(torch.tensor(3)):
        F.dropout(x, 1.5)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_written_out_is_torchs(causal):
    """A drop probability too small to drop anything leaves torch's own attention."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=generator)
    key, value = torch.randn(2, 2, 2, 3, 5, dtype=torch.float64, generator=generator)
    mask = None if causal else torch.rand(3, 3, generator=generator) > 0.3
    if mask is not None:
        mask |= torch.eye(3, dtype=torch.bool)
    options = {"is_causal": causal, "enable_gqa": True, "scale": 0.3}
    wanted = F.scaled_dot_product_attention(query, key, value, mask, **options)
    with Draws.stream(torch.tensor(0)):
        found = F.scaled_dot_product_attention(query, key, value, mask, 1e-300, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_same_random_numbers_for_all_particles(vectorize):
    """Equal particles stay equal with the same masks, and part with different ones."""
    net = dropping()

    def spread(randomness):
        inference = ParticleInference(
            Classifier(bayesianize(net)),
            pyro.optim.SGD({"lr": 0.1}),
            3,
            transport=Ensemble(),
            seed=0,
            vectorize=vectorize,
            randomness=randomness,
        )
        inference.setup(X, Y)
        with torch.no_grad():
            for value in inference._particles.values():
                value.copy_(value[:1].clone().expand_as(value))
        inference.run(2, X, Y, progress_bar=False)
        return max(float((v - v[:1]).abs().max()) for v in inference.get_samples().values())

    assert spread("same") == 0
    assert spread("different") > 0


def test_sizes_of_chunks_are_checked():
    for wrong in (0, -1, 2.0, True, "2"):
        with pytest.raises(ArgumentError, match="chunk_size"):
            ParticleInference(Model(), pyro.optim.SGD({"lr": 0.1}), 2, chunk_size=wrong)
    with pytest.raises(ArgumentError, match="randomness"):
        ParticleInference(Model(), pyro.optim.SGD({"lr": 0.1}), 2, randomness="error")
