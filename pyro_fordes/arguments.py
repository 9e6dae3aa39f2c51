"""The arguments of a model's call: found by name or position, checked, replaced."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pyro.poutine.messenger import unwrap
from torch import Tensor, nn

from pyro_fordes._checks import ArgumentError


class Arguments:
    """What a model takes.

    Args:
        model: a Pyro callable, also inside Pyro's handlers.

    Example:
        >>> def model(x, y=None): ...
        >>> Arguments(model).locate("y", (1,), {"y": 2})
        ('y', 2)
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self._signature = _signature(model)

    def locate(self, key: int | str, args: tuple, kwargs: Mapping[str, Any]) -> tuple[str, Any]:
        """Find a model argument by name or position.

        Returns:
            Its name (its position as text where the model takes ``*args``) and its value.

        Raises:
            ArgumentError: if there is no such argument in the call.
        """
        place = self.place(key, args, kwargs)
        value = args[place] if isinstance(place, int) else kwargs[place]
        names = self._names()
        if isinstance(place, int):
            return (names[place] if place < len(names) else str(place)), value
        return place, value

    def _names(self) -> list[str]:
        """Names of the parameters that can be given by position."""
        if self._signature is None:
            return []
        positional = (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        )
        return [p.name for p in self._signature.parameters.values() if p.kind in positional]

    def place(self, key: int | str, args: tuple, kwargs: Mapping[str, Any]) -> int | str:
        """Position in ``args`` or name in ``kwargs`` of an argument."""
        names = self._names()
        if isinstance(key, str) and key.isdigit():
            key = int(key)
        if isinstance(key, str):
            if key in kwargs:
                return key
            if key in names and names.index(key) < len(args):
                return names.index(key)
        else:
            if 0 <= key < len(args):
                return key
            if 0 <= key < len(names) and names[key] in kwargs:
                return names[key]
        given = names[: len(args)] or list(map(str, range(len(args))))
        given = given + list(kwargs)
        raise ArgumentError(
            f"the model has no argument {key!r} in this call; it got {', '.join(given) or 'none'}"
        )

    def check(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Raise an `ArgumentError` if the model cannot be called with these arguments."""
        if self._signature is None:
            return
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ArgumentError(
                f"the model takes {self._signature}, but was called with {len(args)} positional "
                f"arguments and the keywords {list(kwargs)}: {error}"
            ) from error


def _signature(model: Callable[..., Any]) -> inspect.Signature | None:
    """Signature of the function that Pyro calls, None where it cannot be known."""
    try:
        inner = unwrap(model)
        return inspect.signature(inner.forward if isinstance(inner, nn.Module) else inner)
    except (TypeError, ValueError):
        return None


def substitute(
    args: tuple, kwargs: Mapping[str, Any], place: int | str | None, value: Tensor
) -> tuple[tuple, Mapping[str, Any]]:
    """The call's arguments with one of them replaced."""
    if isinstance(place, int):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, str(place): value}
