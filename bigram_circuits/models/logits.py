"""A loss of a model's logits, in pieces: at a large vocabulary, logits and their gradient are the largest tensors.

Of some sequences at a time, their logits are computed, their loss, and its gradient by what the unembedding reads, so
that no more than a piece of the logits and of their gradient is ever there. This is what Liger (Hsu et al. 2024, arXiv
2410.10989) does for a language model's own loss; here autograd does it for any loss whose terms are of one sequence
each. They are then added up in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.models.activations import forwards_replaced, n_outputs, transformed_logits
from bigram_circuits.models.model import Model

_AT_ONCE = 1 << 22  # logits of a piece, but at least those of a sequence

Reader = Callable[[Float[Tensor, "rows pos d"]], Float[Tensor, "rows pos d_vocab"]]

_OTHERWISE: WeakSet[Any] = WeakSet()
"""Models whose logits turned out to be something else than what the unembedding and TransformerLens' transform give."""


def mean_cross_entropy(model: Model, target: Any, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Return the mean over sequences and positions of CE(target, softmax(logits)) in nats; differentiable.

    Args:
        model: From `load_model`, possibly gated or masked. No weight of its unembedding may need a gradient.
        target: The target.
        tokens: Token ids.
    """
    rows = max(1, _AT_ONCE // (tokens.shape[1] * n_outputs(model)))
    if rows >= len(tokens):
        return target.cross_entropy(model(tokens), tokens).mean()
    vectors, logits = before_unembedding(model, tokens)

    def loss(some: Tensor, place: slice) -> Tensor:
        return target.cross_entropy(logits(some), tokens[place])

    return _MeanInPieces.apply(vectors, loss, [slice(at, at + rows) for at in range(0, len(tokens), rows)])


def before_unembedding(
    model: Model, tokens: Integer[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos d"], Reader]:
    """Run a model up to its unembedding; return what that reads, and a function from some sequences of it to logits.

    So logits need not all be there at once. Where anything looks at them (a hook on the unembedding or on the model's
    output), or the model computes them in another way, they are returned themselves, with the identity. Whether it
    does is told by those of one position, which are computed in both ways.
    """
    unembed = getattr(model, "unembed", None)
    if unembed is None or model in _OTHERWISE or _is_watched(model, unembed):
        return model(tokens), _identity
    read: list[Tensor] = []

    def only_one(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or args[0].shape[:-1] != tokens.shape:
            return usual(*args, **kwargs)
        read.append(args[0])
        with torch.no_grad():
            return usual(args[0][:1, :1])

    usual = unembed.forward
    with forwards_replaced({unembed: only_one}):
        found = model(tokens)

    def logits(some: Float[Tensor, "rows pos d"]) -> Float[Tensor, "rows pos d_vocab"]:
        return transformed_logits(model, unembed(some))

    if len(read) == 1:
        with torch.no_grad():
            expected = logits(read[0][:1, :1])
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True):
            return read[0], logits
    elif not read:
        return found, _identity
    _OTHERWISE.add(model)
    return model(tokens), _identity


def _identity(logits: Tensor) -> Tensor:
    return logits


def _is_watched(model: Model, unembed: Any) -> bool:
    """Whether there is a hook, of PyTorch or of TransformerLens, on the unembedding or on the output."""
    modules: list[Any] = [model, model.original_model, *unembed.modules()]
    return any(one._forward_hooks or one._backward_hooks or one._backward_pre_hooks for one in modules)


class _MeanInPieces(torch.autograd.Function):
    """The mean of a loss over the rows of a tensor, whose gradient is computed, piece by piece, in the forward pass."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, loss: Callable[[Tensor, slice], Tensor], places: Sequence[slice]) -> Tensor:
        total, number = torch.zeros((), dtype=torch.float32, device=vectors.device), 0
        gradient = torch.empty_like(vectors) if ctx.needs_input_grad[0] else None
        for place in places:
            with torch.set_grad_enabled(gradient is not None):
                piece = vectors[place].detach().requires_grad_(gradient is not None)
                losses = loss(piece, place)
                if gradient is not None:
                    (gradient[place],) = torch.autograd.grad(losses.sum(), piece)
            total += losses.detach().sum()
            number += losses.numel()
        if gradient is not None:
            ctx.save_for_backward(gradient.div_(number))
        return total / number

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None
