"""One writer for a folder: `lock.json` in it says who.

The kernel decides. `flock` is taken by exactly one of several processes that ask at the same instant, holds between the
machines of a network file system where that supports it, and is let go when its process ends, however it ends: the file
that a killed process leaves stops nobody. (A file made with O_EXCL alone, as widely used, would stay, and two processes
that both find it stale can both take it over.) Where the kernel cannot tell, since the lock is that of another machine,
or the file system has no locks, its heartbeat does: the holder touches the file every few seconds.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bigram_circuits.storage.files import cannot_write

LOCK = "lock.json"
"""Name of the file."""
_HEARTBEAT = 5.0  # seconds between two beats
_PATIENCE = 20.0  # seconds without one after which a holder elsewhere counts as dead
_SETTLED = 1.0  # seconds after which all who found the folder free at the same instant have written who they are
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
_held: set[tuple[int, int, Path]] = set()  # process, thread and file: who holds a lock may take it again


class FolderInUseError(OSError):
    """Another process is writing the folder."""


@contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Within the block, this thread alone writes the folder, which is made if needed. Blocks may be nested.

    Raises:
        FolderInUseError: If another process, or another thread, is writing it; the message says which.
        OSError: If the folder cannot be written.
    """
    path = Path(folder).resolve() / LOCK
    key = (os.getpid(), threading.get_ident(), path)
    if key in _held:
        yield
        return
    handle = _take(path, str(folder))
    _held.add(key)
    released = threading.Event()
    heart = threading.Thread(target=_beat, args=(handle, released), daemon=True)
    heart.start()
    try:
        yield
    finally:
        released.set()
        heart.join()
        _held.discard(key)
        if _is_at(handle, path):
            path.unlink(missing_ok=True)
        os.close(handle)


def holder(folder: str | os.PathLike[str]) -> str | None:
    """Who is writing a folder, or was when it was killed, in words; None if nobody."""
    try:
        handle = os.open(Path(folder) / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        return _who(_record(handle))
    finally:
        os.close(handle)


def _take(path: Path, folder: str) -> int:
    """Open the file and get its lock; the caller closes it."""
    while True:
        with cannot_write(Path(folder) / LOCK):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _claim(handle, path, folder)
            if _is_at(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder removed it just then: there is a new one, or none


def _claim(handle: int, path: Path, folder: str) -> None:
    flocked = _flock(handle)
    before = _record(handle)
    if flocked is False and not before:  # its holder is about to write who it is
        time.sleep(0.2)
        before = _record(handle)
    if flocked is False or (before and not (flocked and _same_kernel(before)) and _is_beating(path, before)):
        raise FolderInUseError(
            errno.EWOULDBLOCK,
            f"{folder!r} is being written by {_who(before)}: wait until it is done, or choose another folder",
        )
    if before:
        print(f"note: {folder!r} was being written by {_who(before)}, which is gone; going on", file=sys.stderr)
    mine = json.dumps(_mine(), indent=2).encode() + b"\n"
    with cannot_write(Path(folder) / LOCK):
        os.pwrite(handle, mine, 0)
        os.ftruncate(handle, len(mine))
    if flocked is None:  # of several that get here at the same instant, the last to write goes on
        time.sleep(_SETTLED)
        if os.pread(handle, len(mine) + 1, 0) != mine:
            raise FolderInUseError(errno.EWOULDBLOCK, f"{folder!r} is being written by {_who(_record(handle))}")


def _flock(handle: int) -> bool | None:
    """Whether the lock was got; None where there are no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except ImportError:
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _is_beating(path: Path, record: dict[str, Any]) -> bool:
    """Whether the holder touches the file; it is given some time to."""
    print(f"note: is {_who(record)} still writing here? Watching for {_PATIENCE:.0f} s", file=sys.stderr)
    seen = _touched(path)
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, _PATIENCE / 4))
        if _touched(path) != seen:
            return True
    return False


def _touched(path: Path) -> int:
    with path.open("rb") as file:  # opening it is what makes a network file system ask again
        return os.fstat(file.fileno()).st_mtime_ns


def _beat(handle: int, released: threading.Event) -> None:
    while not released.wait(_HEARTBEAT):
        with suppress(OSError):
            os.utime(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), there)


def _record(handle: int) -> dict[str, Any]:
    """What the file says; empty if nothing yet."""
    try:
        record = json.loads(os.pread(handle, 1 << 16, 0))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _mine() -> dict[str, Any]:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else ""
    return {
        "host": platform.node(),
        "boot": _boot(),
        "process": os.getpid(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command[:1000],
    }


def _boot() -> str:
    """What tells this boot of this machine from all others; containers on a machine share its kernel and its locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _same_kernel(record: dict[str, Any]) -> bool:
    return record.get("boot") == _boot()


def _who(record: dict[str, Any]) -> str:
    if not record:
        return "another process"
    command = f" ({record['command']})" if record.get("command") else ""
    return f"process {record.get('process')} on {record.get('host')!r} since {record.get('started')}{command}"
