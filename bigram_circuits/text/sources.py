"""Read text from files, folders, datasets and lists, one document at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bigram_circuits.storage.records import is_text, parse_json, shown

_PASSAGE_CHARACTERS = 2_000  # a plain text file is cut into documents of about this size
_TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst"}
_LONGEST_LINE = 1 << 28  # characters in a line of JSON
_MOST_UNPACKED = 1 << 32  # bytes in a row group of a Parquet file
_LONGEST_NAME = 1024  # characters; a longer string is text rather than the name of a source


def open_source(source: Any, text_column: str) -> tuple[str, Iterable[tuple[str, str]], int | None]:
    """Open a text source.

    Returns:
        A description of the source, its documents as (key that decides the split, text), and its size in bytes or None.
    """
    if isinstance(source, str) and source == "reference":
        from bigram_circuits.text.reference import reference_documents

        return "reference", reference_documents(), None
    if isinstance(source, str | Path):
        if not str(source).strip() or len(str(source)) > _LONGEST_NAME or "\n" in str(source):
            raise ValueError(
                f"{_shortened(str(source))!r} is not the name of a file, folder or dataset: give text as a list of str"
            )
        path = Path(source).expanduser()
        if path.suffix in (".npy", ".npz"):
            raise ValueError(f"{str(source)!r} is an array file, not text: give token ids to Corpus.from_tokens")
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
    if isinstance(source, Mapping):  # for example a DatasetDict, where iteration yields the names of its splits
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
        huggingface_hub.HfApi().dataset_info(path, timeout=10)  # fails at once where loading would retry for long
        return datasets.load_dataset(path, configuration or None, split="train", streaming=True)
    except Exception as error:  # the library raises many types: no such name, no network, no such split
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
    """Return the total size of the text in bytes, for the progress bar; None if files are compressed."""
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
    """Cut a file into passages of whole lines: at the first blank line past the target size, or at four times that."""
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
                    raise ValueError(f"line {number} of {str(file)!r} contains an unpaired surrogate")
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
    """Raise ValueError if a row group is, according to its header, too large to unpack at once.

    Column sizes are not queried, because on some damaged files that crashes the process (Arrow 26).
    """
    for index in range(table.metadata.num_row_groups):
        size = table.metadata.row_group(index).total_byte_size
        if not 0 <= size <= _MOST_UNPACKED:
            raise ValueError(
                f"{str(file)!r} has {size:,} bytes in one group of rows, more than {_MOST_UNPACKED:,}: "
                f"write it with smaller groups"
            )
