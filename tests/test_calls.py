"""Calls at random: each ends in a valid step or in a `FordesError`.

``make test`` takes 150 of them, always the same. More, and others each time, with

    FORDES_CALLS=5000 python -m pytest tests/test_calls.py
"""

import collections
import math
import os
import warnings

import pyro
import pyro.distributions as dist
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from pyro.infer.autoguide.initialization import init_to_mean, init_to_sample, init_to_uniform
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_fordes import (
    IMQ,
    RBF,
    SVGD,
    WAG,
    WGD,
    Ensemble,
    Features,
    Fixed,
    FordesError,
    HeatEquation,
    InputGradients,
    Langevin,
    Median,
    Mixture,
    Outputs,
    ParticleInference,
    Weights,
    bayesianize,
    init_to_modules,
    pca_lengthscale,
)
from tests.models import Classifier, Regression

CALLS = int(os.environ.get("FORDES_CALLS", "0"))
OUTCOMES = collections.Counter()

JUNK = [0, -1, 1.5, math.nan, math.inf, -0.0, None, "1", "", True, [], {}, 2**70, 1e308, 1e-308]
JUNK += [
    torch.tensor(1.0),
    torch.zeros(2),
    dist.Normal(0.0, 1.0),
    RBF,
    Weights,
    lambda: 1.0,
    object,
]


def mostly(valid, share=30):
    """One of some valid values, and once in a while anything else."""
    return st.sampled_from(valid * (share * len(JUNK) // len(valid)) + JUNK)


def function(x, y=None):
    """A plain function with a constrained site and a minibatch of its own."""
    scale = pyro.sample("scale", dist.HalfNormal(x.new_ones(())))
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ weight, scale), obs=y)


def mixture(x, y=None):
    """A discrete site, which is summed out."""
    means = pyro.sample("means", dist.Normal(x.new_zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(x.new_ones(2) / 2))
        return pyro.sample("y", dist.Normal(means[k], 1.0), obs=y)


def network(hidden):
    return nn.Sequential(nn.Linear(3, 4), hidden(), nn.Linear(4, 1))


MODELS = {
    "function": lambda: function,
    "mixture": lambda: mixture,
    "linear": lambda: Regression(bayesianize(nn.Linear(3, 1))),
    "dropout": lambda: Regression(bayesianize(network(lambda: nn.Dropout(0.5)))),
    "BatchNorm": lambda: Regression(bayesianize(network(lambda: nn.BatchNorm1d(4)))),
    "classifier": lambda: Classifier(bayesianize(nn.Linear(3, 2))),
    "double": lambda: Regression(bayesianize(nn.Linear(3, 1).double())),
    "without a prior": lambda: Regression(nn.Linear(3, 1)),
    "class": lambda: Regression,
    "text": lambda: "model",
}

OPTIMS = [
    lambda: pyro.optim.Adam({"lr": 0.01}),
    lambda: pyro.optim.ClippedAdam({"lr": 0.01}),
    lambda: pyro.optim.Adam(lambda name: {"lr": 0.01}),
    lambda: pyro.optim.SGD({"lr": 1e30}),
    lambda: lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    lambda: lambda params: torch.optim.RMSprop(params),
    lambda: lambda params: WAG(params, lr=1e-3),
    lambda: lambda params: Langevin(params, lr=1e-3),
    lambda: lambda params: torch.optim.LBFGS(params),
    lambda: lambda params: None,
    lambda: torch.optim.SGD,
    lambda: "adam",
]


@st.composite
def bandwidths(draw):
    kind = draw(mostly([Median, Fixed, HeatEquation, "junk"]))
    if kind is Median:
        return Median(
            per=draw(mostly(["point", "particle"])),
            factor=draw(mostly([0.5, 1, lambda step: 1.0 + step, lambda step: -1.0])),
            interpolation=draw(mostly(["midpoint", "lower", "higher"])),
            diagonal=draw(st.booleans()),
            log1p=draw(st.booleans()),
        )
    if kind is Fixed:
        return Fixed(draw(mostly([0.5, 1e-6, 1e6, lambda step: math.nan])))
    return HeatEquation() if kind is HeatEquation else kind


@st.composite
def spaces(draw):
    kind = draw(mostly(["weights", "gradients", "gradients", "outputs", "features"]))
    if kind == "weights":
        group = draw(mostly(["joint", "site", "coordinate"]))
        return Weights(sites=draw(mostly([None, None, ["weight"], ["nothing"]])), group=group)
    if kind == "gradients":
        return InputGradients(
            draw(mostly([0, "x", "x", "y", 5, -1])),
            output=draw(mostly([None, None, "logits", "net", "y", lambda trace: 1.0])),
            normalize=draw(mostly([True, False])),
            lengthscale=draw(mostly([None, None, pca_lengthscale(torch.eye(3)[[0, 1, 2, 0]])])),
        )
    if kind == "outputs":
        return Outputs(draw(mostly([None, "y", "net"])), group=draw(mostly(["joint", "point"])))
    if kind == "features":
        return Features(draw(mostly(["net", "net.0", "nowhere"])))
    return kind


@st.composite
def kernels(draw):
    kind = draw(mostly([RBF, RBF, IMQ, Mixture]))
    space = draw(spaces())
    if kind is Mixture:
        return Mixture([RBF(space, draw(bandwidths())), IMQ(space)], draw(mostly([None, [1, 2]])))
    return kind(space, draw(bandwidths())) if kind in (RBF, IMQ) else kind


@st.composite
def transports(draw):
    kind = draw(mostly([WGD, WGD, SVGD, Ensemble]))
    if kind is SVGD:
        whiten = draw(mostly([None, None, "diag", "full"]))
        return SVGD(whiten, calibrate=draw(st.booleans()))
    if kind is not WGD:
        return kind() if kind is Ensemble else kind
    return WGD(
        draw(mostly(["kde", "blob", "sge", "ssge"])),
        ridge=draw(mostly([0.01, 0, 1e-12])),
        whiten=draw(mostly([None, None, "diag", "full"])),
        calibrate=draw(mostly([False, False, True])),
    )


OPTIONS = {
    "kernel": kernels(),
    "transport": transports(),
    "init_loc_fn": mostly(
        [init_to_sample, init_to_uniform, init_to_mean, init_to_modules(lambda: nn.Linear(3, 1))]
    ),
    "repulsion_scale": mostly([0.0, 1, 1e3, lambda step: 1.0 / (1 + step), lambda step: None]),
    "repulsion_every": mostly([1, 2, 3]),
    "temperature": mostly([1.0, 0.1, lambda step: 1.0, lambda step: math.nan]),
    "num_data": mostly([None, 6, 1000]),
    "vectorize": mostly(["auto", "vmap", "loop"]),
    "chunk_size": mostly([None, 1, 2, 100]),
    "randomness": mostly(["different", "same"]),
    "compile": mostly([False]).filter(lambda value: value is not True),
    "max_plate_nesting": mostly([None, 0, 1, 2]),
    "seed": mostly([0, 1, None, 2**40]),
    "diagnostics_every": mostly([1, 2, 50]),
    "nan": mostly(["raise", "skip", "reset"]),
    "clip_norm": mostly([None, 1.0, 1e-3, 1e6]),
}


@st.composite
def tensors(draw, shapes, dtypes):
    shape, dtype = draw(st.sampled_from(shapes)), draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 3)))
    value = torch.randn(shape, generator=generator)
    if not value.numel():
        return value.to(dtype)
    spoil = draw(st.sampled_from([None] * 12 + [math.nan, math.inf, 1e30, 0.0]))
    if spoil is not None:
        value.view(-1)[draw(st.integers(0, value.numel() - 1))] = spoil
    return (value > 0).to(dtype) if dtype in (torch.int64, torch.bool) else value.to(dtype)


FLOATS = [torch.float32] * 50 + [torch.float64, torch.float64, torch.float16, torch.bfloat16]
INPUTS = tensors(
    [(6, 3)] * 40 + [(1, 3), (2, 3), (6, 1), (6, 2), (6,), (), (0, 3), (6, 3, 1)],
    [*FLOATS, torch.int64, torch.complex64],
)
TARGETS = tensors(
    [(6,)] * 40 + [(6, 1), (5,), (1,), (), (0,)],
    [*FLOATS, torch.int64, torch.int64, torch.int64, torch.bool],
)


LASTS = (False, True)


def loaders(x, y):
    """What could be given to `fit`."""
    made = [[(x, y)], [(x, y)] * 2, [{"x": x, "y": y}], [x], [(x,)], [(x, y, y)], [], None, 3]
    made += [iter([(x, y)]), [{"z": x}], [{1: x}], "loader", [None], [[x, y]], {"a": x}, x]
    if x.dim() and y.dim() and len(x) == len(y) > 0:
        made += [DataLoader(TensorDataset(x, y), batch_size=4, drop_last=last) for last in LASTS]
        made += [DataLoader(TensorDataset(x, y), batch_size=6)] * 3
    return made


def act(inference, draw, x, y):
    """One call of a method; returns losses, if it gives some."""
    kind = draw(st.sampled_from(["step"] * 6 + ["run"] * 2 + ["fit"] * 4 + ["other"] * 2))
    if kind == "step":
        given = draw(st.sampled_from([((x, y), {})] * 8 + [((x,), {"y": y}), ((x,), {}), ((), {})]))
        return [inference.step(*given[0], **given[1])]
    if kind == "run":
        return inference.run(draw(mostly([1, 2, 3])), x, y, progress_bar=False).tolist()
    if kind == "fit":
        loader = draw(st.sampled_from(loaders(x, y)))
        return inference.fit(loader, draw(mostly([1, 2])), progress_bar=False).tolist()
    method = draw(st.sampled_from(["evaluate_loss", "scores", "log_likelihood", "representation"]))
    getattr(inference, method)(x, y)
    inference.get_samples(draw(mostly([None, 1, 5])))
    return []


def profile(function):
    """The same few examples each time, or many others."""
    options = {"max_examples": CALLS} if CALLS else {"max_examples": 150, "derandomize": True}
    return settings(
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # a smaller example would take minutes to find
        **options,
    )(function)


@profile
@given(st.data())
def test_every_call_ends_in_a_step_or_an_error_of_ours(data):
    draw = data.draw
    pyro.clear_param_store()
    names = draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=5, unique=True))
    x, y = draw(INPUTS), draw(TARGETS)
    name = draw(st.sampled_from(list(MODELS)[:7] * 4 + list(MODELS)[7:]))
    if name == "classifier" and draw(st.integers(0, 7)):
        y = (y > 0) if y.is_floating_point() else y
        y = y.long()
    if name == "double" and draw(st.integers(0, 7)):
        x, y = x.double(), y.double()
    before = pyro.infer.util.is_validation_enabled()
    losses = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            options = {option: draw(OPTIONS[option]) for option in names}
            optim = draw(st.sampled_from(OPTIMS[:8] * 4 + OPTIMS[8:]))()
            count = draw(mostly([1, 2, 3, 5], share=60))
            inference = ParticleInference(MODELS[name](), optim, count, **options)
            losses = act(inference, draw, x, y)
        except FordesError as error:
            OUTCOMES[type(error).__name__] += 1
            said = str(error)
        finally:
            assert pyro.infer.util.is_validation_enabled() == before
        if losses is None:
            assert len(said) > 20
            return
        OUTCOMES["valid"] += 1
        particles = inference.get_unconstrained()
        assert all(value.isfinite().all() for value in particles.values())
        assert inference._step == len(losses)
        if options.get("nan") not in ("skip", "reset"):
            assert all(map(math.isfinite, losses))


def test_the_calls_are_worth_something():
    """Runs after the other: neither all calls nor hardly any may fail."""
    total = sum(OUTCOMES.values())
    if total > 100:
        assert OUTCOMES["valid"] > total / 5, OUTCOMES
        assert OUTCOMES["valid"] < total * 4 / 5, OUTCOMES
    print(dict(OUTCOMES))
