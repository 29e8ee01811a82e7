"""Products with the few weights that a sparse mask keeps, in place of products with matrices that are mostly 0.

On a CPU, the product of tokens with a matrix of which 2 per cent are not 0 takes a third of the time in compressed rows
(CSR), with the tokens in pieces that fit in the cache. The terms are the same, added up in another order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bigram_circuits.models.activations import forwards_replaced
from bigram_circuits.models.model import Model
from bigram_circuits.models.weights import WeightGate, weight_sites

_MOST = 0.05  # share of weights that are not 0, above which dense products are as fast
_LEAST_TOKENS = 1 << 12  # below, it takes as long to find the weights that are not 0
_TOKENS_AT_ONCE = 256
_FEW_TOKENS = 64  # a pass of fewer is as fast with the dense matrix


@contextmanager
def sparse_products(model: Model, tokens: int) -> Iterator[None]:
    """Within the `with` block, forward passes of a masked model without gradients skip what is 0 in sparse matrices.

    Nobody may edit weights or masks meanwhile. Nothing changes where that is not faster: on a GPU, in another precision
    than float32, for matrices that are not masked or not sparse, or for few tokens.

    Args:
        model: Within the block that masks it.
        tokens: How many will pass through the model.
    """
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    if tokens >= _LEAST_TOKENS and torch.backends.mkl.is_available():
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sparse tensors are in beta
            for site in weight_sites(model):
                if (matrix := _sparse(site.leaf)) is not None:
                    forwards[site.leaf] = partial(_forward, site.leaf, matrix, site.leaf.forward)
    with forwards_replaced(forwards):
        yield


def _sparse(leaf: nn.Module) -> Tensor | None:
    """The weight that a leaf applies, outputs by inputs in compressed rows; None if dense products are better."""
    original: Any = leaf.parametrizations["weight"].original if parametrize.is_parametrized(leaf, "weight") else None  # type: ignore[index]
    if original is None or original.device.type != "cpu" or original.dtype != torch.float32 or "forward" in vars(leaf):
        return None
    if not all(isinstance(gate, WeightGate) for gate in leaf.parametrizations["weight"]):  # type: ignore[index]
        return None
    weight: Any = leaf.weight
    if int(weight.count_nonzero()) > _MOST * weight.numel():
        return None
    return (weight if isinstance(leaf, nn.Linear) else weight.T.contiguous()).to_sparse_csr()


def _forward(leaf: Any, matrix: Tensor, dense: Callable[..., Any], x: Float[Tensor, "*rows d_in"]) -> Any:
    """What a linear layer (or Conv1D) returns."""
    rows = x.reshape(-1, x.shape[-1])
    is_masked = all(gate.active for gate in leaf.parametrizations["weight"])  # not within `full_weights`
    if not is_masked or torch.is_grad_enabled() or x.dtype != torch.float32 or len(rows) < _FEW_TOKENS:
        return dense(x)
    found = x.new_empty(len(rows), matrix.shape[0])
    for at in range(0, len(rows), _TOKENS_AT_ONCE):
        part, into = rows[at : at + _TOKENS_AT_ONCE], found[at : at + _TOKENS_AT_ONCE]
        product = _product(matrix, part)
        if leaf.bias is None:
            into.copy_(product)
        else:
            torch.add(product, leaf.bias, out=into)
    return found.view(*x.shape[:-1], matrix.shape[0])


def _product(matrix: Tensor, rows: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_out"]:
    """Multiply each row by a sparse matrix; with rows side by side, as compressed rows need them."""
    return (matrix @ rows.T.contiguous()).T
