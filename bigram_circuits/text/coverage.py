"""How well a text covers what is counted on it: tokens, and the contexts of n-grams."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from bigram_circuits.storage.arrays import release_pages
from bigram_circuits.storage.typed import Record
from bigram_circuits.text.counting import count_contexts

_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class ContextCoverage(Record):
    """How often the contexts of an n-gram occur in the training part, and how many held-out positions have them."""

    order: int
    """Number of tokens in the n-gram; a context is one token shorter."""
    contexts: int
    """Number of distinct contexts in the training part that a token follows in the same sequence."""
    once: int
    """Number of these that occur only once: their distribution is a single token."""
    train_once: float
    """Share of the training positions whose context is one of these."""
    held_out_once: float
    """Share of the held-out positions whose context is one of these."""
    held_out_unseen: float
    """Share of the held-out positions whose context is not in the training part: they get a shorter n-gram."""


def context_coverage(
    train: Integer[np.ndarray, "train_sequence position"],
    held_out: Integer[np.ndarray, "held_out_sequence position"],
    order: int,
    *,
    d_vocab: int,
) -> ContextCoverage | None:
    """Count the contexts of n-grams of an order, 2 or 3; positions are those with a full context and a next token.

    Returns:
        None if the sequences of either part are too short to hold an n-gram, or there are none.
    """
    if min(train.shape[1], held_out.shape[1]) < order or not len(train) or not len(held_out):
        return None
    contexts, counts = count_contexts(train, order - 1, d_vocab=d_vocab)
    theirs, times = count_contexts(held_out, order - 1, d_vocab=d_vocab)
    place = np.searchsorted(contexts, theirs).clip(max=len(contexts) - 1)
    found = np.where(contexts[place] == theirs, counts[place], 0)
    once = int((counts == 1).sum())
    return ContextCoverage(
        order,
        len(contexts),
        once,
        once / int(counts.sum()),
        int(times[found == 1].sum()) / int(times.sum()),
        int(times[found == 0].sum()) / int(times.sum()),
    )


def count_tokens(tokens: Integer[np.ndarray, "sequence position"], d_vocab: int) -> Integer[np.ndarray, " d_vocab"]:
    """Count every token of a vocabulary."""
    total = np.zeros(d_vocab, np.int64)
    for start in range(0, len(tokens), _ROWS_AT_ONCE):
        chunk = tokens[start : start + _ROWS_AT_ONCE]
        total += np.bincount(chunk.ravel(), minlength=d_vocab)
        release_pages(chunk)
    return total
