"""Count n-grams with an accumulating counter and freeze the counts into a table.

An n-gram of token ids is one integer key in base `d_vocab`. Occurrences of keys are kept as sorted runs, which go to
temporary files where they exceed the memory they were given (`sorted_counts.py`), and the table is built from their
merge piece by piece, likewise in a temporary file where it is large. So memory grows neither with the length of the
text nor with the number of distinct n-grams.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor

from bigram_circuits.progress import progress
from bigram_circuits.storage.arrays import GrowingArray, mapped_from, release_pages
from bigram_circuits.storage.files import whole_file
from bigram_circuits.storage.records import (
    check_content,
    check_header,
    read_tensors,
    seal_tensors,
    shown,
    write_tensors,
)
from bigram_circuits.text.ngrams import LEVEL_DTYPES, Level, NGramTable, save_levels, size_in
from bigram_circuits.text.sorted_counts import Piece, Run, SortedCounts, merged

_TOKENS_AT_ONCE = 1 << 19  # tokens turned into n-grams at once, to fit in the CPU cache
_TOKENS_APART = 1 << 24  # at least this many tokens make it worth while to hand them to another process
_CHECKED_AT_ONCE = 1 << 22  # keys checked at once when a counter is loaded
_FORMAT = "bigram_circuits.text.counting/1"
DEFAULT_MEMORY = 1 << 30
"""Bytes that counting works in."""

Tokens = Integer[np.ndarray, "sequence position"] | Integer[Tensor, "sequence position"]


def count_ngrams(
    tokens: Tokens | Iterable[Any],
    order: int = 2,
    *,
    d_vocab: int,
    workers: int = 1,
    memory: int = DEFAULT_MEMORY,
    out: str | os.PathLike[str] | None = None,
) -> NGramTable:
    """Count n-grams within sequences and return the frozen table of P(next | previous `order - 1` tokens).

    Args:
        tokens: Integer token ids [sequence, position], in memory or memory-mapped; n-grams never span two sequences.
            Or an iterable of such arrays (shards), whose sequences may differ in length: each is released before the
            next but one is asked for, so together they may be larger than memory and disk.
        order: 1 (unigrams), 2 (bigrams) or 3 (trigrams).
        d_vocab: Size of the model's vocabulary: `model.cfg.d_vocab`.
        workers: Number of processes that count. Their tokens reach them by file: a memory-mapped array's own, or a
            temporary one. A script that asks for more than one must start under `if __name__ == "__main__":`.
        memory: Bytes to work in, shared by all workers, on top of what Python and PyTorch take. Counts, and parts of a
            table, that exceed their share go to temporary files (in the folder that `TMPDIR` names).
        out: Where to save the table; it is then memory-mapped from there. Without, a table too large for its share of
            the memory is memory-mapped from a temporary file.

    Raises:
        ValueError: If the order is not 1, 2 or 3, a token is outside the vocabulary, or every sequence is shorter than
            `order` tokens.
        OSError: If a file cannot be written.

    Example:
        >>> trigrams = bc.count_ngrams(corpus.train, order=3, d_vocab=model.cfg.d_vocab)
        >>> print(trigrams.n_entries)
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1 process, not {workers}")
    counter = NGramCounter(order, d_vocab, memory=memory)
    whole = _array(tokens) if isinstance(tokens, np.ndarray | Tensor) else None
    if whole is None and (isinstance(tokens, str) or not isinstance(tokens, Iterable)):
        raise ValueError(
            f"tokens have type {type(tokens).__name__} but should be {_SHOULD_BE}, or an iterable of these"
        )
    with progress(total=None if whole is None else whole.size, unit="token", unit_scale=True, desc="counting") as bar:
        if workers > 1:
            shards = map(_array, tokens) if whole is None else _shares(whole, workers)
            for n_tokens in _count_apart(counter, shards, workers):
                bar.update(n_tokens)
        else:
            for shard in [whole] if whole is not None else map(_array, tokens):
                for rows in _rows(shard):
                    counter.add(rows)
                    bar.update(rows.size)
                    release_pages(rows)
    return counter.freeze(out)


def count_contexts(
    tokens: Integer[np.ndarray, "sequence position"], length: int, *, d_vocab: int
) -> tuple[Integer[np.ndarray, " context"], Integer[np.ndarray, " context"]]:
    """Count the contexts of `length` tokens that a token follows in the same sequence.

    Returns:
        Their keys, integers in base `d_vocab`, in order; and how often each occurs.
    """
    counts = SortedCounts(_key_type(length, d_vocab), DEFAULT_MEMORY)
    for rows in _rows(tokens):
        counts.add(_keys(rows[:, :-1], length, d_vocab))
        release_pages(rows)
    run = counts.all()
    return run.keys, run.counts.astype(np.int64)


class NGramCounter:
    """Accumulates counts of all n-grams up to `order`; `freeze()` returns the table.

    Counts of parts of a text that were made apart (by other processes, or on other machines) are saved, loaded and
    merged; the result is that of counting everything at once, to the last bit. A counter can be pickled.

    Args:
        order: 1 (unigrams), 2 (bigrams) or 3 (trigrams).
        d_vocab: Size of the model's vocabulary: `model.cfg.d_vocab`.
        memory: Bytes to work in; what exceeds them goes to temporary files (in the folder that `TMPDIR` names).

    Raises:
        ValueError: If the order is not 1, 2 or 3, `memory` is not at least 1 byte, or an n-gram of this vocabulary is
            no 64-bit integer.

    Example:
        >>> counter, other = (bc.NGramCounter(order=2, d_vocab=model.cfg.d_vocab) for _ in range(2))
        >>> counter.add(corpus.train[:50])
        >>> other.add(corpus.train[50:])
        >>> counter.merge(other)
        >>> table = counter.freeze()
    """

    def __init__(self, order: int, d_vocab: int, *, memory: int = DEFAULT_MEMORY) -> None:
        if order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, not {order!r}")
        if d_vocab < 1 or d_vocab**order > 2**63:
            raise ValueError(f"cannot count {order}-grams over a vocabulary of {d_vocab}")
        if memory < 1:
            raise ValueError(f"memory must be at least 1 byte, not {memory}")
        self.order = order
        self.d_vocab = d_vocab
        self.memory = memory
        # a shorter n-gram is the start of a longer one unless it ends its sequence; only those are counted separately
        shares = [memory // 8] * (order - 1) + [memory * (9 - order) // 8]
        self._counts = [SortedCounts(_key_type(n, d_vocab), share) for n, share in enumerate(shares, start=1)]

    def add(self, tokens: Integer[np.ndarray, "sequence position"]) -> None:
        """Add the n-grams of some sequences.

        Raises:
            ValueError: If a token is outside the vocabulary.
            OSError: If a temporary file cannot be written.
        """
        if tokens.size == 0:
            return
        if tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens have dtype {tokens.dtype} but should be integer ids")
        for rows in _rows(tokens):
            lowest, highest = int(rows.min()), int(rows.max())
            if lowest < 0 or highest >= self.d_vocab:
                wrong = lowest if lowest < 0 else highest
                raise ValueError(
                    f"token id {wrong} is outside the vocabulary of {self.d_vocab} (ids 0 to {self.d_vocab - 1})"
                )
            for n, counts in enumerate(self._counts, start=1):
                if n < self.order:
                    counts.add(_keys(rows[:, -n:], n, self.d_vocab))
                    continue
                for at in range(0, rows.shape[1], _TOKENS_AT_ONCE):  # split long sequences
                    counts.add(_keys(rows[:, at : at + _TOKENS_AT_ONCE + n - 1], n, self.d_vocab))

    def merge(self, other: NGramCounter) -> None:
        """Add everything that another counter has counted; the other one stays as it is.

        Raises:
            ValueError: If it counts n-grams of another order or vocabulary.
            OSError: If a temporary file cannot be written.
        """
        if (other.order, other.d_vocab) != (self.order, self.d_vocab):
            raise ValueError(
                f"counts of {other.order}-grams over a vocabulary of {other.d_vocab:,} cannot be merged into those of "
                f"{self.order}-grams over {self.d_vocab:,}"
            )
        for mine, theirs in zip(self._counts, other._counts, strict=True):
            for run in theirs.runs():
                mine.add_run(run)

    def freeze(self, path: str | os.PathLike[str] | None = None) -> NGramTable:
        """Return the table of everything counted so far.

        Args:
            path: Where to save it; it is then memory-mapped from there (`NGramTable.load`). Without, a table too large
                for its share of the memory is memory-mapped from a temporary file.

        Raises:
            ValueError: If no n-gram of the full order was seen.
            OSError: If a file cannot be written.
        """
        runs = self._counts[-1].runs()
        if not any(len(run.keys) for run in runs):
            raise ValueError(f"the text has no {self.order}-gram: every sequence is shorter than {self.order} tokens")
        levels: list[dict[str, np.ndarray]] = []
        for n in range(self.order, 0, -1):
            level, contexts = _level(
                merged(runs), self.d_vocab, _key_type(max(1, n - 1), self.d_vocab), self.memory // 8
            )
            levels.insert(0, level)
            if n > 1:
                runs = [contexts, *self._counts[n - 2].runs()]
        if path is not None:
            save_levels(path, self.d_vocab, levels)
            return NGramTable.load(path, verify=False)
        tensors = tuple(Level(**{name: torch.from_numpy(array) for name, array in one.items()}) for one in levels)
        return NGramTable(order=self.order, d_vocab=self.d_vocab, levels=tensors)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything counted so far as one safetensors file, with checksums.

        Raises:
            OSError: If the file, or a temporary one, cannot be written.
        """
        with whole_file(path) as temporary:
            self._write(temporary)

    def _write(self, path: Path) -> None:
        arrays: dict[str, np.ndarray] = {}
        for n, counts in enumerate(self._counts, start=1):
            run = counts.all()
            arrays |= {f"keys_{n}": run.keys, f"counts_{n}": run.counts}
        metadata = {"format": _FORMAT, "order": str(self.order), "d_vocab": str(self.d_vocab)}
        write_tensors(path, arrays, seal_tensors(arrays, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, memory: int = DEFAULT_MEMORY) -> NGramCounter:
        """Load a counter written by `save`; its counts stay in the file, which is verified and memory-mapped.

        Args:
            path: The file.
            memory: Bytes to work in.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a counter, or is damaged.
        """
        if os.path.isdir(path):
            raise ValueError(f"{str(path)!r} is a folder, but the counts of n-grams are one file")
        arrays, metadata = read_tensors(path, "holds no counts of n-grams", mapped=True)
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{str(path)!r} has format {shown(metadata.get('format'))}, but {_FORMAT!r} is needed")
        try:
            check_header(arrays, metadata, {"format", "order", "d_vocab"})
            counter = cls(size_in(metadata, "order"), size_in(metadata, "d_vocab"), memory=memory)
            wanted = {f"{name}_{n}" for n in range(1, counter.order + 1) for name in ("keys", "counts")}
            if set(arrays) != wanted:
                raise ValueError(f"it has a missing or unknown tensor: {shown(min(set(arrays) ^ wanted))}")
            check_content(arrays, metadata)
            for n, counts in enumerate(counter._counts, start=1):
                counts.add_run(_checked_run(arrays[f"keys_{n}"], arrays[f"counts_{n}"], n, counter.d_vocab))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is damaged: {error}") from error
        return counter


def _checked_run(keys: np.ndarray, counts: np.ndarray, n: int, d_vocab: int) -> Run:
    """Return the run of these arrays from a file. Raises ValueError if they are none."""
    if keys.dtype != _key_type(n, d_vocab) or counts.dtype.str not in ("<u4", "<i8"):
        raise ValueError(f"its {n}-grams are {keys.dtype} with counts of {counts.dtype}")
    if keys.ndim != 1 or keys.shape != counts.shape:
        raise ValueError(f"its {n}-grams have shape {shown(keys.shape)}, their counts {shown(counts.shape)}")
    total = 0
    for at in range(0, len(keys), _CHECKED_AT_ONCE):
        some, often = keys[at : at + _CHECKED_AT_ONCE + 1], counts[at : at + _CHECKED_AT_ONCE]
        if (some[1:] <= some[:-1]).any() or int(some[-1]) >= d_vocab**n:
            raise ValueError(f"its {n}-grams are not in order or outside the vocabulary")
        if often.min() < 1:
            raise ValueError(f"it counts a {n}-gram {often.min()} times")
        total += int(often.sum(dtype=np.int64))
        release_pages(keys)
        release_pages(counts)
    return Run(keys, counts, total)


_SHOULD_BE = "an array of ids [sequence, position]"


def _array(tokens: Any) -> Integer[np.ndarray, "sequence position"]:
    """Return tokens as an array. Raises ValueError if they are not [sequence, position]."""
    array = tokens.numpy(force=True) if isinstance(tokens, Tensor) else tokens
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "iu":
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else f"of type {type(array).__name__}"
        raise ValueError(f"tokens are {what} but should be {_SHOULD_BE}")
    return array


def _rows(tokens: Integer[np.ndarray, "sequence position"]) -> Iterator[Integer[np.ndarray, "row position"]]:
    """Yield sequences with about `_TOKENS_AT_ONCE` tokens, at least one sequence."""
    rows = max(1, _TOKENS_AT_ONCE // max(1, tokens.shape[1]))
    for start in range(0, len(tokens), rows):
        yield tokens[start : start + rows]


# --- in several processes ---


@dataclass(frozen=True)
class _InFile:
    """Tokens [sequence, position] in a file."""

    path: str
    dtype: str
    offset: int  # bytes
    shape: tuple[int, int]
    is_ours: bool

    def tokens(self) -> Integer[np.ndarray, "sequence position"]:
        return np.memmap(self.path, np.dtype(self.dtype), mode="r", offset=self.offset, shape=self.shape)


def _in_file(tokens: Integer[np.ndarray, "sequence position"], folder: str) -> _InFile:
    """Say where tokens are mapped from, or else write them to a file in a folder."""
    whole = mapped_from(tokens)
    if whole is not None and whole.filename is not None and whole.mode != "c" and tokens.flags.c_contiguous:
        begin, address = (array.__array_interface__["data"][0] for array in (whole, tokens))
        path = os.path.abspath(whole.filename)
        return _InFile(path, tokens.dtype.str, whole.offset + address - begin, tokens.shape, is_ours=False)
    handle, path = tempfile.mkstemp(dir=folder)
    with os.fdopen(handle, "wb") as file:
        for rows in _rows(tokens):
            file.write(np.ascontiguousarray(rows).data)
            release_pages(rows)
    return _InFile(path, tokens.dtype.str, 0, tokens.shape, is_ours=True)


def _shares(tokens: Integer[np.ndarray, "sequence position"], workers: int) -> Iterator[np.ndarray]:
    """Cut tokens into a share for each worker."""
    for start, end in itertools.pairwise(np.linspace(0, len(tokens), workers + 1).round().astype(int)):
        yield tokens[start:end]


def _count_apart(counter: NGramCounter, shards: Iterable[np.ndarray], workers: int) -> Iterator[int]:
    """Count shards in other processes, merge what they found, and yield how many tokens each batch of shards had."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    share = max(1, counter.memory // workers)
    with (
        tempfile.TemporaryDirectory(prefix="bigram_circuits_") as folder,
        ProcessPoolExecutor(workers, mp_context=context) as pool,
    ):
        waiting: dict[Future[str], int] = {}
        for batch in _batches(shards):
            files = [_in_file(tokens, folder) for tokens in batch]
            job = pool.submit(_count_files, files, counter.order, counter.d_vocab, share, folder)
            waiting[job] = sum(tokens.size for tokens in batch)
            if len(waiting) > workers:
                yield _collect(counter, waiting)
        while waiting:
            yield _collect(counter, waiting)


def _batches(shards: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Join small shards to batches that are worth a task."""
    batch: list[np.ndarray] = []
    for shard in shards:
        if shard.size:
            batch.append(shard)
        if sum(one.size for one in batch) >= _TOKENS_APART:
            yield batch
            batch = []
    if batch:
        yield batch


def _collect(counter: NGramCounter, waiting: dict[Future[str], int]) -> int:
    """Wait for a job, merge its counts, and return its number of tokens."""
    job = next(iter(wait(waiting, return_when=FIRST_COMPLETED).done))
    path = job.result()
    counter.merge(NGramCounter.load(path, memory=counter.memory))
    os.unlink(path)  # the memory map outlives the name
    return waiting.pop(job)


def _count_files(files: Sequence[_InFile], order: int, d_vocab: int, memory: int, folder: str) -> str:
    """Count the tokens in files, and return the path of the saved counter. Called in a worker."""
    counter = NGramCounter(order, d_vocab, memory=memory)
    for file in files:
        tokens = file.tokens()
        for rows in _rows(tokens):
            counter.add(rows)
            release_pages(rows)
        if file.is_ours:
            os.unlink(file.path)
    handle, path = tempfile.mkstemp(dir=folder)
    os.close(handle)
    counter._write(Path(path))  # pyright: ignore[reportPrivateUsage]
    return path


# --- keys ---


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


# --- the rows of a table ---


def level_of_counts(rows: Sequence[tuple[Integer[np.ndarray, " _"], Integer[np.ndarray, " _"]]], d_vocab: int) -> Level:
    """Build a level from the tokens that follow contexts 0, 1, 2, ..., in order, and how often each does."""
    pieces = (
        (tokens.astype(np.uint64) + np.uint64(row * d_vocab), counts) for row, (tokens, counts) in enumerate(rows)
    )
    arrays, _ = _level(pieces, d_vocab, np.uint64, sum(16 * len(tokens) for tokens, _ in rows))
    return Level(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def _level(
    pieces: Iterable[Piece], d_vocab: int, context_type: type[np.unsignedinteger], limit: int
) -> tuple[dict[str, np.ndarray], Run]:
    """Build the rows of contexts of one length from the counts of n-grams in order.

    Args:
        pieces: The n-grams' keys in order, and their counts.
        d_vocab: Size of the vocabulary.
        context_type: Type of the keys of contexts in the run that is returned.
        limit: Bytes of each array to keep in memory.

    Returns:
        The arrays of a `Level`, and a run with how often each context occurs.
    """
    level = {name: GrowingArray(dtype, limit) for name, dtype in LEVEL_DTYPES.items()}
    keys_of, totals_of = GrowingArray(context_type, limit), GrowingArray(np.int64, limit)
    total = 0
    for keys, counts in _whole_rows(pieces, d_vocab):
        base = keys.dtype.type(d_vocab)
        of = keys // base
        starts = np.flatnonzero(np.append(True, of[1:] != of[:-1]))
        contexts, tokens = of[starts], (keys - of * base).astype(np.int32)
        totals = np.add.reduceat(counts, starts)
        prob = counts / np.repeat(totals.astype(np.float64), np.diff(np.append(starts, len(keys))))
        level["contexts"].append(contexts)
        level["offsets"].append(starts + len(level["tokens"]))
        level["tokens"].append(tokens)
        level["probs"].append(prob)
        level["entropy"].append(-np.add.reduceat(prob * np.log(prob), starts) + 0.0)
        # encode (count, token) as one number: its maximum has the largest count and, among ties, the lowest token
        level["top"].append(-np.maximum.reduceat(counts * d_vocab - tokens, starts) % d_vocab)
        keys_of.append(contexts)
        totals_of.append(totals)
        total += int(totals.sum())
    level["offsets"].append(np.array([len(level["tokens"])]))
    return {name: array.finished() for name, array in level.items()}, Run(
        keys_of.finished(), totals_of.finished(), total
    )


def _whole_rows(pieces: Iterable[Piece], d_vocab: int) -> Iterator[Piece]:
    """Cut pieces anew, so that the n-grams of a context are in the same piece."""
    rest: Piece | None = None
    for keys, counts in pieces:
        if rest is not None:
            keys, counts = (np.concatenate(two) for two in zip(rest, (keys, counts), strict=True))
        base = keys.dtype.type(d_vocab)
        cut = int(np.searchsorted(keys, keys[-1] // base * base))
        rest = keys[cut:], counts[cut:]
        if cut:
            yield keys[:cut], counts[:cut]
    if rest is not None:
        yield rest
