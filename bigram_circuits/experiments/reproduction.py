"""A paper's numbers, measured again: theirs, ours and the difference, row by row and model by model.

What ours are, by row (`paper.ROWS`):

- *sweep*: a subnetwork for each lambda, lambda 0 among them, each learned on its own. Best r; r of the full model; and
  the sparse subnetwork, by the paper's rule the smallest one whose r is at most `Paper.margin` below that of lambda 0.
- *baselines*: at lambda 0, the trained model, everything re-initialised, and re-initialised blocks with trained
  embeddings (`with_random_blocks`). Without any mask or block: the embedding read by final norm and unembedding, and
  the same with one linear map in between, learned by gradient (`learn_linear_map`).
- *overlap*: the sparse subnetwork and one learned with the same recipe for the model's own output (optimal pruning), at
  the paper's lambda for that model, or else that of the sparse subnetwork. Chance is the exact mean for as many weights
  in every matrix (`analysis/overlap.py`); the paper's is the mean over shuffles of the rows of every matrix.
- *components*: shares of the sparse subnetwork's weights.
- *rotations*: of the residual stream before the first block and after it, for the full model and the sparse subnetwork
  (`layer_rotations`; ridge with alpha 1 on at most 2**17 tokens).
- *covariance*: similarity of the residual stream before and after the first block, and its mean over the later blocks
  (`covariance_similarity` with `measure="covariance_cosine"`). The paper only draws it.
- *released*: the masks that the authors released (`load_published`), at the paper's lambda for that model, or else the
  largest one, measured on our text.

Correlations follow the zero-probability rule (`measures/statistics.py`).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bigram_circuits.analysis.affine import fit_maps
from bigram_circuits.analysis.geometry import covariance_similarity, rotation_curves
from bigram_circuits.analysis.overlap import overlap
from bigram_circuits.evaluation import evaluate
from bigram_circuits.experiments.controls import (
    RANDOM_BLOCKS,
    RANDOM_MODEL,
    correlation_without_blocks,
    learn_linear_map,
    with_random_blocks,
)
from bigram_circuits.experiments.reproduced import Number, ReproducedModel, ReproducedNumber, Reproduction, is_same
from bigram_circuits.learning.ranks import refuse_several
from bigram_circuits.learning.training import find_subnetwork, identity_of
from bigram_circuits.models.activations import NotShownError
from bigram_circuits.models.identity import weight_hash
from bigram_circuits.models.loading import is_local
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.names import WeightName, short_hash, short_name
from bigram_circuits.paper import PAPERS, ROWS, Paper, PaperModel
from bigram_circuits.published import load_published
from bigram_circuits.recipe import SparsifyConfig
from bigram_circuits.runs import RunFolder, load_run
from bigram_circuits.storage.records import check_no_link
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.targets.base import Target
from bigram_circuits.targets.model import ModelTarget
from bigram_circuits.text.corpus import Corpus, spread

_FIT_TOKENS = 1 << 17  # of affine maps, as in the paper
_MAP_STEPS = 1000  # of the linear map, at most


@uses_model
def reproduce_model(
    model: Model,
    target: Target,
    corpus: Corpus,
    result: Reproduction,
    name: str,
    folder: Path,
    *,
    rows: Sequence[str],
    check_memory: str = "warn",
    tell: Callable[[str], None],
) -> Reproduction:
    """Measure rows of one model that `result` does not hold yet, and write the result after each.

    Args:
        model: From `load_model`.
        target: The bigram target.
        corpus: Masks are learned on its training part and measured on its held-out part.
        result: What was measured before, with the settings.
        name: Name of the model in the result; if a model of the paper has it, its numbers are beside ours.
        folder: The folder of the result; runs are written to a folder in it.
        rows: Names of rows.
        check_memory: As for `find_subnetwork`.
        tell: Called with a line for each row.

    Raises:
        ValueError: If the result holds numbers of this model on another text.
    """
    refuse_several("reproduce_model")
    paper = PAPERS[result.paper]
    wanted = ReproducedModel(name, weight_hash(model), identity_of(corpus))
    mine = next((one for one in result.models if is_same(one, wanted)), wanted)
    if mine.text.fingerprint != wanted.text.fingerprint:
        raise ValueError(
            f"{str(folder)!r} holds numbers of {name!r} on another text (fingerprint {mine.text.fingerprint}, now "
            f"{wanted.text.fingerprint}): choose another folder"
        )
    runs = folder / f"{_slug(name)}-{short_hash(wanted.weight_hash)}"
    check_no_link(runs)
    subject = _Subject(
        model, target, corpus, result.recipe, result.sparsity_weights, paper, paper.model_named(name), name, runs,
        check_memory,
    )  # fmt: skip
    for row in rows:
        if row in mine.rows:
            tell(f"{short_name(name)}: {row}: measured before")
            continue
        started = time.monotonic()
        mine = _with_row(mine, row, subject)
        result = result.with_model(mine)
        result.save(folder)
        reason = mine.left_out.get(row)
        done = f"left out: {reason}" if reason else f"measured in {time.monotonic() - started:.0f} s"
        tell(f"{short_name(name)}: {row}: {done}")
    return result


def _with_row(mine: ReproducedModel, row: str, subject: _Subject) -> ReproducedModel:
    left_out = {name: reason for name, reason in mine.left_out.items() if name != row}
    try:
        ours = _ROWS[row](subject)
    except NotShownError as error:
        return replace(mine, left_out=left_out | {row: str(error)})
    theirs = {} if subject.of is None else subject.of.numbers
    measured = {
        row: [ReproducedNumber(row, one.name, theirs.get(one.name), _known(ours[one.name])) for one in ROWS[row]]
    }
    for one in mine.numbers:
        measured.setdefault(one.row, []).append(one)
    numbers = tuple(one for name in ROWS for one in measured.get(name, ()))
    return replace(mine, numbers=numbers, left_out=left_out)


def _known(value: Number) -> Number:
    """None for a number that is undefined."""
    return None if value is None or math.isnan(value) else value


def _slug(name: str) -> str:
    last = short_name(name).rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "model"


@dataclass(frozen=True)
class _Found:
    """A subnetwork and its r."""

    subnetwork: Subnetwork
    r: float


@dataclass(frozen=True, eq=False)
class _Subject:
    """What rows are measured on. Every subnetwork is learned in a run's folder of its own, and only once."""

    model: Model
    target: Target
    corpus: Corpus
    recipe: SparsifyConfig
    sparsity_weights: tuple[float | int, ...]
    paper: Paper
    of: PaperModel | None
    name: str
    folder: Path
    check_memory: str

    @cached_property
    def sweep(self) -> dict[float | int, _Found]:
        """A subnetwork for each lambda."""
        return {one: self.find(f"lambda-{one:g}", self.model, one) for one in self.sparsity_weights}

    @cached_property
    def sparse_lambda(self) -> float | int:
        """The lambda of the sparse subnetwork, by the paper's rule."""
        least = self.sweep[0].r - self.paper.margin
        close = [one for one, found in self.sweep.items() if one == 0 or found.r >= least]
        return min(close, key=lambda one: self.sweep[one].subnetwork.kept)

    @property
    def sparse(self) -> _Found:
        """The sparse subnetwork."""
        return self.sweep[self.sparse_lambda]

    def learn(self, run: str, model: Model, target: Any, sparsity_weight: float | int) -> Subnetwork:
        """Learn a subnetwork, or read the one that its run found before."""
        recipe = replace(self.recipe, sparsity_weight=float(sparsity_weight))
        to = self.folder / run
        check_no_link(to)
        return find_subnetwork(
            model, target, self.corpus, recipe, run_dir=to, check_memory=self.check_memory
        ).subnetwork

    def find(self, run: str, model: Model, sparsity_weight: float | int) -> _Found:
        """Learn a subnetwork for the bigram target and evaluate it; both only if its run's folder does not hold it."""
        subnetwork = self.learn(run, model, self.target, sparsity_weight)
        evaluation = load_run(self.folder / run, history=False).evaluation
        if evaluation is None:
            evaluation = evaluate(model, subnetwork, self.target, self.corpus.held_out, controls=False)
            there = RunFolder(self.folder / run)
            with there.lock():
                there.write_evaluation(evaluation, identity_of(self.corpus))
        return _Found(subnetwork, evaluation.subnetwork.surprisal_correlation)

    def r(self, subnetwork: Subnetwork) -> float:
        """Pearson r of a subnetwork of the model."""
        found = evaluate(self.model, subnetwork, self.target, self.corpus.held_out, controls=False)
        return found.subnetwork.surprisal_correlation


Numbers = Mapping[str, Number]


def _sweep(subject: _Subject) -> Numbers:
    return {
        "best_r": max((found.r for found in subject.sweep.values() if not math.isnan(found.r)), default=math.nan),
        "full_r": subject.r(Subnetwork.full(subject.model)),
        **_of_subnetwork(subject.sparse_lambda, subject.sparse),
    }


def _of_subnetwork(sparsity_weight: float | int | None, found: _Found) -> Numbers:
    one = found.subnetwork
    return {
        "sparse_lambda": sparsity_weight,
        "sparse_kept": one.kept,
        "maskable": one.total,
        "sparse_share": one.fraction,
        "sparse_r": found.r,
    }


def _baselines(subject: _Subject) -> Numbers:
    model, seed = subject.model, subject.recipe.seed
    found = {"trained_r": subject.sweep[0].r}
    for name, what in (("random_model_r", RANDOM_MODEL), ("random_blocks_r", RANDOM_BLOCKS)):
        other = with_random_blocks(model, seed=seed, everything=what == RANDOM_MODEL)
        found[name] = subject.find(f"lambda-0-{what.replace(' ', '-')}", other, 0).r
        del other  # there is memory for two models, not for three
    train, held_out = subject.corpus.train, subject.corpus.held_out
    found["embeddings_r"] = correlation_without_blocks(model, subject.target, held_out)
    recipe = subject.recipe
    steps = min(5 * recipe.max_steps, _MAP_STEPS)  # each costs far less than one of learning a mask
    linear = learn_linear_map(model, subject.target, train, steps=steps, batch_size=recipe.batch_size, seed=seed)
    return found | {"linear_map_r": correlation_without_blocks(model, subject.target, held_out, linear)}


def _overlap(subject: _Subject) -> Numbers:
    given = None if subject.of is None else subject.of.pruning_lambda
    weight = subject.sparse_lambda if given is None else given
    pruned = subject.learn(f"optimal-pruning-lambda-{weight:g}", subject.model, ModelTarget(subject.model), weight)
    found = overlap(subject.sparse.subnetwork, pruned)
    return {
        "overlap_times": found.get("intersection")["all"] / found.get("expected")["all"],
        "overlap_share": found.get("share_of_a_in_b")["all"],
    }


def _components(subject: _Subject) -> Numbers:
    one = subject.sparse.subnetwork
    if not one.kept:
        raise NotShownError("the sparse subnetwork keeps no weight")
    kept = {name: count.kept / one.kept for name, count in one.by_weight().items()}
    parts = {name: WeightName.parse(name) for name in kept}

    def share(*matrices: str) -> float:
        return sum(share for name, share in kept.items() if parts[name].matrix in matrices)

    attention = sum(share for name, share in kept.items() if parts[name].component == "attn")
    return {
        "mlp_share": sum(share for name, share in kept.items() if parts[name].component == "mlp"),
        "attention_share": attention,
        "value_output_share": share("W_V", "W_O"),
        "query_key_share": share("W_Q", "W_K"),
    }


def _conditions(subject: _Subject) -> dict[str, Subnetwork | None]:
    return {"full_model": None, "subnetwork": subject.sparse.subnetwork}


def _rotations(subject: _Subject) -> Numbers:
    named = _conditions(subject)
    curves = rotation_curves(
        subject.model, fit_maps(subject.model, spread(subject.corpus.train, _FIT_TOKENS), named, 1.0)
    )
    return {
        f"{name}_{to}_{when}": float(curves.get(f"{to}_angle", name)[at])
        for name in named
        for to in ("input", "output")
        for at, when in enumerate(("before", "after"))
    }


def _covariance(subject: _Subject) -> Numbers:
    found = covariance_similarity(subject.model, subject.sparse.subnetwork, subject.corpus, measure="covariance_cosine")
    numbers = {}
    for name, condition in (("full_model", "full"), ("subnetwork", "subnetwork")):
        neighbours = np.diagonal(found.get("covariance_cosine", condition), 1)
        numbers[f"{name}_first_block"] = float(neighbours[0])
        numbers[f"{name}_later_blocks"] = float(neighbours[1:].mean()) if len(neighbours) > 1 else math.nan
    return numbers


def _released(subject: _Subject) -> Numbers:
    of = subject.of
    name = of.hub[0] if of is not None and of.hub else subject.name
    if (of is None and is_local(name)) or (of is not None and not of.hub):
        raise NotShownError("no masks of this model were released")
    weight = None if of is None else of.numbers.get("sparse_lambda")
    try:
        subnetwork = load_published(name, weight, model=subject.model)
    except (OSError, ValueError) as error:
        raise NotShownError(" ".join(str(error).split())) from error
    return _of_subnetwork(weight, _Found(subnetwork, subject.r(subnetwork)))


_ROWS: Mapping[str, Callable[[_Subject], Numbers]] = {
    "sweep": _sweep,
    "baselines": _baselines,
    "overlap": _overlap,
    "components": _components,
    "rotations": _rotations,
    "covariance": _covariance,
    "released": _released,
}
"""How each of `paper.ROWS` is measured."""
