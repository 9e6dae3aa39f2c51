"""One call of the model, and what replays a particle and the step's minibatches in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_fordes._checks import ModelError
from pyro_fordes.particles import Subsample
from pyro_fordes.prototype import Prototype


@dataclass(frozen=True)
class Run:
    """A call of the model.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        prototype: the prototype run for these.
        subsamples: what the subsampled plates drew, by plate.
    """

    args: tuple
    kwargs: Mapping[str, Any]
    prototype: Prototype
    subsamples: Mapping[str, Subsample]


class Replay(Messenger):
    """Give latent sites a particle's values and subsampled plates the step's indices."""

    def __init__(self, values: Mapping[str, Tensor], subsamples: Mapping[str, Subsample]) -> None:
        super().__init__()
        self._values = values
        self._subsamples = subsamples

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self._values:
            msg["value"] = self._values[name]
            msg["done"] = True
        elif name in self._subsamples and site_is_subsample(msg):
            drawn, fn = self._subsamples[name], msg["fn"]
            if (fn.size, fn.subsample_size) != (drawn.size, len(drawn.indices)):
                raise ModelError(
                    f"plate '{name}' has size {fn.size} and subsample size {fn.subsample_size}, "
                    f"but had {drawn.size} and {len(drawn.indices)} when the model was run with "
                    f"arguments of the same shapes; sizes must follow from the arguments' shapes"
                )
            msg["value"] = drawn.indices
            msg["done"] = True
