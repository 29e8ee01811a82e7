"""The section of the comparison page about seeds: of every recipe that was run with several, how much they differ."""

from __future__ import annotations

import math

from bigram_circuits.experiments.comparison import HEADLINES, Comparison, Repetition
from bigram_circuits.measures.words import listed, percent, rounded
from bigram_circuits.report.blocks import Content, Numbers
from bigram_circuits.report.compared_words import few, section, value_range

_COLUMNS = {
    "fraction": "share kept", "surprisal_correlation": "r", "kl": "KL", "cross_entropy": "cross-entropy",
    "mean_surprisal": "loss", "r_of_random": "r of random", "rise_without": "rise without",
}  # fmt: skip


@section("seeds", "How much the seed changes")
def seeds(comparison: Comparison) -> Content:
    """The spread over seeds of each headline number, and the exact overlap of pairs of seeds."""
    repeated = comparison.repetitions
    if not repeated:
        return Content([
            "Not tried: of no recipe are there several seeds. bigram-circuits find --seeds 5 learns with five, and "
            "runs that differ only in their seed may be compared."
        ])  # fmt: skip
    several = {name for one in repeated for name in one.members}
    once = [one.name for one in comparison.items if one.name not in several]
    says = [f"Of one seed alone: {listed(once)}." if once else ""]
    known = [key for key in HEADLINES if any(key in one.spreads for one in repeated)]
    rows = [[one.name, str(one.seeds), *(_cell(one, key) for key in known)] for one in repeated]
    columns = ["", "seeds", *(_COLUMNS[key] for key in known)]
    spread = Numbers("Over seeds: mean, standard deviation, smallest to largest", columns, rows, is_open=True)
    shared = [
        [
            one.name, value_range(one.pairs("jaccard"), percent), value_range(one.times, few),
            rounded(max(one.pairs("log10_p"), default=math.nan), 1),
        ]
        for one in repeated
    ]  # fmt: skip
    columns = ["", "Jaccard of two seeds", "times chance", "largest log10 of p"]
    return Content(says, [spread, Numbers("What two seeds share, with the exact null", columns, shared, is_open=True)])


def _cell(one: Repetition, key: str) -> str:
    if key not in one.spreads:
        return "not measured"
    spread, words = one.spreads[key], percent if key == "fraction" else rounded
    return f"{words(spread.mean)}, sd {words(spread.deviation)}, {words(spread.low)} to {words(spread.high)}"
