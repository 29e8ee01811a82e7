"""What would refute the finding of a run, and whether it did: a check for every attempt, from what is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from bigram_circuits.experiments.controls import RANDOM_BLOCKS, RANDOM_MODEL, SHUFFLED
from bigram_circuits.experiments.falsification import Falsification, load_falsification
from bigram_circuits.experiments.verdicts import FOUND, NONSENSE
from bigram_circuits.measures.results import Scatter
from bigram_circuits.measures.words import listed, rounded, sentence
from bigram_circuits.report.blocks import Check
from bigram_circuits.report.circuit import HARDLY, PREDICTS
from bigram_circuits.report.results import Results
from bigram_circuits.runs import CorpusIdentity, Run
from bigram_circuits.runs.ending import FEWEST

_OUTCOMES = {"stands": "passed", "weakened": "in doubt", "refuted": "failed"}
"""What comes of a check, by what a control does to the finding."""
_ANSWERS = {"stands": "No", "weakened": "In part", "refuted": "Yes"}
"""Likewise, the answer to whether the control does as well."""
EVALUATE = "bigram-circuits evaluate RUN"
"""The command that measures how faithful a run is."""
_FALSIFY, _ANALYZE = "bigram-circuits find --falsify", "bigram-circuits analyze RUN"
_TRY = "What tries it:"


def checks(run: Run, results: Results) -> list[Check]:
    """Every check of a run, whether or not it was tried."""
    tried = load_falsification(run.path / "falsify", run)
    found = [
        _random(run),
        _untrained(tried),
        _nonsense(tried),
        _seeds(run, tried),
        _capacity(run),
        _needed(run),
        _predicts(results),
        _long_enough(run),
        _inputs(run),
        _same_text(run),
    ]
    return [one for one in found if one]


def _random(run: Run) -> Check:
    asked = f"Would random or the {_strongest(run)} do as well?"
    evaluation = run.evaluation
    known = {} if evaluation is None else {name: evaluation.beats(name) for name in ("random", "magnitude")}
    known = {name: beaten for name, beaten in known.items() if beaten is not None}
    if evaluation is None or not known:
        return Check(asked, "not tried", _TRY, "controls", EVALUATE)
    rows = dict(evaluation.rows())
    key, what = ("cross_entropy", "a loss of") if evaluation.by_loss else ("surprisal_correlation", "an agreement of")
    values = {name: rounded(rows[name][key], 2) for name in (*known, "subnetwork")}
    names = {"random": f"random {run.mask.units} reach {what} {{}}", "magnitude": f"the {_strongest(run)} {{}}"}
    parts = [names[name].format(values[name]) for name in known]
    says = f"{_no(all(known.values()))}: {listed(parts)}, these {values['subnetwork']}."
    return Check(asked, "passed" if all(known.values()) else "failed", says, "controls")


def _no(is_refuted: bool) -> str:
    return "No" if is_refuted else "Not excluded"


def _strongest(run: Run) -> str:
    return "largest weights" if run.mask.units == "weights" else "strongest nodes"


def _untrained(tried: Falsification | None) -> Check:
    names = {RANDOM_BLOCKS: "untrained layers", SHUFFLED: "shuffled weights", RANDOM_MODEL: "an untrained model"}
    return _control("Would a model that learned nothing do as well?", names, tried)


def _nonsense(tried: Falsification | None) -> Check:
    return _control("Could a mask fit any target?", {NONSENSE: "a meaningless target"}, tried)


def _control(asked: str, names: Mapping[str, str], tried: Falsification | None) -> Check:
    """The worst of some controls that the recipe was run on, at equal size."""
    judged = {} if tried is None else {one.control: one.finding for one in tried.judged}
    judged = {name: judged[name] for name in names if name in judged}
    if tried is None or not judged:
        return Check(asked, "not tried", _TRY, "refuted", _FALSIFY)
    told = tried.controls.get("context_told")
    is_told = not math.isnan(told[FOUND])
    values = told if is_told else tried.controls.get("cross_entropy")
    words: Callable[[float], str] = _whole if is_told else _nats
    parts = [f"{names[name]} {words(values[name])}" for name in judged]
    what = "of what the context tells, it gets" if is_told else "its cross-entropy is"
    worst = max(judged.values(), key=list(_OUTCOMES).index)
    says = f"{_ANSWERS[worst]}: {what}, {listed(parts)}; what was found, {words(values[FOUND])}."
    return Check(asked, _OUTCOMES[worst], says, "refuted")


def _whole(share: float) -> str:
    return "undefined" if math.isnan(share) else f"{100 * share:z.0f}%".replace("-", "\N{MINUS SIGN}")


def _nats(value: float) -> str:
    return f"{rounded(value, 2)} nats"


def _seeds(run: Run, tried: Falsification | None) -> Check:
    asked = f"Do other seeds find the same {run.mask.units}?"
    if tried is None:
        return Check(asked, "not tried", _TRY, "refuted", _FALSIFY)
    finding = tried.judged[-1].finding
    pairs = [f"{pair}: all" for pair in tried.seeds.notes["pairs"]]
    if not pairs:
        return Check(
            asked, _OUTCOMES[finding], "No two seeds kept anything, so there is nothing to compare.", "refuted"
        )
    both, chance, jaccard = (tried.seeds.get(key) for key in ("intersection", "expected", "jaccard"))
    shares = " to ".join(dict.fromkeys(_whole(end(jaccard[pair] for pair in pairs)) for end in (min, max)))
    times = min(both[pair] / chance[pair] if chance[pair] else math.nan for pair in pairs)
    answer = "Yes" if finding == "stands" else "Not clearly"
    says = f"{answer}: two seeds share {shares} of what either keeps, {times:,.0f} times as much as by chance."
    return Check(asked, _OUTCOMES[finding], says, "refuted")


def _capacity(run: Run) -> Check | None:
    """Whether the mask could hold the answer; None for targets whose bits cannot be counted."""
    found = run.evaluation.mask_capacity if run.evaluation else None
    if found is None:
        return None
    asked = "Could the choice itself hold the answer?"
    if not found.table_bits:
        return Check(asked, "passed", "There is nothing to hold: a constant prediction is as good.", "controls")
    answer = "No" if found.is_far_fewer else "Yes" if found.ratio >= 1 else "Not excluded"
    says = f"{answer}: naming the {run.mask.units} kept takes {found.mask_bits:,.0f} bits, an equally good table "
    says += f"{found.table_bits:,.0f}."
    return Check(asked, "passed" if found.is_far_fewer else "in doubt", says, "controls")


def _needed(run: Run) -> Check:
    asked = "Can the model do without them?"
    evaluation = run.evaluation
    if evaluation is None or evaluation.need is None:
        return Check(asked, "not tried", _TRY, "controls", EVALUATE)
    rise, random = evaluation.necessity
    outcome, answer = _NEED.get(evaluation.need, ("in doubt", "To some degree"))
    says = f"{answer}: without them its loss {_moves(rise)}, without as many random ones it {_moves(random)}."
    return Check(asked, outcome, says, "controls")


_NEED = {"necessary": ("passed", "No"), "fairly necessary": ("passed", "Hardly"), "NOT necessary": ("failed", "Yes")}
"""The outcome and the answer for words of `Evaluation.need`."""


def _moves(rise: float) -> str:
    return f"{'rises' if rise >= 0 else 'falls'} by {rounded(abs(rise), 2)}"


def _predicts(results: Results) -> Check:
    asked = "Does the picture predict what removals do?"
    found = results.effects("predicted_effects")
    r = found.notes["direct"]["r"] if isinstance(found, Scatter) else None
    if r is None or math.isnan(r):
        reasons = " ".join(results.reasons("predicted_effects"))
        return Check(asked, "not tried", reasons or _TRY, "predicts", "" if reasons else _ANALYZE)
    outcome = "passed" if r >= PREDICTS else "in doubt" if r >= HARDLY else "failed"
    answer = {"passed": "Yes", "in doubt": "Roughly", "failed": "No"}[outcome]
    says = f"{answer}: a neuron's share in it and what is lost without that neuron agree to {rounded(r, 2)}."
    return Check(asked, outcome, says, "predicts")


def _long_enough(run: Run) -> Check:
    asked = "Did learning run long enough?"
    if not run.history:
        return Check(asked, "not tried", "The folder holds no record of the training steps.", "training")
    if run.cautions:
        return Check(asked, "in doubt", " ".join(map(sentence, run.cautions)), "training")
    steps = len(run.last_attempt)
    if steps < 2 * FEWEST:
        return Check(asked, "not tried", f"Its {steps} steps are too few to tell.", "training")
    says = f"Nothing in the records of its {steps:,} steps speaks against it."
    return Check(asked, "passed", says, "training")


def _inputs(run: Run) -> Check | None:
    """Warnings of the inputs; None if there were none."""
    if run.checked is None or not run.checked.warnings:
        return None
    says = " ".join(map(sentence, run.checked.warnings))
    return Check("Do model, text and target fit together?", "in doubt", says, "training")


def _same_text(run: Run) -> Check | None:
    """Whether it was measured on another text than its own; None if it was not."""
    parts = [other_text(run.evaluated_on, run, "evaluated"), other_text(run.analysed_on, run, "analysed")]
    if run.evaluation and run.evaluated_on is None and not run.is_former:
        parts.append("Which text it was evaluated on was not recorded.")
    says = " ".join(filter(None, parts))
    return Check("Was it measured on its own kind of text?", "in doubt", says, "again") if says else None


def other_text(text: CorpusIdentity | None, run: Run, done: str) -> str:
    """A sentence that a run was evaluated or analysed on another text than its own; empty if it was not."""
    if text is None or text.fingerprint == run.settings.corpus.fingerprint:
        return ""
    return (
        f"It was {done} on the held-out part of ANOTHER TEXT, {text.source} (fingerprint {text.fingerprint}, "
        f"not {run.settings.corpus.fingerprint}), from whose training part the target was made again."
    )
