"""Add parts to a subnetwork, and test whether it can then do a task that it could not do before.

A subnetwork that predicts from the current token alone cannot continue a repeated sequence. With the right attention
head added it may: then the two together are sufficient, and the head builds on the subnetwork. Each addition is
compared with random ones: as many weights in every matrix, drawn from those outside the subnetwork.

Intervals are paired bootstraps over prompts (Efron 1979). The p-value of an addition is one-sided, for the null
hypothesis that the loss does not fall: the mean paired difference of the prompts' losses over its standard error is
taken as a normal variate. p-values are corrected over all additions (Holm 1979), which bounds the chance of any false
finding among them.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import log_ndtr

from bigram_circuits.analysis.components import M, Part, matched_counts, parse, random_within
from bigram_circuits.analysis.paired import Job, PairedMeasurements, Table, first_difference, mean_log_odds, mean_loss
from bigram_circuits.analysis.registry import Subject, in_suite
from bigram_circuits.circuit import Circuit
from bigram_circuits.masking.apply import Mask, MaskLike, as_mask
from bigram_circuits.measures import statistics
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Effects
from bigram_circuits.models.activations import NotShownError
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import check_model, uses_model
from bigram_circuits.progress import progress
from bigram_circuits.tasks.builtin import repeated_random_tokens
from bigram_circuits.tasks.task import COLUMNS, ability, checked_task


@uses_model
def sufficiency(model: Model, base: MaskLike, added: Any, task: Any, *, seeds: int = 5) -> Effects:
    """Measure how much the loss of a subnetwork or circuit on a task falls with each of several additions.

    Args:
        model: From `load_model`.
        base: The subnetwork or circuit to add to.
        added: The additions, one at a time: `heads` for every single head (all its weights, including W_K and W_V
            that it shares with its group), any other part in the language of `components`, a `Subnetwork`, a list
            of these, or a mapping of names to them. To a circuit, nodes that it is over: parts in the same language
            (an MLP is all of its neurons), or a `Circuit`.
        task: A `Task`, or text (an array, or a corpus: its held-out part).
        seeds: Number of random additions to average over for each; 0 for none.

    Returns:
        For every addition `fall_in_loss`, its `excess` over the `random_fall` of random additions (both with 95% paired
        intervals), the `loss` with it, `weights_added` (or `nodes_added`) and `p`; for a task with wrong tokens
        `rise_in_log_odds`. Losses are in nats per scored place. Random controls are nan if everything that
        could be added is added.

    Raises:
        ValueError: If an argument is wrong, a part is not made of a circuit's nodes, or a surprisal is not finite.

    Example:
        >>> gains = bc.sufficiency(model, found, ["L0H0", "L0H1"], task, seeds=1)
        >>> gains.top(1)  # the head that helps most
    """
    if seeds < 0:
        raise ValueError(f"seeds must be 0 or more, not {seeds}")
    check_model(model)
    base = as_mask(base)
    base.check_fits(model)
    scored = checked_task(model, task)
    parts = {part.name: _units(part, base) for part in parse(added, model, base)}
    jobs = [Job("full", "", None, key="full"), Job("base", "", base)]
    for name, units in parts.items():
        for seed, added_units in enumerate([units, *random_additions(base, units, seeds)], -1):
            both = base | added_units
            random = None if seed < 0 else seed
            jobs.append(Job("base", name, both, key=both.checksum, random=random, first=first_difference(both, base)))
    measurements = PairedMeasurements(model, scored)
    with measurements, progress(total=len(jobs) * len(scored), desc="adding", unit="sequence") as bar:
        for job in jobs:
            measurements.measure(job, bar)
    table = measurements.table()
    names = tuple(parts)
    new = Quantity(
        f"{base.units}_added", "", f"Number of {base.units} in the addition that the {base.noun} did not have."
    )
    counts = [(units - base).kept for units in parts.values()]
    rows = _rows(table, names, base.noun, new, counts, with_odds=scored.wrong is not None)
    return Effects(
        title=f"Sufficiency on {scored.name}",
        quantities=tuple(rows),
        subject="added",
        names=names,
        values=np.array([[point for point, _, _ in row] for row in rows.values()], dtype=float),
        low=np.array([[low for _, low, _ in row] for row in rows.values()], dtype=float),
        high=np.array([[high for _, _, high in row] for row in rows.values()], dtype=float),
        notes={
            "base": base.lineage,
            f"base_{base.units}": base.kept,
            "loss_of_base": table.point("base", "", mean_loss),
            "loss_of_full": table.point("full", "", mean_loss),
            "loss_of_guessing": scored.chance,
            "prompts": len(scored),
            "scored_places": int(scored.scored.sum()),
            "random_additions": seeds,
            "interval": "95%, paired bootstrap over prompts",
            "p": f"one-sided, normal approximation, Holm's correction over {len(names)} additions",
        },
    )


def _units(part: Part, base: Mask) -> Mask:
    """The weights of a part, or its nodes among those of a circuit."""
    if isinstance(base, Circuit):
        return part.nodes(base)
    if part.circuits:
        raise ValueError(f"{part.name!r} is a set of nodes, and cannot be added to a subnetwork, a set of weights")
    return part.weights(base.constant(False), shared=True)


def random_additions(base: M, added: M, seeds: int) -> list[M]:
    """Random sets of weights or nodes outside `base`, as many in every matrix, or hook point, as `added` has there.

    There are none if a draw could only be the same: `added` has all or none of what remains in each.
    """
    rest = ~base
    counts = matched_counts(added - base, rest)
    return [] if counts is None else [random_within(rest, counts, seed) for seed in range(seeds)]


def log_p_of_fall(differences: Float[np.ndarray, " prompt"]) -> float:
    """Log of the one-sided p-value that the mean of paired differences is not above 0; nan for under two prompts."""
    if len(differences) < 2:
        return math.nan
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(len(differences))
    if error == 0:
        return -math.inf if mean > 0 else 0.0
    return float(log_ndtr(-mean / error))


_Row = list[tuple[float, float, float]]  # value, low, high for every addition


def _rows(
    table: Table, names: tuple[str, ...], noun: str, added: Quantity, counts: list[int], *, with_odds: bool
) -> dict[Quantity, _Row]:
    nan = math.nan
    before = table.prompts("base", "")
    differences = {name: _surprisal(before) - _surprisal(table.prompts("base", name)) for name in names}
    p = np.maximum(np.exp(statistics.holm([log_p_of_fall(differences[name]) for name in names])), sys.float_info.min)
    rows = {
        Quantity("fall_in_loss", "nats", f"Fall in the {noun}'s loss with the addition."): [
            _negated(table.change("base", name, mean_loss)) for name in names
        ],
        Quantity("excess", "nats", "Fall in loss minus that with random additions of the same size."): [
            _negated(table.excess("base", name, mean_loss)) for name in names
        ],
        Quantity("random_fall", "nats", "Fall in loss with random additions, mean over draws."): [
            (-table.random_change("base", name, mean_loss), nan, nan) for name in names
        ],
        Quantity("loss", "nats", f"Loss of the {noun} with the addition."): [
            (table.point("base", name, mean_loss), nan, nan) for name in names
        ],
        added: [(count, nan, nan) for count in counts],
        Quantity("p", "", "One-sided p-value that the loss does not fall, corrected over all additions; never 0."): [
            (value, nan, nan) for value in p.tolist()
        ],
    }
    if with_odds:
        odds = Quantity("rise_in_log_odds", "nats", "Rise in the log odds of right against wrong.")
        rows[odds] = [table.change("base", name, mean_log_odds) for name in names]
    return rows


def _surprisal(sums: Float[np.ndarray, "prompt column"]) -> Float[np.ndarray, " prompt"]:
    return sums[:, COLUMNS.index("surprisal")]


def _negated(change: tuple[float, float, float]) -> tuple[float, float, float]:
    point, low, high = change
    return (0.0 - point, 0.0 - high, 0.0 - low)


# --- steps of `analyze` ---

_PERIOD = 24  # of repeated random tokens


@in_suite("induction")
def _(subject: Subject) -> dict[str, Effects]:
    """The head that most lowers the loss on repeated random tokens when added, then the best head to add to it."""
    model, subnetwork = subject.model, subject.subnetwork
    task = repeated_random_tokens(model, prompts=16, period=_PERIOD)
    able = ability(model, task)
    if not able.able:
        raise NotShownError(
            f"the full model cannot continue repeated random tokens: its loss is {able.loss:.2f} nats, "
            f"guessing would be {able.chance:.2f}"
        )
    heads = [part.name for part in parse("heads", model)]
    if isinstance(subnetwork, Circuit):
        heads = [name for name in heads if name in (~subnetwork).nodes]
        if not heads:
            raise NotShownError("the circuit drops no head that could be added to it")
    alone = sufficiency(model, subnetwork, heads, task, seeds=1)
    best = alone.top(1)[0][0]
    pairs = [f"{best} + {head}" for head in alone.names if head != best]
    if not pairs:
        return {"induction": alone}
    return {"induction": alone, "induction_pairs": sufficiency(model, subnetwork, pairs, task, seeds=1)}
