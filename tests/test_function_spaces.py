"""Function space: what is compared, the scores of the likelihood, and forces against loops."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn

from pyro_fordes import (
    RBF,
    SVGD,
    WGD,
    ArgumentError,
    Ensemble,
    Features,
    Fixed,
    InputGradients,
    ModelError,
    Outputs,
    ParticleInference,
    bayesianize,
)
from pyro_fordes.sites import distribution_parameters, log_likelihood_scores
from tests import naive
from tests.models import Classifier, Regression

X = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 2, 1, 1, 0])
TARGETS = X[:, 0].sin()
EXTRA = X[:3] * 2.0 + 1.0


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(outputs):
    return bayesianize(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs)))


def start(model, *data, space, transport=None, bandwidth=None, particles=4, **options):
    inference = ParticleInference(
        model,
        pyro.optim.SGD({"lr": 1e-3}),
        particles,
        kernel=RBF(space, bandwidth or Fixed(0.7)),
        transport=transport or WGD(),
        seed=0,
        **options,
    )
    inference.setup(*data)
    return inference


def outputs_of(inference, x):
    """Outputs of the network ``0: Linear, 1: Tanh, 2: Linear`` for each particle, typed out."""
    p = inference._particles
    found = []
    for i in range(inference.num_particles):
        hidden = torch.tanh(x @ p["net.0.weight"][i].T + p["net.0.bias"][i])
        found.append(hidden @ p["net.2.weight"][i].T + p["net.2.bias"][i])
    return torch.stack(found)


# -------------------------------------------------------------------- distributions

V = torch.tensor([0.3, -0.8, 1.1, 0.2, -0.1, 0.7], dtype=torch.float64)
SITES = {
    "Normal": (lambda v: dist.Normal(v[:3], v[3:].exp()), torch.tensor([0.1, 0.2, -0.4])),
    "Normal, one scale": (lambda v: dist.Normal(v[:3], v[3].exp()), torch.ones(3)),
    "Normal in one event": (
        lambda v: dist.Normal(v.reshape(3, 2), 1.0).to_event(1),
        torch.ones(3, 2),
    ),
    "LogNormal": (lambda v: dist.LogNormal(v[:3], v[3:].exp()), torch.tensor([0.5, 1.0, 2.0])),
    "Weibull": (lambda v: dist.Weibull(v[:3].exp(), v[3:].exp()), torch.tensor([0.5, 1.0, 2.0])),
    "Gumbel": (lambda v: dist.Gumbel(v[:3], v[3:].exp()), torch.tensor([0.5, 1.0, 2.0])),
    "Kumaraswamy, masked": (
        lambda v: dist.Kumaraswamy(v[:3].exp(), v[3:].exp()).mask(True),
        torch.tensor([0.5, 0.1, 0.2]),
    ),
    "Categorical": (
        lambda v: dist.Categorical(logits=v.reshape(3, 2)),
        torch.tensor([0, 1, 1]),
    ),
    "Categorical, probabilities": (
        lambda v: dist.Categorical(probs=v.reshape(3, 2).softmax(-1)),
        torch.tensor([0, 1, 1]),
    ),
    "OneHotCategorical": (
        lambda v: dist.OneHotCategorical(logits=v.reshape(3, 2)),
        torch.eye(2)[[0, 1, 1]],
    ),
    "Bernoulli": (lambda v: dist.Bernoulli(logits=v[:3]), torch.tensor([0.0, 1.0, 1.0])),
    "Binomial": (
        lambda v: dist.Binomial(total_count=torch.tensor(4), logits=v[:3]),
        torch.tensor([0.0, 4.0, 2.0]),
    ),
    "Poisson": (lambda v: dist.Poisson(v[:3].exp()), torch.tensor([0.0, 1.0, 5.0])),
    "Gamma": (lambda v: dist.Gamma(v[:3].exp(), v[3:].exp()), torch.tensor([0.2, 1.0, 5.0])),
    "StudentT": (lambda v: dist.StudentT(3.0, v[:3], v[3:].exp()), torch.tensor([0.2, 1.0, 5.0])),
    "Dirichlet": (
        lambda v: dist.Dirichlet(v.reshape(3, 2).exp()),
        torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]]),
    ),
    "masked": (
        lambda v: dist.Normal(v[:3], v[3:].exp()).mask(torch.tensor([True, False, True])),
        torch.tensor([0.1, 0.2, -0.4]),
    ),
}


@pytest.mark.parametrize("name", SITES)
def test_scores_are_those_of_the_log_likelihood(name):
    """Scores by the parameters, pulled back through them, are those by what they depend on."""
    make, value = SITES[name]

    def model():
        with poutine.scale(scale=3.0), pyro.plate("data", 3):
            pyro.sample("y", make(v), obs=value)

    v = V.clone().requires_grad_()
    site = poutine.trace(model).get_trace().nodes["y"]
    scores = log_likelihood_scores(site)
    expected = (3.0 * make(v).log_prob(value)).sum()
    parameters = distribution_parameters(site["fn"])
    assert set(parameters) == set(scores)
    (wanted,) = torch.autograd.grad(expected, v)
    assert all(not score.requires_grad for score in scores.values())
    through = sum((scores[key] * parameters[key]).sum() for key in scores)
    (found,) = torch.autograd.grad(through, v)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_parameters_are_on_the_real_line_with_batch_dimensions():
    found = distribution_parameters(dist.Normal(torch.zeros(3), 2.0))
    torch.testing.assert_close(found["scale"], torch.full((3,), 2.0).log())
    found = distribution_parameters(dist.Categorical(probs=torch.tensor([0.25, 0.75])))
    torch.testing.assert_close(found["logits"], torch.tensor([0.25, 0.75]).log())
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), torch.ones(2))
    )
    assert distribution_parameters(mixture) == {}


# -------------------------------------------------------------------- what is compared


def test_default_is_the_parameters_of_the_observed_site():
    inference = start(Classifier(network(3)), X, LABELS, space=Outputs(group="point"))
    expected = outputs_of(inference, X).log_softmax(-1)
    torch.testing.assert_close(inference.representation(X, LABELS), expected.detach())
    joint = inference.representation(X, LABELS, space=Outputs())
    torch.testing.assert_close(joint, expected.detach().reshape(4, 1, 15))
    raw = inference.representation(X, LABELS, space=Outputs("logits", group="point"))
    torch.testing.assert_close(raw, outputs_of(inference, X).detach())
    named = inference.representation(X, LABELS, space=Outputs("y", group="point"))
    torch.testing.assert_close(named, expected.detach())


def test_features_are_activations():
    inference = start(Classifier(network(3)), X, LABELS, space=Features("net.1", group="point"))
    p = inference._particles
    hidden = torch.tanh(X @ p["net.0.weight"].mT + p["net.0.bias"][:, None])
    torch.testing.assert_close(inference.representation(X, LABELS), hidden.detach())


@pytest.mark.parametrize("points", [EXTRA, (EXTRA,), {"x": EXTRA}, lambda: EXTRA])
@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_other_points_take_the_place_of_the_batch(points, vectorize):
    for output in (None, "logits", "net", lambda trace: trace.nodes["logits"]["value"]):
        space = Outputs(output, points=points, group="point")
        inference = start(Classifier(network(3)), X, LABELS, space=space, vectorize=vectorize)
        expected = outputs_of(inference, EXTRA)
        if output is None:
            expected = expected.log_softmax(-1)
        torch.testing.assert_close(inference.representation(X, LABELS), expected.detach())


@pytest.mark.parametrize("observed", [dist.Normal, dist.Cauchy, dist.Laplace, dist.Poisson])
def test_other_points_need_no_draw_of_the_observations(observed):
    """Few distributions can be drawn from under vmap; what is compared are their parameters."""

    def model(x, y=None):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = (x @ weight).exp()
        with pyro.plate("data", len(x)):
            scale = () if observed is dist.Poisson else (1.0,)
            pyro.sample("y", observed(mean, *scale), obs=y)

    space = Outputs(points=EXTRA, group="point")
    inference = start(model, X, torch.ones(5), space=space, vectorize="vmap")
    found = inference.representation(X, torch.ones(5))[..., 0]
    expected = (inference._particles["weight"] @ EXTRA.T).detach()
    if observed is not dist.Poisson:  # its rate is compared as a logarithm
        expected = expected.exp()
    torch.testing.assert_close(found, expected)
    inference.run(2, X, torch.ones(5), progress_bar=False)


def test_random_points_come_from_the_inference_stream():
    def run(seed):
        space = Outputs("logits", points=lambda: torch.randn(4, 2))
        inference = start(Classifier(network(3)), X, LABELS, space=space)
        torch.manual_seed(seed)  # the global stream must not matter
        inference.run(5, X, LABELS, progress_bar=False)
        return inference.get_samples()["net.0.weight"]

    assert (run(0) == run(1)).all()


def test_other_points_leave_running_statistics_alone():
    def build():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
        return Classifier(bayesianize(net))

    compared = start(build(), X, LABELS, space=Outputs("logits", points=EXTRA))
    alone = start(build(), X, LABELS, space=Outputs(), transport=Ensemble())
    for inference in (compared, alone):
        inference.step(X, LABELS)
    for name, buffer in alone._buffers.items():
        torch.testing.assert_close(compared._buffers[name], buffer)


# -------------------------------------------------------------------- forces


def forces(inference, *data):
    return inference._forces(data, {}, measure=False).gradients


@pytest.mark.parametrize("group", ["joint", "point"])
@pytest.mark.parametrize("points", [None, EXTRA])
def test_repulsion_is_that_of_the_kernel_of_outputs(group, points):
    """The difference to an ensemble's force against autograd of sum_i log sum_j k(f_i, f_j)."""
    model, bandwidth = Classifier(network(3)), Fixed(2.0)
    space = Outputs("logits", points=points, group=group)
    repelled = start(model, X, LABELS, space=space, bandwidth=bandwidth)
    alone = start(model, X, LABELS, space=space, transport=Ensemble())
    f = outputs_of(repelled, X if points is None else points)
    f = f.flatten(1).unsqueeze(1) if group == "joint" else f
    total = naive.log_kernel_sum(f, torch.full((f.shape[1], 4), 2.0))
    names = list(repelled._particles)
    expected = torch.autograd.grad(total, [repelled._particles[name] for name in names])
    ours, drive = forces(repelled, X, LABELS), forces(alone, X, LABELS)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(ours[name] - drive[name], gradient, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("group", ["joint", "point"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_fsvgd_against_a_loop(group, temperature):
    """Every sum and Jacobian typed out, for a regression with a latent scale-free likelihood."""
    h = 0.9
    inference = start(
        Regression(network(1)),
        X,
        TARGETS,
        space=Outputs(group=group),
        transport=SVGD(),
        bandwidth=Fixed(h),
        temperature=temperature,
    )
    count, p = inference.num_particles, inference._particles
    f = outputs_of(inference, X).squeeze(-1)  # (particle, point); unit scale, so log scale is 0
    scores = (TARGETS - f).detach() / temperature
    expected = {name: torch.zeros_like(value) for name, value in p.items()}
    for i in range(count):
        velocity, weight = torch.zeros(len(X)), 0.0
        for j in range(count):
            difference = (f[j] - f[i]).detach()
            if group == "joint":
                k = torch.exp(-(difference**2).sum() / (2 * h))
                velocity += k * scores[j] - k * difference / h
            else:
                each = torch.exp(-(difference**2) / (2 * h))
                k = each.mean()
                velocity += k * scores[j] - each * difference / h / len(X)
            weight += k / count
        velocity /= count
        prior = sum(dist.Normal(0.0, 1.0).log_prob(value[i]).sum() for value in p.values())
        total = (velocity * f[i]).sum() + weight * prior / temperature
        for name, g in zip(
            p, torch.autograd.grad(total, list(p.values()), retain_graph=True), strict=True
        ):
            expected[name] -= g
    found = forces(inference, X, TARGETS)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)


def test_one_particle_climbs_the_log_joint():
    model = Classifier(network(3))
    one = start(model, X, LABELS, space=Outputs(), transport=SVGD(), particles=1)
    alone = start(model, X, LABELS, space=Outputs(), transport=Ensemble(), particles=1)
    drive = forces(alone, X, LABELS)
    for name, gradient in forces(one, X, LABELS).items():
        torch.testing.assert_close(gradient, drive[name], rtol=1e-10, atol=1e-12)


def test_minibatch_scores_are_on_the_full_data_scale():
    """Twice the data size doubles the likelihood's part of the force."""
    found = []
    for num_data in (5, 10):
        inference = start(
            Classifier(network(3), num_data), X, LABELS, space=Outputs(), transport=SVGD()
        )
        space = inference._space
        evaluation = inference._log_joint.evaluate(
            inference._particles, (X, LABELS), {}, capture=space.capture
        )
        found.append(space.scores(evaluation))
    torch.testing.assert_close(found[1], 2 * found[0])


# -------------------------------------------------------------------- bad input


class TwoSites(PyroModule):
    def forward(self, x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
        pyro.sample("total", dist.Normal(w.sum(), 1.0), obs=y.sum())


def mixture(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    parts = dist.Normal(torch.stack([x @ w, -x @ w], -1), 1.0)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts), obs=y)


BAD = {
    "unknown output": (Outputs("nothing"), ArgumentError, "got 'nothing', which is neither"),
    "unknown module": (Features("net.9"), ArgumentError, r"Features\(module=.*'net.9'"),
    "integer output": (
        Outputs(lambda trace: trace.nodes["y"]["value"]),
        ModelError,
        r"found a \(5,\) tensor of torch.int64",
    ),
    "points without the input": (Outputs(points={"y": LABELS}), ArgumentError, "was called with"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_the_model_is_refused(name):
    space, error, pattern = BAD[name]
    with pytest.raises(error, match=pattern):
        start(Classifier(network(3)), X, LABELS, space=space)


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda: Outputs(group="site"), r"Outputs\(group=...\) must be one of 'joint', 'point'"),
        (lambda: Outputs(points=3), r"Outputs\(points=...\) must be a tensor"),
        (lambda: Outputs(output=3), r"Outputs\(output=...\) must be a site's name"),
        (lambda: Features(3), r"Features\(module=...\) must be a submodule's path"),
        (lambda: Features("net", points="x"), r"Features\(points=...\)"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(make, pattern):
    with pytest.raises(ArgumentError, match=pattern):
        make()


@pytest.mark.parametrize(
    "space", [Outputs("logits"), Outputs(points=EXTRA), Features("net"), InputGradients("x")]
)
def test_svgd_needs_scores(space):
    with pytest.raises(ArgumentError, match="needs the log likelihood as a function"):
        start(Classifier(network(3)), X, LABELS, space=space, transport=SVGD())


def test_sites_of_other_sizes_are_compared_jointly_only():
    inference = start(TwoSites(), X, TARGETS, space=Outputs())
    assert inference.representation(X, TARGETS).shape == (4, 1, 12)
    with pytest.raises(ModelError, match=r"have .1, 5. points"):
        start(TwoSites(), X, TARGETS, space=Outputs(group="point"))


def test_distribution_without_parameters_is_refused():
    with pytest.raises(ModelError, match=r"parameters of site 'y' .MixtureSameFamily"):
        start(mixture, X, TARGETS, space=Outputs())


# -------------------------------------------------------------------- what outputs do not carry


def negative_binomial(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.NegativeBinomial(g.exp(), logits=x @ w), obs=y)


def weibull(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Weibull((x @ w).exp(), g.exp()), obs=y + 1.0)


def inflated(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.ZeroInflatedPoisson((x @ w).exp(), gate_logits=g), obs=y)


@pytest.mark.parametrize("model", [negative_binomial, weibull, inflated])
def test_one_particle_of_fsvgd_climbs_the_log_joint(model):
    """Whatever of the likelihood the outputs do not carry, too."""
    one = start(model, X, LABELS, space=Outputs(), transport=SVGD(), particles=1, temperature=2.0)
    alone = start(
        model, X, LABELS, space=Outputs(), transport=Ensemble(), particles=1, temperature=2.0
    )
    wanted = forces(alone, X, LABELS)
    for name, gradient in forces(one, X, LABELS).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-11)


def test_fsvgd_refuses_sites_that_are_summed_out():
    def model(x, y):
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(torch.where(z > 0, m[..., 0], m[..., 1]), 1.0), obs=y)

    with pytest.raises(ArgumentError, match=r"\['z'\] are summed out.*SVGD\(\) in Weights"):
        start(model, X, TARGETS, space=Outputs(), transport=SVGD())


@pytest.mark.parametrize("space", [Outputs, lambda points: Features("net.0", points=points)])
def test_drawn_points_are_the_same_for_all_chunks(space):
    """A function of points is asked for one set a step, whatever the size of chunks."""
    found = []
    for chunk_size in (None, 1, 3):
        points = space(points=lambda: torch.randn(3, 2))
        inference = start(Classifier(network(3)), X, LABELS, space=points, chunk_size=chunk_size)
        for _ in range(3):
            inference.step(X, LABELS)
        found.append(inference.get_samples())
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-10, atol=1e-12)
