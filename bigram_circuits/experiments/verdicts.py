"""What the attempts to refute a finding show: pure functions of what was measured.

A control refutes a finding if, at equal size, the subnetwork is not shown to recover more of the context's information
than the control does: the paired 95% interval of the gap does not lie above 0. It weakens the finding if there is such
a gap, but the control recovers more than half of what the subnetwork recovers, or another seed shows no gap.

The stricter tests never refute a finding, which is that what is kept is enough: they weaken what is claimed beyond it.

- The worst case, if less than 90% of the mask's own information is left: what is kept is enough only with the rest
  exactly absent.
- Rivals, if there is one: what is kept is enough, and so is something else, so it is not *the* circuit.
- What other seeds compute, if one of them computes something else: how this mask does it is a finding about this mask.
  (Masks of other seeds that are as faithful to the target may still differ in all that the target leaves open, so this
  does not refute that either of them is enough.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bigram_circuits.experiments.controls import RANDOM_BLOCKS, RANDOM_MODEL, SHUFFLED
from bigram_circuits.experiments.rivals import Rivals
from bigram_circuits.experiments.same_function import SameFunction
from bigram_circuits.experiments.worst_case import AGAINST, HOLDS, UNDEFINED, worst_case_finding, worst_case_words
from bigram_circuits.measures.results import Curves, Effects
from bigram_circuits.measures.statistics import holm, size_reaching
from bigram_circuits.measures.words import listed, percent

FOUND, TRAINED, NONSENSE = "found", "trained", "nonsense target"
"""The subnetwork, the model whose it is, and the control with another target."""
RANDOM_NODES = "random nodes"
"""The control of a circuit that has as many nodes at every hook point."""
_FORMER_SHARE = 0.95  # in results of versions that did not compare at equal size, a control refutes the finding if it
_FORMER_SIZE = 2.0  # recovers this share of what the subnetwork recovers, with at most this many times its weights
_HALF = 0.5  # a control that recovers this share of what the subnetwork recovers weakens the finding
_SURPRISING = 0.05  # a p-value below this is significant


@dataclass(frozen=True)
class Judged:
    """What one control shows."""

    control: str
    """Its name."""
    says: str
    """What it shows, in a sentence or two."""
    finding: str
    """`refuted`, `weakened` or `stands`."""


def seed_name(seed: int, of: str | None = None) -> str:
    """The name of an attempt with another seed, on the trained model or on one of the others."""
    return f"seed {seed}" if of is None else f"{of}, seed {seed}"


def free_name(of: str) -> str:
    """The name of an attempt without a penalty on kept weights."""
    return f"{of}, no penalty"


def sized_name(of: str, kept: int, units: str = "weights") -> str:
    """The name of an attempt at another size than the subnetwork's."""
    return f"{of} at {kept} {units}"


def seeds_of(names: Iterable[str]) -> list[str]:
    """Of the names of attempts, that of the subnetwork and those of the other seeds on the trained model."""
    return [name for name in names if name == FOUND or name.startswith("seed ")]


def size_ratio(curves: Curves, fraction: float) -> tuple[float, float]:
    """How many times the subnetwork's weights re-initialised blocks need for its KL: the ends of a range.

    Between two measured sizes, KL is interpolated over log(size). Out of their range, the ends are (0, smallest size)
    or (largest size, inf), in times the subnetwork's. (At equal KL, cross-entropies are equal too.)
    """
    own = float(curves.get("cross_entropy", TRAINED)[_at(curves, fraction)])
    sizes, losses = curves.get("fraction", RANDOM_BLOCKS), curves.get("cross_entropy", RANDOM_BLOCKS)
    low, high = size_reaching(sizes, losses, own)
    return low / fraction, high / fraction


def _at(curves: Curves, fraction: float) -> int:
    return int(np.argmin(np.abs(np.array(curves.points, dtype=float) - fraction)))


# --- the controls ----------------------------------------------------------------------------------------------------

_MEANS = {
    (RANDOM_BLOCKS, "refuted"): "Untrained blocks can be masked to do as well, "
    "so the mask is no evidence of what the trained blocks have learned.",
    (RANDOM_BLOCKS, "weakened"): "Untrained blocks can be masked to do much of it, so that such a mask exists shows "
    "nothing; what the trained weights add is the gap.",
    (RANDOM_BLOCKS, "stands"): "The result depends on trained blocks: untrained ones cannot be masked to match it.",
    (RANDOM_MODEL, "refuted"): "A model that learned nothing can be masked to do as well, "
    "so the mask is no evidence of what was learned.",
    (RANDOM_MODEL, "weakened"): "A model that learned nothing can be masked to do much of it, so that such a mask "
    "exists shows nothing; what training added is the gap.",
    (RANDOM_MODEL, "stands"): "The result depends on training: an untrained model cannot be masked to match it.",
    (
        SHUFFLED,
        "refuted",
    ): "The trained weights in random places can be masked to do as well, so the mask is no evidence "
    "of what training put where.",
    (
        SHUFFLED,
        "weakened",
    ): "The trained weights in random places can be masked to do much of it; what their places add is the gap.",
    (
        SHUFFLED,
        "stands",
    ): "The result depends on which weight is where: in random places they cannot be masked to match it.",
    (RANDOM_NODES, "refuted"): "Nodes drawn at random do as well, so which nodes are kept is no finding.",
    (RANDOM_NODES, "weakened"): "Nodes drawn at random do much of it; what the choice of nodes adds is the gap.",
    (RANDOM_NODES, "stands"): "The result depends on which nodes are kept: as many random ones do not match it.",
    (NONSENSE, "refuted"): "Masks can make this model reproduce a meaningless target as well, "
    "so reproducing the real one is no evidence.",
    (NONSENSE, "weakened"): "Masks can make this model reproduce much of a meaningless target.",
    (NONSENSE, "stands"): "Masks cannot make this model reproduce an arbitrary target.",
}
_WHEN = {
    RANDOM_BLOCKS: "On the model with re-initialised blocks",
    RANDOM_MODEL: "On the model with everything re-initialised",
    SHUFFLED: "On the model with the weights of each matrix shuffled",
    RANDOM_NODES: "With random nodes in its place, as many at every hook point",
    NONSENSE: "For a nonsense target",
}


def judge_controls(controls: Effects, gaps: Effects | None, curves: Curves | None) -> list[Judged]:
    """What each control shows; without gaps, for results of versions that did not compare at equal size."""
    judged = []
    for name, when in _WHEN.items():
        if name not in controls.names:
            continue
        if gaps is None or curves is None:
            finding = _former_finding(controls, name)
            says = "They were compared at one penalty, not at one size: find --falsify compares them at equal size."
        else:
            finding = _finding(controls, gaps, name)
            says = _gap_words(gaps, name)
            if name == RANDOM_BLOCKS:
                ratio = size_ratio(curves, controls.get("fraction")[FOUND])
                says += _other_sizes(gaps, _units(controls)) + _ratio_words(ratio, controls)
        both = f"{when}, {_mask_words(controls, name)}; on the trained model, {_mask_words(controls, FOUND)}."
        if name == RANDOM_BLOCKS and not math.isnan(controls.get("context_told")[FOUND]):
            both = f"Recovered of the context's information about the next token: {both[0].lower()}{both[1:]}"
        judged.append(Judged(name, f"{both} {says} {_MEANS[name, finding]}", finding))
    return judged


def _finding(controls: Effects, gaps: Effects, name: str) -> str:
    """What a control of the subnetwork's size does to the finding: `refuted`, `weakened` or `stands`."""
    is_told = not math.isnan(gaps.get("context_told_gap")[name])
    at = _place(gaps, "context_told_gap" if is_told else "kl_gap")
    if not gaps.low[at, gaps.names.index(name)] > 0:
        return "refuted"
    others = [gaps.values[at, gaps.names.index(other)] for other in _seeds_of_gap(gaps, name)]
    is_half = _is_share(_HALF, *_recovered(controls, name))
    return "weakened" if is_half or any(not gap > 0 for gap in others) else "stands"


def _former_finding(controls: Effects, name: str) -> str:
    """The same for a control that was compared at one penalty, with another size."""
    fraction, (other, own) = controls.get("fraction"), _recovered(controls, name)
    if _is_share(_FORMER_SHARE, other, own) and 0 < fraction[name] <= _FORMER_SIZE * fraction[FOUND]:
        return "refuted"
    return "weakened" if _is_share(_HALF, other, own) and fraction[name] > 0 else "stands"


def _recovered(controls: Effects, name: str) -> tuple[float, float]:
    """What a control and the subnetwork recover, in the same unit."""
    told, cross_entropy = controls.get("context_told"), controls.get("cross_entropy")
    if math.isnan(told[FOUND]) or math.isnan(told[name]):  # the target has no entropy, or its context is uninformative
        return cross_entropy[FOUND] / cross_entropy[name], 1.0
    return told[name], told[FOUND]


def _is_share(share: float, other: float, own: float) -> bool:
    """Whether `other` is at least this share of `own`, or, where `own` is not positive, at least `own`."""
    return other >= (share * own if own > 0 else own)


def _mask_words(controls: Effects, name: str) -> str:
    """How many weights an attempt keeps, and how faithful it is."""
    keys = ("fraction", "context_told", "kl", "surprisal_correlation", "cross_entropy")
    kept, told, kl, r, cross_entropy = (controls.get(key)[name] for key in keys)
    details = f"cross-entropy {cross_entropy:.3f} nats" if math.isnan(told) else f"KL {kl:z.3f} nats"
    details += "" if math.isnan(r) else f", r {r:.3f}"
    recovers = "" if math.isnan(told) else f" recover {100 * told:z.0f}%"
    return f"{100 * kept:.2f}% of the {_units(controls)}{recovers} ({details})"


def _units(controls: Effects) -> str:
    """What is kept or dropped: `weights` or `nodes`."""
    return str(controls.notes.get("units", "weights"))


def _gap_words(gaps: Effects, name: str) -> str:
    """The gap with its interval, and its range over seeds."""
    at = gaps.names.index(name)
    kl, low, high = (part[_place(gaps, "kl_gap"), at] for part in (gaps.values, gaps.low, gaps.high))
    words = f"The gap is {kl:z.3f} nats (95% interval {low:z.3f} to {high:z.3f}"
    told = gaps.get("context_told_gap")[name]
    words += "" if math.isnan(told) else f"; {100 * told:z.1f} points of the information"
    seeds = [gaps.get("kl_gap")[other] for other in (name, *_seeds_of_gap(gaps, name))]
    if len(seeds) > 1:
        words += f"; over {len(seeds)} seeds {min(seeds):z.3f} to {max(seeds):z.3f}"
    return f"{words})."


def _place(gaps: Effects, quantity: str) -> int:
    return gaps.quantities.index(gaps.quantity(quantity))


def _seeds_of_gap(gaps: Effects, name: str) -> list[str]:
    return [one for one in gaps.names if one.startswith(f"{name}, seed ")]


def _other_sizes(gaps: Effects, units: str) -> str:
    """The gaps between trained and re-initialised blocks at other sizes."""
    gap, fraction = gaps.get("kl_gap"), gaps.get("fraction")
    others = [name for name in gaps.names if name.startswith(f"{RANDOM_BLOCKS} at ")]
    parts = [f"{gap[name]:z.3f} nats at {100 * fraction[name]:.2f}% of the {units}" for name in others]
    return f" At other sizes it is {listed(parts)}." if parts else ""


def _ratio_words(ratio: tuple[float, float], controls: Effects) -> str:
    low, high = ratio
    noun = controls.notes.get("noun", "subnetwork")
    times = f"{high:.1f} times" if low == high else f"more than {low:.1f} times" if low else f"at most {high:.1f} times"
    return f" To reach the {noun}'s KL, re-initialised blocks need {times} its {_units(controls)}."


def ceiling_words(controls: Effects) -> str:
    """What trained and untrained models reach without a penalty on kept weights; empty if it was not tried."""
    whose = {TRAINED: "on the trained model"} | {of: f"with {of}" for of in (RANDOM_BLOCKS, RANDOM_MODEL)}
    parts = [
        f"{words}, {_mask_words(controls, name)}"
        for of, words in whose.items()
        if (name := free_name(of)) in controls.names
    ]
    return f"The ceiling, without a penalty on kept {_units(controls)}: {'; '.join(parts)}." if parts else ""


# --- the seeds -------------------------------------------------------------------------------------------------------


def judge_seeds(controls: Effects, seeds: Effects) -> Judged:
    """Whether seeds keep the same weights, or nodes, more than chance would have it."""
    names = seeds_of(controls.names)
    r, kept = (np.array([controls.get(key)[name] for name in names]) for key in ("surprisal_correlation", "fraction"))
    shares = list(dict.fromkeys(f"{100 * share:.2f}%" for share in (kept.min(), kept.max())))
    spread = f"Across {len(names)} seeds, {' to '.join(shares)} of the {_units(controls)} are kept"
    if not np.isnan(r).all():
        spread += f", with r from {np.nanmin(r):.3f} to {np.nanmax(r):.3f}"
    empty: Sequence[str] = seeds.notes["kept_nothing"]
    if empty:
        return Judged("other seeds", f"{spread}; seeds that keep nothing: {', '.join(empty)}.", "refuted")
    whole = [f"{pair}: all" for pair in seeds.notes["pairs"]]
    logs = holm([seeds.get("log10_p")[pair] * math.log(10) for pair in whole])
    times = np.array([seeds.get("intersection")[pair] / seeds.get("expected")[pair] for pair in whole])
    jaccard = np.array([seeds.get("jaccard")[pair] for pair in whole])
    refutes = not max(logs) < math.log(_SURPRISING)
    verdict = (
        f"not significantly more for every pair: which {_units(controls)} are kept is an accident of the seed."
        if refutes
        else "significant for every pair (p < 0.05, exact null, Holm)."
    )
    return Judged(
        "other seeds",
        f"{spread}. Overlap of pairs of seeds: Jaccard {100 * jaccard.min():.0f}% to {100 * jaccard.max():.0f}%, "
        f"{times.min():.1f} to {times.max():.1f} times chance, {verdict}",
        "refuted" if refutes else "stands",
    )


# --- the stricter tests ----------------------------------------------------------------------------------------------

WORST_CASE, RIVALS, OTHER_FUNCTION = "worst case", "rivals", "what other seeds compute"
"""What the judgements of the stricter tests are called."""
SEED = "seed-"
"""How the names of masks of other seeds begin, among those that a mask is compared with (`same_function`)."""
_STRICTER = {
    (RIVALS, "weakened"): "So what is kept is enough, and so is something else: a statement about single "
    "{units} is one about this mask.",
    (OTHER_FUNCTION, "weakened"): "So how this mask does it is a finding about this mask, not about the model.",
    (OTHER_FUNCTION, "stands"): "So these seeds agree on what is computed.",
}


def judge_worst_case(curves: Curves) -> Judged | None:
    """Whether a mask is enough whatever becomes of what it drops; None if this is not what was measured.

    It was not if the full model does something else than the target (forced), if it was measured against something
    else than what the mask was learned for, or if the mask is no better than the empty one.
    """
    finding = worst_case_finding(curves)
    if curves.notes.get("forced") or AGAINST in curves.notes or finding == UNDEFINED:
        return None
    return Judged(WORST_CASE, worst_case_words(curves), "stands" if finding == HOLDS else "weakened")


def judge_rivals(found: Rivals) -> Judged:
    """Whether other masks of the same size do the same."""
    finding = "weakened" if found.rivals else "stands"
    means = _STRICTER.get((RIVALS, finding), "").format(units=found.masks[0].units)
    return Judged(RIVALS, f"{found.verdict} {means}".strip(), finding)


def judge_functions(same: Mapping[str, SameFunction]) -> Judged | None:
    """Whether masks of other seeds compute the same; None if none was compared."""
    seeds = [one for name, one in same.items() if name.startswith(SEED)]
    if not seeds:
        return None
    others = [one for one in seeds if one.verdict == "other function"]
    finding = "weakened" if others else "stands"
    least = max(0.0, min(one.agreement for one in seeds))
    subject = f"Of {len(seeds)} other seed{'s' * (len(seeds) > 1)}, {len(others) or 'none'}"
    words = f"{subject} compute{'s' * (len(others) == 1)} another function (least agreement of predictions with the "
    words += f"mask: {percent(least)})."
    return Judged(OTHER_FUNCTION, f"{words} {_STRICTER[OTHER_FUNCTION, finding]}", finding)
