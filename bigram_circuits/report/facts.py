"""What a run's files say, as its page needs it.

This is the one place in the report that looks things up by key in a run's metrics, outcome, settings and history;
everything else takes the typed values made here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from bigram_circuits.evaluation import SoftHardGap
from bigram_circuits.measures.statistics import Faithfulness
from bigram_circuits.runs import STOPS, Run

Ends = tuple[float | None, float | None]
"""Ends of an interval; None where it is undefined."""


# --- what was measured ---


@dataclass(frozen=True)
class Row:
    """The subnetwork or one of its controls."""

    name: str
    """For example `subnetwork`, `full`, `random`."""
    numbers: Faithfulness
    """Its measurements; for random controls, their mean over seeds."""
    ends: Ends
    """95% interval of r; for random controls, its range over seeds."""

    @property
    def r(self) -> float:
        """Correlation of the surprisals with the target's; nan where undefined."""
        return self.numbers.surprisal_correlation


def is_evaluated(run: Run) -> bool:
    """Whether it was evaluated."""
    return run.metrics is not None


def rows(run: Run) -> list[Row]:
    """The subnetwork and every control that was measured, in the order of the page."""
    metrics = run.metrics or {}
    single = {name: _row(metrics, name) for name in ("subnetwork", "full", "complement", "magnitude", "empty")}
    groups = {"random": _group(run, "random"), "full - random": _group(run, "full - random")}
    ordered = [*(row for name, row in single.items() if name != "empty"), *groups.values(), single["empty"]]
    return [row for row in ordered if row is not None]


def _row(metrics: Mapping[str, Any], name: str) -> Row | None:
    if not metrics.get(name):
        return None
    low, high = (metrics.get("intervals") or {}).get(name, {}).get("surprisal_correlation") or (None, None)
    return Row(name, _faithfulness(metrics[name]), (low, high))


_GROUPS = {"random": "random", "full - random": "full_minus_random"}


def _group(run: Run, name: str) -> Row | None:
    """The row of a random control, of which there is one per seed."""
    of_seeds = seeds(run, name)
    if not of_seeds:
        return None
    known = [one.surprisal_correlation for one in of_seeds.values() if not math.isnan(one.surprisal_correlation)]
    ends = (min(known), max(known)) if len(known) > 1 else (None, None)
    return Row(name, _faithfulness((run.metrics or {})[_GROUPS[name]]["mean"]), ends)


def seeds(run: Run, name: str) -> dict[int, Faithfulness]:
    """The measurements of a random control, `random` or `full - random`, by seed."""
    group = (run.metrics or {}).get(_GROUPS[name]) or {}
    return {one["seed"]: _faithfulness(one) for one in group.get("seeds", ())}


def advantage(run: Run) -> dict[str, Ends]:
    """95% paired intervals of the subnetwork's r minus a control's, by control."""
    return {name: (low, high) for name, (low, high) in ((run.metrics or {}).get("advantage") or {}).items()}


def positions(run: Run) -> tuple[int, int] | None:
    """Held-out positions that enter the correlations, and all of them; None if that was not recorded."""
    rule = (run.metrics or {}).get("zero_rule")
    return (rule["used"], rule["positions"]) if rule else None


def verdict(run: Run) -> str:
    """The verdict; empty if there are no controls."""
    return str((run.metrics or {}).get("verdict") or "")


def _faithfulness(values: Mapping[str, Any]) -> Faithfulness:
    known: dict[str, Any] = {one.name: values.get(one.name) for one in fields(Faithfulness)}
    known |= {name: math.nan for name, value in known.items() if value is None}
    return Faithfulness(**known)


# --- how it was learned ---


@dataclass(frozen=True)
class Step:
    """A training step."""

    attempt: int
    """The attempt, from 0."""
    step: int
    """The step in it, from 0."""
    cross_entropy: float
    """From the target, nats."""
    fraction: float
    """Share of weights kept."""
    undecided: float
    """Share of gates still undecided."""


@dataclass(frozen=True)
class Outcome:
    """How learning ended."""

    reason: str
    """Why it stopped, in words."""
    seconds: float
    """Of all attempts together."""
    attempts: int
    """Number of attempts."""
    gap: SoftHardGap | None
    """What hardening the gates changed; None if that was not recorded."""
    rollbacks: tuple[str, ...]
    """A sentence for every return to an earlier step."""


def steps(run: Run) -> list[Step]:
    """All training steps, of all attempts."""
    return [
        Step(
            attempt=int(record.get("attempt", 0)),
            step=record["step"],
            cross_entropy=record["cross_entropy"],
            fraction=record["fraction"],
            undecided=_number(record.get("undecided")),
        )
        for record in run.history
    ]


def step_table(run: Run, every: int) -> tuple[list[str], list[list[Any]]]:
    """Everything recorded of one step in `every`, and of the last: names of columns, and rows."""
    shown = [record for place, record in enumerate(run.history) if place % every == 0 or record is run.history[-1]]
    names = list(dict.fromkeys(name for record in shown for name in record))
    return names, [[record.get(name) for name in names] for record in shown]


def outcome(run: Run) -> Outcome:
    """How learning ended."""
    record = run.outcome
    reason, gap = str(record.get("stopped_because", "")), record.get("soft_hard")
    return Outcome(
        reason=STOPS.get(reason, reason),
        seconds=_number(record.get("seconds")),
        attempts=record.get("attempts", 1),
        gap=SoftHardGap(**gap) if gap else None,
        rollbacks=tuple(
            f"At step {one['step']} {one['what']}: the run was rolled back to step {one['back_to']}, with "
            f"learning rate {one['learning_rate']:g}."
            for one in record.get("rollbacks", ())
        ),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


# --- what was asked ---


def text_name(run: Run) -> str:
    """The text, in words."""
    source = str((run.settings.get("corpus") or {}).get("source"))
    return "the reference text" if source == "reference" else f"the text {source}"
