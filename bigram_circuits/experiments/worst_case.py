"""Worst-case ablation: how much a mask loses if what it drops is not exactly absent, but set by an adversary.

A mask m that is said to explain what a model does is measured with everything that it drops at 0 (or replaced). A
stricter test gives every dropped weight, node or edge a gate g in [0, 1], the same at all positions of all texts, with
what is kept at 1, and lets an adversary raise the mean cross-entropy L from the target by projected sign gradient
ascent (Madry et al. 2018, arXiv 1706.06083):

    g <- min(1, max(0, g + step * sign(dL/dg)))

with one batch of the ascent's text a step. The first start is the mask itself (g = 0), the others are uniform in
[0, 1]. For every budget of steps, the gates of the start with the highest loss on a fixed piece of that text, after so
many steps or a smaller budget, are measured on text that the ascent did not see. Two baselines of the same size stand
beside it: as many steps with random signs, and the adversary's own gates in random places.

An ascent finds a lower bound of the damage: a flat curve is evidence that nothing dropped matters, and no proof.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.circuit import Circuit
from bigram_circuits.evaluation import Measured, measure, measure_as_it_is, own_behaviour
from bigram_circuits.masking.apply import Mask, MaskLike, as_mask, gate_values, opened
from bigram_circuits.measures.quantities import CONTEXT_TOLD, CROSS_ENTROPY, KL, SURPRISAL_CORRELATION, Quantity
from bigram_circuits.measures.results import Curves, curves_from_sums
from bigram_circuits.measures.statistics import STATISTICS, ContextTold, check_seed
from bigram_circuits.measures.words import listed, percent
from bigram_circuits.models.activations import batch_size_for, check_tokens, lean_forward
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.progress import progress
from bigram_circuits.targets.base import Target, kl_of_best_constant, target_of
from bigram_circuits.text.corpus import Corpus, batch_of, in_order, spread, token_array

WORST, SIGNS, SHUFFLED = "worst case", "signs at random", "shuffled"
"""The conditions: the adversary, and its two baselines."""
HOLDS, IN_PART, BREAKS, UNDEFINED = "holds", "holds in part", "breaks", "undefined"
"""What `worst_case_finding` returns."""
BUDGETS = (0, 1, 4, 20, 80)
"""Steps of ascent, by default."""
MEAN_GATE = Quantity("mean_gate", "share", "Mean gate of what is dropped: 0 in the mask, 1 in the full model.")
AGAINST = "against"
"""The note that says what a worst case was measured against if that was not what the mask was learned for: `model`."""
_FORCED = "The full model does something else than the target, so this says nothing about what was dropped."
QUANTITIES = (CONTEXT_TOLD, KL, CROSS_ENTROPY, SURPRISAL_CORRELATION, MEAN_GATE)
_JUDGED = 20  # the budget by which it is judged whether a mask holds
_HOLDS, _BREAKS = 0.9, 0.5  # least share of its own information of a mask that holds, and of one that does not break
_COMPARED = 1 << 13  # tokens at most on which the losses of several starts are compared


class SaysNothingError(ValueError):
    """A worst case would say nothing about this mask: it drops nothing, or the full model does something else."""


@uses_model
def worst_case_ablation(
    model: Model,
    mask: MaskLike,
    target: Any,
    tokens: Any,
    budgets: Sequence[int] = BUDGETS,
    starts: int = 3,
    *,
    step: float | int = 0.25,
    batch_size: int = 16,
    seed: int = 0,
    force: bool = False,
) -> Curves:
    """Let an adversary open what a mask drops, part by part, and measure how much of the behaviour is left.

    Every dropped weight, node or edge has a gate from 0 to 1, shared by all texts and positions; what is kept stays at
    1. The gates go up the target's cross-entropy by projected sign gradient ascent. The model is not copied: there is
    one number for every gate, and its gradient.

    Args:
        model: From `load_model`.
        mask: A `Subnetwork` or `Circuit`, or what holds one. Nodes and edges are replaced as far as their gates are
            closed.
        target: What the mask is said to explain: it must be what the full model does too, such as its own predictions
            (`ModelTarget`) or a task that it is good at.
        tokens: A `Corpus` (the ascent sees its training part, and is measured on its held-out part), or token ids
            [sequence, position] (the ascent sees every other sequence, and is measured on the others).
        budgets: Numbers of steps of ascent; 0 is the mask itself.
        starts: Starting points of the ascent: the mask, then gates drawn uniformly from 0 to 1. The gates of the start
            with the highest loss on a piece of the ascent's text are measured, or those of a smaller budget if their
            loss is higher.
        step: By how much a step moves every gate. On a mask of 20% of the reference model's weights for its own
            predictions, 0.25 did the most damage after 4 steps, 0.1 slightly more after 20 and 80, and 0.5 and 1 less.
        batch_size: Sequences of the ascent's text in a step.
        seed: Seed of the starts, the batches and the baselines.
        force: Also where the test means nothing, because the full model does something else than the target.

    Returns:
        `context_told`, `kl`, `cross_entropy` and `surprisal_correlation` on held-out text by budget, with 95% intervals
        (bootstrap over sequences, the same draws everywhere), and the mean gate of what is dropped. The conditions are
        `worst case`, `signs at random` (as many steps with random signs, from the mask) and `shuffled` (the adversary's
        own gates, permuted among what is dropped of each matrix or hook point).

    Raises:
        ValueError: If an argument is out of range, or shapes or vocabularies do not match.
        SaysNothingError: (a ValueError) If the mask keeps everything; unless `force` is set, if the full model recovers
            less than 90% of what the mask gains in cross-entropy over the empty mask.

    Example:
        >>> curves = bc.worst_case_ablation(model, found, bc.ModelTarget(model), text, budgets=(0, 2), force=True)
        >>> curves.get("context_told", "worst case")  # the share of the context told, after 0 and 2 steps
        >>> curves.plot("kl")
    """
    job = _checked(model, mask, target, tokens, budgets, starts, step, batch_size, seed)
    ends = (job.mask.constant(True), job.mask.constant(False), job.mask)
    full, empty, own = (measure(model, one, job.target, job.held_out) for one in ends)
    losses = {name: one.faithfulness.cross_entropy for name, one in (("full", full), ("empty", empty), ("mask", own))}
    complaint = own_behaviour(**losses)
    if complaint is not None and not force:
        raise SaysNothingError(
            f"{complaint}, so that opening the rest says nothing about the mask: ask for the model's own predictions "
            "(ModelTarget, --against model) or a task that it is good at, or measure it all the same (force=True, "
            "--force)"
        )
    measured, gates = _measured(job, own)
    told = ContextTold(kl_of_best_constant(job.target, job.held_out))
    statistics = (told, *(STATISTICS[one.name] for one in QUANTITIES[1:-1]))
    notes = {
        "cross_entropy": losses,
        "kl": {"full": full.faithfulness.kl, "empty": empty.faithfulness.kl, "mask": own.faithfulness.kl},
        "units": job.mask.units_here,
        "kept": job.mask.kept,
        "total": job.mask.total,
        "replace": job.mask.replacement.kind if isinstance(job.mask, Circuit) else "zero",
        "target": job.target.kind,
        "step": job.step,
        "starts": job.starts,
        "batch_size": job.batch_size,
        "seed": job.seed,
        "ascent_sequences": len(job.ascent),
        "held_out_sequences": len(job.held_out),
        "forced": complaint is not None,
    }
    sums = {name: np.stack([one.sums for one in points], 1) for name, points in measured.items()}
    curves = curves_from_sums(
        "Worst-case ablation", QUANTITIES[:-1], "steps", job.budgets, sums,
        lambda rows: np.stack([np.asarray(of(rows)) for of in statistics], -2), notes,
    )  # fmt: skip
    without = np.full((1, *curves.values.shape[1:]), math.nan)
    return replace(
        curves,
        quantities=QUANTITIES,
        values=np.concatenate([curves.values, np.array([[gates[name] for name in measured]])]),
        low=np.concatenate([curves.low, without]),
        high=np.concatenate([curves.high, without]),
    )


def worst_case_words(curves: Curves) -> str:
    """Say what is left of a mask's information when what it drops is at its worst, and what follows: two sentences.

    It is judged by 20 steps of ascent, or by the most that there are (`judged_steps`).

    Args:
        curves: From `worst_case_ablation`, with budget 0 (the mask itself) and another.

    Raises:
        ValueError: If these budgets were not measured.
    """
    worst, shuffled = worst_case_left(curves), worst_case_left(curves, SHUFFLED)
    last, judged = max(worst), judged_steps(curves)
    if worst_case_finding(curves) == UNDEFINED:
        return "Worst case: undefined, since the mask is no better than the empty one."
    left = [tuple(percent(max(of[n], 0.0)) for of in (worst, shuffled)) for n in sorted({judged, last})]
    shares = [
        f"{ours} is left after {n} steps of ascent ({theirs} with the same gates in random places)"
        for n, (ours, theirs) in zip(sorted({judged, last}), left, strict=True)
    ]
    what = "information" if is_told(curves) else "gain in cross-entropy over the empty mask"
    what += " about the full model's own predictions" if curves.notes.get(AGAINST) == "model" else ""
    claim = _FORCED if curves.notes.get("forced") else _claim(curves)
    return f"Of the mask's own {what}, {listed(shares)}. {claim}"


def worst_case_finding(curves: Curves) -> str:
    """Judge a mask by the share of its own information that is left after `judged_steps` of ascent.

    Args:
        curves: As for `worst_case_words`.

    Returns:
        `holds` (at least 90% is left), `holds in part` (at least 50%), `breaks`, or `undefined`.

    Raises:
        ValueError: As `worst_case_words`.
    """
    left = worst_case_left(curves)[judged_steps(curves)]
    if math.isnan(left):
        return UNDEFINED
    return HOLDS if left >= _HOLDS else IN_PART if left >= _BREAKS else BREAKS


def judged_steps(curves: Curves) -> int:
    """Return the number of steps of ascent by which a mask is judged: 20, or the most that there are."""
    return _JUDGED if _JUDGED in curves.points else max(map(int, curves.points))


def worst_case_left(curves: Curves, condition: str = WORST) -> dict[int, float]:
    """Return the share of the mask's own information that is left, by number of steps; nan if it has none.

    Where the information is undefined, it is the share of its gain in cross-entropy over the empty mask.

    Args:
        curves: As for `worst_case_words`.
        condition: The adversary, or one of its baselines.

    Raises:
        ValueError: As `worst_case_words`.
    """
    if WORST not in curves.conditions or 0 not in curves.points or len(curves.points) < 2:
        raise ValueError("these are no curves of worst_case_ablation with budget 0 and another")
    own = curves.points.index(0)
    if is_told(curves):
        kept = curves.get(CONTEXT_TOLD.name, condition)
    else:
        kept = curves.notes["cross_entropy"]["empty"] - curves.get(CROSS_ENTROPY.name, condition)
    shares = kept / kept[own] if kept[own] > 0 else np.full(len(kept), math.nan)
    return {int(n): float(share) for n, share in zip(curves.points, shares, strict=True)}


def is_told(curves: Curves) -> bool:
    """Whether the share of the context told is known, and above 0 with the mask itself."""
    return bool(curves.get(CONTEXT_TOLD.name, WORST)[curves.points.index(0)] > 0)


def _claim(curves: Curves) -> str:
    """What may be said of a mask, from the shares of its own information that are left."""
    left, judged = worst_case_left(curves), judged_steps(curves)
    finding = worst_case_finding(curves)
    if finding == HOLDS:
        broken = [n for n, share in left.items() if n > judged and share < _HOLDS]
        held = max(n for n in left if not broken or n < broken[0])
        but = f"; {broken[0]} steps find values that do" if broken else ""
        return f"Nothing that was dropped does harm, as far as {held} steps of ascent can tell{but}."
    exactly = "zero" if curves.notes.get("replace") == "zero" else "what replaces it"
    if finding == IN_PART:
        return f"Some of what was dropped matters: the mask loses a part unless the rest is exactly at {exactly}."
    return f"What was dropped matters: the mask is only sufficient with the rest exactly at {exactly}."


# --- the ascent ---


@dataclass(frozen=True)
class _Job:
    """Arguments that were checked."""

    model: Model
    mask: Mask
    target: Target
    ascent: Integer[np.ndarray, "ascent_sequence position"]
    held_out: Integer[np.ndarray, "held_out_sequence position"]
    budgets: tuple[int, ...]
    starts: int
    step: float
    batch_size: int
    seed: int


def _checked(
    model: Model, mask: MaskLike, target: Any, tokens: Any, budgets: Sequence[int], starts: int, step: float | int,
    batch_size: int, seed: int,
) -> _Job:  # fmt: skip
    taken = as_mask(mask)
    taken.check_fits(model)
    if taken.kept == taken.total:
        raise SaysNothingError(f"the mask keeps all {taken.total:,} {taken.units_here}: there is nothing to open")
    if not len(budgets) or any(not isinstance(one, int | np.integer) or one < 0 for one in budgets):
        raise ValueError(f"budgets must be numbers of steps, 0 or more, not {tuple(budgets)}")
    for name, value in (("starts", starts), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not 0 < step <= 1:
        raise ValueError(f"step must be above 0 and at most 1, not {step}")
    check_seed(seed)
    both = tokens.train if isinstance(tokens, Corpus) else token_array(tokens)
    held_out = token_array(tokens) if isinstance(tokens, Corpus) else both[1::2]
    ascent = token_array(both if isinstance(tokens, Corpus) else both[::2])
    if not len(held_out):
        raise ValueError("1 sequence is given, but the ascent needs others than the measurement: give at least 2")
    for text in (ascent, held_out):
        check_tokens(model, text)
    least = taken.replacement.smallest_batch if isinstance(taken, Circuit) else 1
    order = tuple(sorted({int(one) for one in budgets}))
    return _Job(
        model, taken, target_of(target, model), ascent, held_out, order, int(starts), float(step),
        max(int(batch_size), least), int(seed),
    )  # fmt: skip


def _measured(job: _Job, own: Measured) -> tuple[dict[str, list[Measured]], dict[str, list[float]]]:
    """Every condition at every budget on held-out text, and the mean gates of what is dropped."""
    measured = {name: [own] * len(job.budgets) for name in (WORST, SIGNS, SHUFFLED)}
    means = {name: [0.0] * len(job.budgets) for name in measured}
    highest = [-math.inf] * len(job.budgets)
    gates = _Gates(job)

    def measure_now(name: str, place: int) -> None:
        measured[name][place] = measure_as_it_is(job.model, job.mask, job.target, job.held_out)
        means[name][place] = gates.mean

    with (
        opened(job.model, job.mask, gates.values),
        lean_forward(job.model),
        progress(total=(job.starts + 1) * job.budgets[-1], desc="ascending", unit="step") as bar,
    ):
        if 0 in job.budgets:
            highest[0] = gates.loss_on_piece()
        for start in range(job.starts):
            gates.begin(np.random.default_rng((job.seed, start)) if start else None)
            for place in gates.walk(gates.uphill, bar):
                if (loss := gates.loss_on_piece()) > highest[place]:
                    highest[place] = loss
                    measure_now(WORST, place)
                    with gates.shuffled(np.random.default_rng((job.seed, place))):
                        measure_now(SHUFFLED, place)
        gates.begin(None)
        for place in gates.walk(gates.anywhere, bar):
            measure_now(SIGNS, place)
    best = [max(range(place + 1), key=highest.__getitem__) for place in range(len(job.budgets))]
    for name in (WORST, SHUFFLED):  # with more steps, the adversary may also stop early
        measured[name] = [measured[name][place] for place in best]
        means[name] = [means[name][place] for place in best]
    return measured, means


class _Gates:
    """The gates of a mask, of which those of what is dropped move."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self.values = gate_values(job.model, job.mask)
        self._dropped = {name: one == 0 for name, one in self.values.items() if not one.all()}
        self._piece = spread(job.ascent, _COMPARED)
        for name in self._dropped:
            self.values[name].requires_grad_(True)

    @property
    def mean(self) -> float:
        """Mean gate of what is dropped."""
        opened = sum(float(self.values[name].detach()[dropped].sum()) for name, dropped in self._dropped.items())
        return opened / sum(int(dropped.sum()) for dropped in self._dropped.values())

    @torch.no_grad()
    def begin(self, rng: np.random.Generator | None) -> None:
        """Start from the mask itself, or from gates drawn uniformly from 0 to 1."""
        for name, dropped in self._dropped.items():
            value = self.values[name]
            drawn = torch.zeros_like(value) if rng is None else torch.from_numpy(rng.random(value.shape)).to(value)
            value.copy_(torch.where(dropped, drawn, 1.0))

    def walk(self, signs: Callable[[int], Iterable[Tensor]], bar: Any) -> Iterator[int]:
        """Take the steps of the largest budget, and stop at every budget above 0, whose place is yielded."""
        budgets = self._job.budgets
        for taken in range(budgets[-1]):
            found = signs(taken)
            with torch.no_grad():
                for (name, dropped), sign in zip(self._dropped.items(), found, strict=True):
                    self.values[name].add_(torch.where(dropped, self._job.step * sign, 0.0)).clamp_(0.0, 1.0)
            bar.update()
            if taken + 1 in budgets:
                yield budgets.index(taken + 1)

    def uphill(self, taken: int) -> Iterable[Tensor]:
        """The signs of the gradient of the loss on the batch of a step."""
        job = self._job
        batch = batch_of(job.ascent, job.batch_size, step=taken, seed=job.seed)
        moving = [self.values[name] for name in self._dropped]
        return (gradient.sign_() for gradient in torch.autograd.grad(self._loss(batch).mean(), moving))

    def anywhere(self, taken: int) -> Iterable[Tensor]:
        """Random signs."""
        rng = np.random.default_rng((self._job.seed, self._job.starts, taken))
        for name in self._dropped:
            value = self.values[name]
            yield torch.from_numpy(rng.integers(0, 2, value.shape, dtype=np.int8)).to(value) * 2 - 1

    @torch.no_grad()
    def loss_on_piece(self) -> float:
        """Mean loss on a fixed piece of the ascent's text."""
        batches = in_order(
            self._piece, max(self._job.batch_size, batch_size_for(self._job.model, self._piece.shape[1]))
        )
        found = [self._loss(batch).double().mean(1) for batch in batches]
        return float(torch.cat(found).mean())

    def _loss(self, batch: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch n"]:
        ids = batch.to(self._job.model.cfg.device)
        return self._job.target.cross_entropy(self._job.model(ids), ids)

    @contextmanager
    def shuffled(self, rng: np.random.Generator) -> Iterator[None]:
        """Within the `with` block, the gates of what is dropped are permuted among themselves, name by name."""
        before = {name: self.values[name].detach().clone() for name in self._dropped}
        with torch.no_grad():
            for name, dropped in self._dropped.items():
                own = before[name][dropped]
                self.values[name][dropped] = own[torch.from_numpy(rng.permutation(len(own))).to(own.device)]
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    self.values[name].copy_(value)
