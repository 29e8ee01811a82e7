"""Freed memory goes back to the system if the command line was asked to use little, and only then."""

import argparse
import os
import subprocess
import sys

import pytest

from bigram_circuits.cli import program

FREED = """
import numpy as np
from pathlib import Path
from bigram_circuits.cli.allocator import return_freed_memory
{call}
def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
np.ones(1 << 21, np.int8)  # when this is freed, glibc begins to keep blocks of its size
blocks = [np.ones(1 << 21, np.int8) for _ in range(40)]
before = held()
del blocks[::2]
print(before - held())
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}), reason="another C library")
def test_memory_between_blocks_goes_back_to_the_system():
    def freed(call):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        script = FREED.format(call=call)
        return int(subprocess.check_output([sys.executable, "-c", script], env=environment, text=True))

    assert freed("return_freed_memory()") > 15 * (1 << 21)
    assert freed("") < 5 * (1 << 21)  # so the test above can fail; importing the package alone changes nothing


@pytest.mark.parametrize(("asked", "times"), [(True, 1), (None, 0)])
def test_the_command_line_asks_for_it_with_low_memory(monkeypatch, asked, times):
    calls = []
    command = argparse.Namespace(
        command=lambda _: {"exit_code": 0}, command_name="find", json=False, log_level=None, quiet=True,
        low_memory=asked, traceback=False,
    )  # fmt: skip
    monkeypatch.setattr(program, "parse", lambda _: command)
    monkeypatch.setattr(program, "return_freed_memory", lambda: calls.append(1))
    assert program.main([]) == 0
    assert len(calls) == times
