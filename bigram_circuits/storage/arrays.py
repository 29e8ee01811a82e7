"""Arrays that are larger than memory: built in a temporary file, and read without keeping their pages."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

_BYTES_AT_ONCE = 1 << 24


class GrowingArray:
    """A growing one-dimensional array, which moves to an unnamed temporary file once it is large."""

    def __init__(self, dtype: Any, limit: int) -> None:
        """Begin with no elements; at most `limit` bytes of them are kept in memory."""
        self._dtype, self._limit = np.dtype(dtype), limit
        self._parts: list[np.ndarray] = []
        self._waiting = 0  # bytes in `_parts`
        self._file: Any = None
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, part: np.ndarray) -> None:
        """Add elements at the end. The array is kept until it is written, so it must not change.

        Raises:
            OSError: If the temporary file cannot be written.
        """
        part = part.astype(self._dtype, copy=False)
        self._parts.append(part)
        self._length += len(part)
        self._waiting += part.nbytes
        if self._waiting > self._limit:
            self._write()

    def _write(self) -> None:
        with _says_where():
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="bigram_circuits_")  # noqa: SIM115 (closed in `finished`)
            for part in self._parts:
                self._file.write(np.ascontiguousarray(part).data)
        self._parts, self._waiting = [], 0

    def finished(self) -> np.ndarray:
        """Return the array: in memory, or memory-mapped (writes to it do not reach the file). Call this once.

        Raises:
            OSError: If the temporary file cannot be written.
        """
        if self._file is None:
            return np.concatenate(self._parts) if self._parts else np.empty(0, self._dtype)
        self._write()
        with self._file as file:  # the memory map outlives the closed file
            with _says_where():
                file.flush()
            return np.memmap(file, dtype=self._dtype, mode="c", shape=(self._length,))


@contextmanager
def _says_where() -> Iterator[None]:
    """Within the `with` block, errors of the file system name the folder of temporary files."""
    try:
        yield
    except OSError as error:
        folder = tempfile.gettempdir()
        raise type(error)(
            error.errno, f"cannot write a temporary file in {folder!r} (TMPDIR names the folder): {error.strerror}"
        ) from error


def bytes_of(array: np.ndarray) -> Iterator[memoryview]:
    """Yield the bytes of an array in pieces; if it is memory-mapped, their pages are released afterwards."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, len(data), _BYTES_AT_ONCE):
        yield data[start : start + _BYTES_AT_ONCE].data
        release_pages(array)


def mapped_from(array: np.ndarray) -> np.memmap | None:
    """Return the memory-mapped array that this array is or is a view of, if there is one."""
    base: Any = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap) and isinstance(base.base, mmap.mmap):
            return base
        base = base.base
    return None


def release_pages(array: np.ndarray) -> None:
    """Release the pages of a memory-mapped array (or of a view of one); does nothing for other arrays.

    The system would reclaim these pages under memory pressure anyway, but until then they count towards this process.
    """
    whole = mapped_from(array)
    mapping: Any = getattr(whole, "_mmap", None)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)
