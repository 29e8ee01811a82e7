"""Measurements over training: a list of checkpoints, one model in memory at a time, one table of curves.

A checkpoint is a revision of a hub model (`load_model(model, revision=...)`; `models.checkpoints` lists them), a local
folder, or a model in memory. Chang and Bergen (2025) find that over training the bigram subnetwork first shrinks and
then grows, at roughly constant faithfulness: `subnetworks_over_training` is that experiment.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigram_circuits.analysis.arguments import usual_order
from bigram_circuits.analysis.conditions import check_subnetwork, conditions
from bigram_circuits.analysis.overlap import jaccard
from bigram_circuits.evaluation import evaluate
from bigram_circuits.learning.training import SparsifyConfig, find_mask
from bigram_circuits.masking.apply import Mask, MaskLike
from bigram_circuits.measures.conditions import condition_of
from bigram_circuits.measures.quantities import FAITHFULNESS, FRACTION, MEASURED, Quantity
from bigram_circuits.measures.results import Curves
from bigram_circuits.measures.statistics import check_seed
from bigram_circuits.models.loading import checkpoints as known_checkpoints
from bigram_circuits.models.loading import load_model
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import check_model, in_use
from bigram_circuits.models.weights import weight_sites
from bigram_circuits.progress import progress
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.targets.base import is_target
from bigram_circuits.text.corpus import Corpus, token_array

Measure = Callable[[Any], Mapping[str, Any]]
"""Maps a model to numbers by name, or by condition and name. A number may be (value, low, high)."""

Checkpoints = str | Sequence[Any] | Mapping[str, Any]
"""Names of checkpoints, or models in memory: a list, or a dictionary by name; or a model with known checkpoints."""

_KNOWN = {
    one.name: one
    for one in (
        *FAITHFULNESS,
        FRACTION,
        Quantity("share_in_first_mlp", "share", "Share of the kept weights in the first layer's MLP."),
        Quantity("jaccard_with_previous", "share", "Overlap with the subnetwork of the previous checkpoint."),
        Quantity("jaccard_with_last", "share", "Overlap with the subnetwork of the last checkpoint."),
    )
}


@dataclass(frozen=True)
class SubnetworksOverTraining:
    """The result of `subnetworks_over_training`."""

    curves: Curves
    """Size, faithfulness, location and overlap by checkpoint; conditions are `subnetwork`, `full` and `random`, or
    those of a circuit."""
    subnetworks: Mapping[str, Mask]
    """The subnetworks, or circuits, found, by checkpoint."""

    def to_dataframe(self) -> Any:
        """The curves as a pandas table."""
        return self.curves.to_dataframe()

    def plot(self, quantity: str | None = "fraction") -> Any:
        """A plotly figure of one quantity."""
        return self.curves.plot(quantity)


def trajectory(
    checkpoints: Checkpoints,
    measure: Measure,
    *,
    model: str | None = None,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    title: str = "Over training",
) -> Curves:
    """Measure one model at every checkpoint of its training.

    Args:
        checkpoints: In order: revisions of `model`; without `model`, hub ids, local folders or models in memory (see
            `load_model`), as a list, or by name as a dictionary. Or one hub id whose training checkpoints are known
            (`checkpoints`): all of these.
        measure: A function of a model that returns numbers by name, {"kl": 0.2}, or by condition and name,
            {"full": {"kl": 0.2}, ...}; a number may come with an interval, (value, low, high). See
            `faithfulness_to`.
        model: The hub id that the checkpoints are revisions of.
        tokenizer: The tokenizer of models in memory.
        device: Device to load each model to.
        dtype: Precision of the weights.
        title: Title of the result.

    Returns:
        A curve for every quantity and condition along `checkpoint`.

    Raises:
        ValueError: If there is no checkpoint or one is given twice, the models differ in shape, or the measure's names
            differ between checkpoints.

    Example:
        >>> models = {"untrained": bc.with_random_blocks(model), "trained": model}
        >>> analysis.trajectory(models, analysis.faithfulness_to(None, target, text)).plot()
    """
    sources = _sources(checkpoints, model)
    names = tuple(sources)
    rows: list[dict[str, dict[str, Any]]] = []
    for name, loaded in _each(sources, tokenizer, device, dtype):
        row = _by_condition(measure(loaded), name)
        if rows and _keys(row) != _keys(rows[0]):
            raise ValueError(
                f"the measure returned {_listed(row)} at checkpoint {name!r}, but {_listed(rows[0])} at {names[0]!r}"
            )
        rows.append(row)
    return _curves(title, names, rows, {"model": model})


@usual_order
def faithfulness_to(
    subnetwork: MaskLike | None = None, target: Any = None, tokens: Any = None, *, seed: int = 0
) -> Measure:
    """A measure for `trajectory`: faithfulness to a target under every condition, on the same text.

    Args:
        subnetwork: If given, also measured at every checkpoint: the subnetwork, its complement, and a matched random
            one.
        target: An `NGramTable`, or any object with `cross_entropy` and `surprisal`; or a function from a model to
            such a target.
        tokens: Held-out token ids [sequence, position], or a corpus.
        seed: Seed of the matched random subnetwork.

    Raises:
        ValueError: If `tokens` are not token ids.

    Example:
        >>> measure = analysis.faithfulness_to(found, target, text)
        >>> measure(model)["subnetwork"]  # numbers by name
    """
    array = token_array(tokens)
    check_seed(seed)
    kept = check_subnetwork(subnetwork)
    _check_target(target)

    def measure(model: Model) -> dict[str, dict[str, Any]]:
        check_model(model)
        of_model = _target_of(target, model)
        with in_use(model, "trajectory"):
            full = Subnetwork.full(model) if kept is None else kept.constant(True)
            every = {name: full if one is None else one for name, one in conditions(kept, seed=seed).items()}
            return {name: _faithfulness(model, one, of_model, array) for name, one in every.items()}

    return measure


def subnetworks_over_training(
    checkpoints: Checkpoints,
    target: Any,
    corpus: Corpus,
    config: SparsifyConfig | None = None,
    *,
    model: str | None = None,
    tokenizer: Any = None,
    run_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
) -> SubnetworksOverTraining:
    """Find a subnetwork at every checkpoint of a model's training, and compare them.

    Args:
        checkpoints: In order: revisions of `model`; without `model`, hub ids, local folders or models in memory (see
            `load_model`), as a list, or by name as a dictionary. Or one hub id whose training checkpoints are known
            (`checkpoints`): all of these.
        target: The target to reproduce, or a function from a model to a target.
        corpus: Masks are learned on its training part and evaluated on its held-out part.
        config: The recipe; `SparsifyConfig()` by default. With `units`, circuits are found.
        model: The hub id that the checkpoints are revisions of.
        tokenizer: The tokenizer of models in memory.
        run_dir: If given, every checkpoint's run is written to a subfolder named after the checkpoint; existing runs
            are continued or read.
        device: Device to load each model to.
        dtype: Precision of the weights.
        seed: Seed of the matched random subnetworks.

    Raises:
        ValueError: If there is no checkpoint or one is given twice, models differ in shape or do not fit the target, or
            there is no held-out text.

    Example:
        >>> analysis.subnetworks_over_training({"trained": model}, target, corpus, config)
    """
    sources, array = _sources(checkpoints, model), token_array(corpus)
    names = tuple(sources)
    check_seed(seed)
    _check_target(target)
    found: dict[str, Mask] = {}
    rows: list[dict[str, dict[str, Any]]] = []
    for name, loaded in _each(sources, tokenizer, device, dtype):
        folder = None if run_dir is None else Path(run_dir) / name.replace("/", "--")
        of_model = _target_of(target, loaded)
        with in_use(loaded, "subnetworks_over_training"):
            one = find_mask(loaded, of_model, corpus, config or SparsifyConfig(), run_dir=folder).mask
            own, random = one.noun, condition_of("random", one.noun)
            compared: dict[str, Mask] = {own: one, "full": one.constant(True), random: one.random_like(seed=seed)}
            rows.append({key: _faithfulness(loaded, value, of_model, array) for key, value in compared.items()})
        for key in (own, random):
            rows[-1][key] |= {
                "fraction": one.fraction,
                "share_in_first_mlp": _share_in_first_mlp(one),
            }
        found[name] = one
    last = found[names[-1]]
    for place, (one, row) in enumerate(zip(found.values(), rows, strict=True)):
        row[one.noun]["jaccard_with_previous"] = jaccard(found[names[place - 1]], one) if place else math.nan
        row[one.noun]["jaccard_with_last"] = jaccard(one, last)
    notes = {"model": model, "target": type(target).__name__, "corpus": corpus.source, "seed": seed}
    return SubnetworksOverTraining(_curves("Subnetworks over training", names, rows, notes), found)


def _share_in_first_mlp(found: Mask) -> float:
    """Share of the kept weights or nodes in the first layer's MLP; nan if nothing is kept, or there is none."""
    counts = found.by_place()
    first = [counts[0, part].kept for part in ("mlp", "neuron") if (0, part) in counts]
    return sum(first) / found.kept if first and found.kept else math.nan


def _each(
    sources: Mapping[str, tuple[Any, str | None]],
    tokenizer: Any,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
) -> Iterator[tuple[str, Any]]:
    """(name, model) of every checkpoint; each model is freed before the next is loaded."""
    first: dict[str, tuple[int, ...]] = {}
    with progress(total=len(sources), desc="checkpoints", unit="checkpoint") as bar:
        for name, (source, revision) in sources.items():
            bar.set_postfix_str(name)
            of_object = {} if isinstance(source, str | Path) else {"tokenizer": tokenizer}
            loaded = load_model(source, revision=revision, device=device, dtype=dtype, **of_object)
            shapes = {site.name: site.shape for site in weight_sites(loaded)}
            first = first or shapes
            if shapes != first:
                raise ValueError(
                    f"checkpoint {name!r} has weight matrices of other shapes than {next(iter(sources))!r}: "
                    f"{_differ(first, shapes)}"
                )
            yield name, loaded
            del loaded
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            bar.update()


def _sources(given: Checkpoints, model: str | None) -> dict[str, tuple[Any, str | None]]:
    """The model or its name, and the revision, of each checkpoint by the checkpoint's name."""
    if isinstance(given, str):
        if model is not None or Path(given).expanduser().exists():
            raise ValueError(f"checkpoints must be a list of names, not the name {given!r}")
        given, model = known_checkpoints(given), given
    if isinstance(given, Mapping):
        named = {str(name): one for name, one in given.items()}
    else:
        names = [_name_of(one, place) for place, one in enumerate(given)]
        if len(set(names)) < len(names):
            twice = next(name for place, name in enumerate(names) if name in names[:place])
            raise ValueError(f"the checkpoint {twice!r} is given twice")
        short = [Path(name).name if Path(name).expanduser().is_dir() else name for name in names]
        named = dict(zip(short if len(set(short)) == len(short) else names, given, strict=True))
    if not named:
        raise ValueError("a trajectory needs at least one checkpoint")
    if model is None:
        return {name: (one, None) for name, one in named.items()}
    return {name: (model, str(one)) for name, one in named.items()}


def _name_of(checkpoint: Any, place: int) -> str:
    """What a checkpoint is called: a name as it is, a model in memory by its place in the list."""
    return str(checkpoint) if isinstance(checkpoint, str | Path) else str(place)


def _check_target(target: Any) -> None:
    if not callable(target) and not is_target(target):
        raise ValueError(
            f"a target needs the methods cross_entropy and surprisal, or is a function from a model to one; "
            f"{type(target).__name__} is neither"
        )


def _target_of(target: Any, model: Model) -> Any:
    return target if is_target(target) else target(model)


def _faithfulness(model: Model, subnetwork: Mask, target: Any, tokens: np.ndarray) -> dict[str, Any]:
    """Numbers by name, with intervals where defined."""
    evaluation = evaluate(model, subnetwork, target, tokens, controls=False)
    measured = evaluation.subnetwork
    intervals = evaluation.intervals["subnetwork"]
    return {
        name: (getattr(measured, name), *intervals[name]) if name in intervals else getattr(measured, name)
        for name in MEASURED
    }


def _by_condition(measured: Any, name: str) -> dict[str, dict[str, Any]]:
    if not isinstance(measured, Mapping) or not measured:
        raise ValueError(
            f"a measure must give numbers by name, not {type(measured).__name__} {measured!r} (checkpoint {name!r})"
        )
    nested = [isinstance(value, Mapping) for value in measured.values()]
    if all(nested):
        return {condition: dict(numbers) for condition, numbers in measured.items()}
    if any(nested):
        raise ValueError(
            f"a measure must give numbers by name, or by condition and name, not both (checkpoint {name!r})"
        )
    return {"full": dict(measured)}


def _keys(row: Mapping[str, Mapping[str, Any]]) -> dict[str, set[str]]:
    return {condition: set(numbers) for condition, numbers in row.items()}


def _listed(row: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{condition}: {' '.join(sorted(numbers))}" for condition, numbers in row.items())


def _differ(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    name = next(name for name in (*first, *other) if first.get(name) != other.get(name))
    return f"{name} is {other.get(name)}, not {first.get(name)}"


def _curves(title: str, names: tuple[str, ...], rows: list[dict[str, dict[str, Any]]], notes: dict[str, Any]) -> Curves:
    keys = list(dict.fromkeys(key for numbers in rows[0].values() for key in numbers))
    conditions_measured = tuple(rows[0])
    ends = np.full((3, len(keys), len(conditions_measured), len(names)), np.nan)  # value, low, high
    for p, row in enumerate(rows):
        for c, condition in enumerate(conditions_measured):
            for key, value in row[condition].items():
                three = value if isinstance(value, tuple) else (value, math.nan, math.nan)
                ends[:, keys.index(key), c, p] = three
    return Curves(
        title=title,
        quantities=tuple(_KNOWN.get(key, Quantity(key, "", "A number returned by the measure.")) for key in keys),
        axis="checkpoint",
        points=names,
        conditions=conditions_measured,
        values=ends[0],
        low=ends[1],
        high=ends[2],
        notes=notes,
    )
