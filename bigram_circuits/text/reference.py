"""The text the reference model was trained on: the documentation of the running interpreter.

There are two sources. Both are installed with Python and read at run time, so no text is shipped: the language
reference as `help()` shows it (`pydoc_data.topics`), and the docstrings of the standard library's modules, extracted
with `ast` so that nothing is imported or run. The wording of a few documents differs between Python versions, but
their names do not, so documents are held out by name.
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
        FileNotFoundError: If this interpreter was installed without the standard library's source files.
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
    """Join all docstrings of a module, in source order, its own first; empty if there are none."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in library modules do not concern our user
            tree = ast.parse(path.read_bytes())
    except SyntaxError:  # templates and files that are deliberately not valid Python
        return ""
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))
