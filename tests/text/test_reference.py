"""The reference corpus: docstrings of the standard library, against a plain walk through whole syntax trees."""

import ast
import gc
import sysconfig
from pathlib import Path

import pytest

from bigram_circuits.text.reference import _docstrings, _modules

EVERYWHERE = '''"""Module."""
import sys

if sys.argv:
    def one():
        "In an if."
else:
    class Two:
        """In an else."""
        async def three(self):
            "In a class."
            lambda: "no docstring"
try:
    def four(): "In a try."
except ValueError:
    def five(): "In an except."
else:
    def six(): "In its else."
finally:
    def seven(): "In a finally."
match sys.argv:
    case []:
        def eight(): "In a case."
with open("x"):
    for _ in ():
        while True:
            def nine(): "In a with, a for and a while."
'''


def walked(path: Path) -> str:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))


def test_docstrings_are_found_in_statements_of_every_kind(tmp_path):
    (tmp_path / "x.py").write_text(EVERYWHERE)
    found = _docstrings(tmp_path / "x.py")
    assert found == walked(tmp_path / "x.py")
    assert found.count("In a") == 8
    assert gc.isenabled()


@pytest.mark.parametrize("name", ["typing.py", "argparse.py", "asyncio/tasks.py", "email/message.py", "ctypes/util.py"])
def test_docstrings_of_the_library_are_those_of_a_walk_through_the_whole_tree(name):
    path = Path(sysconfig.get_path("stdlib")) / name
    assert _docstrings(path) == walked(path) != ""


def test_a_module_that_is_no_python_has_no_docstrings_and_leaves_the_collector_on(tmp_path):
    (tmp_path / "x.py").write_text('"""Module."""\nprint "hello"\n')
    assert _docstrings(tmp_path / "x.py") == ""
    assert gc.isenabled()


def test_folders_that_are_no_library_are_not_entered(tmp_path):
    for name in ("a.py", "b/c.py", "b/test/d.py", "site-packages/e.py", "b/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert sorted(_modules(tmp_path)) == [tmp_path / "a.py", tmp_path / "b" / "c.py"]
