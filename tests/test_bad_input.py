"""Bad input of every kind: the right error, naming the culprit, what was got and what was wanted.

A new case is a line in a table: a function that does the wrong thing, the error, and a pattern.
"""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_mean, init_to_value
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_fordes import (
    IMQ,
    RBF,
    SVGD,
    WGD,
    ArgumentError,
    Ensemble,
    Fixed,
    FordesError,
    InputGradients,
    Median,
    Mixture,
    ModelError,
    NumericalError,
    Outputs,
    ParticleInference,
    StateError,
    Weights,
    bayesianize,
    init_to_modules,
    pca_lengthscale,
    to_arviz,
    tuned_lengthscale,
)
from tests import bad_runs

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0.1, -0.4, 1.0, 0.3, -1.2, 0.6])


class Regression(PyroModule):
    """A linear network with a noise scale."""

    def __init__(self, features=3):
        super().__init__()
        self.net = bayesianize(nn.Linear(features, 1))

    def forward(self, x, y=None):
        mean = pyro.deterministic("mean", self.net(x).squeeze(-1))
        pyro.deterministic("constant", torch.ones_like(x[:, 0]))
        sigma = pyro.sample("sigma", dist.LogNormal(x.new_zeros(()), 0.5))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def location(y):
    """One latent number and some data."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def sgd(params):
    return torch.optim.SGD(params, lr=1e-3)


def make(model=location, optim=sgd, num_particles=3, **options):
    options.setdefault("kernel", RBF(Weights()))
    return ParticleInference(model, optim, num_particles, seed=0, **options)


def start(model, *args, **options):
    """What the first call of a user does."""
    return make(model, **options).step(*args)


def gradients(*args, model=None, data=(X, Y), **options):
    """A first step with input gradients of the regression."""
    kernel = RBF(InputGradients(*args, **options))
    return start(Regression() if model is None else model, *data, kernel=kernel)


# -------------------------------------------------------------------- models


def discrete(y):
    pyro.sample("k", dist.Poisson(0.5))
    location(y)


def sequential(y):
    pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "sequential"})
    location(y)


def not_broadcasting(y):
    k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3))
    location(y)
    if k == 0:  # a tensor of three values
        pyro.sample("more", dist.Normal(0.0, 1.0))


def all_observed(y):
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def without_sites(y):
    return y.sum()


def local(y):
    plate = pyro.plate("data", len(y), subsample_size=2)
    with plate as rows:
        z = pyro.sample("z_local", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])


def on_meta(y):
    pyro.sample("elsewhere", dist.Normal(torch.zeros((), device="meta"), 1.0, validate_args=False))
    location(y)


def two_dtypes(y):
    pyro.sample("wide", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    location(y)


def moving_support(y):
    low = pyro.sample("low", dist.Normal(0.0, 1.0))
    pyro.sample("above", dist.Uniform(low, low + 1.0))
    location(y)


def moving_about_zero(y):
    """The unconstrained zero maps to zero whatever the scale is."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("within", dist.Uniform(-scale, scale))
    location(y)


def penalised(y):
    """Finite for positive particles only."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", z.sqrt())
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def values_in_turn(*values):
    """Initial values of a model with one latent number, particle by particle."""
    left = iter(values)
    return lambda site: torch.tensor(next(left))


MINUS_ONE = torch.tensor(-1.0)


class Growing:
    """The size of a plate is not a function of the arguments' shapes."""

    def __init__(self):
        self.size = 10

    def __call__(self, y):
        self.size += 1
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", self.size, subsample_size=2):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[:2])


class Vanishing:
    """A site of the first run only."""

    def __init__(self):
        self.runs = 0

    def __call__(self, y):
        self.runs += 1
        location(y)
        if self.runs == 1:
            pyro.sample("once", dist.Normal(0.0, 1.0))


def two_outcomes(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
        pyro.sample("other", dist.Normal(x @ w, 2.0), obs=y)


def casting(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x.float() @ w, 1.0), obs=y)


class Reallocating(PyroModule):
    """Replaces a buffer instead of writing to it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def forward(self, y):
        self.total = self.total + 1
        location(y)


def with_nan(tensor, value=math.nan):
    tensor = tensor.clone()
    tensor[1] = value
    return tensor


MODELS = {
    "discrete latent": (lambda: start(discrete, Y), ModelError, "'k' is discrete .Poisson"),
    "discrete latent, enumerated one by one": (
        lambda: start(sequential, Y),
        ModelError,
        "'k' is discrete .Bernoulli",
    ),
    "discrete latent that the model cannot broadcast": (
        lambda: start(not_broadcasting, Y),
        ModelError,
        r"'k'\] could not be summed out in parallel",
    ),
    "no latent site": (
        lambda: start(all_observed, Y),
        ModelError,
        r"no latent site.*sites: data, y|no latent site.*sites: y",
    ),
    "no site at all": (lambda: start(without_sites, Y), ModelError, "no latent site.*sites: none"),
    "local latent in a subsampled plate": (
        lambda: start(local, Y),
        ModelError,
        "'z_local' is local to plate 'data', which subsamples 2 of 6",
    ),
    "latent on another device": (
        lambda: start(on_meta, Y),
        ModelError,
        r"latent site 'z' is .*on cpu, but latent site 'elsewhere' is .*on meta.*\.to\(",
    ),
    "latents of two dtypes": (
        lambda: start(two_dtypes, Y),
        ModelError,
        r"latent site 'z' is .*float32.*latent site 'wide' is .*float64.*\.to\(",
    ),
    "data of another dtype": (
        lambda: start(location, Y.double()),
        ModelError,
        r"model argument 0 is .*float64.*latent site 'z' is .*float32.*\.to\(",
    ),
    "data by keyword of another dtype": (
        lambda: make().step(y=Y.double()),
        ModelError,
        r"model argument 'y' is .*float64",
    ),
    "support that depends on a latent": (
        lambda: start(moving_support, Y),
        ModelError,
        "support of site 'above' changes",
    ),
    "support about zero that depends on a latent": (
        lambda: start(moving_about_zero, Y),
        ModelError,
        "support of site 'within' changes",
    ),
    "plate that grows": (
        lambda: start(Growing(), Y),
        ModelError,
        r"plate 'rows' has size 1\d and subsample size 2, but had 11 and 2",
    ),
    "site that vanishes": (
        lambda: start(Vanishing(), Y),
        ModelError,
        "'once' was missing when the model was run again",
    ),
    "buffer that is replaced": (
        lambda: start(Reallocating(), Y),
        ModelError,
        r"buffers \['total'\].*copy_",
    ),
    "NaN in the data": (
        lambda: start(location, with_nan(Y)),
        NumericalError,
        "observations of site 'y' have values that are not finite.*mask",
    ),
    "infinity in the data": (
        lambda: start(location, with_nan(Y, math.inf)),
        NumericalError,
        "observations of site 'y' have values that are not finite.*mask",
    ),
    "NaN in the inputs": (
        lambda: start(Regression(), with_nan(X), Y),
        FordesError,
        r"(argument (0|'x')|site 'y').*(nan|not finite)",
    ),
    "factor that is NaN": (
        lambda: start(penalised, Y, init_loc_fn=values_in_turn(1.0, 2.0, -1.0)),
        NumericalError,
        r"at the start the log joint of particle 2 is nan \(not finite at site 'penalty'\)",
    ),
    "value outside a support": (
        lambda: start(Regression(), X, Y, init_loc_fn=init_to_value(values={"sigma": MINUS_ONE})),
        FordesError,
        "'sigma'",
    ),
    "class instead of a model": (
        lambda: start(Regression, X, Y),
        FordesError,
        "model must be .*an instance.*got the class Regression",
    ),
}

STARTS = {
    "init_to_mean": (
        lambda: start(location, Y, init_loc_fn=init_to_mean),
        ModelError,
        "all particles start at the same values.*init_to_sample",
    ),
    "init_to_value": (
        lambda: start(location, Y, init_loc_fn=init_to_value(values={"z": torch.tensor(0.5)})),
        ModelError,
        "all particles start at the same values.*init_to_sample",
    ),
    "init_loc_fn of another shape": (
        lambda: start(location, Y, init_loc_fn=lambda site: torch.randn(6)),
        FordesError,
        r"init_loc_fn gave a \(6,\) tensor.*for site 'z'; wanted a tensor of shape \(\)",
    ),
    "init_loc_fn that returns a string": (
        lambda: start(location, Y, init_loc_fn=lambda site: "zero"),
        FordesError,
        r"init_loc_fn gave 'zero' for site 'z'; wanted a tensor of shape \(\)",
    ),
    "init_loc_fn of the wrong type": (
        lambda: make(init_loc_fn=3),
        ArgumentError,
        "init_loc_fn must be a function of a site.*got int",
    ),
    "one module for all": (
        lambda: init_to_modules(nn.Linear(3, 1)),
        ArgumentError,
        "one nn.Module.*list with one per particle",
    ),
    "init_to_modules of a number": (
        lambda: init_to_modules(3),
        ArgumentError,
        "function or an iterable of networks, got int",
    ),
    "too few modules": (
        lambda: start(
            Regression(), X, Y, init_loc_fn=init_to_modules([nn.Linear(3, 1) for _ in range(2)])
        ),
        ArgumentError,
        "got 2 networks, too few for particle 3",
    ),
    "factory of something else": (
        lambda: start(Regression(), X, Y, init_loc_fn=init_to_modules(lambda: "net")),
        ArgumentError,
        "needs nn.Modules or state dicts, got str for particle 0",
    ),
    "modules of another shape": (
        lambda: start(Regression(), X, Y, init_loc_fn=init_to_modules(lambda: nn.Linear(4, 1))),
        ArgumentError,
        r"cannot match.*weight, bias.*net\.weight.*names or shapes differ",
    ),
    "modules of other names": (
        lambda: start(
            Regression(), X, Y, init_loc_fn=init_to_modules(lambda: nn.Sequential(nn.Linear(3, 1)))
        ),
        ArgumentError,
        r"cannot match.*0\.weight, 0\.bias.*net\.weight.*names or shapes differ",
    ),
}


SPACES = {
    "unknown input name": (
        lambda: gradients("z"),
        ArgumentError,
        "no argument 'z' in this call; it got x, y",
    ),
    "unknown input position": (
        lambda: gradients(5),
        ArgumentError,
        "no argument 5 in this call; it got x, y",
    ),
    "negative input position": (lambda: gradients(-1), ArgumentError, "no argument -1.*got x, y"),
    "input of the wrong type": (
        lambda: InputGradients(1.5),
        ArgumentError,
        r"input=\.\.\.\) must be the name or position.*got 1\.5",
    ),
    "integer input": (
        lambda: gradients("x", data=(torch.ones(6, 3, dtype=torch.long), Y), model=casting),
        ArgumentError,
        "'x', which is .*int64.*floating-point.*Cast it",
    ),
    "output of the wrong type": (
        lambda: InputGradients("x", output=3),
        ArgumentError,
        r"InputGradients\(output=\.\.\.\).*got 3",
    ),
    "scalar input": (
        lambda: gradients("x", model=lambda x, y: location(y), data=(torch.tensor(1.0), Y)),
        ArgumentError,
        r"'x', which is a \(\) tensor.*tensor \(point",
    ),
    "input that is no tensor": (
        lambda: gradients("x", model=lambda x, y: location(y), data=("text", Y)),
        ArgumentError,
        "'x', which is str.*floating-point tensor",
    ),
    "output that does not depend on the input": (
        lambda: gradients("x", output="constant"),
        ModelError,
        "'constant' does not depend on the input 'x'",
    ),
    "output that is detached": (
        lambda: gradients("x", output=lambda trace: trace.nodes["mean"]["value"].detach()),
        ModelError,
        "does not depend on the input 'x'",
    ),
    "unknown output": (
        lambda: gradients("x", output="logit"),
        ArgumentError,
        r"output='logit'.*neither a site.*mean.*submodule \(net",
    ),
    "unknown output of a function": (
        lambda: gradients("x", output="logit", model=two_outcomes),
        ArgumentError,
        r"output='logit'.*\(.*w.*other\).*no nn.Module",
    ),
    "function that returns no tensor": (
        lambda: gradients("x", output=lambda trace: 3.0),
        ModelError,
        r"gave float; wanted a tensor",
    ),
    "function that returns a scalar": (
        lambda: gradients("x", output=lambda trace: trace.nodes["mean"]["value"].sum()),
        ModelError,
        r"gave a \(\) tensor.*wanted a tensor \(point",
    ),
    "output with other rows": (
        lambda: gradients("x", output=lambda trace: trace.nodes["mean"]["value"][:4]),
        ModelError,
        "has 4 points, but the input has 6 rows",
    ),
    "two observed sites": (
        lambda: gradients("x", model=two_outcomes),
        ArgumentError,
        r"only observed site, but it has 2 \(y, other\).*output=",
    ),
    "no observation": (
        lambda: gradients("x", data=(X,)),
        FordesError,
        r"observ.*\(are observations passed|'y'",
    ),
    "normalised single feature": (
        lambda: gradients("x", model=Regression(1), data=(X[:, :1], Y)),
        ArgumentError,
        "'x' has a single feature.*normalize=False",
    ),
    "lengthscale of other features": (
        lambda: gradients("x", lengthscale=pca_lengthscale(torch.randn(9, 5))),
        ArgumentError,
        "fitted to 5 features.*'x' has 3",
    ),
    "lengthscale of the wrong type": (
        lambda: InputGradients("x", lengthscale=2.0),
        ArgumentError,
        r"lengthscale=\.\.\.\) must come from.*got float",
    ),
    "eps 0": (
        lambda: InputGradients("x", eps=0.0),
        ArgumentError,
        r"InputGradients\(eps=\.\.\.\).*above 0.*got 0",
    ),
    "unknown site": (
        lambda: start(Regression(), X, Y, kernel=RBF(Weights(sites=["weight"]))),
        ArgumentError,
        r"got \['weight'\].*latent sites are \[.*net\.weight",
    ),
    "no site": (
        lambda: start(Regression(), X, Y, kernel=RBF(Weights(sites=[]))),
        ArgumentError,
        r"got no site.*latent sites are \[.*net\.weight",
    ),
    "sites as a string": (
        lambda: Weights(sites="abc"),
        ArgumentError,
        r"list of site names, got the string 'abc'; write \['abc'\]",
    ),
    "unknown group": (
        lambda: Weights(group="layer"),
        ArgumentError,
        r"Weights\(group=\.\.\.\) must be one of 'joint', 'site', 'coordinate'; got 'layer'",
    ),
}

PARTS = {
    "model that is no function": (
        lambda: make(model=3),
        ArgumentError,
        "model must be a Pyro model.*got int",
    ),
    "num_particles 0": (
        lambda: make(num_particles=0),
        ArgumentError,
        "num_particles must be an integer of at least 1, got 0",
    ),
    "num_particles negative": (
        lambda: make(num_particles=-2),
        ArgumentError,
        "num_particles must be.*got -2",
    ),
    "num_particles bool": (
        lambda: make(num_particles=True),
        ArgumentError,
        "num_particles must be.*got True",
    ),
    "num_particles float": (
        lambda: make(num_particles=3.0),
        ArgumentError,
        r"num_particles must be.*got 3\.0",
    ),
    "num_particles tensor": (
        lambda: make(num_particles=torch.tensor(3)),
        ArgumentError,
        r"num_particles must be.*got tensor\(3\)",
    ),
    "kernel that is a space": (
        lambda: make(kernel=Weights()),
        ArgumentError,
        r"kernel must be a base kernel such as RBF\(Weights\(\)\), got Weights",
    ),
    "kernel class": (
        lambda: make(kernel=RBF),
        ArgumentError,
        r"kernel got the class RBF; write RBF\(\.\.\.\)",
    ),
    "transport string": (
        lambda: make(transport="svgd"),
        ArgumentError,
        r"transport must be an update rule such as WGD\(\).*got 'svgd'",
    ),
    "transport class": (
        lambda: make(transport=WGD),
        ArgumentError,
        r"transport got the class WGD; write WGD\(\.\.\.\)",
    ),
    "space class": (
        lambda: RBF(Weights),
        ArgumentError,
        r"RBF\(space=\.\.\.\) got the class Weights; write Weights\(\.\.\.\)",
    ),
    "bandwidth class": (
        lambda: RBF(Weights(), Median),
        ArgumentError,
        r"RBF\(bandwidth=\.\.\.\).*(got .*Median|class Median)",
    ),
    "space string": (
        lambda: IMQ("weights"),
        ArgumentError,
        r"IMQ\(space=\.\.\.\) must be a space.*got 'weights'",
    ),
    "bandwidth number": (
        lambda: RBF(Weights(), 0.5),
        ArgumentError,
        r"RBF\(bandwidth=\.\.\.\) must be a rule such as Median\(\).*got 0\.5",
    ),
    "IMQ exponent": (
        lambda: IMQ(Weights(), beta=0.5),
        ArgumentError,
        r"IMQ\(beta=\.\.\.\) must be between -1 and 0, got 0\.5",
    ),
    "unknown estimator": (
        lambda: WGD("stein"),
        ArgumentError,
        r"must be one of 'kde'.*; got 'stein'",
    ),
    "unknown whitening": (
        lambda: WGD(whiten="pca"),
        ArgumentError,
        r"WGD\(whiten=\.\.\.\).*got 'pca'",
    ),
    "SVGD, unknown whitening": (
        lambda: SVGD(whiten="pca"),
        ArgumentError,
        r"SVGD\(whiten=\.\.\.\).*got 'pca'",
    ),
    "SVGD, white outputs": (
        lambda: start(Regression(), X, Y, kernel=RBF(Outputs()), transport=SVGD(whiten="full")),
        ArgumentError,
        r"SVGD\(whiten=.*weight space only, got Outputs",
    ),
    "SVGD on input gradients": (
        lambda: start(Regression(), X, Y, kernel=RBF(InputGradients("x")), transport=SVGD()),
        ArgumentError,
        r"SVGD\(\) needs the log likelihood .* not in InputGradients as given; use one of these",
    ),
    "Median per": (
        lambda: Median(per="row"),
        ArgumentError,
        r"Median\(per=\.\.\.\) must be one of 'point', 'particle'; got 'row'",
    ),
    "Median interpolation": (
        lambda: Median(interpolation="linear"),
        ArgumentError,
        r"Median\(interpolation=\.\.\.\) must be one of 'midpoint'.*; got 'linear'",
    ),
    "Mixture of nothing": (
        lambda: Mixture([]),
        ArgumentError,
        r"Mixture\(kernels=\.\.\.\) must be a list of kernels.*got \[\]",
    ),
    "Mixture without a list": (
        lambda: Mixture(RBF(Weights())),
        ArgumentError,
        r"Mixture\(kernels=\.\.\.\) must be a list of kernels.*got RBF\(",
    ),
    "Mixture of a class": (
        lambda: Mixture([RBF(Weights()), IMQ]),
        ArgumentError,
        r"Mixture\(kernels=\.\.\.\)\[1\] got the class IMQ; write IMQ\(\.\.\.\)",
    ),
    "Mixture of spaces": (
        lambda: Mixture([RBF(Weights()), RBF(InputGradients("x"))]),
        ArgumentError,
        r"\[1\] compares particles in InputGradients.*the first kernel in Weights.*the same space",
    ),
    "Mixture weights": (
        lambda: Mixture([RBF(Weights()), IMQ(Weights())], weights=[1.0]),
        ArgumentError,
        r"Mixture\(weights=\.\.\.\) must be a list of 2 numbers, one per kernel, got \[1\.0\]",
    ),
    "Mixture weight of zero": (
        lambda: Mixture([RBF(Weights()), IMQ(Weights())], weights=[1.0, 0]),
        ArgumentError,
        r"Mixture\(weights=\.\.\.\)\[1\] must be a finite number above 0\.0, got 0",
    ),
    "Median factor 0": (
        lambda: Median(factor=0.0),
        ArgumentError,
        r"Median\(factor=\.\.\.\) must be a finite number above 0.*got 0\.0",
    ),
    "Median factor negative": (
        lambda: Median(factor=-1),
        ArgumentError,
        r"Median\(factor=\.\.\.\).*above 0.*got -1",
    ),
    "Median factor of the step": (
        lambda: start(location, Y, kernel=RBF(Weights(), Median(factor=lambda step: -2.0))),
        ArgumentError,
        r"Median\(factor=\.\.\.\).*above 0.*got -2\.0",
    ),
    "Fixed 0": (
        lambda: Fixed(0),
        ArgumentError,
        r"Fixed\(value=\.\.\.\) must be a finite number above 0.*got 0",
    ),
    "Fixed string": (
        lambda: Fixed("1"),
        ArgumentError,
        r"Fixed\(value=\.\.\.\) must be a number, got '1' \(str\)",
    ),
    "temperature negative": (
        lambda: make(temperature=-1.0),
        ArgumentError,
        r"temperature must be a finite number above 0.*got -1\.0",
    ),
    "temperature 0": (
        lambda: make(temperature=0),
        ArgumentError,
        "temperature must be a finite number above 0.*got 0",
    ),
    "repulsion_scale negative": (
        lambda: make(repulsion_scale=-0.5),
        ArgumentError,
        r"repulsion_scale must be a finite number of at least 0.*got -0\.5",
    ),
    "repulsion_scale string": (
        lambda: make(repulsion_scale="1"),
        ArgumentError,
        r"repulsion_scale must be a number, got '1' \(str\)",
    ),
    "schedule of NaN": (
        lambda: make(repulsion_scale=lambda step: math.nan),
        ArgumentError,
        r"repulsion_scale\(0\) must be a finite number.*got nan",
    ),
    "schedule of NaN later": (
        lambda: make(temperature=lambda step: math.nan if step == 2 else 1.0).run(
            4, Y, progress_bar=False
        ),
        ArgumentError,
        r"temperature\(2\) must be a finite number.*got nan",
    ),
    "schedule of nothing": (
        lambda: make(temperature=lambda step: None),
        ArgumentError,
        r"temperature\(0\) must be a number, got None",
    ),
    "schedule without an argument": (
        lambda: make(temperature=lambda: 1.0),
        ArgumentError,
        "temperature.*function of the step",
    ),
    "num_data 0": (
        lambda: make(num_data=0),
        ArgumentError,
        "num_data must be a finite number above 0.*got 0",
    ),
    "vectorize": (
        lambda: make(vectorize="pmap"),
        ArgumentError,
        "vectorize must be one of 'auto', 'vmap', 'loop'; got 'pmap'",
    ),
    "seed": (
        lambda: ParticleInference(location, sgd, 3, seed=1.5),
        ArgumentError,
        r"seed must be an integer or None, got 1\.5",
    ),
    "diagnostics_every 0": (
        lambda: make(diagnostics_every=0),
        ArgumentError,
        "diagnostics_every must be an integer of at least 1, got 0",
    ),
}


def raising(params):
    raise KeyError("no such option")


OPTIMISERS = {
    "string": (
        lambda: make(optim="adam"),
        ArgumentError,
        "optim must be a pyro.optim optimiser.*got str",
    ),
    "None": (lambda: make(optim=None), ArgumentError, "optim must be a pyro.optim.*got NoneType"),
    "torch instance": (
        lambda: make(optim=torch.optim.Adam([torch.zeros(1, requires_grad=True)])),
        ArgumentError,
        r"optim is a Adam that already has parameters.*pass lambda params: torch\.optim\.Adam",
    ),
    "factory of nonsense": (
        lambda: start(location, Y, optim=lambda params: 3),
        ArgumentError,
        r"optim\(params\) must return a torch\.optim\.Optimizer, got int",
    ),
    "factory that raises": (
        lambda: start(location, Y, optim=raising),
        ArgumentError,
        r"optim\(params\) failed for the sites \['z'\]: KeyError: 'no such option'",
    ),
    "torch class with options missing": (
        lambda: start(location, Y, optim=lambda params: torch.optim.SGD(params, momentum=-1.0)),
        ArgumentError,
        r"optim\(params\) failed.*ValueError: Invalid momentum value: -1\.0",
    ),
    "bad options of a PyroOptim": (
        lambda: start(location, Y, optim=pyro.optim.Adam({"learning_rate": 0.1})),
        ArgumentError,
        r"set up for the sites \['z'\]: TypeError: .*learning_rate",
    ),
    "optimiser that wants a closure": (
        lambda: start(location, Y, optim=lambda params: torch.optim.LBFGS(params)),
        ArgumentError,
        "LBFGS.*closure",
    ),
    "optimiser of Pyro that wants a closure": (
        lambda: start(location, Y, optim=pyro.optim.PyroOptim(torch.optim.LBFGS, {})),
        ArgumentError,
        "LBFGS.*closure",
    ),
    "bad value of a PyroOptim": (
        lambda: start(location, Y, optim=pyro.optim.Adam({"lr": -0.1})),
        ArgumentError,
        r"set up for the sites \['z'\]: ValueError: Invalid learning rate: -0\.1",
    ),
}


def batches(count=2):
    return [(Y,)] * count


LOOPS = {
    "num_steps 0": (
        lambda: make().run(0, Y),
        ArgumentError,
        "num_steps must be an integer of at least 1, got 0",
    ),
    "num_steps float": (
        lambda: make().run(1e3, Y),
        ArgumentError,
        r"num_steps must be an integer of at least 1, got 1000\.0",
    ),
    "num_epochs 0": (
        lambda: make().fit(batches(), 0),
        ArgumentError,
        "num_epochs must be an integer of at least 1, got 0",
    ),
    "loader of the wrong type": (
        lambda: make().fit(7, 1),
        ArgumentError,
        "loader must be an iterable of batches.*got int",
    ),
    "empty list": (
        lambda: make().fit([], 1, progress_bar=False),
        ArgumentError,
        "loader gave no batch.*drop_last",
    ),
    "empty loader": (
        lambda: make().fit(
            DataLoader(TensorDataset(Y[:3]), batch_size=4, drop_last=True), 1, progress_bar=False
        ),
        ArgumentError,
        "loader gave no batch.*drop_last",
    ),
    "generator for two epochs": (
        lambda: make().fit(iter(batches()), 2, progress_bar=False),
        ArgumentError,
        "iterator.*empty after one epoch, but num_epochs is 2; pass a list or a DataLoader",
    ),
    "too many arguments in a batch": (
        lambda: make().fit([(Y, Y)], 1, progress_bar=False),
        ArgumentError,
        r"model takes \(y\), but was called with 2 positional arguments",
    ),
    "unknown keyword": (
        lambda: make().step(Y, weights=Y),
        ArgumentError,
        r"model takes \(y\), but was called with 1 .*'weights'",
    ),
    "num_samples 0": (
        lambda: started().get_samples(0),
        ArgumentError,
        "num_samples must be an integer of at least 1, got 0",
    ),
    "samples before any step": (
        lambda: make().get_samples(),
        StateError,
        "no particles yet; call step, run, fit or setup",
    ),
    "named particles before any step": (
        lambda: make().get_named_particles(),
        StateError,
        "no particles yet; call step, run, fit or setup",
    ),
    "diagnostics before any step": (
        lambda: make().diagnostics(),
        StateError,
        "no step has been measured yet; call step, run or fit",
    ),
    "diagnostics after setup only": (
        lambda: started().diagnostics(),
        StateError,
        "no step has been measured yet; call step, run or fit",
    ),
    "to_arviz of unknown sites": (
        lambda: to_arviz(started(), Y, sites=["w"]),
        ArgumentError,
        r"to_arviz\(sites=\.\.\.\) must be a list of names or patterns .*got \['w'\].*has \['z'\]",
    ),
    "to_arviz of a string": (
        lambda: to_arviz(started(), Y, sites="z"),
        ArgumentError,
        r"to_arviz\(sites=\.\.\.\) must be a list of names or patterns of .*got 'z'.*has \['z'\]",
    ),
    "to_arviz before any step": (
        lambda: to_arviz(make(), Y),
        StateError,
        "no particles yet; call step, run, fit or setup",
    ),
}


def started():
    inference = make()
    inference.setup(Y)
    return inference


LENGTHSCALES = {
    "one point": (
        lambda: pca_lengthscale(X[:1]),
        ArgumentError,
        "lengthscale needs at least two data points, got 1",
    ),
    "no point": (
        lambda: pca_lengthscale([]),
        ArgumentError,
        "lengthscale needs at least two data points, got 0",
    ),
    "NaN": (
        lambda: pca_lengthscale(with_nan(X)),
        ArgumentError,
        "data of a lengthscale has values that are not finite",
    ),
    "infinity in a later batch": (
        lambda: pca_lengthscale([X, with_nan(X, math.inf)]),
        ArgumentError,
        "data of a lengthscale has values that are not finite",
    ),
    "numbers": (
        lambda: pca_lengthscale([1.0, 2.0]),
        ArgumentError,
        "data of a lengthscale must be a tensor.*got float",
    ),
    "no iterable": (
        lambda: pca_lengthscale(3),
        ArgumentError,
        "data of a lengthscale must be a tensor.*got int",
    ),
    "string": (
        lambda: pca_lengthscale("data"),
        ArgumentError,
        "data of a lengthscale must be a tensor.*got str",
    ),
    "a vector": (
        lambda: pca_lengthscale(Y),
        ArgumentError,
        r"data of a lengthscale must be a tensor \(point, feature.*got a \(6,\) tensor",
    ),
    "batches of other features": (
        lambda: pca_lengthscale([X, X[:, :2]]),
        ArgumentError,
        "same number of features, got 3 and 2",
    ),
    "more components than features": (
        lambda: pca_lengthscale(X, num_components=4),
        ArgumentError,
        r"pca_lengthscale\(num_components=\.\.\.\) is 4, but the data have 3 features",
    ),
    "no component": (
        lambda: pca_lengthscale(X, num_components=0),
        ArgumentError,
        r"pca_lengthscale\(num_components=\.\.\.\) must be an integer of at least 1, got 0",
    ),
    "all of the variance": (
        lambda: pca_lengthscale(X, num_components=1.0),
        ArgumentError,
        r"pca_lengthscale\(num_components=.*a number of components, a share.*got 1\.0",
    ),
    "a number of components that is not one": (
        lambda: pca_lengthscale(X, num_components=math.nan),
        ArgumentError,
        r"pca_lengthscale\(num_components=.*a number of components, a share.*got nan",
    ),
    "components by name": (
        lambda: pca_lengthscale(X, num_components="all"),
        ArgumentError,
        r"pca_lengthscale\(num_components=.*a number of components, a share.*got 'all'",
    ),
    "alpha above 1": (
        lambda: tuned_lengthscale(X, 1.5),
        ArgumentError,
        r"tuned_lengthscale\(alpha=\.\.\.\) must be between 0 and 1, got 1\.5",
    ),
    "alpha negative": (
        lambda: tuned_lengthscale(X, -0.1),
        ArgumentError,
        r"tuned_lengthscale\(alpha=\.\.\.\).*0.*got -0\.1",
    ),
    "alpha string": (
        lambda: tuned_lengthscale(X, "half"),
        ArgumentError,
        r"tuned_lengthscale\(alpha=\.\.\.\) must be a number, got 'half' \(str\)",
    ),
    "average": (
        lambda: tuned_lengthscale(X, 0.5, average="mean"),
        ArgumentError,
        "average=.* must be one of 'precision', 'lengthscale'; got 'mean'",
    ),
}

PRIORS = {
    "no module": (
        lambda: bayesianize(lambda x: x),
        ArgumentError,
        r"bayesianize\(net\) needs an nn\.Module, got function",
    ),
    "module class": (
        lambda: bayesianize(nn.Linear),
        ArgumentError,
        r"bayesianize\(net\) needs an nn\.Module, got type",
    ),
    "no parameter": (
        lambda: bayesianize(nn.ReLU()),
        ArgumentError,
        "no prior: ReLU has no parameter",
    ),
    "rule that leaves everything": (
        lambda: bayesianize(nn.Linear(2, 1), prior=lambda name, value: None),
        ArgumentError,
        r"no prior: Linear has no parameter for which prior\(name, value\) is not None",
    ),
    "prior of 0": (
        lambda: bayesianize(nn.Linear(2, 1), prior=0.0),
        ArgumentError,
        r"prior of parameter 'weight' must be.*above 0.*got 0\.0; give a standard deviation",
    ),
    "prior string": (
        lambda: bayesianize(nn.Linear(2, 1), prior="normal"),
        ArgumentError,
        r"prior of parameter 'weight' must be a number, got 'normal' \(str\); give a standard dev",
    ),
    "rule that returns a string": (
        lambda: bayesianize(nn.Sequential(nn.Linear(2, 1)), prior=lambda name, value: "wide"),
        ArgumentError,
        r"prior of parameter '0\.weight' must be a number, got 'wide' \(str\)",
    ),
    "prior of another event shape": (
        lambda: bayesianize(
            nn.Linear(2, 1), prior=dist.Normal(torch.zeros(5), torch.ones(5)).to_event(1)
        ),
        ArgumentError,
        r"'weight' has event shape \(5,\), which does not end the parameter's shape \(1, 2\)",
    ),
    "prior of another batch shape": (
        lambda: bayesianize(nn.Linear(2, 1), prior=dist.Normal(torch.zeros(5), torch.ones(5))),
        ArgumentError,
        r"'weight' has batch shape \(5,\), which cannot be expanded to \(1, 2\)",
    ),
    "distribution class": (
        lambda: bayesianize(nn.Linear(2, 1), prior=dist.Normal),
        ArgumentError,
        r"prior must be .*got the class Normal; write Normal",
    ),
    "rule that raises": (
        lambda: bayesianize(nn.Linear(2, 1), prior=lambda value: 1.0),
        ArgumentError,
        r"prior.*raised TypeError for parameter 'weight'",
    ),
    "lazy layer": (
        lambda: bayesianize(nn.LazyLinear(1)),
        ArgumentError,
        r"'weight' has no shape yet; run the network once",
    ),
    "discrete prior": (
        lambda: start(_with_prior(dist.Bernoulli(0.5)), X, Y),
        FordesError,
        r"'(net\.)?weight'.*discrete",
    ),
}


def _with_prior(prior):
    model = Regression()
    model.net = bayesianize(nn.Linear(3, 1), prior=prior)
    return model


TABLES = {
    "model": MODELS,
    "start": STARTS,
    "space": SPACES,
    "part": PARTS,
    "optimiser": OPTIMISERS,
    "loop": LOOPS,
    "lengthscale": LENGTHSCALES,
    "prior": PRIORS,
    "checkpoint": bad_runs.CHECKPOINTS,
    "fit": bad_runs.FITS,
    "fault": bad_runs.FAULTS,
}
CASES = {f"{area}: {name}": case for area, t in TABLES.items() for name, case in t.items()}


@pytest.mark.parametrize("name", CASES)
def test_error_names_the_culprit(name):
    call, error, pattern = CASES[name]
    with pytest.raises(FordesError) as caught:
        call()
    assert isinstance(caught.value, error)
    assert re.search(pattern, str(caught.value), re.DOTALL), str(caught.value)


def test_exceptions_of_the_users_code_arrive():
    """What a user's function says about itself is not hidden by a guess of ours."""
    kernel = RBF(InputGradients("x", output=lambda trace: trace.nodes["no such site"]["value"]))
    with pytest.raises(Exception, match="no such site"):
        start(Regression(), X, Y, kernel=kernel)
    with pytest.raises(LookupError, match="no batch today"):
        make().fit(broken_loader(), 1, progress_bar=False)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyError, NotImplementedError])
def test_exceptions_of_the_model_are_not_called_numerical(kind):
    """What the model raises of its own accord says nothing about supports or learning rates."""
    calls = []

    def model(y):
        calls.append(1)
        if len(calls) > 4:  # after the prototype and three initial particles
            raise kind("two and two are five")
        location(y)

    with pytest.raises((kind, FordesError), match="two and two are five") as caught:
        start(model, Y)
    assert not isinstance(caught.value, NumericalError)
    assert "learning rate" not in str(caught.value)
    assert "vectorised" not in str(caught.value)


def broken_loader():
    yield (Y,)
    raise LookupError("no batch today")


def test_errors_are_also_the_built_in_kind():
    """So that ``except ValueError`` around a constructor and ``except RuntimeError`` work."""
    for call, _, _ in list(PARTS.values())[:5]:
        with pytest.raises(ValueError, match="must be"):
            call()
    with pytest.raises(RuntimeError, match="no latent site"):
        start(all_observed, Y)


def test_a_failed_start_leaves_nothing_behind():
    """The same object works once the data are right, and equals one that never failed."""
    inference = make()
    with pytest.raises(FordesError):
        inference.step(with_nan(Y))
    with pytest.raises(StateError):
        inference.get_samples()
    loss = inference.step(Y)
    other = make()
    assert other.step(Y) == loss
    assert torch.equal(other.get_samples()["z"], inference.get_samples()["z"])


# -------------------------------------------------------------------- after the start


class Moody(PyroModule):
    """Does as it is told by attributes, with statistics of its own to keep intact."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.net = bayesianize(nn.Linear(3, 1))
        self.fail = None

    def forward(self, x, y=None):
        mean = self.net(self.norm(x)).squeeze(-1)
        if self.fail == "raise":
            raise ZeroDivisionError("the model gave up")
        if self.fail == "nan":
            mean = mean * math.nan
        if self.fail == "force":  # finite, but with an infinite derivative
            mean = mean + (mean - mean).abs().sqrt()
        if self.fail == "interrupt":
            raise KeyboardInterrupt
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


class Failing(torch.optim.SGD):
    """Raises at its third step."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        if self.count == 3:
            raise ArithmeticError("the optimiser gave up")
        return super().step(closure)


def tell(what):
    def act(inference):
        inference.model.fail = what
        inference.step(X, Y)

    return act


def scheduled(step):
    return math.nan if step == 2 else 1.0


# name: (options of the driver, what goes wrong at the third step, error, pattern)
LATER = {
    "NaN in the targets": (
        {},
        lambda inference: inference.step(X, with_nan(Y)),
        NumericalError,
        "at step 2 the log joint of particle 0 is nan.*site 'y'.*left as they are",
    ),
    "NaN in the inputs": (
        {},
        lambda inference: inference.step(with_nan(X), Y),
        NumericalError,
        "at step 2 the log joint of particle 0 is nan.*site 'y'.*left as they are",
    ),
    "model that gives NaN": ({}, tell("nan"), NumericalError, "at step 2.*particle 0 is nan"),
    "infinite force": (
        {},
        tell("force"),
        NumericalError,
        r"at step 2 the force on 'net\.(weight|bias)'.*is not finite.*left as they are",
    ),
    "model that raises": ({}, tell("raise"), ZeroDivisionError, "the model gave up"),
    "interruption": ({}, tell("interrupt"), KeyboardInterrupt, ""),
    "batch of other features": (
        {},
        lambda inference: inference.step(X[:, :2], Y),
        (FordesError, RuntimeError, ValueError),
        "",
    ),
    "batch without observations": (
        {},
        lambda inference: inference.step(X),
        FordesError,
        "'y'|latent sites?",
    ),
    "batch of another dtype": (
        {},
        lambda inference: inference.step(X.double(), Y.double()),
        (FordesError, RuntimeError),
        "(?i)dtype|float|double",
    ),
    "unknown argument": (
        {},
        lambda inference: inference.step(X, Y, weights=Y),
        (FordesError, TypeError),
        "weights",
    ),
    "batch of another kind in fit": (
        {},
        lambda inference: inference.fit([3], 1, progress_bar=False),
        Exception,
        "",
    ),
    "optimiser that raises": (
        {"optim": lambda params: Failing(params, lr=1e-3)},
        lambda inference: inference.step(X, Y),
        ArithmeticError,
        "the optimiser gave up",
    ),
    "optimiser of Pyro that raises": (
        {"optim": pyro.optim.PyroOptim(Failing, {"lr": 1e-3})},
        lambda inference: inference.step(X, Y),
        ArithmeticError,
        "the optimiser gave up",
    ),
    "schedule that gives NaN": (
        {"repulsion_scale": scheduled},
        lambda inference: inference.step(X, Y),
        ArgumentError,
        r"repulsion_scale\(2\) must be a finite number.*got nan",
    ),
}


@pytest.mark.parametrize("kernel", [RBF(Weights()), RBF(InputGradients("x"))], ids=["w", "g"])
@pytest.mark.parametrize("name", LATER)
def test_particles_survive_a_failed_step(name, kernel):
    """A failed third step leaves particles, statistics and the step as they were."""
    options, act, error, pattern = LATER[name]
    inference = make(Moody(), **options, kernel=kernel)
    inference.run(2, X, Y, progress_bar=False)
    samples, own = inference.get_samples(), inference.model.norm.running_mean.clone()
    buffers = {n: b.clone() for n, b in inference._buffers.items()}
    diagnostics, state = inference.diagnostics(), inference.state_dict()
    with pytest.raises(error) as caught:
        act(inference)
    assert re.search(pattern, str(caught.value), re.DOTALL), str(caught.value)
    assert inference._step == 2
    for site, value in inference.get_samples().items():
        assert torch.equal(value, samples[site]), site
    for buffer, value in inference._buffers.items():
        assert torch.equal(value, buffers[buffer]), buffer
    assert torch.equal(inference.model.norm.running_mean, own)
    after = inference.state_dict()
    assert bad_runs.equal(*({p: s[p] for p in ("optimizer", "random")} for s in (after, state)))
    assert all(p.grad is None for p in inference._particles.values())
    assert inference.diagnostics()["step"] == diagnostics["step"]
    assert not list(pyro.get_param_store().keys())
    # ... and training goes on.
    inference.model.fail = None
    if "optim" not in options and "repulsion_scale" not in options:
        assert math.isfinite(inference.step(X, Y))


def test_first_step_that_fails_in_the_optimiser_leaves_particles():
    inference = make(optim=pyro.optim.Adam({"lr": -1.0}))
    inference.setup(Y)
    samples = inference.get_samples()
    with pytest.raises(ArgumentError, match="Invalid learning rate"):
        inference.step(Y)
    assert torch.equal(inference.get_samples()["z"], samples["z"])
    assert not list(pyro.get_param_store().keys())


def test_callback_that_raises_leaves_the_steps_taken():
    inference = make(transport=Ensemble())

    def callback(inference, step, loss):
        if step == 1:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        inference.run(5, Y, progress_bar=False, callback=callback)
    other = make(transport=Ensemble())
    other.run(2, Y, progress_bar=False)
    assert torch.equal(inference.get_samples()["z"], other.get_samples()["z"])
