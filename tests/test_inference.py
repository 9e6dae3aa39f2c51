"""The driver: exact steps, optimisers, schedules, loops, isolation."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import biject_to
from torch.utils.data import DataLoader, TensorDataset

from pyro_fordes import (
    RBF,
    SVGD,
    WGD,
    ArgumentError,
    Ensemble,
    InputGradients,
    Median,
    ParticleInference,
    ParticlePredictive,
    StateError,
    Weights,
    bayesianize,
    pca_lengthscale,
)
from tests import naive

NUM_DATA = 50


class Classifier(PyroModule):
    """Smooth network, so that second derivatives reach every weight; a scale beside it."""

    def __init__(self, features=4, classes=3):
        super().__init__()
        net = nn.Sequential(nn.Linear(features, 6), nn.Tanh(), nn.Linear(6, classes))
        self.net = bayesianize(net, prior=1.0)

    def forward(self, x, y=None):
        temperature = pyro.sample("temperature", dist.LogNormal(0.0, 0.3))
        logits = pyro.deterministic("logits", self.net(x) / temperature)
        with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def classification_data(points=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(points, 4, dtype=dtype, generator=generator)
    return x, torch.randint(3, (points,), generator=generator)


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(x.new_zeros(()), 0.5))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(w[0] + w[1] * x, sigma), obs=y)


def regression_data(dtype=torch.float64):
    x = torch.linspace(-1, 1, 10, dtype=dtype)
    return x, 2 * x + 0.3


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def sgd(lr=1e-3):
    return lambda params: torch.optim.SGD(params, lr=lr)


def unconstrained(inference):
    return {name: value.detach().clone() for name, value in inference._particles.items()}


def naive_forde_step(inference, x, y, *, metric, per, lr, scale, temperature, num_data):
    """One FoRDE step by a Python loop over particles, autograd and explicit differences."""
    particles = [
        {name: value[i].requires_grad_() for name, value in unconstrained(inference).items()}
        for i in range(inference.num_particles)
    ]
    transforms = {
        name: biject_to(inference.prototype(x, y).trace.nodes[name]["fn"].support)
        for name in particles[0]
    }
    rows, log_joints, losses = [], [], []
    for values in particles:
        inputs = x.clone().requires_grad_()
        indices = {"data": torch.arange(len(x))}
        log_density, log_det, trace = naive.log_joint_of_one(
            inference.model, values, transforms, (inputs, y), {}, indices
        )
        true_logits = trace.nodes["logits"]["value"][torch.arange(len(x)), y]
        (g,) = torch.autograd.grad(true_logits.sum(), inputs, create_graph=True)
        rows.append(metric(naive.unit(g)))
        log_joints.append(log_density / temperature + log_det)
        losses.append(-(log_density + log_det).item())
    r = torch.stack(rows)
    repulsion = naive.log_kernel_sum(r, naive.bandwidth(r.detach(), per))
    total = -sum(log_joints) + scale * repulsion
    leaves = [value for values in particles for value in values.values()]
    gradients = iter(torch.autograd.grad(total / num_data, leaves))
    moved = [{name: v - lr * next(gradients) for name, v in p.items()} for p in particles]
    stacked = {name: torch.stack([p[name] for p in moved]).detach() for name in particles[0]}
    return stacked, sum(losses) / len(losses)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("per", ["point", "particle"])
def test_forde_step_equals_a_loop_over_particles(vectorize, per):
    x, y = classification_data()
    metric = pca_lengthscale(x)
    options = {"scale": 3.0, "temperature": 2.0, "num_data": NUM_DATA}
    inference = ParticleInference(
        Classifier(),
        sgd(),
        5,
        kernel=RBF(InputGradients("x", output="logits", lengthscale=metric), Median(per=per)),
        repulsion_scale=options["scale"],
        temperature=options["temperature"],
        num_data=NUM_DATA,
        vectorize=vectorize,
        seed=1,
    )
    inference.setup(x, y)
    for _ in range(3):  # the first step is measured, the others take the single backward pass
        expected, expected_loss = naive_forde_step(
            inference, x, y, metric=metric, per=per, lr=1e-3, **options
        )
        loss = inference.step(x, y)
        assert loss == pytest.approx(expected_loss, rel=1e-10)
        for name, value in unconstrained(inference).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("double")
def test_repulsion_alone_moves_particles():
    """Guards the test above: the repulsive part must be large enough to be seen by it."""
    x, y = classification_data()
    moved = {}
    for scale in (0.0, 3.0):
        inference = ParticleInference(
            Classifier(),
            sgd(),
            5,
            kernel=RBF(InputGradients("x", output="logits")),
            repulsion_scale=scale,
            seed=1,
        )
        inference.step(x, y)
        moved[scale] = unconstrained(inference)
    for name in moved[0.0]:
        difference = (moved[0.0][name] - moved[3.0][name]).abs().max()
        # Unit gradients do not feel the temperature, nor the last bias.
        assert (difference > 1e-6) == (name not in ("temperature", "net.2.bias")), name


@pytest.mark.usefixtures("double")
def test_weight_space_step_by_hand():
    """v = grad log p - sum grad k / sum k on raw numbers, one site."""
    y = torch.tensor([0.5, -1.0])

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    inference = ParticleInference(model, sgd(0.01), 3, kernel=RBF(Weights()), seed=0)
    inference.setup(y)
    m = unconstrained(inference)["mean"]
    inference.step(y)
    d = (m[:, None] - m[None, :]) ** 2
    h = d.flatten().median() / (2 * math.log(3))
    k = torch.exp(-d / (2 * h))
    gradient_k = -(m[:, None] - m[None, :]) / h * k
    velocity = (y.sum() - 2 * m) - m / 4 - gradient_k.sum(1) / k.sum(1)
    torch.testing.assert_close(
        unconstrained(inference)["mean"], m + 0.01 * velocity, rtol=1e-12, atol=0
    )


@pytest.mark.usefixtures("double")
def test_ensemble_particles_do_not_see_each_other():
    x, y = classification_data()
    together = ParticleInference(Classifier(), sgd(), 4, transport=Ensemble(), seed=5)
    together.run(5, x, y, progress_bar=False)
    # Particles have seeds of their own, so the first two of four are those of two.
    fewer = ParticleInference(Classifier(), sgd(), 2, transport=Ensemble(), seed=5)
    fewer.run(5, x, y, progress_bar=False)
    for name, value in unconstrained(fewer).items():
        torch.testing.assert_close(unconstrained(together)[name][:2], value, rtol=1e-12, atol=0)


def test_one_particle_is_map_whatever_the_transport():
    x, y = classification_data(dtype=torch.float32)
    results = []
    for transport in (WGD(), Ensemble()):
        inference = ParticleInference(
            Classifier(),
            sgd(),
            1,
            kernel=RBF(InputGradients("x", output="logits")),
            transport=transport,
            seed=0,
        )
        inference.run(3, x, y, progress_bar=False)
        results.append(unconstrained(inference))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name])


@pytest.mark.parametrize(
    ("output", "columns"),
    [("logits", 1), ("net", 1), ("y", 1), (None, 1), (("logits", "y"), 2)],
    ids=str,
)
@pytest.mark.usefixtures("double")
def test_outputs_of_input_gradients(output, columns):
    """Each way to name the output, against autograd on one particle."""
    x, y = classification_data()
    inference = ParticleInference(
        Classifier(),
        sgd(),
        3,
        kernel=RBF(InputGradients("x", output=output, normalize=False)),
        seed=0,
    )
    inference.setup(x, y)
    space = inference._space
    evaluation = inference._log_joint.evaluate(
        inference._particles,
        (x, y),
        {},
        capture=space.capture,
        submodules=space.submodules,
        input=space.input,
    )
    r = space.represent(evaluation)
    assert r.shape == (3, columns * len(x), 4)
    samples = inference.get_samples()
    names = {"logits": "logits", "net": "net", "y": "log_prob", None: "log_prob"}
    wanted = [output] if not isinstance(output, tuple) else output
    for i in range(3):
        weights = {n.removeprefix("net."): v[i] for n, v in samples.items() if n != "temperature"}
        rows = []
        for name in wanted:
            inputs = x.clone().requires_grad_()
            hidden = torch.tanh(inputs @ weights["0.weight"].T + weights["0.bias"])
            raw = hidden @ weights["2.weight"].T + weights["2.bias"]
            logits = raw / samples["temperature"][i]
            values = {"net": raw, "logits": logits, "log_prob": logits.log_softmax(-1)}[names[name]]
            picked = values[torch.arange(len(x)), y].sum()
            rows.append(torch.autograd.grad(picked, inputs)[0])
        torch.testing.assert_close(r[i], torch.cat(rows), rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("double")
def test_regression_uses_the_mean_and_every_output():
    """Two outputs at each row are two points each; the mean, not the log density."""

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = bayesianize(nn.Linear(3, 2), prior=1.0)

        def forward(self, x, y=None):
            mean = self.net(x)
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Normal(mean, 0.1).to_event(1), obs=y)

    x, y = torch.randn(4, 3), torch.randn(4, 2)
    inference = ParticleInference(
        Model(), sgd(), 3, kernel=RBF(InputGradients(normalize=False)), seed=0
    )
    inference.setup(x, y)
    space = inference._space
    evaluation = inference._log_joint.evaluate(
        inference._particles, (x, y), {}, capture=space.capture, input=space.input
    )
    weight = inference.get_samples()["net.weight"]
    expected = torch.cat([weight[:, k : k + 1].expand(3, 4, 3) for k in range(2)], dim=1)
    torch.testing.assert_close(space.represent(evaluation), expected, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("double")
def test_an_input_of_one_axis_has_one_feature_per_point():
    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x.square(), 1.0), obs=y)

    x = torch.linspace(0, 1, 5)
    inference = ParticleInference(
        model, sgd(), 3, kernel=RBF(InputGradients("x", normalize=False)), seed=0
    )
    inference.step(x, x)
    expected = 2 * inference.get_samples()["slope"].reshape(3, 1, 1) * x.reshape(1, 5, 1)
    torch.testing.assert_close(inference.representation(x, x), expected, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("double")
def test_input_gradients_follow_a_plate_that_subsamples():
    """The model picks rows itself; the representation has those rows only."""

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = bayesianize(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)))

        def forward(self, x, y):
            plate = pyro.plate("data", len(x), subsample_size=6)
            rows = plate.indices
            logits = pyro.deterministic("logits", self.net(x[rows]))
            with plate:
                pyro.sample("y", dist.Categorical(logits=logits), obs=y[rows])

    x, y = torch.randn(20, 3), torch.randint(2, (20,))
    inference = ParticleInference(
        Model(), sgd(), 3, kernel=RBF(InputGradients("x", output="logits")), seed=0
    )
    inference.run(3, x, y, progress_bar=False)
    space = inference._space
    evaluation = inference._log_joint.evaluate(
        inference._particles, (x, y), {}, capture=space.capture, input=space.input
    )
    r = space.represent(evaluation)
    assert r.shape == (3, 6, 3)
    torch.testing.assert_close(r.norm(dim=-1), torch.ones(3, 6))


def test_schedules_are_functions_of_the_step():
    x, y = regression_data(torch.float32)
    seen = []

    def scale(step):
        seen.append(step)
        return 0.0

    inference = ParticleInference(
        regression, sgd(), 3, kernel=RBF(Weights()), repulsion_scale=scale, seed=0
    )
    inference.run(4, x, y, progress_bar=False)
    assert seen[-4:] == [0, 1, 2, 3]
    plain = ParticleInference(regression, sgd(), 3, transport=Ensemble(), seed=0)
    plain.run(4, x, y, progress_bar=False)
    for name, value in unconstrained(plain).items():
        torch.testing.assert_close(unconstrained(inference)[name], value)


@pytest.mark.usefixtures("double")
def test_num_data_divides_the_whole_velocity():
    x, y = regression_data()
    start, moves = None, []
    for num_data in (None, 10):
        inference = ParticleInference(
            regression, sgd(), 4, kernel=RBF(Weights()), num_data=num_data, seed=0
        )
        inference.setup(x, y)
        start = unconstrained(inference)
        inference.step(x, y)
        moves.append({n: v - start[n] for n, v in unconstrained(inference).items()})
    for name in start:
        torch.testing.assert_close(moves[0][name], 10 * moves[1][name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    "optim",
    [
        pyro.optim.Adam({"lr": 0.01}),
        pyro.optim.ClippedAdam({"lr": 0.01}),
        pyro.optim.SGD({"lr": 0.001}),
        pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.9}
        ),
        lambda params: torch.optim.Adam(params, lr=0.01),
    ],
    ids=["Adam", "ClippedAdam", "SGD", "ExponentialLR", "torch"],
)
def test_optimisers_lower_the_loss(optim):
    x, y = regression_data(torch.float32)
    inference = ParticleInference(regression, optim, 5, kernel=RBF(Weights()), seed=0)
    losses = inference.run(60, x, y, progress_bar=False)
    assert losses[-5:].mean() < losses[:5].mean()
    assert not list(pyro.get_param_store().keys())


def test_options_per_site():
    """A callable of the site's name sets each site's learning rate."""
    names = []

    def options(name):
        names.append(name)
        return {"lr": 0.1 if name == "w" else 0.0}

    x, y = regression_data(torch.float32)
    inference = ParticleInference(
        regression, pyro.optim.Adam(options), 3, kernel=RBF(Weights()), seed=0
    )
    inference.setup(x, y)
    before = unconstrained(inference)
    inference.step(x, y)
    after = unconstrained(inference)
    assert sorted(names) == ["sigma", "w"]
    assert (after["w"] != before["w"]).all()
    assert (after["sigma"] == before["sigma"]).all()


def test_one_optimiser_of_all_sites_takes_the_steps_of_one_per_site():
    """Options by a function make one optimiser per site, the same for all make one for all."""
    x, y = regression_data(torch.float32)
    optims = [pyro.optim.Adam({"lr": 0.01}), pyro.optim.Adam(lambda name: {"lr": 0.01})]
    found = []
    for optim in optims:
        inference = ParticleInference(regression, optim, 3, kernel=RBF(Weights()), seed=0)
        inference.run(5, x, y, progress_bar=False)
        # What users of Pyro do between steps works in both forms.
        for made in optim.optim_objs.values():
            made.param_groups[0]["lr"] = 0.1
        inference.run(5, x, y, progress_bar=False)
        found.append(unconstrained(inference))
    assert len(set(map(id, optims[0].optim_objs.values()))) == 1
    assert len(set(map(id, optims[1].optim_objs.values()))) == len(optims[1].optim_objs) == 2
    for name, value in found[0].items():
        assert (value == found[1][name]).all()


def with_late_parameter(y, extended):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    shift = pyro.param("shift", torch.tensor(0.0)) if extended else 0.0
    pyro.sample("y", dist.Normal(mean + shift, 1.0), obs=y)


@pytest.mark.parametrize(
    "optim",
    [
        lambda: pyro.optim.Adam({"lr": 0.1}),
        lambda: pyro.optim.Adam(lambda name: {"lr": 0.1}),
        lambda: lambda params: torch.optim.Adam(params, lr=0.1),
    ],
)
def test_a_shared_parameter_that_appears_later_is_trained_too(optim):
    def begun():
        pyro.clear_param_store()
        return ParticleInference(with_late_parameter, optim(), 3, kernel=RBF(Weights()), seed=0)

    data = torch.tensor(3.0)
    with pyro.get_param_store().scope():
        inference = begun()
        inference.run(2, data, False, progress_bar=False)
        before = inference.get_samples()["mean"]
        inference.run(2, data, True, progress_bar=False)
        torch.testing.assert_close(pyro.param("shift").item(), 0.2, rtol=0.02, atol=0)
        assert (inference.get_samples()["mean"] != before).all()
        state = inference.state_dict()
        inference.run(2, data, True, progress_bar=False)
        wanted = pyro.param("shift").item()
        resumed = begun()
        resumed.load_state_dict(state)
        resumed.run(2, data, True, progress_bar=False)
        assert pyro.param("shift").item() == wanted


def test_options_that_fail_for_a_later_parameter_cost_the_others_nothing():
    def options(name):
        if name == "shift":
            raise KeyError(name)
        return {"lr": 0.1}

    data = torch.tensor(3.0)
    with pyro.get_param_store().scope():
        inference = ParticleInference(
            with_late_parameter, pyro.optim.Adam(options), 3, kernel=RBF(Weights()), seed=0
        )
        inference.run(2, data, False, progress_bar=False)
        before = inference.state_dict()["optimizer"]["sites"]["mean"]["state"][0]
        with pytest.raises(ArgumentError, match=r"could not be set up .* KeyError: 'shift'"):
            inference.step(data, True)
        after = inference.state_dict()["optimizer"]["sites"]["mean"]["state"][0]
        assert before.keys() == after.keys() >= {"exp_avg", "step"}
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_fit_steps_the_scheduler_once_per_epoch():
    x, y = regression_data(torch.float32)
    optim = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-3}, "gamma": 0.5}
    )
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    inference = ParticleInference(regression, optim, 3, kernel=RBF(Weights()), seed=0)
    losses = inference.fit(loader, 3, progress_bar=False)
    assert losses.shape == (6,)
    rates = {s.optimizer.param_groups[0]["lr"] for s in optim.optim_objs.values()}
    assert rates == {1e-3 * 0.5**3}


@pytest.mark.parametrize("form", ["tuple", "mapping", "tensor"])
def test_batches_become_arguments(form):
    x, y = regression_data(torch.float32)

    def alone(x):
        regression(x, 2 * x)

    batches = {"tuple": [(x, y)], "mapping": [{"x": x, "y": y}], "tensor": [x]}[form]
    model = alone if form == "tensor" else regression
    inference = ParticleInference(model, sgd(), 3, kernel=RBF(Weights()), seed=0)
    assert inference.fit(batches, 2, progress_bar=False).shape == (2,)


def test_callback_sees_every_step_and_can_stop():
    x, y = regression_data(torch.float32)
    seen = []

    def callback(inference, step, loss):
        seen.append((step, loss))
        return step == 3

    inference = ParticleInference(regression, sgd(), 3, kernel=RBF(Weights()), seed=0)
    losses = inference.run(10, x, y, progress_bar=False, callback=callback)
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert losses.tolist() == pytest.approx([loss for _, loss in seen])
    losses = inference.fit([(x, y)] * 4, 5, progress_bar=False, callback=lambda *_: True)
    assert len(losses) == 1


def test_callback_must_be_a_function_before_any_step():
    x, y = regression_data(torch.float32)
    inference = ParticleInference(regression, sgd(), 3, kernel=RBF(Weights()), seed=0)
    with pytest.raises(ArgumentError, match="callback must be a function"):
        inference.run(3, x, y, progress_bar=False, callback=3)
    assert inference._step == 0


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_evaluate_loss_is_that_of_the_next_draw_and_leaves_it_to_the_step(vectorize):
    def model(x):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            pyro.sample("y", dist.Normal(weight, 1.0), obs=x[rows])

    def made():
        given = {"kernel": RBF(Weights()), "seed": 0, "vectorize": vectorize}
        return ParticleInference(model, pyro.optim.SGD({"lr": 1e-3}), 4, **given)

    x = torch.arange(20.0)
    looked, plain = made(), made()
    for _ in range(3):
        first, *others = (looked.evaluate_loss(x), looked.evaluate_loss(x), looked.step(x))
        assert [*others, plain.step(x)] == pytest.approx([first] * 3, rel=1e-5)


def test_evaluate_loss_is_the_next_steps_loss():
    x, y = regression_data(torch.float32)
    inference = ParticleInference(regression, sgd(), 3, kernel=RBF(Weights()), seed=0)
    for _ in range(3):
        before = unconstrained(inference)
        loss = inference.evaluate_loss(x, y)
        if before:
            assert all((unconstrained(inference)[n] == v).all() for n, v in before.items())
        assert inference.step(x, y) == pytest.approx(loss, rel=1e-6)


@pytest.mark.usefixtures("double")
def test_loss_is_on_the_full_data_scale():
    x, y = classification_data()
    inference = ParticleInference(Classifier(), sgd(), 2, transport=Ensemble(), seed=0)
    inference.setup(x, y)
    samples = inference.get_samples()
    expected = 0.0
    for i in range(2):
        weights = {n.removeprefix("net."): v[i] for n, v in samples.items() if n != "temperature"}
        t = samples["temperature"][i]
        hidden = torch.tanh(x @ weights["0.weight"].T + weights["0.bias"])
        logits = (hidden @ weights["2.weight"].T + weights["2.bias"]) / t
        likelihood = -nn.functional.cross_entropy(logits, y, reduction="sum") * NUM_DATA / len(x)
        prior = sum(dist.Normal(0.0, 1.0).log_prob(v).sum() for v in weights.values())
        # LogNormal plus the log determinant of exp is the Normal of log(temperature).
        prior = prior + dist.Normal(0.0, 0.3).log_prob(t.log())
        expected -= (likelihood + prior).item() / 2
    assert inference.step(x, y) == pytest.approx(expected, rel=1e-10)


def test_samples_have_sites_supports_and_shapes():
    x, y = regression_data(torch.float32)
    inference = ParticleInference(regression, sgd(), 4, kernel=RBF(Weights()), seed=0)
    inference.run(2, x, y, progress_bar=False)
    samples = inference.get_samples()
    assert {n: tuple(v.shape) for n, v in samples.items()} == {"w": (4, 2), "sigma": (4,)}
    assert (samples["sigma"] > 0).all()
    assert not any(v.requires_grad for v in samples.values())
    named = inference.get_named_particles()
    assert all((named[n] == samples[n]).all() for n in samples)
    drawn = inference.get_samples(7)
    assert drawn["w"].shape == (7, 2)
    rows = {tuple(row.tolist()) for row in samples["w"]}
    assert {tuple(row.tolist()) for row in drawn["w"]} <= rows
    samples["w"].zero_()  # a copy
    assert (inference.get_samples()["w"] != 0).any()


@pytest.mark.usefixtures("double")
def test_diagnostics_against_hand_computation():
    x, y = regression_data()
    inference = ParticleInference(regression, sgd(), 4, kernel=RBF(Weights()), seed=0)
    inference.setup(x, y)
    start = unconstrained(inference)
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    log_joint = inference._log_joint.evaluate(leaves, (x, y), {}).log_joint
    gradients = torch.autograd.grad(log_joint.sum(), list(leaves.values()))
    drive = torch.cat([g.reshape(4, -1) for g in gradients], dim=1)
    r = torch.cat([v.reshape(4, -1) for v in start.values()], dim=1).unsqueeze(1)
    repulsion = WGD().repel(RBF(Weights()), r)
    inference.step(x, y)
    found = inference.diagnostics()
    assert found["step"] == 0
    torch.testing.assert_close(found["log_joint"], log_joint.detach())
    torch.testing.assert_close(found["driving_force"], drive.norm(dim=1))
    torch.testing.assert_close(found["repulsive_force"], repulsion.velocity[:, 0].norm(dim=1))
    ratio = repulsion.velocity[:, 0].norm(dim=1).mean() / drive.norm(dim=1).mean()
    assert found["force_ratio"] == pytest.approx(ratio.item())
    kernel = repulsion.kernel.mean
    assert found["effective_particles"] == pytest.approx((16 / kernel.sum()).item())
    assert found["bandwidth"] == pytest.approx(repulsion.kernel.bandwidth.mean().item())


def test_same_seed_same_run_and_global_random_state_untouched():
    x, y = regression_data(torch.float32)

    def run(seed):
        inference = ParticleInference(
            regression, pyro.optim.Adam({"lr": 0.01}), 3, kernel=RBF(Weights()), seed=seed
        )
        state = torch.get_rng_state()
        inference.run(5, x, y, progress_bar=False)
        assert (torch.get_rng_state() == state).all()
        return unconstrained(inference)

    first, second, other = run(0), run(0), run(1)
    assert all((first[n] == second[n]).all() for n in first)
    assert any((first[n] != other[n]).any() for n in first)
    pyro.set_rng_seed(4)
    third = run(None)
    pyro.set_rng_seed(4)
    fourth = run(None)
    assert all((third[n] == fourth[n]).all() for n in third)


def test_two_inferences_do_not_touch_each_other():
    x, y = regression_data(torch.float32)

    def make(seed, optim):
        return ParticleInference(regression, optim, 3, kernel=RBF(Weights()), seed=seed)

    alone = make(0, pyro.optim.Adam({"lr": 0.01}))
    alone.run(6, x, y, progress_bar=False)
    shared = pyro.optim.Adam({"lr": 0.01})  # even one optimiser object for both
    first, second = make(0, shared), make(1, shared)
    for _ in range(6):
        first.step(x, y)
        second.step(x, y)
    for name, value in unconstrained(alone).items():
        assert (unconstrained(first)[name] == value).all()
        assert (unconstrained(second)[name] != value).any()


def test_progress_bar_goes_to_stderr_and_can_be_off(capsys):
    x, y = regression_data(torch.float32)
    inference = ParticleInference(regression, sgd(), 3, kernel=RBF(Weights()), seed=0)
    inference.run(3, x, y, progress_bar=False)
    inference.fit([(x, y)], 1, progress_bar=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    inference.fit([(x, y)], 20)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "loss=" in captured.err
    assert "force_ratio=" in captured.err


def test_particles_survive_an_optimiser_that_fails_after_moving_them():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise RuntimeError("too late")

    x, y = regression_data(torch.float32)
    inference = ParticleInference(
        regression, lambda params: Failing(params, lr=0.1), 3, kernel=RBF(Weights()), seed=0
    )
    inference.setup(x, y)
    before = unconstrained(inference)
    with pytest.raises(RuntimeError, match="too late"):
        inference.step(x, y)
    assert all((unconstrained(inference)[n] == v).all() for n, v in before.items())


@pytest.mark.parametrize("space", [Weights(), InputGradients("x", normalize=False)])
def test_particles_move_without_gradients_being_switched_on(space):
    """A step needs them, whoever has switched them off; in inference mode it can only refuse."""
    x, y = regression_data(torch.float32)

    def make():
        return ParticleInference(regression, sgd(), 3, kernel=RBF(space), seed=0)

    inference, other = make(), make()
    with torch.no_grad():
        found = inference.run(3, x, y, progress_bar=False)
        assert not torch.is_grad_enabled()
    assert (found == other.run(3, x, y, progress_bar=False)).all()
    with torch.inference_mode():
        for refused in (make().step, inference.step, inference.scores, inference.representation):
            with pytest.raises(StateError, match="outside of it"):
                refused(x, y)
        x_inside = x.clone()
    assert inference.step(x, y) == other.step(x, y)
    if not isinstance(space, Weights):
        assert inference.step(x_inside, y) == other.step(x, y)


def test_keyword_arguments_reach_the_model():
    x, y = classification_data(dtype=torch.float32)
    inference = ParticleInference(
        Classifier(), sgd(), 3, kernel=RBF(InputGradients("x", output="logits")), seed=0
    )
    by_position = inference.evaluate_loss(x, y)
    assert inference.evaluate_loss(x=x, y=y) == pytest.approx(by_position)
    assert inference.evaluate_loss(x, y=y) == pytest.approx(by_position)
    inference.step(y=y, x=x)


@pytest.mark.parametrize("space", [Weights(), InputGradients("x", normalize=False)])
def test_repulsion_every_so_often_has_the_same_average(space):
    """Force of n steps at rest: the sum of the repulsive parts is that of repelling every step."""
    x, y = regression_data(torch.float64)
    options = {"kernel": RBF(space), "seed": 0}
    every, lazy, alone = (
        ParticleInference(regression, sgd(0.0), 4, **options, **more)
        for more in ({}, {"repulsion_every": 3}, {"transport": Ensemble()})
    )

    def total(inference):
        inference.setup(x, y)
        forces = []
        for _ in range(3):  # particles do not move: the learning rate is 0
            forces.append(inference._forces((x, y), {}, measure=False).gradients)
            inference._step += 1
        return {name: sum(force[name] for force in forces) for name in forces[0]}

    drive = total(alone)
    expected, found = total(every), total(lazy)
    for name in drive:
        torch.testing.assert_close(found[name], expected[name])
    assert (found["w"] != drive["w"]).any()
    # Between, the force is the ensemble's own.
    lazy._step, alone._step = 1, 1
    between = lazy._forces((x, y), {}, measure=False).gradients
    for name, force in alone._forces((x, y), {}, measure=False).gradients.items():
        assert (between[name] == force).all()


def test_force_ratio_is_that_of_the_average():
    x, y = regression_data(torch.float32)
    ratios = []
    for every in (1, 4):
        inference = ParticleInference(
            regression, sgd(0.0), 4, kernel=RBF(Weights()), seed=0, repulsion_every=every
        )
        inference.run(6, x, y, progress_bar=False)
        ratios.append(inference.diagnostics()["force_ratio"])
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-5)
    with pytest.raises(ArgumentError, match="repulsion_every=2 needs a transport"):
        ParticleInference(
            regression,
            sgd(),
            4,
            kernel=RBF(Weights()),
            transport=SVGD(),
            repulsion_every=2,
        )


def test_a_progress_bar_right_after_loading(capsys):
    """No step has been measured yet when the bar first shows the loss."""
    first = ParticleInference(
        regression, pyro.optim.Adam({"lr": 0.1}), 3, kernel=RBF(Weights()), seed=0
    )
    data = regression_data(torch.float32)
    first.run(10, *data, progress_bar=False)
    again = ParticleInference(
        regression, pyro.optim.Adam({"lr": 0.1}), 3, kernel=RBF(Weights()), seed=0
    )
    again.load_state_dict(first.state_dict())
    again.run(45, *data)
    shown = capsys.readouterr().err
    assert "loss=" in shown
    assert "force_ratio=" in shown


# -------------------------------------------------------------------- labels, plates, callbacks


class TwoHeads(PyroModule):
    """Two observed classes of the same rows."""

    def __init__(self, first=3, second=3):
        super().__init__()
        self.first, self.second = (
            bayesianize(nn.Linear(2, first)),
            bayesianize(nn.Linear(2, second)),
        )

    def forward(self, x, a, b):
        left, right = self.first(x), self.second(x)
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Categorical(logits=left), obs=a)
            pyro.sample("b", dist.Categorical(logits=right), obs=b)


@pytest.mark.parametrize(("first", "second"), [(3, 3), (5, 3)])
def test_the_label_is_that_of_the_site_of_the_output(first, second):
    x, a, b = torch.randn(4, 2), torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 0, 1])
    if first == 5:
        a = a + 2
    space = InputGradients("x", output="second", normalize=False)
    inference = ParticleInference(
        TwoHeads(first, second), pyro.optim.SGD({"lr": 0.1}), 2, kernel=RBF(space), seed=0
    )
    found = inference.representation(x, a, b)
    weight = inference.get_samples()["second.weight"]
    torch.testing.assert_close(found, weight[:, b])


def test_a_hidden_layer_has_no_label():
    """Its width is not the number of classes, so all of its outputs are differentiated."""
    model = Hidden()
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    space = InputGradients("x", output="net.0", normalize=False)
    inference = ParticleInference(model, pyro.optim.SGD({"lr": 0.1}), 2, kernel=RBF(space), seed=0)
    found = inference.representation(x, y)
    weight = inference.get_samples()["net.0.weight"]
    assert found.numel() == 2 * 4 * weight.shape[1] * 2


class Hidden(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = bayesianize(nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 3)))

    def forward(self, x, y):
        logits = self.net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def in_place(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    beta = torch.zeros(3)
    beta[1:] = b
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def ordered(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.OrderedLogistic(x @ w, torch.tensor([-1.0, 1.0])), obs=y.round())


@pytest.mark.parametrize("model", [in_place, ordered])
def test_models_that_write_in_place_take_the_loop(model):
    x, y = torch.randn(4, 3), torch.tensor([0.0, 1.0, 2.0, 1.0])
    losses = []
    for vectorize in ("auto", "loop"):
        inference = ParticleInference(
            model,
            pyro.optim.SGD({"lr": 0.1}),
            3,
            kernel=RBF(Weights()),
            seed=0,
            vectorize=vectorize,
        )
        losses.append(inference.run(2, x, y, progress_bar=False)[-1])
    assert losses[0] == losses[1]


def test_tied_parameters_move_once():
    class Tied(PyroModule):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight
            self.z = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, x, y):
            mean = self.b(self.a(x)) + self.z
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    torch.manual_seed(0)
    x, y = torch.randn(3, 2), torch.randn(3, 2)
    model = Tied()
    before = model.a.weight.detach().clone()
    inference = ParticleInference(
        model, pyro.optim.SGD({"lr": 0.01}), 1, transport=Ensemble(), seed=0
    )
    inference.setup(x, y)
    z = inference.get_samples()["z"]
    inference.step(x, y)
    weight = before.clone().requires_grad_()
    ((x @ weight.T @ weight.T + z - y).square().sum() / 2).backward()
    torch.testing.assert_close(model.a.weight.detach(), before - 0.01 * weight.grad)


@pytest.mark.parametrize("answer", [True, np.bool_(True), torch.tensor(True)])
def test_any_kind_of_true_stops(answer):
    losses = ParticleInference(
        in_place, pyro.optim.SGD({"lr": 0.1}), 2, kernel=RBF(Weights()), seed=0
    ).run(5, torch.ones(2, 3), torch.ones(2), progress_bar=False, callback=lambda *_: answer)
    assert len(losses) == 1


def test_fit_in_a_callback_of_fit_is_refused():
    inference = ParticleInference(
        in_place, pyro.optim.SGD({"lr": 0.1}), 2, kernel=RBF(Weights()), seed=0
    )
    batches = [(torch.ones(2, 3), torch.ones(2))]
    with pytest.raises(StateError, match="called by a callback of fit"):
        inference.fit(
            batches,
            1,
            progress_bar=False,
            callback=lambda one, *_: one.fit(batches, 1, progress_bar=False),
        )
    assert len(inference.fit(batches, 1, progress_bar=False)) == 1


def test_predictions_leave_the_global_random_state_alone():
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    inference = ParticleInference(
        Hidden(), pyro.optim.SGD({"lr": 0.1}), 2, kernel=RBF(Weights()), seed=0
    )
    inference.step(x, y)
    before = torch.get_rng_state()
    predict = ParticlePredictive(inference)
    predict.parameters(x, y)
    predict.entropy(x, y)
    predict.log_prob(x, y)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [2**70, -(2**70)])
def test_seeds_of_too_many_bits_are_refused(seed):
    with pytest.raises(ArgumentError, match="64 bits"):
        ParticleInference(in_place, pyro.optim.SGD({"lr": 0.1}), 2, seed=seed)


@pytest.mark.parametrize("rule", [WGD, SVGD])
def test_calibrate_is_true_or_false(rule):
    with pytest.raises(ArgumentError, match="must be True or False, got 'no'"):
        rule(calibrate="no")
