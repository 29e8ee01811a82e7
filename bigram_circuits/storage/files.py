"""Atomic writes of files and folders, and JSON with a checksum that detects damage."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bigram_circuits.storage.records import check_no_link, read_record, sealed

_LOGGER = logging.getLogger("bigram_circuits")
_LEFTOVER = re.compile(r"\..+\.(json|jsonl|safetensors|html)\.[a-z0-9_]{8}")  # temporary names given by `whole_file`
_GUARDS: dict[Path, Callable[[], None]] = {}  # of folders, by their resolved paths


@contextmanager
def guarded(folder: Path, check: Callable[[], None]) -> Iterator[None]:
    """Within the `with` block, `check` is called before every write below a (resolved) folder, and may raise."""
    _GUARDS[folder] = check
    try:
        yield
    finally:
        del _GUARDS[folder]


def check_guards(path: str | os.PathLike[str]) -> None:
    """Call the checks of all guarded folders that a path lies in; to be called just before something is written."""
    if _GUARDS:
        place = Path(path).absolute()
        place = place.parent.resolve() / place.name
        for folder, check in [*_GUARDS.items()]:
            if folder == place or folder in place.parents:
                check()


@contextmanager
def whole_file(path: str | os.PathLike[str], *, guard: bool = True) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, renamed to `path` on success and removed on an exception.

    File and folder are synced to disk before the `with` block returns, so a later power loss does no harm. A symbolic
    link at `path` is replaced; what it leads to is left alone.

    Args:
        path: The file.
        guard: Whether to ask the guards of the folders that it lies in (`guarded`).

    Raises:
        OSError: If the file cannot be written; the message names the final path.
    """
    path = Path(path)
    if guard:
        check_guards(path)
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
            if guard:
                check_guards(path)
            os.replace(temporary, path)
            sync_folder(path.parent)
        _LOGGER.debug("wrote %r", str(path))
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def cannot_write(path: Path, temporary: str | None = None) -> Iterator[None]:
    """Within the `with` block, re-raise file system errors as "cannot write `path`", with the reason."""
    try:
        yield
    except OSError as error:
        if temporary is not None and error.filename not in (None, temporary):
            raise  # about another file
        raise type(error)(error.errno, f"cannot write {str(path)!r}: {error.strerror}") from error
    except SafetensorError as error:  # its writer wraps the error of a full disk
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        reason = os.strerror(int(number[1]))
        raise OSError(int(number[1]), f"cannot write {str(path)!r}: {reason}") from error


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, where the file system supports it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_leftover(path: Path) -> bool:
    """Whether a file is a temporary file left behind by a process killed within `whole_file`."""
    return _LEFTOVER.fullmatch(path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Remove such temporary files from a folder, if it exists. Call this only while no other process writes there."""
    if folder.is_dir() and not folder.is_symlink():
        for path in folder.iterdir():
            if is_leftover(path):
                path.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | os.PathLike[str], *, replace: bool = True) -> Iterator[Path]:
    """Write a folder atomically: yield a temporary one, renamed to `path` on success and removed on an exception.

    Args:
        path: The folder.
        replace: Whether to replace an existing folder; if False, `path` must not exist or be an empty folder.

    Raises:
        ValueError: If `replace` is False and `path` is anything but an empty folder, or the folder is a symbolic link.
        OSError: If the folder cannot be written.
    """
    path = Path(path)
    check_guards(path)
    if not replace:
        check_new_folder(path)
    recover_folder(path)
    fresh, old = _beside(path)
    try:
        with cannot_write(path):
            fresh.mkdir(parents=True)
        yield fresh
        check_guards(path)
        if path.exists() and replace:
            path.rename(old)
        elif path.exists():
            path.rmdir()  # fails if it is no longer empty
        fresh.rename(path)
        sync_folder(path.parent)
    finally:
        recover_folder(path)


def check_new_folder(folder: str | os.PathLike[str]) -> None:
    """Raise ValueError unless the path does not exist or is an empty folder."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file, but a folder is needed")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty: choose another folder")


def recover_folder(path: Path) -> None:
    """Finish or undo a `whole_folder` whose process was killed.

    Raises:
        ValueError: If the folder, or what was left beside it, is a symbolic link.
    """
    fresh, old = _beside(path)
    for folder in (path, fresh, old):
        check_no_link(folder)
    if old.exists() and not path.exists():  # killed between the two renames: the new folder is complete
        (fresh if fresh.exists() else old).rename(path)
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)


def _beside(path: Path) -> tuple[Path, Path]:
    path = path.absolute()  # Path(".").name is empty
    return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")


def checked_json(record: Mapping[str, Any]) -> str:
    """Serialise a record to JSON text, with a checksum of its contents as the last entry."""
    return json.dumps(sealed(record), indent=2) + "\n"


def read_checked_json(path: Path, remedy: str = "", *, follow: bool = False) -> dict[str, Any]:
    """Read a JSON record and verify its checksum.

    Args:
        path: The file.
        remedy: What to do if the file is damaged; appended to the error message.
        follow: Whether the file may be a symbolic link.

    Returns:
        The record without its checksum.

    Raises:
        ValueError: If the file is not a JSON object, has no checksum, or its contents do not match the checksum.
    """
    try:
        return read_record(path, "is damaged", follow=follow)
    except ValueError as error:
        raise ValueError(f"{error}{remedy and f'; {remedy}'}") from error


@contextmanager
def damaged(path: Path, remedy: str) -> Iterator[None]:
    """Within the `with` block, re-raise a ValueError as "`path` is damaged", with the reason and the remedy."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}{remedy and f'; {remedy}'}") from error


def write_text(path: str | os.PathLike[str], text: str, *, guard: bool = True) -> None:
    """Write a UTF-8 text file atomically; `guard` as for `whole_file`."""
    with whole_file(path, guard=guard) as temporary:
        temporary.write_text(text, encoding="utf-8")


def default_mode(mode: int) -> int:
    """Apply the user's umask to a mode; temporary files and folders are created with stricter permissions."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask
