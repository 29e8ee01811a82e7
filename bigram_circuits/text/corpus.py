"""Turn text into fixed-length token arrays, split by document into a training and a held-out part.

The source is read once. Documents are tokenised in batches. Each begins with what the tokenizer itself puts before a
text, or else with its end-of-text token, and the token stream of each part is cut into sequences of `context_length`
tokens (a shorter remainder is dropped).
A document is held out if the hash of its text falls below the held-out share. The split therefore needs no list of
documents, and identical documents always land in the same part. Text may be larger than memory: arrays beyond
`_IN_MEMORY_BYTES` are written to an unnamed temporary file and memory-mapped from there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from bigram_circuits.progress import progress
from bigram_circuits.storage.arrays import GrowingArray, release_pages
from bigram_circuits.storage.records import is_text, shown
from bigram_circuits.text.formats import Reading
from bigram_circuits.text.sources import Source, open_source
from bigram_circuits.text.tokenizers import BOS, Template, shown_tokens, template_of, unknown_token, words_without_token

_IN_MEMORY_BYTES = 1 << 26  # of the tokens of a part
_FIRST_CHARACTERS = 1 << 16  # characters tokenised at first: a little text is read quickly;
_BATCH_CHARACTERS = 1 << 20  # twice as many each time, up to this number
_SMALL_CORPUS_DOCUMENTS = 512  # with fewer documents, the held-out part is topped up to one full sequence
DEFAULT_CONTEXT_LENGTH = 128
"""Tokens in a sequence, as in the paper."""


@dataclass(frozen=True)
class Named:
    """What `load_corpus` was asked for, where the text can be read again by name."""

    source: str
    """`reference`, an absolute path, or the name of a dataset."""
    context_length: int
    """Tokens in a sequence."""
    held_out: float | int
    """Share of the documents to hold out."""
    seed: int
    """Seed that selects them."""
    max_tokens: int | None
    """Number of tokens that were read at most."""
    text_column: str
    """The field that holds the text."""
    bos: str | None
    """Where a BOS was to be put."""


@dataclass(frozen=True)
class Corpus:
    """A tokenised text in two parts that share no document.

    Example:
        >>> mine = bc.Corpus.from_tokens(corpus.train[:20], corpus.train[20:24])  # tokens that you made yourself
        >>> print(len(mine.train), len(mine.held_out))
        20 4
    """

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
    starts: str = ""
    """What sequences and documents begin with, as a phrase; empty for tokens that came from elsewhere."""
    reading: Reading | None = None
    """The files that were read and those that were skipped; None if the text was not in files."""
    named: Named | None = None
    """The name by which it can be read again, with options; None if it was made from objects."""
    without_token: tuple[str, ...] = ()
    """The first few words of the text that the tokenizer wrote with its unknown token."""
    sample: str = ""
    """Which part of the text was read, as a phrase, if reading ended at `max_tokens`; empty if all was read."""

    @classmethod
    def from_tokens(
        cls,
        train: Any,
        held_out: Any,
        source: str = "tokens",
        *,
        mask: tuple[Any, Any] | None = None,
        context_length: int | None = None,
    ) -> Corpus:
        """Build a corpus from token ids that come from elsewhere, for example the prompts of a task.

        Args:
            train: Token ids [sequence, position], or what a tokenizer returns for a list of texts.
            held_out: As `train`.
            source: What they are, as a phrase.
            mask: Attention masks of both, 1 where there is text and 0 where there is padding. What a tokenizer returns
                brings its own. If there is padding, the texts of a part are joined to one stream, which is cut into
                sequences, as documents are; otherwise every row stays a sequence.
            context_length: Number of tokens in a sequence where there was padding; by default the longest text's.

        Raises:
            ValueError: If they are not integers of shape [sequence, position], from 0 to 2**31 - 1, or a mask does not
                fit.
        """
        found = list(map(_ids_and_mask, (train, held_out), mask or (None, None)))
        parts, counts = [ids for ids, _ in found], (len(found[0][0]), len(found[1][0]))
        if any(one is not None and not one.all() for _, one in found):
            masks = [np.ones(ids.shape, dtype=bool) if one is None else one for ids, one in found]
            length = context_length or max((int(one.sum(1).max()) for one in masks if len(one)), default=0)
            parts = [_cut(ids[one], length) for ids, one in zip(parts, masks, strict=True)]
        _warn_of_padding([part for part, (_, one) in zip(parts, found, strict=True) if one is None])
        return cls(parts[0], parts[1], source, counts, fingerprint_of(*parts), tokenizer_hash="none")

    @property
    def context_length(self) -> int:
        """Number of tokens in a sequence."""
        return self.train.shape[1]

    def __repr__(self) -> str:
        starts = f"; {self.starts}" if self.starts else ""
        source = f"{self.source!r}, {self.sample}" if self.sample else repr(self.source)
        return (
            f"Corpus({source}: {self.train.size:,} training and {self.held_out.size:,} held-out tokens from "
            f"{self.documents[0]:,} and {self.documents[1]:,} documents, sequences of {self.context_length}{starts})"
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
    bos: str | None = None,
) -> Corpus:
    """Read text, tokenise it, and split it by document.

    Args:
        source: `"reference"` (the documentation of the running interpreter); a file of text, JSON lines, JSON, CSV,
            Parquet or Arrow, also compressed, or a folder of them; a list of paths (`pathlib.Path`) or of documents
            (`str`); a data frame or a column of one; a Hugging Face dataset (the object, or its name as `"name"` or
            `"name:configuration"`, whose `train` split is streamed).
        tokenizer: A Hugging Face tokenizer, for example `model.tokenizer`.
        context_length: Number of tokens in a sequence; 128 by default.
        held_out: Share of the documents to hold out, from 0 (none) to below 1.
        seed: Seed that selects the held-out documents. For the reference corpus it is ignored: the held-out documents
            are always those that the reference model was not trained on (a share of 0.05).
        max_tokens: Stop reading after this many tokens. They are the first ones, which `Corpus.sample` says; for others
            of a streamed dataset, give it shuffled: `dataset.shuffle(seed=0, buffer_size=10_000)`.
        text_column: The field that holds the text in JSON, tables and datasets.
        bos: Where to put the BOS, the token that a text begins with: `"sequence"` (at the start of every sequence and
            of every document), `"document"` (of every document), or `"none"` (documents are separated by the
            end-of-text token). By default `"sequence"` if the tokenizer itself puts a BOS before a text, as those of
            Llama and Gemma do: every sequence is an input to the model. Otherwise `"none"`. (`"earlier"` makes the
            corpora of versions before 0.2.)

    Returns:
        A `Corpus`. A plain text file is cut into documents (passages of whole lines, about 2,000 characters, ending
        at a blank line where possible), and so is a record of more than 1,048,576 characters; any other record is a
        document. Each document is tokenised as the tokenizer does on its own.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If an argument is out of range, a file holds no text or in an unknown encoding, a field is missing,
            a BOS is asked for where there is none, or there is not enough text for one sequence in each part.

    Example:
        >>> documents = [f"This is document {n}." for n in range(40)]  # or the path of a file or folder
        >>> corpus = bc.load_corpus(documents, tokenizer=model.tokenizer, context_length=8)
        >>> print(corpus.documents)  # how many are in the training part, and in the held-out part
    """
    context_length = DEFAULT_CONTEXT_LENGTH if context_length is None else context_length
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
    layout = _layout(tokenizer, bos, context_length)
    opened = open_source(source, text_column)
    salt = "reference" if isinstance(source, str) and source == "reference" else str(seed)
    limit = max_tokens and max_tokens - len(layout.every) * (max_tokens // context_length)
    noticed = _Noticed()
    tokenized = _tokenize(opened, tokenizer, layout, salt, limit, noticed)
    train, rest, counts = _split(tokenized, held_out, context_length, layout.every, opened.description)
    return Corpus(
        train, rest, opened.description, counts, fingerprint_of(train, rest), hash_of_tokenizer(tokenizer),
        layout.words(tokenizer), opened.reading,
        _named(source, context_length, held_out, seed, max_tokens, text_column, bos), tuple(noticed.without_token),
        f"its first {max_tokens:,} tokens" if noticed.is_cut else "",
    )  # fmt: skip


def _named(source: Any, *options: Any) -> Named | None:
    """The name of a source from every working directory, with options; None if it has none."""
    if not isinstance(source, str | Path):
        return None
    path = Path(source).expanduser()
    is_path = isinstance(source, Path) or (source != "reference" and path.exists())
    return Named(os.path.abspath(path) if is_path else str(source), *options)


@dataclass(frozen=True)
class _Layout:
    """What sequences and documents begin and end with."""

    every: tuple[int, ...]
    """Ids at the start of every sequence."""
    before: tuple[int, ...]
    """Ids before every document."""
    after: tuple[int, ...] = ()
    """Ids after every document."""

    def words(self, tokenizer: Any) -> str:
        """What was done, as a phrase."""
        every, before, after = ("".join(shown_tokens(tokenizer, ids)) for ids in (self.every, self.before, self.after))
        if not self.before:
            return "nothing between documents"
        ends = f", {after} at its end" if after else ""
        if self.every:
            return f"{every} at the start of every sequence and document{ends}"
        return f"{before} at the start of every document{ends}"


def _layout(tokenizer: Any, bos: str | None, context_length: int) -> _Layout:
    """Where a tokenizer's special tokens go."""
    if bos is not None and bos not in BOS:
        raise ValueError(f"bos must be one of {', '.join(BOS)}, not {bos!r}")
    if bos == "earlier":
        return _Layout((), Template((), (), tokenizer.bos_token_id, tokenizer.eos_token_id).separator)
    template = template_of(tokenizer)
    bos = bos or ("sequence" if template.before else "none")
    if bos == "none":
        return _Layout((), template.separator)
    before = template.before or (() if template.bos is None else (template.bos,))
    if not before:
        raise ValueError(f"bos is {bos!r}, but this tokenizer has no BOS token: leave it out, or give bos='none'")
    if context_length < len(before) + 2:
        raise ValueError(f"context_length must be at least {len(before) + 2}, with the BOS, not {context_length}")
    return _Layout(before if bos == "sequence" else (), before, template.after)


def _ids_and_mask(
    tokens: Any, mask: Any
) -> tuple[Integer[np.ndarray, "sequence position"], Bool[np.ndarray, "sequence position"] | None]:
    """Check token ids and the mask, if there is one, that says which of them are text."""
    if isinstance(tokens, Mapping):  # what a tokenizer returns
        if "input_ids" not in tokens:
            raise ValueError(f"tokens have the fields {sorted(map(str, tokens))}, but 'input_ids' is needed")
        mask = tokens.get("attention_mask") if mask is None else mask
        tokens = tokens["input_ids"]
    ids = _as_ids(tokens)
    if mask is None:
        return ids, None
    array = _as_array(mask, "a mask")
    if array.shape != ids.shape or array.dtype.kind not in "biu" or not ((array == 0) | (array == 1)).all():
        raise ValueError(
            f"a mask is {array.dtype} {array.shape} but should be 0 or 1 for each of the tokens {ids.shape}"
        )
    return ids, array.astype(bool)


def _as_array(values: Any, what: str) -> np.ndarray:
    if isinstance(values, Tensor):
        return values.numpy(force=True)
    try:
        return np.asarray(values)
    except ValueError as error:  # a list of lists
        raise ValueError(
            f"{what} should be an array, but its rows have different lengths: pad them, and give the mask"
        ) from error


def _as_ids(tokens: Any) -> Integer[np.ndarray, "sequence position"]:
    array = _as_array(tokens, "tokens")
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise ValueError(f"tokens are {array.dtype} {array.shape} but should be integer ids [sequence, position]")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < 2**31:
        raise ValueError(f"token ids run from {array.min()} to {array.max()} but should be 0 to {2**31 - 1}")
    return np.ascontiguousarray(array, dtype=np.int32)


def _cut(stream: Integer[np.ndarray, " token"], length: int) -> Integer[np.ndarray, "sequence position"]:
    """Cut a stream into sequences; a shorter remainder is dropped."""
    count = len(stream) // length if length else 0
    return np.ascontiguousarray(stream[: count * length].reshape(count, length))


def _warn_of_padding(parts: Sequence[Integer[np.ndarray, "_ _"]]) -> None:
    """Warn if most sequences begin or end with copies of the same token, which is then probably padding."""
    for part in parts:
        if len(part) < 2 or part.shape[1] < 3:
            continue
        for inwards, edge in ((part[:, ::-1], "end"), (part, "begin")):
            token = int(np.bincount(inwards[:, 0]).argmax())
            is_token = inwards == token
            copies = np.cumprod(is_token, axis=1).sum(1)  # at the edge; a text may end with one more
            is_padded = (copies > 1) & (copies < part.shape[1]) & (is_token.sum(1) <= copies + 1)
            if 2 * int(is_padded.sum()) > len(part):
                warnings.warn(
                    f"{is_padded.sum():,} of {len(part):,} sequences {edge} with two or more tokens {token}: if they "
                    "are padding, give the attention mask (Corpus.from_tokens(..., mask=)), or they count as text",
                    stacklevel=3,
                )
                return


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
    """Yield all sequences once, in order.

    The last batch may be smaller, but a single sequence that is left joins the batch before, since some replacements
    take activations from another sequence of the batch.
    """
    edges = [*range(0, len(tokens), batch_size), len(tokens)]
    if batch_size > 1 and len(edges) > 2 and edges[-1] - edges[-2] == 1:
        del edges[-2]
    for start, stop in pairwise(edges):
        yield torch.from_numpy(np.asarray(tokens[start:stop]).astype(np.int64))


def token_array(tokens: Any) -> Integer[np.ndarray, "sequence position"]:
    """Return held-out token ids as an array, from a `Corpus` (its held-out part), an array or a tensor.

    Raises:
        ValueError: If the ids are not integers of shape [sequence, position], at least one sequence of two tokens.
    """
    array = tokens.held_out if isinstance(tokens, Corpus) else tokens
    if isinstance(array, Mapping) and "input_ids" in array:  # what a tokenizer returns
        array, mask = _ids_and_mask(array, None)
        if mask is not None and not mask.all():
            raise ValueError(
                f"{int((~mask).sum()):,} of these tokens are padding, which would count as text: make a corpus of "
                "them, Corpus.from_tokens(train, held_out)"
            )
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


@dataclass
class _Noticed:
    """What is noticed while a text is read."""

    without_token: list[str] = field(default_factory=list)
    """The first words that the tokenizer has no tokens for."""
    is_cut: bool = False
    """Whether reading ended at the number of tokens that was asked for."""


def _tokenize(
    source: Source,
    tokenizer: Any,
    layout: _Layout,
    salt: str,
    max_tokens: int | None,
    noticed: _Noticed,
) -> Iterator[tuple[float, Integer[np.ndarray, " token"]]]:
    """Yield, for each document, its `document_position` and its token ids, with those around it.

    What is noticed on the way is written to `noticed`.
    """
    before, after = list(layout.before), list(layout.after)
    unknown = unknown_token(tokenizer)
    total = 0
    with progress(total=source.n_bytes, unit="B", unit_scale=True, desc="tokenising") as bar:
        for batch in _batches_of_text(source.documents):
            texts = [text for _, text in batch]
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for (key, text), ids in zip(batch, encoded["input_ids"], strict=True):
                tokens = np.array(before + ids + after, dtype=np.int32)
                if unknown in ids and not noticed.without_token:
                    noticed.without_token += words_without_token(tokenizer, text)
                if max_tokens is not None:
                    tokens = tokens[: max_tokens - total]
                total += len(tokens)
                yield document_position(key, salt), tokens
                bar.update(len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")))
                if total == max_tokens:
                    noticed.is_cut = True
                    return


def _batches_of_text(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    characters, most = 0, _FIRST_CHARACTERS
    for key, text in documents:
        if not text.strip():
            continue
        if not is_text(text):
            raise ValueError(f"the document {shown(text)} contains an unpaired surrogate")
        batch.append((key, text))
        characters += len(text)
        if characters >= most:
            yield batch
            batch, characters, most = [], 0, min(2 * most, _BATCH_CHARACTERS)
    if batch:
        yield batch


def _split(
    documents: Iterator[tuple[float, Integer[np.ndarray, " token"]]],
    held_out: float,
    context_length: int,
    every: tuple[int, ...],
    source: str,
) -> tuple[Integer[np.ndarray, "a position"], Integer[np.ndarray, "b position"], tuple[int, int]]:
    """Split documents by their hash; return the sequences of both parts and their document counts."""
    first = list(itertools.islice(documents, _SMALL_CORPUS_DOCUMENTS))
    threshold = held_out
    if held_out > 0 and len(first) < _SMALL_CORPUS_DOCUMENTS:
        threshold = max(threshold, _threshold_for_one_sequence(first, context_length))
    parts = (_Tokens(context_length, every), _Tokens(context_length, every))  # training, held out
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


class _Tokens:
    """A growing part of a corpus; `sequences()` finishes it."""

    def __init__(self, context_length: int, every: tuple[int, ...] = ()) -> None:
        self.context_length = context_length
        self.n_documents = 0
        self._every = np.array(every, dtype=np.int32)  # at the start of every sequence
        self._stream = GrowingArray(np.int32, _IN_MEMORY_BYTES)

    @property
    def n_tokens(self) -> int:
        return len(self._stream)

    def append(self, tokens: Integer[np.ndarray, " token"]) -> None:
        """Add a document."""
        self._stream.append(self._with_starts(tokens) if len(self._every) else tokens)
        self.n_documents += 1

    def _with_starts(self, tokens: Integer[np.ndarray, " token"]) -> Integer[np.ndarray, " more_tokens"]:
        """A document, with what every sequence begins with wherever a sequence begins inside it."""
        room = self.context_length - self.n_tokens % self.context_length  # a document itself begins with it
        rest = tokens[room:]
        step = self.context_length - len(self._every)
        pieces = [piece for start in range(0, len(rest), step) for piece in (self._every, rest[start : start + step])]
        return np.concatenate([tokens[:room], *pieces])

    def sequences(self) -> Integer[np.ndarray, "sequence position"]:
        stream, count = self._stream.finished(), self.n_tokens // self.context_length
        if isinstance(stream, np.memmap):
            stream.setflags(write=False)
        return stream[: count * self.context_length].reshape(count, self.context_length)


def fingerprint_of(*arrays: Integer[np.ndarray, "_ _"]) -> str:
    """Hash the arrays of a corpus, as in `Corpus.fingerprint`."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(repr(array.shape).encode())
        for start in range(0, len(array), 1 << 14):
            digest.update(array[start : start + (1 << 14)].tobytes())
            release_pages(array)
    return digest.hexdigest()


def hash_of_tokenizer(tokenizer: Any) -> str:
    """Hash a tokenizer's vocabulary, as in `Corpus.tokenizer_hash`."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.blake2b(json.dumps(vocabulary).encode(), digest_size=16).hexdigest()
