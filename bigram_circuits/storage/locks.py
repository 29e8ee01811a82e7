"""One writer per folder: the file `.lock` in it is locked, and `lock.json` says which process holds the lock.

The lock is filelock's `flock`. The kernel grants it to one process at a time and releases it when that process ends,
however it ends, so a folder whose writer was killed stays usable. `.lock` is empty and is never removed, because
removing a lock file could let two processes in. `lock.json` is removed when the writer is done; a leftover one names
the process that was killed.

Where the file system has no `flock`, filelock's `SoftFileLock` is used: the existence of `.lock.soft` is the lock. A
killed process leaves that file behind. The next process takes it over if the one it names ran on this machine and is
gone. Processes on other machines cannot be checked: then the folder counts as in use, and the error says which file to
remove if that process is known to be gone.

Someone may remove these files while a process works, or a file system may let a second process in. So before every
write below the folder (`files.guarded`), the holder looks whether `lock.json` still names it, and stops if it names
another. All of these files are opened without following symbolic links.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import secrets
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from bigram_circuits.progress import note
from bigram_circuits.storage.files import cannot_write, guarded, write_text
from bigram_circuits.storage.records import check_no_link, opened, parse_json
from bigram_circuits.storage.terminal import printable

LOCK = "lock.json"
"""Name of the file that describes the process holding the lock."""
_FLOCK, _SOFT = ".lock", ".lock.soft"
_PATIENCE = 0.2  # seconds: long enough for a process that has just taken the lock to write `lock.json`
_NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
_LARGEST = 1 << 16  # at most this many bytes of `lock.json` are read
_DESCRIBED = ("process", "host", "started", "command")


class FolderInUseError(OSError):
    """Another process is writing the folder."""


@contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the folder's lock within the `with` block; creates the folder if needed. Re-entrant within a thread.

    Raises:
        FolderInUseError: If another process or thread is writing the folder, or, before any write below the folder,
            if another process has taken it over; the message says which process.
        ValueError: If a file of the lock is a symbolic link.
        OSError: If the folder cannot be written, or was removed meanwhile.
    """
    place = Path(folder).resolve()
    with cannot_write(Path(folder) / LOCK):
        place.mkdir(parents=True, exist_ok=True)
        for name in (LOCK, _FLOCK, _SOFT):
            check_no_link(place / name)
        lock = _acquire(place, str(folder))
    try:
        if lock.lock_counter > 1:  # nested
            yield
        else:
            with _signed(place, str(folder), Path(lock.lock_file)):
                yield
    finally:
        lock.release()


def holder(folder: str | os.PathLike[str]) -> str | None:
    """Describe the process that holds, or was killed while holding, a folder's lock; None if there is none."""
    record = _read(Path(folder))
    return None if record is None else _describe(record)


def is_lock(path: Path) -> bool:
    """Whether a file in a folder belongs to its lock."""
    return path.name == LOCK or path.name.startswith(_FLOCK)


def _acquire(place: Path, shown: str) -> BaseFileLock:
    """Acquire the lock; as a singleton it is re-entrant within a thread."""
    try:
        try:
            lock = FileLock(place / _FLOCK, timeout=_PATIENCE, is_singleton=True, fallback_to_soft=False)
            lock.acquire()
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            lock = SoftFileLock(place / _SOFT, timeout=_PATIENCE, is_singleton=True)
            lock.acquire()
    except Timeout as timeout:
        remedy = "wait until it is done, or choose another folder"
        if Path(timeout.lock_file).name == _SOFT:
            remedy += f"; if that process is gone, remove {timeout.lock_file!r}"
        who = _describe(_read(place) or {})
        raise FolderInUseError(errno.EWOULDBLOCK, f"{shown!r} is being written by {who}: {remedy}") from timeout
    return lock


@contextmanager
def _signed(place: Path, shown: str, lock_file: Path) -> Iterator[None]:
    """Within the `with` block, `lock.json` describes this process, and every write is preceded by a look at it.

    Logs a note if a dead process's lock was taken.
    """
    before = _read(place)
    if before:
        note(f"{shown!r} was being written by {_describe(before)}, which has ended; continuing", logging.INFO)
    mine, locked = _this_process(), _identity(lock_file)

    def sign() -> None:
        write_text(place / LOCK, json.dumps(mine, indent=2) + "\n", guard=False)

    def check() -> None:
        found = _read(place)
        if found == mine:
            return
        if not place.is_dir():
            raise OSError(
                errno.ENOENT, f"{shown!r} was removed while this process was writing it: nothing more is written"
            )
        if not found and _identity(lock_file) == locked:  # only `lock.json` was removed or damaged
            sign()
            return
        who = _describe(found or {})
        raise FolderInUseError(
            errno.EWOULDBLOCK, f"{shown!r} was taken over by {who}: this process stops, and has not written since"
        )

    sign()
    try:
        with guarded(place, check):
            yield
    finally:
        if _read(place) == mine:
            (place / LOCK).unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file, without following a link; None if there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _read(place: Path) -> dict[str, Any] | None:
    """Read `lock.json`: an empty dict if it is invalid, None if it does not exist."""
    try:
        with opened(place / LOCK, follow=False) as file:
            record = parse_json(file.read(_LARGEST))
    except OSError:
        return None
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _this_process() -> dict[str, Any]:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else ""
    return {
        "host": platform.node(),
        "process": os.getpid(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command[:1000],
        "token": secrets.token_hex(8),
    }


def _describe(record: dict[str, Any]) -> str:
    """Describe a process on one line; what is in the record may come from anywhere."""
    if not record:
        return "another process"
    process, host, started, command = (str(record.get(name) or "")[:1000] for name in _DESCRIBED)
    words = f"process {process} on {host!r} since {started}" + (f" ({command})" if command else "")
    return printable(" ".join(words.split()))
