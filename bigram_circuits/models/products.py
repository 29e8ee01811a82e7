"""Masked weights that are made once for many forward passes; of sparse ones, only what is not 0 is multiplied.

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

from bigram_circuits.models.activations import forwards_replaced
from bigram_circuits.models.model import Model
from bigram_circuits.models.weights import WeightGate, gate_of, weight_sites

_MOST = 0.05  # share of weights that are not 0, above which dense products are as fast
_LEAST_TOKENS = 1 << 12  # below, it takes as long to find the weights that are not 0
_TOKENS_AT_ONCE = 256
_FEW_TOKENS = 64  # a pass of fewer is as fast with the dense matrix


MOST_KEPT = 1 << 30
"""Bytes of masked weights that are kept beside the weights themselves; matrices beyond it are masked in every pass."""


@contextmanager
def masked_once(model: Model, tokens: int = 0) -> Iterator[None]:
    """Within the `with` block, a masked model's weights are masked once, not in every forward pass without gradients.

    Nobody may edit weights or masks meanwhile. Where that is faster, products skip what is 0 in sparse matrices: not on
    a GPU, in another precision than float32, for matrices that are not masked or not sparse, or for few tokens.

    Args:
        model: Within the block that masks it.
        tokens: How many will pass through the model, if that is known.
    """
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    gates: list[WeightGate] = []
    left = MOST_KEPT
    look_for_sparse = tokens >= _LEAST_TOKENS and torch.backends.mkl.is_available()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sparse tensors are in beta
            for site in weight_sites(model):
                if (gate := gate_of(site.leaf)) is None or not gate.active:
                    continue
                weight = gate(site.original)
                if look_for_sparse and (matrix := _sparse(site.leaf, weight)) is not None:
                    forwards[site.leaf] = partial(_forward, site.leaf, matrix, site.leaf.forward)
                elif (left := left - weight.nbytes) >= 0:
                    gate.kept = weight
                    gates.append(gate)
        with forwards_replaced(forwards):
            yield
    finally:
        for gate in gates:
            gate.kept = None


def _sparse(leaf: nn.Module, weight: Tensor) -> Tensor | None:
    """A leaf's masked weight, outputs by inputs in compressed rows; None if dense products are better."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or "forward" in vars(leaf):
        return None
    if int(weight.count_nonzero()) > _MOST * weight.numel():
        return None
    return (weight if isinstance(leaf, nn.Linear) else weight.T.contiguous()).to_sparse_csr()


def _forward(leaf: Any, matrix: Tensor, dense: Callable[..., Any], x: Float[Tensor, "*rows d_in"]) -> Any:
    """What a linear layer (or Conv1D) returns."""
    rows = x.reshape(-1, x.shape[-1])
    gate = gate_of(leaf)
    is_masked = gate is not None and gate.active  # not within `full_weights`
    if not is_masked or torch.is_grad_enabled() or x.dtype != torch.float32 or len(rows) < _FEW_TOKENS:
        return dense(x)
    if matrix._nnz() == 0:  # a matrix of which nothing is kept
        nothing = x.new_zeros(matrix.shape[0]) if leaf.bias is None else leaf.bias
        return nothing.expand(*x.shape[:-1], -1).clone()
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
