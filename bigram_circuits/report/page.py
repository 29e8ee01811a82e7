"""The page about a run: one HTML file that tells its story."""

from __future__ import annotations

import os
from pathlib import Path

from bigram_circuits.report.document import document
from bigram_circuits.report.story import opening, sections
from bigram_circuits.runs import Run, load_run
from bigram_circuits.storage.files import write_text


def write_report(run: Run | str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """Write the page about a finished run; an earlier one is replaced.

    It shows what the run's folder holds: a run that was not evaluated or not analysed gives a shorter page.

    Args:
        run: A run, or its folder.
        path: Where to write it; `report.html` in the run's folder if not given.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If there is no run in the folder.
        ValueError: If the run did not finish, or a file in its folder cannot be read.
        OSError: If the page cannot be written.
    """
    run = run if isinstance(run, Run) else load_run(run)
    path = run.path / "report.html" if path is None else Path(path)
    write_text(path, page(run))
    return path


def page(run: Run) -> str:
    """The page as text."""
    return document(opening(run), sections(run), "Made from the files in the run's folder.")
