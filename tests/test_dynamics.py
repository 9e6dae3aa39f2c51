"""Accelerated flows and Langevin noise: recursions typed out, speed, resumption, statistics."""

import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import PyroOptim

from pyro_fordes import (
    RBF,
    SVGD,
    WAG,
    WGD,
    ArgumentError,
    Ensemble,
    Langevin,
    ParticleInference,
    Weights,
    WNes,
)

OPTIMISERS = {
    "WAG": (WAG, {"lr": 0.05}),
    "WAG, small alpha": (WAG, {"lr": 0.05, "alpha": 2.1}),
    "WNes": (WNes, {"lr": 0.05}),
    "WNes, convexity": (WNes, {"lr": 0.05, "convexity": 1.0}),
    "Langevin": (Langevin, {"lr": 0.05}),
}
optimisers = pytest.mark.parametrize("name", OPTIMISERS)
A = torch.tensor([[2.0, 0.4, 0.0], [0.4, 1.0, -0.3], [0.0, -0.3, 0.5]], dtype=torch.float64)


def start(shape=(4, 3)):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def moved(y, optimizer, steps):
    """Steps on a Gaussian target with precision A."""
    for _ in range(steps):
        y.grad = y.detach() @ A
        optimizer.step()
    return y.detach().clone()


def gaussian(precision=1.0, dimension=2, dtype=torch.float64):
    def model():
        scale = torch.full((dimension,), precision, dtype=dtype).rsqrt()
        pyro.sample("x", dist.Normal(torch.zeros_like(scale), scale).to_event(1))

    return model


# -------------------------------------------------------------------- acceleration


def wag(x, y, step, k, alpha):
    """The authors' form of the update."""
    new = y + step
    return new, new + (1 - 1 / k) * (y - x) + (1 + (alpha - 2) / k) * step


@pytest.mark.parametrize("alpha", [2.1, 3.5])
def test_wag_is_the_typed_out_recursion(alpha):
    y = start().requires_grad_()
    x = expected = y.detach().clone()
    optimizer = WAG([y], lr=0.1, alpha=alpha)
    for k in range(1, 21):
        x, expected = wag(x, expected, -0.1 * expected @ A, k, alpha)
        torch.testing.assert_close(moved(y, optimizer, 1), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(optimizer.state[y]["particles"], x, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("convexity", [None, 0.4, 10.0])
def test_wnes_is_the_typed_out_recursion(convexity):
    """With convexity in the authors' other form, by the alpha and gamma of Zhang & Sra."""
    lr, shrink = 0.1, 0.2
    y = start().requires_grad_()
    x = expected = y.detach().clone()
    optimizer = WNes([y], lr=lr, convexity=convexity, shrink=shrink)
    for k in range(1, 21):
        if convexity is None:
            factor = 1 - 3 / (k + 2)
        else:
            mu = convexity * lr
            beta = shrink * math.sqrt(mu)
            root = math.sqrt(beta**2 + 4 * (1 + beta) * mu)
            alpha = (root - beta) / 2
            gamma = convexity * (1 - 2 * beta / (root + beta))
            factor = alpha * gamma / (gamma + alpha * convexity) * (1 / alpha - 1)
        new = expected - lr * expected @ A
        x, expected = new, new + factor * (new - x)
        torch.testing.assert_close(moved(y, optimizer, 1), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(optimizer.state[y]["particles"], x, rtol=1e-12, atol=1e-14)


def test_wnes_without_shrink_has_nesterovs_constant():
    """Two steps in one dimension: the extrapolation is (1 - sqrt(mu)) / (1 + sqrt(mu))."""
    y = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = WNes([y], lr=0.25, convexity=1.0, shrink=0.0)
    y.grad = torch.tensor([1.0], dtype=torch.float64)
    optimizer.step()
    assert y.item() == pytest.approx(0.75 + (1 - 0.5) / (1 + 0.5) * (0.75 - 1.0), rel=1e-14)


@pytest.mark.parametrize(
    ("optimiser", "options"), [(WAG, {}), (WNes, {}), (WNes, {"convexity": 0.001})]
)
def test_accelerated_flows_win_on_an_ill_conditioned_gaussian(optimiser, options):
    """Precisions 0.001 and 1, step size 0.5: plain steps leave 0.9995^200 = 0.90 after 200.

    The accelerated ones swing about the target, so the largest distance of the last 50 counts.
    """
    precision = torch.tensor([0.001, 1.0], dtype=torch.float64)

    def left(build):
        y = torch.ones(2, dtype=torch.float64, requires_grad=True)
        optimizer = build([y])
        distances = []
        for _ in range(200):
            y.grad = precision * y.detach()
            optimizer.step()
            distances.append(y.detach().norm().item())
        return max(distances[-50:])

    plain = left(lambda params: torch.optim.SGD(params, lr=0.5))
    assert plain == pytest.approx(0.9995**151, rel=1e-6)
    assert left(lambda params: optimiser(params, lr=0.5, **options)) < plain / 2


@pytest.mark.parametrize(
    ("optimiser", "options"), [(WAG, {}), (WNes, {}), (WNes, {"convexity": 1 / 400})]
)
def test_accelerated_particles_reach_a_far_target_sooner(optimiser, options):
    """With repulsion: particles start at 0, the target is at 10 with deviations 1 and 20."""
    sd = torch.tensor([1.0, 20.0], dtype=torch.float64)

    def model():
        pyro.sample("x", dist.Normal(torch.zeros_like(sd) + 10, sd).to_event(1))

    def distance(optim):
        inference = ParticleInference(
            model,
            optim,
            20,
            kernel=RBF(Weights()),
            init_loc_fn=lambda site: torch.randn(2, dtype=torch.float64),
            seed=0,
        )
        inference.run(200, progress_bar=False)
        return (inference.get_samples()["x"].mean(0) - 10).abs()[1].item()

    plain = distance(lambda params: torch.optim.SGD(params, lr=0.2))
    assert distance(lambda params: optimiser(params, lr=0.2, **options)) < plain / 2


def test_step_size_zero_and_missing_gradients_move_nothing():
    for optimiser, options in ((WAG, {}), (WNes, {"convexity": 1.0}), (Langevin, {})):
        y, other = start().requires_grad_(), start().requires_grad_()
        assert (moved(y, optimiser([y, other], lr=0.0, **options), 3) == start()).all()
        moved(y, optimiser([y, other], lr=0.1, **options), 3)
        assert (y != start()).all()
        assert (other == start()).all()


def test_closure_and_parameter_groups():
    for optimiser, _ in OPTIMISERS.values():
        y, other = start().requires_grad_(), start().requires_grad_()
        optimizer = optimiser([{"params": [y]}, {"params": [other], "lr": 0.0}], lr=0.1)

        def closure(y=y, other=other):
            loss = (y.square() + other.square()).sum()
            y.grad, other.grad = torch.autograd.grad(loss, [y, other])
            return loss.item()

        assert optimizer.step(closure) == pytest.approx(2 * start().square().sum().item())
        assert (y != start()).all()
        assert (other == start()).all()


@optimisers
def test_state_dict_continues_bit_for_bit(name):
    optimiser, options = OPTIMISERS[name]
    torch.manual_seed(0)
    y = start().requires_grad_()
    optimizer = optimiser([y], **options)
    moved(y, optimizer, 5)
    file = io.BytesIO()
    torch.save((y.detach(), optimizer.state_dict(), torch.get_rng_state()), file)
    expected = moved(y, optimizer, 5)
    file.seek(0)
    value, state, random = torch.load(file, weights_only=True)
    torch.set_rng_state(random)
    again = value.requires_grad_()
    resumed = optimiser([again], lr=9.0)
    resumed.load_state_dict(state)
    assert (moved(again, resumed, 5) == expected).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: WAG(p, lr=-0.1), r"WAG\(lr=...\)"),
        (lambda p: WAG(p, lr=0.1, alpha=0.5), r"WAG\(alpha=...\)"),
        (lambda p: WNes(p, lr=math.nan), r"WNes\(lr=...\)"),
        (lambda p: WNes(p, lr=0.1, convexity=0.0), r"WNes\(convexity=...\)"),
        (lambda p: WNes(p, lr=0.1, convexity=20.0), r"product of at most 1, got 0.1 \* 20.0"),
        (lambda p: WNes(p, lr=0.1, shrink=-1.0), r"WNes\(shrink=...\)"),
        (lambda p: Langevin(p, lr="0.1"), r"Langevin\(lr=...\) must be a number"),
        (lambda p: Langevin(p, lr=0.1, temperature=-1.0), r"Langevin\(temperature=...\)"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises(ArgumentError, match=message):
        build([start().requires_grad_()])


# -------------------------------------------------------------------- with the driver

TRANSPORTS = {
    "Ensemble": Ensemble(),
    "SVGD": SVGD(),
    "WGD(kde)": WGD(),
    "WGD(blob)": WGD("blob"),
    "WGD(ssge)": WGD("ssge"),
    "WGD(sge), calibrated": WGD("sge", whiten="full", calibrate=True),
}


def regression(x, y):
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    offset = pyro.sample("offset", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(offset + x @ slope, 0.5), obs=y)


@optimisers
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_optimiser_works_with_every_transport(name, transport):
    """As a torch and as a Pyro optimiser, with the same particles in the end."""
    optimiser, options = OPTIMISERS[name]
    options = {**options, "lr": 0.005}
    x = torch.randn(10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for optim in (lambda params: optimiser(params, **options), PyroOptim(optimiser, options)):
        inference = ParticleInference(
            regression,
            optim,
            5,
            kernel=RBF(Weights()),
            transport=TRANSPORTS[transport],
            seed=0,
        )
        losses = inference.run(30, x, x.sum(1) + 0.3, progress_bar=False)
        assert losses.isfinite().all()
        assert losses[-10:].mean() < losses[0] / 2
        found.append(inference.get_samples()["slope"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_pyro_scheduler_sets_their_step_size():
    optim = pyro.optim.ExponentialLR(
        {"optimizer": WNes, "optim_args": {"lr": 0.1, "convexity": 1.0}, "gamma": 0.5}
    )
    inference = ParticleInference(gaussian(), optim, 3, transport=Ensemble(), seed=0)
    inference.fit([()] * 2, 3, progress_bar=False)
    rates = {s.optimizer.param_groups[0]["lr"] for s in optim.optim_objs.values()}
    assert rates == {0.1 * 0.5**3}


# -------------------------------------------------------------------- Langevin noise


def langevin(lr, temperature=1.0):
    return lambda params: Langevin(params, lr=lr, temperature=temperature)


def variance(lr, *, temperature=1.0, precision=1.0, steps=60, **options):
    """Variance of 4000 independent draws at rest: 50 particles in 80 coordinates, mean known."""
    inference = ParticleInference(
        gaussian(precision, 80),
        langevin(lr, temperature),
        50,
        transport=Ensemble(),
        seed=0,
        **options,
    )
    inference.run(steps, progress_bar=False)
    return inference.get_samples()["x"].square().mean().item()


def close_to(found, expected, draws=4000):
    """Within 5 standard errors of a variance from so many draws: false alarm below 1e-6."""
    return abs(found / expected - 1) < 5 * math.sqrt(2 / draws)


@pytest.mark.parametrize("precision", [1.0, 0.5])
def test_langevin_has_the_euler_schemes_variance(precision):
    """x' = (1 - e p) x + sqrt(2 e) xi rests at the variance 1 / (p (1 - e p / 2)).

    The step size 0.8 makes the factor 1.67 and 1.25, beyond the bounds about the exact variance.
    """
    found = variance(0.8, precision=precision)
    assert close_to(found, 1 / (precision * (1 - 0.4 * precision)))
    assert not close_to(found, 1 / precision)


def test_noise_temperature_is_one_over_num_data():
    """With num_data=N, a step size N times larger and noise of temperature 1 / N: the same run."""
    plain = variance(0.2, steps=5)
    scaled = variance(10.0, temperature=0.02, num_data=50, steps=5)
    assert scaled == pytest.approx(plain, rel=1e-9)


def test_temperature_of_the_inference_tempers_the_target():
    """T of the inference and noise of temperature 1 target p^(1/T), whose precision is p / T."""
    inference = ParticleInference(
        gaussian(1.0, 80), langevin(0.6), 50, transport=Ensemble(), temperature=3.0, seed=0
    )
    inference.run(60, progress_bar=False)
    found = inference.get_samples()["x"].square().mean().item()
    assert close_to(found, 3 / (1 - 0.3 / 3))


def mean_field(lr, repulsion_scale, temperature):
    """Variance at rest of 4000 particles on a standard normal, the estimate of the score exact."""
    torch.manual_seed(0)
    theta = torch.randn(4000, dtype=torch.float64).requires_grad_()
    optimizer = Langevin([theta], lr=lr, temperature=temperature)
    for _ in range(200):
        x = theta.detach()
        theta.grad = x - repulsion_scale * (x - x.mean()) / x.var()
        optimizer.step()
    return theta.var().item()


def test_noise_and_repulsion_share_the_entropy():
    """Repulsion scale 1 - a and noise of temperature a keep the posterior, up to the step size.

    In the mean field x' = (1 - e + e (1 - a) / u) x + sqrt(2 e a) xi, whose variance u solves
    (2e - e^2) u^2 - 2e (1 - e (1 - a)) u - e^2 (1 - a)^2 = 0. The variance of 4000 particles
    fluctuates about it less than that of independent draws. Repulsion at scale 1 gives 1 + a.
    """
    e, a = 0.05, 0.6
    half, last = e * (1 - e * (1 - a)), e**2 * (1 - a) ** 2
    expected = (half + math.sqrt(half**2 + (2 * e - e**2) * last)) / (2 * e - e**2)
    assert expected == pytest.approx(1, abs=0.02)
    assert close_to(mean_field(e, 1 - a, a), expected)
    assert close_to(mean_field(e, 1.0, a), 1 + a)
    assert not close_to(1 + a, expected)


def noisy(seed):
    inference = ParticleInference(gaussian(), langevin(0.1), 5, kernel=RBF(Weights()), seed=seed)
    inference.run(5, progress_bar=False)
    return inference


def test_noise_comes_from_the_inferences_own_stream():
    state = torch.get_rng_state()
    first = noisy(0).get_samples()["x"]
    assert (torch.get_rng_state() == state).all()
    torch.rand(7)
    second, other = noisy(0).get_samples()["x"], noisy(1).get_samples()["x"]
    assert (first == second).all()
    assert (first != other).all()


def test_noise_is_fresh_at_every_step_and_differs_between_particles():
    """The inference's stream goes on from step to step, and from the model's draws to the noise."""
    inference = ParticleInference(
        gaussian(precision=1e-12), langevin(0.5), 6, transport=Ensemble(), seed=0
    )
    inference.setup()
    places = [inference.get_samples()["x"]]
    for _ in range(4):
        inference.step()
        places.append(inference.get_samples()["x"])
    moves = torch.stack(places).diff(dim=0).flatten()
    assert len(moves.mul(1e9).round().unique()) == moves.numel()


def test_options_by_name_spare_shared_parameters():
    """As the docs say: no noise on parameters that all particles share."""

    def model():
        shift = pyro.param("shift", torch.tensor(0.5))
        pyro.sample("x", dist.Normal(shift.detach(), 1.0))
        pyro.factor("pull", -((shift - 1) ** 2))

    optim = PyroOptim(
        Langevin, lambda name: {"lr": 0.1, "temperature": 0.0 if name == "shift" else 1.0}
    )
    inference = ParticleInference(model, optim, 3, transport=Ensemble(), seed=0)
    inference.step()
    assert pyro.param("shift").item() == pytest.approx(0.6)
