"""Files and folders that appear whole or not at all, and JSON that notices damage."""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from bigram_circuits.storage.records import read_record, sealed

_LEFTOVER = re.compile(r"\..+\.(json|jsonl|safetensors|html)\.[a-z0-9_]{8}")  # as `whole_file` names them


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a normal exit it takes that name, on an exception it is removed.

    File and folder are on the disk when the block is left, so a power loss afterwards takes nothing away.

    Raises:
        OSError: If the file cannot be written, with the final path in the message.
    """
    path = Path(path)
    with cannot_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        with cannot_write(path, temporary):
            yield Path(temporary)
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, default_mode(0o666))
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def cannot_write(path: Path, temporary: str | None = None) -> Iterator[None]:
    """Within the block, an error of the file system says that `path` cannot be written, and why."""
    try:
        yield
    except OSError as error:
        if temporary is not None and error.filename not in (None, temporary):
            raise  # about another file
        raise type(error)(error.errno, f"cannot write {str(path)!r}: {error.strerror}") from error
    except SafetensorError as error:  # its writer has a word of its own for a full disk
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        reason = os.strerror(int(number[1]))
        raise OSError(int(number[1]), f"cannot write {str(path)!r}: {reason}") from error


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the file system can do that for a folder."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_leftover(path: Path) -> bool:
    """Whether a file is what a process that was killed within `whole_file` left."""
    return _LEFTOVER.fullmatch(path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Remove such files from a folder, if there is one. Only for who knows that nobody else is writing there."""
    if folder.is_dir():
        for path in folder.iterdir():
            if is_leftover(path):
                path.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | os.PathLike[str], *, replace: bool = True) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on a normal exit it takes that name, on an exception it is removed.

    Args:
        path: The folder.
        replace: What is there goes. False: only an empty folder may be there.

    Raises:
        ValueError: If `replace` is False and there is something else than an empty folder.
        OSError: If the folder cannot be written.
    """
    path = Path(path)
    if not replace:
        check_new_folder(path)
    recover_folder(path)
    fresh, old = _beside(path)
    try:
        with cannot_write(path):
            fresh.mkdir(parents=True)
        yield fresh
        if path.exists() and replace:
            path.rename(old)
        elif path.exists():
            path.rmdir()  # fails if anything came into it
        fresh.rename(path)
        sync_folder(path.parent)
    finally:
        recover_folder(path)


def check_new_folder(folder: str | os.PathLike[str]) -> None:
    """Raise ValueError unless there is nothing at this path, or an empty folder."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file, but a folder is needed")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty: choose another folder")


def recover_folder(path: Path) -> None:
    """Finish or undo what was going on in `whole_folder` when its process was killed."""
    fresh, old = _beside(path)
    if old.exists() and not path.exists():  # killed between the two renames: the fresh one was complete
        (fresh if fresh.exists() else old).rename(path)
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)


def _beside(path: Path) -> tuple[Path, Path]:
    path = path.absolute()  # "." has no name of its own
    return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")


def checked_json(record: Mapping[str, Any]) -> str:
    """A record as JSON text, with a checksum of its contents as the last entry."""
    return json.dumps(sealed(record), indent=2) + "\n"


def read_checked_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """The record in a file of JSON, without its checksum. A file that has none, as old ones, is taken as it is.

    Args:
        path: The file.
        remedy: What to do if it is damaged; ends the message.

    Raises:
        ValueError: If it is no JSON object, or its contents do not agree with its checksum.
    """
    try:
        return read_record(path, "is damaged")
    except ValueError as error:
        raise ValueError(f"{error}{remedy and f'; {remedy}'}") from error


@contextmanager
def damaged(path: Path, remedy: str) -> Iterator[None]:
    """Within the block, a ValueError says that the file is damaged, and what to do."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}{remedy and f'; {remedy}'}") from error


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
