"""The text the reference model was trained on: the documentation of the running interpreter.

There are two sources. Both are installed with Python and read at run time, so no text is shipped: the language
reference as `help()` shows it (`pydoc_data.topics`), and the docstrings of the standard library's modules, extracted
with `ast` so that nothing is imported or run. The wording of a few documents differs between Python versions, but
their names do not, so documents are held out by name.
"""

from __future__ import annotations

import ast
import gc
import os
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def reference_documents() -> Iterator[tuple[str, str]]:
    """Yield `(name, text)` for every document, in a fixed order.

    Names are `topic/<topic>` and `module/<path>`, for example `module/json/decoder.py`.

    Raises:
        FileNotFoundError: If this interpreter was installed without the standard library's source files.
    """
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield f"topic/{topic}", topics[topic]
    library = Path(sysconfig.get_path("stdlib"))
    paths = _modules(library)
    if not paths:
        raise FileNotFoundError(f"no Python source files under {library}: the reference corpus is read from them")
    for path in sorted(paths):
        docstrings = _docstrings(path)
        if docstrings:
            yield f"module/{path.relative_to(library).as_posix()}", docstrings


def _modules(library: Path) -> list[Path]:
    """The source files of the standard library; folders that do not belong to it are not entered."""
    found = []
    for folder, inner, files in os.walk(library):
        inner[:] = [name for name in inner if name not in _NOT_LIBRARY]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return found


def _docstrings(path: Path) -> str:
    """Join all docstrings of a module, in source order, its own first; empty if there are none."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings(), _no_collection():
            warnings.simplefilter("ignore")  # invalid escapes in library modules do not concern our user
            tree = ast.parse(path.read_bytes())
    except SyntaxError:  # templates and files that are deliberately not valid Python
        return ""
    nodes = [node for node in _statements(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Within the `with` block, no garbage is collected: a tree is many objects and no cycles, and each collection would
    go through all that other packages hold, which takes as long as parsing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _statements(tree: ast.Module) -> list[Any]:
    """A module and all statements in it, at any depth; expressions, which are most of a tree, hold no docstrings."""
    found: list[Any] = [tree]
    for node in found:  # grows meanwhile
        for name in ("body", "orelse", "handlers", "cases", "finalbody"):
            found += getattr(node, name, ())
    return found
