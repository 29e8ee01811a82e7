"""What would refute the finding of a run, and whether it did: a check for every attempt, from what is stored.

To add a check, decorate a function that gets the run, its results and its attempts to refute, and returns what came of
it; None leaves the check out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bigram_circuits.experiments.controls import RANDOM_BLOCKS, RANDOM_MODEL, SHUFFLED
from bigram_circuits.experiments.falsification import Falsification, load_falsification
from bigram_circuits.experiments.same_function import OTHER_FUNCTION
from bigram_circuits.experiments.verdicts import FOUND, NONSENSE
from bigram_circuits.experiments.worst_case import (
    BREAKS,
    HOLDS,
    IN_PART,
    UNDEFINED,
    judged_steps,
    worst_case_finding,
    worst_case_left,
)
from bigram_circuits.measures.results import Effects, Scatter
from bigram_circuits.measures.words import listed, percent, rounded, sentence
from bigram_circuits.report.blocks import Check
from bigram_circuits.report.circuit import HARDLY, PREDICTS
from bigram_circuits.report.compared_words import value_range
from bigram_circuits.report.results import Results
from bigram_circuits.report.sections import left_out
from bigram_circuits.runs import CorpusIdentity, Run
from bigram_circuits.runs.ending import FEWEST

EVALUATE = "bigram-circuits evaluate RUN"
"""The command that measures how faithful a run is."""
_FALSIFY, _ANALYZE = "bigram-circuits find --falsify", "bigram-circuits analyze RUN"
_SEEDS = "bigram-circuits find --seeds 5"
WORST_CASE = "bigram-circuits worst-case RUN"
RIVALS = "bigram-circuits rivals RUN"
SAME_FUNCTION = "bigram-circuits same-function RUN OTHER"
"""The commands of the stricter tests."""
_OUTCOMES = {"stands": "passed", "weakened": "in doubt", "refuted": "failed"}
"""What comes of a check, by what a control does to the finding; the worst is last."""
_ANSWERS = {"stands": "No", "weakened": "In part", "refuted": "Yes"}
"""Likewise, the answer to whether the control does as well."""


@dataclass(frozen=True)
class _Found:
    """What came of a check."""

    outcome: str
    """One of `blocks.OUTCOMES`."""
    says: str
    """The answer and what was measured."""
    command: str = ""
    """Of what was not tried: what tries it."""
    key: str = ""
    """The anchor of the section that shows more, if it is not that of the check."""


@dataclass(frozen=True)
class _Subject:
    """What is checked."""

    run: Run
    results: Results
    tried: Falsification | None
    """What `find --falsify` found; None if it was not run."""


@dataclass(frozen=True)
class _CheckKind:
    """A check that a page may have."""

    asked: str
    """The question, with places for `{units}` (weights or nodes) and `{strongest}`."""
    key: str
    """The anchor of the section that shows more."""
    tell: Callable[[_Subject], _Found | None]


_CHECKS: list[_CheckKind] = []


def _check(asked: str, key: str) -> Callable[[Callable[[_Subject], _Found | None]], None]:
    """Register the decorated function as a check."""
    return lambda tell: _CHECKS.append(_CheckKind(asked, key, tell))


def checks(run: Run, results: Results) -> list[Check]:
    """Every check of a run, whether or not it was tried."""
    subject = _Subject(run, results, load_falsification(run.path / "falsify", run))
    found = [_made(kind, subject) for kind in _CHECKS]
    return [one for one in found if one]


def _made(kind: _CheckKind, subject: _Subject) -> Check | None:
    """What came of a check; results come from files, and one that is odd leaves out its check and no more."""
    asked = kind.asked.format(units=subject.run.mask.units, strongest=_strongest(subject.run))
    try:
        found = kind.tell(subject)
    except Exception as error:
        found = _Found("not tried", left_out(error))
    return found and Check(asked, found.outcome, found.says, found.key or kind.key, found.command)


def _not_tried(command: str) -> _Found:
    return _Found("not tried", "What tries it:", command)


# --- against its controls ---


@_check("Would random or the {strongest} do as well?", "controls")
def _random(subject: _Subject) -> _Found:
    evaluation, units = subject.run.evaluation, subject.run.mask.units
    beats = {} if evaluation is None else {name: evaluation.beats(name) for name in ("random", "magnitude")}
    beats = {name: one for name, one in beats.items() if one is not None}
    if evaluation is None or not beats:
        return _not_tried(EVALUATE)
    rows = dict(evaluation.rows())
    key, what = ("cross_entropy", "these have a loss of") if evaluation.by_loss else _AGREE
    values = {name: rounded(rows[name][key], 2) for name in (*beats, "subnetwork")}
    names = {"random": f"random {units}", "magnitude": f"the {_strongest(subject.run)}"}
    reached = [f"{names[name]} {values[name]}" for name in beats]
    says = f"{'No' if all(beats.values()) else 'Not excluded'}: {what} {values['subnetwork']}; {listed(reached)}."
    return _Found("passed" if all(beats.values()) else "failed", says)


_AGREE = ("surprisal_correlation", "these reach an agreement of")


def _strongest(run: Run) -> str:
    return "largest weights" if run.mask.units == "weights" else "strongest nodes"


@_check("Would a model that learned nothing do as well?", "refuted")
def _untrained(subject: _Subject) -> _Found:
    names = {RANDOM_BLOCKS: "untrained layers", SHUFFLED: "shuffled weights", RANDOM_MODEL: "an untrained model"}
    return _control(subject, names)


@_check("Could a mask fit any target?", "refuted")
def _nonsense(subject: _Subject) -> _Found:
    return _control(subject, {NONSENSE: "a meaningless target"})


def _control(subject: _Subject, names: Mapping[str, str]) -> _Found:
    """The worst of some controls that the recipe was run on, at equal size."""
    tried = subject.tried
    judged = {} if tried is None else {one.control: one.finding for one in tried.judged if one.control in names}
    if tried is None or not judged:
        return _not_tried(_FALSIFY)
    told = tried.controls.get("context_told")
    is_told = not math.isnan(told[FOUND])
    values = told if is_told else tried.controls.get("cross_entropy")
    words: Callable[[float], str] = _whole if is_told else _nats
    first, *others = [name for name in names if name in judged]
    what = "it recovers {} of what the context tells" if is_told else "its cross-entropy is {}"
    parts = [f"with {names[first]} {what.format(words(values[first]))}"]
    parts += [f"with {names[name]} {words(values[name])}" for name in others]
    worst = max(judged.values(), key=list(_OUTCOMES).index)
    return _Found(_OUTCOMES[worst], f"{_ANSWERS[worst]}: {', '.join(parts)}; what was found, {words(values[FOUND])}.")


def _whole(share: float) -> str:
    return "undefined" if math.isnan(share) else f"{100 * share:z.0f}%".replace("-", "\N{MINUS SIGN}")


def _nats(value: float) -> str:
    return f"{rounded(value, 2)} nats"


@_check("Do other seeds find the same {units}?", "refuted")
def _seeds(subject: _Subject) -> _Found:
    """By the attempts to refute it, or where there are none, by the seeds that the run is of."""
    if subject.tried is not None:
        return _shared(subject.tried.judged[-1].finding, subject.tried.seeds, "")
    several = subject.results.seeds
    return _not_tried(_SEEDS) if several is None else _shared(several.judged.finding, several.overlaps, "seeds")


def _shared(finding: str, overlaps: Effects, key: str) -> _Found:
    """What pairs of seeds share."""
    pairs = [f"{pair}: all" for pair in overlaps.notes["pairs"]]
    if not pairs:
        return _Found(_OUTCOMES[finding], "No two seeds kept anything to compare.", key=key)
    both, chance, jaccard = (overlaps.get(key) for key in ("intersection", "expected", "jaccard"))
    shares = " to ".join(dict.fromkeys(_whole(end(jaccard[pair] for pair in pairs)) for end in (min, max)))
    times = min(both[pair] / chance[pair] if chance[pair] else math.nan for pair in pairs)
    answer = "Yes" if finding == "stands" else "Not clearly"
    says = f"{answer}: two seeds share {shares} of what either keeps, {times:,.0f} times as much as by chance."
    return _Found(_OUTCOMES[finding], says, key=key)


@_check("Could the choice itself hold the answer?", "controls")
def _capacity(subject: _Subject) -> _Found | None:
    """None for targets whose bits cannot be counted."""
    found = subject.run.evaluation.mask_capacity if subject.run.evaluation else None
    if found is None:
        return None
    if not found.table_bits:
        return _Found("passed", "There is nothing to hold: a constant prediction is as good.")
    answer = "No" if found.is_far_fewer else "Yes" if found.ratio >= 1 else "Not excluded"
    says = f"{answer}: the list of {subject.run.mask.units} kept is {found.mask_bits:,.0f} bits long, a table that "
    says += f"predicts as well {found.table_bits:,.0f}."
    return _Found("passed" if found.is_far_fewer else "in doubt", says)


@_check("Can the model do without them?", "controls")
def _needed(subject: _Subject) -> _Found:
    evaluation = subject.run.evaluation
    if evaluation is None or evaluation.need is None:
        return _not_tried(EVALUATE)
    rise, random = evaluation.necessity
    outcome, answer = _NEED.get(evaluation.need, ("in doubt", "To some degree"))
    says = f"{answer}: without them its loss {_moves(rise)}, without as many random ones it {_moves(random)}."
    return _Found(outcome, says)


_NEED = {"necessary": ("passed", "No"), "fairly necessary": ("passed", "Hardly"), "NOT necessary": ("failed", "Yes")}
"""The outcome and the answer for words of `Evaluation.need`."""


def _moves(rise: float) -> str:
    return f"{'rises' if rise >= 0 else 'falls'} by {rounded(abs(rise), 2)}"


# --- stricter tests ---


@_check("What if the dropped {units} are not exactly absent?", "worst_case")
def _worst_case(subject: _Subject) -> _Found:
    """What is left with the rest at its worst; it means nothing where the full model does something else."""
    curves, reason = subject.results.stricter.worst_case, subject.results.stricter.left_out.get("worst_case")
    if curves is None and reason:
        return _Found("not applicable", f"It means nothing here: {reason.partition(':')[0]}.")
    if curves is None:
        return _not_tried(WORST_CASE)
    finding, steps = worst_case_finding(curves), judged_steps(curves)
    if finding == UNDEFINED:
        return _Found("not tried", "Undefined: these are no better than none.")
    left = percent(max(worst_case_left(curves)[steps], 0.0))
    if curves.notes["forced"]:
        says = "It means nothing here: the full model does something else. (Measured all the same:"
        return _Found("not applicable", f"{says} {left} of the information is left.)")
    outcome, answer, follows = _WORST[finding]
    says = f"{answer}: set as badly as {steps} steps of search can, they leave {left} of the information{follows}."
    return _Found(outcome, says)


_WORST = {
    HOLDS: ("passed", "Nothing much", ""),
    IN_PART: ("in doubt", "A part is lost", ""),
    BREAKS: ("failed", "It breaks", ", so these are enough only with the rest exactly absent"),
}
"""The outcome, the answer and what follows, by `worst_case_finding`."""


@_check("Could other {units} do the same?", "rivals")
def _rivals(subject: _Subject) -> _Found:
    """Rivals put in doubt which weights are kept, not that they are enough: they never fail the check."""
    found, reason = subject.results.stricter.rivals, subject.results.stricter.left_out.get("rivals")
    if found is None:
        return _Found("not tried", sentence(reason)) if reason else _not_tried(RIVALS)
    if not found.rivals:
        undecided = "unclear" in map(found.finding, found.measured.names)
        return _Found("in doubt" if undecided else "passed", found.verdict)
    recovered, shared = ([found.measured.get(key)[name] for name in found.rivals] for key in ("recovered", "jaccard"))
    n, units = len(found.rivals), subject.run.mask.units
    says = (
        f"Yes: {n} other mask{'s' if n > 1 else ''} of this size recover{'' if n > 1 else 's'} "
        f"{value_range(recovered, percent)} of what these do, with {value_range(shared, percent)} of the {units} in "
        f"common. These are enough, but so are others: in doubt is which {units} are kept."
    )
    return _Found("in doubt", says)


@_check("Do other masks that do as well compute the same?", "same_function")
def _same_function(subject: _Subject) -> _Found:
    """In other seeds and rivals; where they do not, what is in doubt is how it is done, not that these are enough."""
    compared = subject.results.stricter.same
    if not compared:
        return _not_tried(SAME_FUNCTION)
    others = [name for name, one in compared.items() if one.verdict == OTHER_FUNCTION]
    alike = [name for name in compared if name not in others]
    least = {name: percent(max(one.agreement, 0.0)) for name, one in compared.items()}
    told = "of what either takes from the context, the other tells"
    if not others:
        at_least = percent(min(one.agreement for one in compared.values()))
        return _Found("passed", f"Yes: {listed(alike)}; {told} at least {at_least}.")
    answer = f"In part: {listed(alike)} {'do' if len(alike) > 1 else 'does'}" if alike else "No"
    parts = listed([f"{least[name]} ({name})" for name in others])
    return _Found("in doubt", f"{answer}; {told} only {parts}." if alike else f"{answer}: {told} only {parts}.")


@_check("Does the picture predict what removing neurons does?", "predicts")
def _predicts(subject: _Subject) -> _Found:
    found = subject.results.effects("predicted_effects")
    if not isinstance(found, Scatter):
        reasons = " ".join(subject.results.reasons("predicted_effects"))
        return _Found("not tried", reasons) if reasons else _not_tried(_ANALYZE)
    r = found.notes["direct"]["r"]
    if r is None or math.isnan(r):
        return _Found("not tried", "Unknown: removals have no spread.")
    outcome = "passed" if r >= PREDICTS else "in doubt" if r >= HARDLY else "failed"
    answer = {"passed": "Yes", "in doubt": "Roughly", "failed": "No"}[outcome]
    says = f"{answer}: a neuron's share in it and what is lost without it agree to {rounded(r, 2)} (1 is perfect)."
    return _Found(outcome, says)


# --- how it was made and measured ---


@_check("Did learning run long enough?", "training")
def _long_enough(subject: _Subject) -> _Found:
    run = subject.run
    if not run.history:
        return _Found("not tried", "The folder holds no record of the training steps.")
    if run.cautions:
        return _Found("in doubt", " ".join(map(sentence, run.cautions)))
    steps = len(run.last_attempt)
    if steps < 2 * FEWEST:
        return _Found("not tried", f"Its {steps} steps are too few to tell.")
    return _Found("passed", f"Nothing in the records of its {steps:,} steps speaks against it.")


@_check("Do model, text and target fit together?", "training")
def _inputs(subject: _Subject) -> _Found | None:
    """None if there were no warnings."""
    checked = subject.run.checked
    if checked is None or not checked.warnings:
        return None
    return _Found("in doubt", " ".join(map(sentence, checked.warnings)))


@_check("Was it measured on its own kind of text?", "again")
def _same_text(subject: _Subject) -> _Found | None:
    """None if it was."""
    run = subject.run
    parts = [other_text(run.evaluated_on, run, "evaluated"), other_text(run.analysed_on, run, "analysed")]
    if run.evaluation and run.evaluated_on is None and not run.is_former:
        parts.append("Which text it was evaluated on was not recorded.")
    says = " ".join(filter(None, parts))
    return _Found("in doubt", says) if says else None


def other_text(text: CorpusIdentity | None, run: Run, done: str) -> str:
    """A sentence that a run was evaluated or analysed on another text than its own; empty if it was not."""
    if text is None or text.fingerprint == run.settings.corpus.fingerprint:
        return ""
    return (
        f"It was {done} on the held-out part of ANOTHER TEXT, {text.source} (fingerprint {text.fingerprint}, "
        f"not {run.settings.corpus.fingerprint}), from whose training part the target was made again."
    )
