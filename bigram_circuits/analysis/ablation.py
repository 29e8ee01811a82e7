"""Ablate parts of a model and measure the effect on its predictions.

Parts are named in the language of `components`: `L2H3`, `L0.mlp`, `heads` for each in turn, `subnetwork`, or a
`Subnetwork` or `Circuit`, whose weights or nodes are ablated. Activations are replaced by hooks, or weights set to 0:

- `zero`: the activation is set to 0.
- `mean`: it is set to its mean over all sequences and positions of the text, in the unablated model.
- `resample`: it is taken from another sequence of the same batch at the same position, paired at random with a seed
  (where a task's prompts differ in length, the other prompt may already have ended there).
- `weights`: all weights of the part are 0, as with `Subnetwork.drop_head`, `drop_neurons` and so on.

The nodes of a `Circuit` are replaced as the circuit says (`Circuit.replacement`), or that in which it is ablated.

Every rise in loss is compared with that of matched random ablations: as many random coordinates of the same
activations, random weights in the same matrices, or random nodes of the same hook points. There is no such control
where the part is all there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bigram_circuits.analysis.arguments import usual_order
from bigram_circuits.analysis.components import (
    Coordinates,
    M,
    Part,
    coordinates,
    matched_counts,
    parse,
    random_coordinates,
    random_within,
)
from bigram_circuits.analysis.conditions import check_arguments, reduced_to
from bigram_circuits.analysis.paired import (
    Job,
    Kept,
    PairedMeasurements,
    Table,
    first_difference,
    mean_log_odds,
    mean_loss,
)
from bigram_circuits.analysis.registry import Subject, in_suite
from bigram_circuits.circuit import Circuit
from bigram_circuits.masking.apply import Mask, MaskLike, as_mask
from bigram_circuits.measures import statistics
from bigram_circuits.measures.conditions import condition_of
from bigram_circuits.measures.quantities import SURPRISAL_CORRELATION, Quantity
from bigram_circuits.measures.results import Curves, Effects
from bigram_circuits.models.activations import NotShownError, check_predicts_tokens, record
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import check_model, uses_model
from bigram_circuits.names import layer_of
from bigram_circuits.progress import progress
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.targets.base import target_of
from bigram_circuits.tasks.task import Task, as_task, checked_task, measure
from bigram_circuits.text.corpus import spread

_SHARES = (0, 0.25, 0.5, 0.75, 1)  # of the complement's weights, to be removed
WAYS = ("zero", "mean", "resample", "weights")
"""The values of `by`."""


@usual_order
@uses_model
def ablate(
    model: Model,
    what: Any,
    subnetwork: MaskLike | None = None,
    target: Any = None,
    tokens: Any = None,
    *,
    by: str | None = None,
    seeds: int = 3,
    seed: int = 0,
) -> Effects:
    """Ablate parts of a model, one at a time, and measure the effect on its predictions.

    Args:
        model: From `load_model`.
        what: The parts, in the language of `components`: a string, a `Subnetwork` or `Circuit`, or a list.
        subnetwork: Also ablate within the model reduced to this subnetwork or circuit; those quantities end in
            `_in_subnetwork`, or `_in_circuit`.
        target: If given, also measure the change of the correlation of surprisals with this target's.
        tokens: Text to measure on (an array, or a corpus: its held-out part), or a `Task`.
        by: `zero`, `mean`, `resample` or `weights`; by default `zero` for components and `weights` for subnetworks,
            which can only be ablated by weights. To be left out for a `Circuit`, which has its own replacement.
        seeds: Number of matched random ablations to average over; 0 for none.
        seed: Seed of the resampling.

    Returns:
        For every part, in the full model and, if given, in the subnetwork or circuit: `rise_in_loss` and its `excess`
        over `random_rise`, that of the matched random ablations, with 95% paired intervals; the `loss` after ablation;
        with a target `change_in_r`; for a task with wrong tokens `change_in_log_odds`. Losses are in nats per scored
        place.

    Raises:
        ValueError: If an argument is wrong, `by` does not apply to a part, weights should be ablated within a circuit
            or nodes within a subnetwork, there is only one sequence to resample from, the model does not show an
            activation, or a surprisal is not finite.

    Example:
        >>> heads = bc.ablate(model, ["L0H0", "L0H1"], found, tokens=text, seeds=1)
        >>> heads.top(1)  # the head whose removal raises the loss most
    """
    if by is not None and by not in WAYS:
        raise ValueError(f"by must be one of {', '.join(WAYS)}, not {by!r}")
    if seeds < 0:
        raise ValueError(f"seeds must be 0 or more, not {seeds}")
    subnetwork, target = check_arguments(model, subnetwork, target=target, seed=seed)
    task = checked_task(model, tokens)
    return _ablate(
        model, parse(what, model, subnetwork), task, subnetwork, by=by, target=target, seeds=seeds, seed=seed
    )


def _ablate(
    model: Model,
    parts: Sequence[Part],
    task: Task,
    subnetwork: Mask | None,
    *,
    by: str | None,
    target: Any,
    seeds: int,
    seed: int,
) -> Effects:
    """`ablate` on checked arguments."""
    ways = {part.name: _way(part, by, subnetwork) for part in parts}
    if "resample" in [ways[part.name] for part in parts if not part.circuits] and len(task) < 2:
        raise ValueError("resampling takes activations from another sequence, but there is only one")
    of_nodes = [part for part in parts if part.circuits]
    by_weights = [part for part in parts if ways[part.name] == "weights" and part not in of_nodes]
    chosen = {part.name: coordinates(model, part) for part in parts if part not in (*of_nodes, *by_weights)}
    _check_shown(model, task, chosen.values())
    empty = Subnetwork.empty(model) if by_weights else None
    dropped: dict[str, Mask] = {part.name: part.weights(empty) for part in by_weights if empty is not None}
    dropped |= {part.name: part.nodes(part.circuits[0]) for part in of_nodes}
    bases: dict[str, Kept] = {"full": None} | ({} if subnetwork is None else {subnetwork.noun: subnetwork})
    measurements = PairedMeasurements(model, task, target)
    jobs: list[Job] = []
    for base, kept in bases.items():
        jobs.append(Job(base, "", kept))
        means = _BaseMeans(model, task, {name for masks in chosen.values() for name in masks})
        for part in parts:
            if part.name in chosen:
                jobs += _activation_jobs(part.name, base, kept, chosen[part.name], ways, means, task, seeds, seed)
            else:
                jobs += _mask_jobs(part, base, kept, dropped[part.name], seeds)
    with measurements, progress(total=len(jobs) * len(task), desc="ablating", unit="sequence") as bar:
        for job in jobs:
            measurements.measure(job, bar)
    table = measurements.table()
    names = tuple(part.name for part in parts)
    return Effects(
        title=f"Ablation on {task.name}",
        quantities=_quantities(list(bases), target is not None, task.wrong is not None),
        subject="ablation",
        names=names,
        **_effects(table, list(bases), names, task, target is not None),
        notes={
            "by": ways,
            "prompts": len(task),
            "scored_places": int(task.scored.sum()),
            "random_ablations": seeds,
            "loss_before": {base: table.point(base, "", mean_loss) for base in bases},
            "interval": "95%, paired bootstrap over sequences",
        }
        | ({"correlations": "scored places where the target's probability is above 0"} if target is not None else {}),
    )


def _way(part: Part, by: str | None, subnetwork: Mask | None) -> str:
    """How a part is ablated: one of `WAYS`, or the replacement of a circuit.

    Raises:
        ValueError: If that is impossible, or impossible within the subnetwork or circuit.
    """
    whole: Mask | None = next(iter((*part.circuits, *part.subnetworks)), None)
    if part.circuits and by is not None:
        raise ValueError(f"the nodes of {part.name!r} are replaced as their circuit says, not by={by!r}: leave by out")
    is_mixed = subnetwork is not None and isinstance(subnetwork, Circuit) != bool(part.circuits)
    if is_mixed and (whole is not None or by == "weights"):
        what, where = ("nodes", "subnetwork") if part.circuits else ("weights", "circuit")
        raise ValueError(f"the {what} of {part.name!r} cannot be ablated within a {where}")
    return part.circuits[0].replacement.kind if part.circuits else by or ("weights" if whole is not None else "zero")


def _check_shown(model: Model, task: Task, chosen: Iterable[Coordinates]) -> None:
    """Raise NotShownError unless the forward pass shows all these activations with these sizes."""
    sizes = {name: mask.numel() for masks in chosen for name, mask in masks.items()}
    tokens = torch.from_numpy(np.asarray(task.tokens[:1, :2]).astype(np.int64)).to(model.cfg.device)
    with torch.inference_mode():
        seen, _ = record(model, tokens, list(sizes))
    for name, size in sizes.items():
        if (found := seen[name].flatten(2).shape[2]) != size:
            raise NotShownError(f"the activation {name} has {found} values per position, but {size} were expected")


class _BaseMeans:
    """Mean activations of a base, computed on first use, when the model is reduced to it."""

    def __init__(self, model: Model, task: Task, names: set[str]) -> None:
        self._arguments = (model, task, sorted(names))
        self._means: dict[str, Tensor] | None = None

    def __call__(self) -> dict[str, Tensor]:
        if self._means is None:
            self._means = mean_activations(*self._arguments)
        return self._means


def _activation_jobs(
    name: str,
    base: str,
    kept: Kept,
    chosen: Coordinates,
    ways: Mapping[str, str],
    means: _BaseMeans,
    task: Task,
    seeds: int,
    seed: int,
) -> Iterable[Job]:
    by = ways[name]

    def job(masks: Coordinates, random: int | None) -> Job:
        key = (base, by, *((point, mask.numpy().tobytes()) for point, mask in sorted(masks.items())))
        return Job(
            base, name, kept, lambda: _Replace(masks, by, means() if by == "mean" else {}, task, seed), key, random,
            min(map(layer_of, masks)),
        )  # fmt: skip

    yield job(chosen, None)
    for random in range(seeds):
        masks = random_coordinates(chosen, random)
        if masks is not None:
            yield job(masks, random)


def _mask_jobs(part: Part, base: str, kept: Any, dropped: Any, seeds: int) -> Iterable[Job]:
    """Jobs without the weights or nodes of a part; the base, if it is reduced, has the same kind of mask."""
    pool = dropped.constant(True) if kept is None else kept
    here = dropped & pool
    rest = pool - here
    yield Job(base, part.name, rest, key=(base, dropped.units, rest.checksum), first=first_difference(rest, kept))
    counts = matched_counts(here, pool)
    if counts is None or part.name == "random":
        return
    for random in range(seeds):
        rest = pool - random_within(pool, counts, random)
        key = (base, dropped.units, rest.checksum)
        yield Job(base, part.name, rest, key=key, random=random, first=first_difference(rest, kept))


def _quantities(bases: Sequence[str], with_target: bool, with_odds: bool) -> tuple[Quantity, ...]:
    listed = []
    for base in bases:
        end = "" if base == "full" else f"_in_{base}"
        where = "the full model" if base == "full" else f"the model reduced to the {base}"
        listed += [
            Quantity(f"rise_in_loss{end}", "nats", f"Rise in the loss of {where} when the part is ablated."),
            Quantity(f"excess{end}", "nats", "Rise in loss minus that of matched random ablations."),
            Quantity(f"random_rise{end}", "nats", "Rise in loss with matched random ablations, mean over draws."),
            Quantity(f"loss{end}", "nats", f"Loss of {where} with the part ablated."),
        ]
        if with_target:
            listed.append(Quantity(f"change_in_r{end}", "", "Change in the correlation with the target's surprisals."))
        if with_odds:
            listed.append(
                Quantity(f"change_in_log_odds{end}", "nats", "Change in the log odds of right against wrong.")
            )
    return tuple(listed)


def _effects(
    table: Table, bases: Sequence[str], names: Sequence[str], task: Task, with_target: bool
) -> dict[str, Float[np.ndarray, "quantity thing"]]:
    """The values and intervals, in the order of `_quantities`."""
    nan = math.nan
    rows: list[list[tuple[float, float, float]]] = []
    for base in bases:
        rows.append([table.change(base, name, mean_loss) for name in names])
        rows.append([table.excess(base, name, mean_loss) for name in names])
        rows.append([(table.random_change(base, name, mean_loss), nan, nan) for name in names])
        rows.append([(table.point(base, name, mean_loss), nan, nan) for name in names])
        if with_target:
            rows.append([table.change(base, name, statistics.correlation) for name in names])
        if task.wrong is not None:
            rows.append([table.change(base, name, mean_log_odds) for name in names])
    numbers = np.array(rows, dtype=float)
    return {"values": numbers[:, :, 0], "low": numbers[:, :, 1], "high": numbers[:, :, 2]}


@dataclass(frozen=True)
class _Replace:
    """Forward hooks that replace coordinates of activations."""

    chosen: Coordinates
    by: str
    means: Mapping[str, Tensor]
    task: Task
    seed: int

    def __call__(self, index: int, part: slice) -> list[tuple[str, Callable[..., Any]]]:
        n = part.stop - part.start
        partner = torch.arange(n)
        if self.by == "resample":
            order = np.random.default_rng((self.seed, index)).permutation(n)
            partner[torch.from_numpy(order)] = torch.from_numpy(np.roll(order, 1))
        return [(name, self._hook(name, mask, partner)) for name, mask in self.chosen.items()]

    def _hook(self, name: str, mask: Tensor, partner: Tensor) -> Callable[..., Any]:
        def replace(value: Tensor, hook: Any) -> Tensor:
            flat = value.reshape(*value.shape[:2], -1)
            if self.by == "zero":
                new = torch.zeros_like(flat)
            elif self.by == "mean":
                new = self.means[name].to(flat).expand_as(flat)
            else:
                new = flat[partner.to(flat.device)]
            return torch.where(mask.to(flat.device), new, flat).view(value.shape)

        return replace


def mean_activations(model: Model, task: Task, names: Iterable[str]) -> dict[str, Float[Tensor, " _"]]:
    """Means of activations over all prompts and positions up to each prompt's last scored place; float64, CPU."""
    totals: dict[str, Tensor] = {}
    ends = torch.from_numpy(task.ends)

    def hooks(index: int, part: slice) -> list[tuple[str, Callable[..., Any]]]:
        inside = torch.arange(task.tokens.shape[1]) <= ends[part, None]

        def hook_for(name: str) -> Callable[..., Any]:
            def add(value: Tensor, hook: Any) -> None:
                flat = value.reshape(*value.shape[:2], -1)
                total = flat[inside.to(flat.device)].double().sum(0).cpu()
                totals[name] = totals[name] + total if name in totals else total

            return add

        return [(name, hook_for(name)) for name in names]

    names = list(dict.fromkeys(names))
    measure(model, task, hooks=hooks)
    return {name: total / int((task.ends + 1).sum()) for name, total in totals.items()}


# --- removing the complement at random ---


@uses_model
def stochastic_ablation(
    model: Model,
    subnetwork: MaskLike,
    target: Any,
    tokens: Any,
    *,
    shares: Sequence[float | int] = _SHARES,
    draws: int = 5,
    seed: int = 0,
) -> Curves:
    """Remove a growing random share of the weights outside a subnetwork, from the full model down to the subnetwork.

    A subnetwork on its own shows only what it does when everything else is removed at once: the removed weights may
    have suppressed it, or the masked model may be far from any state of the full model. This test is stricter: for
    every share, several random choices of complement weights are removed, the same share in every matrix. If the
    subnetwork carries the behaviour in the full model, the correlation with the target rises (or holds) throughout, and
    stays above that of a matched random subnetwork whose complement is removed in the same way.

    Args:
        model: From `load_model`.
        subnetwork: The weights or nodes that are always kept.
        target: The target whose surprisals are correlated with the model's.
        tokens: Text (an array, or a corpus: its held-out part), or a `Task`.
        shares: Shares of the complement to remove, from 0 (the full model) to 1 (the subnetwork or circuit alone).
        draws: Random choices for each share, each with its own matched random subnetwork.
        seed: Seed of the first draw.

    Returns:
        `surprisal_correlation` and `loss` by share removed, for `subnetwork` and `random` (of a circuit, `circuit` and
        `random nodes`): means over draws, with the
        lowest and the highest draw as the interval.

    Raises:
        ValueError: If a share is not from 0 to 1, there is no share or draw, or shapes or vocabularies do not match.

    Example:
        >>> curve = analysis.stochastic_ablation(model, found, target, text, shares=(0, 0.5, 1), draws=1)
        >>> curve.plot()
    """
    if not len(shares) or any(not 0 <= share <= 1 for share in shares):
        raise ValueError(f"shares must be numbers from 0 to 1, not {tuple(shares)}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    check_model(model)
    target = target_of(target, model)  # None is not allowed here,
    subnetwork = as_mask(subnetwork)  # nor here
    check_arguments(model, subnetwork, seed=seed)
    return _thin_out(model, subnetwork, target, checked_task(model, tokens), shares=shares, draws=draws, seed=seed)


def _thin_out(
    model: Model,
    subnetwork: Mask,
    target: Any,
    task: Task,
    *,
    shares: Sequence[float | int],
    draws: int,
    seed: int,
) -> Curves:
    """`stochastic_ablation` on checked arguments."""
    numbers = np.full((2, 2, len(shares), draws), math.nan)
    seen: dict[str, tuple[float, float]] = {}
    with progress(total=2 * len(shares) * draws * len(task), desc="removing", unit="sequence") as bar:
        for draw in range(draws):
            for row, core in enumerate[Any]((subnetwork, subnetwork.random_like(seed=seed + draw))):
                for point, share in enumerate(shares):
                    kept = core | _thinned(~core, 1 - share, seed + draw)
                    if (key := kept.checksum) not in seen:
                        with reduced_to(model, kept):
                            whole = measure(model, task, target=target).sum(0)
                        seen[key] = (float(statistics.correlation(whole)), float(mean_loss(whole)))
                    numbers[:, row, point, draw] = seen[key]
                    bar.update(len(task))
    return Curves(
        title="Complement removed at random",
        quantities=(
            SURPRISAL_CORRELATION,
            Quantity("loss", "nats", "The model's own next-token loss."),
        ),
        axis="share_removed",
        points=tuple(shares),
        conditions=(subnetwork.noun, condition_of("random", subnetwork.noun)),
        values=numbers.mean(-1),
        low=numbers.min(-1),
        high=numbers.max(-1),
        notes={
            "draws": draws,
            "seed": seed,
            "prompts": len(task),
            "interval": "lowest to highest draw",
            "correlations": "scored places where the target's probability is above 0",
        },
    )


def _thinned(subnetwork: M, share: float | int, seed: int) -> M:
    """Keep a random share of the weights or nodes, the same of every name (to the nearest one)."""
    counts = {name: round(share * count.kept) for name, count in subnetwork.by_name().items()}
    return random_within(subnetwork, counts, seed)


# --- steps of `analyze` ---


@in_suite("ablation_components")
def _(subject: Subject) -> Effects:
    parts, task = parse(["attns", "mlps"], subject.model), _task(subject)
    return _ablate(subject.model, parts, task, subject.subnetwork, by=None, target=subject.target, seeds=0, seed=0)


@in_suite("ablation_heads")
def _(subject: Subject) -> Effects:
    parts, task = parse("heads", subject.model), _task(subject)
    return _ablate(subject.model, parts, task, None, by=None, target=subject.target, seeds=1, seed=0)


@in_suite("stochastic_ablation")
def _(subject: Subject) -> Curves:
    return _thin_out(
        subject.model, subject.subnetwork, subject.target, _task(subject), shares=_SHARES, draws=3, seed=subject.seed
    )


def _task(subject: Subject) -> Task:
    check_predicts_tokens(subject.model)
    if subject.task is not None:
        places = np.arange(len(subject.task))[:, None].repeat(subject.task.tokens.shape[1], 1)
        return subject.task.select(spread(places, subject.sweep_tokens)[:, 0])
    return as_task(subject.sweep_text, subject.model.cfg.d_vocab)
