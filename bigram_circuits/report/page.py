"""The page about a run: one HTML file that tells its story."""

from __future__ import annotations

import os
from pathlib import Path

from bigram_circuits.experiments.falsification import load_falsification
from bigram_circuits.measures.words import percent, rounded, span
from bigram_circuits.report import inside, outcome, reading  # noqa: F401 (they register their sections)
from bigram_circuits.report.blocks import Opening, Section
from bigram_circuits.report.document import document
from bigram_circuits.report.facts import control_rows
from bigram_circuits.report.results import Results
from bigram_circuits.report.sections import SECTIONS
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


def sections(run: Run) -> list[Section]:
    """All registered sections that have something to tell about a run."""
    results = Results(run.analyses, run.left_out)
    told = [section(run, results) for section in SECTIONS]
    return [one for one in told if one.says or one.blocks]


def opening(run: Run) -> Opening:
    """The title, what was asked, and the answer in a sentence."""
    target, model, source = run.target_words, run.model_words, run.settings.corpus.source
    text = "the reference text" if source == "reference" else f"the text {source}"
    asked = (
        f"Which weights of {model} suffice to reproduce {target[1]}? Learned on {text}, measured on its held-out part."
    )
    kept = f"{percent(run.subnetwork.fraction)} of the weights ({run.subnetwork.kept:,} of {run.subnetwork.total:,})"
    title = f"The {target[0]} subnetwork of {model}"
    if run.evaluation is None:
        return Opening(title, asked, f"{kept} were kept. How well they do is not known: the run was not evaluated.")
    rows = {row.name: row for row in control_rows(run.evaluation)}
    own, tried = rows["subnetwork"], load_falsification(run.path / "falsify")
    pair = f" (95% interval {span(*own.ends)})" if span(*own.ends) else ""
    refuted = f" REFUTED by its own controls: {', '.join(tried.refuted)}." if tried and tried.refuted else ""
    answer = f"{kept} correlate with the target at r = {rounded(own.r)}{pair}. {run.evaluation.verdict}{refuted}"
    marks = [("of the weights kept", percent(run.subnetwork.fraction))]
    marks += [(words, rounded(rows[name].r)) for name, words in _MARKS.items() if name in rows]
    return Opening(title, asked, answer, marks)


_MARKS = {
    "subnetwork": "r with the target",
    "random": "r of matched random weights",
    "full": "r of the whole model",
}
"""What stands large at the top, by row."""
