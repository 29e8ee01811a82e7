"""The interface of targets, and how other objects are wrapped to fit it.

A target is a distribution over the next token. It needs `cross_entropy` and `surprisal`; everything else has a default
in `Target`. A target may be defined at some positions only: `cross_entropy` then returns [batch, n] for those n
positions, `positions` selects them, and `entropy` and `top1` refer to the same ones. If the positions differ between
sequences, it is a `PlacedTarget`.

To give a target a name on the command line, add a module with a `TARGET` to this folder.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from bigram_circuits.models.activations import n_outputs, predicts_tokens
from bigram_circuits.models.model import Model
from bigram_circuits.text.corpus import Corpus, in_order
from bigram_circuits.text.ngrams import NGramTable

_AT_ONCE = 1 << 25  # probabilities of a target held at once: 128 MiB


class Target(ABC):
    """A distribution over the next token, at all positions or at some of them.

    Example:
        >>> class Uniform(bc.Target):
        ...     def cross_entropy(self, logits, tokens):  # [batch, pos, d_vocab], [batch, pos] -> [batch, pos]
        ...         return -logits.log_softmax(-1).mean(-1)
        ...     def surprisal(self, tokens):  # of each next token: [batch, pos] -> [batch, pos - 1]
        ...         return math.log(model.cfg.d_vocab) * torch.ones(tokens[:, 1:].shape)
    """

    d_vocab: int | None = None
    """Size of the vocabulary; None if any will do."""
    positions: slice = slice(None)
    """The positions at which it is defined."""
    context_length: int | None = None
    """The number of last tokens that its distributions depend on; None: all of them, or unknown."""
    fingerprint: str | None = None
    """Distinguishes it from other targets of the same class."""
    over_tokens: bool = True
    """Whether it is a distribution over the next token; False: over outputs of a model that are no tokens."""

    @abstractmethod
    def cross_entropy(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch n"]:
        """Return CE(target, softmax(logits)) in nats; differentiable in `logits`."""

    @abstractmethod
    def surprisal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """Return -log P(actual next token) in nats; inf where that probability is 0 or the target is undefined."""

    def entropy(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch n"] | None:
        """Return the entropy of its distributions in nats; None if unknown, in which case KL is undefined."""
        return None

    def top1(self, tokens: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "batch n"] | None:
        """Return its most likely next tokens; None if unknown."""
        return None

    def log_probs(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"] | None:
        """Return log P(next token), dense; None if unknown."""
        return None

    def message_bits(self, kl: float) -> float | None:
        """Return the bits of a short message that gives its distributions up to a KL in nats; None if unknown."""
        return None

    @property
    def kind(self) -> str:
        """The name of its class."""
        return type(self).__name__


Target.register(NGramTable)  # it implements the full interface


class PlacedTarget(Target):
    """A target at places that differ between sequences, such as the answers to prompts, and on known sequences alone.

    Its `cross_entropy`, `entropy` and `agreement` have one value for a sequence, [batch, 1].
    """

    most_places: int = 1
    """The most predictions of a sequence, whose cross-entropies are added up."""

    @abstractmethod
    def counted(self, tokens: Integer[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos_minus_1"]:
        """Return where the prediction of the next token counts in the model's loss."""

    @abstractmethod
    def agreement(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch 1"]:
        """Return 1 where the model's most likely answer is the target's, else 0."""

    @abstractmethod
    def read(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "place d_vocab"]:
        """Return the logits at its places, of all sequences one after the other."""

    @abstractmethod
    def nonsense(self, seed: int) -> PlacedTarget:
        """Return a target of the same shape that means nothing, on the same sequences."""

    @abstractmethod
    def everywhere(self) -> Target:
        """Return a target on any sequences whose cost is about that of this one or higher, to forecast it."""


class _Foreign(Target):
    """Wraps an object with the methods of a target; missing methods fall back to the defaults."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self.d_vocab = getattr(target, "d_vocab", None)
        self.positions = getattr(target, "positions", Target.positions)
        self.context_length = getattr(target, "context_length", None)
        self.fingerprint = getattr(target, "fingerprint", None)
        self.over_tokens = getattr(target, "over_tokens", True)

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
    """Check an object and convert it to a `Target`; every target enters the package through here.

    Args:
        target: A `Target`, or any object with `cross_entropy` and `surprisal`.
        d_vocab: Size of the model's vocabulary.

    Raises:
        ValueError: If it lacks one of these methods, or its vocabulary has another size.
    """
    taken = _as_is(target)
    if taken.d_vocab not in (None, d_vocab):
        raise ValueError(
            f"the target was counted over a vocabulary of {taken.d_vocab}, but the model's is {d_vocab}: "
            f"count it again with d_vocab={d_vocab}"
        )
    return taken


def target_of(target: Any, model: Model) -> Target:
    """`as_target`, for the outputs of a model.

    Raises:
        ValueError: As `as_target`; and if the target is of the next token, but the model's outputs are no tokens.
    """
    taken = as_target(target, model.cfg.d_vocab) if predicts_tokens(model) else _as_is(target)
    if taken.over_tokens != predicts_tokens(model):
        outputs = "tokens" if predicts_tokens(model) else f"{n_outputs(model)} values, no tokens"
        raise ValueError(
            f"the target ({taken.kind}) does not fit: the outputs of this model are {outputs}; a ModelTarget of this "
            f"model does"
        )
    return taken if predicts_tokens(model) else as_target(taken, n_outputs(model))


def is_target(target: Any) -> bool:
    """Whether an object can be used as a target."""
    needed = ("cross_entropy", "surprisal")
    return not isinstance(target, type) and all(callable(getattr(target, name, None)) for name in needed)


def _as_is(target: Any) -> Target:
    return target if isinstance(target, Target) else _foreign(target)


def _foreign(target: Any) -> Target:
    if not is_target(target):
        raise ValueError(f"a target needs the methods cross_entropy and surprisal; {type(target).__name__} lacks one")
    return _Foreign(target)


def entropy(target: Target, tokens: Integer[Tensor, "batch pos"], n: int) -> Float[Tensor, "batch n"]:
    """Return the target's entropy at its n positions, in nats; nan if the target does not know it."""
    found = target.entropy(tokens)
    return (
        torch.full((len(tokens), n), torch.nan, dtype=torch.float32, device=tokens.device) if found is None else found
    )


def top1_agreement(
    target: Target, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"], n: int
) -> Float[Tensor, "batch n"]:
    """Return 1 where model and target agree on the most likely token, else 0; nan if the target does not know it."""
    if isinstance(target, PlacedTarget):
        return target.agreement(logits, tokens)
    theirs = target.top1(tokens)
    if theirs is None:
        return _unknown(tokens, n)
    return (logits.argmax(-1)[:, target.positions] == theirs).float()


def logits_at(
    target: Target, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
) -> Float[Tensor, "place d_vocab"]:
    """Return the logits at the positions of a target, of all sequences one after the other."""
    if isinstance(target, PlacedTarget):
        return target.read(logits, tokens)
    return logits[:, target.positions].flatten(0, 1)


def counted(target: Target, tokens: Integer[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos_minus_1"]:
    """Return where the prediction of the next token counts in the model's loss: everywhere, except for some targets."""
    if isinstance(target, PlacedTarget):
        return target.counted(tokens)
    return torch.ones(tokens[:, 1:].shape, dtype=torch.bool, device=tokens.device)


def _unknown(tokens: Integer[Tensor, "batch pos"], n: int) -> Float[Tensor, "batch n"]:
    return torch.full((len(tokens), n), torch.nan, dtype=torch.float32, device=tokens.device)


@dataclass(frozen=True)
class TargetKind:
    """A kind of target that has a name on the command line."""

    make: Callable[[Any, Corpus, int], Target | NGramTable]
    """Builds the target from a model, a corpus and an n-gram order."""
    label: Callable[[int], str]
    """Its name in titles, given the n-gram order: `bigram`."""
    meaning: Callable[[int], str]
    """A phrase that completes "reproduce ...", given the n-gram order."""
    kind: str
    """Name of the class of what `make` returns."""
    does: Callable[[int], str]
    """A phrase without jargon that completes "enough to ...", given the n-gram order."""
    like: Callable[[int], str]
    """A phrase without jargon that completes "predictions that agree with ...", given the n-gram order."""
    uses_order: bool = False
    """Whether the n-gram order matters."""


def kl_of_best_constant(target: Target, tokens: Integer[np.ndarray, "sequence position"]) -> float:
    """Mean KL (nats) from a target to its own mean distribution over a text; nan if it has no `log_probs` or `entropy`.

    It is the mutual information, under the target, of the context and the next token.
    """
    total, entropies, n = torch.zeros(1, dtype=torch.float64), 0.0, 0
    for batch in in_order(tokens, max(1, _AT_ONCE // (tokens.shape[1] * (target.d_vocab or 1)))):
        log_probs, entropy = target.log_probs(batch), target.entropy(batch)
        if log_probs is None or entropy is None:
            return math.nan
        probs = log_probs.exp().flatten(0, -2)
        total = total + probs.sum(0).double().cpu()
        entropies += float(entropy.double().sum())
        n += len(probs)
    return float(torch.special.entr(total / n).sum()) - entropies / n
