"""What changes from step to step: pure functions of the step's number and of the records before it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bigram_circuits.runs import StepRecord

_STEERED = 3.0  # times its first value, or a third of it: how far the penalty's weight goes for a share to reach
_EXPLODED = 10.0  # times the larger of the first step's CE and that of guessing among all tokens


def share_due(step: int, share: float | None, max_steps: int) -> float | None:
    """The share of gates to be open at a step, where there is a share to reach.

    It falls from one half to `share` in equal factors over the first 30% of the steps; a share of more than one half is
    due from the start.
    """
    if share is None or share >= 0.5:
        return share
    return 0.5 * (share / 0.5) ** min(1.0, step / (0.3 * max_steps))


def next_sparsity_weight(history: Sequence[StepRecord], first: float | int) -> float | int:
    """The penalty's weight for the step after `history`: `first`, or, with a share to reach, steered towards it.

    Gates are open above a threshold that keeps just the share that is due. The weight follows until it is 0: it is
    multiplied by (share of scores above 0 / share due) to the power 0.1, by 0.9 to 1.1 at most, and stays between a
    third of `first` and three times that: beyond, it would decide what is kept, and not the loss.
    """
    last = history[-1] if history else None
    if last is None or last.due is None:
        return first
    above_zero, weight = last.above_zero or 0.0, first if last.sparsity_weight is None else last.sparsity_weight
    change = (max(above_zero, 0.1 * last.due) / last.due) ** 0.1
    return min(max(weight * min(max(change, 0.9), 1.1), first / _STEERED), first * _STEERED)


def explosion(record: StepRecord, history: Sequence[StepRecord], d_vocab: int) -> str | None:
    """In words, a loss that is not finite, or a CE far above both the first step's and that of guessing; else None."""
    loss = record.cross_entropy + (record.sparsity_weight or 0.0) * (record.penalty or 0.0)
    first = history[0].cross_entropy if history else math.inf
    if not math.isfinite(loss) or record.cross_entropy > _EXPLODED * max(first, math.log(d_vocab)):
        return f"the loss is {loss:.4g}"
    return None


def is_unstable(cross_entropies: Sequence[float], recovery_steps: int) -> bool:
    """Whether a run's CE jumped and did not come back in time (Chang and Bergen 2025).

    A jump is a step whose CE exceeds the mean of the 10 before it by more than 0.25 nats or 25%. It came back at a
    later step that does not exceed that mean so, at least `recovery_steps` before the end. Where the CE is so small
    that batches differ by more than 25%, as on a task that is solved, four standard deviations of those 10 count
    instead of the 25%.
    """
    values = np.asarray(cross_entropies)
    for step in range(10, len(values)):
        before, noise = values[step - 10 : step].mean(), values[step - 10 : step].std(ddof=1)
        limit = before + min(0.25, max(0.25 * before, 4 * noise))
        if values[step] > limit and not (values[step + 1 : len(values) - recovery_steps] <= limit).any():
            return True
    return False
