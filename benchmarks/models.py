"""Small posteriors for `against_nuts.py`: Pyro models, their data, and how they are compared.

The models broadcast over batch axes on the left, as ``pyro.infer.SVGD`` asks; all latent sites are
free of plates, so that one site may hold them all (see `packed`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor
from torch.distributions import biject_to
from torch.nn import functional as F

Sites = Mapping[str, Tensor]
NUM_COMPONENTS = 3
NUM_HIDDEN = 8
NOISE = 0.4


# -------------------------------------------------------------------- eight schools


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    """Effects of coaching in eight schools, centred: the effects themselves are latent."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    theta = pyro.sample(
        "theta", dist.Normal(mu[..., None].expand(mu.shape + y.shape), tau[..., None]).to_event(1)
    )
    pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)


def eight_schools_noncentred(y: Tensor, sigma: Tensor) -> None:
    """The same posterior in standardised effects."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    eta = pyro.sample("eta", dist.Normal(torch.zeros_like(y), 1.0).to_event(1))
    theta = mu[..., None] + tau[..., None] * eta
    pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)


def schools_data() -> tuple[Tensor, ...]:
    """Rubin (1981): estimated effects and their standard errors."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    return y, torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def centre(sites: Sites) -> Sites:
    """Draws of the centred model from draws of the other."""
    theta = sites["mu"][..., None] + sites["tau"][..., None] * sites["eta"]
    return {"mu": sites["mu"], "tau": sites["tau"], "theta": theta}


# -------------------------------------------------------------------- logistic regression


def logistic(x: Tensor, group: Tensor, y: Tensor) -> None:
    """Hierarchical logistic regression: an intercept per group, slopes in common."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    slopes = pyro.sample("slopes", dist.Normal(x.new_zeros(x.shape[1]), 2.0).to_event(1))
    num_groups = 8
    offset = pyro.sample("offset", dist.Normal(x.new_zeros(num_groups), 1.0).to_event(1))
    intercept = mu[..., None] + spread[..., None] * offset
    logits = intercept[..., group] + slopes @ x.T
    pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)


def logistic_data() -> tuple[Tensor, ...]:
    """160 rows in 8 groups, two of three inputs correlated."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(160, 3, generator=generator)
    x[:, 1] = 0.8 * x[:, 0] + 0.6 * x[:, 1]
    group = torch.arange(160) % 8
    intercepts = 0.5 + 0.9 * torch.randn(8, generator=generator)
    logits = intercepts[group] + x @ torch.tensor([1.0, -1.5, 0.5])
    return x, group, torch.bernoulli(logits.sigmoid(), generator=generator)


# -------------------------------------------------------------------- mixture


def _components() -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and common scale of the mixture; the means are in order by construction."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((NUM_COMPONENTS,), 2.0)))
    first = pyro.sample("first", dist.Normal(-2.0, 2.0))
    gaps = pyro.sample(
        "gaps", dist.LogNormal(torch.full((NUM_COMPONENTS - 1,), 0.7), 0.5).to_event(1)
    )
    scale = pyro.sample("scale", dist.LogNormal(-0.5, 0.5))
    means = first[..., None] + F.pad(gaps.cumsum(-1), (1, 0))
    return weights, means, scale


@config_enumerate
def mixture(y: Tensor) -> None:
    """Gaussian mixture; the assignments are discrete latents to be enumerated."""
    weights, means, scale = _components()
    with pyro.plate("data", len(y)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(means[assignment], scale), obs=y)


def mixture_marginal(y: Tensor) -> None:
    """`mixture` with the assignments summed out by hand."""
    weights, means, scale = _components()
    shape = scale.shape + y.shape
    component = dist.Normal(
        means.unsqueeze(-2).expand((*shape, NUM_COMPONENTS)), scale[..., None, None]
    )
    assignment = dist.Categorical(weights.unsqueeze(-2).expand((*shape, NUM_COMPONENTS)))
    pyro.sample("y", dist.MixtureSameFamily(assignment, component).to_event(1), obs=y)


def mixture_data() -> tuple[Tensor, ...]:
    """80 numbers from three overlapping components."""
    generator = torch.Generator().manual_seed(2)
    which = torch.multinomial(torch.tensor([0.3, 0.45, 0.25]), 80, True, generator=generator)
    means = torch.tensor([-2.0, 0.0, 2.5])
    return (means[which] + 0.8 * torch.randn(80, generator=generator),)


# -------------------------------------------------------------------- network


def network_mean(sites: Sites, x: Tensor) -> Tensor:
    """Output of the networks, ``(*batch, len(x))``."""
    hidden = x[:, None] * sites["w1"][..., None, :] + sites["b1"][..., None, :]
    return (hidden.tanh() * sites["w2"][..., None, :]).sum(-1) + sites["b2"][..., None]


def network(x: Tensor, y: Tensor | None) -> None:
    """Regression by a network with one hidden layer of tanh units and known noise."""
    zeros = x.new_zeros(NUM_HIDDEN)
    sites = {
        "w1": pyro.sample("w1", dist.Normal(zeros, 1.5).to_event(1)),
        "b1": pyro.sample("b1", dist.Normal(zeros, 1.5).to_event(1)),
        "w2": pyro.sample("w2", dist.Normal(zeros, 0.7).to_event(1)),
        "b2": pyro.sample("b2", dist.Normal(0.0, 0.7)),
    }
    pyro.sample("y", dist.Normal(network_mean(sites, x), NOISE).to_event(1), obs=y)


def network_data() -> tuple[Tensor, ...]:
    """30 points of a wave, with a gap in the middle."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(30, generator=generator)
    x = torch.where(x < 0.5, -2.0 + 2.8 * x, 0.6 + 2.8 * (x - 0.5))
    return x, (2 * x).sin() + 0.3 * x + NOISE * torch.randn(30, generator=generator)


GRID = torch.linspace(-3.0, 3.0, 31)
"""Reaches beyond the data on both sides."""


def network_functions(sites: Sites) -> Tensor:
    """The networks on the grid."""
    return network_mean(sites, GRID)


# -------------------------------------------------------------------- posteriors


@dataclass(frozen=True)
class Posterior:
    """A model, its data, and how its particles are compared with reference draws.

    Attributes:
        name: what the tables call it.
        model: the Pyro model.
        data: its arguments.
        whiten: the `WGD` whitening of the calibrated rows.
        coordinates: what is compared, from the sites' values; None for all sites' unconstrained
            values.
        drawn_as: the posterior whose NUTS draws are used, where it is another one.
        from_drawn: values of the sites from those of ``drawn_as``.
        points: the model's arguments at other inputs, where functions can be compared; None where
            it has none.
    """

    name: str
    model: Callable[..., None]
    data: tuple[Tensor, ...]
    whiten: str = "full"
    coordinates: Callable[[Sites], Tensor] | None = None
    drawn_as: str | None = None
    from_drawn: Callable[[Sites], Sites] | None = None
    points: tuple[Any, ...] | None = None

    def compared(self, sites: Sites) -> Tensor:
        """Coordinates of each draw in which distances are measured, ``(draw, coordinate)``."""
        return (self.coordinates or Layout.of(self.model, self.data).pack)(sites)


POSTERIORS = {
    p.name: p
    for p in (
        Posterior(
            "schools, centred",
            eight_schools,
            schools_data(),
            drawn_as="schools, not centred",
            from_drawn=centre,
        ),
        Posterior("schools, not centred", eight_schools_noncentred, schools_data()),
        Posterior("logistic", logistic, logistic_data()),
        # `mixture` itself needs enumerated latents; the density is the same.
        Posterior("mixture", mixture_marginal, mixture_data()),
        Posterior(
            "network", network, network_data(), "diag", network_functions, points=(GRID, None)
        ),
    )
}


# -------------------------------------------------------------------- one site for all


@dataclass(frozen=True)
class Layout:
    """The latent sites of a model as one unconstrained vector."""

    supports: Mapping[str, object]
    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, model: Callable[..., None], data: tuple[Tensor, ...]) -> "Layout":
        """From a run of the model."""
        with poutine.block(), torch.random.fork_rng(devices=()):
            trace = poutine.trace(model).get_trace(*data)
        nodes = {name: trace.nodes[name] for name in trace.stochastic_nodes}
        supports = {name: node["fn"].support for name, node in nodes.items()}
        shapes = {
            name: biject_to(supports[name]).inv(node["value"]).shape for name, node in nodes.items()
        }
        return cls(supports, shapes)

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(shape.numel() for shape in self.shapes.values())

    def pack(self, sites: Sites) -> Tensor:
        """Values of the sites, ``(*batch, *site shape)``, as vectors ``(*batch, size)``."""
        parts = []
        for name, shape in self.shapes.items():
            free = biject_to(self.supports[name]).inv(sites[name])
            batch = free.shape[: free.dim() - len(shape)]
            parts.append(free.reshape(*batch, shape.numel()))
        return torch.cat(parts, -1)

    def unpack(self, packed: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Values of the sites, and the log determinant of the transforms, ``batch``."""
        sites, log_det = {}, packed.new_zeros(packed.shape[:-1])
        parts = packed.split([shape.numel() for shape in self.shapes.values()], -1)
        for (name, shape), part in zip(self.shapes.items(), parts, strict=True):
            transform = biject_to(self.supports[name])
            free = part.reshape(part.shape[:-1] + shape)
            sites[name] = transform(free)
            log_det = log_det + transform.log_abs_det_jacobian(free, sites[name])
        return sites, log_det


def packed(model: Callable[..., None], data: tuple[Tensor, ...]) -> Callable[..., None]:
    """The same log joint with one latent site, a vector ``packed`` of all unconstrained values."""
    layout = Layout.of(model, data)

    def one_site(*args: Tensor) -> None:
        # Flat: a density of zero, from which pyro.infer.SVGD can still draw a start.
        flat = dist.Normal(torch.zeros(layout.size), 1.0).to_event(1).mask(False)
        sites, log_det = layout.unpack(pyro.sample("packed", flat))
        poutine.condition(model, sites)(*args)
        pyro.factor("log_det", log_det)

    return one_site
