"""What a subnetwork is asked to reproduce: the protocol that every target follows.

An `NGramTable` is one. So is any object with `cross_entropy` and `surprisal`; KL and top-1 agreement are reported
for targets that also have `entropy` and `top1`, as an `NGramTable` has.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Integer
from torch import Tensor


@runtime_checkable
class Target(Protocol):
    """A distribution over the next token at every position."""

    def cross_entropy(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos"]:
        """CE from the target's distribution to softmax(logits), nats; differentiable in `logits`."""
        ...

    def surprisal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """-log P(actual next token), nats; inf where that probability is 0."""
        ...


def check_target(target: Any, d_vocab: int) -> None:
    """Raise ValueError unless `target` follows the protocol and, where it has a vocabulary, has the model's."""
    if not isinstance(target, Target):
        raise ValueError(f"a target needs the methods cross_entropy and surprisal; {type(target).__name__} lacks one")
    theirs = getattr(target, "d_vocab", d_vocab)
    if theirs != d_vocab:
        raise ValueError(
            f"the target was counted over a vocabulary of {theirs}, but the model's is {d_vocab}: "
            f"count it again with d_vocab={d_vocab}"
        )


def entropy(target: Any, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    """The target's entropy at each position, nats; nan if the target cannot tell."""
    if hasattr(target, "entropy"):
        return target.entropy(tokens)
    return torch.full(tokens.shape, torch.nan, device=tokens.device)


def top1(target: Any, tokens: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "batch pos"] | None:
    """The target's most likely next token at each position; None if the target cannot tell."""
    return target.top1(tokens) if hasattr(target, "top1") else None


def describe(target: Any) -> dict[str, Any]:
    """What tells this target from another, as JSON values: its kind, and its fingerprint if it has one."""
    return {"kind": type(target).__name__, "fingerprint": getattr(target, "fingerprint", None)}
