"""The table of contents: every public name has one home, and importing the package loads nothing heavy."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import bigram_circuits as bc

PACKAGE = Path(bc.__file__).parent


def test_imports_go_down_only():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stdout


def test_importing_the_package_loads_nothing_heavy():
    started = time.monotonic()
    code = "import sys, bigram_circuits; print('torch' in sys.modules, 'transformer_lens' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
    assert time.monotonic() - started < 30  # generous: a crowded machine; what counts is that nothing was loaded


def test_every_name_is_there_and_is_where_the_stub_says():
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    homes = {alias.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(homes) == set(bc.__all__)
    for name in homes:
        assert getattr(bc, name) is not None


def test_a_wrong_name_is_an_attribute_error():
    assert not hasattr(bc, "no_such_name")
