"""What tests do with folders: list them, damage their files, and let another process hold their lock."""

import random
import subprocess
import sys
from contextlib import contextmanager

from bigram_circuits.storage.locks import LOCK, is_lock


def names_in(folder):
    """What is in a folder, but for the lock file that stays."""
    return sorted(path.name for path in folder.iterdir() if path.name == LOCK or not is_lock(path))


def flips(path, count=25):
    """Write the file with one bit flipped, many times over, in turn."""
    data, rng = path.read_bytes(), random.Random(0)
    for place in rng.sample(range(len(data)), min(count, len(data))):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(7)]) + data[place + 1 :])
        yield place
    path.write_bytes(data)


HOLDS = """
import errno, fcntl, sys
from bigram_circuits.storage.locks import FolderInUseError, lock_folder

def no_flock(handle, operation):
    raise OSError(errno.ENOLCK, "No locks available")

if sys.argv[2] == "soft":
    fcntl.flock = no_flock
try:
    with lock_folder(sys.argv[1]):
        print("mine", flush=True)
        sys.stdin.read()
except FolderInUseError as error:
    print(error, flush=True)
"""


def start_holder(folder, kind="hard"):
    """Start a process that takes a folder's lock and holds it; `soft` where there is no flock."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", HOLDS, str(folder), kind], **pipes)


@contextmanager
def held_folder(folder, kind="hard"):
    """Within the block, another process holds a folder; gives the process."""
    process = start_holder(folder, kind)
    assert process.stdout.readline() == "mine\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
