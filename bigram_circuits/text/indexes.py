"""Counts of what follows a context, from a suffix array of a corpus that other programs have built.

Three kinds are read: an index of tokengrams (files `NAME.bin` and `NAME.idx`), a local index of infini-gram (a folder
with `tokenized.0`, `table.0`, ...; Liu et al. 2024, arXiv 2401.17377), and infini-gram's public service. None of them
says which tokenizer its token ids are of: that is for whoever uses them to know.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from bigram_circuits.storage.records import shown

Context = tuple[int, ...]
"""The token ids of a context."""
Followers = tuple[Integer[np.ndarray, " token"], Integer[np.ndarray, " token"]]
"""Token ids in order, and how often each follows a context; empty where the context was never seen before a token."""

SERVICE = "infini-gram:"
"""What the name of an index on infini-gram's public service begins with; the name of the index there follows."""
_ADDRESS = "https://api.infini-gram.io/"
_SECONDS, _AT_ONCE = 60, 8  # to wait for an answer of the service, and requests at once
_HASHED_WHOLE = 1 << 28  # bytes; of larger files, some blocks are hashed
_BLOCKS, _BLOCK = 64, 1 << 20
_DENSE_COSTS = 4  # occurrences of a context are listed faster than counts of so many tokens each


class Index(ABC):
    """A corpus in which any context can be looked up."""

    description: str
    """What it is, as a phrase."""
    fingerprint: str
    """Hash of its contents; of a file above 256 MiB, of its size and 64 blocks spread over it."""

    @abstractmethod
    def following(self, contexts: Sequence[Context]) -> list[Followers]:
        """Count the tokens that follow each context.

        Raises:
            ValueError: If the counts are not exact.
            OSError: If the index cannot be read or reached.
        """


def open_index(path: str | Path, d_vocab: int, address: str = _ADDRESS) -> Index:
    """Open an index.

    Args:
        path: A file or folder of tokengrams, a folder of infini-gram, or `"infini-gram:NAME"`.
        d_vocab: Size of the vocabulary of its token ids.
        address: Where the service is.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it is no index, its files do not belong together, or the library that reads it is missing.
    """
    if isinstance(path, str) and path.startswith(SERVICE):
        return _Service(path.removeprefix(SERVICE), d_vocab, address)
    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"there is no index {str(place)!r}: neither a file nor a folder")
    if place.is_dir() and list(place.glob("tokenized.*")):
        return _InfiniGram(place, d_vocab)
    pairs = _pairs(place)
    if not pairs:
        raise ValueError(
            f"{str(place)!r} is no index: it holds neither NAME.bin with NAME.idx (tokengrams) nor tokenized.0 with "
            "table.0 (infini-gram)"
        )
    return _Tokengrams(place, pairs, d_vocab)


def full_path(path: str | Path) -> str:
    """The path of an index that is the same wherever it is read from; the name of one on the service as it is."""
    return str(path) if str(path).startswith(SERVICE) else os.path.abspath(Path(path).expanduser())


def _pairs(place: Path) -> list[tuple[Path, Path]]:
    """The files of tokens and their suffix arrays."""
    if place.is_dir():
        return [
            (one, one.with_suffix(".idx")) for one in sorted(place.glob("*.bin")) if one.with_suffix(".idx").exists()
        ]
    pair = place.with_suffix(".bin"), place.with_suffix(".idx")
    return [pair] if place in pair and all(one.is_file() for one in pair) else []


class _Tokengrams(Index):
    def __init__(self, place: Path, pairs: Sequence[tuple[Path, Path]], d_vocab: int) -> None:
        tokengrams = _library("tokengrams")
        width, room = (2, 1 << 16) if d_vocab <= 1 << 16 else (4, d_vocab)  # with less room, larger ids would be fatal
        self._d_vocab = d_vocab
        for tokens, table in pairs:
            count, rest = divmod(tokens.stat().st_size, width)
            if rest or table.stat().st_size != 8 * count:
                raise ValueError(
                    f"{str(table)!r} has {table.stat().st_size:,} bytes, but the suffix array of {tokens.name} "
                    f"({tokens.stat().st_size:,} bytes) over a vocabulary of {d_vocab} has {8 * count:,}"
                )
        self._shards = [
            (tokengrams.MemmapIndex(str(tokens), str(table), vocab=room), np.memmap(tokens, f"<u{width}", "r"))
            for tokens, table in pairs
        ]
        self.description = f"the tokengrams index {str(place)!r}"
        self.fingerprint = f"tokengrams {_fingerprint([one for pair in pairs for one in pair])}"

    def following(self, contexts: Sequence[Context]) -> list[Followers]:
        return [self._after(list(context)) for context in contexts]

    def _after(self, context: list[int]) -> Followers:
        parts = [self._after_in(index, tokens, context) for index, tokens in self._shards]
        if len(parts) == 1:
            return parts[0]
        ids, place = np.unique(np.concatenate([ids for ids, _ in parts]), return_inverse=True)
        return ids, np.bincount(place, np.concatenate([counts for _, counts in parts]), len(ids)).astype(np.int64)

    def _after_in(self, index: Any, tokens: Integer[np.ndarray, " position"], context: list[int]) -> Followers:
        if context and index.count(context) < self._d_vocab // _DENSE_COSTS:
            ends = np.array(index.positions(context), np.int64) + len(context)
            ids, counts = np.unique(tokens[ends[ends < len(tokens)]].astype(np.int64), return_counts=True)
        else:
            dense = np.array(self._dense(index, context), np.int64)
            ids = np.flatnonzero(dense)
            counts = dense[ids]
        if len(ids) and ids[-1] >= self._d_vocab:
            raise ValueError(self._other_tokens(int(ids[-1])))
        return ids, counts.astype(np.int64)

    def _dense(self, index: Any, context: list[int]) -> list[int]:
        try:
            return index.count_next(context)
        except BaseException as error:  # a panic of its Rust code is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(self._other_tokens(str(error))) from None

    def _other_tokens(self, which: int | str) -> str:
        return (
            f"{self.description} holds token ids outside the vocabulary of {self._d_vocab} ({which}): it is of another "
            "tokenizer"
        )


class _InfiniGram(Index):
    def __init__(self, place: Path, d_vocab: int) -> None:
        engine = _library("infini_gram.engine")
        files = sorted(place.glob("tokenized.*")) + sorted(place.glob("table.*"))
        widths = {_width_of_tokens(one) for one in place.glob("tokenized.*")}
        width = widths.pop()
        if widths or width is None:
            raise ValueError(f"{str(place)!r} is damaged: its table files do not fit its tokenized files")
        # the end of a document is written as the largest id, which the engine shows as `eos_token_id`: one that is free
        self._engine = engine.InfiniGramEngine(
            index_dir=str(place), eos_token_id=d_vocab, vocab_size=d_vocab + 1, version=4,
            token_dtype={1: "u8", 2: "u16", 4: "u32"}[width],
        )  # fmt: skip
        self._d_vocab, self.description = d_vocab, f"the infini-gram index {str(place)!r}"
        self.fingerprint = f"infini-gram {_fingerprint(files)}"

    def following(self, contexts: Sequence[Context]) -> list[Followers]:
        return [self._after(list(context)) for context in contexts]

    def _after(self, context: list[int]) -> Followers:
        seen = _answer(self._engine.count(context), context)["count"]
        # it estimates where a context occurs more often than `max_support`, and errs where that is far too large
        found = _answer(self._engine.ntd(context, max_support=max(1, seen)), context)
        return _exact(found, context, self._d_vocab, self.description)


class _Service(Index):
    def __init__(self, name: str, d_vocab: int, address: str) -> None:
        if not name:
            raise ValueError(
                f"the name of an index is missing: give '{SERVICE}NAME', as infini-gram's service lists them"
            )
        self._name, self._d_vocab, self._address = name, d_vocab, address
        self.description = f"the index {name} of infini-gram's service"
        self.fingerprint = f"{SERVICE}{name}"

    def following(self, contexts: Sequence[Context]) -> list[Followers]:
        with ThreadPoolExecutor(_AT_ONCE) as several:
            return list(several.map(self._after, contexts))

    def _after(self, context: Context) -> Followers:
        asked = {"index": self._name, "query_type": "ntd", "query_ids": list(context)}
        request = urllib.request.Request(
            self._address, json.dumps(asked).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            try:
                found = json.load(error)
            except ValueError:
                raise OSError(f"infini-gram's service answered with HTTP status {error.code}") from error
        except (OSError, ValueError) as error:
            raise OSError(f"infini-gram's service at {self._address} could not be asked: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"infini-gram's service answered {shown(found)}, not an object")
        return _exact(_answer(found, context), context, self._d_vocab, self.description)


def _answer(found: Any, context: Sequence[int]) -> Any:
    if "error" in found:
        raise ValueError(f"infini-gram refused to look up {list(context)[:20]}: {shown(found['error'])}")
    return found


def _exact(found: Any, context: Sequence[int], d_vocab: int, description: str) -> Followers:
    """The counts of an answer, without the ends of documents.

    Raises:
        ValueError: If they are estimates, or do not add up.
    """
    try:
        total, approximate = int(found["prompt_cnt"]), bool(found["approx"])
        counts = {int(token): int(one["cont_cnt"]) for token, one in found["result_by_token_id"].items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{description} gave an answer without counts: {shown(found)}") from error
    if approximate or (counts and sum(counts.values()) != total):
        raise ValueError(
            f"{description} has no exact counts of what follows {list(context)[:20]}, which occurs {total:,} times: a "
            "local index counts exactly"
        )
    ids = np.array(sorted(token for token in counts if token < d_vocab), np.int64)
    return ids, np.array([counts[token] for token in ids], np.int64)


def _width_of_tokens(tokens: Path) -> int | None:
    """Bytes of a token id of infini-gram, from the sizes of its files; None if they do not fit each other."""
    table, size = tokens.with_name(tokens.name.replace("tokenized", "table")), tokens.stat().st_size
    if not table.is_file() or size < 2:
        return None
    pointer = math.ceil(math.log2(size) / 8)
    count, rest = divmod(table.stat().st_size, pointer)
    width = size // count if count else 0
    return width if not rest and width in (1, 2, 4) and width * count == size else None


def _fingerprint(files: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            if size <= _HASHED_WHOLE:
                while block := file.read(_BLOCK):
                    digest.update(block)
                continue
            for at in np.linspace(0, size - _BLOCK, _BLOCKS).astype(int):
                file.seek(int(at))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise ValueError(
            f"an index of {package} is read by the package {package}, which is not installed: "
            "pip install 'bigram-circuits[indexes]'"
        ) from error
