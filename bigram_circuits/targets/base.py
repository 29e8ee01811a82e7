"""What a subnetwork is asked to reproduce: the protocol that every target follows, and targets made from a model.

An `NGramTable` is a target. So is any object with `cross_entropy` and `surprisal`; KL and top-1 agreement are reported
for targets that also have `entropy` and `top1`. A target may speak about some positions only: `cross_entropy` gives
[batch, n] for the n positions it has an opinion on, and `entropy` and `top1` are then about the same positions, which
`positions` names (all, if there is no such attribute).
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Integer
from torch import Tensor


@runtime_checkable
class Target(Protocol):
    """A distribution over the next token, at every position or at some."""

    def cross_entropy(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch n"]:
        """CE from the target's distribution to softmax(logits), nats; differentiable in `logits`."""
        ...

    def surprisal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """-log P(actual next token), nats; inf where that probability is 0 or the target has no opinion."""
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


def entropy(target: Any, tokens: Integer[Tensor, "batch pos"], n: int) -> Float[Tensor, "batch n"]:
    """The target's entropy at the n positions it speaks about, nats; nan if the target cannot tell."""
    if hasattr(target, "entropy"):
        return target.entropy(tokens)
    return torch.full((len(tokens), n), torch.nan, device=tokens.device)


def top1_agreement(
    target: Any, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"], n: int
) -> Float[Tensor, "batch n"]:
    """1 where logits and target have the same most likely token, at the n positions; nan if the target cannot tell."""
    if not hasattr(target, "top1"):
        return torch.full((len(tokens), n), torch.nan, device=tokens.device)
    ours = logits.argmax(-1)[:, getattr(target, "positions", slice(None))]
    return (ours == target.top1(tokens)).float()


def describe(target: Any) -> dict[str, Any]:
    """What tells this target from another, as JSON values: its kind, and its fingerprint if it has one."""
    return {"kind": type(target).__name__, "fingerprint": getattr(target, "fingerprint", None)}
