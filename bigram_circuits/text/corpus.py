"""Turn text into fixed-length token arrays, split by document into a training and a held-out part.

The source is read once. Documents are tokenised in batches, each is preceded by the tokenizer's end-of-text token, and
the token stream of each part is cut into sequences of `context_length` tokens (a shorter remainder is dropped).
A document is held out if the hash of its text falls below the held-out share. The split therefore needs no list of
documents, and identical documents always land in the same part. Text may be larger than memory: arrays beyond
`_IN_MEMORY_TOKENS` are written to an unnamed temporary file and memory-mapped from there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor
from tqdm.auto import tqdm

from bigram_circuits.storage.files import release_pages
from bigram_circuits.storage.records import is_text, shown
from bigram_circuits.text.sources import open_source

_IN_MEMORY_TOKENS = 1 << 24  # 64 MiB of int32
_BATCH_CHARACTERS = 1 << 20  # characters tokenised at once
_SMALL_CORPUS_DOCUMENTS = 512  # with fewer documents, the held-out part is topped up to one full sequence
_DEFAULT_CONTEXT_LENGTH = 128  # as in the paper


@dataclass(frozen=True)
class Corpus:
    """A tokenised text in two parts that share no document."""

    train: Integer[np.ndarray, "train_sequence position"]
    """int32 token ids for learning masks and counting n-grams; memory-mapped when large."""
    held_out: Integer[np.ndarray, "held_out_sequence position"]
    """int32 token ids of other documents, for evaluation; memory-mapped when large."""
    source: str
    """Description of what was read."""
    documents: tuple[int, int]
    """Number of documents in each part: (training, held out)."""
    fingerprint: str
    """Hash of both arrays: equal exactly when tokens, split and context length are equal."""
    tokenizer_hash: str
    """Hash of the tokenizer's vocabulary, which identifies the tokenizer whatever its name."""

    @classmethod
    def from_tokens(
        cls,
        train: Integer[np.ndarray, "train_sequence position"],
        held_out: Integer[np.ndarray, "held_out_sequence position"],
        source: str = "tokens",
    ) -> Corpus:
        """Build a corpus from token ids that come from elsewhere, for example the prompts of a task.

        Raises:
            ValueError: If they are not integers of shape [sequence, position], from 0 to 2**31 - 1.
        """
        parts = [_as_ids(part) for part in (train, held_out)]
        counts = (len(parts[0]), len(parts[1]))
        return cls(parts[0], parts[1], source, counts, _fingerprint(*parts), tokenizer_hash="none")

    @property
    def context_length(self) -> int:
        """Number of tokens in a sequence."""
        return self.train.shape[1]

    def __repr__(self) -> str:
        return (
            f"Corpus({self.source!r}: {self.train.size:,} training and {self.held_out.size:,} held-out tokens from "
            f"{self.documents[0]:,} and {self.documents[1]:,} documents, sequences of {self.context_length})"
        )


def load_corpus(
    source: Any = "reference",
    *,
    tokenizer: Any,
    context_length: int | None = None,
    held_out: float = 0.05,
    seed: int = 0,
    max_tokens: int | None = None,
    text_column: str = "text",
) -> Corpus:
    """Read text, tokenise it, and split it by document.

    Args:
        source: `"reference"` (the documentation of the running interpreter); a text file, a JSONL or Parquet file,
            or a folder of them; a list of paths (`pathlib.Path`) or of documents (`str`); a Hugging Face dataset
            (the object, or its name as `"name"` or `"name:configuration"`, whose `train` split is streamed).
        tokenizer: A Hugging Face tokenizer, for example `model.tokenizer`.
        context_length: Number of tokens in a sequence; 128 by default.
        held_out: Share of the documents to hold out, from 0 (none) to below 1.
        seed: Seed that selects the held-out documents. For the reference corpus it is ignored: the held-out documents
            are always those that the reference model was not trained on (a share of 0.05).
        max_tokens: Stop reading after this many tokens.
        text_column: The field that holds the text in JSONL, Parquet and datasets.

    Returns:
        A `Corpus`. A plain text file is cut into documents (passages of whole lines, about 2,000 characters, ending
        at a blank line where possible); in the other formats each record is a document.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If an argument is out of range, the text is not UTF-8, a field is missing, or there is not
            enough text for one sequence in each part.
    """
    context_length = _DEFAULT_CONTEXT_LENGTH if context_length is None else context_length
    if context_length < 2:
        raise ValueError(f"context_length must be at least 2 tokens, not {context_length}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is a share of the documents, from 0 to below 1, not {held_out}")
    if max_tokens is not None and max_tokens < 2 * context_length:
        raise ValueError(f"max_tokens must allow one sequence in each part ({2 * context_length}), not {max_tokens}")
    if tokenizer is None:
        raise ValueError("tokenizer is None, but text needs one: pass the tokenizer of the model, model.tokenizer")
    if isinstance(tokenizer, str | os.PathLike):
        raise ValueError(
            f"tokenizer is the name {str(tokenizer)!r}, but should be a tokenizer: model.tokenizer, or "
            f"transformers.AutoTokenizer.from_pretrained({str(tokenizer)!r})"
        )
    if not callable(tokenizer):
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}, but should be a tokenizer, such as model.tokenizer"
        )
    description, documents, n_bytes = open_source(source, text_column)
    salt = "reference" if isinstance(source, str) and source == "reference" else str(seed)
    tokenized = _tokenize(documents, tokenizer, salt, max_tokens, n_bytes)
    train, rest, counts = _split(tokenized, held_out, context_length, description)
    return Corpus(train, rest, description, counts, _fingerprint(train, rest), _tokenizer_hash(tokenizer))


def _as_ids(tokens: Any) -> Integer[np.ndarray, "sequence position"]:
    array = np.asarray(tokens)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise ValueError(f"tokens are {array.dtype} {array.shape} but should be integer ids [sequence, position]")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < 2**31:
        raise ValueError(f"token ids run from {array.min()} to {array.max()} but should be 0 to {2**31 - 1}")
    return np.ascontiguousarray(array, dtype=np.int32)


def batch_of(
    tokens: Integer[np.ndarray, "sequence position"], batch_size: int, *, step: int, seed: int = 0
) -> Integer[Tensor, "batch position"]:
    """Return the batch of training step `step`: sequences in a random order that is reshuffled every epoch.

    The batch depends only on the arguments, so a resumed run sees the same batches. The sequences left over at the end
    of an epoch, which do not fill a batch, are skipped; they differ from epoch to epoch.
    """
    if len(tokens) == 0:
        raise ValueError("there are no sequences to draw a batch from")
    batch_size = min(batch_size, len(tokens))
    epoch, batch = divmod(step, len(tokens) // batch_size)
    rows = _epoch_order(len(tokens), seed, epoch)[batch * batch_size : (batch + 1) * batch_size]
    return torch.from_numpy(tokens[rows].astype(np.int64))


@lru_cache(maxsize=1)  # with millions of sequences, shuffling takes longer than a training step
def _epoch_order(n_sequences: int, seed: int, epoch: int) -> Integer[np.ndarray, " sequence"]:
    order = np.random.default_rng((seed, epoch)).permutation(n_sequences)
    order.setflags(write=False)
    return order


def in_order(
    tokens: Integer[np.ndarray, "sequence position"], batch_size: int
) -> Iterator[Integer[Tensor, "batch position"]]:
    """Yield all sequences once, in order; the last batch may be smaller."""
    for start in range(0, len(tokens), batch_size):
        yield torch.from_numpy(np.asarray(tokens[start : start + batch_size]).astype(np.int64))


def token_array(tokens: Any) -> Integer[np.ndarray, "sequence position"]:
    """Return held-out token ids as an array, from a `Corpus` (its held-out part), an array or a tensor.

    Raises:
        ValueError: If the ids are not integers of shape [sequence, position], at least one sequence of two tokens.
    """
    array = tokens.held_out if isinstance(tokens, Corpus) else tokens
    if isinstance(array, Tensor):
        array = array.double().numpy(force=True) if array.is_floating_point() else array.numpy(force=True)
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.shape[0] == 0 or array.shape[1] < 2:
        what = f"shape {array.shape}" if isinstance(array, np.ndarray) else f"type {type(tokens).__name__}"
        raise ValueError(f"held-out tokens have {what} but should be [sequence, position], at least [1, 2]")
    if array.dtype.kind not in "iu":
        raise ValueError(f"tokens have dtype {array.dtype} but should be integer ids")
    return array


def spread(
    tokens: Integer[np.ndarray, "sequence position"], max_tokens: int
) -> Integer[np.ndarray, "some_sequence position"]:
    """Select at most `max_tokens` tokens of a text: full sequences, evenly spaced (at least one)."""
    if max_tokens < 1:
        raise ValueError(f"at least 1 token must be used, not {max_tokens}")
    wanted = min(len(tokens), max(1, max_tokens // tokens.shape[1]))
    return tokens[np.linspace(0, len(tokens) - 1, wanted).round().astype(int)]


def document_position(key: str, salt: str = "reference") -> float:
    """Hash a document to a number in [0, 1); a document below the held-out share is held out.

    `key` is the document's text and `salt` the seed; for the reference corpus, the document's name and `"reference"`.
    """
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=6, key=salt.encode()[:64]).digest()
    return int.from_bytes(digest, "big") / 2**48


# --- tokenising and splitting ------------------------------------------------------------------------------------


def _tokenize(
    documents: Iterable[tuple[str, str]], tokenizer: Any, salt: str, max_tokens: int | None, n_bytes: int | None
) -> Iterator[tuple[float, Integer[np.ndarray, " token"]]]:
    """Yield, for each document, its `document_position` and its token ids, starting with a separator."""
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    start = [] if separator is None else [separator]
    total = 0
    with tqdm(total=n_bytes, unit="B", unit_scale=True, desc="tokenising", delay=2, leave=False) as bar:
        for batch in _batches_of_text(documents):
            texts = [text for _, text in batch]
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for (key, text), ids in zip(batch, encoded["input_ids"], strict=True):
                tokens = np.array(start + ids, dtype=np.int32)
                if max_tokens is not None:
                    tokens = tokens[: max_tokens - total]
                total += len(tokens)
                yield document_position(key, salt), tokens
                bar.update(len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")))
                if total == max_tokens:
                    return


def _batches_of_text(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    characters = 0
    for key, text in documents:
        if not text.strip():
            continue
        if not is_text(text):
            raise ValueError(f"the document {shown(text)} contains an unpaired surrogate")
        batch.append((key, text))
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _split(
    documents: Iterator[tuple[float, Integer[np.ndarray, " token"]]], held_out: float, context_length: int, source: str
) -> tuple[Integer[np.ndarray, "a position"], Integer[np.ndarray, "b position"], tuple[int, int]]:
    """Split documents by their hash; return the sequences of both parts and their document counts."""
    first = list(itertools.islice(documents, _SMALL_CORPUS_DOCUMENTS))
    threshold = held_out
    if held_out > 0 and len(first) < _SMALL_CORPUS_DOCUMENTS:
        threshold = max(threshold, _threshold_for_one_sequence(first, context_length))
    parts = (_TokenFile(context_length), _TokenFile(context_length))  # training, held out
    for position, tokens in itertools.chain(first, documents):
        parts[position < threshold].append(tokens)
    for part, name in zip(parts, ("training", "held-out"), strict=True):
        if part.n_tokens < context_length and (name == "training" or held_out > 0):
            raise ValueError(
                f"the {name} part of the corpus {source!r} has {part.n_tokens} tokens in {part.n_documents} documents, "
                f"but one sequence is {context_length} tokens: give more text, a shorter context_length, or another "
                f"held_out than {held_out}"
            )
    counts = (parts[0].n_documents, parts[1].n_documents)
    return parts[0].sequences(), parts[1].sequences(), counts


def _threshold_for_one_sequence(documents: list[tuple[float, Integer[np.ndarray, " _"]]], context_length: int) -> float:
    """Find the lowest threshold with at least `context_length` tokens below it."""
    total = 0
    for position, tokens in sorted(documents, key=lambda document: document[0]):
        total += len(tokens)
        if total >= context_length:
            return float(np.nextafter(position, 1.0))
    return 0.0


class _TokenFile:
    """A growing array of tokens that moves to disk once it is large; `sequences()` finishes it."""

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self.n_tokens = 0
        self.n_documents = 0
        self._blocks: list[Integer[np.ndarray, " token"]] = []
        self._waiting = 0
        self._file: Any = None

    def append(self, tokens: Integer[np.ndarray, " token"]) -> None:
        self._blocks.append(tokens)
        self._waiting += len(tokens)
        self.n_tokens += len(tokens)
        self.n_documents += 1
        if self._waiting >= _IN_MEMORY_TOKENS:
            self._write()

    def _write(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="bigram_circuits_")  # noqa: SIM115 (closed in `sequences`)
        np.concatenate(self._blocks).tofile(self._file)
        self._blocks, self._waiting = [], 0

    def sequences(self) -> Integer[np.ndarray, "sequence position"]:
        shape = (self.n_tokens // self.context_length, self.context_length)
        if self._file is None:
            tokens = np.concatenate(self._blocks) if self._blocks else np.zeros(0, np.int32)
            return tokens[: shape[0] * shape[1]].reshape(shape)
        if self._blocks:
            self._write()
        with self._file as file:  # the memory map outlives the closed file
            file.flush()
            return np.memmap(file, dtype=np.int32, mode="r", shape=shape)


def _fingerprint(*arrays: Integer[np.ndarray, "_ _"]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(repr(array.shape).encode())
        for start in range(0, len(array), 1 << 14):
            digest.update(array[start : start + (1 << 14)].tobytes())
            release_pages(array)
    return digest.hexdigest()


def _tokenizer_hash(tokenizer: Any) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.blake2b(json.dumps(vocabulary).encode(), digest_size=16).hexdigest()
