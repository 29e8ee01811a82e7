"""Files that prove what they hold: JSON records and tensor files with a checksum, read within bounds.

A file may come from anywhere, and may be damaged or made to do harm. So sizes are checked against the file's own before
anything is allocated, every value is checked before it is used, names in a file are never used as paths, and whatever
is wrong is one `ValueError` in one line. A checksum is a BLAKE2b hash of 16 bytes, in hexadecimal. It tells damage; it
is no signature, for who writes a file can also write its checksum.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

_LARGEST_JSON = 1 << 28  # bytes of a JSON file: parsed, it takes about ten times as much memory
_LARGEST_HEADER = 1 << 25  # bytes of a tensor file's header
_HASHED_AT_ONCE = 1 << 24
_DEEPEST_JSON = 64  # levels of brackets
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_MOST_AXES = 32
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_FIELDS = {"dtype", "shape", "data_offsets"}  # of a tensor in a header
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
CONTENT, HEADER = "content_checksum", "header_checksum"
"""Keys of a tensor file's metadata: hashes of its tensors, and of all its metadata with the tensors' names and shapes.

The header's can be checked at once; the content's needs the whole file.
"""


def shown(value: Any) -> str:
    """What came, for an error: in quotes, on one line, and cut short."""
    return _SHORT.repr(value)


def is_text(value: str) -> bool:
    """Whether a string can be written: JSON can hold half of a surrogate pair, which is no character."""
    try:
        return value.isascii() or bool(value.encode("utf-8"))
    except UnicodeEncodeError:
        return False


def regular_size(path: str | os.PathLike[str]) -> int:
    """The size of a file in bytes.

    Raises:
        FileNotFoundError: If there is nothing at this path.
        ValueError: If there is something else than a file: a folder, a pipe, a device.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"there is no file {str(path)!r}") from error
    except ValueError as error:  # a zero byte in a path
        raise ValueError(f"{str(path)!r} cannot be the name of a file") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{str(path)!r} is {'a folder' if stat.S_ISDIR(status.st_mode) else 'not a regular file'}")
    return status.st_size


# --- JSON records ---


def parse_json(text: str | bytes) -> Any:
    """The values in a JSON text.

    Raises:
        ValueError: In one line, if it is no JSON, names a field twice, or is nested too deeply.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        if _depth(text) > _DEEPEST_JSON:
            raise ValueError(f"it is nested too deeply: in more than {_DEEPEST_JSON} levels")
        return json.loads(text, object_pairs_hook=_without_repeats)
    except (RecursionError, MemoryError) as error:
        raise ValueError("it is nested too deeply, or too large") from error
    except UnicodeError as error:
        raise ValueError("it is not UTF-8 text") from error
    except ValueError as error:  # numbers of thousands of digits also give one
        raise ValueError(_one_line(error)) from error


def _depth(text: str) -> int:
    """How deep the brackets outside of strings go."""
    plain = np.frombuffer(_STRING.sub("", text).encode("ascii", "replace"), np.uint8)
    opened, closed = (plain == ord("[")) | (plain == ord("{")), (plain == ord("]")) | (plain == ord("}"))
    return int(np.cumsum(opened.astype(np.int8) - closed.astype(np.int8), dtype=np.int64).max(initial=0))


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {shown(next(name for name in names if names.count(name) > 1))} twice")
    return found


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of JSON values with its checksum, under `checksum`."""
    plain = json.loads(json.dumps(record))
    return {**plain, "checksum": _of_json(plain)}


def unsealed(record: Any) -> dict[str, Any]:
    """A record without its checksum.

    Raises:
        ValueError: If it is no record, or has a checksum that is not that of the rest. One without is taken as it is.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it holds a {type(record).__name__}, not a record with names")
    rest = {name: value for name, value in record.items() if name != "checksum"}
    if "checksum" in record and record["checksum"] != _of_json(rest):
        raise ValueError("it is damaged: its checksum is not that of what it holds")
    return rest


def read_record(path: str | os.PathLike[str], complaint: str) -> dict[str, Any]:
    """The record in a JSON file, its checksum verified if it has one.

    Args:
        path: The file.
        complaint: What to say of a file that is wrong, for example `is not a result that can be read`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no such record, or is too large.
    """
    size = regular_size(path)
    try:
        if size > _LARGEST_JSON:
            raise ValueError(f"it has {size:,} bytes, more than the {_LARGEST_JSON:,} that are read")
        text = Path(path).read_bytes()
        record = unsealed(parse_json(text))
        if _SURROGATE.search(text) and not is_text(json.dumps(record, ensure_ascii=False)):
            raise ValueError("it holds half of a surrogate pair: no character")
        return record
    except ValueError as error:
        raise ValueError(f"{str(path)!r} {complaint}: {error}") from error


def _of_json(record: Any) -> str:
    try:
        text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _one_line(error: Exception) -> str:
    """The words of an error without line breaks and control characters, which a name in a file may hold."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return " ".join(text.split())[:300] or type(error).__name__


# --- tensor files (safetensors) ---


def seal_tensors(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata for a tensor file, with both checksums."""
    whole = {**metadata, CONTENT: content_checksum(arrays)}
    return {**whole, HEADER: header_checksum(arrays, whole)}


def content_checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Hash of all tensors: names, types, shapes and elements, in the order of the names."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        data = array.reshape(-1).view(np.uint8)
        for start in range(0, len(data), _HASHED_AT_ONCE):
            digest.update(data[start : start + _HASHED_AT_ONCE].data)
    return digest.hexdigest()


def header_checksum(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Hash of all metadata but this checksum itself, and of the names, types and shapes of the tensors."""
    kept = {name: value for name, value in metadata.items() if name != HEADER}
    return _of_json([kept, {name: [array.dtype.str, array.shape] for name, array in arrays.items()}])


def check_header(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], allowed: set[str]) -> None:
    """Check the metadata of a tensor file: no names but those allowed, and its header checksum, if it has one.

    Raises:
        ValueError: In words that follow `is damaged:`.
    """
    unknown = set(metadata) - allowed - {CONTENT, HEADER}
    if unknown:
        raise ValueError(f"its header holds {shown(min(unknown))}, which is not known")
    if HEADER in metadata and metadata[HEADER] != header_checksum(arrays, metadata):
        raise ValueError("the checksum of its header is not that of what it holds")
    if CONTENT in metadata and HEADER not in metadata:
        raise ValueError("its header has lost its checksum")


def check_content(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Check the content checksum of a tensor file, if it has one.

    Raises:
        ValueError: In words that follow `is damaged:`.
    """
    if CONTENT in metadata and metadata[CONTENT] != content_checksum(arrays):
        raise ValueError("its checksum is not that of what it holds")


def read_tensors(
    path: str | os.PathLike[str], complaint: str, *, mapped: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Args:
        path: The file.
        complaint: What to say of a file that is wrong, for example `is not a subnetwork file`.
        mapped: Leave the tensors in the file, and read them from there when they are looked at.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file, or its tensors are not exactly what follows its header.
    """
    size = regular_size(path)
    try:
        start = _check_header_text(path, size)
        with safe_open(path, framework="np") as file:  # names, types, shapes and places fit together and fill the file
            metadata = file.metadata() or {}
            kinds = {name: _kind(name, file.get_slice(name)) for name in file.offset_keys()}
        arrays = _arrays(kinds, _data(path, start, size, mapped=mapped), start)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{str(path)!r} {complaint}: {_one_line(error)}") from error
    return arrays, metadata


def count_tensors(path: str | os.PathLike[str]) -> int:
    """How many tensors a safetensors file names. Raises ValueError if its header cannot be read."""
    try:
        _check_header_text(path, regular_size(path))
        with safe_open(path, framework="np") as file:
            return len(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r}: {_one_line(error)}") from error


def _check_header_text(path: str | os.PathLike[str], size: int) -> int:
    """Check what `safe_open` does not: a header within bounds, nothing named twice, no unknown field.

    Returns:
        Where the tensors begin.
    """
    with Path(path).open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > min(size, _LARGEST_HEADER):
            raise ValueError(
                f"its header would have {start - 8:,} bytes, but the file has {size:,}, "
                f"and no header over {_LARGEST_HEADER:,} is read"
            )
        header = parse_json(file.read(start - 8))
    if not isinstance(header, dict):
        raise ValueError(f"its header is a {type(header).__name__}, not a record with names")
    for name, value in header.items():
        if name != "__metadata__" and (not isinstance(value, dict) or set(value) != _FIELDS):
            raise ValueError(
                f"the tensor {shown(name)} should have a dtype, a shape and data_offsets, not {shown(value)}"
            )
    return start


def _kind(name: str, tensor: Any) -> tuple[np.dtype, tuple[int, ...]]:
    """Type and shape of a tensor that has not been read."""
    dtype, shape = tensor.get_dtype(), tensor.get_shape()
    if dtype not in _DTYPES:
        raise ValueError(f"the tensor {shown(name)} has dtype {shown(dtype)}, not one of {', '.join(_DTYPES)}")
    if not is_shape(shape):
        raise ValueError(f"the tensor {shown(name)} has a shape that is none: {shown(shape)}")
    return _DTYPES[dtype], tuple(shape)


def _data(path: str | os.PathLike[str], start: int, size: int, *, mapped: bool) -> np.ndarray:
    """The bytes from `start` on, read or mapped."""
    if mapped and size > start:
        return np.memmap(path, dtype=np.uint8, mode="c", offset=start, shape=(size - start,))
    data = np.fromfile(path, dtype=np.uint8, count=size - start, offset=start)
    if len(data) != size - start:
        raise ValueError("it became shorter while it was read")
    return data


def _arrays(
    kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]], data: np.ndarray, start: int
) -> dict[str, np.ndarray]:
    """The tensors, which lie one after another, as views of the bytes where these are aligned."""
    arrays, begin = {}, 0
    for name, (dtype, shape) in kinds.items():
        end = begin + dtype.itemsize * math.prod(shape)
        part = data[begin:end]
        if (start + begin) % dtype.itemsize:
            part = part.copy()
        if dtype == np.bool_ and part.size and part.max() > 1:
            raise ValueError(f"the tensor {shown(name)} holds values other than 0 and 1")
        arrays[name] = np.asarray(part.view(dtype).reshape(shape))
        begin = end
    return arrays


def is_shape(value: Any) -> bool:
    """Whether a JSON value is a shape: whole numbers from 0, and not absurdly many or large ones."""
    return (
        isinstance(value, list)
        and len(value) <= _MOST_AXES
        and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )
