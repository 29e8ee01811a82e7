"""Attempts to refute a finding: run the recipe where it should fail, and repeat it where it should agree.

A good subnetwork proves little if the same recipe finds one that is as good in an untrained model, or for a meaningless
target: then the computation is in the mask, not in the model. And which weights are kept is only a finding if another
seed keeps them too. (Whether the model needs the weights is a separate question: `evaluate` compares the loss without
them with the loss without random ones.) A larger mask can do more, so everything is compared at equal size
(`SparsifyConfig.target_fraction`). The recipe is run again

- on the same model at other sizes, for a curve of faithfulness by size;
- on the same model with re-initialised blocks, at the same sizes; embeddings, final norm and unembedding stay as
  trained (compare the supermasks that Zhou et al. 2019 and Ramanujan et al. 2020 found in random networks);
- on the model with everything re-initialised;
- on the model with the entries of every maskable matrix shuffled, so that only their places are untrained;
- on the first three without a penalty on kept weights: the ceiling of each (Chang and Bergen 2025, Table 2);
- for a nonsense target: the same distribution under a random permutation s of the vocabulary,
  P'(y | x) = P(s(y) | s(x)); for a task, its answers dealt to its prompts at random;
- of a circuit, in its place: random nodes, as many at every hook point;
- with other seeds, which change the data order, the random numbers of the masking method and the re-initialised blocks.

Beside these, the finding itself is tested harder (`stricter.py`): the worst case of what it drops, rivals, and whether
the other seeds compute the same.

Each run is scored by the share of the context's information about the next token that it recovers, for its own target:
1 - KL / KL0, where KL0 is the KL of the best constant prediction, the target's mean distribution over the text. (KL0
is the mutual information of context and next token under the target.) The gap between the subnetwork and a control is
measured on the same sequences, with paired intervals.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bigram_circuits.circuit import WEIGHT, Circuit
from bigram_circuits.evaluation import Measured, measure
from bigram_circuits.experiments.controls import (
    RANDOM_BLOCKS,
    RANDOM_MODEL,
    SHUFFLED,
    RenamedTarget,
    with_random_blocks,
    with_shuffled_blocks,
)
from bigram_circuits.experiments.seeds import overlaps_of, spread_of
from bigram_circuits.experiments.stricter import FOLDER, StricterTests, load_stricter, stricter_tests
from bigram_circuits.experiments.verdicts import (
    FOUND,
    NONSENSE,
    RANDOM_NODES,
    SEED,
    TRAINED,
    Judged,
    ceiling_words,
    free_name,
    judge_controls,
    judge_seeds,
    seed_name,
    seeds_of,
    size_ratio,
    sized_name,
)
from bigram_circuits.learning.ranks import refuse_several
from bigram_circuits.learning.training import SparsifyConfig, find_mask
from bigram_circuits.masking.apply import Mask, MaskLike, as_mask
from bigram_circuits.masking.candidates import Candidates
from bigram_circuits.measures.quantities import (
    CONTEXT_TOLD,
    CROSS_ENTROPY,
    FRACTION,
    KL,
    MEAN_SURPRISAL,
    SURPRISAL_CORRELATION,
    TOP1_AGREEMENT,
    Quantity,
)
from bigram_circuits.measures.results import Curves, Effects, Ends, Result, effects_of, load_result_and_origin
from bigram_circuits.measures.statistics import STATISTICS, ContextTold, Statistic
from bigram_circuits.models.activations import check_predicts_tokens
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.runs import Run, run_id
from bigram_circuits.storage.origin import Origin
from bigram_circuits.storage.records import check_no_link
from bigram_circuits.targets.base import PlacedTarget, Target, kl_of_best_constant, target_of
from bigram_circuits.text.corpus import Corpus

_QUANTITIES = (
    SURPRISAL_CORRELATION, KL, CROSS_ENTROPY, MEAN_SURPRISAL, TOP1_AGREEMENT, FRACTION, CONTEXT_TOLD,
)  # fmt: skip
_GAPS = (
    Quantity("kl_gap", "nats", "KL of the control minus that of the trained model's subnetwork of the same size."),
    Quantity("r_gap", "", "Pearson r of the trained model's subnetwork minus that of the control."),
    Quantity("context_told_gap", "share", "Context told by the trained model's subnetwork minus that by the control."),
    FRACTION,
)
_SIZES = (0.5, 1, 2)  # times the subnetwork's own
_FORMER_NAMES = {"blocks initialised anew": RANDOM_BLOCKS}  # in results of version 0.1.0
_R = STATISTICS["surprisal_correlation"]


@dataclass(frozen=True)
class Falsification:
    """The outcome of the attempts to refute a finding.

    Example:
        >>> tested = bc.falsify(model, target, corpus, config, found=found)
        >>> tested.verdict  # what the attempts to refute it show, in words
        >>> tested.gaps.plot()  # how far the trained model is ahead at equal size
    """

    controls: Effects
    """A row for the subnetwork found and for every attempt of its size or without a penalty: r, KL, cross-entropy,
    loss, agreement, share kept, and share of the context's information."""
    seeds: Effects
    """Overlap of each pair of seeds' subnetworks, overall and by component, with the exact null."""
    spread: Effects
    """Every number across seeds, the original included: mean, standard deviation, minimum, maximum."""
    curves: Curves | None = None
    """The same numbers by size (the share of weights asked for), on the trained model, with re-initialised blocks and
    with everything re-initialised; None, like `gaps`, in results of versions that did not compare at equal size."""
    gaps: Effects | None = None
    """What the trained model's subnetworks are ahead of each control of their size, with paired 95% intervals."""
    of: Origin | None = None
    """The subnetwork and the text that were tried, and the run if there is one."""
    stricter: StricterTests | None = None
    """Its worst case, its rivals, and whether other seeds compute the same; None in results of earlier versions."""

    @property
    def refuted(self) -> tuple[str, ...]:
        """Names of the controls that refute the finding; empty if none does."""
        return tuple(one.control for one in self.judged if one.finding == "refuted")

    @property
    def says(self) -> tuple[str, ...]:
        """What each control and stricter test shows, in a few sentences, and what models reach without a penalty."""
        ceiling = ceiling_words(self.controls)
        return (
            *(one.says for one in judge_controls(self.controls, self.gaps, self.curves)),
            *([ceiling] if ceiling else []),
            *(self.stricter.says if self.stricter else ()),
            judge_seeds(self.controls, self.seeds).says,
        )

    @property
    def verdict(self) -> str:
        """Which controls refute the finding, and which of them or of the stricter tests weaken it, as a sentence."""
        judged = self.judged
        parts = [
            f"{word} by: {', '.join(names)}."
            for word, finding in (("REFUTED", "refuted"), ("Weakened", "weakened"))
            if (names := [one.control for one in judged if one.finding == finding])
        ]
        return " ".join(parts) or "No control refutes or weakens the finding."

    @property
    def size_ratio(self) -> tuple[float, float] | None:
        """How many times the subnetwork's weights re-initialised blocks need for its KL: ends of a range.

        Both are the same where the KL lies within the curve, interpolated over log(size); (largest size, inf) or
        (0, smallest size) where it does not. None in results of versions that did not compare at equal size.
        """
        return None if self.curves is None else size_ratio(self.curves, self.controls.get("fraction")[FOUND])

    @property
    def judged(self) -> list[Judged]:
        """What each control shows, then each stricter test, and last what other seeds show."""
        return [
            *judge_controls(self.controls, self.gaps, self.curves),
            *(self.stricter.judged if self.stricter else ()),
            judge_seeds(self.controls, self.seeds),
        ]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the results to a folder as JSON files."""
        for name in (*_PARTS, *_LATER_PARTS):
            if (part := getattr(self, name)) is not None:
                part.save(Path(folder) / f"{name}.json", self.of)
        if self.stricter:
            self.stricter.save(Path(folder) / FOLDER.name, self.of)

    def __str__(self) -> str:
        return "\n".join([f"{self.controls}", "", *self.says, self.verdict])


_PARTS: dict[str, type[Result]] = {"controls": Effects, "seeds": Effects, "spread": Effects}
_LATER_PARTS: dict[str, type[Result]] = {"curves": Curves, "gaps": Effects}  # since version 0.2.0


def load_falsification(folder: str | os.PathLike[str], run: Run | None = None) -> Falsification | None:
    """Read what `Falsification.save` wrote; None if the folder holds none.

    Args:
        folder: The folder.
        run: The run that it must be of; None: any.

    Raises:
        ValueError: If a file is damaged, a symbolic link, or of another run.

    Example:
        >>> bc.load_falsification("runs/short") is None  # nobody has tried to refute this run
        True
    """
    kinds = _PARTS | _LATER_PARTS
    paths = {name: path for name in kinds if (path := Path(folder) / f"{name}.json").is_file()}
    if not paths.keys() >= _PARTS.keys():
        return None
    read = {name: load_result_and_origin(path, follow=False) for name, path in paths.items()}
    if run is not None:
        for name, (_, of) in read.items():
            run.check_origin(paths[name], of, "`find --falsify` writes it again once it is removed")
    if not all(isinstance(part, kinds[name]) for name, (part, _) in read.items()):
        raise ValueError(f"{str(folder)!r} holds results of another kind, not those of `falsify`")
    parts: dict[str, Any] = {name: part for name, (part, _) in read.items()}
    names = tuple(_FORMER_NAMES.get(name, name) for name in parts["controls"].names)
    parts |= {"controls": replace(parts["controls"], names=names), "of": read["controls"][1]}
    return Falsification(**parts, stricter=load_stricter(Path(folder) / FOLDER.name, run) or None)


@uses_model
def falsify(
    model: Model,
    target: Any,
    corpus: Corpus,
    config: SparsifyConfig | None = None,
    *,
    found: MaskLike,
    sizes: Sequence[float | int] | None = None,
    seeds: int = 3,
    stricter: bool = True,
    run_dir: str | os.PathLike[str] | None = None,
) -> Falsification:
    """Try to refute a finding: compare it, at equal size, with untrained weights, a nonsense target and other seeds.

    With three sizes it takes 13 + 2 `seeds` times as long as finding the subnetwork (19 times by default), and memory
    for a second model; the worst case, where it is measured, takes about as long once more. Every size more or less is
    two rounds of learning more or less, every seed too, and the two rivals are one each.

    Args:
        model: From `load_model`.
        target: The target that the subnetwork was learned for.
        corpus: Masks are learned on its training part and measured on its held-out part.
        config: The recipe that found it, of weights or of nodes; `SparsifyConfig()` by default. Its `target_fraction`
            is replaced by each size in turn; without a penalty, it is left out and `sparsity_weight` is 0.
            (Straight-through masks need a size, so there is no such attempt with them.)
        found: The subnetwork or circuit to be tested.
        sizes: Sizes of the curves, as shares of the maskable weights, or of the nodes; by default half, once and twice
            that of what was found (of the weights that the recipe can drop), which is always among them.
        seeds: Number of other seeds, for the trained model and for re-initialised blocks; at least 2, to have a
            spread.
        stricter: Whether to make the stricter tests too (`stricter_tests`): worst case, rivals, and whether the other
            seeds compute the same.
        run_dir: A folder for the runs and the results; runs that are already there are reused.

    Raises:
        ValueError: If `seeds` is below 2, a size is out of range or given twice, nothing is kept of what the recipe
            can drop, the recipe is of other units than what was found, or both of weights and of nodes, or model,
            target, subnetwork and corpus do not fit together.
        OSError: If the model's files, which are read again, no longer exist.

    Example:
        >>> tested = bc.falsify(model, target, corpus, config, found=found)
        >>> tested.save("runs/short/falsify")
    """
    refuse_several("falsify")
    if seeds < 2:
        raise ValueError(f"a spread needs at least 2 other seeds, not {seeds}")
    config = config or SparsifyConfig()
    found = as_mask(found)
    found.check_fits(model)
    _check_recipe(config, found)
    target = target_of(target, model)
    check_predicts_tokens(model)
    own, kept = found.kept, _sizes_kept(model, config, found, sizes)
    folder = None if run_dir is None else Path(run_dir)
    if folder is not None:
        check_no_link(folder)
    attempts = _Attempts(corpus, config, found, folder)
    others = range(config.seed + 1, config.seed + 1 + seeds)

    trained = attempts.curve(TRAINED, model, target, [size for size in kept if size != own])
    trained[own] = measure(model, found, target, corpus.held_out)
    free = attempts.free(TRAINED, model, target)
    nonsense = _nonsense(target, model.cfg.d_vocab, config.seed)
    meaningless = attempts.at(NONSENSE, model, nonsense, own)[1]
    again: dict[str, Mask] = {FOUND: found}
    reseeded: dict[str, Measured] = {}
    for seed in others:
        name = seed_name(seed)
        again[name], reseeded[name] = attempts.at(name, model, target, own, seed)

    other = with_random_blocks(model, seed=config.seed)
    blocks = attempts.curve(RANDOM_BLOCKS, other, target, kept)
    free |= attempts.free(RANDOM_BLOCKS, other, target)
    for seed in others:
        del other  # there is memory for two models, not for three
        name, other = seed_name(seed, RANDOM_BLOCKS), with_random_blocks(model, seed=seed)
        reseeded[name] = attempts.at(name, other, target, own, seed)[1]
    del other
    other = with_shuffled_blocks(model, seed=config.seed)
    shuffled = attempts.at(SHUFFLED, other, target, own)[1]
    del other
    other = with_random_blocks(model, seed=config.seed, everything=True)
    everything = attempts.curve(RANDOM_MODEL, other, target, [own])
    free |= attempts.free(RANDOM_MODEL, other, target)
    del other

    draws: dict[str, Measured] = {}
    if isinstance(found, Circuit):
        for seed in (config.seed, *others):
            name = RANDOM_NODES if seed == config.seed else seed_name(seed, RANDOM_NODES)
            draws[name] = measure(model, found.random_like(seed=seed), target, corpus.held_out)

    measured = {FOUND: trained[own], RANDOM_BLOCKS: blocks[own], RANDOM_MODEL: everything[own]}
    measured |= {SHUFFLED: shuffled, NONSENSE: meaningless} | draws | reseeded | free
    told = ContextTold(kl_of_best_constant(target, corpus.held_out))
    told_nonsense = ContextTold(kl_of_best_constant(nonsense, corpus.held_out))
    lines = {TRAINED: trained, RANDOM_BLOCKS: blocks, RANDOM_MODEL: everything}
    gaps = {
        RANDOM_BLOCKS: _gap(trained[own], blocks[own], told),
        RANDOM_MODEL: _gap(trained[own], everything[own], told),
        SHUFFLED: _gap(trained[own], shuffled, told),
        NONSENSE: _gap(trained[own], meaningless, told, told_nonsense),
    }
    gaps |= {
        attempts.sized_name(RANDOM_BLOCKS, size): _gap(trained[size], blocks[size], told)
        for size in kept
        if size != own
    }
    gaps |= {name: _gap(trained[own], one, told) for name, one in draws.items()}
    for seed in others:
        name = seed_name(seed, RANDOM_BLOCKS)
        gaps[name] = _gap(reseeded[seed_name(seed)], reseeded[name], told)
    harder = None
    if stricter:
        of_seeds = {f"{SEED}{seed}": again[seed_name(seed)] for seed in others}
        at = None if folder is None else folder / FOLDER.name
        harder = stricter_tests(model, target, corpus, config, found=found, others=of_seeds, run_dir=at)
    result = Falsification(
        _controls(measured, {name: told_nonsense if name == NONSENSE else told for name in measured}, found),
        overlaps_of(again),
        _spread(measured),
        _curves(lines, kept, found.total, told),
        _gaps(gaps),
        Origin(run_id(folder.parent) if folder else None, found.checksum, corpus.fingerprint, corpus.source),
        harder,
    )
    if folder is not None:
        result.save(folder)
    return result


def _nonsense(target: Target, d_vocab: int, seed: int) -> Target:
    """A target of the same shape that means nothing."""
    if isinstance(target, PlacedTarget):
        return target.nonsense(seed)
    return RenamedTarget(target, d_vocab, seed=seed)


def _check_recipe(config: SparsifyConfig, found: Mask) -> None:
    """Raise ValueError unless a recipe finds what is of the same units, and of one kind of unit."""
    units = set(config.units or (WEIGHT,))
    if (config.units is None) == isinstance(found, Circuit) or (units > {WEIGHT}):
        raise ValueError(
            f"the recipe is of {', '.join(sorted(units))}, and what was found is a {found.noun}: give the recipe that "
            "found it; nodes and weights cannot be tried together"
        )


def _sizes_kept(model: Model, config: SparsifyConfig, found: Mask, sizes: Sequence[float | int] | None) -> list[int]:
    """The numbers of weights or nodes to keep, from the smallest; that of what was found is among them.

    Raises:
        ValueError: If the recipe is of other nodes than what was found, nothing is kept that it can drop, or a size is
            out of range.
    """
    candidates = Candidates(model, config)
    if candidates.total != found.total:
        raise ValueError(f"the recipe is of {candidates.total:,} {found.units}, the {found.noun} of {found.total:,}")
    always = candidates.total - candidates.gated_size
    free = found.kept - always
    if free < 1:
        raise ValueError(
            f"the {found.noun} keeps {found.kept:,} {found.units}, none of those that the recipe can drop: there is "
            "nothing to compare at equal size"
        )
    if sizes is None:
        kept = {always + max(1, round(times * free)) for times in _SIZES}
        return sorted(size for size in kept | {found.kept} if size <= found.total)
    kept = [round(size * found.total) if 0 < size <= 1 else 0 for size in sizes]
    if len(kept) < 1 or min(kept) <= always:
        least = always / found.total
        raise ValueError(
            f"sizes must be shares of the {found.units}, above {least:.4g} and at most 1, not {list(sizes)}"
        )
    if len(set(kept)) < len(kept):
        raise ValueError(f"sizes must differ, not {list(sizes)}")
    return sorted({*kept, found.kept})


@dataclass(frozen=True)
class _Attempts:
    """Runs of the recipe, each in a folder of its own if there is one for all."""

    corpus: Corpus
    config: SparsifyConfig
    found: Mask
    """What the recipe found."""
    folder: Path | None

    def sized_name(self, of: str, kept: int) -> str:
        """The name of an attempt at another size."""
        return sized_name(of, kept, self.found.units)

    def at(self, name: str, model: Model, target: Target, kept: int, seed: int | None = None) -> tuple[Mask, Measured]:
        """Find a subnetwork or circuit of a size, and measure it."""
        seed = self.config.seed if seed is None else seed
        recipe = replace(self.config, target_fraction=kept / self.found.total, seed=seed)
        return self._learn(self.sized_name(name, kept), model, target, recipe)

    def curve(self, name: str, model: Model, target: Target, sizes: Sequence[int]) -> dict[int, Measured]:
        """Measure a subnetwork of every size."""
        return {kept: self.at(name, model, target, kept)[1] for kept in sizes}

    def free(self, of: str, model: Model, target: Target) -> dict[str, Measured]:
        """Measure a subnetwork found without a penalty; empty if the method must be told how many weights to keep."""
        try:
            recipe = replace(self.config, target_fraction=None, sparsity_weight=0.0)
        except ValueError:
            return {}
        name = free_name(of)
        return {name: self._learn(name, model, target, recipe)[1]}

    def _learn(self, name: str, model: Model, target: Target, recipe: SparsifyConfig) -> tuple[Mask, Measured]:
        to = None if self.folder is None else self.folder / name.replace(",", "").replace(" ", "-")
        if to is not None:
            check_no_link(to)
        # the finding's own run needed as much memory
        learned = find_mask(model, target, self.corpus, recipe, run_dir=to, check_memory="off").mask
        return learned, measure(model, learned, target, self.corpus.held_out)


# --- what was measured, as results -----------------------------------------------------------------------------------


def _numbers(one: Measured, told: ContextTold) -> list[Ends]:
    """Each of `_QUANTITIES`."""
    row: list[Ends] = []
    for quantity in _QUANTITIES:
        statistic: Statistic | None = told if quantity.name == "context_told" else STATISTICS.get(quantity.name)
        if statistic is None:
            row.append((getattr(one.faithfulness, quantity.name), math.nan, math.nan))
        else:
            row.append((float(statistic(one.sums.sum(0))), *one.interval(statistic)))
    return row


def _gap(
    trained: Measured, control: Measured, told: ContextTold, told_control: ContextTold | None = None
) -> list[Ends]:
    """Each of `_GAPS`."""
    key = "cross_entropy" if math.isnan(trained.faithfulness.kl) else "kl"  # the same where the target is the same
    size = (control.faithfulness.fraction, math.nan, math.nan)
    return [
        control.minus(trained, STATISTICS[key]),
        trained.minus(control, _R),
        trained.minus(control, told, told_control),
        size,
    ]


def _controls(measured: Mapping[str, Measured], told: Mapping[str, ContextTold], found: Mask) -> Effects:
    """A row for each attempt."""
    rows = {name: _numbers(one, told[name]) for name, one in measured.items()}
    controls = effects_of("Attempts to refute the finding", _QUANTITIES, "attempt", rows)
    return replace(controls, notes={"noun": found.noun, "units": found.units})


def _gaps(rows: Mapping[str, list[Ends]]) -> Effects:
    return effects_of("What the trained model adds at equal size", _GAPS, "control", rows)


def _curves(lines: Mapping[str, Mapping[int, Measured]], sizes: Sequence[int], total: int, told: ContextTold) -> Curves:
    """A line for each model; nan at the sizes that were not tried."""
    none = [(math.nan,) * 3] * len(_QUANTITIES)  # "fraction" is what is kept: of larger units, it can be less
    numbers = [[_numbers(line[kept], told) if kept in line else none for kept in sizes] for line in lines.values()]
    values, low, high = np.array(numbers, dtype=float).transpose(3, 2, 0, 1)
    points = tuple(kept / total for kept in sizes)
    return Curves(
        "Trained and untrained weights at equal size", _QUANTITIES, "size", points, tuple(lines), values, low, high
    )


def _spread(measured: Mapping[str, Measured]) -> Effects:
    of_seeds = [measured[name].faithfulness for name in seeds_of(measured)]
    return spread_of({one.name: [getattr(seed, one.name) for seed in of_seeds] for one in _QUANTITIES[:-1]})
