"""Names of dimensions and coordinates: from a model's plates, and from the user."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pyro_fordes._checks import ArgumentError, require

Variable = tuple[Any, tuple[str, ...]]
"""An array, and the names of its dimensions after those of the sample."""


@dataclass(frozen=True)
class Labels:
    """What dimensions are called and what their entries are.

    Attributes:
        dims: the user's names for a variable's own dimensions, by variable.
        coords: the user's labels of a dimension's entries, by dimension.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> trace = pyro.poutine.trace(lambda: pyro.sample("w", dist.Normal(torch.zeros(2), 1.0)))
        >>> site = trace.get_trace().nodes["w"]
        >>> Labels({}, {}).of_site("w", site), Labels({"w": ["feature"]}, {}).of_site("w", site)
        (('w_dim_0',), ('feature',))
    """

    dims: Mapping[str, Sequence[str]]
    coords: Mapping[str, Sequence[Any]]

    def check(self, names: Iterable[str]) -> None:
        """Refuse names of dimensions for variables that do not exist, and what are no names.

        Args:
            names: all variables that could be exported.

        Raises:
            ArgumentError: if there is such a thing.
        """
        known = list(names)
        for option, given in (("dims", self.dims), ("coords", self.coords)):
            if not isinstance(given, Mapping):
                raise ArgumentError(f"to_arviz({option}=...) must be a mapping, got {given!r}")
        for name, dims in self.dims.items():
            if name not in known or not _are_names(dims):
                raise ArgumentError(
                    f"to_arviz(dims=...) must give a list of names for each variable, such as "
                    f"{{{known[0]!r}: ['feature']}}, got {{{name!r}: {dims!r}}}; the variables are "
                    f"{known}"
                )
            taken = [dim for dim in dims if dim in ("chain", "draw")]
            if taken or len(set(dims)) < len(dims):
                raise ArgumentError(
                    f"to_arviz(dims=...) gives {name!r} the dimensions {list(dims)}; they must "
                    f"differ from each other and from 'chain' and 'draw', which all draws have"
                )
        for dim, labels in self.coords.items():
            if isinstance(labels, str) or _rank(labels) != 1:
                raise ArgumentError(
                    f"to_arviz(coords=...) must give a list of labels for each dimension, such as "
                    f"{{'feature': ['age', 'height']}}, got {{{dim!r}: {labels!r}}}"
                )

    def of_site(self, name: str, site: Mapping[str, Any]) -> tuple[str, ...]:
        """Dimensions of a site's value: the user's names, plates, or numbers.

        Raises:
            ArgumentError: if the user gave another number of names.
        """
        return self.named(name, site, site["value"].dim(), _event_dim(site))

    def of_density(self, name: str, site: Mapping[str, Any], rank: int) -> tuple[str, ...]:
        """Dimensions of a site's log density, which has batch dimensions only."""
        given = self.dims.get(name)
        if given is not None and len(given) >= rank:
            return tuple(given[:rank])
        return self.named(name, site, rank, 0)

    def named(
        self, name: str, site: Mapping[str, Any], rank: int, event_dim: int
    ) -> tuple[str, ...]:
        """Names of ``rank`` dimensions, of which the last ``event_dim`` belong to no plate."""
        given = self.dims.get(name)
        if given is not None:
            if len(given) != rank:
                raise ArgumentError(
                    f"to_arviz(dims=...) gives {name!r} the {len(given)} dimensions "
                    f"{list(given)}, but it has {rank} (besides chain and draw)"
                )
            return tuple(given)
        plates = {frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
        numbered = [f"{name}_dim_{axis}" for axis in range(rank)]
        # Plates count batch dimensions from the right: -1, -2, ...
        return tuple(
            plates.get(axis - (rank - event_dim), numbered[axis])
            if axis < rank - event_dim
            else numbered[axis]
            for axis in range(rank)
        )

    def of_argument(self, name: str, value: Tensor, plates: Mapping[str, int]) -> tuple[str, ...]:
        """Dimensions of a model argument: the first is a plate's where only one has its length.

        Args:
            name: the argument's name.
            value: the argument.
            plates: lengths of the plates.
        """
        if name in self.dims:
            return self.named(name, {"cond_indep_stack": ()}, value.dim(), 0)
        numbered = [f"{name}_dim_{axis}" for axis in range(value.dim())]
        fitting = [plate for plate, size in plates.items() if value.dim() and size == len(value)]
        return tuple(fitting + numbered[1:] if len(fitting) == 1 else numbered)

    def dataset(
        self, variables: Mapping[str, Variable], sample: tuple[str, ...], *, lenient: bool = False
    ) -> Any:
        """An xarray Dataset of variables.

        A name that two dimensions of different lengths would share, or a dimension and a variable,
        gives way to a number. Slashes, which separate groups in files, become dots.

        Args:
            variables: arrays and their own dimensions.
            sample: the leading dimensions, such as ``("chain", "draw")``.
            lenient: whether coordinates of another length are left out instead of refused.

        Raises:
            ArgumentError: if coordinates do not fit.
        """
        xarray = require("xarray")
        sizes: dict[str, int] = {}
        data = {}
        names = {name: _without_slash(name) for name in variables}
        for name, (array, dims) in variables.items():
            used = list(sample)
            for axis, (dim, size) in enumerate(zip(dims, array.shape[len(sample) :], strict=True)):
                dim = _without_slash(dim)
                clash = dim in names.values() or dim in used or sizes.get(dim, size) != size
                used.append(f"{names[name]}_dim_{axis}" if clash else dim)
            sizes.update(zip(used, array.shape, strict=True))
            if names[name] in data:
                raise ArgumentError(
                    f"site {name!r} would be called {names[name]!r}, as another one is; leave one "
                    f"of them out with sites=[...]"
                )
            data[names[name]] = (used, array)
        coords = {dim: np.arange(size) for dim, size in sizes.items()}
        for dim, labels in self.coords.items():
            if dim not in sizes:
                continue
            if len(labels) == sizes[dim]:
                coords[dim] = np.asarray(labels)
            elif not lenient:
                raise ArgumentError(
                    f"to_arviz(coords=...) gives dimension {dim!r} {len(labels)} labels, but its "
                    f"length is {sizes[dim]}"
                )
        return xarray.Dataset(data, coords=coords)

    def check_coords(self, datasets: Iterable[Any], others: Iterable[str]) -> None:
        """Refuse coordinates of dimensions that do not exist.

        Args:
            datasets: all that is exported.
            others: dimensions of variables that could be exported.

        Raises:
            ArgumentError: if there is one.
        """
        known = {str(dim) for dataset in datasets for dim in dataset.dims} | set(others)
        known |= {"chain", "draw"}
        unknown = [dim for dim in self.coords if dim not in known]
        if unknown:
            raise ArgumentError(
                f"to_arviz(coords=...) names {unknown}, but the dimensions are {sorted(known)}"
            )


def _event_dim(site: Mapping[str, Any]) -> int:
    """How many of a value's last axes belong to no plate.

    Pyro takes all axes of a deterministic site for event axes unless told otherwise; those of
    plates are where the lengths are the plates'.
    """
    fn, shape = site["fn"], site["value"].shape
    plates = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    if not plates or not site["infer"].get("_deterministic", False):
        return fn.event_dim
    for event_dim in (fn.event_dim, *range(len(shape))):
        batch = shape[: len(shape) - event_dim]
        if all(len(batch) >= -one.dim and batch[one.dim] == one.size for one in plates):
            return event_dim
    return fn.event_dim


def _are_names(dims: Any) -> bool:
    """Whether names of dimensions are a list of texts."""
    return (
        isinstance(dims, Sequence)
        and not isinstance(dims, str)
        and all(isinstance(dim, str) for dim in dims)
    )


def _rank(labels: Any) -> int:
    """How many axes some labels have; -1 of what is no array."""
    try:
        return np.asarray(labels).ndim
    except ValueError:
        return -1


def _without_slash(name: str) -> str:
    return name.replace("/", ".")
