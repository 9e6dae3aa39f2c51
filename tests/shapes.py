"""Checks the shapes that annotations promise, in tests only.

``--jaxtyping-packages=pyro_fordes,tests.shapes.check`` (see pyproject.toml) puts this on every
function of the package. Other annotations are left to mypy, so that wrong arguments reach the
library's own errors.
"""

import functools
import inspect

from jaxtyping import AbstractArray


def _is_shape(annotation):
    return isinstance(annotation, type) and issubclass(annotation, AbstractArray)


def check(function):
    """Check arguments and result that are annotated with a shape."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return function
    shaped = [p.name for p in signature.parameters.values() if _is_shape(p.annotation)]
    returns = signature.return_annotation if _is_shape(signature.return_annotation) else None
    if not shaped and returns is None:
        return function

    @functools.wraps(function)
    def checked(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        for name in shaped:
            if name in arguments:
                _require(function, name, arguments[name], signature.parameters[name].annotation)
        result = function(*args, **kwargs)
        if returns is not None:
            _require(function, "result", result, returns)
        return result

    return checked


def _require(function, name, value, annotation):
    if not isinstance(value, annotation):
        shape = tuple(getattr(value, "shape", ()))
        raise TypeError(f"{function.__qualname__}: {name} has shape {shape}, not {annotation}")
