"""Errors and argument checks shared by every module.

Every message says what was got, what was wanted and what to do, and names the argument or site.
"""

import importlib
import math
from types import ModuleType

from torch import Tensor


class FordesError(Exception):
    """Base class of all errors raised by pyro_fordes.

    Attributes:
        everywhere: whether all processes of a distributed run raise it at the same time.
    """

    everywhere = False


class ArgumentError(FordesError, ValueError):
    """An argument of a pyro_fordes class or function cannot be used."""


class ModelError(FordesError, RuntimeError):
    """The Pyro model, or the data it was called with, cannot be used for particle inference."""


class NumericalError(FordesError, RuntimeError):
    """A log joint, force or parameter is not finite."""


class StateError(FordesError, RuntimeError):
    """A method was called at a time when it has no answer yet."""


class CheckpointError(FordesError, RuntimeError):
    """A checkpoint cannot be written, read or used."""


class RankError(FordesError, RuntimeError):
    """A process of a distributed run has failed, or does something else than the others."""


class MissingDependencyError(FordesError, ImportError):
    """An optional package is needed and not installed."""


_EXTRAS = {
    "arviz": "arviz",
    "PIL": "vision",
    "matplotlib": "plots",
    "pandas": "eval",
    "sklearn": "eval",
    "torchvision": "vision",
    "xarray": "arviz",
}


def require(module: str) -> ModuleType:
    """Import an optional package, or say which extra installs it.

    Args:
        module: import name, such as ``"arviz"`` or ``"matplotlib.pyplot"``.

    Returns:
        The imported module.

    Raises:
        MissingDependencyError: if the package is not installed.

    Example:
        >>> require("math").floor(1.5)
        1
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        extra = _EXTRAS.get(package, "all")
        raise MissingDependencyError(
            f"this needs the package '{package}', which could not be imported ({error}); "
            f"install it with: pip install 'pyro-fordes[{extra}]'"
        ) from error


def check_positive_int(name: str, value: object) -> int:
    """Return ``value`` if it is an integer of at least 1, else raise an `ArgumentError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} must be an integer of at least 1, got {value!r}")
    if value >= 2**31:
        raise ArgumentError(f"{name} must be an integer below 2**31, got {value}")
    return value


def check_number(
    name: str, value: object, *, minimum: float = -math.inf, exclusive: bool = False
) -> float:
    """Return ``value`` as a float if it is finite and above ``minimum``, else raise.

    Args:
        name: the argument's name, for the message.
        value: what the user gave.
        minimum: the lower bound.
        exclusive: whether the bound itself is refused.

    Raises:
        ArgumentError: if the value is no finite number in the range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    too_small = value <= minimum if exclusive else value < minimum
    if not math.isfinite(value) or too_small:
        bound = (
            "" if minimum == -math.inf else f" {'above' if exclusive else 'of at least'} {minimum}"
        )
        raise ArgumentError(f"{name} must be a finite number{bound}, got {value!r}")
    return float(value)


def check_level(value: object) -> float:
    """Return the ``level`` of an interval if it is between 0 and 1, else raise."""
    level = check_number("level", value)
    if not 0 < level < 1:
        raise ArgumentError(f"level must be between 0 and 1, such as 0.95; got {value}")
    return level


def check_seed(seed: object) -> int:
    """Return the ``seed`` of some draws if it is an integer that torch takes, else raise."""
    if isinstance(seed, bool) or not isinstance(seed, int) or abs(seed) >= 2**32:
        raise ArgumentError(f"seed must be an integer below 2**32, got {seed!r}")
    return seed


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise an `ArgumentError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_part(name: str, value: object, method: str, examples: str) -> None:
    """Raise an `ArgumentError` unless ``value`` is an instance that has a method.

    Args:
        name: the argument's name.
        value: what the user gave.
        method: a method that every part of this kind has.
        examples: what could be given, for the message.
    """
    if isinstance(value, type) and hasattr(value, method):
        raise ArgumentError(f"{name} got the class {value.__name__}; write {value.__name__}(...)")
    if not hasattr(value, method):
        raise ArgumentError(f"{name} must be {examples}, got {value!r}")


def describe(tensor: Tensor) -> str:
    """Shape, dtype and device of a tensor in a few words, for messages.

    Example:
        >>> describe(torch.zeros(2, 3))
        'a (2, 3) tensor of torch.float32 on cpu'
    """
    return f"a {tuple(tensor.shape)} tensor of {tensor.dtype} on {tensor.device}"
