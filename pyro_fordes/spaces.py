r"""What a space of comparison is, and the first one: the weights.

A space names what has to be recorded while the model runs (`capture`, inside the vectorised call)
and turns the result into a representation of shape ``(particle, point, feature)`` that autograd can
differentiate by the particles (`represent`, outside it).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import (
    ArgumentError,
    check_choice,
)
from pyro_fordes.particles import Call, Evaluation, Setting, Values, ravel

Output = str | Callable[[Any], Tensor]
"""A deterministic or observed site, a submodule's path, or a function of the trace."""


class Space(Protocol):
    """Where particles are compared."""

    @property
    def input(self) -> int | str | None:
        """Model argument that gets a particle axis and a gradient, if any."""
        ...

    @property
    def submodules(self) -> tuple[str, ...]:
        """Paths of submodules whose outputs `capture` reads."""
        ...

    @property
    def own_values(self) -> bool:
        """Whether the representation is the particle's own values."""
        ...

    @property
    def has_scores(self) -> bool:
        """Whether the gradient of the log likelihood (or log joint) by it is known, for `SVGD`."""
        ...

    @property
    def share_axis(self) -> int | None:
        """Axis of the representation along which those of several shares of a batch are joined.

        1 where points are compared one by one, 2 where they make one long point; None where the
        representation does not depend on the batch.
        """
        ...

    def check(self, locate: Callable[[int | str], tuple[str, Any]]) -> None:
        """Raise an `ArgumentError` if the model's arguments do not fit, before the model runs.

        Args:
            locate: finds a model argument by name or position; returns its name and value.
        """
        ...

    def prepare(self, setting: Setting) -> "Space":
        """The space made ready for a model, or an error that says why it does not fit."""
        ...

    def extra(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Arguments of a further run, without observations, to capture; None for the step's."""
        ...

    def capture(self, call: Call) -> Any:
        """What to keep of one particle's run: a tree of tensors."""
        ...

    def represent(self, evaluation: Evaluation) -> Float[Tensor, "particle point feature"]:
        """Representation of the particles."""
        ...


class ScoredSpace(Space, Protocol):
    """A space other than that of the weights with ``has_scores``."""

    def scores(self, evaluation: Evaluation) -> Float[Tensor, "particle point feature"]:
        """Gradient of the log likelihood by the representation."""
        ...


@dataclass(frozen=True)
class Weights:
    """The unconstrained latent values themselves, as one point.

    Args:
        sites: names of the latent sites to compare, or None for all. The others move without
            repulsion.
        group: ``"joint"`` compares all values with one kernel, ``"site"`` has a kernel for each
            site, ``"coordinate"`` one for each scalar (the default of ``pyro.infer.SVGD``).

    Raises:
        ArgumentError: if ``group`` is unknown; when the driver starts, if a site is.

    Example:
        >>> Weights(sites=("weight",)).sites
        ('weight',)
    """

    sites: Sequence[str] | None = None
    group: str = "joint"
    input: None = None
    submodules: tuple[str, ...] = ()
    own_values: bool = True
    has_scores: bool = True
    share_axis: None = None

    def __post_init__(self) -> None:
        """Refuse a bare string, which would be read letter by letter, and unknown groups."""
        check_choice("Weights(group=...)", self.group, ("joint", "site", "coordinate"))
        if isinstance(self.sites, str):
            raise ArgumentError(
                f"Weights(sites=...) must be a list of site names, got the string {self.sites!r}; "
                f"write [{self.sites!r}]"
            )

    def check(self, locate: Callable[[int | str], tuple[str, Any]]) -> None:
        """Any arguments will do."""

    def prepare(self, setting: Setting) -> "Weights":
        """Check the sites' names."""
        unknown = [name for name in self.sites or () if name not in setting.latents]
        if unknown or (self.sites is not None and not self.sites):
            raise ArgumentError(
                f"Weights(sites=...) got {unknown or 'no site'}, but the model's latent sites are "
                f"{list(setting.latents)}"
            )
        return self

    def extra(self) -> None:
        """None: the values are at hand."""

    def capture(self, call: Call) -> tuple[()]:
        """Nothing: the values are at hand."""
        return ()

    def represent(self, evaluation: Evaluation) -> Float[Tensor, "particle point feature"]:
        """All values of a particle in one row."""
        return ravel(self.compared(evaluation.values)).unsqueeze(1)

    def compared(self, values: Values) -> Values:
        """The values of the sites that are compared."""
        return values if self.sites is None else {name: values[name] for name in self.sites}

    def split(
        self, rows: Float[Tensor, "particle 1 param"], values: Values
    ) -> list[Float[Tensor, "particle _ _"]]:
        """What is compared at once: everything, a site, or (as points) some coordinates.

        Coordinates come in blocks of so many that their kernels are no larger than the particles.

        Args:
            rows: one row per particle, as `represent` gives it.
            values: stacked values with the shapes of the sites.
        """
        if self.group == "joint":
            return [rows]
        if self.group == "coordinate":
            size = -(-rows.shape[2] // len(rows))
            return list(rows.transpose(1, 2).split(size, dim=1))
        sizes = [value[0].numel() for value in self.compared(values).values()]
        return list(rows.split(sizes, dim=2))

    def join(self, parts: list[Float[Tensor, "particle _ _"]]) -> Float[Tensor, "particle 1 param"]:
        """Undo `split`."""
        if self.group == "coordinate":
            return torch.cat(parts, dim=1).transpose(1, 2)
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
