"""What every target offers, and how an object of any kind is taken as one.

A target is a distribution over the next token. It needs `cross_entropy` and `surprisal`; everything else has a default
in `Target`. A target may speak about some positions only: `cross_entropy` then gives [batch, n] for the n positions it
has an opinion on, `positions` names them, and `entropy` and `top1` are about the same ones.

A target with a name on the command line is a module of this folder with a `TARGET`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.text.corpus import Corpus
from bigram_circuits.text.ngrams import NGramTable


class Target(ABC):
    """A distribution over the next token, at every position or at some."""

    d_vocab: int | None = None
    """Size of the vocabulary; None: any."""
    positions: slice = slice(None)
    """The positions that it speaks about."""
    fingerprint: str | None = None
    """What tells it from another target of its kind."""

    @abstractmethod
    def cross_entropy(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch n"]:
        """CE from the target's distribution to softmax(logits), nats; differentiable in `logits`."""

    @abstractmethod
    def surprisal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """-log P(actual next token), nats; inf where that probability is 0 or the target has no opinion."""

    def entropy(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch n"] | None:
        """Entropy of its distributions, nats; None if it cannot tell, and then KL is undefined."""
        return None

    def top1(self, tokens: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "batch n"] | None:
        """Its most likely next tokens; None if it cannot tell."""
        return None

    def log_probs(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"] | None:
        """Its distributions, dense; None if it cannot tell."""
        return None

    @property
    def kind(self) -> str:
        """The name of its class."""
        return type(self).__name__


Target.register(NGramTable)  # which has all of this


class _Foreign(Target):
    """An object with the methods of a target, made anywhere: what it lacks has the defaults."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self.d_vocab = getattr(target, "d_vocab", None)
        self.positions = getattr(target, "positions", Target.positions)
        self.fingerprint = getattr(target, "fingerprint", None)

    @property
    def kind(self) -> str:
        return type(self._target).__name__

    def cross_entropy(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch n"]:
        return self._target.cross_entropy(logits, tokens)

    def surprisal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        return self._target.surprisal(tokens)

    def entropy(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch n"] | None:
        return self._ask("entropy", tokens)

    def top1(self, tokens: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "batch n"] | None:
        return self._ask("top1", tokens)

    def log_probs(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"] | None:
        return self._ask("log_probs", tokens)

    def _ask(self, name: str, tokens: Tensor) -> Tensor | None:
        method = getattr(self._target, name, None)
        return None if method is None else method(tokens)


def as_target(target: Any, d_vocab: int) -> Target:
    """Take an object as a target of a model: the one door that targets come in by.

    Args:
        target: A `Target`, or any object with `cross_entropy` and `surprisal`.
        d_vocab: Size of the model's vocabulary.

    Raises:
        ValueError: If it lacks one of these methods, or has another vocabulary.
    """
    taken = target if isinstance(target, Target) else _foreign(target)
    if taken.d_vocab not in (None, d_vocab):
        raise ValueError(
            f"the target was counted over a vocabulary of {taken.d_vocab}, but the model's is {d_vocab}: "
            f"count it again with d_vocab={d_vocab}"
        )
    return taken


def is_target(target: Any) -> bool:
    """Whether an object can be taken as a target."""
    needed = ("cross_entropy", "surprisal")
    return not isinstance(target, type) and all(callable(getattr(target, name, None)) for name in needed)


def _foreign(target: Any) -> Target:
    if not is_target(target):
        raise ValueError(f"a target needs the methods cross_entropy and surprisal; {type(target).__name__} lacks one")
    return _Foreign(target)


def entropy(target: Target, tokens: Integer[Tensor, "batch pos"], n: int) -> Float[Tensor, "batch n"]:
    """The target's entropy at the n positions it speaks about, nats; nan if the target cannot tell."""
    found = target.entropy(tokens)
    return torch.full((len(tokens), n), torch.nan, device=tokens.device) if found is None else found


def top1_agreement(
    target: Target, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"], n: int
) -> Float[Tensor, "batch n"]:
    """1 where logits and target have the same most likely token, at the n positions; nan if the target cannot tell."""
    theirs = target.top1(tokens)
    if theirs is None:
        return torch.full((len(tokens), n), torch.nan, device=tokens.device)
    return (logits.argmax(-1)[:, target.positions] == theirs).float()


@dataclass(frozen=True)
class TargetKind:
    """A target that has a name on the command line."""

    make: Callable[[Any, Corpus, int], Target | NGramTable]
    """Makes it, of a model, a corpus and an order of n-grams."""
    label: Callable[[int], str]
    """Its name in a title, by order: `bigram`."""
    meaning: Callable[[int], str]
    """What it is, in words that follow "reproduce", by order."""
    uses_order: bool = False
    """Whether the order matters."""
