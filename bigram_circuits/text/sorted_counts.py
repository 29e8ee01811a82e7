"""Occurrences of integer keys, as sorted runs of (key, count) that are merged in the order of their keys.

Keys are collected in a buffer, which is sorted and reduced to a run of its distinct keys when it is full. Runs are
merged when they take too much memory; a run that stays large goes to an unnamed temporary file. Sixteen such files
become one (as in a log-structured merge tree), so a key is written a number of times that grows with the logarithm of
the text's length. A merge reads all its runs a piece at a time: the keys of a piece are brought in order by NumPy's
stable sort, which finds that they already are a few sorted runs and merges these.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt

from bigram_circuits.storage.arrays import GrowingArray, mapped_from, release_pages

_MERGED_AT_ONCE = 1 << 18  # entries merged at once, to fit in the CPU cache
_REDUCED_AT_ONCE = 1 << 16  # keys reduced to distinct ones at once, likewise
_FILES_TO_MERGE = 16
_COUNT = np.uint32  # of a run with fewer occurrences in total than this holds, otherwise int64

Piece = tuple[UInt[np.ndarray, " _"], Integer[np.ndarray, " _"]]
"""Distinct keys in order, and how often each occurred."""


@dataclass(frozen=True, eq=False)
class Run:
    """Distinct keys in order, and how often each occurred; in memory or memory-mapped."""

    keys: UInt[np.ndarray, " key"]
    """uint32 or uint64."""
    counts: Integer[np.ndarray, " key"]
    """uint32 or int64, at least 1."""
    total: int
    """The sum of all counts."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.keys.nbytes + self.counts.nbytes


class SortedCounts:
    """How often each key was added."""

    def __init__(self, dtype: type[np.unsignedinteger], memory: int) -> None:
        """Begin with no keys.

        Args:
            dtype: Type of the keys.
            memory: Bytes to work in: a buffer of an eighth, a new run of up to a quarter, earlier runs of three
                eighths, and a merge of those.
        """
        self._dtype, self._memory = dtype, memory
        self._buffer, self._filled = np.empty(0, dtype), 0
        self._held: list[Run] = []  # in memory
        self._stored: list[list[Run]] = []  # memory-mapped, by how often they were merged in files

    def add(self, keys: UInt[np.ndarray, " key"]) -> None:
        """Count each key once more. The keys are copied."""
        if keys.size and not len(self._buffer):
            room = max(1, self._memory // 8 // self._buffer.itemsize)
            self._buffer = np.empty(room, self._dtype)  # memory is committed only as it is filled
        while keys.size:
            part = keys[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            keys = keys[len(part) :]
            if self._filled == len(self._buffer):
                self._reduce()

    def add_run(self, run: Run) -> None:
        """Add all counts of a run, which is kept, not copied."""
        if mapped_from(run.keys) is not None:
            self._store(run, 0)
        elif len(run.keys):
            self._held.append(run)
            if sum(one.nbytes for one in self._held) > 3 * self._memory // 8:
                held, self._held = self._held, []
                run = merged_run(held, self._dtype, self._memory // 8)
                if mapped_from(run.keys) is not None:
                    self._store(run, 0)
                else:
                    self._held = [run]

    def runs(self) -> list[Run]:
        """Return everything that was counted, as runs; the memory of the buffer is given back."""
        self._reduce()
        self._buffer = np.empty(0, self._dtype)
        return [*itertools.chain(*self._stored), *self._held]

    def all(self) -> Run:
        """Return everything that was counted as one run, which also takes the place of all others here."""
        runs = self.runs()
        run = runs[0] if len(runs) == 1 else merged_run(runs, self._dtype, self._memory // 8)
        self._stored, self._held = [], []
        self.add_run(run)
        return run

    def __getstate__(self) -> dict[str, Any]:
        """Pickle what was counted, without the free room of the buffer."""
        runs = [Run(np.array(run.keys), np.array(run.counts), run.total) for run in self.runs()]
        return {**self.__dict__, "_held": runs, "_stored": []}

    def _reduce(self) -> None:
        if self._filled:
            run = _reduced(self._buffer[: self._filled])
            self._filled = 0
            self.add_run(run)

    def _store(self, run: Run, tier: int) -> None:
        if tier == len(self._stored):
            self._stored.append([])
        self._stored[tier].append(run)
        if len(self._stored[tier]) == _FILES_TO_MERGE:
            runs, self._stored[tier] = self._stored[tier], []
            self._store(merged_run(runs, self._dtype, 0), tier + 1)


def _reduced(keys: UInt[np.ndarray, " occurrence"]) -> Run:
    """Count distinct keys. Sorts `keys` in place."""
    keys.sort()
    distinct, counts, last = [], [], -1
    for at in range(0, len(keys), _REDUCED_AT_ONCE):
        part = keys[at : at + _REDUCED_AT_ONCE + 1]
        ends = np.flatnonzero(part[1:] != part[:-1]) + at
        if at + _REDUCED_AT_ONCE >= len(keys):
            ends = np.append(ends, len(keys) - 1)
        if len(ends):
            distinct.append(keys[ends])
            counts.append(np.diff(ends, prepend=last).astype(_COUNT))
            last = int(ends[-1])
    return Run(np.concatenate(distinct), np.concatenate(counts), len(keys))


def merged_run(runs: Sequence[Run], dtype: type[np.unsignedinteger], limit: int) -> Run:
    """Merge runs into one, which is memory-mapped from a temporary file if it takes more than `limit` bytes."""
    total = sum(run.total for run in runs)
    kind = np.dtype(_COUNT if total <= np.iinfo(_COUNT).max else np.int64)
    entries = limit // (np.dtype(dtype).itemsize + kind.itemsize)
    keys, counts = (GrowingArray(of, entries * np.dtype(of).itemsize) for of in (dtype, kind))
    for some_keys, some_counts in merged(runs):
        keys.append(some_keys)
        counts.append(some_counts)
    return Run(keys.finished(), counts.finished(), total)


def merged(runs: Iterable[Run]) -> Iterator[Piece]:
    """Yield the distinct keys of runs in order, with the sums of their counts, in pieces that fit in the cache."""
    runs = [run for run in runs if len(run.keys)]
    n_entries = sum(len(run.keys) for run in runs)
    at = [0] * len(runs)
    # in proportion, so that runs whose keys are spread alike all advance by as much as they may
    steps = [max(1, _MERGED_AT_ONCE * len(run.keys) // n_entries) for run in runs]
    while any(place < len(run.keys) for place, run in zip(at, runs, strict=True)):
        windows = [run.keys[place : place + step] for run, place, step in zip(runs, at, steps, strict=True)]
        unfinished = [place + step < len(run.keys) for run, place, step in zip(runs, at, steps, strict=True)]
        bound = min((window[-1] for window, is_cut in zip(windows, unfinished, strict=True) if is_cut), default=None)
        parts: list[Piece] = []
        for index, (run, window) in enumerate(zip(runs, windows, strict=True)):
            length = len(window) if bound is None else int(np.searchsorted(window, bound, side="right"))
            if length:
                parts.append((window[:length], run.counts[at[index] : at[index] + length]))
                at[index] += length
        yield _summed(parts)
        for run in runs:
            release_pages(run.keys)
            release_pages(run.counts)


def _summed(parts: Sequence[Piece]) -> Piece:
    """Merge pieces into one in the order of its keys, with the sums of their counts."""
    if len(parts) == 1:
        return np.array(parts[0][0]), parts[0][1].astype(np.int64)
    keys = np.concatenate([keys for keys, _ in parts])
    counts = np.concatenate([counts for _, counts in parts])
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    return keys[starts], np.add.reduceat(counts, starts, dtype=np.int64)
