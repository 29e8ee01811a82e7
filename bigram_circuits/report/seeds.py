"""The section about other seeds: a row for each, what they share, how many keep a weight, and what all of them keep."""

from __future__ import annotations

import math

from bigram_circuits.experiments.seeds import CORE, Seeds
from bigram_circuits.measures.words import percent, rounded, span
from bigram_circuits.report.blocks import Content, Numbers
from bigram_circuits.report.results import Results, result_table
from bigram_circuits.report.sections import section
from bigram_circuits.runs import Run

_COLUMNS = {
    "surprisal_correlation": "r", "kl": "KL", "cross_entropy": "cross-entropy", "mean_surprisal": "loss",
    "top1_agreement": "top-1", "context_told": "information", "recovered": "recovered",
    "rise_without": "rise without", "r_of_random": "r of random",
}  # fmt: skip
_MEANINGS = {
    "information": "Share of what the context tells about the next token, by the target, that is recovered.",
    "recovered": "Share of the full model's gain in cross-entropy over the empty one that is kept.",
    "rise without": "How much the full model's next-token loss rises without it, in nats.",
    "r of random": "Agreement with the target of as many at random: the mean of the draws.",
}


@section("seeds", "Do other seeds find the same?")
def seeds(run: Run, results: Results) -> Content:
    """What the same recipe finds with several seeds."""
    several = results.seeds
    if several is None:
        return Content(["Not tried: all numbers are of one seed. bigram-circuits find --seeds 5 learns with five."])
    says = [several.judged.says, several.core_words, several.why]
    tables = [
        result_table(several.overlaps, "overlap between seeds"), result_table(several.runs, "every seed"),
        result_table(several.spread, "spread over seeds"), result_table(several.alone, "the core alone"),
    ]  # fmt: skip
    return Content(says, [_by_seed(several), _by_times(several), _by_pair(several), *tables])


def _by_seed(several: Seeds) -> Numbers:
    """A row for each seed, then the mean and the spread, and the core alone."""
    units, runs = several.core.units, several.runs
    known = [key for key in _COLUMNS if not all(map(math.isnan, runs.get(key).values()))]
    columns = ["", f"{units} kept", "share", *(_COLUMNS[key] for key in known)]
    kept, shares = runs.get("kept"), runs.get("fraction")
    rows = []
    for place, name in enumerate(runs.names):
        cells = []
        for key in known:
            at = runs.quantities.index(runs.quantity(key)), place
            ends = span(float(runs.low[at]), float(runs.high[at]))
            cells.append(f"{rounded(runs.values[at])}{f' ({ends})' if ends else ''}")
        is_it = place == several.seeds.index(several.representative)
        whose = f"{name}, which is analysed" if is_it else name
        rows.append([whose, f"{kept[name]:,.0f}", percent(shares[name]), *cells])
    for statistic in several.spread.quantities:
        one = several.spread.get(statistic.name)
        cells = (rounded(one[key]) for key in known)
        rows.append([statistic.name, f"{one['kept']:,.1f}", percent(one["fraction"]), *cells])
    alone = {key: several.alone.get(key)[CORE] for key in ("kept", "fraction", *known)}
    cells = (rounded(alone[key]) for key in known)
    rows.append(["what all keep, alone", f"{alone['kept']:,.0f}", percent(alone["fraction"]), *cells])
    caption = "Every seed, with 95% intervals over text; their spread; and what all of them keep"
    return Numbers(caption, columns, rows, is_open=True, meanings=_MEANINGS)


def _by_times(several: Seeds) -> Numbers:
    """How many weights exactly so many seeds keep."""
    units, n = several.core.units, len(several.masks)
    found, expected = several.kept_by.get("found"), several.kept_by.get("expected")
    rows = [[f"{j} of {n}", f"{found[j]:,.0f}", f"{expected[j]:,.1f}"] for j in found]
    return Numbers(f"Kept by how many seeds: {units}", ["seeds", units, "by chance"], rows, is_open=True)


def _by_pair(several: Seeds) -> Numbers:
    """What each pair of seeds shares, with the exact null."""
    overlaps = several.overlaps
    columns = ["seeds", "shared", "by chance", "times chance", "Jaccard", "log10 of p"]
    rows = []
    for pair in overlaps.notes["pairs"]:
        at = {key: overlaps.get(key)[f"{pair}: all"] for key in ("intersection", "expected", "jaccard", "log10_p")}
        times = at["intersection"] / at["expected"] if at["expected"] else math.nan
        numbers = [f"{at['intersection']:,.0f}", f"{at['expected']:,.1f}", rounded(times, 1), percent(at["jaccard"])]
        rows.append([pair.replace(",", " and"), *numbers, rounded(at["log10_p"], 1)])
    return Numbers("What two seeds share, with the exact null", columns, rows, is_open=True)
