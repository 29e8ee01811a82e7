"""The text the reference model was trained on: the documentation of the running interpreter.

Two sources, both installed with Python and both read at run time, so that no text is shipped: the language
reference as `help()` shows it (`pydoc_data.topics`), and the docstrings of the standard library's modules, read
with `ast` so that nothing is imported or run. Python versions word a few of these documents differently; a
document keeps its name, and names, not wordings, decide which documents are held out.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def reference_documents() -> Iterator[tuple[str, str]]:
    """Yield `(name, text)` for every document, in a fixed order.

    Names are `topic/<topic>` and `module/<path>`, for example `module/json/decoder.py`.

    Raises:
        FileNotFoundError: If this interpreter was installed without its library's source files.
    """
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield f"topic/{topic}", topics[topic]
    library = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in library.rglob("*.py") if not _NOT_LIBRARY & set(path.relative_to(library).parts)]
    if not paths:
        raise FileNotFoundError(f"no Python source files under {library}: the reference corpus is read from them")
    for path in sorted(paths):
        docstrings = _docstrings(path)
        if docstrings:
            yield f"module/{path.relative_to(library).as_posix()}", docstrings


def _docstrings(path: Path) -> str:
    """Every docstring of a module, its own first, then in the order of the source; empty if it has none."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in a library module are not our user's concern
            tree = ast.parse(path.read_bytes())
    except SyntaxError:  # templates and deliberate oddities that no interpreter parses
        return ""
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))
