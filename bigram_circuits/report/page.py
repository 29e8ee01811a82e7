"""The page about a run: one HTML file that tells how it was found, how faithful it is and where it is."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from bigram_circuits.experiments.falsification import load_falsification
from bigram_circuits.measures.words import listed, percent, rounded, sentence, span
from bigram_circuits.report import circuit, inside, outcome, reading  # noqa: F401 (they register their sections)
from bigram_circuits.report.blocks import Opening, Section
from bigram_circuits.report.document import document
from bigram_circuits.report.facts import Row, control_rows
from bigram_circuits.report.results import Results
from bigram_circuits.report.sections import SECTIONS
from bigram_circuits.report.words import asked_units, dropped_words, reader_of
from bigram_circuits.runs import CorpusIdentity, Run, load_run, too_short
from bigram_circuits.storage.files import write_text


def write_report(run: Run | str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """Write the page about a finished run, replacing an earlier one.

    The page shows what is in the run's folder; a run that was not evaluated or not analysed gets a shorter one.

    Args:
        run: A run, or its folder.
        path: Where to write it; `report.html` in the run's folder if not given.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If there is no run in the folder.
        ValueError: If the run did not finish, or a file in its folder cannot be read.
        OSError: If the page cannot be written.

    Example:
        >>> bc.write_report("runs/short")  # runs/short/report.html
    """
    run = run if isinstance(run, Run) else load_run(run)
    path = run.path / "report.html" if path is None else Path(path)
    write_text(path, page(run))
    return path


def page(run: Run) -> str:
    """The page as text."""
    return document(opening(run), sections(run), "Made from the files in the run's folder.")


def sections(run: Run) -> list[Section]:
    """Every registered section that has something to say about the run."""
    results = Results(run.analyses, run.left_out, run.atlas)
    written = [section(run, results) for section in SECTIONS]
    return [one for one in written if one.says or one.blocks]


def opening(run: Run) -> Opening:
    """The title, what was done and what came of it in a sentence, the verdict, and how it was made."""
    target, model, source = run.target_words, run.model_words, run.settings.corpus.source
    text = "the reference text" if source == "reference" else f"the text {source}"
    mask = run.mask
    asked = f"The question: which {asked_units(mask)} of {model} are enough to reproduce {target[1]}? "
    asked += "The masks were learned on "
    of_other = other_text(run.evaluated_on, run, "evaluated") if run.evaluation else ""
    if run.evaluation and run.evaluated_on is None and not run.is_former:
        of_other = " Which text it was evaluated on was not recorded."
    evaluated = "" if of_other else " and evaluated on its held-out part"
    asked += f"{text}{evaluated}.{_starts(run)}{of_other}{other_text(run.analysed_on, run, 'analysed')}"
    title = f"The {target[0]} {mask.noun} of {model}"
    kept = f"We keep {percent(mask.fraction)} of the {mask.units} ({mask.kept:,} of {mask.total:,})"
    kept += f" and {dropped_words(mask)}"
    if run.evaluation is None:
        answer = f"{kept}. What remains was not evaluated, so its faithfulness is unknown."
        return Opening(title, asked, answer, _doubts(run), _made(run))
    rows = {row.name: row for row in control_rows(run.evaluation)}
    tried = load_falsification(run.path / "falsify", run)
    refuted = f" REFUTED by its own controls: {', '.join(tried.refuted)}." if tried and tried.refuted else ""
    marks = [(f"of {mask.units} kept", percent(mask.fraction))]
    value, of = ("cross_entropy", "cross-entropy") if run.evaluation.by_loss else ("surprisal_correlation", "r")
    marks += [
        (f"{of} {w.format(units=mask.units)}", rounded(getattr(rows[n].numbers, value)))
        for n, w in _MARKS.items()
        if n in rows
    ]
    answer = f"{kept}; {_what_remains(run, rows)}"
    held = f" {run.evaluation.mask_capacity.says}" if run.evaluation.mask_capacity else ""
    verdict = f"{run.evaluation.verdict}{refuted}{held} {_doubts(run)}".strip()
    return Opening(title, asked, answer, verdict, _made(run), marks)


def _doubts(run: Run) -> str:
    """Sentences about a run that was too short, or whose inputs were warned of; empty if there are none."""
    short = too_short(run.last_attempt, run.outcome, run.settings.recipe.max_steps)
    of_inputs = "there were warnings about model and text before learning: see “How it was found”"
    says = [short or "", of_inputs if run.checked and run.checked.warnings else ""]
    return " ".join(filter(None, map(sentence, says)))


def _what_remains(run: Run, rows: Mapping[str, Row]) -> str:
    """How far the subnetwork is surprised by the same tokens as the target, and random weights are."""
    own, reader = rows["subnetwork"], reader_of(run)
    if math.isnan(own.r):
        numbers = {name: rounded(row.numbers.cross_entropy) for name, row in rows.items()}
        mask = run.mask
        others = [
            f"{words.format(noun=mask.noun, units=mask.units)} {numbers[name]}"
            for name, words in _OTHERS.items()
            if name in numbers
        ]
        than = f" ({', '.join(others)})" if others else ""
        return f"what remains has a cross-entropy of {numbers['subnetwork']} nats from {reader}{than}."
    how = next(words for least, words in _SAME if own.r >= least)
    interval = f" (95% interval {span(*own.ends)})" if span(*own.ends) else ""
    chance = f"; as many random {run.mask.units}: {rounded(rows['random'].r)}" if "random" in rows else ""
    return f"what remains is {how} as {reader}: r = {rounded(own.r)}{interval}{chance}."


_SAME = (
    (0.9, "surprised by the same tokens"),
    (0.7, "surprised by roughly the same tokens"),
    (0.3, "surprised only by partly the same tokens"),
    (-math.inf, "not surprised by the same tokens"),
)
"""Least r, and how alike the surprisals are then."""


def _made(run: Run) -> str:
    """When the run began, and with which versions."""
    names = {
        "bigram_circuits": "bigram_circuits",
        "torch": "PyTorch",
        "transformer_lens": "TransformerLens",
        "python": "Python",
    }
    packages = listed([f"{words} {run.versions[name]}" for name, words in names.items() if name in run.versions])
    when = f"Begun on {run.created.replace('T', ' at ').replace('Z', ' UTC')}" if run.created else "Made"
    return f"{when}{f' with {packages}' if packages else ''}." if run.created or packages else ""


def other_text(text: CorpusIdentity | None, run: Run, done: str) -> str:
    """A sentence that a run was evaluated or analysed on another text than its own; empty if it was not."""
    if text is None or text.fingerprint == run.settings.corpus.fingerprint:
        return ""
    return (
        f" It was {done} on the held-out part of ANOTHER TEXT, {text.source} (fingerprint {text.fingerprint}, "
        f"not {run.settings.corpus.fingerprint}), from whose training part the target was made again."
    )


def _starts(run: Run) -> str:
    """What sequences and documents begin with, as a sentence."""
    starts = run.settings.corpus.starts
    return f" Its tokens have {starts}." if starts else ""


_MARKS = {
    "subnetwork": "with the target",
    "random": "of matched random {units}",
    "full": "of the full model",
}
"""The rows of which r, or the cross-entropy, is shown large at the top, and what stands beside it."""
_OTHERS = {"full": "the full model", "empty": "the empty {noun}", "random": "as many random {units}"}
