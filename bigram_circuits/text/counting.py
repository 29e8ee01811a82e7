"""Count n-grams with an accumulating counter and freeze the counts into a table.

An n-gram of token ids is one integer key in base `d_vocab`. Keys are collected in a buffer, which is sorted and reduced
to distinct keys with counts when it is full. The buffer has a fixed size at first, and later a fixed multiple of the
number of distinct keys, so re-sorting costs a bounded share of the time, and memory grows with the number of distinct
n-grams, not with the length of the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor

from bigram_circuits.progress import progress
from bigram_circuits.storage.files import release_pages
from bigram_circuits.text.ngrams import Level, NGramTable

_TOKENS_AT_ONCE = 1 << 19  # tokens turned into n-grams at once, to fit in the CPU cache
_CHUNK_KEYS = 1 << 25  # n-grams sorted at once (128 MiB of uint32) ...
_KEYS_PER_DISTINCT = 4  # ... or this many per distinct n-gram, if that is more
_ENTRIES_AT_ONCE = 1 << 16  # row entries computed at once


def count_ngrams(
    tokens: Integer[np.ndarray, "sequence position"] | Integer[Tensor, "sequence position"],
    order: int = 2,
    *,
    d_vocab: int,
) -> NGramTable:
    """Count n-grams within sequences and return the frozen table of P(next | previous `order - 1` tokens).

    Args:
        tokens: Integer token ids [sequence, position], in memory or memory-mapped; n-grams never span two sequences.
        order: 1 (unigrams), 2 (bigrams) or 3 (trigrams).
        d_vocab: Size of the model's vocabulary: `model.cfg.d_vocab`.

    Raises:
        ValueError: If the order is not 1, 2 or 3, a token is outside the vocabulary, or every sequence is shorter than
            `order` tokens.

    Example:
        >>> trigrams = bc.count_ngrams(corpus.train, order=3, d_vocab=model.cfg.d_vocab)
        >>> print(trigrams.n_entries)
    """
    counter = NGramCounter(order, d_vocab)
    array = tokens.numpy(force=True) if isinstance(tokens, Tensor) else tokens
    if not isinstance(array, np.ndarray) or array.ndim != 2:
        what = f"shape {array.shape}" if isinstance(array, np.ndarray) else f"type {type(array).__name__}"
        raise ValueError(f"tokens have {what} but should be an array of ids [sequence, position]")
    rows = max(1, _TOKENS_AT_ONCE // max(1, array.shape[1]))
    with progress(total=array.size, unit="token", unit_scale=True, desc="counting") as bar:
        for start in range(0, len(array), rows):
            chunk = array[start : start + rows]
            counter.add(chunk)
            bar.update(chunk.size)
            release_pages(chunk)
    return counter.freeze()


def count_contexts(
    tokens: Integer[np.ndarray, "sequence position"], length: int, *, d_vocab: int
) -> tuple[Integer[np.ndarray, " context"], Integer[np.ndarray, " context"]]:
    """Count the contexts of `length` tokens that a token follows in the same sequence.

    Returns:
        Their keys, integers in base `d_vocab`, in order; and how often each occurs.
    """
    counts = _Counts(_key_type(length, d_vocab))
    rows = max(1, _TOKENS_AT_ONCE // tokens.shape[1])
    for start in range(0, len(tokens), rows):
        chunk = tokens[start : start + rows]
        counts.add(_keys(chunk[:, :-1], length, d_vocab))
        release_pages(chunk)
    return counts.all()


class NGramCounter:
    """Accumulates counts of all n-grams up to `order`; `freeze()` returns the table.

    Example:
        >>> counter = bc.NGramCounter(order=2, d_vocab=model.cfg.d_vocab)
        >>> counter.add(corpus.train[:50])
        >>> counter.add(corpus.train[50:])
        >>> table = counter.freeze()
    """

    def __init__(self, order: int, d_vocab: int) -> None:
        if order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, not {order!r}")
        if d_vocab < 1 or d_vocab**order > 2**63:
            raise ValueError(f"cannot count {order}-grams over a vocabulary of {d_vocab}")
        self.order = order
        self.d_vocab = d_vocab
        # a shorter n-gram is the start of a longer one unless it ends its sequence; only those are counted separately
        self._counts = [_Counts(_key_type(n, d_vocab)) for n in range(1, order + 1)]

    def add(self, tokens: Integer[np.ndarray, "sequence position"]) -> None:
        """Add the n-grams of some sequences. Raises ValueError if a token is outside the vocabulary."""
        if tokens.size == 0:
            return
        if tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens have dtype {tokens.dtype} but should be integer ids")
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest < 0 or highest >= self.d_vocab:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(
                f"token id {wrong} is outside the vocabulary of {self.d_vocab} (ids 0 to {self.d_vocab - 1})"
            )
        for n, counts in enumerate(self._counts, start=1):
            if n < self.order:
                counts.add(_keys(tokens[:, -n:], n, self.d_vocab))
                continue
            for at in range(0, tokens.shape[1], _TOKENS_AT_ONCE):  # split long sequences
                counts.add(_keys(tokens[:, at : at + _TOKENS_AT_ONCE + n - 1], n, self.d_vocab))

    def freeze(self) -> NGramTable:
        """Return the table of everything counted so far. Raises ValueError if no n-gram of the full order was seen."""
        keys, counts = self._counts[-1].all()
        if not len(keys):
            raise ValueError(f"the text has no {self.order}-gram: every sequence is shorter than {self.order} tokens")
        levels: list[Level] = []
        for n in range(self.order, 0, -1):
            level, totals = level_of_counts(keys, counts, self.d_vocab)
            levels.insert(0, level)
            if n > 1:
                shorter = level.contexts.numpy().astype(_key_type(n - 1, self.d_vocab)), totals
                keys, counts = _merge(shorter, self._counts[n - 2].all())
        return NGramTable(order=self.order, d_vocab=self.d_vocab, levels=tuple(levels))


class _Counts:
    """Occurrences of each key. When the buffer is full, it is reduced to one copy of each distinct key."""

    def __init__(self, dtype: type[np.unsignedinteger]) -> None:
        self._buffer, self._filled = np.empty(0, dtype), 0
        self._repeated, self._besides = np.empty(0, dtype), np.empty(0, np.int64)  # keys, and further occurrences

    def add(self, keys: np.ndarray) -> None:
        while keys.size:
            if self._filled == len(self._buffer):
                self._make_room()
            part = keys[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            keys = keys[len(part) :]

    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the distinct keys in order, and how often each occurred."""
        keys, counts = _run_lengths(self._buffer[: self._filled])
        counts[np.searchsorted(keys, self._repeated)] += self._besides
        return keys, counts

    def _make_room(self) -> None:
        keys, counts = self.all()
        repeated = counts > 1
        self._repeated, self._besides = keys[repeated], counts[repeated] - 1
        room = max(_CHUNK_KEYS, _KEYS_PER_DISTINCT * len(keys))
        if room > len(self._buffer):
            self._buffer = np.empty(room, keys.dtype)  # memory is committed only as it is filled
        self._buffer[: len(keys)], self._filled = keys, len(keys)


def _key_type(n: int, d_vocab: int) -> type[np.unsignedinteger]:
    """Return the smallest integer type that holds every n-gram and sorts fast."""
    return np.uint32 if d_vocab**n <= 2**32 else np.uint64


def _keys(tokens: Integer[np.ndarray, "sequence position"], n: int, d_vocab: int) -> np.ndarray:
    """Encode all n-grams as integers in base `d_vocab`, first token most significant."""
    dtype = _key_type(n, d_vocab)
    length = tokens.shape[1] - n + 1
    if length < 1:
        return np.zeros(0, dtype)
    keys = tokens[:, :length].astype(dtype)
    for offset in range(1, n):
        keys *= dtype(d_vocab)
        # without `dtype`, NumPy would add uint64 and int64 as float64 and round keys above 2**53
        np.add(keys, tokens[:, offset : offset + length], out=keys, dtype=dtype, casting="unsafe")
    return keys.reshape(-1)


def _run_lengths(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct keys in order, and how often each occurs. Sorts `keys` in place."""
    keys.sort()
    starts = _starts(keys)
    return keys[starts], _lengths(starts, len(keys))


def _merge(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Merge two sorted lists of distinct keys, adding the counts of shared keys."""
    keys = np.concatenate([first[0], second[0]])
    order = np.argsort(keys, kind="stable")  # linear time on two sorted halves
    keys = keys[order]
    starts = _starts(keys)
    return keys[starts], np.add.reduceat(np.concatenate([first[1], second[1]])[order], starts)


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Return the index at which each run of equal values begins."""
    begins = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=begins[1:])
    return np.flatnonzero(begins)


def _lengths(starts: np.ndarray, end: int) -> np.ndarray:
    """Return the lengths of the runs that begin at `starts`; the last run stops at `end`."""
    lengths = np.empty(len(starts), np.int64)
    np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
    lengths[-1:] = end - starts[-1:]
    return lengths


def level_of_counts(keys: np.ndarray, counts: np.ndarray, d_vocab: int) -> tuple[Level, np.ndarray]:
    """Build the rows from n-gram counts, in pieces that fit in the cache; also return how often each context occurs."""
    base = keys.dtype.type(d_vocab)
    begins = [np.zeros(1, np.int64)]
    for at in range(0, len(keys), _ENTRIES_AT_ONCE):
        contexts = keys[at : at + _ENTRIES_AT_ONCE + 1] // base
        begins.append(np.flatnonzero(contexts[1:] != contexts[:-1]) + (at + 1))
    starts = np.concatenate(begins)
    lengths = _lengths(starts, len(keys))
    totals = np.add.reduceat(counts, starts)
    tokens, probs = np.empty(len(keys), np.int32), np.empty(len(keys), np.float32)
    entropy, top = np.empty(len(starts), np.float32), np.empty(len(starts), np.int32)
    for rows in _row_parts(starts, len(keys)):
        begin, end = starts[rows][0], starts[rows][-1] + lengths[rows][-1]
        first, grams, own = starts[rows] - begin, keys[begin:end], counts[begin:end]
        tokens[begin:end] = grams - grams // base * base
        prob = own.astype(np.float64)
        prob /= np.repeat(totals[rows].astype(np.float64), lengths[rows])
        probs[begin:end] = prob
        entropy[rows] = -np.add.reduceat(prob * np.log(prob), first).astype(np.float32) + 0.0
        # encode (count, token) as one number: its maximum has the largest count and, among ties, the lowest token
        top[rows] = -np.maximum.reduceat(own * d_vocab - tokens[begin:end], first) % d_vocab
    level = Level(
        contexts=torch.from_numpy((keys[starts] // base).astype(np.int64)),
        offsets=torch.from_numpy(np.append(starts, len(keys)).astype(np.int64)),
        tokens=torch.from_numpy(tokens),
        probs=torch.from_numpy(probs),
        entropy=torch.from_numpy(entropy),
        top=torch.from_numpy(top),
    )
    return level, totals


def _row_parts(starts: np.ndarray, n_entries: int) -> Iterator[slice]:
    """Yield slices of rows with about `_ENTRIES_AT_ONCE` entries each, at least one row."""
    bounds = np.unique(np.searchsorted(starts, np.append(np.arange(0, n_entries, _ENTRIES_AT_ONCE), n_entries)))
    yield from itertools.starmap(slice, itertools.pairwise(bounds))
