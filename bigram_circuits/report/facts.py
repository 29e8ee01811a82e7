"""What an evaluation says, as rows of its page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bigram_circuits.evaluation import Evaluation
from bigram_circuits.measures.conditions import condition_of
from bigram_circuits.measures.statistics import Faithfulness

Ends = tuple[float, float]
"""Ends of an interval; nan where it is undefined."""
_ORDER = ("subnetwork", "full", "complement", "magnitude", "random", "full - random", "empty")
_NO_ENDS = (math.nan, math.nan)


@dataclass(frozen=True)
class Row:
    """The subnetwork or one of its controls."""

    name: str
    """For example `subnetwork`, `full`, `random`."""
    numbers: Faithfulness
    """Its measurements; for random controls, their mean over seeds."""
    ends: Ends
    """95% interval of r; for random controls, its range over seeds."""
    condition: str
    """Its name as a condition: as before, or of a circuit, `circuit`, `random nodes`."""

    @property
    def r(self) -> float:
        """Correlation of the surprisals with the target's; nan where undefined."""
        return self.numbers.surprisal_correlation


def control_rows(evaluation: Evaluation) -> list[Row]:
    """The subnetwork and every control that was measured, in the order of the page."""
    found, groups = dict(evaluation.rows()), of_seeds(evaluation)
    return [
        Row(
            name,
            found[name],
            _range(groups[name]) if name in groups else evaluation.interval(name),
            condition_of(name, evaluation.noun),
        )
        for name in _ORDER
        if name in found
    ]


def of_seeds(evaluation: Evaluation) -> dict[str, Sequence[Faithfulness]]:
    """What was measured of the random controls, by seed from 0."""
    return {"random": evaluation.random, "full - random": evaluation.full_minus_random}


def _range(values: Sequence[Faithfulness]) -> Ends:
    known = [one.surprisal_correlation for one in values if not math.isnan(one.surprisal_correlation)]
    return (min(known), max(known)) if len(known) > 1 else _NO_ENDS
