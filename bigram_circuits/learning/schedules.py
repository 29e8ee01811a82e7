"""Schedules and stability checks: pure functions of the step number and the records of earlier steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bigram_circuits.runs import StepRecord

_FALLS = 0.3  # share of the steps over which the share due falls
_STEERED = 3.0  # the penalty's weight stays within this factor of its first value
_EXPLODED = 10.0  # times the larger of the first step's CE and the CE of uniform guessing


def share_due(step: int, share: float | None, max_steps: int) -> float | None:
    """The share of gated weights to be open at a step; None if `share`, the share to reach, is None.

    It falls geometrically from one half to `share` over the first 30% of the steps; a share of at least one half is
    constant.
    """
    if share is None or share >= 0.5:
        return share
    return 0.5 * (share / 0.5) ** min(1.0, step / (_FALLS * max_steps))


def has_fallen(step: int, max_steps: int) -> bool:
    """Whether the share due has fallen to the share to reach."""
    return step >= _FALLS * max_steps


def head_start(step: int, first_score: float | int, max_steps: int) -> float:
    """How far below the threshold for the share due the gates open at a step.

    It falls from the first score to 0 while the share due falls, so that a first score means the same with and without
    a share to reach: without it, a threshold among scores that are all the same would make every gate one half.
    """
    return float(first_score) * max(0.0, 1 - step / (_FALLS * max_steps))


def next_sparsity_weight(history: Sequence[StepRecord], first: float | int) -> float | int:
    """The penalty's weight for the step after `history`: `first`, or adjusted if there is a share to reach.

    With a share to reach, gates are open above a threshold that keeps exactly the share due. The weight is adjusted to
    bring this threshold to 0: at every step it is multiplied by (share of scores above 0 / share due) ** 0.1, clipped
    to 0.9 to 1.1, and it stays between a third of `first` and three times `first`. Beyond that range the penalty,
    rather than the loss, would decide which weights are kept.
    """
    last = history[-1] if history else None
    if last is None or last.due is None:
        return first
    above_zero, weight = last.above_zero or 0.0, first if last.sparsity_weight is None else last.sparsity_weight
    change = (max(above_zero, 0.1 * last.due) / last.due) ** 0.1
    return min(max(weight * min(max(change, 0.9), 1.1), first / _STEERED), first * _STEERED)


def explosion(record: StepRecord, history: Sequence[StepRecord], guessing: float) -> str | None:
    """Describe a loss that is not finite, or a CE far above both the first step's and that of guessing; else None."""
    loss = record.cross_entropy + (record.sparsity_weight or 0.0) * (record.penalty or 0.0)
    first = history[0].cross_entropy if history else math.inf
    if not math.isfinite(loss) or record.cross_entropy > _EXPLODED * max(first, guessing):
        return f"the loss is {loss:.4g}"
    return None


def is_unstable(cross_entropies: Sequence[float], recovery_steps: int, *, few: bool = False) -> bool:
    """Whether a run's CE jumped and did not recover in time (Chang and Bergen 2025).

    A jump is a step whose CE exceeds the mean of the 10 before it by more than 0.25 nats or 25%. It recovered if a
    later step, at least `recovery_steps` before the end, is back below that limit. Where the CE is so small that
    batches differ by more than 25%, as on a solved task, four standard deviations of those 10 steps replace the 25%;
    with `few` predictions in a batch, such as one for each prompt, they replace both where they are larger.
    """
    values = np.asarray(cross_entropies)
    for step in range(10, len(values)):
        before, noise = values[step - 10 : step].mean(), values[step - 10 : step].std(ddof=1)
        rise = min(0.25, max(0.25 * before, 4 * noise))
        limit = before + (max(rise, 4 * noise) if few else rise)
        if values[step] > limit and not (values[step + 1 : len(values) - recovery_steps] <= limit).any():
            return True
    return False
