"""The page about a run: one HTML file. Its first screen says what was asked, found and tried; sections say the rest."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigram_circuits.circuit import Circuit
from bigram_circuits.evaluation import Evaluation
from bigram_circuits.experiments.seeds import Seeds, load_seeds
from bigram_circuits.experiments.stricter import FOLDER, load_stricter
from bigram_circuits.explanations import words
from bigram_circuits.explanations.explanation import Atlas, Explanation
from bigram_circuits.measures.words import listed, percent, rounded
from bigram_circuits.report import circuit, figures, inside, outcome, reading, seeds, stricter  # noqa: F401 (they register sections)
from bigram_circuits.report.blocks import Block, Chart, Check, Mark, Opening, Preview, Section
from bigram_circuits.report.document import document
from bigram_circuits.report.facts import control_rows
from bigram_circuits.report.refuting import checks
from bigram_circuits.report.results import Results
from bigram_circuits.report.sections import SECTIONS
from bigram_circuits.report.sketch import Sketch, sketch_of
from bigram_circuits.report.words import IN_PLACE, asked_units
from bigram_circuits.runs import Run, load_run
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
    results = _results(run)
    return document(opening(run, results), sections(run, results), "Made from the files in the run's folder.")


def _results(run: Run) -> Results:
    """All that was measured of a run, read from its files."""
    harder = load_stricter(run.path / FOLDER, run)
    return Results(run.analyses, run.left_out, run.atlas, load_seeds(run.path, run), harder)


def sections(run: Run, results: Results | None = None) -> list[Section]:
    """Every registered section that has something to say about the run; by default, its results are read."""
    results = results or _results(run)
    written = [section(run, results) for section in SECTIONS]
    return [one for one in written if one.says or one.blocks]


def opening(run: Run, results: Results | None = None) -> Opening:
    """The first screen: question, answer, a few numbers, a picture, and what would refute the answer."""
    results = results or _results(run)
    tried = checks(run, results)
    does, _ = run.plain_target
    return Opening(
        title=f"The {run.target_words[0]} {run.mask.noun} of {run.model_words}",
        asked=f"Which few {asked_units(run.mask)} of {run.model_words} are enough to {does}?",
        answer=" ".join(filter(None, [_answer(run), _but(tried)])),
        marks=_marks(run, results.seeds),
        picture=_picture(run, results.atlas),
        checks=tried,
        notes=_notes(run, results.seeds),
    )


# --- the answer ---


def _answer(run: Run) -> str:
    """How many are kept, whether they are enough, and what the model does with only these: a sentence."""
    mask, evaluation = run.mask, run.evaluation
    kept = f"{mask.kept:,} of {mask.total:,} {mask.units} ({percent(mask.fraction)})"
    if evaluation is None:
        return f"{kept} were chosen; whether they are enough was not measured (bigram-circuits evaluate RUN)."
    if evaluation.sufficiency is None:
        why = "the full model does no better than one without any" if evaluation.by_loss else "agreement is undefined"
        return f"{kept} were chosen; whether they are enough is unknown, since {why}."
    enough, follows = _HOW[evaluation.sufficiency]
    if evaluation.by_loss:
        return f"{kept} {enough}: with only these, the model {_gain_words(evaluation)}."
    return f"{kept} {enough}: with only these, the model's predictions {follows} {run.plain_target[1]}."


def _gain_words(evaluation: Evaluation) -> str:
    """What the model does with only what was kept, beside what it does with all and with none."""
    if evaluation.recovered < 0:
        return f"does worse than without any {evaluation.units}"
    if evaluation.recovered > 1:
        return f"does better than with all {evaluation.units}"
    return f"keeps {percent(evaluation.recovered)} of what all {evaluation.units} gain over none"


_HOW = {
    "sufficient": ("are enough", "agree closely with"),
    "largely sufficient": ("are nearly enough", "agree well with"),
    "only partly sufficient": ("are only partly enough", "agree only roughly with"),
    "NOT sufficient": ("are NOT enough", "do not agree well with"),
}
"""What is said of each word of `Evaluation.sufficiency`: whether it is enough, and how predictions agree then."""


def _but(tried: Sequence[Check]) -> str:
    """How many checks failed, and whether a control refutes the answer, as a sentence; empty if none failed."""
    failed = [check for check in tried if check.outcome == "failed"]
    if any(check.key == "refuted" for check in failed):
        return f"But it is REFUTED by its own controls ({len(failed)} of the checks below failed)."
    return f"It failed {len(failed)} of the checks below." if failed else ""


# --- the numbers ---


def _marks(run: Run, several: Seeds | None) -> list[Mark]:
    """A few numbers, each with what it is, how it was measured, and how much it depends on seed and text."""
    mask = run.mask
    if isinstance(mask, Circuit):
        rest = f"The others are replaced by {IN_PLACE[mask.replacement.kind]}."
    else:
        rest = "The others are set to zero. Embeddings, biases and normalisation always stay."
    spread = _Spreads(run, several)
    kept = f"of the {mask.units} kept ({mask.kept:,})"
    marks = [Mark(percent(mask.fraction), kept, rest, spread.of_seeds("fraction", percent))]
    if run.evaluation is None:
        return marks
    faithful = _of_agreement(run, run.evaluation, spread)
    if run.evaluation.by_loss:
        faithful = _of_losses(run.evaluation, spread)
    return [*marks, *faithful, *_of_need(run.evaluation, spread)]


@dataclass(frozen=True)
class _Spreads:
    """How much the numbers of a run depend on the seed and on the text."""

    run: Run
    several: Seeds | None

    def of_seeds(self, quantity: str, words: Callable[[float], str]) -> str:
        """The smallest and the largest value over seeds, as a phrase; empty if there is one seed."""
        if self.several is None:
            return ""
        low, high = map(words, self.several.range(quantity))
        return f"over {len(self.several.masks)} seeds {low}{f' to {high}' if high != low else ''}"

    def of(self, quantity: str, text: tuple[float, float], words: Callable[[float], str] = rounded) -> str:
        """The same, and the 95% interval over text: that given, or where there is none, that of the representative.

        Seeds measured on another text than the run say nothing of its numbers.
        """
        several = self.several if self._is_same_text else None
        if several is None or math.isnan(several.range(quantity)[0]):
            return f"over text {words(text[0])} to {words(text[1])}" if not math.isnan(text[0]) else ""
        ends = several.interval(quantity) if math.isnan(text[0]) else text
        over_text = f"; over text {words(ends[0])} to {words(ends[1])}" if not math.isnan(ends[0]) else ""
        return f"{self.of_seeds(quantity, words)}{over_text}"

    @property
    def _is_same_text(self) -> bool:
        on, of = self.run.evaluated_on, self.several and self.several.of
        return on is None or of is None or on.fingerprint == of.text


_NO_ENDS = (math.nan, math.nan)


def _of_agreement(run: Run, evaluation: Evaluation, spread: _Spreads) -> list[Mark]:
    rows = {row.name: row for row in control_rows(evaluation)}
    own = rows["subnetwork"]
    how = (
        f"The correlation, over held-out text, of two surprises at each token that comes: the model's with only these "
        f"{evaluation.units}, and that of {run.plain_target[1]}."
    )
    over = spread.of("surprisal_correlation", own.ends)
    marks = [Mark(rounded(own.r, 2), "agreement (1 is perfect)", how, over)]
    if "random" in rows:
        n = len(evaluation.random)
        drawn = f"The same for as many {evaluation.units} drawn at random: the mean over {n} draws."
        over = spread.of("r_of_random", _NO_ENDS)
        marks.append(Mark(rounded(rows["random"].r, 2), f"agreement of random {evaluation.units}", drawn, over))
    return marks


def _of_losses(evaluation: Evaluation, spread: _Spreads) -> list[Mark]:
    rows = {row.name: row.numbers.cross_entropy for row in control_rows(evaluation)}
    how = "Cross-entropy on held-out prompts, in nats: how surprised the model is by what the target asks for."
    ends = {name: evaluation.interval(name, "cross_entropy") for name in rows}
    over = spread.of("cross_entropy", ends["subnetwork"])
    marks = [Mark(rounded(rows["subnetwork"], 2), "loss with only these (0 is perfect)", how, over)]
    if "random" in rows:
        over = spread.of("cross_entropy_of_random", _NO_ENDS)
        marks.append(Mark(rounded(rows["random"], 2), f"loss with random {evaluation.units}", how, over))
    if "full" in rows:  # no seed changes it
        over = _Spreads(spread.run, None).of("cross_entropy", ends["full"])
        marks.append(Mark(rounded(rows["full"], 2), "loss of the full model", how, over))
    return marks


def _of_need(evaluation: Evaluation, spread: _Spreads) -> list[Mark]:
    rise, random = evaluation.necessity
    if evaluation.by_loss or math.isnan(rise):
        return []
    how = "How much more surprised the model is by each next token of held-out text, in nats, when these are dropped."
    how += "" if math.isnan(random) else f" When as many random ones are dropped: {random:+.2f}."
    over = spread.of("rise_without", _NO_ENDS, "{:+.3f}".format)
    return [Mark(f"{rise:+.2f}", "rise in loss without them", how, over)]


# --- the picture ---


def _picture(run: Run, atlas: Atlas | None) -> Block | None:
    """The circuit after one token if it was analysed, else how the controls compare; None if nothing was measured."""
    if atlas is not None and atlas.explanations:
        shown = words.clearest(atlas)
        sketch = sketch_of(shown, atlas.units)
        return Preview("The circuit at one token", _sketch_words(shown, sketch), sketch, "circuit")
    if run.evaluation is None:
        return None
    rows = [row for row in control_rows(run.evaluation) if row.name in _COMPARED]
    if len(rows) < 2:
        return None
    if run.evaluation.by_loss:
        ends = [run.evaluation.interval(row.name, "cross_entropy") for row in rows]
        values = [(row.condition, row.numbers.cross_entropy, *pair) for row, pair in zip(rows, ends, strict=True)]
        return Chart("How it compares", "Further left is better.", figures.controls(values, "loss (nats)"))
    values = [(row.condition, row.r, *row.ends) for row in rows]
    return Chart("How it compares", "Further right is better.", figures.controls(values, "agreement with the target"))


def _sketch_words(shown: Explanation, sketch: Sketch) -> str:
    """What the still picture shows, and how to read it."""
    after, what = f"After {words.quoted(shown.prompt[shown.position])}", f"the {shown.answer}"
    if shown.predictions and words.answer_probability(shown) is not None:
        token, probability = shown.predictions[0]
        after += f" it predicts {words.quoted(token)} ({words.share_words(probability)})"
        what = "that prediction"
    parts = sum(not node.is_end for node in sketch.nodes)
    says = (
        f"{after}. Shown are {parts} of the strongest parts: orange raises {what}, blue lowers it, the wider the line, "
    )
    labels = {node.label for node in sketch.nodes}
    neuron = next((one for one in shown.nodes if one.kind == "neuron" and one.label in labels), None)
    named = f" {neuron.label} is neuron {neuron.label.rpartition('N')[2]} of layer {neuron.layer}." if neuron else ""
    return f"{says}the more.{named}"


_COMPARED = ("subnetwork", "full", "magnitude", "random", "empty")
"""The conditions that are compared where there is no picture of the circuit."""


# --- small print ---


def _notes(run: Run, several: Seeds | None) -> list[str]:
    """On which text it was found and measured, with how many seeds, when, and with which versions."""
    source = run.settings.corpus.source
    text = "the reference text" if source == "reference" else f"the text {source}"
    text += f" ({sample})" if (sample := run.settings.corpus.sample) else ""
    starts = run.settings.corpus.starts
    found = f"A token is a word or a piece of one. The {run.mask.units} were chosen on {text}"
    found += " and measured on its held-out part." if run.evaluation and _is_own_text(run) else "."
    return [
        f"{found}{f' Its tokens have {starts}.' if starts else ''}",
        several.why if several else _ONE_SEED,
        _made(run),
    ]


_ONE_SEED = "All numbers are of one seed; another gives others (bigram-circuits find --seeds 5 says by how much)."


def _is_own_text(run: Run) -> bool:
    """Whether a run was evaluated on its own text, as far as is known."""
    text = run.evaluated_on
    return run.is_former if text is None else text.fingerprint == run.settings.corpus.fingerprint


def _made(run: Run) -> str:
    """When the run began, and with which versions."""
    names = {
        "bigram_circuits": "bigram_circuits",
        "torch": "PyTorch",
        "transformer_lens": "TransformerLens",
        "python": "Python",
    }
    packages = listed([f"{name} {run.versions[key]}" for key, name in names.items() if key in run.versions])
    when = f"Begun on {run.created.replace('T', ' at ').replace('Z', ' UTC')}" if run.created else "Made"
    return f"{when}{f' with {packages}' if packages else ''}." if run.created or packages else ""
