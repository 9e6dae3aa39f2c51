"""Discrete latent sites, summed out in parallel, with operations that vmap can batch.

Pyro's own elimination reads ``tensor.data`` and takes logarithms by an old-style autograd function,
both of which ``torch.func.vmap`` refuses.
"""

from collections import OrderedDict
from typing import Any

import torch
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor


class Enumerate(EnumMessenger):
    """Pyro's parallel enumeration, which runs under vmap too."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, Tensor):
            # Only the shape is read; `infer` is the same dictionary, so what is noted there stays.
            msg = {**msg, "value": torch.empty(value.shape, device="meta")}
        super()._pyro_post_sample(msg)


class _EliminationRing(LogRing):
    """Sums of products of exponentials, one variable after the other."""

    def sumproduct(self, terms: list[Any], dims: Any) -> Any:
        terms = list(terms)
        remaining = set(dims)
        while remaining:
            # The variable whose factors span the fewest others goes first.
            dim = min(sorted(remaining), key=lambda d: len(_scope(_having(terms, d))))
            factor = _product(_having(terms, dim))
            terms = [term for term in terms if dim not in term._pyro_dims]
            names = factor._pyro_dims
            summed = factor.logsumexp(names.index(dim))
            summed._pyro_dims = names.replace(dim, "")
            terms.append(summed)
            remaining.discard(dim)
        return _product(terms)


def _having(terms: list[Any], dim: str) -> list[Any]:
    return [term for term in terms if dim in term._pyro_dims]


def _scope(terms: list[Any]) -> set[str]:
    return set().union(*(term._pyro_dims for term in terms))


def _product(terms: list[Any]) -> Any:
    """Sum of log factors with named dimensions."""
    if len(terms) == 1:
        return terms[0]
    aligned = packed.broadcast_all(*terms)
    total = sum(aligned[1:], aligned[0])
    total._pyro_dims = aligned[0]._pyro_dims
    return total


def marginal_log_prob(trace: Any) -> Tensor:
    """Log density of an enumerated trace, its discrete sites summed out.

    A factor's ``poutine.scale`` (and a plate's, where it subsamples) multiplies the log of the sum,
    as in Pyro's ``TraceEnum_ELBO``; a mask acts inside the sum.

    Args:
        trace: a trace of a model that ran inside `Enumerate`.

    Raises:
        ValueError: from Pyro, if the model's shapes or scales do not allow it.
    """
    nodes = [site for site in trace.nodes.values() if site["type"] == "sample"]
    trace.compute_log_prob()
    trace.pack_tensors()
    costs, log_factors, _, sum_dims, scale = _compute_model_factors(trace, Trace())
    total = nodes[0]["log_prob_sum"].new_zeros(())
    for terms in costs.values():
        for term in terms:
            total = total + term.sum()
    if log_factors:
        sizes: dict[str, int] = {}
        for terms in log_factors.values():
            for term in terms:
                sizes.update(zip(term._pyro_dims, term.shape, strict=True))
        ring = _EliminationRing(dim_to_size=sizes)
        contracted = contract_tensor_tree(OrderedDict(log_factors), sum_dims, ring=ring)
        for terms in contracted.values():
            for term in terms:
                total = total + term.sum() * scale
    return total
