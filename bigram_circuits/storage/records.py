"""JSON records and tensor files with checksums, read with strict limits.

A file may come from anywhere, and may be damaged or malicious. So sizes are checked against the size of the file before
anything is allocated, every value is checked before it is used, names in a file are never used as paths, only regular
files are opened, and every problem is a one-line `ValueError`. A checksum is a 16-byte BLAKE2b hash, in hexadecimal. It
detects damage; it is not a signature, because whoever writes a file can also write its checksum.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from bigram_circuits.storage.arrays import bytes_of

_LARGEST_JSON = 1 << 28  # bytes of a JSON file; parsed, it takes about ten times as much memory
_LARGEST_HEADER = 1 << 25  # bytes of a tensor file's header
_DEEPEST_JSON = 64  # levels of brackets
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_MOST_AXES = 32
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_FIELDS = {"dtype", "shape", "data_offsets"}  # of a tensor's entry in the header
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
CONTENT, HEADER = "content_checksum", "header_checksum"
"""Metadata keys for the hash of a file's tensors, and for the hash of its metadata and its tensors' names and shapes.

The header checksum can be verified at once; the content checksum needs the entire file.
"""


def shown(value: Any) -> str:
    """Format a value for an error message: in quotes, on one line, and shortened."""
    return _SHORT.repr(value)


def is_text(value: str) -> bool:
    """Whether a string can be encoded as UTF-8: JSON strings may contain unpaired surrogates, which cannot."""
    try:
        return value.isascii() or bool(value.encode("utf-8"))
    except UnicodeEncodeError:
        return False


def regular_size(path: str | os.PathLike[str], *, follow: bool = True) -> int:
    """Return the size of a regular file in bytes.

    Args:
        path: The file.
        follow: Whether it may be a symbolic link.

    Raises:
        FileNotFoundError: If the path does not exist.
        ValueError: If the path is not a regular file but a folder, a pipe or a device, or a link not to be followed.
    """
    try:
        status = os.stat(path, follow_symlinks=follow)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"there is no file {str(path)!r}") from error
    except ValueError as error:  # a zero byte in a path
        raise ValueError(f"{str(path)!r} cannot be the name of a file") from error
    if stat.S_ISLNK(status.st_mode):
        raise _link(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{str(path)!r} is {'a folder' if stat.S_ISDIR(status.st_mode) else 'not a regular file'}")
    return status.st_size


def check_no_link(path: str | os.PathLike[str]) -> None:
    """Raise ValueError if a path is a symbolic link; what it would lead through is not looked at."""
    if os.path.islink(path):
        raise _link(path)


def _link(path: str | os.PathLike[str]) -> ValueError:
    return ValueError(f"{str(path)!r} is a symbolic link, which is not followed: replace it by what it leads to")


@contextmanager
def opened(path: str | os.PathLike[str], *, follow: bool = True) -> Iterator[BinaryIO]:
    """Open a regular file for reading within the `with` block; arguments and errors are those of `regular_size`."""
    regular_size(path, follow=follow)  # a device may act when it is opened
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe would be waited for
    try:
        handle = os.open(path, flags | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise _link(path) from error
        raise
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError(f"{str(path)!r} is not a regular file")
        yield file


# --- JSON records ---


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text.

    Raises:
        ValueError: If it is not valid JSON, names a field twice, or is nested too deeply; the message is one line.
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
    except ValueError as error:  # integers with thousands of digits also raise one
        raise ValueError(_one_line(error)) from error


def _depth(text: str) -> int:
    """Return the nesting depth of the brackets outside strings."""
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
    """Return a record of JSON values with its checksum added under `checksum`."""
    plain = json.loads(json.dumps(record))
    return {**plain, "checksum": _of_json(plain)}


def unsealed(record: Any) -> dict[str, Any]:
    """Verify a record's checksum, and return the record without it.

    Raises:
        ValueError: If it is not a JSON object, has no checksum, or its checksum does not match its contents.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it holds a {type(record).__name__}, not a record with names")
    rest = {name: value for name, value in record.items() if name != "checksum"}
    if "checksum" not in record:
        raise ValueError("it has no checksum")
    if record["checksum"] != _of_json(rest):
        raise ValueError("it is damaged: its checksum does not match its contents")
    return rest


def read_record(path: str | os.PathLike[str], complaint: str, *, follow: bool = True) -> dict[str, Any]:
    """Read the record in a JSON file, and verify its checksum.

    Args:
        path: The file.
        complaint: Follows the path in the error message, for example `is not a result that can be read`.
        follow: Whether the file may be a symbolic link.

    Returns:
        The record without its checksum.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it does not hold a valid record, or is too large.
    """
    size = regular_size(path, follow=follow)
    try:
        if size > _LARGEST_JSON:
            raise ValueError(f"it has {size:,} bytes, more than the {_LARGEST_JSON:,} that are read")
        with opened(path, follow=follow) as file:
            return unsealed(parse_record(file.read(_LARGEST_JSON + 1)))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} {complaint}: {error}") from error


def checksum_of(path: str | os.PathLike[str], *, follow: bool = True) -> str:
    """Return the checksum in a JSON file that was read and verified before."""
    with opened(path, follow=follow) as file:
        return str(parse_json(file.read(_LARGEST_JSON + 1))["checksum"])


def parse_record(text: str | bytes) -> Any:
    """Parse JSON text all of whose strings must be encodable as UTF-8. Raises ValueError like `parse_json`."""
    record = parse_json(text)
    escaped = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if _SURROGATE.search(escaped) and not is_text(json.dumps(record, ensure_ascii=False)):
        raise ValueError("it contains an unpaired surrogate")
    return record


def _of_json(record: Any) -> str:
    try:
        text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _one_line(error: Exception) -> str:
    """Strip an error message of line breaks and control characters, which names in a file may contain."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return " ".join(text.split())[:300] or type(error).__name__


# --- tensor files (safetensors) ---


def seal_tensors(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a tensor file with both checksums added."""
    whole = {**metadata, CONTENT: content_checksum(arrays)}
    return {**whole, HEADER: header_checksum(arrays, whole)}


def content_checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Hash all tensors (names, dtypes, shapes and elements), sorted by name."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        for data in bytes_of(array):
            digest.update(data)
    return digest.hexdigest()


def header_checksum(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Hash all metadata except this checksum itself, and the names, dtypes and shapes of the tensors."""
    kept = {name: value for name, value in metadata.items() if name != HEADER}
    return _of_json([kept, {name: [array.dtype.str, array.shape] for name, array in arrays.items()}])


def check_header(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], allowed: set[str]) -> None:
    """Check the metadata of a tensor file: only allowed keys, and a matching header checksum.

    Raises:
        ValueError: If a check fails; the message reads on after `is damaged:`.
    """
    unknown = set(metadata) - allowed - {CONTENT, HEADER}
    if unknown:
        raise ValueError(f"its header has the unknown key {shown(min(unknown))}")
    if HEADER not in metadata:
        raise ValueError("the checksum of its header is missing")
    if metadata[HEADER] != header_checksum(arrays, metadata):
        raise ValueError("the checksum of its header does not match the header")


def check_content(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Check the content checksum of a tensor file.

    Raises:
        ValueError: If it is missing or does not match; the message reads on after `is damaged:`.
    """
    if CONTENT not in metadata:
        raise ValueError("the checksum of its contents is missing")
    if metadata[CONTENT] != content_checksum(arrays):
        raise ValueError("its checksum does not match its contents")


def write_tensors(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes are a function of its contents: names, metadata and tensors are sorted.

    Raises:
        ValueError: If a tensor has a dtype that `read_tensors` does not read.
    """
    kinds = {dtype: name for name, dtype in _DTYPES.items()}
    unknown = [name for name, array in arrays.items() if array.dtype not in kinds]
    if unknown:
        raise ValueError(
            f"the tensor {shown(unknown[0])} has dtype {arrays[unknown[0]].dtype}, not one of {', '.join(_DTYPES)}"
        )
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))  # so that all tensors are aligned
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for name in order:
        array = arrays[name]
        end = begin + array.nbytes
        header[name] = {"dtype": kinds[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for data in bytes_of(arrays[name]):
                file.write(data)


def read_tensors(
    path: str | os.PathLike[str], complaint: str, *, mapped: bool = False, follow: bool = True
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Args:
        path: The file.
        complaint: Follows the path in the error message, for example `is not a subnetwork file`.
        mapped: Whether to memory-map the tensors instead of reading them.
        follow: Whether the file may be a symbolic link.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a safetensors file, or its tensors do not exactly fill the file after the header.
    """
    size = regular_size(path, follow=follow)
    try:
        start = _check_header_text(path, size)
        with safe_open(path, framework="np") as file:  # checks that offsets are consistent and fill the file
            metadata = file.metadata() or {}
            kinds = {name: _kind(name, file.get_slice(name)) for name in file.offset_keys()}
        arrays = _arrays(kinds, _data(path, start, size, mapped=mapped), start)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{str(path)!r} {complaint}: {_one_line(error)}") from error
    return arrays, metadata


def count_tensors(path: str | os.PathLike[str]) -> int:
    """Count the tensors in a safetensors file. Raises ValueError if its header cannot be read."""
    try:
        _check_header_text(path, regular_size(path))
        with safe_open(path, framework="np") as file:
            return len(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r}: {_one_line(error)}") from error


def _check_header_text(path: str | os.PathLike[str], size: int) -> int:
    """Check what `safe_open` does not: the size of the header, repeated names, and unknown fields.

    Returns:
        The offset at which the tensors begin.
    """
    with opened(path) as file:
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
    """Return the dtype and shape of a tensor without reading it."""
    dtype, shape = tensor.get_dtype(), tensor.get_shape()
    if dtype not in _DTYPES:
        raise ValueError(f"the tensor {shown(name)} has dtype {shown(dtype)}, not one of {', '.join(_DTYPES)}")
    if not is_shape(shape):
        raise ValueError(f"the tensor {shown(name)} has an invalid shape: {shown(shape)}")
    return _DTYPES[dtype], tuple(shape)


def _data(path: str | os.PathLike[str], start: int, size: int, *, mapped: bool) -> np.ndarray:
    """Read or memory-map the bytes from `start` on."""
    if mapped and size > start:
        return np.memmap(path, dtype=np.uint8, mode="c", offset=start, shape=(size - start,))
    data = np.fromfile(path, dtype=np.uint8, count=size - start, offset=start)
    if len(data) != size - start:
        raise ValueError("it was truncated while it was read")
    return data


def _arrays(
    kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]], data: np.ndarray, start: int
) -> dict[str, np.ndarray]:
    """Return the tensors, which are stored consecutively, as views of the bytes where alignment allows."""
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
    """Whether a JSON value is a tensor shape: a list of non-negative integers, within limits on number and size."""
    return (
        isinstance(value, list)
        and len(value) <= _MOST_AXES
        and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )
