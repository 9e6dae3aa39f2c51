"""NaN and infinity in a particle's loss, force, representation or optimiser state, in an image.

Each policy does what it says, and the other particles see nothing of it.
"""

import math
import re
import warnings
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_fordes import (
    IMQ,
    RBF,
    SVGD,
    WAG,
    WGD,
    Ensemble,
    InputGradients,
    NumericalError,
    Outputs,
    ParticleInference,
    Weights,
    bayesianize,
)
from pyro_fordes.faults import Faults, broken_forces, broken_values, clipped, finite_rows
from pyro_fordes.finite import finite_particles, repel_finite
from pyro_fordes.rollback import Before, redraw
from tests.test_checkpoint import same

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0.1, -0.4, 1.0, 0.3, -1.2, 0.6], dtype=torch.float64)
BROKEN = 2
OTHERS = [0, 1, 3, 4]


class Poisoned(PyroModule):
    """A regression with BatchNorm that fails, in a way, for the particle with certain weights."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False).double()
        self.net = bayesianize(nn.Linear(3, 1).double())
        self.how = "loss"
        self.target = torch.full((1, 3), math.inf, dtype=torch.float64)

    def forward(self, x, y=None):
        weight = self.net.weight
        hit = (weight == self.target).all()
        huge = torch.where(hit, x.new_tensor(1e308), 0.0)
        # Without the tanh, a batch's normalised gradients would be those of a sum that BatchNorm
        # keeps at zero: rounding.
        mean = self.net(self.norm(x)).squeeze(-1).tanh()
        total = weight.sum() if self.how == "force" else weight.sum().detach()
        pyro.factor("far", 10.0 * (huge * (total - total.detach())), has_rsample=False)
        if self.how == "loss":
            pyro.factor("fault", torch.where(hit, math.nan, 0.0), has_rsample=False)
        if self.how == "representation":  # the mean is finite, its gradient by x is not
            mean = mean + 10.0 * (huge * (x.sum(1) - x.sum(1).detach()))
        pyro.deterministic("mean", mean)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def shared(x, y=None):
    """A model with a parameter that all particles share."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
    bias = pyro.param("bias", torch.zeros(()).double())
    fault = torch.where(weight[0] == shared.target, math.nan, 0.0)
    pyro.factor("fault", fault * (1 + bias if shared.pulls else 1), has_rsample=False)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weight + bias * y.new_ones(()), 1.0), obs=y)


shared.target, shared.pulls = math.inf, False

RULES = {
    "ensemble": (Ensemble(), RBF(Weights())),
    "weights": (WGD(), RBF(Weights())),
    "whitened": (WGD("sge", whiten="full", calibrate=True), RBF(Weights())),
    "per site": (WGD("ssge"), IMQ(Weights(group="site"))),
    "input gradients": (WGD(), RBF(InputGradients("x"))),
    "raw input gradients": (WGD("blob"), RBF(InputGradients("x", output="mean", normalize=False))),
    "outputs": (WGD(), RBF(Outputs("mean", group="point"))),
    "Stein": (SVGD(), RBF(Weights())),
    "Stein, whitened": (SVGD(whiten="full", calibrate=True), RBF(Weights())),
    "Stein, coordinates": (SVGD(), RBF(Weights(group="coordinate"))),
    "Stein, outputs": (SVGD(), RBF(Outputs())),
}


def scheduler():
    arguments = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}}
    return pyro.optim.StepLR({**arguments, "step_size": 1, "gamma": 0.7})


OPTIMISERS = {
    "torch SGD": lambda: lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "Pyro Adam": lambda: pyro.optim.Adam({"lr": 0.01}),
    "site by site": lambda: pyro.optim.Adam(lambda name: {"lr": 0.01}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.99}),
    "scheduler": scheduler,
    "Adagrad": lambda: lambda params: torch.optim.Adagrad(params, lr=0.01),
    "Adafactor": lambda: lambda params: torch.optim.Adafactor(params, lr=0.01),
    "WAG": lambda: lambda params: WAG(params, lr=0.01),
}


def make(rule="weights", optim="Pyro Adam", model=None, num_particles=5, **options):
    transport, kernel = RULES[rule]
    return ParticleInference(
        Poisoned() if model is None else model,
        OPTIMISERS[optim](),
        num_particles,
        kernel=kernel,
        transport=transport,
        seed=1,
        **options,
    )


def started(*args, deferred=None, steps=3, **options):
    """An inference that has taken some steps without a fault."""
    inference = make(*args, **options)
    inference._faults.deferred = deferred
    inference.run(steps, X, Y, progress_bar=False)
    return inference


def poison(inference, how="loss", particle=BROKEN):
    """Let the next steps fail for a particle, for as long as it does not move."""
    inference.model.how = how
    inference.model.target = inference.get_unconstrained()["net.weight"][particle].clone()


def states(inference, rows):
    """Values, buffers and state rows of some particles."""
    found = {**inference.get_unconstrained(), **inference._buffers}
    parameters = {**inference._particles, **inference._shared}
    for index, one in enumerate(inference._stepper.optimizers(parameters)):
        for name, tensor in parameters.items():
            for key, value in one.state.get(tensor, {}).items():
                if isinstance(value, torch.Tensor) and value.shape[:1] == tensor.shape[:1] != ():
                    found[f"{index} {name} {key}"] = value.clone()
    return {name: value[rows] for name, value in found.items()}


def quiet():
    return warnings.catch_warnings(action="ignore")


HOWS = ["loss", "force"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("rule", [rule for rule in RULES if not rule.startswith("Stein")])
@pytest.mark.parametrize("policy", ["skip", "reset"])
def test_the_others_move_as_if_nothing_had_happened(rule, how, policy):
    """Bit for bit: the particle is where it was, so what it does to the others is the same."""
    clean, faulty = (started(rule, nan=policy) for _ in range(2))
    clean.model.how = how
    before = states(faulty, [BROKEN])
    poison(faulty, how)
    with pytest.warns(UserWarning, match=rf"at step 3 .*particle {BROKEN} is.*nan='{policy}'"):
        loss = faulty.step(X, Y)
    assert math.isfinite(loss)
    clean.step(X, Y)
    same(states(faulty, OTHERS), states(clean, OTHERS))
    if policy == "skip":
        same(states(faulty, [BROKEN]), before)
    assert faulty.diagnostics()["faults"].tolist() == [0, 0, 1, 0, 0]
    if rule == "ensemble":  # and ever after
        with quiet():
            faulty.run(3, X, Y, progress_bar=False)
        clean.run(3, X, Y, progress_bar=False)
        same(states(faulty, OTHERS), states(clean, OTHERS))


@pytest.mark.parametrize("optim", OPTIMISERS)
def test_every_optimiser_leaves_the_particle_as_it_was(optim):
    clean, faulty = (started("ensemble", optim, nan="skip") for _ in range(2))
    before = states(faulty, [BROKEN])
    poison(faulty)
    with quiet():
        faulty.step(X, Y)
    clean.step(X, Y)
    same(states(faulty, [BROKEN]), before)
    if optim == "Adafactor":  # its bound on an update's size is one for all particles
        found, wanted = faulty.get_unconstrained(), clean.get_unconstrained()
        for name in found:
            torch.testing.assert_close(found[name], wanted[name], rtol=0.1, atol=0.01)
    else:
        same(states(faulty, OTHERS), states(clean, OTHERS))


def without(inference, **options):
    """An inference of the other particles only, in the same state."""
    fewer = make(*options.pop("rule"), num_particles=len(OTHERS), nan="skip")
    fewer.run(1, X, Y, progress_bar=False)
    for name, value in inference.get_unconstrained().items():
        fewer._particles[name].data.copy_(value[OTHERS])
    fewer._buffers = {name: value[OTHERS].clone() for name, value in inference._buffers.items()}
    one, other = (part._stepper.optimizers(part._particles)[0].state for part in (inference, fewer))
    for name, tensor in inference._particles.items():
        for key, value in one[tensor].items():
            own = value[OTHERS] if value.dim() else value
            other[fewer._particles[name]][key].copy_(own)
    fewer._step = inference._step
    return fewer


@pytest.mark.parametrize(
    ("rule", "how"),
    [
        ("input gradients", "representation"),
        ("raw input gradients", "representation"),
        ("Stein", "force"),
        ("Stein, coordinates", "force"),
    ],
)
def test_what_cannot_be_compared_is_left_out_of_the_kernel(rule, how):
    """The others move as they would without the particle: kernel, bandwidth and all."""
    faulty = started(rule, nan="skip")
    fewer = without(faulty, rule=(rule, "Pyro Adam"))
    before = states(faulty, [BROKEN])
    poison(faulty, how)
    fewer.model.how = how
    with pytest.warns(UserWarning, match=r"at step 3 .* of particle 2 is not finite"):
        faulty.step(X, Y)
    fewer.step(X, Y)
    same(states(faulty, [BROKEN]), before)
    found, wanted = states(faulty, OTHERS), states(fewer, slice(None))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.startswith("Stein")])
def test_a_broken_loss_with_a_finite_gradient_is_still_smoothed(rule):
    clean, faulty = (started(rule, nan="skip") for _ in range(2))
    poison(faulty)
    with quiet():
        faulty.step(X, Y)
    clean.step(X, Y)
    same(states(faulty, OTHERS), states(clean, OTHERS))


@pytest.mark.parametrize(
    ("rule", "how"),
    [
        *[(rule, how) for rule in ("input gradients", "Stein", "ensemble") for how in HOWS],
        ("input gradients", "representation"),  # nothing else is compared
    ],
)
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("optim", ["Pyro Adam", "scheduler", "ClippedAdam"])
def test_raise_leaves_everything_as_it_was(rule, how, optim, chunk_size):
    clean, faulty = (started(rule, optim, chunk_size=chunk_size) for _ in range(2))
    before = faulty.state_dict()
    for inference in (clean, faulty):
        inference.model.how = how
    poison(faulty, how)
    pattern = {
        "loss": r"at step 3 the log joint of particle 2 is nan \(not finite at site 'fault'\)",
        "force": r"at step 3 the force on 'net.weight'.* of particle 2 is not finite",
        "representation": r"at step 3 the force on 'net.weight'.* of particle 2 is not finite",
    }[how]
    with pytest.raises(NumericalError, match=pattern + ".*left as they are"):
        faulty.step(X, Y)
    same({**faulty.state_dict(), "faults": before["faults"]}, before)
    assert faulty.diagnostics()["faults"][BROKEN] == 1
    faulty.model.target = clean.model.target
    assert faulty.step(X, Y) == clean.step(X, Y)
    same(states(faulty, slice(None)), states(clean, slice(None)))


@pytest.mark.parametrize("optim", ["Pyro Adam", "site by site", "torch SGD", "scheduler"])
@pytest.mark.parametrize(
    ("policy", "chunk_size"), [("raise", None), ("skip", None), ("reset", None), ("raise", 2)]
)
def test_nan_in_the_optimisers_state(optim, policy, chunk_size):
    options = {"nan": policy, "chunk_size": chunk_size}
    clean, faulty = (started("input gradients", optim, **options) for _ in range(2))
    weight = faulty._particles["net.weight"]
    (one,) = [o for o in faulty._stepper.optimizers(faulty._particles) if weight in o.state]
    key = "momentum_buffer" if optim == "torch SGD" else "exp_avg"
    one.state[weight][key][BROKEN, 0, 1] = math.nan
    before, all_before = states(faulty, [BROKEN]), states(faulty, slice(None))
    match = "at step 3 the optimiser's step made 'net.weight' of particle 2 not finite"
    if policy == "raise":
        with pytest.raises(NumericalError, match=match):
            faulty.step(X, Y)
        for name, value in states(faulty, slice(None)).items():
            torch.testing.assert_close(value, all_before[name], rtol=0, atol=0, equal_nan=True)
        return
    with pytest.warns(UserWarning, match=match):
        faulty.step(X, Y)
    clean.step(X, Y)
    same(states(faulty, OTHERS), states(clean, OTHERS))
    if policy == "skip":
        for name, value in states(faulty, [BROKEN]).items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    else:
        faulty.run(3, X, Y, progress_bar=False)
        assert faulty.diagnostics()["faults"][BROKEN] == 1
        assert all(value.isfinite().all() for value in states(faulty, slice(None)).values())


def test_without_copies_an_overflow_of_the_optimiser_is_told():
    """In chunks no copy is kept: force and state are finite, the step is not."""

    def huge(params):
        return torch.optim.SGD(params, lr=1e308)

    OPTIMISERS["huge"] = lambda: huge
    inference = make("ensemble", "huge", chunk_size=2)
    with pytest.raises(NumericalError, match="no copy is kept to go back to"):
        inference.run(5, X, Y, progress_bar=False)
    assert not inference._before._values
    del OPTIMISERS["huge"]


@pytest.mark.parametrize("optim", ["Pyro Adam", "ClippedAdam", "scheduler"])
@pytest.mark.parametrize("policy", ["raise", "skip", "reset"])
def test_nan_in_an_image_is_every_particles(optim, policy):
    """The step is left out for all: the optimiser does not even count it."""
    inference = started("input gradients", optim, nan=policy)
    x = X.clone()
    x[1, 1] = math.nan
    before = inference.state_dict()
    if policy == "raise":
        with pytest.raises(NumericalError, match=r"at step 3 the log joint of particle 0 is nan"):
            inference.step(x, Y)
    else:
        with pytest.warns(UserWarning, match=r"particles \[0, 1, 2, 3, 4\] were left as they are"):
            assert math.isnan(inference.step(x, Y))
    after = inference.state_dict()
    for name in ("particles", "buffers", "optimizer"):
        same(after[name], before[name])
    assert after["step"] == (3 if policy == "raise" else 4)
    assert math.isfinite(inference.step(X, Y))


@pytest.mark.parametrize("policy", ["skip", "reset"])
def test_nan_in_a_batch_of_a_new_shape(policy):
    """The model's first run on the shape refuses it, and the next good one of it goes on."""
    inference = started("input gradients", nan=policy)
    before = inference.state_dict()
    y = Y.clone()
    y[1] = math.nan
    with pytest.warns(UserWarning, match="at step 3 no particle moved: .*'y'.* not finite"):
        assert math.isnan(inference.step(X[:4], y[:4]))
    after = inference.state_dict()
    for name in ("particles", "buffers", "optimizer"):
        same(after[name], before[name])
    assert math.isfinite(inference.step(X[:4], Y[:4]))
    assert inference.diagnostics()["faults"].tolist() == [1] * 5


def test_an_overflow_in_the_optimiser_of_all_particles():
    """The learning rate is too large for everyone, which shows after the step only."""
    for policy in ("raise", "skip"):
        inference = make(nan=policy)
        inference.run(2, X, Y, progress_bar=False)
        before = inference.state_dict()
        (one,) = inference._stepper.optimizers(inference._particles)
        one.param_groups[0]["lr"] = math.inf
        if policy == "raise":
            with pytest.raises(NumericalError, match=r"the optimiser's step made 'net.weight'"):
                inference.step(X, Y)
        else:
            with pytest.warns(UserWarning, match=r"the optimiser's step made 'net.weight'"):
                inference.step(X, Y)
        one.param_groups[0]["lr"] = 0.01
        after = inference.state_dict()
        for name in ("particles", "buffers", "optimizer"):
            same(after[name], before[name])


def test_a_first_step_that_fails_in_the_optimiser_leaves_no_state():
    for optim in ("Pyro Adam", "site by site"):
        inference = make(optim=optim)
        inference.optim.pt_optim_args = {"lr": math.inf}
        if optim == "site by site":
            inference.optim.pt_optim_args = lambda name: {"lr": math.inf}
            inference.optim.pt_optim_args_argc = 1
        inference.setup(X, Y)
        before = inference.get_unconstrained()
        with pytest.raises(NumericalError, match="the optimiser's step made"):
            inference.step(X, Y)
        same(inference.get_unconstrained(), before)
        made = inference._stepper.optimizers(inference._particles)
        assert made
        assert not any(one.state for one in made)


def test_reset_starts_near_another_with_its_state():
    inference = started("weights", nan="reset")
    poison(inference)
    spread = {n: v[OTHERS].std(0) for n, v in inference.get_unconstrained().items()}
    with pytest.warns(UserWarning, match=r"particles \[2\] were drawn again near others"):
        inference.step(X, Y)
    rows = states(inference, slice(None))
    donors = [
        index
        for index in OTHERS
        if all(torch.equal(v[index], v[BROKEN]) for n, v in rows.items() if " " in n)
    ]
    assert len(donors) == 1
    for name, value in inference.get_unconstrained().items():
        moved = (value[BROKEN] - value[donors[0]]).abs()
        assert (moved > 0).all()
        assert (moved < 1.0 * spread[name]).all()  # ten standard deviations of the jitter
    for buffer in inference._buffers.values():
        assert torch.equal(buffer[BROKEN], buffer[donors[0]])


def test_redrawn_particles_differ_where_only_one_is_left():
    particles = {"a": torch.tensor([[0.0], [3.0], [4.0]])}
    assert redraw(particles, [], {}, [1, 2], seed=0)
    values = particles["a"][:, 0].tolist()
    assert len(set(values)) == 3
    assert max(map(abs, values)) < 0.02
    assert not redraw(particles, [], {}, [0, 1, 2], seed=0)


@pytest.mark.parametrize("pulls", [False, True])
def test_shared_parameters_wait_only_if_their_gradient_is_broken(pulls):
    def run(target):
        pyro.clear_param_store()
        shared.pulls = pulls
        inference = ParticleInference(
            shared, pyro.optim.Adam({"lr": 0.1}), 4, kernel=RBF(Weights()), seed=0, nan="skip"
        )
        inference.run(2, X, Y, progress_bar=False)
        before = pyro.param("bias").item()
        if target:
            shared.target = inference.get_samples()["weight"][1, 0].item()
        inference.step(X, Y)
        shared.target, shared.pulls = math.inf, False
        return inference, before, pyro.param("bias").item()

    clean, start, moved = run(False)
    with pytest.warns(UserWarning, match=r"log joint of particle 1 is nan"):
        faulty, before, after = run(True)
    assert before == start != moved
    assert after == (start if pulls else moved)
    rows = [0, 2, 3]
    same(states(faulty, rows), {n: v for n, v in states(clean, rows).items() if "bias" not in n})
    faulty.step(X, Y)
    assert pyro.param("bias").item() != after


def test_a_fault_of_a_shared_parameter_alone():
    def model(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
        bias = pyro.param("bias", torch.zeros(()).double())
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ weight + (bias * 0).sqrt(), 1.0), obs=y)

    for policy in ("raise", "skip"):
        pyro.clear_param_store()
        inference = ParticleInference(
            model, pyro.optim.Adam({"lr": 0.1}), 4, transport=Ensemble(), seed=0, nan=policy
        )
        with pytest.raises(NumericalError, match="force on 'bias', which all particles share"):
            inference.step(X, Y)  # no start is allowed, whatever the policy


def test_a_warning_is_said_once_and_counted():
    inference = started("ensemble", nan="skip", diagnostics_every=2)
    poison(inference)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        inference.run(7, X, Y, progress_bar=False)
    assert len(said) == 1
    assert re.search(r"diagnostics\(\)\['faults'\] counts", str(said[0].message))
    assert inference.diagnostics()["faults"].tolist() == [0, 0, 7, 0, 0]
    other = make("ensemble", nan="skip")
    other.load_state_dict(inference.state_dict())
    other.setup(X, Y)
    assert other._faults.count.tolist() == [0, 0, 7, 0, 0]


def test_a_start_that_is_not_finite_is_refused_by_every_policy():
    y = Y.clone()
    y[0] = math.inf
    for policy in ("raise", "skip", "reset"):
        with pytest.raises(NumericalError, match=r"at the start|not finite"):
            make(nan=policy).step(X, y)


# -------------------------------------------------------------------- without waiting


@pytest.mark.parametrize("rule", RULES)
def test_masked_steps_take_the_same_steps(rule):
    """Without a fault what a GPU does is, bit for bit, what a CPU does."""
    eager, masked = (started(rule, deferred=deferred) for deferred in (False, True))
    same(masked.state_dict(), eager.state_dict())


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("rule", ["ensemble", "weights", "input gradients", "outputs"])
def test_a_masked_step_skips_the_particle(rule, how):
    eager, masked = (started(rule, nan="skip", deferred=deferred) for deferred in (False, True))
    for inference in (eager, masked):
        poison(inference, how)
        with quiet():
            losses = inference.run(4, X, Y, progress_bar=False)
        assert losses.isfinite().all()
    same(masked.state_dict(), eager.state_dict())
    assert masked.diagnostics()["faults"].tolist() == [0, 0, 4, 0, 0]


@pytest.mark.parametrize("rule", ["input gradients", "Stein", "Stein, outputs"])
def test_another_stands_in_where_shapes_are_fixed(rule):
    """The others move, stay finite, and the broken particle does not."""
    inference = started(rule, nan="skip", deferred=True)
    how = "force" if rule == "Stein" else "representation"
    if rule == "Stein, outputs":
        how = "loss"
    poison(inference, how)
    before = states(inference, slice(None))
    with pytest.warns(UserWarning, match="at step 3 .* of particle 2"):
        inference.run(3, X, Y, progress_bar=False)
    after = states(inference, slice(None))
    for name, value in before.items():
        if name == "norm.num_batches_tracked":
            continue
        assert torch.equal(after[name][BROKEN], value[BROKEN]), name
        assert after[name].isfinite().all()
    assert (after["net.weight"][OTHERS] != before["net.weight"][OTHERS]).all()


def test_a_traced_step_tells_who_could_not_be_compared(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda graph, **options: graph)
    traced = make("input gradients", nan="skip", compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about itself
        traced.model.how = "representation"
        traced.run(3, X, Y, progress_bar=False)
    assert any(graph is not None for graph in traced._compiled._graphs.values())
    broken = torch.tensor([True, True, False, True, True])
    forces = traced._forces((X, Y), {}, False)
    assert forces.compared.all()
    before = states(traced, slice(None))
    monkeypatch.setattr(
        type(traced._compiled), "__call__", lambda self, *a, **k: replace(forces, compared=broken)
    )
    with pytest.warns(UserWarning, match="what the kernel compares of particle 2"):
        traced.step(X, Y)
    after = states(traced, slice(None))
    assert torch.equal(after["net.weight"][BROKEN], before["net.weight"][BROKEN])
    assert (after["net.weight"][OTHERS] != before["net.weight"][OTHERS]).all()


def test_a_fault_found_late_raises_with_the_particles_of_its_step():
    """Ten steps in a row that nobody reads: nothing moves after the fault."""
    inference = started("input gradients", deferred=True)
    before = states(inference, slice(None))
    poison(inference)
    with pytest.raises(
        NumericalError, match=r"at step 3 the log joint of particle 2 is nan .*'fault'"
    ):
        inference.run(10, X, Y, progress_bar=False)
    assert inference._step == 3
    same(states(inference, slice(None)), before)
    inference.model.target = inference.model.target + 1
    assert math.isfinite(inference.step(X, Y))
    assert inference._step == 4


@pytest.mark.parametrize(
    "ask",
    [
        lambda inference: inference.get_samples(),
        lambda inference: inference.state_dict(),
        lambda inference: inference.diagnostics(),
        lambda inference: inference.step(X, Y),
        lambda inference: inference.run(1, X, Y, progress_bar=False),
        lambda inference: inference.fit([(X, Y)], 1, progress_bar=False),
    ],
)
def test_whoever_asks_hears_of_it(ask):
    inference = started(deferred=True)
    poison(inference)
    inference._update((X, Y), {})  # as a loop does it, without reading the loss
    with pytest.raises(NumericalError, match="at step 3"):
        ask(inference)


def test_a_long_loop_reads_from_time_to_time():
    inference = started(deferred=True, diagnostics_every=4)
    poison(inference)

    def loop():
        for _ in range(4):
            inference._update((X, Y), {})

    with pytest.raises(NumericalError, match="at step 3"):
        loop()


def test_a_fault_found_late_is_not_saved(tmp_path):
    inference = make("weights")
    inference._faults.deferred = True
    data = [(X, Y)] * 3
    inference.fit(data, 1, progress_bar=False, checkpoint=tmp_path)
    before = inference.state_dict()
    poison(inference)
    with pytest.raises(NumericalError):
        inference.fit(data, 2, progress_bar=False, checkpoint=tmp_path, checkpoint_every=1)
    fresh = make("weights")
    fresh.model.target = torch.full((1, 3), math.inf, dtype=torch.float64)
    fresh.fit(data, 1, progress_bar=False, checkpoint=tmp_path)
    same(fresh.state_dict()["particles"], before["particles"])


def test_reset_found_late_draws_again():
    inference = started("weights", nan="reset", deferred=True)
    poison(inference)
    before = inference.get_unconstrained()
    with pytest.warns(UserWarning, match=r"particles \[2\] were drawn again"):
        inference.run(4, X, Y, progress_bar=False)
    after = inference.get_unconstrained()
    assert (after["net.weight"][BROKEN] != before["net.weight"][BROKEN]).all()
    assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_nothing_in_a_masked_step_asks_for_a_number(optimizer):
    """On the meta device there are no numbers, so asking for one raises."""
    meta = torch.device("meta")
    particles = {"a": torch.empty(4, 2, 3, device=meta, requires_grad=True)}
    trained = {"b": torch.empty(5, device=meta, requires_grad=True)}
    everything = {**particles, **trained}
    one = optimizer(list(everything.values()), lr=0.1)
    faults, before = Faults("raise", 4), Before()
    faults.count = faults.count.to(meta)
    for step in range(3):
        gradients = clipped({"a": torch.empty(4, 2, 3, device=meta)}, 1.0)
        log_joint = torch.empty(4, device=meta)
        r = torch.empty(4, 5, 6, device=meta)
        found = repel_finite(
            WGD(), RBF(Weights()), r, slice(None), step, finite=finite_particles(r), static=True
        )
        shared_gradients = {"b": torch.empty(5, device=meta)}
        broken = broken_forces(log_joint, found.finite, gradients, shared_gradients)
        for name, tensor in everything.items():
            tensor.grad = {**gradients, **shared_gradients}[name]
        before.take(everything, [one])
        one.step()
        broken = broken.joined(broken_values(particles, trained))
        halted = faults.note(broken, log_joint, step)
        before.restore_broken(everything, broken.rows | halted, {"b": broken.of_shared("b")})
    assert faults.count.device == meta


# -------------------------------------------------------------------- parts


def test_clip_norm_bounds_what_the_optimiser_gets():
    """Plain SGD with rate 1: what a particle moves is what the optimiser got."""
    moves = {}
    for bound in (None, 0.05, 1e9):
        inference = ParticleInference(
            Poisoned(),
            lambda params: torch.optim.SGD(params, lr=1.0),
            5,
            kernel=RBF(Weights()),
            num_data=6,
            clip_norm=bound,
            seed=1,
        )
        inference.setup(X, Y)
        before = inference.get_unconstrained()
        inference.step(X, Y)
        after = inference.get_unconstrained()
        moves[bound] = torch.cat([(after[n] - before[n]).flatten(1) for n in before], 1)
    assert torch.equal(moves[None], moves[1e9])
    norms = moves[None].norm(dim=1)
    assert (norms > 0.05).any()
    for free, bounded in zip(moves[None], moves[0.05], strict=True):
        wanted = free * min(1.0, 0.05 / free.norm().item())
        torch.testing.assert_close(bounded, wanted, rtol=1e-9, atol=1e-12)


def test_clip_norm_bounds_shared_parameters_together():
    inference = ParticleInference(
        shared,
        lambda params: torch.optim.SGD(params, lr=1.0),
        4,
        transport=Ensemble(),
        clip_norm=1e-3,
        seed=0,
    )
    inference.step(X, Y)
    assert abs(pyro.param("bias").item()) == pytest.approx(1e-3)


def test_a_zero_gradient_is_not_clipped_to_nan():
    zero = {"a": torch.zeros(2, 3)}
    assert torch.equal(clipped(zero, 1.0)["a"], zero["a"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_finite_numbers_are_finite(dtype):
    """A sum in half precision would overflow."""
    rows = torch.full((2, 4000), 60.0, dtype=dtype)
    assert finite_rows([rows]).all()
    for bad in (math.nan, math.inf, -math.inf):
        broken = rows.clone()
        broken[1, 17] = bad
        assert finite_rows([broken]).tolist() == [[True, False]]


def test_opposite_infinities_are_found():
    assert not finite_rows([torch.tensor([[math.inf, -math.inf]])]).any()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rule", ["weights", "whitened", "per site", "raw input gradients"])
def test_no_estimator_fails_where_no_particle_is_finite(rule, static):
    """Inverses and eigenvectors of NaN raise, or do not end."""
    transport, kernel = RULES[rule]
    r = torch.full((4, 3, 2), math.nan, dtype=torch.float64)
    found = repel_finite(
        transport, kernel, r, slice(None), 0, finite=finite_particles(r), static=static
    )
    assert not found.finite.any()
    assert found.velocity.isfinite().all()


def test_the_weight_of_a_particle_that_was_left_out_is_zero():
    r = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    broken = r.clone()
    broken[BROKEN, 1] = math.nan
    kernel, scores = RBF(Outputs()), torch.ones_like(r)
    options = {"finite": finite_particles(broken), "scores": scores}
    found = repel_finite(SVGD(), kernel, broken, slice(None), 0, **options)
    fewer = SVGD().repel(kernel, r[OTHERS], scores=scores[OTHERS])
    assert found.weight[BROKEN] == 0
    assert torch.equal(found.weight[OTHERS], fewer.weight)
    for name in ("velocity", "driving"):
        assert torch.equal(getattr(found, name)[OTHERS], getattr(fewer, name))
        assert (getattr(found, name)[BROKEN] == 0).all()


def test_a_stand_in_counts_twice():
    r = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    doubled = r.clone()
    doubled[BROKEN] = r[0]
    broken = r.clone()
    broken[BROKEN] = math.inf
    kernel = RBF(Weights())
    found = repel_finite(
        WGD(), kernel, broken, slice(None), 0, finite=finite_particles(broken), static=True
    )
    assert torch.equal(found.velocity, WGD().repel(kernel, doubled).velocity)
    assert found.finite.tolist() == [True, True, False, True, True]
