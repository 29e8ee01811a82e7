"""Notebooks as pages: `docs/notebooks/NAME.md` becomes the stored notebook of that name, with its outputs.

Nothing is executed, and nothing is fetched: figures are the static images that are stored in the notebook.
"""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
FOLDER = "notebooks/"
PLOTLY, SVG = "application/vnd.plotly.v1+json", "image/svg+xml"
FENCE = "`" * 9


def as_notebook(app: Any, page: str, source: list[str]) -> None:
    """Put a notebook in the place of the page that stands for it."""
    if not page.startswith(FOLDER):
        return
    stored = NOTEBOOKS / f"{page.removeprefix(FOLDER)}.ipynb"
    app.env.note_dependency(str(stored))
    cells = json.loads(stored.read_text(encoding="utf-8"))["cells"]
    title, *rest = "\n\n".join(map(_cell, cells)).split("\n", 1)
    source[0] = f"{title}\n\n*This is `notebooks/{stored.name}`, with the outputs that are stored in it.*\n{rest[0]}"


def _cell(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        text = re.sub(r"\]\(\.\./docs/", "](../", text)
        return re.sub(r"\]\(([\w-]+)\.ipynb", r"](\1.md", text)
    return "\n\n".join([_fenced("{code-block} python", text), *map(_output, cell["outputs"])])


def _output(output: dict[str, Any]) -> str:
    data = {kind: _text(one) for kind, one in output.get("data", {}).items() if kind != PLOTLY}
    if SVG in data:
        says = html.escape(output["data"].get(PLOTLY, {}).get("layout", {}).get("title", {}).get("text", "figure"))
        encoded = base64.b64encode(data[SVG].encode()).decode()
        return _raw(f'<img class="figure" alt="{says}" src="data:{SVG};base64,{encoded}">')
    if "text/html" in data:
        return _raw(re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.DOTALL))
    return _fenced("{code-block} none", data.get("text/plain") or _text(output.get("text", "")))


def _text(written: str | list[str]) -> str:
    return written if isinstance(written, str) else "".join(written)


def _raw(markup: str) -> str:
    return _fenced("{raw} html", f'<div class="output">{markup}</div>')


def _fenced(kind: str, text: str) -> str:
    return f"{FENCE}{kind}\n{text.rstrip()}\n{FENCE}"


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", as_notebook)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
