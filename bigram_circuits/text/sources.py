"""Read text from files, folders, datasets, tables and lists, one document at a time."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigram_circuits.text.formats import NAMED_SUFFIXES, Reading, files_of, passages, text_of

_LONGEST_NAME = 1024  # characters; a longer string is text rather than the name of a source
_LONG_DOCUMENT = 1 << 20  # characters; a longer document is cut into passages
_NO_LIST = "give a name, a path, a dataset or a list of str"

Documents = Iterable[tuple[str, str]]
"""(key that decides the split, text) of every document."""


@dataclass(frozen=True)
class Source:
    """A source of text, opened."""

    description: str
    """What it is, as a phrase."""
    documents: Documents
    """Its documents; they can be read once."""
    n_bytes: int | None = None
    """Its size for a progress bar; None if that is not known."""
    reading: Reading | None = None
    """The files that are read and those that are skipped; None if it is not in files."""


def open_source(source: Any, text_column: str) -> Source:
    """Open a text source; see `load_corpus`.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If it is nothing that text can be read from; what is wrong with a document is raised on reading it.
    """
    opened = _opened(source, text_column)
    return Source(opened.description, _bounded(opened.documents), opened.n_bytes, opened.reading)


def _bounded(documents: Documents) -> Iterator[tuple[str, str]]:
    """Cut long documents into the passages that a text file of them would be cut into."""
    for key, text in documents:
        if len(text) <= _LONG_DOCUMENT:
            yield key, text
        else:
            yield from ((passage, passage) for passage in passages(io.StringIO(text, newline=None)))


def _opened(source: Any, text_column: str) -> Source:
    if isinstance(source, str) and source == "reference":
        from bigram_circuits.text.reference import reference_documents

        return Source("reference", reference_documents())
    if isinstance(source, str | Path):
        return _named(source, text_column)
    if isinstance(source, Sequence) and source and all(isinstance(item, Path) for item in source):
        return _of_files(", ".join(map(str, source)), source, text_column)
    if isinstance(source, Sequence) and all(isinstance(item, str) for item in source):
        return Source(f"{len(source)} documents", ((text, text) for text in source))
    kind = type(source).__name__
    if isinstance(source, Mapping):  # for example a DatasetDict, where iteration yields the names of its splits
        keys = ", ".join(map(repr, source))
        raise ValueError(f"cannot read text from a {kind}: give one of its parts ({keys})")
    if isinstance(source, Set):
        raise ValueError(f"a {kind} has no order, so its corpus would differ from run to run: {_NO_LIST}")
    if isinstance(source, io.IOBase):
        raise ValueError(f"cannot read text from an open file, a {kind}: give its path")
    if hasattr(source, "dtype") and hasattr(source, "shape") and _is_numeric(source):
        raise ValueError(f"cannot read text from numbers, a {kind}: token ids go to Corpus.from_tokens")
    if _columnar(source):
        cells = _cells(source, text_column)
        return Source(f"a {kind} of {len(source):,} rows", _records(cells, text_column, f"the {kind}"))
    if isinstance(source, Iterable):
        name = getattr(getattr(source, "info", None), "dataset_name", None) or kind
        return Source(
            f"dataset {name}{_shuffled(source)}", _records(_text_only(source, text_column), text_column, "the dataset")
        )
    raise ValueError(f"cannot read text from {kind}: {_NO_LIST}")


def _named(source: str | Path, text_column: str) -> Source:
    if not str(source).strip() or len(str(source)) > _LONGEST_NAME or "\n" in str(source):
        raise ValueError(
            f"{_shortened(str(source))!r} is not the name of a file, folder or dataset: give text as a list of str"
        )
    path = Path(source).expanduser()
    if path.exists():
        return _of_files(str(source), [path], text_column)
    if isinstance(source, Path) or path.is_absolute() or path.suffix.lower() in NAMED_SUFFIXES:
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}")
    return Source(source, _records(_text_only(_load_dataset(source), text_column), text_column, source))


def _of_files(description: str, paths: Sequence[Path], text_column: str) -> Source:
    reading = files_of([path.expanduser() for path in paths], text_column)
    plain = all(file.packed is None and file.kind not in ("Parquet", "Arrow") for file in reading.read)
    size = sum(file.path.stat().st_size for file in reading.read) if plain else None
    texts = (text for file in reading.read for text in file.documents(text_column))
    return Source(description, ((text, text) for text in texts), size, reading)


def _text_only(dataset: Iterable[Any], text_column: str) -> Iterable[Any]:
    """A dataset without its other columns, if it has some: they may hold images and sounds, decoded on reading."""
    if text_column in (getattr(dataset, "column_names", None) or ()) and hasattr(dataset, "select_columns"):
        return dataset.select_columns([text_column])  # pyright: ignore[reportAttributeAccessIssue]
    return dataset


def _shuffled(dataset: Any) -> str:
    """How a streamed dataset was shuffled, as a phrase; empty if it was not.

    The library says so in no public attribute, but the steps of a stream know what they take their examples from.
    """
    step = getattr(dataset, "_ex_iterable", None)
    while step is not None:
        buffer, generator = getattr(step, "buffer_size", None), getattr(step, "generator", None)
        if isinstance(buffer, int) and isinstance(generator, np.random.Generator):
            seed = getattr(generator.bit_generator.seed_seq, "entropy", None)
            return f", shuffled in a buffer of {buffer:,} with seed {seed}"
        step = getattr(step, "ex_iterable", None)
    return ""


def _is_numeric(source: Any) -> bool:
    return re.match(r"(torch\.)?(u?int|b?float|bool|complex)", str(source.dtype).lower()) is not None


def _columnar(source: Any) -> bool:
    """Whether it is a table or a column of pandas, polars or Arrow; iterating over a table yields no rows."""
    module = type(source).__module__.partition(".")[0]
    return module in ("pandas", "polars", "pyarrow") and hasattr(source, "__len__")


def _cells(source: Any, text_column: str) -> Iterator[Mapping[str, Any]]:
    """The cells of a column, or of the text column of a table, as records; a missing value is null."""
    column = _column(source, text_column) if hasattr(source, "columns") else source
    for value in column:
        value = value.as_py() if hasattr(value, "as_py") else value
        is_missing = value is None or (isinstance(value, float) and math.isnan(value)) or str(value) == "<NA>"
        yield {text_column: None if is_missing else value}


def _column(table: Any, text_column: str) -> Iterable[Any]:
    columns = list(table.column_names if hasattr(table, "column_names") else table.columns)
    found = [name for name in columns if str(name) == text_column]
    if len(found) != 1:
        has = "no" if not found else f"{len(found)}"
        raise ValueError(
            f"the {type(table).__name__} has {has} columns {text_column!r}, but one is needed: there are {columns[:20]}"
        )
    return table[found[0]]


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _load_dataset(name: str) -> Iterable[Any]:
    import datasets
    import huggingface_hub

    path, _, configuration = name.partition(":")
    try:
        huggingface_hub.HfApi().dataset_info(path, timeout=10)  # fails at once where loading would retry for long
        return datasets.load_dataset(path, configuration or None, split="train", streaming=True)
    except Exception as error:  # the library raises many types: no such name, no network, no such split
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{name!r} is neither a file or folder here nor a dataset that could be loaded ({reason})"
        ) from error


def _records(records: Iterable[Any], text_column: str, name: str) -> Iterator[tuple[str, str]]:
    for index, record in enumerate(records):
        text = text_of(record, text_column, f"record {index} of {name}")
        if text is not None:
            yield text, text
