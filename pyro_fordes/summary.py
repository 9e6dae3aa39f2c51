"""A table of an inference's sites and diagnostics, with warnings in plain language.

Each rule is a function of numbers that an inference keeps, so that it can be read and tested by
itself. A rule returns a sentence, or None where there is nothing to warn of.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import StateError, check_positive_int
from pyro_fordes.particles import Values, ravel
from pyro_fordes.sites import observed_sites

FEWEST_STEPS = 20


class LossHistory:
    """Losses of evenly spaced steps, a bounded number of them however many there were.

    Where the record is full, every second one is dropped and the spacing doubles.

    Args:
        limit: largest number of losses kept.

    Example:
        >>> history = LossHistory(limit=4)
        >>> for loss in range(9):
        ...     history.add(torch.tensor(float(loss)))
        >>> history.losses().tolist()
        [0.0, 4.0, 8.0]
    """

    def __init__(self, limit: int = 512) -> None:
        self.limit = limit
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self._kept: list[Tensor] = []
        self._every, self._seen = 1, 0

    def add(self, loss: Tensor) -> None:
        """Note the loss of a step; does not wait for the device."""
        if self._seen % self._every == 0:
            if len(self._kept) == self.limit:
                self._kept, self._every = self._kept[::2], 2 * self._every
            if self._seen % self._every == 0:
                self._kept.append(loss)
        self._seen += 1

    def losses(self) -> Float[Tensor, " record"]:
        """The kept losses, in their order."""
        return self._stacked().double()

    def _stacked(self) -> Float[Tensor, " record"]:
        if not self._kept:
            return torch.zeros(0)
        # Those of a loaded state are on the CPU, whatever device the later ones are on.
        return torch.stack([loss.to(self._kept[-1].device) for loss in self._kept]).cpu()

    def state_dict(self) -> dict[str, Any]:
        """The record as plain values and one tensor."""
        return {
            "kept": self._stacked(),
            "every": self._every,
            "seen": self._seen,
            "limit": self.limit,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | None) -> "LossHistory":
        """The record of a `state_dict`; an empty one for None.

        Example:
            >>> history = LossHistory(limit=4)
            >>> history.add(torch.tensor(2.0))
            >>> LossHistory.from_state(history.state_dict()).losses().tolist()
            [2.0]
        """
        if state is None:
            return cls()
        history = cls(state["limit"])
        history._kept = list(state["kept"].clone())
        history._every, history._seen = state["every"], state["seen"]
        return history


# ---------------------------------------------------------------- rules


def collapsed(particles: Values, log_joint: Tensor | None) -> str | None:
    r"""Warn where particles are nearly copies of each other.

    Fires if both hold:

    - more than half of the particles have another one closer than 1 % of the root mean square of
      all values, or than 0.01 where that is below 1 (root mean square over the entries of a
      particle, in unconstrained space);
    - their log joints have a standard deviation below :math:`0.05 \sqrt{D/2}` with :math:`D` values
      per particle. Under draws of a Gaussian posterior it is :math:`\sqrt{D/2}`.

    Either alone says little: a posterior far from 0 is narrow beside its mean, and networks that
    differ by a permutation have the same log joint. Not known before a step was measured.

    Args:
        particles: unconstrained values.
        log_joint: log joint of each particle at the last measured step, None for none.
    """
    rows = ravel({name: value.detach() for name, value in particles.items()}).double()
    count, size = rows.shape
    if count == 1 or log_joint is None:
        return None
    scale = max(1.0, rows.square().mean().sqrt().item())
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.fill_diagonal_(math.inf).amin(1) / math.sqrt(size)
    close = int((nearest < 0.01 * scale).sum())
    alike = log_joint.double().std().item() < 0.05 * math.sqrt(size / 2)
    if not (alike and close > count / 2):
        return None
    return (
        f"{close} of {count} particles are nearly copies of another one: they count as one draw. "
        f"Use a transport that repels or raise repulsion_scale, compare particles in another "
        f"space, or start them further apart"
    )


def repulsion(force_ratio: float, repulsive: bool) -> str | None:
    """Warn where the repulsive force hardly acts, or acts almost alone.

    Fires if the force ratio (mean norm of the repulsive force over that of the driving force, at
    the last measured step) is below 0.01, or above 10. At the end of a flow the two are in balance
    and the ratio is near 1. Never for transports without repulsion.

    Args:
        force_ratio: the ratio.
        repulsive: whether the transport repels.
    """
    if not repulsive or math.isnan(force_ratio):
        return None
    if force_ratio < 0.01:
        return (
            f"repulsion is negligible: {force_ratio:.2g} of the driving force, so this is nearly a "
            f"plain ensemble. Raise repulsion_scale if that is not what you want"
        )
    if force_ratio > 10:
        return (
            f"repulsion dominates: {force_ratio:.2g} times the driving force, so particles leave "
            f"the posterior. Lower repulsion_scale, or take more steps if they have just begun"
        )
    return None


def likelihood_scale(
    scales: Mapping[str, float],
    sizes: Mapping[str, int],
    num_data: int | None,
    batches: int,
) -> str | None:
    """Warn where the likelihood of a minibatch seems to stand for that of all data.

    Fires if no observed site is scaled up (by a plate of more rows than its minibatch, or by
    ``poutine.scale``), and either

    - ``fit`` took several batches per epoch, or
    - ``num_data`` is more than the rows of every observed site.

    Args:
        scales: factor of each observed site's log likelihood in the first run of the model.
        sizes: how many observations each of these sites had in that run.
        num_data: the inference's.
        batches: largest number of batches in an epoch of ``fit``, 0 for none.
    """
    if not scales or any(scale != 1 for scale in scales.values()):
        return None
    rows = max(sizes.values())
    several = batches > 1
    more = num_data is not None and num_data > rows
    if not (several or more):
        return None
    seen = f"fit took {batches} batches per epoch" if several else f"num_data is {num_data}"
    return (
        f"the likelihood scale looks wrong: the plate of {', '.join(map(repr, scales))} has the "
        f"{rows} rows of a batch, but {seen}, so the prior weighs too much. Write "
        f"pyro.plate(name, number of all rows, subsample_size={rows}), unless every batch is the "
        f"whole data"
    )


def not_converged(losses: Float[Tensor, " record"], seen: int, size: int) -> str | None:
    r"""Warn where the loss still moves.

    Fires if fewer than 20 steps were taken; or if, between the two halves of the last fifth of the
    recorded losses, the mean changes by more than :math:`0.1 \sqrt{D/2}` and by more than three
    standard errors. The log joint of draws from a Gaussian posterior with :math:`D` values has a
    standard deviation of :math:`\sqrt{D/2}`: less than a tenth of that does not matter. Not known
    within the first 20 steps after loading.

    Args:
        losses: losses of evenly spaced steps.
        seen: how many steps were taken, those before loading included.
        size: number of values per particle.
    """
    losses = losses[losses.isfinite()]  # those of faulty steps are not
    if seen < FEWEST_STEPS:
        return f"not converged: only {seen} steps were taken"
    if len(losses) < FEWEST_STEPS:
        return None
    half = max(2, len(losses) // 10)
    before, after = losses[-2 * half : -half], losses[-half:]
    change = (after.mean() - before.mean()).item()
    error = math.sqrt((before.var().item() + after.var().item()) / half)
    if abs(change) <= max(0.1 * math.sqrt(size / 2), 3 * error):
        return None
    direction = "falls" if change < 0 else "rises"
    return (
        f"not converged: the loss still {direction}, by {abs(change):.3g} within the last fifth of "
        f"the steps. Take more steps, or lower the learning rate at the end"
    )


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Site:
    """A row of the table.

    Attributes:
        name: the latent site.
        shape: shape of one particle's value.
        mean: over particles and entries.
        sd: standard deviation over particles, root mean square over entries; NaN for one particle.
        low: smallest value.
        high: largest value.
    """

    name: str
    shape: tuple[int, ...]
    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """What ``inference.summary()`` returns; its text is the table.

    Attributes:
        title: particles, steps, transport and kernel.
        sites: one row for each latent site.
        diagnostics: numbers of the last measured step, by name; empty where none was measured.
        warnings: sentences, by the name of their rule.
        max_sites: how many rows the text has at most.

    Example:
        >>> rows = [Site("z", (), 0.1, 1.0, -2.0, 2.0)]
        >>> print(Summary("3 particles", rows, {}, {"collapsed": "all alike"}, 10))
        3 particles
        <BLANKLINE>
        site  shape      mean        sd       min       max
        z     ()          0.1         1        -2         2
        <BLANKLINE>
        no step has been measured yet
        <BLANKLINE>
        warnings
        - all alike
    """

    title: str
    sites: Sequence[Site]
    diagnostics: Mapping[str, float]
    warnings: Mapping[str, str]
    max_sites: int

    def __str__(self) -> str:
        shown = self.sites[: self.max_sites]
        names = [_short(site.name) for site in shown]
        shapes = [str(tuple(site.shape)).replace(",)", ")") for site in shown]
        width, wide = max(map(len, [*names, "site"])), max(map(len, [*shapes, "shape"]))
        head = f"{'site':{width}}  {'shape':{wide}}"
        lines = [self.title, "", head + "".join(f"{h:>10}" for h in ("mean", "sd", "min", "max"))]
        for site, name, shape in zip(shown, names, shapes, strict=True):
            numbers = (site.mean, site.sd, site.low, site.high)
            lines.append(
                f"{name:{width}}  {shape:{wide}}" + "".join(f"{n:>10.3g}" for n in numbers)
            )
        if len(self.sites) > len(shown):
            lines.append(f"and {len(self.sites) - len(shown)} more sites")
        lines.append("")
        if self.diagnostics:
            widest = max(map(len, self.diagnostics))
            lines += [f"{name:{widest}}  {value:.4g}" for name, value in self.diagnostics.items()]
        else:
            lines.append("no step has been measured yet")
        if self.warnings:
            lines += ["", "warnings"]
            for text in self.warnings.values():
                lines.append(textwrap.fill(f"- {text}", 96, subsequent_indent="  "))
        return "\n".join(lines)

    __repr__ = __str__


def summarize(inference: Any, max_sites: int = 20) -> Summary:
    """See ``ParticleInference.summary``."""
    check_positive_int("max_sites", max_sites)
    gather = inference._gather
    with gather.together("summary"):
        samples = inference.get_samples(gather=True)
        particles = {name: gather(one) for name, one in inference.get_unconstrained().items()}
    size = sum(value[0].numel() for value in particles.values())
    try:
        measured = inference.diagnostics()
    except StateError:  # none yet
        measured = {}
    diagnostics = {
        "measured at step": measured.get("step"),
        "log joint, mean": _of(measured, "log_joint", torch.mean),
        "log joint, sd": _of(measured, "log_joint", torch.std),
        "driving force": _of(measured, "driving_force", torch.mean),
        "repulsive force": _of(measured, "repulsive_force", torch.mean),
        "force ratio": measured.get("force_ratio"),
        "effective particles": measured.get("effective_particles"),
        "bandwidth": measured.get("bandwidth"),
    }
    scales, sizes = _likelihood(inference)
    ratio, repulsive = measured.get("force_ratio", math.nan), inference.transport.repulsive
    found = {
        "collapsed": collapsed(particles, measured.get("log_joint")),
        "repulsion": repulsion(ratio, repulsive),
        "likelihood_scale": likelihood_scale(
            scales, sizes, inference.num_data, inference._batches_per_epoch
        ),
        "not_converged": not_converged(inference._losses.losses(), inference._step, size),
    }
    space = f", {type(inference.kernel.space).__name__}" if repulsive else ""
    return Summary(
        title=(
            f"{inference.num_particles} particles of {size} values, {inference._step} steps, "
            f"{type(inference.transport).__name__}{space}"
        ),
        sites=[_row(name, value) for name, value in samples.items()],
        diagnostics={
            name: value
            for name, value in diagnostics.items()
            if value is not None and not math.isnan(value)
        },
        warnings={name: text for name, text in found.items() if text is not None},
        max_sites=max_sites,
    )


def _of(measured: Mapping[str, Any], name: str, reduce: Any) -> float | None:
    """Mean or spread of a measured number over particles; None where there is none."""
    values = measured.get(name)
    if values is None or (reduce is torch.std and len(values) == 1):
        return None
    return reduce(values.double()).item()


def _row(name: str, value: Tensor) -> Site:
    """A site's row."""
    value = value.double()
    sd = value.var(0).mean().sqrt().item() if len(value) > 1 else math.nan
    return Site(
        name,
        tuple(value.shape[1:]),
        value.mean().item(),
        sd,
        value.min().item(),
        value.max().item(),
    )


def _likelihood(inference: Any) -> tuple[dict[str, float], dict[str, int]]:
    """Scale and number of observations of each observed site, in the first run of the model."""
    first = inference._log_joint._first
    if first is None:
        return {}, {}
    nodes = first.trace.nodes
    names = observed_sites(first.trace)
    scales = {name: torch.as_tensor(nodes[name]["scale"]).double() for name in names}
    return (
        {
            name: 1.0 if (scale == 1).all() else scale.mean().item()
            for name, scale in scales.items()
        },
        {name: torch.as_tensor(nodes[name]["log_prob"]).numel() for name in names},
    )


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:18]}...{name[-19:]}"
