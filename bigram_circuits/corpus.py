"""Text to fixed-length token arrays, split by document into a training and a held-out part.

One pass over the source: documents are tokenised in batches, each is preceded by the tokenizer's end-of-text token,
and the stream of each part is cut into sequences of `context_length` tokens (a last, shorter one is dropped).
A document goes to the held-out part when the hash of its text falls below the held-out share. So the split needs
no list of documents, equal documents always fall on the same side, and text may be larger than memory: arrays past
`_IN_MEMORY_TOKENS` are written to an unnamed temporary file and memory-mapped from there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor
from tqdm.auto import tqdm

from bigram_circuits.checksums import is_text, parse_json, shown
from bigram_circuits.files import release_pages

_IN_MEMORY_TOKENS = 1 << 24  # 64 MiB of int32
_BATCH_CHARACTERS = 1 << 20  # text tokenised at once
_PASSAGE_CHARACTERS = 2_000  # a plain text file is cut into documents of about this size
_SMALL_CORPUS_DOCUMENTS = 512  # up to here the held-out part is topped up to one whole sequence
_TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst"}
_LONGEST_LINE = 1 << 28  # characters of a line of JSON
_MOST_UNPACKED = 1 << 32  # bytes of a group of rows of a Parquet file
_LONGEST_NAME = 1024  # characters; a longer string is text, not the name of a source
_DEFAULT_CONTEXT_LENGTH = 128  # the paper's


@dataclass(frozen=True)
class Corpus:
    """Tokens of a text, in two parts that share no document."""

    train: Integer[np.ndarray, "train_sequence position"]
    """int32 token ids to learn and count from; a memory map when large."""
    held_out: Integer[np.ndarray, "held_out_sequence position"]
    """int32 token ids of other documents, to evaluate on; a memory map when large."""
    source: str
    """What was read, in words."""
    documents: tuple[int, int]
    """How many documents each part was cut from: (training, held out)."""
    fingerprint: str
    """Hash of both arrays: equal exactly when tokens, split and context length are equal."""
    tokenizer_hash: str
    """Hash of the tokenizer's vocabulary: tells tokenizers apart whatever their name."""

    @classmethod
    def from_tokens(
        cls,
        train: Integer[np.ndarray, "train_sequence position"],
        held_out: Integer[np.ndarray, "held_out_sequence position"],
        source: str = "tokens",
    ) -> Corpus:
        """A corpus of token ids that were made some other way, for example a task's prompts.

        Raises:
            ValueError: If they are not whole numbers [sequence, position], from 0 to below 2**31.
        """
        parts = [_as_ids(part) for part in (train, held_out)]
        counts = (len(parts[0]), len(parts[1]))
        return cls(parts[0], parts[1], source, counts, _fingerprint(*parts), tokenizer_hash="none")

    @property
    def context_length(self) -> int:
        """Tokens in a sequence."""
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
            (the object, or its name, `"name"` or `"name:configuration"`, of which the `train` split is streamed).
        tokenizer: A Hugging Face tokenizer, for example `model.tokenizer`.
        context_length: Tokens in a sequence; 128 if not given.
        held_out: Share of the documents to hold out, 0 to 1 (0: none).
        seed: Chooses which documents are held out. The reference corpus always holds out the documents that the
            reference model was not trained on (a share of 0.05), whatever the seed.
        max_tokens: Stop reading after this many tokens.
        text_column: The field that holds the text in JSONL, Parquet and datasets.

    Returns:
        A `Corpus`. A plain text file is cut into documents (passages of whole lines, about 2,000 characters, ending
        at a blank line where there is one); in the other formats a record is a document.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If an argument is out of range, the text is not UTF-8, a field is missing, or there is too
            little text for one sequence in each part.
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
    description, documents, n_bytes = _open_source(source, text_column)
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
    """The batch of training step `step`: sequences in a random order that is drawn anew for every epoch.

    A pure function of its arguments, so a run that resumes at a step sees the batches it would have seen. An epoch
    leaves out the few sequences, other ones each time, that do not fill a last batch.
    """
    if len(tokens) == 0:
        raise ValueError("there are no sequences to draw a batch from")
    batch_size = min(batch_size, len(tokens))
    epoch, batch = divmod(step, len(tokens) // batch_size)
    rows = _epoch_order(len(tokens), seed, epoch)[batch * batch_size : (batch + 1) * batch_size]
    return torch.from_numpy(tokens[rows].astype(np.int64))


@lru_cache(maxsize=1)  # drawing it takes longer than a training step once there are millions of sequences
def _epoch_order(n_sequences: int, seed: int, epoch: int) -> Integer[np.ndarray, " sequence"]:
    order = np.random.default_rng((seed, epoch)).permutation(n_sequences)
    order.setflags(write=False)
    return order


def in_order(
    tokens: Integer[np.ndarray, "sequence position"], batch_size: int
) -> Iterator[Integer[Tensor, "batch position"]]:
    """All sequences once, in order; the last batch may be smaller."""
    for start in range(0, len(tokens), batch_size):
        yield torch.from_numpy(np.asarray(tokens[start : start + batch_size]).astype(np.int64))


def token_array(tokens: Any) -> Integer[np.ndarray, "sequence position"]:
    """Held-out token ids as an array: of a `Corpus` its held-out part; else an array or tensor, checked.

    Raises:
        ValueError: If it is not [sequence, position] with at least one sequence of two tokens.
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
    """At most `max_tokens` tokens of a text: whole sequences, evenly spread over it."""
    if max_tokens < 1:
        raise ValueError(f"at least 1 token must be used, not {max_tokens}")
    wanted = min(len(tokens), max(1, max_tokens // tokens.shape[1]))
    return tokens[np.linspace(0, len(tokens) - 1, wanted).round().astype(int)]


def document_position(key: str, salt: str = "reference") -> float:
    """A fixed pseudo-random number in [0, 1) for a document; the held-out ones are those below the held-out share.

    `key` is the document's text (for the reference corpus: its name), `salt` the seed (there: `"reference"`).
    """
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=6, key=salt.encode()[:64]).digest()
    return int.from_bytes(digest, "big") / 2**48


# --- sources -----------------------------------------------------------------------------------------------------


def _open_source(source: Any, text_column: str) -> tuple[str, Iterable[tuple[str, str]], int | None]:
    """The source in words, its documents as (key that decides the split, text), and its size in bytes if known."""
    if isinstance(source, str) and source == "reference":
        from bigram_circuits.reference.documents import reference_documents

        return "reference", reference_documents(), None
    if isinstance(source, str | Path):
        if not str(source).strip() or len(str(source)) > _LONGEST_NAME or "\n" in str(source):
            raise ValueError(
                f"{_shortened(str(source))!r} is no name of a file, folder or dataset: give text as a list of str"
            )
        path = Path(source).expanduser()
        if path.suffix in (".npy", ".npz"):
            raise ValueError(f"{str(source)!r} is no text: give token ids to Corpus.from_tokens, as arrays")
        if path.exists():
            files = _files_below(path)
            return str(source), _file_documents(files, text_column), _text_size(files)
        if isinstance(source, Path) or path.is_absolute() or path.suffix in _TEXT_SUFFIXES | {".jsonl", ".parquet"}:
            raise FileNotFoundError(f"there is no file or folder {str(source)!r}")
        return source, _records(_load_dataset(source), text_column, source), None
    if isinstance(source, Sequence) and source and all(isinstance(item, Path) for item in source):
        files = [file for item in source for file in _files_below(item)]
        return ", ".join(map(str, source)), _file_documents(files, text_column), _text_size(files)
    if isinstance(source, Sequence) and all(isinstance(item, str) for item in source):
        return f"{len(source)} documents", ((text, text) for text in source), None
    if isinstance(source, Mapping):  # for example a DatasetDict: iterating would give the names of its splits
        keys = ", ".join(map(repr, source))
        raise ValueError(f"cannot read text from a {type(source).__name__}: give one of its parts ({keys})")
    if isinstance(source, Iterable):
        name = getattr(getattr(source, "info", None), "dataset_name", None) or type(source).__name__
        return f"dataset {name}", _records(source, text_column, "the dataset"), None
    raise ValueError(f"cannot read text from {type(source).__name__}: give a name, a path, a dataset or a list of str")


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _load_dataset(name: str) -> Iterable[Any]:
    import datasets
    import huggingface_hub

    path, _, configuration = name.partition(":")
    try:
        huggingface_hub.HfApi().dataset_info(path, timeout=10)  # says at once what loading would retry for long
        return datasets.load_dataset(path, configuration or None, split="train", streaming=True)
    except Exception as error:  # the library raises many kinds: no such name, no network, no such split
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{name!r} is neither a file or folder here nor a dataset that could be loaded ({reason})"
        ) from error


def _records(records: Iterable[Any], text_column: str, name: str) -> Iterator[tuple[str, str]]:
    for index, record in enumerate(records):
        if isinstance(record, str):
            text = record
        elif isinstance(record, dict) and isinstance(record.get(text_column), str):
            text = record[text_column]
        elif isinstance(record, dict) and text_column in record and record[text_column] is None:
            continue  # a record without text
        else:
            has = f"the fields {_named(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise ValueError(f"record {index} of {name} has {has}, but a text field {text_column!r} is needed")
        yield text, text


def _named(record: dict[Any, Any]) -> str:
    names = sorted(map(str, record))
    return f"[{', '.join(map(shown, names[:20]))}{', ...' if len(names) > 20 else ''}]"


def _files_below(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}")
    if path.is_file():
        return [path]
    wanted = _TEXT_SUFFIXES | {".jsonl", ".parquet"}
    files = sorted(file for file in path.rglob("*") if file.suffix in wanted and file.is_file())
    if not files:
        raise ValueError(f"the folder {str(path)!r} holds no text: looked for {', '.join(sorted(wanted))}")
    return files


def _text_size(files: list[Path]) -> int | None:
    """Bytes of text to come, for the progress bar; unknown where files are compressed."""
    return None if any(file.suffix == ".parquet" for file in files) else sum(file.stat().st_size for file in files)


def _file_documents(files: list[Path], text_column: str) -> Iterator[tuple[str, str]]:
    readers = {".jsonl": _jsonl_texts, ".json": _jsonl_texts, ".parquet": _parquet_texts}
    for file in files:
        try:
            texts = readers[file.suffix](file, text_column) if file.suffix in readers else _passages(file)
            for text in texts:
                yield text, text
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{str(file)!r} is not UTF-8 text (byte 0x{error.object[error.start]:02x}: {error.reason}); "
                "convert it first, for example with iconv"
            ) from error


def _passages(file: Path) -> Iterator[str]:
    """Runs of whole lines, cut at a blank line once long enough, or anywhere once four times as long."""
    lines: list[str] = []
    length = 0
    with file.open(encoding="utf-8-sig") as handle:
        while line := handle.readline(4 * _PASSAGE_CHARACTERS):
            lines.append(line)
            length += len(line)
            if length >= 4 * _PASSAGE_CHARACTERS or (length >= _PASSAGE_CHARACTERS and not line.strip()):
                yield "".join(lines)
                lines, length = [], 0
    yield "".join(lines)


def _jsonl_texts(file: Path, text_column: str) -> Iterator[str]:
    with file.open(encoding="utf-8-sig") as handle:
        for number, line in enumerate(iter(lambda: handle.readline(_LONGEST_LINE), ""), start=1):
            if not line.strip():
                continue
            if len(line) == _LONGEST_LINE:
                raise ValueError(f"line {number} of {str(file)!r} is longer than {_LONGEST_LINE:,} characters")
            try:
                record = parse_json(line)
            except ValueError as error:
                raise ValueError(f"line {number} of {str(file)!r} is not JSON: {error}") from error
            for _, text in _records([record], text_column, f"line {number} of {str(file)!r}"):
                if not is_text(text):
                    raise ValueError(f"line {number} of {str(file)!r} holds half of a surrogate pair: no character")
                yield text


def _parquet_texts(file: Path, text_column: str) -> Iterator[str]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file, page_checksum_verification=True)
        names = table.schema_arrow.names
        if text_column not in names:
            raise ValueError(f"{str(file)!r} has the columns {shown(names)}, but {text_column!r} is needed")
        _check_groups(table, file)
        for batch in table.iter_batches(batch_size=256, columns=[text_column]):
            for text in batch.column(0).to_pylist():
                if isinstance(text, str):
                    yield text
                elif text is not None:
                    raise ValueError(f"column {text_column!r} of {str(file)!r} holds {type(text).__name__}, not text")
    except UnicodeDecodeError:
        raise
    except (ArrowException, OSError, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{str(file)!r} is not a Parquet file, or is damaged: {reason}") from error


def _check_groups(table: Any, file: Path) -> None:
    """Refuse groups of rows that are larger, by their own header, than is unpacked at once.

    The size of one column is not asked for: on some damaged files, that ends the process (Arrow 26).
    """
    for index in range(table.metadata.num_row_groups):
        size = table.metadata.row_group(index).total_byte_size
        if not 0 <= size <= _MOST_UNPACKED:
            raise ValueError(
                f"{str(file)!r} has {size:,} bytes in one group of rows, more than {_MOST_UNPACKED:,}: "
                f"write it with smaller groups"
            )


# --- tokens ------------------------------------------------------------------------------------------------------


def _tokenize(
    documents: Iterable[tuple[str, str]], tokenizer: Any, salt: str, max_tokens: int | None, n_bytes: int | None
) -> Iterator[tuple[float, Integer[np.ndarray, " token"]]]:
    """Yield (position of the document's key in [0, 1) under a salted hash, its token ids with a separator first)."""
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
            raise ValueError(f"the document {shown(text)} holds half of a surrogate pair: no character")
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
    """Send each document to one of two token files, by its hash."""
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
    """The lowest threshold that puts at least `context_length` tokens below it."""
    total = 0
    for position, tokens in sorted(documents, key=lambda document: document[0]):
        total += len(tokens)
        if total >= context_length:
            return float(np.nextafter(position, 1.0))
    return 0.0


class _TokenFile:
    """Grows by documents; past a size it lives on disk. `sequences()` ends it."""

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
            self._file = tempfile.TemporaryFile(prefix="bigram_circuits_")  # noqa: SIM115 (lives with its map)
        np.concatenate(self._blocks).tofile(self._file)
        self._blocks, self._waiting = [], 0

    def sequences(self) -> Integer[np.ndarray, "sequence position"]:
        shape = (self.n_tokens // self.context_length, self.context_length)
        if self._file is None:
            tokens = np.concatenate(self._blocks) if self._blocks else np.zeros(0, np.int32)
            return tokens[: shape[0] * shape[1]].reshape(shape)
        if self._blocks:
            self._write()
        self._file.flush()
        return np.memmap(self._file, dtype=np.int32, mode="r", shape=shape)


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
