"""One definition of faithfulness, for training, analysis and the command line.

A subnetwork's numbers mean nothing alone, so `evaluate` also measures controls on the same text: the full model, the
empty subnetwork, the complement (is the subnetwork necessary?), matched random subnetworks and their complements, and a
magnitude subnetwork. Batches are streamed; only one row of sums per sequence is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.capacity import MaskCapacity, capacity
from bigram_circuits.circuit import Circuit
from bigram_circuits.masking.apply import Mask, MaskLike, as_mask, gated, masked
from bigram_circuits.masking.effects import node_effects, strongest
from bigram_circuits.masking.gates import Gates
from bigram_circuits.measures import html, statistics
from bigram_circuits.measures.conditions import CONDITIONS, DRAWN, SINGLE, condition_of
from bigram_circuits.measures.quantities import FAITHFULNESS, MEASURED
from bigram_circuits.measures.results import Effects
from bigram_circuits.measures.statistics import Faithfulness, Statistic
from bigram_circuits.measures.words import listed, percent
from bigram_circuits.models.activations import batch_size_for, check_tokens, lean_forward
from bigram_circuits.models.logits import mean_cross_entropy
from bigram_circuits.models.model import Model
from bigram_circuits.models.products import masked_once
from bigram_circuits.models.state import uses_model
from bigram_circuits.progress import progress
from bigram_circuits.storage.records import shown
from bigram_circuits.storage.typed import Record, from_json, to_json
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.targets.base import Target, counted, entropy, target_of, top1_agreement
from bigram_circuits.text.corpus import in_order, token_array

Interval = tuple[float, float]

_WITH_INTERVALS = ("surprisal_correlation", "cross_entropy", "mean_surprisal")
ZERO_RULE = "correlations use only positions where the target gives the actual next token a probability above 0"


@dataclass(frozen=True)
class Evaluation:
    """The faithfulness of a subnetwork and its controls on the same held-out text.

    Example:
        >>> evaluation = bc.evaluate(model, found, target, text, controls=False)
        >>> print(evaluation.subnetwork.kl)
        >>> evaluation.plot("kl")
    """

    subnetwork: Faithfulness
    """The model with only the subnetwork's weights."""
    full: Faithfulness | None = None
    """The full model; None, like all controls below, if evaluated without controls."""
    empty: Faithfulness | None = None
    """The model without any maskable weight."""
    complement: Faithfulness | None = None
    """The full model without the subnetwork."""
    random: tuple[Faithfulness, ...] = ()
    """Matched random subnetworks, one for each seed."""
    full_minus_random: tuple[Faithfulness, ...] = ()
    """The full model without each of these."""
    magnitude: Faithfulness | None = None
    """The weights of largest magnitude, as many in every matrix as the subnetwork keeps. Of a circuit, the nodes whose
    replacement matters most by its linear estimate on the same text (`node_effects`), as many at every hook point."""
    intervals: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    """95% bootstrap intervals over sequences: condition -> quantity -> (low, high)."""
    advantage: Mapping[str, Interval] = field(default_factory=dict)
    """95% paired bootstrap intervals of the subnetwork's correlation minus a control's, by control; where the
    subnetwork's correlation is undefined (`by_loss`), of the control's cross-entropy minus the subnetwork's."""
    positions: int | None = None
    """Next-token positions evaluated; None if a summary of several runs did not record it."""
    used: int | None = None
    """The number of these that enter the correlations, by the zero-probability rule."""
    mask_capacity: MaskCapacity | None = None
    """Whether the mask itself could hold the target, from its bits and those of a table with the subnetwork's KL; None
    without controls, and for targets whose bits cannot be counted: any but tables of at most 2**23 n-grams."""
    units: str = "weights"
    """What the mask is of: `weights`, or `nodes` of a circuit."""

    @property
    def by_loss(self) -> bool:
        """Whether it is judged by cross-entropies, because correlations with the target are undefined.

        So they are, for every model, if the target is sure of what comes next, like the answers of a task.
        """
        known = [one for one in (self.subnetwork, self.full) if one is not None]
        return all(math.isnan(one.surprisal_correlation) for one in known)

    @property
    def recovered(self) -> float:
        """Share of the full model's gain in cross-entropy over the empty subnetwork that the subnetwork keeps.

        (CE of the empty subnetwork - its own) / (CE of the empty subnetwork - CE of the full model). nan without
        controls, and where the full model gains nothing.
        """
        if self.full is None or self.empty is None or not self.full.cross_entropy < self.empty.cross_entropy:
            return math.nan
        gain = self.empty.cross_entropy - self.full.cross_entropy
        return (self.empty.cross_entropy - self.subnetwork.cross_entropy) / gain

    @property
    def lost(self) -> float:
        """Share of the full model's gain in cross-entropy over the empty subnetwork that is lost without this one.

        (CE of the complement - CE of the full model) / (CE of the empty subnetwork - CE of the full model). nan without
        controls, where the full model gains nothing, and where it is not judged by cross-entropies (`by_loss`).
        """
        if not self.by_loss or self.complement is None or math.isnan(self.recovered):
            return math.nan
        assert self.full is not None, "what is recovered is known"
        assert self.empty is not None, "what is recovered is known"
        gain = self.empty.cross_entropy - self.full.cross_entropy
        return (self.complement.cross_entropy - self.full.cross_entropy) / gain

    @property
    def noun(self) -> str:
        """What was evaluated: `subnetwork` or `circuit`."""
        return "subnetwork" if self.units == "weights" else "circuit"

    @property
    def necessity(self) -> tuple[float, float]:
        """Rise in the model's loss (nats) without the subnetwork, and without a matched random one (mean of seeds)."""
        if self.full is None or self.complement is None:
            return (math.nan, math.nan)
        seeds = [one.mean_surprisal for one in self.full_minus_random]
        random = float(np.mean(seeds)) if seeds else math.nan
        return self.complement.mean_surprisal - self.full.mean_surprisal, random - self.full.mean_surprisal

    @property
    def sufficiency(self) -> str | None:
        """How sufficient it is for the target, in words; None where that is undefined."""
        value = self.recovered if self.by_loss else self.subnetwork.surprisal_correlation
        return None if math.isnan(value) else next(word for least, word in _SUFFICIENT if value >= least)

    @property
    def need(self) -> str | None:
        """How necessary it is to the model, in words; None if that was not measured."""
        rise, random = self.necessity
        if math.isnan(rise) or math.isnan(random):
            return None
        table, value = (_NECESSARY, _times(rise, random)) if math.isnan(self.lost) else (_LOST, self.lost)
        return "NOT necessary" if rise < _NEEDED else next(word for least, word in table if value >= least)

    def beats(self, control: str) -> bool | None:
        """Whether it is shown to be closer to the target than a control: `full`, `empty`, `magnitude` or `random`.

        It is if the paired 95% interval of the difference (`advantage`) lies above 0, for random controls of every
        seed. A control whose correlation is undefined (its surprisal is constant) says nothing about the target, so it
        is beaten. None: the control was not measured.
        """
        pairs = [pair for name, pair in self.advantage.items() if name.split(" ")[0] == control]
        return all(math.isnan(low) or low > 0 for low, _ in pairs) if pairs else None

    @property
    def verdict(self) -> str:
        """How sparse the subnetwork is, how sufficient for the target, and how necessary to the model: a sentence."""
        return _verdict(self)

    def to_json(self) -> dict[str, Any]:
        """The contents of a run's `metrics.json`."""
        return {
            **{name: to_json(getattr(self, name)) for name in SINGLE},
            **{name: _spread(getattr(self, name)) for name in _REPEATED},
            "zero_rule": None if self.positions is None or self.used is None else _zero_rule(self.positions, self.used),
            "intervals": to_json(self.intervals),
            "advantage": to_json(self.advantage),
            **({"mask_capacity": to_json(self.mask_capacity)} if self.mask_capacity else {}),
            **({"units": self.units} if self.units != "weights" else {}),
            "verdict": self.verdict,
        }

    @classmethod
    def from_json(cls, record: Any) -> Evaluation:
        """Read what `to_json` returned; means, deviations and the verdict are recomputed.

        Raises:
            ValueError: If it is something else; the message completes `... is damaged:`.
        """
        if not isinstance(record, dict):
            raise ValueError(f"it should be values by name, not {shown(record)}")
        unknown = set(record) - {*SINGLE, *_REPEATED, *_OTHERS}
        if unknown:
            raise ValueError(f"it has the unknown field {shown(min(unknown))}")
        rule: _ZeroRule | None = from_json(_ZeroRule | None, record.get("zero_rule"), "zero_rule")
        single = {name: from_json(Faithfulness | None, record.get(name), name) for name in SINGLE[1:]}
        repeated = {name: _seeds(record.get(name), name) for name in _REPEATED}
        return cls(
            subnetwork=from_json(Faithfulness, record.get("subnetwork"), "subnetwork"),
            full=single["full"],
            empty=single["empty"],
            complement=single["complement"],
            random=repeated["random"],
            full_minus_random=repeated["full_minus_random"],
            magnitude=single["magnitude"],
            intervals=from_json(Mapping[str, Mapping[str, Interval]], record.get("intervals", {}), "intervals"),
            advantage=from_json(Mapping[str, Interval], record.get("advantage", {}), "advantage"),
            positions=rule and rule.positions,
            used=rule and rule.used,
            mask_capacity=from_json(MaskCapacity | None, record.get("mask_capacity"), "mask_capacity"),
            units=from_json(str, record.get("units", "weights"), "units"),
        )

    def rows(self) -> Iterator[tuple[str, Faithfulness]]:
        """(name, numbers) of the subnetwork and every control; random controls as means over seeds."""
        for name in SINGLE:
            if (value := getattr(self, name)) is not None:
                yield name, value
        if self.random:
            yield from zip(DRAWN, (_mean(self.random), _mean(self.full_minus_random)), strict=True)

    def interval(self, condition: str, quantity: str = "surprisal_correlation") -> Interval:
        """The 95% interval of a quantity under a condition; (nan, nan) where there is none."""
        return self.intervals.get(condition, {}).get(quantity, (math.nan, math.nan))

    def to_dataframe(self) -> Any:
        """A pandas table: a row for the subnetwork and every control, random controls as means over seeds."""
        import pandas as pd

        return pd.DataFrame([asdict(value) for _, value in self.rows()], index=[name for name, _ in self.rows()])

    def plot(self, quantity: str = "surprisal_correlation") -> Any:
        """A plotly figure: a bar for the subnetwork and every control, with 95% intervals where defined."""
        rows = dict(self.rows())
        values = np.array([[getattr(value, one.name) for value in rows.values()] for one in FAITHFULNESS])
        pairs = [[self.interval(name, one.name) for name in rows] for one in FAITHFULNESS]
        low, high = np.moveaxis(np.array(pairs, dtype=float), -1, 0)
        title = f"The {self.noun} and its controls"
        names = tuple(condition_of(name, self.noun) for name in rows)
        return Effects(title, FAITHFULNESS, "condition", names, values, low, high).plot(quantity)

    def __str__(self) -> str:
        names = {name: condition_of(name, self.noun) for name, _ in self.rows()}
        width = max(15, 2 + max(map(len, names.values())))
        head = f"{'':<{width}}{'r':>8}{'95% interval':>18}{'CE':>8}{'KL':>8}{'loss':>8}"
        head += f"{'top-1':>8}{'kept':>12}{'share':>8}"
        lines = [head]
        for name, value in self.rows():
            r = "undef." if math.isnan(value.surprisal_correlation) else f"{value.surprisal_correlation:.3f}"
            lines.append(
                f"{names[name]:<{width}}{r:>8}{self._spread(name):>18}{value.cross_entropy:>8.3f}{value.kl:>8.3f}"
                f"{value.mean_surprisal:>8.3f}{100 * value.top1_agreement:>7.1f}%{value.kept:>12,}"
                f"{100 * value.fraction:>7.2f}%"
            )
        lines.append("")
        lines += self._legend
        return "\n".join([*lines, *self._conclusions])

    def _repr_html_(self) -> str:
        """HTML for notebooks: the same table, its legend and the verdict."""
        columns = ["", "r", "95% interval", "CE", "KL", "loss", "top-1", "kept", "share"]
        rows = [
            [condition_of(name, self.noun), value.surprisal_correlation, self._spread(name), value.cross_entropy,
             value.kl, value.mean_surprisal, f"{100 * value.top1_agreement:.1f}%", value.kept,
             f"{100 * value.fraction:.2f}%"]
            for name, value in self.rows()
        ]  # fmt: skip
        title = f"A {self.noun} and its controls" if self.full is not None else f"A {self.noun}, without controls"
        return html.summary(title, self._conclusions, html.table(columns, rows, title), html.small(self._legend))

    @property
    def _conclusions(self) -> list[str]:
        """The verdict, and whether the mask could hold the answer; none without controls."""
        if self.full is None:
            return []
        return [self.verdict, *([self.mask_capacity.says] if self.mask_capacity else [])]

    @property
    def _legend(self) -> list[str]:
        """What the columns mean."""
        if self.by_loss:
            counted = "" if self.positions is None else f" where {self.positions:,} held-out tokens are predicted"
            return [
                "r: undefined, since the target's surprisals do not vary (it is sure of its answers), or it has none.",
                f"CE, KL: from the target, nats. loss: the masked model's own next-token loss{counted}, nats.",
            ]
        where = ""
        if self.positions is not None and self.used is not None:
            where = f", on the {self.used:,} of {self.positions:,} held-out positions "
            where += f"({100 * self.used / self.positions:.1f}%) where the target's probability is above 0"
        return [
            f"r: correlation of surprisals with the target's{where}.",
            "CE, KL: from the target, nats. loss: the masked model's own next-token loss, nats.",
        ]

    def _spread(self, name: str) -> str:
        """Uncertainty of a row's correlation: its interval, or for random controls the deviation between seeds."""
        group = {"random": self.random, "full - random": self.full_minus_random}.get(name, ())
        if len(group) > 1 and not self.by_loss:
            deviation = float(np.std([one.surprisal_correlation for one in group], ddof=1))
            return f"sd {deviation:.3f}, {len(group)} seeds"
        low, high = self.interval(name)
        return "" if math.isnan(low) else f"{low:.3f} to {high:.3f}"


_REPEATED = ("random", "full_minus_random")
_OTHERS = ("zero_rule", "intervals", "advantage", "mask_capacity", "units", "verdict")


@dataclass(frozen=True)
class _ZeroRule(Record):
    """The zero-probability rule in `metrics.json`."""

    positions: int
    used: int
    share: float
    rule: str


@dataclass(frozen=True)
class _OfSeed(Faithfulness):
    """The numbers of one random control."""

    seed: int


def _zero_rule(positions: int, used: int) -> dict[str, Any]:
    return _ZeroRule(positions, used, used / positions, ZERO_RULE).to_json()


def _seeds(group: Any, name: str) -> tuple[Faithfulness, ...]:
    """The numbers of every seed, from the result of `_spread`."""
    if group is None:
        return ()
    if not isinstance(group, dict) or set(group) != {"mean", "std", "seeds"}:
        raise ValueError(f"{name} should have a mean, an std and seeds, not {shown(group)}")
    of_seeds = from_json(tuple[_OfSeed, ...], group["seeds"], f"{name}.seeds")
    return tuple(
        Faithfulness(**{one.name: getattr(seed, one.name) for one in fields(Faithfulness)}) for seed in of_seeds
    )


@uses_model
def evaluate(
    model: Model,
    subnetwork: MaskLike,
    target: Any,
    tokens: Integer[np.ndarray, "sequence position"] | Integer[Tensor, "sequence position"],
    *,
    controls: bool = True,
    seeds: int = 3,
) -> Evaluation:
    """Measure how faithfully a subnetwork reproduces a target, with its controls beside it.

    Args:
        model: From `load_model`, with the weights that the subnetwork was made for.
        subnetwork: What to keep: a `Subnetwork` or a `Circuit`, or something that holds one, such as a
            `FoundSubnetwork`, a `FoundCircuit` or a `Run`. Of a circuit, `kept`, `total` and `fraction` are of nodes.
        target: An `NGramTable`, or any object with `cross_entropy` and `surprisal`.
        tokens: Held-out token ids [sequence, position].
        controls: Also measure the full model, the empty subnetwork, the complement, matched random subnetworks,
            the full model without each of these, and the magnitude subnetwork; and, if the target is an n-gram table,
            count the bits of the mask and of the table (see `could_mask_hold_it`).
        seeds: Number of matched random subnetworks.

    Raises:
        ValueError: If shapes or vocabularies do not match, there is no held-out text, or a surprisal of the model is
            not finite.

    Example:
        >>> evaluation = bc.evaluate(model, found, target, text, seeds=1)
        >>> print(evaluation)  # a table with the controls, and the verdict in words
    """
    return evaluated(model, subnetwork, target, tokens, controls=controls, seeds=seeds)[0]


@dataclass(frozen=True)
class Measured:
    """How faithful one masked model is, with the sums that this comes from, so that two can be compared in pairs."""

    faithfulness: Faithfulness
    """Its numbers."""
    sums: Float[np.ndarray, "sequence column"] = field(repr=False)
    """A row for each held-out sequence; the columns are `statistics.COLUMNS`."""

    @cached_property
    def draws(self) -> Float[np.ndarray, "draw column"]:
        """Totals of bootstrap resamples of the sequences; for all models on the same text the same resamples."""
        return statistics.bootstrap(self.sums)

    def interval(self, statistic: Statistic) -> Interval:
        """The 95% bootstrap interval of a statistic."""
        return statistics.interval(statistic(self.draws))

    def minus(
        self, other: Measured, statistic: Statistic, of_other: Statistic | None = None
    ) -> tuple[float, float, float]:
        """A statistic minus the other's on the same text: (difference, low, high), a 95% paired bootstrap interval.

        `of_other` is the other's statistic, if not the same.
        """
        assert self.sums.shape == other.sums.shape, "they were measured on the same text"
        of_other = of_other or statistic
        difference = float(statistic(self.sums.sum(0)) - of_other(other.sums.sum(0)))
        return (difference, *statistics.interval(statistic(self.draws) - of_other(other.draws)))


def evaluated(
    model: Model,
    subnetwork: MaskLike,
    target: Any,
    tokens: Integer[np.ndarray, "sequence position"] | Integer[Tensor, "sequence position"],
    *,
    controls: bool = True,
    seeds: int = 3,
) -> tuple[Evaluation, dict[str, Measured]]:
    """`evaluate`, with what it comes from: each condition by name, so that more can be computed of the same passes.

    The conditions are `subnetwork`, `full`, `empty`, `complement`, `magnitude`, and for every seed `random 0` and
    `full - random 0`.

    Raises:
        ValueError: As `evaluate`.
    """
    array = token_array(tokens)
    check_tokens(model, array)
    if controls and seeds < 1:
        raise ValueError(f"the random control needs at least 1 seed, not {seeds}")
    target = target_of(target, model)
    kept = as_mask(subnetwork)
    kept.check_fits(model)
    conditions = dict(_conditions(model, kept, target, array, seeds) if controls else [("subnetwork", kept)])
    found: dict[str, Measured] = {}
    with progress(total=len(conditions) * len(array), desc="evaluating", unit="sequence") as bar:
        for name, condition in conditions.items():
            bar.set_postfix_str(name, refresh=False)
            sums = _sums(model, condition, target, array, bar)
            found[name] = Measured(statistics.faithfulness(sums, condition.kept, kept.total), sums)
    measured, own = {name: one.faithfulness for name, one in found.items()}, found["subnetwork"].sums
    draws = {name: one.draws for name, one in found.items()}
    random = tuple(value for name, value in measured.items() if name.startswith("random "))
    without = tuple(value for name, value in measured.items() if name.startswith("full - random "))
    evaluation = Evaluation(
        subnetwork=measured["subnetwork"],
        full=measured.get("full"),
        empty=measured.get("empty"),
        complement=measured.get("complement"),
        random=random,
        full_minus_random=without,
        magnitude=measured.get("magnitude"),
        intervals={name: _intervals(rows) for name, rows in draws.items()},
        positions=int(own[:, statistics.COLUMNS.index("positions")].sum()),
        used=int(own[:, statistics.COLUMNS.index("used")].sum()),
        # rounding can make a KL of 0 negative
        mask_capacity=capacity(kept, target, max(measured["subnetwork"].kl, 0.0)) if controls else None,
        units=kept.units_here,
    )
    return replace(evaluation, advantage=_advantage(draws, by_loss=evaluation.by_loss)), found


@uses_model
def measure(
    model: Model, subnetwork: MaskLike, target: Any, tokens: Integer[np.ndarray, "sequence position"]
) -> Measured:
    """Measure a subnetwork without controls, to be compared with others, of this model or another, on the same text.

    Raises:
        ValueError: As `evaluate`.
    """
    check_tokens(model, tokens)
    target = target_of(target, model)
    kept = as_mask(subnetwork)
    kept.check_fits(model)
    with progress(total=len(tokens), desc="evaluating", unit="sequence") as bar:
        sums = _sums(model, kept, target, tokens, bar)
    return Measured(statistics.faithfulness(sums, kept.kept, kept.total), sums)


def measure_as_it_is(
    model: Model, like: Mask, target: Target, tokens: Integer[np.ndarray, "sequence position"]
) -> Measured:
    """Measure a model that the caller has changed, for example by soft gates (`opened`).

    Args:
        model: Within the block that changes it.
        like: The mask whose size is stated.
        target: A target that was checked.
        tokens: Token ids that were checked.

    Raises:
        ValueError: If a surprisal or a cross-entropy is not finite.
    """
    sums = _sums_as_it_is(model, target, tokens, _batch_size(model, like, tokens))
    return Measured(statistics.faithfulness(sums, like.kept, like.total), sums)


OWN_BEHAVIOUR = 0.9
"""The least share of a mask's gain that a full model must have whose own behaviour the mask is of."""


def own_behaviour(full: float, mask: float, empty: float) -> str | None:
    """Say that a full model does something else than the target of a mask; None if it does the same.

    It does something else if it recovers less than 90% of what the mask gains over the empty mask:
    CE(empty) - CE(full) < 0.9 (CE(empty) - CE(mask)).

    Args:
        full: Cross-entropy of the full model from the target, in nats.
        mask: That of the model with the mask alone.
        empty: That of the empty mask.

    Returns:
        The start of a sentence, with both numbers.
    """
    if empty - full >= OWN_BEHAVIOUR * (empty - mask):
        return None
    return (
        f"the full model does something else than the target: over the empty mask it gains {empty - full:.3f} nats of "
        f"cross-entropy, and the mask {empty - mask:.3f}"
    )


GAP_MATTERS = 0.1
"""Cross-entropy gap between soft gates and hard mask, in nats, from which a run should not be trusted."""


@dataclass(frozen=True)
class SoftHardGap(Record):
    """The effect of turning soft gates into a mask: CE on one batch, nats per position.

    Example:
        >>> print(found.gap.soft, found.gap.hard)  # cross-entropy with the last soft gates, and with the mask
    """

    soft: float
    """CE with the last soft gates, as learned."""
    hard: float
    """CE with the mask."""

    @property
    def gap(self) -> float:
        """`hard` minus `soft`: above 0, the mask is worse than the soft gates."""
        return self.hard - self.soft

    @property
    def warning(self) -> str | None:
        """A warning with a remedy if the gap, of either sign, is at least `GAP_MATTERS`; else None."""
        if abs(self.gap) < GAP_MATTERS:
            return None
        worse = "above" if self.gap > 0 else "below"
        return (
            f"the mask's cross-entropy is {self.hard:.3f} nats, {abs(self.gap):.3f} {worse} that of the soft gates it "
            f"was made from: the gates were not decided when learning ended; use more steps (max_steps)"
        )


@uses_model
@torch.no_grad()
def soft_hard_gap(
    model: Model, gates: Gates, subnetwork: MaskLike, target: Any, tokens: Integer[Tensor, "batch pos"], step: int
) -> SoftHardGap:
    """Compare a model with soft gates and the same model with the mask made from them, on the same batch.

    Args:
        model: The model that was gated, now without masks or gates.
        gates: The gates after the last step; their soft values at `step` are recomputed.
        subnetwork: The mask made from the gates.
        target: The target that was learned.
        tokens: Token ids [batch, pos], usually the batch of the last step.
        step: The last step.

    Example:
        >>> import torch
        >>> from bigram_circuits.masking.candidates import Candidates
        >>> gates, _ = Candidates(model, config).gates(config, seed=0, within=None)
        >>> gap = bc.soft_hard_gap(model, gates, found, target, torch.from_numpy(text), step=2)
    """
    check_tokens(model, tokens)
    gates.refresh(step)
    kept = as_mask(subnetwork)
    with gated(model, gates, kept.replacement if isinstance(kept, Circuit) else None), lean_forward(model):
        soft = mean_cross_entropy(model, target, tokens).item()
    with masked(model, kept), lean_forward(model):
        hard = mean_cross_entropy(model, target, tokens).item()
    return SoftHardGap(soft, hard)


def _largest(model: Model, kept: Mask, target: Target, tokens: Integer[np.ndarray, "sequence position"]) -> Mask:
    """As large a mask of the largest weights, or of the nodes that matter most by the gradients of their gates."""
    if isinstance(kept, Subnetwork):
        return Subnetwork.magnitude(model, like=kept)
    chosen = strongest(node_effects(model, kept, target, tokens), kept)
    if not kept.masks_weights:
        return chosen
    weights = Subnetwork.magnitude(model, like=kept.masked_weights(model))
    return chosen.with_weights(weights)


def _conditions(
    model: Model, kept: Mask, target: Target, tokens: Integer[np.ndarray, "sequence position"], seeds: int
) -> Iterator[tuple[str, Mask]]:
    yield "subnetwork", kept
    yield "full", kept.constant(True)
    yield "empty", kept.constant(False)
    yield "complement", ~kept
    yield "magnitude", _largest(model, kept, target, tokens)
    for seed in range(seeds):
        random = kept.random_like(seed=seed)
        yield f"random {seed}", random
        yield f"full - random {seed}", ~random


def _sums(
    model: Model, subnetwork: Mask, target: Target, tokens: Integer[np.ndarray, "sequence position"], bar: Any
) -> Float[np.ndarray, "sequence column"]:
    """A row of sums for each sequence (`statistics.COLUMNS`), from one pass over the text."""
    whole = subnetwork.kept == subnetwork.total
    with nullcontext() if whole else masked(model, subnetwork), masked_once(model, tokens.size):
        return _sums_as_it_is(model, target, tokens, _batch_size(model, subnetwork, tokens), bar)


@torch.inference_mode()
def _sums_as_it_is(
    model: Model, target: Target, tokens: Integer[np.ndarray, "sequence position"], batch_size: int, bar: Any = None
) -> Float[np.ndarray, "sequence column"]:
    """The same of the model as it is, masked or not."""
    rows = []
    with lean_forward(model):
        for cpu_batch in in_order(tokens, batch_size):
            batch = cpu_batch.to(model.cfg.device)
            rows.append(_batch_sums(model(batch), target, batch))
            if bar is not None:
                bar.update(len(batch))
    return np.concatenate(rows)


def _batch_size(model: Model, kept: Mask, tokens: Integer[np.ndarray, "sequence position"]) -> int:
    """Sequences in a batch: as many as fit, and as a replacement needs."""
    least = kept.replacement.smallest_batch if isinstance(kept, Circuit) else 1
    return max(batch_size_for(model, tokens.shape[1]), least)


def _batch_sums(
    logits: Float[Tensor, "batch pos d_vocab"], target: Target, tokens: Integer[Tensor, "batch pos"]
) -> Float[np.ndarray, "batch column"]:
    x, pairs = _surprisal_sums(logits, target, tokens)
    cross_entropy = target.cross_entropy(logits, tokens).double()
    if not torch.isfinite(cross_entropy).all():
        raise ValueError("the target's cross-entropy is not finite (NaN or infinity) at a held-out position")
    n, counts = cross_entropy.shape[1], counted(target, tokens).to(x)
    kl = cross_entropy - entropy(target, tokens, n).to(cross_entropy)
    agree = top1_agreement(target, logits, tokens, n).to(cross_entropy)
    columns = (counts, x * counts, torch.ones_like(kl), cross_entropy, kl, agree)
    return torch.cat([pairs, torch.stack([column.sum(1) for column in columns], 1)], 1).cpu().numpy()


def _surprisal_sums(
    logits: Float[Tensor, "batch pos d_vocab"], target: Target, tokens: Integer[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos_minus_1"], Float[Tensor, "batch six"]]:
    """The model's surprisals of the next token, and the sums for their correlation with the target's.

    Where outputs are no tokens, surprisals are nan, and no position is used.
    """
    if not target.over_tokens:
        x = torch.full(tokens[:, 1:].shape, torch.nan, dtype=torch.float64, device=logits.device)
        return x, torch.zeros(len(x), 6, dtype=x.dtype, device=x.device)
    x = statistics.surprisals(logits, tokens).double()
    if not torch.isfinite(x).all():
        raise ValueError("the model's surprisal of a held-out token is not finite (NaN or infinity in its logits)")
    return x, statistics.correlation_sums(x, target.surprisal(tokens).to(x))


def _intervals(draws: Float[np.ndarray, "draw column"]) -> dict[str, Interval]:
    return {name: statistics.interval(statistics.STATISTICS[name](draws)) for name in _WITH_INTERVALS}


def _advantage(draws: Mapping[str, Float[np.ndarray, "draw column"]], *, by_loss: bool) -> dict[str, Interval]:
    """Intervals of how much closer to the target the subnetwork is than each control."""
    own, closeness = draws["subnetwork"], statistics.STATISTICS["surprisal_correlation"]
    if by_loss:
        closeness = lambda rows: -statistics.mean(rows, "cross_entropy")  # noqa: E731
    return {
        name: statistics.interval(closeness(own) - closeness(rows))
        for name, rows in draws.items()
        if name in ("full", "empty", "magnitude") or name.startswith("random ")
    }


def _mean(values: tuple[Faithfulness, ...]) -> Faithfulness:
    """Means over seeds, all of which keep the same number of weights."""
    rows = [asdict(value) for value in values]
    return replace(values[0], **{key: float(np.mean([row[key] for row in rows])) for key in MEASURED})


def _spread(values: tuple[Faithfulness, ...]) -> dict[str, Any] | None:
    """Mean and sample standard deviation over seeds, and each seed's own numbers."""
    if not values:
        return None
    rows = [asdict(value) for value in values]
    table = np.array([list(row.values()) for row in rows], dtype=float)
    std = table.std(0, ddof=1) if len(rows) > 1 else np.full(table.shape[1], np.nan)
    return {
        "mean": _mean(values).to_json(),
        "std": {key: to_json(float(v)) for key, v in zip(rows[0], std, strict=True)},
        "seeds": [{"seed": seed, **value.to_json()} for seed, value in enumerate(values)],
    }


_SPARSE = ((0.05, "sparse"), (0.2, "fairly sparse"), (math.inf, "NOT sparse"))
"""Largest fraction of the weights, and the word for it."""
_SUFFICIENT = (
    (0.95, "sufficient"),
    (0.9, "largely sufficient"),
    (0.8, "only partly sufficient"),
    (-math.inf, "NOT sufficient"),
)
"""Least correlation with the target's surprisals, or share recovered of the full model's gain, and the word for it."""
_NECESSARY = ((10.0, "necessary"), (3.0, "fairly necessary"), (-math.inf, "hardly necessary"))
"""Least rise in loss, in times that of as many random weights, and the word for it."""
_LOST = ((0.8, "necessary"), (0.4, "fairly necessary"), (-math.inf, "hardly necessary"))
"""Least share of the full model's gain over the empty subnetwork that is lost without it, and the word for it, where
evaluations are by loss: there, a loss cannot rise much beyond that of the empty subnetwork."""
_NEEDED = 0.1
"""Rise in loss, in nats, from which a model needs a subnetwork."""
_CONTROLS = {
    "full": "the full model",
    "empty": "the empty {noun}",
    "magnitude": "the {strongest}",
    "random": "random {units}",
}
"""The controls that it is compared with."""


def _verdict(evaluation: Evaluation) -> str:
    """The verdict: sparsity, sufficiency and necessity, each in a word and its numbers.

    A control is beaten if the paired interval of the difference in correlation lies above 0.
    """
    if not evaluation.advantage:
        return "Verdict: evaluated without controls, so no conclusion can be drawn."
    is_undefined = math.isnan(evaluation.subnetwork.surprisal_correlation)
    if is_undefined and math.isnan(evaluation.advantage.get("full", (math.nan, math.nan))[0]):
        return f"Verdict: the {evaluation.noun}'s correlation with the target is undefined."
    fraction = evaluation.subnetwork.fraction
    word = next((word for most, word in _SPARSE if fraction <= most), "of unknown sparsity")
    return (
        f"Verdict: {word} ({percent(fraction)} of the {evaluation.units}); {_sufficiency(evaluation)}; "
        f"{_necessity(evaluation)}."
    )


def _sufficiency(evaluation: Evaluation) -> str:
    """How closely the subnetwork follows the target, and which controls do so less closely."""
    beaten, unbeaten = [], []
    strongest = CONDITIONS[condition_of("magnitude", evaluation.noun)].label
    for control, label in _CONTROLS.items():
        is_beaten = evaluation.beats(control)
        if is_beaten is not None:
            (beaten if is_beaten else unbeaten).append(
                label.format(units=evaluation.units, noun=evaluation.noun, strongest=strongest)
            )
    side = "below" if evaluation.by_loss else "above"
    words = [_by_loss_words(evaluation) if evaluation.by_loss else _by_correlation_words(evaluation)]
    if beaten:
        words.append(f"{side} that of {listed(beaten)} (95% paired intervals)")
    if unbeaten:
        words.append(f"NOT shown to be {side} that of {listed(unbeaten)}")
    return ", ".join(words)


def _by_correlation_words(evaluation: Evaluation) -> str:
    r, (low, high) = evaluation.subnetwork.surprisal_correlation, evaluation.interval("subnetwork")
    interval = "" if math.isnan(low) else f" (95% interval {low:.3f} to {high:.3f})"
    return f"{evaluation.sufficiency}: r = {r:.3f}{interval}"


def _by_loss_words(evaluation: Evaluation) -> str:
    """How much of the full model's gain over the empty subnetwork is kept, and the cross-entropies."""
    share, value = evaluation.recovered, evaluation.subnetwork.cross_entropy
    low, high = evaluation.interval("subnetwork", "cross_entropy")
    losses = f"cross-entropy {value:.3f} nats (95% interval {low:.3f} to {high:.3f})"
    if evaluation.full is None or evaluation.empty is None or math.isnan(share):
        return (
            f"sufficiency is undefined, since the full model is not better than the empty {evaluation.noun}: {losses}"
        )
    word = str(evaluation.sufficiency)
    if value < evaluation.full.cross_entropy:
        word += ", and better at it than the full model"
    gain = f"{100 * share:.1f}% of the full model's gain over the empty {evaluation.noun}"
    both = f"full {evaluation.full.cross_entropy:.3f}, empty {evaluation.empty.cross_entropy:.3f}"
    return f"{word}: {gain} ({both}), {losses}"


def _necessity(evaluation: Evaluation) -> str:
    """How much worse the model is without the subnetwork, and without as many random weights."""
    rise, random = evaluation.necessity
    if math.isnan(rise) or math.isnan(random):
        return "whether the model needs it was not measured"
    times, ratio = _times(rise, random), ""
    if math.isfinite(times):
        only = "only " if 0 < times < _NECESSARY[1][0] else ""
        ratio = f"{only}{times:,.{0 if times >= 10 else 1}f} times as much as " if times > 0 else ""
    lost = evaluation.lost
    moves = f"{'rises' if rise >= 0 else 'falls'} by {abs(rise):.2f} nats"
    if not math.isnan(lost):
        moves += f" (a loss of {100 * lost:.0f}% of that gain)"
    without = f"without as many random {evaluation.units} ({random:.2f})"
    return f"{evaluation.need}: without it the model's loss {moves}, {ratio}{without}"


def _times(rise: float, random: float) -> float:
    """How many times the rise without random weights the rise without the subnetwork is; inf if the former is none."""
    return rise / random if random >= 0.005 else math.inf  # below, it is shown as 0.00
