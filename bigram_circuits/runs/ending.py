"""Whether learning went on for long enough, and what hardening cost: read from the records of its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bigram_circuits.evaluation import GAP_MATTERS
from bigram_circuits.measures.words import percent
from bigram_circuits.recipe import METHODS, SparsifyConfig
from bigram_circuits.runs.contents import STOPS, Outcome, StepRecord

STILL_FALLING = 0.05
"""Fall of the cross-entropy in nats, from the last tenth of the steps but one to the last, from which more steps would
have lowered it further: a quarter of the KL that good subnetworks of small models have."""
STILL_UNDECIDED = 0.1
"""Undecided gates, as a share of the weights kept, from which the mask is not what was learned."""
FEWEST = 10
"""Steps that are averaged at least; whether a loss still fell is told from twice as many."""
_CLEAR = 3.0  # standard errors by which the cross-entropy must fall, so that batches alone are not the cause


def cautions(history: Sequence[StepRecord], outcome: Outcome, config: SparsifyConfig) -> tuple[str, ...]:
    """What the records of a run warn of, a phrase each: it was too short, or hardening changed what was learned.

    Args:
        history: The records of the last attempt; without any, little can be said.
        outcome: How learning ended.
        config: The recipe.
    """
    gap = outcome.soft_hard.warning if outcome.soft_hard else None
    is_soft = config.hard_from == 1 and not METHODS[config.method].ends_hard  # else the mask itself was learned
    lost = lost_in_hardening(history, outcome) if is_soft else None
    found = (too_short(history, outcome, config.max_steps), gap or lost)
    return tuple(one for one in found if one)


def why_stopped(outcome: Outcome, config: SparsifyConfig) -> str:
    """Say why learning stopped, and from which step its gates were hard if the recipe makes them so: a phrase."""
    why = STOPS[outcome.stopped_because]
    if outcome.stopped_because == "planned" and config.soft_steps is not None:
        return f"{why}, with hard gates from step {config.soft_steps:,} on"
    return why


def too_short(history: Sequence[StepRecord], outcome: Outcome, max_steps: int) -> str | None:
    """Say how a run shows that it was too short for its model, and what to try; None if it does not.

    It does if it reached the maximum number of steps with gates undecided, or if the cross-entropy was still falling
    when it stopped. The first sign alone would not do: gates harden on a schedule that `max_steps` sets, so they are
    decided in time however short a run is.
    """
    if not history:
        return None
    signs, last = [], history[-1]
    if outcome.stopped_because == "max_steps" and last.undecided > STILL_UNDECIDED * last.fraction:
        signs.append(f"it ended with {percent(last.undecided)} of the gates undecided")
    fall, steps = _fall([record.cross_entropy for record in history])
    if fall is not None:
        signs.append(f"the cross-entropy was still falling, by {fall:.2f} nats in the last {steps} steps")
    if not signs:
        return None
    what, more = " and ".join(signs), f"try more steps (--max-steps, here {max_steps:,}; or --effort thorough)"
    return f"the run was too short for its model: {what}; {more}"


def _fall(values: Sequence[float]) -> tuple[float | None, int]:
    """By how much a series clearly falls from its second-last tenth to its last, and how many steps both have."""
    n = max(len(values) // 10, min(FEWEST, len(values) // 2))
    if n < 2:
        return None, 2 * n
    ended = np.array(values[-2 * n :])
    before, after = ended.reshape(2, n).mean(1)
    error = float(np.diff(ended).std(ddof=1)) / math.sqrt(n)  # of the fall: batches differ by diff / sqrt(2)
    fall = float(before - after)
    return (fall if fall >= STILL_FALLING and fall > _CLEAR * error else None), 2 * n


def lost_in_hardening(history: Sequence[StepRecord], outcome: Outcome) -> str | None:
    """Say how much worse the mask is than the soft gates were at their best, from `GAP_MATTERS` on; else None.

    More steps alone need not help: they let the penalty close more gates. Which steps had the best soft gates is told
    by the mean cross-entropy over 10 steps.
    """
    if outcome.soft_hard is None or len(history) < FEWEST:
        return None
    means = np.convolve([record.cross_entropy for record in history], np.full(FEWEST, 1 / FEWEST), "valid")
    best = int(means.argmin())
    there, lost = history[best + FEWEST - 1], outcome.soft_hard.hard - float(means[best])
    if lost < GAP_MATTERS:
        return None
    return (
        f"hardening cost {lost:.2f} nats: the mask's cross-entropy is {outcome.soft_hard.hard:.2f}, that of the soft "
        f"gates was {means[best]:.2f} around step {there.step}, with {percent(there.undecided)} of them undecided and "
        f"{percent(there.fraction)} kept; a longer run that learns with hard gates loses less (--effort "
        "thorough), and a smaller penalty (--sparsity-weight) keeps more"
    )
