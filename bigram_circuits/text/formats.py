"""Text in files: what a file holds is recognised by its content, and its documents are read one at a time.

Compressed files (gzip, bzip2, xz, Zstandard) are read as what is in them. The suffix only decides what content cannot:
whether lines with commas are a table (`.csv`), and whether a broken line of JSON is an error (`.jsonl`) or prose.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigram_circuits.storage.records import is_text, parse_json, shown

_PASSAGE_CHARACTERS = 2_000  # a plain text file is cut into documents of about this size
_HEAD = 1 << 16  # bytes that are looked at to recognise a file
_LONGEST_LINE = 1 << 28  # characters in a line of JSON, a JSON file, or a cell of a table
_MOST_UNPACKED = 1 << 32  # bytes in a row group of a Parquet file
TEXT_SUFFIXES = {".txt", ".text", ".md", ".markdown", ".rst"}
"""Suffixes of files that can only hold text."""
_JSON_LINES = {".jsonl", ".ndjson", ".jsonlines", ".jl"}
_TABLES = {".csv": ",;\t", ".tsv": "\t"}  # suffix -> delimiters that are tried
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    **{bytes([first]) + b"\x2a\x4d\x18": "Zstandard" for first in range(0x50, 0x60)},  # a frame to be skipped
}
_PACKED_SUFFIXES = {".gz", ".bz2", ".xz", ".zst", ".zstd"}
NAMED_SUFFIXES = (
    TEXT_SUFFIXES
    | _JSON_LINES
    | {".json", ".parquet", ".arrow", *_TABLES}
    | _PACKED_SUFFIXES
    | {".npy", ".npz", ".bin"}
)
"""Suffixes that only a file would have in its name, not a dataset."""
_ENCODINGS = (  # byte order marks; the longer ones first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_TOKENS = "give token ids to Corpus.from_tokens"
_OTHERS = {  # first bytes -> what has no text to read
    b"\x93NUMPY": f"a NumPy array ({_TOKENS})",
    b"PK\x03\x04": "a zip archive (unpack it first)",
    b"%PDF-": "a PDF",
    b"SQLite format 3": "a database",
}
_HIDDEN = {"__pycache__", "__macosx"}
_ABOUT = re.compile(r"(readme|licen[cs]e|copying|citation|changelog|notice|authors|contributing)\b", re.IGNORECASE)


class NotTextError(ValueError):
    """A file that holds no text; its message is a phrase that says what it is."""


@dataclass(frozen=True)
class TextFile:
    """A file, and how its text is read."""

    path: Path
    """The file."""
    kind: str
    """What it holds: `text`, `JSON lines`, `JSON`, `CSV`, `Parquet` or `Arrow`."""
    encoding: str = "utf-8"
    """How its characters are encoded."""
    packed: str | None = None
    """How it is compressed."""

    def documents(self, text_column: str) -> Iterator[str]:
        """The text of its documents.

        Raises:
            ValueError: If the file is damaged, has another encoding, or lacks the field or column.
        """
        with _in_words(self):
            yield from _READERS[self.kind](self, text_column)

    def open(self, newline: str | None = None) -> io.TextIOWrapper:
        """Its characters; by default, all line ends are line feeds."""
        return io.TextIOWrapper(_unpacked(self.path), encoding=self.encoding, newline=newline)


@dataclass(frozen=True)
class Reading:
    """What was read of a file or a folder."""

    read: tuple[TextFile, ...]
    """The files that were read, in order."""
    skipped: tuple[tuple[str, str], ...] = ()
    """Files and folders that were not read, with reasons."""

    def __str__(self) -> str:
        kinds = [one.kind for one in self.read]
        counts = ", ".join(f"{kinds.count(kind):,} of {kind}" for kind in dict.fromkeys(kinds))
        line = f"{len(kinds):,} file{'' if len(kinds) == 1 else 's'} read ({counts})"
        if not self.skipped:
            return line
        some = ", ".join(f"{name if name.isprintable() else ascii(name)} ({why})" for name, why in self.skipped[:5])
        more = f" and {len(self.skipped) - 5:,} more" if len(self.skipped) > 5 else ""
        return f"{line}, {len(self.skipped):,} skipped: {some}{more}"


# --- recognising ---


def files_of(paths: Iterable[Path], text_column: str) -> Reading:
    """Recognise files and what is below folders, in the order of their paths.

    In a folder, hidden files are skipped, and those that hold no text: binary ones, and a single JSON record without
    the field `text_column`. Beside records (JSON, tables), a README or a licence is skipped too.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a file holds no text, or there is none in a folder.
    """
    read: list[TextFile] = []
    skipped: list[tuple[str, str]] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is no file or folder {str(path)!r}")
        if path.is_dir():
            found = _below(path, text_column)
            read += found.read
            skipped += found.skipped
            continue
        if not path.is_file():
            raise ValueError(f"{str(path)!r} is not a regular file: write the text to one first")
        try:
            read.append(recognised(path))
        except NotTextError as error:
            raise ValueError(f"{str(path)!r} is {error}, not text") from error
    return Reading(tuple(read), tuple(skipped))


def _below(folder: Path, text_column: str) -> Reading:
    read: list[TextFile] = []
    skipped: list[tuple[str, str]] = []
    paths: list[Path] = []
    for root, names, files in os.walk(folder):
        here = Path(root)
        hidden = [name for name in (*names, *files) if _is_hidden(name)]
        skipped += [(str((here / name).relative_to(folder)), "hidden") for name in sorted(hidden)]
        links = [name for name in names if not _is_hidden(name) and (here / name).is_symlink()]
        skipped += [(str((here / name).relative_to(folder)), "a link to a folder") for name in sorted(links)]
        names[:] = [name for name in names if not _is_hidden(name)]
        paths += [here / name for name in files if not _is_hidden(name)]
    for path in sorted(paths):
        name = str(path.relative_to(folder))
        try:
            if not path.is_file():
                raise NotTextError("not a regular file")
            found = recognised(path)
            if path.suffix.lower() == ".json" and _is_settings(path, text_column):
                raise NotTextError(f"one record without {text_column!r}")
            read.append(found)
        except NotTextError as error:
            skipped.append((name, str(error)))
    if any(one.kind != "text" for one in read):
        about = [one for one in read if one.kind == "text" and _ABOUT.match(one.path.name)]
        skipped += [(str(one.path.relative_to(folder)), "describes the records") for one in about]
        read = [one for one in read if one not in about]
    if not read:
        why = f": {Reading((), tuple(skipped))}".partition("skipped")[2] if skipped else ""
        raise ValueError(f"the folder {str(folder)!r} holds no text: looked for .txt, .md, .jsonl, .csv, .parquet{why}")
    return Reading(tuple(read), tuple(skipped))


def _is_settings(path: Path, text_column: str) -> bool:
    """Whether a file is a small JSON record without the text column, such as the settings of a dataset."""
    with path.open("rb") as file:
        start = file.read(_HEAD)
    try:
        record = parse_json(start)
    except ValueError:
        return False
    return isinstance(record, dict) and text_column not in record


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _HIDDEN


def recognised(path: Path) -> TextFile:
    """Recognise what a file holds.

    Raises:
        NotTextError: If it holds no text.
        ValueError: If it cannot be read: it is damaged, or has another encoding.
    """
    with path.open("rb") as file:
        start = file.read(_HEAD)
    packed = next((name for magic, name in _PACKED.items() if start.startswith(magic)), None)
    inner = Path(path.stem) if packed and path.suffix.lower() in _PACKED_SUFFIXES else path
    suffix = inner.suffix.lower()
    if packed:
        with _in_words(TextFile(path, "text", packed=packed)), _unpacked(path) as stream:
            start = stream.read(_HEAD)
    if start.startswith((b"PAR1", b"ARROW1")) or suffix in (".parquet", ".arrow"):
        kind = "Arrow" if start.startswith(b"ARROW1") or suffix == ".arrow" else "Parquet"
        if packed:
            raise NotTextError(f"a packed {kind} file (unpack it first)")
        return TextFile(path, kind)
    encoding = _encoding(path, start, suffix)
    head = start.decode(encoding, "ignore").lstrip()
    if suffix in _TABLES:
        return TextFile(path, "CSV", encoding, packed)
    if suffix in _JSON_LINES:
        return TextFile(path, "JSON lines", encoding, packed)
    if suffix == ".json" or head.startswith("{"):
        return TextFile(path, _kind_of_json(head, len(start) == _HEAD, suffix), encoding, packed)
    return TextFile(path, "text", encoding, packed)


def _encoding(path: Path, start: bytes, suffix: str) -> str:
    other = next((what for magic, what in _OTHERS.items() if start.startswith(magic)), None)
    if other is not None:
        raise NotTextError(other)
    if start[8:10] == b'{"' and int.from_bytes(start[:8], "little") < 1 << 32:
        raise NotTextError(f"a safetensors file ({_TOKENS})")
    if start[257:262] == b"ustar":
        raise NotTextError("a tar archive (unpack it first)")
    encoding = next((name for mark, name in _ENCODINGS if start.startswith(mark)), "utf-8")
    says_text = suffix in TEXT_SUFFIXES | _JSON_LINES | {".json", *_TABLES}
    if encoding == "utf-8" and b"\0" in start:
        if says_text:
            raise ValueError(
                f"{str(path)!r} is not UTF-8 text: it holds zero bytes, so it is UTF-16 without a byte order mark "
                "(convert it first, for example with iconv) or binary"
            )
        raise NotTextError(f"binary ({_TOKENS})")
    try:
        codecs.getincrementaldecoder(encoding)().decode(start, len(start) < _HEAD)
    except UnicodeDecodeError as error:
        if says_text or _is_like_text(start):
            raise ValueError(_other_encoding(path, error)) from error
        raise NotTextError(f"binary ({_TOKENS})") from error
    return encoding


def _is_like_text(data: bytes) -> bool:
    """Whether hardly any byte is a control character; of random bytes, a tenth are."""
    return sum((byte < 32 and byte not in b"\t\n\r\f") or byte == 127 for byte in data) < 0.03 * len(data)


def _kind_of_json(head: str, is_cut: bool, suffix: str) -> str:
    """`JSON lines`, `JSON` (a list or one record), or `text` where it only begins with a bracket."""
    line, ends, _ = head.partition("\n")
    if not ends and is_cut:  # a first record that is longer than what was looked at
        is_record = re.match(r'\{\s*"[^"\\]*"\s*:', line) is not None
    else:
        try:
            is_record = isinstance(json.loads(line), dict | str)
        except (ValueError, RecursionError):
            is_record = False
    if is_record:
        return "JSON lines"
    return "JSON" if suffix == ".json" else "text"


# --- opening ---


class _Zstandard(io.RawIOBase):
    """The unpacked bytes of a Zstandard file, which may have several frames."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self._packed = pyarrow.OSFile(str(path), "rb")
        self._stream = pyarrow.CompressedInputStream(self._packed, "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._packed.close()
        super().close()


def _unpacked(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(8)
    packed = next((name for magic, name in _PACKED.items() if start.startswith(magic)), None)
    if packed == "Zstandard":
        return io.BufferedReader(_Zstandard(path))
    return (
        {"gzip": gzip.GzipFile, "bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}[packed](path) if packed else path.open("rb")
    )


@contextmanager
def _in_words(file: TextFile) -> Iterator[None]:
    """Turn what the libraries raise on a damaged file into a line that names it."""
    from pyarrow import ArrowException

    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(_other_encoding(file.path, error)) from error
    except (
        EOFError,
        zlib.error,
        lzma.LZMAError,
        gzip.BadGzipFile,
        ArrowException,
        MemoryError,
        OverflowError,
    ) as error:
        raise ValueError(_damaged(file, error)) from error
    except OSError as error:
        if error.errno is not None:  # the machine's, not the file's
            raise
        raise ValueError(_damaged(file, error)) from error


def _damaged(file: TextFile, error: BaseException) -> str:
    what = f"compressed with {file.packed}" if file.packed else f"a {file.kind} file"
    return f"{str(file.path)!r} is not {what}, or is damaged: {' '.join(str(error).split())[:200]}"


def _other_encoding(path: Path, error: UnicodeDecodeError) -> str:
    name = "UTF-8" if error.encoding.startswith("utf-8") else error.encoding.upper()
    byte = f"byte 0x{error.object[error.start]:02x}: {error.reason}" if error.object else error.reason
    return f"{str(path)!r} is not {name} text ({byte}); convert it first, for example with iconv"


# --- reading ---


def passages(lines: io.TextIOBase) -> Iterator[str]:
    """Cut a text into passages of whole lines: at the first blank line past the target size, or at four times that."""
    passage: list[str] = []
    length = 0
    while line := lines.readline(4 * _PASSAGE_CHARACTERS):
        passage.append(line)
        length += len(line)
        if length >= 4 * _PASSAGE_CHARACTERS or (length >= _PASSAGE_CHARACTERS and not line.strip()):
            yield "".join(passage)
            passage, length = [], 0
    yield "".join(passage)


def text_of(record: Any, text_column: str, name: str) -> str | None:
    """The text of a record: a string, or a field of a mapping; None if the field is null.

    Raises:
        ValueError: If there is no such field, or it is not text; the message names the record.
    """
    if isinstance(record, str):
        return record
    if isinstance(record, Mapping) and text_column in record:
        text = record[text_column]
        if text is None or isinstance(text, str):
            return text
        raise ValueError(f"{name}: its text field {text_column!r} holds {_a(text)}, not text")
    has = f"the fields {_named(record)}" if isinstance(record, Mapping) else _a(record)
    raise ValueError(f"{name} has {has}, but a text field {text_column!r} is needed")


def _a(value: Any) -> str:
    return f"a {type(value).__name__}"


def _named(record: Mapping[Any, Any]) -> str:
    names = sorted(map(str, record))
    return f"[{', '.join(map(shown, names[:20]))}{', ...' if len(names) > 20 else ''}]"


def _passages(file: TextFile, text_column: str) -> Iterator[str]:
    with file.open() as handle:
        yield from passages(handle)


def _json_lines(file: TextFile, text_column: str) -> Iterator[str]:
    with file.open() as handle:
        for number, line in enumerate(iter(lambda: handle.readline(_LONGEST_LINE), ""), start=1):
            if not line.strip():
                continue
            name = f"line {number} of {str(file.path)!r}"
            if len(line) == _LONGEST_LINE:
                raise ValueError(f"{name} is longer than {_LONGEST_LINE:,} characters")
            record = _parsed(line, text_column, name)
            del line
            yield from _checked([record], text_column, lambda _, name=name: name)


def _json(file: TextFile, text_column: str) -> Iterator[str]:
    """A list of records, or a single one."""
    with file.open() as handle:
        text = handle.read(_LONGEST_LINE)
    if len(text) == _LONGEST_LINE:
        raise ValueError(f"{str(file.path)!r} is longer than {_LONGEST_LINE:,} characters: write it as JSON lines")
    records = _parsed(text, text_column, repr(str(file.path)))
    if not isinstance(records, list):
        records = [records]
    yield from _checked(records, text_column, lambda place: f"record {place} of {str(file.path)!r}")


def _checked(records: Iterable[Any], text_column: str, name: Callable[[int], str]) -> Iterator[str]:
    for place, record in enumerate(records):
        text = text_of(record, text_column, name(place))
        if text is not None:
            if not is_text(text):
                raise ValueError(f"{name(place)} contains an unpaired surrogate")
            yield text


def _parsed(text: str, text_column: str, name: str) -> Any:
    """Parse JSON, in which other fields may hold anything that JSON can."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if sum(key == text_column for key, _ in pairs) > 1:
            raise ValueError(f"it names {shown(text_column)} twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once, parse_int=lambda _: 0)
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {' '.join(str(error).split())}") from error


def _csv(file: TextFile, text_column: str) -> Iterator[str]:
    suffix = next(one.lower() for one in reversed(file.path.suffixes) if one.lower() in _TABLES)
    limit = csv.field_size_limit(_LONGEST_LINE)
    rows: Any = None
    try:
        with file.open(newline="") as handle:
            first = handle.readline(_LONGEST_LINE)
            headers = {mark: next(csv.reader([first], delimiter=mark), []) for mark in _TABLES[suffix]}
            mark, names = next((one for one in headers.items() if text_column in one[1]), next(iter(headers.items())))
            _check_column(file, names, text_column)
            rows = csv.reader(handle, delimiter=mark, strict=True)
            for row in rows:
                if row and len(row) != len(names):
                    raise csv.Error(f"it has {len(row)} cells, but there are {len(names)} columns")
                if row:
                    yield row[names.index(text_column)]
    except csv.Error as error:
        line = 1 if rows is None else rows.line_num + 1
        raise ValueError(f"line {line} of {str(file.path)!r} is not a row of the table: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _parquet(file: TextFile, text_column: str) -> Iterator[str]:
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(file.path, page_checksum_verification=True)
    _check_column(file, table.schema_arrow.names, text_column)
    _check_groups(table, file.path)
    for batch in table.iter_batches(batch_size=256, columns=[text_column]):
        yield from _cells(batch.column(0), file, text_column)


def _arrow(file: TextFile, text_column: str) -> Iterator[str]:
    import pyarrow

    with pyarrow.memory_map(str(file.path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        table = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        _check_column(file, table.schema.names, text_column)
        batches = (table.get_batch(place) for place in range(table.num_record_batches)) if is_file else table
        for batch in batches:
            yield from _cells(batch.column(text_column), file, text_column)


def _check_column(file: TextFile, names: list[str], text_column: str) -> None:
    if text_column not in names:
        raise ValueError(f"{str(file.path)!r} has the columns {shown(names)}, but {text_column!r} is needed")


def _cells(column: Any, file: TextFile, text_column: str) -> Iterator[str]:
    for text in column.to_pylist():
        if isinstance(text, str):
            yield text
        elif text is not None:
            raise ValueError(f"column {text_column!r} of {str(file.path)!r} holds {type(text).__name__}, not text")


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


_READERS: Mapping[str, Callable[[TextFile, str], Iterator[str]]] = {
    "text": _passages,
    "JSON lines": _json_lines,
    "JSON": _json,
    "CSV": _csv,
    "Parquet": _parquet,
    "Arrow": _arrow,
}
