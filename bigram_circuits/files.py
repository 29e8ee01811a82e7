"""Files that appear whole or not at all."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a normal exit it takes that name, on an exception it is removed.

    Raises:
        OSError: If the folder cannot be written, with the final path in the message.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write {str(path)!r}: {error.strerror}") from error
    os.close(handle)
    try:
        yield Path(temporary)
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, default_mode(0o666))
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def release_pages(array: np.ndarray) -> None:
    """Let go of the memory through which a memory-mapped array (or a part of one) was read; no-op for others.

    The pages belong to the file and are given up under pressure anyway, but until then they count as the process's.
    """
    while not isinstance(array, np.memmap) and isinstance(array.base, np.ndarray):
        array = array.base
    mapping = getattr(array, "_mmap", None)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file whole."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def default_mode(mode: int) -> int:
    """What the user's umask leaves of a mode: temporary files and folders are born more private than that."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask
