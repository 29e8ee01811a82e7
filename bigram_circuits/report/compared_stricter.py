"""The section of the comparison page about the stricter tests: of each run, and whether two compute the same."""

from __future__ import annotations

from collections.abc import Sequence

from bigram_circuits.experiments.comparison import KL, Compared, Comparison, R
from bigram_circuits.experiments.same_function import SameFunction
from bigram_circuits.experiments.worst_case import judged_steps, worst_case_left
from bigram_circuits.measures.words import listed, percent, rounded
from bigram_circuits.report.blocks import Block, Content, Numbers
from bigram_circuits.report.compared_words import section, value_range
from bigram_circuits.report.refuting import RIVALS, SAME_FUNCTION, WORST_CASE

_MEANINGS = {
    "left in the worst case": "Of its own information, what is left when a search sets what was dropped as badly as it "
    "can: at least 90% if the rest does not matter.",
    "rivals": "Other masks of its size that do the same and are not the same.",
    "r over seeds": "The range of r with the target over seeds of one recipe.",
    "KL over seeds": "The range of KL from the target over seeds of one recipe.",
    "verdict": "Whether each tells at least 90% of what the other takes from the context.",
    "least kept": "Of its own information, what either keeps at least with a part of the other that it needs.",
    "agreement": "Of what either takes from the context, what the other tells at least.",
}


@section("stricter", "Harder tests")
def stricter(comparison: Comparison) -> Content:
    """What is left in the worst case, rivals, spread over seeds, and which pairs compute the same."""
    items, pairs = [one for one in comparison.items if one.run], _compared(comparison.items)
    untested = [one.name for one in items if one.stricter.worst_case is None and not _refused(one)]
    unrivalled = [one.name for one in items if one.stricter.rivals is None and "rivals" not in one.stricter.left_out]
    missing = [f"the worst case of {listed(untested)} ({WORST_CASE})"] if untested else []
    missing += [f"rivals of {listed(unrivalled)} ({RIVALS})"] if unrivalled else []
    missing += [] if pairs else [f"whether two of them compute the same ({SAME_FUNCTION})"]
    says = [f"Not tried: {'; '.join(missing)}." if missing else ""]
    if not items:
        return Content(["These tests are of runs, and none of them is one."])
    blocks: list[Block] = []
    if len(untested) < len(items) or len(unrivalled) < len(items):
        columns = ["", "left in the worst case", "rivals", "r over seeds", "KL over seeds"]
        rows = [
            [one.name, _worst(one), _rivals(one), *(_over_seeds(comparison, one, key) for key in (R, KL))]
            for one in items
        ]
        blocks.append(Numbers("Harder tests of each", columns, rows, is_open=True, meanings=_MEANINGS))
    if pairs:
        says.append(
            "Two masks compute the same if each tells nearly all that the other takes from the context, on held-out "
            "text and out of distribution, whatever weights they share."
        )
        rows = [
            [*names, one.verdict, percent(one.agreement), percent(one.jaccard), percent(one.spliced)]
            for names, one in pairs.items()
        ]
        columns = ["", "with", "verdict", "agreement", "Jaccard", "least kept"]
        blocks.append(Numbers("Which compute the same", columns, rows, is_open=True, meanings=_MEANINGS))
    return Content(says, blocks)


def _compared(items: Sequence[Compared]) -> dict[tuple[str, str], SameFunction]:
    """The stored comparisons of two of them, by their names; of which masks they are is told by their checksums."""
    names = {one.subnetwork.checksum: one.name for one in reversed(items)}
    found: dict[tuple[str, str], SameFunction] = {}
    for one in items:
        for same in one.stricter.same.values():
            first, second = map(names.get, same.behaviour.notes["masks"])
            if first is not None and second is not None and (second, first) not in found:
                found.setdefault((first, second), same)
    return found


def _refused(one: Compared) -> bool:
    return "worst_case" in one.stricter.left_out


def _worst(one: Compared) -> str:
    curves = one.stricter.worst_case
    if curves is None:
        return "means nothing: does something else than the full model" if _refused(one) else "not tried"
    left, steps = worst_case_left(curves), judged_steps(curves)
    says = f"{percent(max(left[steps], 0.0))} after {steps} steps"
    return f"{says}, but it does something else than the full model" if curves.notes["forced"] else says


def _rivals(one: Compared) -> str:
    found = one.stricter.rivals
    if found is None:
        return "left out" if "rivals" in one.stricter.left_out else "not tried"
    if found.rivals:
        shared = [found.measured.get("jaccard")[name] for name in found.rivals]
        return f"{len(found.rivals)}, sharing {value_range(shared, percent)}"
    return "undecided" if "unclear" in map(found.finding, found.measured.names) else "none found"


def _over_seeds(comparison: Comparison, one: Compared, key: str) -> str:
    spread = next((group.spreads.get(key) for group in comparison.repetitions if one.name in group.members), None)
    return "one seed" if spread is None else value_range([spread.low, spread.high], rounded)
