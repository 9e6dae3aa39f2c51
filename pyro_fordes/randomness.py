r"""Random numbers that a model draws while it is evaluated (dropout masks, noise), per particle.

Particle :math:`i` draws from a stream of its own, seeded by the evaluation's seed and :math:`i`.
The numbers are then the same whether particles are evaluated together or one by one, in chunks,
twice, or in several processes.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


# The schema is the one that torch infers; torch 2.6 does not know `list[int]`.
@torch.library.custom_op(
    "pyro_fordes::draw",
    mutates_args=(),
    schema="(Tensor seed, SymInt count, str kind, SymInt[] shape, ScalarType dtype, "
    "Device device) -> Tensor",
)
def _draw(
    seed: Tensor, count: int, kind: str, shape: list[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Uniform or normal numbers that a seed and the number of the call determine.

    An operator, because vmap and tracing then take it as a whole.
    """
    generator = torch.Generator(device).manual_seed(mixed(int(seed), count))
    out = torch.empty(shape, dtype=dtype, device=device)
    if kind == "uniform":
        out.uniform_(generator=generator)
    elif kind == "normal":
        out.normal_(generator=generator)
    return out


@_draw.register_fake
def _(
    seed: Tensor, count: int, kind: str, shape: list[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@_draw.register_vmap
def _(info: Any, in_dims: tuple, seed: Tensor, *args: Any) -> tuple[Tensor, int | None]:
    if in_dims[0] is None:
        return _draw(seed, *args), None
    return torch.stack([_draw(one, *args) for one in seed.unbind(in_dims[0])]), 0


def mixed(seed: int, number: int) -> int:
    """A seed from a seed and a number, so that neighbours have nothing in common (SplitMix64).

    Example:
        >>> mixed(0, 0) == mixed(0, 1)
        False
    """
    word = (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return (word ^ (word >> 31)) % 2**63


@dataclass(frozen=True)
class Draws:
    """Seeds of the random numbers that particles draw in one evaluation.

    Args:
        seed: the evaluation's seed.
        first: index of the first particle here among all.
        same: whether all particles draw the same numbers.
        given: seeds of the particles, where they are inputs of a graph that is traced.

    Example:
        >>> draws = Draws(0)
        >>> with Draws.stream(draws.seeds(2)[1]):
        ...     second = torch.rand(2)
        >>> with Draws.stream(Draws(0, first=1).seeds(1)[0]):
        ...     torch.equal(torch.rand(2), second)
        True
    """

    seed: int
    first: int = 0
    same: bool = False
    given: Tensor | None = None

    def numbers(self, count: int) -> list[int]:
        """Seeds of so many particles."""
        indices = [0] * count if self.same else range(self.first, self.first + count)
        return [mixed(self.seed, index) for index in indices]

    def seeds(self, count: int) -> Tensor:
        """Seeds of so many particles as a tensor on the CPU."""
        return torch.tensor(self.numbers(count)) if self.given is None else self.given

    @staticmethod
    def stream(seed: Tensor) -> "Stream":
        """A context in which torch's functions draw from the stream of a seed."""
        return Stream(seed)


class Noise(TorchFunctionMode):
    """Inside, noise in the shape of a particle tensor is drawn from the particles' own streams.

    This is for optimisers. Covered are ``randn_like`` and ``rand_like`` of one of the tensors;
    other random numbers come from the global generator.

    Args:
        tensors: the particles' tensors, particle axis first.
        first: index of the first particle here among all.

    Example:
        >>> both, second = torch.zeros(2, 3), torch.zeros(1, 3)
        >>> _ = torch.manual_seed(0)
        >>> with Noise([both]):
        ...     noise = torch.randn_like(both)
        >>> _ = torch.manual_seed(0)
        >>> with Noise([second], first=1):
        ...     torch.equal(torch.randn_like(second), noise[1:])
        True
    """

    def __init__(self, tensors: Iterable[Tensor], first: int = 0) -> None:
        super().__init__()
        self._own = {id(tensor) for tensor in tensors}
        self._first = first

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function, or draw for each particle by itself."""
        kind = _LIKE.get(func)
        if kind is None or not args or id(args[0]) not in self._own:
            return func(*args, **(kwargs or {}))
        given = {name: value for name, value in (kwargs or {}).items() if value is not None}
        like, seed = args[0], int(torch.randint(2**62, ()))
        dtype, device = given.get("dtype", like.dtype), given.get("device", like.device)
        seeds = Draws(seed, self._first).seeds(len(like))
        return torch.stack(
            [_draw(one, 0, kind, list(like.shape[1:]), dtype, device) for one in seeds]
        )


_LIKE = {torch.randn_like: "normal", torch.rand_like: "uniform"}


class Stream(TorchFunctionMode):
    """Inside, the usual random functions of torch draw from a particle's stream.

    Covered are dropout in all its forms (attention's too), ``rand``, ``randn``, their ``_like``
    forms, ``bernoulli``, ``normal``, ``bernoulli_``, ``uniform_`` and ``normal_``. Others draw
    from the global generator.

    Args:
        seed: the particle's seed; under vmap one with the particle axis.
    """

    def __init__(self, seed: Tensor) -> None:
        super().__init__()
        self.seed = seed
        self.count = 0

    def draw(self, kind: str, shape: Iterable[int], dtype: torch.dtype, device: Any) -> Tensor:
        """The next numbers of the stream."""
        self.count += 1
        device = torch.device(device)
        return _draw(self.seed, self.count, kind, list(shape), dtype, device)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function, or its form that draws from the stream."""
        if func is F.multi_head_attention_forward:
            with self:  # torch leaves the mode before it calls this method
                return opened_attention(*args, **(kwargs or {}))
        form = _FORMS.get(func)
        result = NotImplemented if form is None else form(self, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is NotImplemented else result


def _kept(stream: Stream, like: Tensor, shape: Iterable[int], p: float) -> Tensor:
    """A mask that is 0 with probability p and 1 otherwise."""
    return (stream.draw("uniform", shape, _float_of(like), like.device) >= p).to(like.dtype)


def _float_of(like: Tensor) -> torch.dtype:
    """The type that is drawn in: half precision would round probabilities."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _dropout(
    stream: Stream, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    if not training or not 0 < p <= 1:
        return NotImplemented
    mask = _kept(stream, input, input.shape, p)
    return _finish(input, input * mask / (1 - p) if p < 1 else input * 0, inplace)


def _channel_dropout(spatial: int) -> Callable[..., Any]:
    """Dropout of whole channels, for inputs with so many axes after the channel axis."""

    def form(
        stream: Stream, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Any:
        if not training or not 0 < p <= 1 or input.dim() < spatial + 1:
            return NotImplemented
        shape = (*input.shape[: input.dim() - spatial], *[1] * spatial)
        mask = _kept(stream, input, shape, p)
        return _finish(input, input * mask / (1 - p) if p < 1 else input * 0, inplace)

    return form


def _alpha_dropout(whole_channels: bool) -> Callable[..., Any]:
    """Dropout that keeps mean 0 and variance 1 behind SELU (Klambauer et al. 2017, Section 3)."""

    def form(
        stream: Stream, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
    ) -> Any:
        if not training or not 0 < p < 1:
            return NotImplemented
        low = -1.7580993408473766  # SELU's limit at minus infinity
        shape = (*input.shape[:2], *[1] * (input.dim() - 2)) if whole_channels else input.shape
        mask = _kept(stream, input, shape, p)
        scale = 1 / math.sqrt((1 - p) * (1 + p * low**2))
        return _finish(input, (input * mask + low * (1 - mask) - p * low) * scale, inplace)

    return form


def _finish(input: Tensor, value: Tensor, inplace: bool) -> Tensor:
    return input.copy_(value) if inplace else value


def _attention(
    stream: Stream,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention written out, where its weights are dropped."""
    if dropout_p == 0:
        return NotImplemented
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (part.repeat_interleave(groups, -3) for part in (key, value))
    scores = query @ key.transpose(-2, -1)
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return _dropout(stream, scores.softmax(-1), dropout_p) @ value


def _open(function: Any) -> Callable[..., Any]:
    """A Python function of torch's that does not hand itself to a mode, but what it calls.

    Otherwise the random functions inside would be out of a mode's reach.
    """
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    opened = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


opened_attention = _open(F.multi_head_attention_forward)


def _empty(stream: Stream, *size: Any, **options: Any) -> Any:
    """``empty`` with the particle axis under vmap, so that it can be filled in place there."""
    return _creation("empty")(stream, *size, **options)


def _in_place(kind: str) -> Callable[..., Any]:
    """``bernoulli_``, ``uniform_`` or ``normal_``."""

    def form(
        stream: Stream, input: Tensor, *args: Any, generator: Any = None, **options: Any
    ) -> Any:
        if generator is not None or not input.is_floating_point():
            return NotImplemented
        first, second = _PARAMETERS[kind]
        given = dict(zip((first[0], second[0]), args, strict=False)) | options
        a, b = given.get(*first), given.get(*second)
        source = "normal" if kind == "normal_" else "uniform"
        drawn = stream.draw(source, input.shape, _float_of(input), input.device)
        if kind == "bernoulli_":
            return input.copy_((drawn < a).to(input.dtype))
        return input.copy_(a + (b - a) * drawn if kind == "uniform_" else a + b * drawn)

    return form


_PARAMETERS = {
    "bernoulli_": (("p", 0.5), ("", None)),
    "uniform_": (("from", 0.0), ("to", 1.0)),
    "normal_": (("mean", 0.0), ("std", 1.0)),
}


def _creation(kind: str) -> Callable[..., Any]:
    """``rand`` or ``randn``."""

    def form(stream: Stream, *size: Any, **options: Any) -> Any:
        allowed = {"dtype", "device", "size", "requires_grad"}
        given = {name for name, value in options.items() if value not in (None, False)}
        if not given <= allowed:
            return NotImplemented  # a generator of the user's own, or a layout
        size = options.get("size", size[0] if size and not isinstance(size[0], int) else size)
        dtype = options.get("dtype") or torch.get_default_dtype()
        device = options.get("device") or torch.get_default_device()
        if not dtype.is_floating_point:
            return NotImplemented
        out = stream.draw(kind, size, dtype, device)
        return out.requires_grad_() if options.get("requires_grad") else out

    return form


def _likeness(kind: str) -> Callable[..., Any]:
    """``rand_like`` or ``randn_like``."""

    def form(stream: Stream, input: Tensor, **options: Any) -> Any:
        given = {name for name, value in options.items() if value not in (None, False)}
        dtype = options.get("dtype") or input.dtype
        if not given <= {"dtype", "device"} or not dtype.is_floating_point:
            return NotImplemented
        return stream.draw(kind, input.shape, dtype, options.get("device") or input.device)

    return form


def _bernoulli(
    stream: Stream, input: Tensor, p: Any = None, *, generator: Any = None, out: Any = None
) -> Any:
    if p is not None or generator is not None or out is not None:
        return NotImplemented
    drawn = stream.draw("uniform", input.shape, _float_of(input), input.device)
    return (drawn < input).to(input.dtype)


def _normal(stream: Stream, mean: Any, std: Any = 1.0, *args: Any, **options: Any) -> Any:
    tensors = [part for part in (mean, std) if isinstance(part, Tensor)]
    if args or any(value is not None for value in options.values()) or not tensors:
        return NotImplemented
    shape = torch.broadcast_shapes(*(part.shape for part in tensors))
    return mean + std * stream.draw("normal", shape, tensors[0].dtype, tensors[0].device)


_FORMS: dict[Any, Callable[..., Any]] = {
    F.dropout: _dropout,
    F.dropout1d: _channel_dropout(1),
    F.dropout2d: _channel_dropout(2),
    F.dropout3d: _channel_dropout(3),
    F.alpha_dropout: _alpha_dropout(False),
    F.feature_alpha_dropout: _alpha_dropout(True),
    F.scaled_dot_product_attention: _attention,
    torch.rand: _creation("uniform"),
    torch.randn: _creation("normal"),
    torch.rand_like: _likeness("uniform"),
    torch.randn_like: _likeness("normal"),
    torch.bernoulli: _bernoulli,
    Tensor.bernoulli: _bernoulli,
    torch.normal: _normal,
    torch.empty: _empty,
    Tensor.bernoulli_: _in_place("bernoulli_"),
    Tensor.uniform_: _in_place("uniform_"),
    Tensor.normal_: _in_place("normal_"),
}
