"""Execute the notebooks and write them with their outputs: `make notebooks`, or `python notebooks/build.py 01-find`.

A notebook is a percent script, `01-find.py`; `01-find.ipynb` is made from it and never edited. All of them run in one
temporary folder, one after the other, so that the later ones find the run of the first. A picture is stored twice:
as JSON that JupyterLab and VS Code draw, and as a static image for places that run no code (it takes Chrome or
Chromium to make that one). What would differ from one machine to the next is left out: warnings, bars, times.

With `--html FOLDER` nothing is executed: the notebooks as they are become pages that open offline.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import plotly.io as pio
from nbclient import NotebookClient
from nbconvert import HTMLExporter

HERE = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
WIDTH, HEIGHT = 900, 420  # of a picture, pixels
SETTINGS = {
    "PLOTLY_RENDERER": "plotly_mimetype",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
    "HF_HUB_OFFLINE": "1",
}


def sources() -> list[Path]:
    """The percent scripts, in the order in which they are read."""
    return sorted(HERE.glob("[0-9][0-9]-*.py"))


def notebook(source: Path) -> nbformat.NotebookNode:
    """The notebook of a percent script, not executed; nothing in it depends on when or where."""
    made = jupytext.read(source, fmt="py:percent")
    made.metadata = nbformat.from_dict(METADATA)
    for place, cell in enumerate(made.cells):
        cell.id = f"{source.stem}-{place}"
        cell.metadata = nbformat.from_dict({})
    made.nbformat, made.nbformat_minor = 4, 5
    return made


def static_picture(drawn: dict[str, Any]) -> str:
    """The image of what plotly would draw."""
    size = {"width": drawn["layout"].get("width", WIDTH), "height": drawn["layout"].get("height", HEIGHT)}
    return pio.to_image({key: drawn[key] for key in ("data", "layout")}, "svg", **size).decode()


def execute(made: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Run it in a folder, and keep what it shows."""
    os.environ |= SETTINGS
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(made, timeout=1800, kernel_name="python3", resources=resources, record_timing=False).execute()
    for cell in made.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                one for one in cell.outputs if one.get("name") != "stderr" and WIDGET not in one.get("data", {})
            ]
            for output in cell.outputs:
                if PLOTLY in output.get("data", {}):
                    output.data["image/svg+xml"] = static_picture(output.data[PLOTLY])
    made.metadata = nbformat.from_dict(METADATA)
    return made


def page(made: nbformat.NotebookNode, name: str) -> str:
    """A notebook as one HTML file that makes no request: nbconvert's own would load two libraries it has no use for."""
    exporter = HTMLExporter(template_name="lab", require_js_url="data:,", mathjax_url="data:,")
    return exporter.from_notebook_node(made, {"metadata": {"name": name}})[0]


def main() -> None:
    """Build the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description="Execute the notebooks and write them with their outputs.")
    parser.add_argument("names", nargs="*", help="for example 01-find; all of them if none is named")
    parser.add_argument("--html", type=Path, metavar="FOLDER", help="write them there as pages, without executing them")
    arguments = parser.parse_args()
    wanted = arguments.names
    unknown = set(wanted) - {path.stem for path in sources()}
    if unknown:
        parser.error(f"there is no notebook {', '.join(sorted(unknown))}")
    chosen = [source for source in sources() if not wanted or source.stem in wanted]
    if arguments.html:
        arguments.html.mkdir(parents=True, exist_ok=True)
        for source in chosen:
            made = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
            (arguments.html / f"{source.stem}.html").write_text(page(made, source.stem), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        for source in chosen:
            started = time.monotonic()
            made = execute(notebook(source), Path(folder))
            nbformat.validate(made)
            nbformat.write(made, source.with_suffix(".ipynb"))
            size = source.with_suffix(".ipynb").stat().st_size
            print(f"{source.stem}: {time.monotonic() - started:.0f} s, {size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
