"""Priors on ordinary networks, particles that start from networks, and training of both."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVGD as PyroSVGD, RBFSteinKernel
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.func import functional_call

from pyro_fordes import (
    RBF,
    ArgumentError,
    Ensemble,
    InputGradients,
    NumericalError,
    ParticleInference,
    ParticlePredictive,
    Weights,
    bayesianize,
    init_to_modules,
)
from tests.models import Classifier, Regression


def sampled(module, *args):
    """A run of a module and the values it drew, by site."""
    trace = poutine.trace(module).get_trace(*args)
    values = {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"]
    }
    return trace, values


def sgd(params):
    return torch.optim.SGD(params, lr=1e-3)


def start(model, *args, num_particles=3, **options):
    """Particles before any step."""
    options.setdefault("kernel", RBF(Weights()))
    inference = ParticleInference(model, sgd, num_particles, seed=0, **options)
    inference.setup(*args)
    return inference


# ------------------------------------------------------------------- every kind of layer


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Repeated(nn.Module):
    """Lists of layers and of parameters."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.scales = nn.ParameterList([torch.ones(3), torch.ones(())])

    def forward(self, x):
        for layer, scale in zip(self.layers, self.scales, strict=True):
            x = layer(x) * scale
        return x


TOKENS = torch.tensor([[0, 1], [2, 3], [1, 1]])
LAYERS = {
    "linear": (lambda: nn.Linear(3, 2), torch.randn(4, 3)),
    "linear without bias": (lambda: nn.Linear(3, 2, bias=False), torch.randn(4, 3)),
    "convolution": (lambda: nn.Conv2d(2, 3, 2), torch.randn(4, 2, 5, 5)),
    "layer norm": (lambda: nn.LayerNorm(3), torch.randn(4, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 4), torch.randn(4, 4, 3)),
    "embedding": (lambda: nn.Embedding(4, 3, padding_idx=0), TOKENS),
    "attention": (SelfAttention, torch.randn(3, 5, 4)),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        torch.randn(3, 5, 4),
    ),
    "PReLU": (nn.PReLU, torch.randn(4, 3)),
    "lists": (Repeated, torch.randn(4, 3)),
    "sequence of several": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)),
        torch.randn(3, 2, 5),
    ),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
        torch.randn(4, 3),
    ),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_sites_are_the_parameters_and_the_output_is_the_networks(name, mode):
    make, x = LAYERS[name]
    net = getattr(make(), mode)()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    state, types = list(net.state_dict()), [type(m) for m in net.modules()]
    bayesian = bayesianize(net)
    trace, values = sampled(bayesian, x)
    assert {n: v.shape for n, v in values.items()} == {n: p.shape for n, p in before.items()}
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], functional_call(net, values, x))
    # The user's network is as it was.
    assert list(net.state_dict()) == state
    assert [type(m) for m in net.modules()] == types
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert isinstance(bayesian, PyroModule)
    assert isinstance(bayesian, type(net))
    assert bayesian.training == net.training
    assert not list(bayesian.parameters())
    assert not list(pyro.get_param_store().keys())


RECURRENT = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name):
    """torch keeps their weights in a second list, which must not hold stale ones."""
    net, x = RECURRENT[name](2, 3, batch_first=True), torch.randn(4, 5, 2)
    trace, values = sampled(bayesianize(net), x)
    assert {n: v.shape for n, v in values.items()} == {
        n: p.shape for n, p in net.named_parameters()
    }
    outputs, expected = trace.nodes["_RETURN"]["value"], functional_call(net, values, x)
    torch.testing.assert_close(outputs[0], expected[0])


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_train(name):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = RECURRENT[name](2, 3, batch_first=True)
            self.out = nn.Linear(3, 1)

        def forward(self, x):
            return self.out(self.rnn(x)[0][:, -1])

    x, y = torch.randn(8, 5, 2), torch.randn(8)
    for kernel in (RBF(Weights()), RBF(InputGradients("x"))):
        inference = ParticleInference(
            Regression(bayesianize(Last())), pyro.optim.Adam({"lr": 0.03}), 3, kernel=kernel, seed=0
        )
        losses = inference.run(15, x, y, progress_bar=False)
        assert losses[-1] < losses[0]


class Tied(nn.Module):
    """One parameter under two names, as in language models."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.out = nn.Linear(3, 4, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.embed(tokens))


@pytest.mark.parametrize(
    "copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_tied_weight_is_one_site_used_at_both_places(copied):
    net, tokens = Tied(), torch.tensor([[0, 1], [2, 3]])
    module = copied(bayesianize(net))
    trace, values = sampled(module, tokens)
    assert list(values) == ["embed.weight"]
    weight = values["embed.weight"]
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], weight[tokens] @ weight.T)
    assert isinstance(module, Tied)
    assert isinstance(module.out, nn.Linear)
    assert net.out.weight is net.embed.weight
    assert not list(module.parameters())


class Shared(nn.Module):
    """One module at two places, as embeddings of an encoder and a decoder."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.again = nn.Sequential(nn.Identity(), self.first)
        self.out = nn.Linear(3, 1)

    def forward(self, x):
        return self.out(self.again(self.first(x)))


@pytest.mark.parametrize(
    "copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
@pytest.mark.parametrize("prior", [1.0, lambda n, _: None if n == "first.0.weight" else 1.0])
def test_a_module_at_two_places_is_named_by_the_first(prior, copied):
    x, y = torch.randn(8, 3), torch.randn(8)
    nets = [Shared(), Shared()]
    inference = ParticleInference(
        copied(Regression(bayesianize(nets[0], prior))),
        pyro.optim.Adam({"lr": 0.1}),
        2,
        transport=Ensemble(),
        init_loc_fn=init_to_modules(nets),
        seed=0,
    )
    inference.step(x, y)
    names = ["net.first.0.weight", "net.first.0.bias", "net.out.weight", "net.out.bias"]
    assert [*inference.get_samples()] == (names if prior == 1.0 else names[1:])
    assert [*inference._shared] == ([] if prior == 1.0 else names[:1])
    net = inference.module(1)
    assert net.first is net.again[1]
    found = ParticlePredictive(inference).parameters(x)["y"]["loc"][1]
    torch.testing.assert_close(net(x).squeeze(-1), found)


def test_tied_weights_without_a_prior_stay_tied():
    module = bayesianize(
        nn.Sequential(Tied(), nn.Linear(4, 1)), lambda n, _: None if n.startswith("0.") else 1.0
    )
    assert [name for name, _ in module.named_parameters()] == ["0.embed.weight"]
    assert module[0].out.weight is module[0].embed.weight


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("prior", [1.0, lambda n, _: None if n == "embed.weight" else 1.0])
def test_tied_weights_train_as_one_network_does(prior, vectorize):
    """One step of one particle without a repulsion, against autograd on the plain network."""

    class Language(Tied):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(3, 3)

        def forward(self, tokens):
            return self.out(torch.tanh(self.mix(self.embed(tokens))))

    net = Language().double()
    tokens, labels = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 2, 3, 0, 2])
    inference = ParticleInference(
        Classifier(bayesianize(net, prior)),
        sgd,
        1,
        transport=Ensemble(),
        init_loc_fn=init_to_modules([copy.deepcopy(net)]),
        vectorize=vectorize,
        seed=0,
    )
    loss = inference.step(tokens, labels)
    plain = copy.deepcopy(net)
    negative = nn.functional.cross_entropy(plain(tokens), labels, reduction="sum")
    for name, parameter in plain.named_parameters():
        if prior == 1.0 or name != "embed.weight":
            negative = negative - log_normal(parameter, 1.0)
    assert loss == pytest.approx(negative.item())
    optim = sgd(plain.parameters())
    negative.backward()
    optim.step()
    out = inference.module(0)
    assert out.out.weight is out.embed.weight
    for name, parameter in out.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-9, atol=1e-12)


def test_a_module_used_twice_has_one_set_of_sites():
    layer = nn.Linear(3, 3)
    x = torch.randn(4, 3)
    trace, values = sampled(bayesianize(nn.Sequential(layer, nn.Tanh(), layer)), x)
    assert len(values) == 2
    weight, bias = (v for _, v in sorted(values.items(), key=lambda item: -item[1].dim()))
    expected = torch.tanh(x @ weight.T + bias) @ weight.T + bias
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], expected)


# ------------------------------------------------------------------- priors


def log_normal(value, scale):
    """Log density of a zero-mean Normal, typed out."""
    return (-0.5 * (value / scale) ** 2 - 0.9189385332046727 - torch.tensor(scale).log()).sum()


def wide_bias(name, value):
    """A rule that looks at the name and the value of a parameter."""
    return 10.0 if name.endswith("bias") else dist.Laplace(0.0, 1.0 / value.shape[-1])


PRIORS = {
    "default": (None, lambda w, b: log_normal(w, 1.0) + log_normal(b, 1.0)),
    "number": (0.3, lambda w, b: log_normal(w, 0.3) + log_normal(b, 0.3)),
    "integer": (2, lambda w, b: log_normal(w, 2.0) + log_normal(b, 2.0)),
    "distribution": (
        dist.Laplace(0.0, 0.5),
        lambda w, b: sum((-v.abs() / 0.5).sum() for v in (w, b)),  # 1 / 2 scale is 1
    ),
    "distribution with an event": (
        dist.Normal(torch.tensor([0.0, 1.0]), 1.0).to_event(1),
        lambda w, b: sum(log_normal(v - torch.tensor([0.0, 1.0]), 1.0) for v in (w, b)),
    ),
    "rule": (
        wide_bias,
        lambda w, b: log_normal(b, 10.0) - (2 * w.abs()).sum(),  # Laplace of scale 1/2
    ),
    "rule of numbers": (
        lambda name, value: {"weight": 0.5, "bias": 2.0}[name],
        lambda w, b: log_normal(w, 0.5) + log_normal(b, 2.0),
    ),
}


@pytest.mark.parametrize("name", PRIORS)
def test_log_prior_is_the_formula(name):
    prior, formula = PRIORS[name]
    net = nn.Linear(2, 2)
    module = bayesianize(net) if prior is None else bayesianize(net, prior=prior)
    trace, values = sampled(module, torch.zeros(1, 2))
    expected = formula(values["weight"], values["bias"])
    torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-5, atol=1e-5)
    # One event per parameter, so that no plate is needed around the network.
    for site in values:
        assert trace.nodes[site]["fn"].batch_shape == ()


def test_scale_may_vary_within_a_parameter():
    scale = torch.tensor([1e-6, 1.0, 1e6]).expand(50, 3)
    _, values = sampled(
        bayesianize(nn.Linear(3, 50, bias=False), dist.Normal(0.0, scale)), torch.zeros(1, 3)
    )
    sizes = values["weight"].abs().mean(0)
    assert (sizes[1:] / sizes[:-1] > 1e4).all()


def test_rule_sees_every_name_and_value_and_none_leaves_the_parameter():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    seen = {}

    def rule(name, value):
        seen[name] = value
        return None if name.startswith("1.") else 1.0

    module = bayesianize(net, prior=rule)
    assert list(seen) == [n for n, _ in net.named_parameters()]
    assert all(torch.equal(seen[n], p) for n, p in net.named_parameters())
    assert not any(value.requires_grad for value in seen.values())
    _, values = sampled(module, torch.zeros(2, 3))
    assert set(values) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    left = dict(module.named_parameters())
    assert set(left) == {"1.weight", "1.bias"}
    assert left["1.weight"] is not net[1].weight  # a copy, so training leaves the user's alone


def test_parameters_without_a_prior_are_shared_and_trained():
    net = nn.Linear(3, 1)
    model = Regression(bayesianize(net, prior=lambda n, _: 1.0 if n == "weight" else None))
    x, y = torch.randn(6, 3), torch.randn(6)
    inference = start(model, x, y)
    before = net.bias.detach().clone()
    assert set(inference.get_samples()) == {"net.weight"}
    inference.step(x, y)
    assert not torch.equal(model.net.bias, before)
    assert torch.equal(net.bias, before)


def test_frozen_parameters_without_a_prior_stay_frozen():
    net = nn.Linear(3, 1)
    net.bias.requires_grad_(False)
    model = Regression(bayesianize(net, prior=lambda n, _: 1.0 if n == "weight" else None))
    x, y = torch.randn(6, 3), torch.randn(6)
    inference = start(model, x, y)
    before = net.bias.detach().clone()
    inference.step(x, y)
    assert torch.equal(model.net.bias, before)


# ------------------------------------------------------------------- use as a module


def test_nested_in_other_modules():
    """Names are paths, at any depth, and two networks do not share."""

    class Inner(PyroModule):
        def __init__(self):
            super().__init__()
            self.first = bayesianize(nn.Linear(2, 2), prior=0.1)
            self.scale = PyroSample(dist.LogNormal(0.0, 1.0))

        def forward(self, x):
            return self.first(x) * self.scale

    class Outer(PyroModule):
        def __init__(self):
            super().__init__()
            self.inner = Inner()
            self.second = bayesianize(nn.Sequential(nn.Tanh(), nn.Linear(2, 1)), prior=2.0)

        def forward(self, x):
            return self.second(self.inner(x))

    x = torch.randn(3, 2)
    trace, values = sampled(Outer(), x)
    assert set(values) == {
        "inner.first.weight",
        "inner.first.bias",
        "inner.scale",
        "second.1.weight",
        "second.1.bias",
    }
    hidden = (x @ values["inner.first.weight"].T + values["inner.first.bias"]) * values[
        "inner.scale"
    ]
    out = torch.tanh(hidden) @ values["second.1.weight"].T + values["second.1.bias"]
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], out)


@pytest.mark.parametrize(
    "prior",
    [0.5, lambda name, value: 0.5],
    ids=["number", "rule"],
)
@pytest.mark.parametrize("used_before", [False, True])
def test_to_double_afterwards(prior, used_before):
    module = bayesianize(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), prior=prior)
    if used_before:
        sampled(module, torch.randn(4, 3))
    module.to(torch.float64)
    trace, values = sampled(module, torch.randn(4, 3, dtype=torch.float64))
    assert {v.dtype for v in values.values()} == {torch.float64}
    assert trace.nodes["_RETURN"]["value"].dtype == torch.float64


def test_to_another_device_afterwards():
    """The meta device stands for a GPU."""
    module = bayesianize(nn.Linear(3, 2)).to("meta")
    _, values = sampled(module, torch.zeros(4, 3, device="meta"))
    assert {v.device.type for v in values.values()} == {"meta"}


def test_copies_pickles_and_state():
    module = bayesianize(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    x = torch.randn(4, 3)
    pyro.set_rng_seed(1)
    _, expected = sampled(module, x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        pyro.set_rng_seed(1)
        _, values = sampled(other, x)
        assert set(values) == set(expected)
        assert all(torch.equal(values[n], v) for n, v in expected.items())
    # Only the statistics are state: a checkpoint of them loads into the plain network too.
    assert set(module.state_dict()) == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }


# ------------------------------------------------------------------- particles from networks

DATA = torch.randn(6, 3), torch.randn(6)


def mlp(features=3):
    return nn.Sequential(nn.Linear(features, 4), nn.Tanh(), nn.Linear(4, 1))


def test_each_particle_starts_from_its_own_network():
    nets = [mlp() for _ in range(3)]
    inference = start(Regression(bayesianize(mlp())), *DATA, init_loc_fn=init_to_modules(nets))
    samples = inference.get_samples()
    for i, net in enumerate(nets):
        for name, parameter in net.named_parameters():
            assert torch.equal(samples[f"net.{name}"][i], parameter), (i, name)
    before = copy.deepcopy(nets)
    inference.step(*DATA)
    for net, old in zip(nets, before, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(net.parameters(), old.parameters(), strict=True)
        )


def test_factory_builds_one_network_per_particle_under_the_seed():
    built = []

    def factory():
        built.append(mlp())
        return built[-1]

    def samples():
        model = Regression(bayesianize(mlp()))
        return start(model, *DATA, init_loc_fn=init_to_modules(factory)).get_samples()

    state = torch.get_rng_state()
    first = samples()
    assert len(built) == 3
    for i, net in enumerate(built):
        assert torch.equal(first["net.0.weight"][i], net[0].weight)
    assert len({net[0].weight.sum().item() for net in built}) == 3
    torch.set_rng_state(state)
    second = samples()
    assert all(torch.equal(first[n], v) for n, v in second.items())


def test_generator_of_networks_and_other_dtype():
    """Networks are taken as they come, and cast to the sites' dtype."""
    nets = [mlp() for _ in range(3)]
    model = Regression(bayesianize(mlp()).double())
    x, y = (value.double() for value in DATA)
    init = init_to_modules(net for net in nets)
    for _ in range(2):  # the same object serves twice
        weight = start(model, x, y, init_loc_fn=init).get_samples()["net.0.weight"]
        assert weight.dtype == torch.float64
        assert torch.equal(weight, torch.stack([net[0].weight.detach().double() for net in nets]))


def test_sites_outside_the_network_are_drawn_from_their_priors():
    class Noisy(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = bayesianize(mlp())

        def forward(self, x, y=None):
            sigma = pyro.sample("sigma", dist.Uniform(5.0, 6.0))
            mean = self.net(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Normal(mean, sigma), obs=y)

    nets = [mlp() for _ in range(3)]
    samples = start(Noisy(), *DATA, init_loc_fn=init_to_modules(nets)).get_samples()
    assert ((samples["sigma"] > 5) & (samples["sigma"] < 6)).all()
    assert len(set(samples["sigma"].tolist())) == 3
    assert torch.equal(samples["net.2.bias"][1], nets[1][2].bias)


def test_the_model_itself_may_be_the_network():
    """No prefix, and a site of its own beside the parameters."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 1)

        def forward(self, x, y=None):
            sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.1))
            mean = self.lin(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Normal(mean, sigma), obs=y)

    nets = [Root() for _ in range(3)]
    samples = start(bayesianize(Root()), *DATA, init_loc_fn=init_to_modules(nets)).get_samples()
    assert torch.equal(samples["lin.weight"], torch.stack([n.lin.weight.detach() for n in nets]))
    assert samples["sigma"].shape == (3,)


class Block(nn.Module):
    """Has a ``layers`` of its own below the ``layers`` of its owner, as Swin's stages do."""

    def __init__(self, depth):
        super().__init__()
        own = [nn.Linear(3, 3)]
        self.layers = nn.ModuleList(own + ([Block(depth - 1)] if depth else []))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_names_that_repeat_at_two_depths_match_by_full_path():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.backbone = PyroModule()
            self.backbone.net = bayesianize(Block(2))

        def forward(self, x, y=None):
            mean = self.backbone.net(x).sum(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    nets = [Block(2) for _ in range(3)]
    names = [n for n, _ in nets[0].named_parameters()]
    assert any(a != b and a.endswith("." + b) for a in names for b in names)  # the trap is set
    samples = start(Model(), *DATA, init_loc_fn=init_to_modules(nets)).get_samples()
    for name in names:
        expected = torch.stack([net.get_parameter(name).detach() for net in nets])
        assert torch.equal(samples[f"backbone.net.{name}"], expected), name


def test_a_partly_bayesian_network_takes_the_parameters_it_has():
    def rule(name, _):
        return None if name.startswith("0.") else 1.0

    model = Regression(bayesianize(mlp(), prior=rule))
    nets = [mlp() for _ in range(3)]
    samples = start(model, *DATA, init_loc_fn=init_to_modules(nets)).get_samples()
    assert set(samples) == {"net.2.weight", "net.2.bias"}
    assert torch.equal(samples["net.2.weight"][2], nets[2][2].weight)


def two_networks(first, second):
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.a, self.b = bayesianize(first), bayesianize(second)

        def forward(self, x, y=None):
            mean = (self.a(x) + self.b(x)).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return Model()


def test_several_prefixes_are_an_error():
    with pytest.raises(ArgumentError, match=r"fit under each of \['a\.', 'b\.'\]"):
        start(two_networks(mlp(), mlp()), *DATA, init_loc_fn=init_to_modules(mlp))


def test_shapes_tell_networks_with_equal_names_apart():
    nets = [mlp() for _ in range(3)]
    wide = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    samples = start(two_networks(wide, mlp()), *DATA, init_loc_fn=init_to_modules(nets))
    assert torch.equal(samples.get_samples()["b.0.bias"][0], nets[0][0].bias)


@pytest.mark.parametrize(
    ("nets", "pattern"),
    [
        ([mlp(), mlp()], "got 2 networks, too few for particle 3"),
        ([mlp(2)] * 3, r"cannot match.*0\.weight.*net\.0\.weight.*names or shapes differ"),
        ([nn.Linear(3, 1)] * 3, r"cannot match.*weight, bias.*names or shapes differ"),
        ([mlp(), mlp(), mlp(2)], "cannot match"),
        ([mlp(), "net", mlp()], "needs nn.Modules or state dicts, got str for particle 1"),
        ([{"0.weight": torch.zeros(4, 3)}] * 3, "cannot match"),
        (
            [{**mlp().state_dict(), "5.weight": torch.zeros(1)}] * 3,
            "found 'net.5.weight' in the state dict for particle 0",
        ),
    ],
    ids=["too few", "shapes", "names", "the last one", "no module", "missing", "left over"],
)
def test_networks_that_do_not_fit(nets, pattern):
    inference = ParticleInference(
        Regression(bayesianize(mlp())), sgd, 3, init_loc_fn=init_to_modules(nets), seed=0
    )
    with pytest.raises(ArgumentError, match=pattern):
        inference.step(*DATA)


def test_networks_outside_the_support_of_a_prior_are_refused():
    model = Regression(bayesianize(nn.Linear(3, 1), prior=dist.HalfNormal(1.0)))
    with pytest.raises(NumericalError, match=r"net\.(weight|bias)"):
        start(model, *DATA, init_loc_fn=init_to_modules(lambda: nn.Linear(3, 1)))


def normalised():
    """A network with running statistics that it has trained."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    net(5 * torch.randn(8, 3))
    return net


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("given", ["modules", "state dicts", "factory of state dicts"])
def test_trained_networks_bring_their_running_statistics(given, mode):
    nets = [normalised() for _ in range(3)]
    start_from = nets if given == "modules" else [net.state_dict() for net in nets]
    if given.startswith("factory"):
        start_from = iter(start_from).__next__
    model = getattr(Regression(bayesianize(normalised())), mode)()
    x, y = DATA
    inference = start(model, x, y, init_loc_fn=init_to_modules(start_from))
    predicted = ParticlePredictive(inference).parameters(x)["y"]["loc"]
    for i, net in enumerate(nets):
        torch.testing.assert_close(predicted[i], net.eval()(x).squeeze(-1))
        out = inference.module(i).state_dict()
        assert all(torch.equal(out[name], value) for name, value in net.state_dict().items())
    inference.step(x, y)
    counts = inference._buffers["net.1.num_batches_tracked"]
    assert counts.tolist() == [2 if mode == "train" else 1] * 3


def test_a_state_dict_of_the_whole_model_and_of_tied_weights():
    """At the root, beside a site of its own, with one weight under two names."""

    class Root(Tied):
        def forward(self, tokens, y=None):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
            logits = super().forward(tokens) * scale
            with pyro.plate("data", len(tokens)):
                return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    nets = [Root() for _ in range(2)]
    init = init_to_modules(net.state_dict() for net in nets)
    tokens = torch.tensor([0, 1, 2])
    inference = start(bayesianize(Root()), tokens, tokens, num_particles=2, init_loc_fn=init)
    samples = inference.get_samples()
    assert torch.equal(samples["embed.weight"], torch.stack([n.out.weight.detach() for n in nets]))
    assert samples["scale"].shape == (2,)


def test_buffers_that_particles_cannot_have_are_refused():
    def net(fixed):
        made = nn.Sequential(nn.Linear(3, 1))
        made.register_buffer("fixed", torch.tensor(fixed))
        return made

    def begin(nets):
        return start(Regression(bayesianize(net([1.0]))), *DATA, init_loc_fn=init_to_modules(nets))

    begin(lambda: net([1.0]))
    with pytest.raises(ArgumentError, match=r"'net.fixed' of the network for particle 1 is not"):
        begin([net([1.0]), net([2.0]), net([1.0])])
    with pytest.raises(ArgumentError, match=r"'net.fixed' .* has shape \(2,\), the model's \(1,\)"):
        begin([net([1.0, 2.0])] * 3)


def test_equal_networks_are_refused():
    net = mlp()
    with pytest.raises(Exception, match="all particles start at the same values"):
        start(Regression(bayesianize(mlp())), *DATA, init_loc_fn=init_to_modules([net] * 3))


# ------------------------------------------------------------------- training


def pyro_linear(features=4, classes=3):
    """The classifier of Pyro's documentation: PyroModule layers with PyroSample weights."""
    net = PyroModule[nn.Sequential](
        PyroModule[nn.Linear](features, 6), nn.Tanh(), PyroModule[nn.Linear](6, classes)
    )
    for layer in (net[0], net[2]):
        for name, value in list(layer.named_parameters()):
            prior = dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())
            setattr(layer, name, PyroSample(prior))
    return Classifier(net)


def convolutional():
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    )
    return Classifier(bayesianize(net), num_data=100)


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = SelfAttention()
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(x + self.attention(x)).mean(1))


def transformer(dropout):
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=dropout, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    return Classifier(bayesianize(nn.Sequential(encoder, nn.Flatten(), nn.Linear(20, 3))))


def data(*shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, *shape, generator=generator)
    return x, torch.randint(3, (8,), generator=generator)


TRAINED = {
    "PyroModule[nn.Linear]": (pyro_linear, data(4)),
    "Conv2d and BatchNorm2d": (convolutional, data(1, 4, 4)),
    "MultiheadAttention": (lambda: Classifier(bayesianize(Attentive())), data(5, 4)),
    "TransformerEncoder": (lambda: transformer(dropout=0.1), data(5, 4)),
}


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("name", TRAINED)
def test_default_kernel_trains(name, vectorize):
    """FoRDE with all defaults, on a model that is not modified."""
    make, (x, y) = TRAINED[name]
    model = make()
    names = [n for n, _ in model.named_modules()]
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    inference = ParticleInference(
        model, pyro.optim.Adam({"lr": 0.01}), 3, vectorize=vectorize, seed=0
    )
    inference.setup(x, y)
    before = inference.get_samples()
    losses = inference.run(6, x, y, progress_bar=False)
    assert losses.isfinite().all()
    after = inference.get_samples()
    for site, value in after.items():
        assert value.isfinite().all(), site
        assert ((value != before[site]).flatten(1).any(1)).all(), site
    assert (inference.diagnostics()["repulsive_force"] > 0).all()
    # Nothing of ours is left in the model.
    assert [n for n, _ in model.named_modules()] == names
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not list(model.parameters())
    assert not list(pyro.get_param_store().keys())
    first, second = (sampled(model, x)[1] for _ in range(2))
    assert all((first[site] != second[site]).any() for site in after)  # still draws from the prior


ALIKE = {
    "Conv2d and BatchNorm2d": TRAINED["Conv2d and BatchNorm2d"],
    "MultiheadAttention": TRAINED["MultiheadAttention"],
    "TransformerEncoder": (lambda: transformer(dropout=0.0), data(5, 4)),
}


@pytest.mark.parametrize("name", ALIKE)
def test_engines_agree_on_the_trained_networks(name):
    make, (x, y) = ALIKE[name]
    results = []
    for vectorize in ("vmap", "loop"):
        inference = ParticleInference(make().double(), sgd, 3, vectorize=vectorize, seed=0)
        inference.run(2, x.double(), y, progress_bar=False)
        results.append({**inference.get_samples(), **inference._buffers})
    for site, value in results[0].items():
        torch.testing.assert_close(value, results[1][site], rtol=1e-7, atol=1e-9)


def test_pyros_svgd_fails_on_such_a_network():
    """Why the library is there: the same model and optimiser, in Pyro's own particle method."""
    model, (x, y) = pyro_linear(), data(4)
    svgd = PyroSVGD(model, RBFSteinKernel(), pyro.optim.Adam({"lr": 0.01}), 3, max_plate_nesting=1)
    with pytest.raises((RuntimeError, ValueError)):
        svgd.step(x, y)


SCHOOLS = (
    torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
    torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
)


def eight_schools(effects, errors):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effects)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("effect", dist.Normal(mu + tau * eta, errors), obs=effects)


def test_eight_schools_in_weight_space():
    inference = ParticleInference(
        eight_schools, pyro.optim.Adam({"lr": 0.05}), 20, kernel=RBF(Weights()), seed=0
    )
    losses = inference.run(60, *SCHOOLS, progress_bar=False)
    assert losses.isfinite().all()
    assert losses[-5:].mean() < losses[:5].mean()
    samples = inference.get_samples()
    assert {n: tuple(v.shape) for n, v in samples.items()} == {
        "mu": (20,),
        "tau": (20,),
        "eta": (20, 8),
    }
    assert (samples["tau"] > 0).all()


def test_a_deep_ensemble_from_networks_lowers_the_loss():
    """Ordinary networks, ordinary initialisation, no repulsion: the usual deep ensemble."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 3, generator=generator)
    y = torch.sin(x[:, 0])
    inference = ParticleInference(
        Regression(bayesianize(mlp())),
        pyro.optim.Adam({"lr": 0.02}),
        3,
        transport=Ensemble(),
        init_loc_fn=init_to_modules(mlp),
        seed=0,
    )
    losses = inference.run(100, x, y, progress_bar=False)
    assert losses[-1] < losses[0] - 5.0


def test_a_particle_comes_out_as_a_plain_module():
    """Same outputs as the particle's, shared parameters and running statistics included."""

    def prior(name, value):
        return None if name == "0.bias" else 1.0

    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    x, y = DATA
    model = Regression(bayesianize(net, prior))
    inference = start(model, x, y)
    inference.run(3, x, y, progress_bar=False)
    model.eval()
    means = ParticlePredictive(inference).parameters(x)["y"]["loc"]
    for i in range(inference.num_particles):
        plain = inference.module(i)
        assert type(plain) is nn.Sequential
        assert not any(isinstance(part, PyroModule) for part in plain.modules())
        assert not plain.training
        torch.testing.assert_close(plain(x).squeeze(-1), means[i])
        assert (plain[1].running_mean == inference._buffers["net.1.running_mean"][i]).all()
    before = inference.get_samples()["net.0.weight"]
    with torch.no_grad():
        plain[0].weight.zero_()
    assert (inference.get_samples()["net.0.weight"] == before).all()
    with pytest.raises(ArgumentError, match=r"path='net.0'.*networks: 'net'"):
        inference.module(0, "net.0")
    with pytest.raises(ArgumentError, match="a particle from 0 to"):
        inference.module(99)
