"""Ways of choosing a circuit, on one curve: faithfulness against size.

| method | which nodes are kept |
|---|---|
| `learned` | those of `find_circuit`, learned for each size anew |
| `integrated` | the highest integrated gradients of gates (`node_effects` with `steps`) |
| `attribution` | the highest attribution patching scores (`node_effects`): a linear estimate of patching |
| `patching` | those whose replacement, one at a time, raises the cross-entropy most |
| `random` | drawn uniformly; means over several draws |

All choose on the training part and are measured on the held-out part, with the same replacement. Faithfulness is

    f(C) = (CE of the empty circuit - CE of C) / (CE of the empty circuit - CE of the full model)

so 0 for the empty circuit and 1 for the full model. Over the share k of nodes kept, from 0 to 1 on a linear axis, by
the trapezoid rule (Mueller et al. 2025, arXiv 2504.13151, MIB): CMD, the area between f and 1, which is 0 at best; and
CPR, the area under f, which has no upper bound and rewards circuits that beat the model. `area` is that under f cut off
at 0 and 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer

from bigram_circuits.circuit import Circuit
from bigram_circuits.evaluation import measure
from bigram_circuits.learning.callbacks import Callback
from bigram_circuits.learning.ranks import refuse_several
from bigram_circuits.learning.training import as_behaviour, find_circuit, make_candidates
from bigram_circuits.masking.effects import node_effects
from bigram_circuits.measures import html, plots, statistics
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Curves, Effects, load_result
from bigram_circuits.models.activations import check_tokens
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.progress import steps as counted_steps
from bigram_circuits.recipe import SparsifyConfig
from bigram_circuits.targets.base import Target
from bigram_circuits.tasks.target import TaskTarget
from bigram_circuits.text.corpus import Corpus, spread

METHODS = ("learned", "integrated", "attribution", "patching", "random")
"""The ways of choosing a circuit."""
LABELS: Mapping[str, str] = {
    "learned": "learned",
    "integrated": "integrated gradients",
    "attribution": "attribution patching",
    "patching": "patching one by one",
    "random": "at random",
}
"""The ways in the words of charts and pages."""
SIZES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Shares of the nodes, by default."""
_SCORED = 1 << 15  # tokens of the training part that scores are computed on, at most
_MOST_PATCHED = 1024  # nodes at most that are replaced one at a time
_DRAWS = 1000

FAITHFULNESS = Quantity("faithfulness", "share", "Share of the full model's gain over the empty circuit that is kept.")
CROSS_ENTROPY = Quantity("cross_entropy", "nats", "Cross-entropy from the target, mean over places.")
AREAS = (
    Quantity("cmd", "share", "Area between faithfulness and 1 over the share of nodes: 0 at best."),
    Quantity("area", "share", "Area under faithfulness, cut off at 0 and 1: 1 at best."),
    Quantity("cpr", "share", "Area under faithfulness, unbounded: above 1 where circuits beat the model."),
    Quantity("cmd_over_learned", "share", "CMD minus that of the learned circuits: above 0 where those are better."),
)


@dataclass(frozen=True)
class FaithfulnessCurves:
    """How faithful circuits of several sizes are that were chosen in several ways.

    Example:
        >>> planted = bc.plant_attention("previous_token", d_vocab=8)
        >>> known = planted.model, planted.target, planted.corpus
        >>> curves = bc.faithfulness_curves(*known, units="head", sizes=(0.5,), methods=("attribution",))
        >>> curves.save("runs/curves")
        >>> again = bc.FaithfulnessCurves.load("runs/curves")
    """

    curves: Curves
    """`faithfulness` and `cross_entropy` by method and share of nodes kept, with 95% intervals (bootstrap over
    held-out sequences; of `random`, of the mean over draws)."""
    areas: Effects
    """`cmd`, `area`, `cpr` and `cmd_over_learned` by method, with 95% intervals; the last is paired."""
    circuits: Mapping[str, tuple[Circuit, ...]] = field(default_factory=dict, repr=False)
    """The circuits by method, from small to large; of `random` those of the first draw."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Methods that were left out, with the reason."""

    @property
    def noun(self) -> str:
        """What the circuits are of: `nodes`, or `edges`."""
        return next((one.units_here for circuits in self.circuits.values() for one in circuits), "nodes")

    def plot(self, quantity: str = "faithfulness") -> Any:
        """A plotly figure of a quantity by share of nodes, on a log axis: `faithfulness` or `cross_entropy`."""
        measured = self.curves.quantity(quantity)
        series = {
            LABELS[name]: (self.curves.get(quantity, name), *self.curves.interval(quantity, name))
            for name in self.curves.conditions
        }
        title = f"{self.curves.title}: {measured.words}"
        figure = plots.lines(f"share of {self.noun} kept", self.curves.points, series, measured, title)
        return figure.update_xaxes(type="log", dtick="D2", tickformat="~%")

    def to_dataframe(self) -> Any:
        """A pandas table: a row for every method and size."""
        return self.curves.to_dataframe()

    def smallest(self, method: str = "learned", least: float = 0.9) -> Circuit | None:
        """The smallest circuit of a method whose faithfulness is at least `least`; None if there is none."""
        values = self.curves.get("faithfulness", method)
        return next((one for one, value in zip(self.circuits[method], values, strict=True) if value >= least), None)

    def __str__(self) -> str:
        lines = [self.curves.table("faithfulness"), ""]
        lines.append(f"{'':<14}" + "".join(f"{one.name:>18}" for one in AREAS))
        for name in self.areas.names:
            at = self.areas.names.index(name)
            cells = []
            for q in range(len(AREAS)):
                value, low, high = (float(part[q, at]) for part in (self.areas.values, self.areas.low, self.areas.high))
                cells.append("" if math.isnan(value) else f"{value:.3f} ({low:.2f}, {high:.2f})")
            lines.append(f"{name:<14}" + "".join(f"{cell:>18}" for cell in cells))
        return "\n".join([*lines, *(f"{name}: left out, {why}" for name, why in self.left_out.items())])

    def _repr_html_(self) -> str:
        """HTML for notebooks: both tables."""
        return html.summary("Faithfulness by size", [], self.curves._repr_html_(), self.areas._repr_html_())  # pyright: ignore[reportPrivateUsage]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `curves.json`, `areas.json` and a file for every circuit.

        Raises:
            OSError: If the folder cannot be written.
        """
        folder = Path(folder)
        self.curves.save(folder / "curves.json")
        self.areas.save(folder / "areas.json")
        for method, circuits in self.circuits.items():
            for place, circuit in enumerate(circuits):
                circuit.save(folder / _file(method, place))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> FaithfulnessCurves:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged.
        """
        folder = Path(folder)
        curves, areas = load_result(folder / "curves.json"), load_result(folder / "areas.json")
        if not isinstance(curves, Curves) or not isinstance(areas, Effects):
            raise ValueError(f"{str(folder)!r} holds other results than faithfulness curves")
        circuits = {
            method: tuple(Circuit.load(folder / _file(method, place)) for place in range(len(curves.points)))
            for method in curves.conditions
        }
        return cls(curves, areas, circuits, dict(curves.notes.get("left_out", {})))


def _file(method: str, place: int) -> str:
    return f"circuits/{method}-{place}.safetensors"


@uses_model
def faithfulness_curves(
    model: Model,
    task: Any,
    corpus: Corpus | None = None,
    config: SparsifyConfig | None = None,
    *,
    units: str | Sequence[str] | None = None,
    replace: str | None = None,
    measure: str = "loss",
    sizes: Sequence[float | int] = SIZES,
    methods: Sequence[str] = METHODS,
    seeds: int = 5,
    steps: int = 8,
    run_dir: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callback] = (),
    check_memory: str = "warn",
) -> FaithfulnessCurves:
    """Choose circuits of several sizes in several ways, and measure how faithful they are on held-out text.

    Args:
        model: From `load_model`.
        task: As for `find_circuit`.
        corpus: As for `find_circuit`.
        config: The recipe of `learned`, whose `target_fraction` is replaced; by default as for `find_circuit`.
        units: As for `find_circuit`; no weights.
        replace: As for `find_circuit`.
        measure: As for `find_circuit`.
        sizes: Shares of the nodes to keep, above 0 and below 1.
        methods: Some of `METHODS`.
        seeds: Number of random draws.
        steps: Points of the path of `integrated`.
        run_dir: A folder for the result (`FaithfulnessCurves.save`), in which learning can be resumed (`learned-...`).
        callbacks: As for `find_circuit`.
        check_memory: As for `find_circuit`.

    Raises:
        ValueError: As `find_circuit`; if a size, method or number is out of range, or the full model is not better than
            the empty circuit, so that faithfulness is undefined.

    Example:
        >>> planted = bc.plant_attention("previous_token", d_vocab=8)
        >>> known = planted.model, planted.target, planted.corpus
        >>> curves = bc.faithfulness_curves(*known, units="head", sizes=(0.5,), methods=("attribution",))
        >>> curves.plot()
        >>> curves.smallest("attribution", 0.5)  # the smallest circuit with at least half of the model's gain
    """
    refuse_several("faithfulness_curves")
    check_choices(methods, sizes, seeds)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    target, corpus, config = as_behaviour(model, task, corpus, config, units, replace, sizes[0], measure)
    if "weight" in (config.units or ()):
        raise ValueError("methods are compared on nodes: leave weight out of units")
    check_tokens(model, corpus.held_out)
    full = make_candidates(model, target, corpus, config).everything
    job = _Job(model, target, corpus, config, full, None if run_dir is None else Path(run_dir), callbacks, check_memory)
    kept = sorted({max(1, round(size * full.total)) for size in sizes} - {full.total})
    if not kept:
        raise ValueError(f"no size lies between the empty and the full circuit: {full.total} {full.units_here} in all")
    circuits: dict[str, list[list[Circuit]]] = {}
    left_out: dict[str, str] = {}
    for method in (name for name in METHODS if name in methods):
        if method == "patching" and full.total > _MOST_PATCHED:
            left_out[method] = f"since {full.total:,} nodes are too many to replace one at a time"
        else:
            circuits[method] = job.chosen(method, kept, seeds, steps)
    found = _result(job, kept, circuits, left_out)
    if run_dir is not None:
        found.save(run_dir)
    return found


def check_choices(methods: Sequence[str], sizes: Sequence[float | int], seeds: int) -> None:
    """Raise ValueError if a method, a size or the number of draws is not allowed."""
    wrong = [name for name in methods if name not in METHODS]
    if wrong or not methods:
        raise ValueError(f"methods must be some of {', '.join(METHODS)}, not {', '.join(wrong) or 'none'}")
    if not sizes or not all(0 < size < 1 for size in sizes):
        raise ValueError(f"sizes must be shares of the nodes, above 0 and below 1, not {list(sizes)}")
    if seeds < 1:
        raise ValueError(f"there must be at least 1 random draw, not {seeds}")


@dataclass(frozen=True)
class _Job:
    model: Model
    target: Target
    corpus: Corpus
    config: SparsifyConfig
    full: Circuit
    folder: Path | None
    callbacks: Sequence[Callback]
    check_memory: str

    def chosen(self, method: str, sizes: Sequence[int], seeds: int, steps: int) -> list[list[Circuit]]:
        """The circuits of a method: by size, and within it by draw."""
        if method == "learned":
            return [[self._learned(size)] for size in sizes]
        if method == "random":
            rng = np.random.default_rng(self.config.seed)
            ranks = [rng.permutation(self.full.total).astype(float) for _ in range(seeds)]
            return [[self._highest(rank, size) for rank in ranks] for size in sizes]
        text = spread(self.corpus.train, _SCORED)
        scores = self._patched(text) if method == "patching" else self._effects(text, method, steps)
        return [[self._highest(scores, size)] for size in sizes]

    def _learned(self, size: int) -> Circuit:
        config = replace(self.config, target_fraction=size / self.full.total)
        folder = None if self.folder is None else self.folder / f"learned-{size}"
        return find_circuit(
            self.model, self.target, self.corpus, config, force=True, run_dir=folder, callbacks=self.callbacks,
            check_memory=self.check_memory,
        ).circuit  # fmt: skip

    def _effects(
        self, text: Integer[np.ndarray, "sequence position"], method: str, steps: int
    ) -> Float[np.ndarray, " node"]:
        points = steps if method == "integrated" else None
        scores = node_effects(self.model, self.full, self.target, text, steps=points)
        return np.concatenate([scores[name].numpy().ravel() for name in self.full]).astype(float)

    def _patched(self, text: Integer[np.ndarray, "sequence position"]) -> Float[np.ndarray, " node"]:
        """The cross-entropy without each node."""
        losses = []
        for place in counted_steps(range(self.full.total), self.full.total, desc="patching", unit="node"):
            without = np.ones(self.full.total)
            without[place] = 0
            losses.append(self.measured(self._of(without > 0), text).faithfulness.cross_entropy)
        return np.array(losses)

    def _highest(self, scores: Float[np.ndarray, " node"], size: int) -> Circuit:
        mask = np.zeros(len(scores), dtype=bool)
        mask[np.argsort(-scores, kind="stable")[:size]] = True
        return self._of(mask)

    def _of(self, mask: Any) -> Circuit:
        """The circuit of a flat mask over all nodes."""
        masks, at = {}, 0
        for name, shape in self.full.shapes.items():
            n = math.prod(shape)
            masks[name] = torch.from_numpy(mask[at : at + n].reshape(shape).copy())
            at += n
        made = Circuit(masks, model_name=self.full.model_name, weight_hash=self.full.weight_hash, lineage="chosen")
        return made.with_replacement(self.full.replacement)

    def measured(self, circuit: Circuit, text: Integer[np.ndarray, "sequence position"]) -> Any:
        return measure(self.model, circuit, self.target, text)


def _result(
    job: _Job, sizes: Sequence[int], circuits: Mapping[str, list[list[Circuit]]], left_out: Mapping[str, str]
) -> FaithfulnessCurves:
    text, total = np.asarray(job.corpus.held_out), job.full.total
    ends = [job.measured(one, text).sums for one in (job.full.constant(False), job.full)]
    loss = statistics.STATISTICS["cross_entropy"]
    if not float(loss(ends[1].sum(0))) < float(loss(ends[0].sum(0))):
        raise ValueError(
            "the full model is not better than the empty circuit on the held-out part, so that faithfulness is "
            "undefined: its cross-entropy is not lower"
        )
    sums = {
        method: [np.mean([job.measured(one, text).sums for one in drawn], axis=0) for drawn in by_size]
        for method, by_size in circuits.items()
    }
    empty, full = (_values(loss, one) for one in ends)
    losses = {method: np.stack([_values(loss, one) for one in by_size]) for method, by_size in sums.items()}
    faithful = {method: (empty - values) / (empty - full) for method, values in losses.items()}
    stacked = np.stack([np.stack(list(faithful.values())), np.stack(list(losses.values()))])
    low, high = np.quantile(stacked[..., 1:], [0.025, 0.975], axis=-1)
    notes = {
        "empty": float(empty[0]), "full": float(full[0]), "nodes": total, "sequences": len(text),
        "replace": job.full.replacement.kind, "units": list(job.config.units or ()),
        "model": job.full.model_name, "target": _words(job.target), "text": str(job.corpus.source),
        "interval": "95%, bootstrap over held-out sequences", "left_out": dict(left_out),
    }  # fmt: skip
    curves = Curves(
        "Faithfulness by size", (FAITHFULNESS, CROSS_ENTROPY), "fraction", tuple(size / total for size in sizes),
        tuple(circuits), stacked[..., 0], low, high, notes=notes,
    )  # fmt: skip
    return FaithfulnessCurves(
        curves,
        _areas(np.array([0, *sizes, total]) / total, faithful, notes),
        {method: tuple(drawn[0] for drawn in by_size) for method, by_size in circuits.items()},
        left_out,
    )


def _words(target: Target) -> str:
    """What is asked of the circuits."""
    if isinstance(target, TaskTarget):
        return f"the task {target.task.name} (measure {target.measure})"
    return f"the target {target.kind}"


def _values(
    statistic: Callable[..., Any], sums: Float[np.ndarray, "sequence column"]
) -> Float[np.ndarray, " value_and_draws"]:
    """A statistic on all sequences, and on each bootstrap resample of them."""
    return np.concatenate([[float(statistic(sums.sum(0)))], statistic(statistics.bootstrap(sums, draws=_DRAWS))])


def _areas(
    shares: Float[np.ndarray, " end"], faithful: Mapping[str, Float[np.ndarray, "size draw"]], notes: Mapping[str, Any]
) -> Effects:
    """Areas over the share of nodes; the ends, empty and full, are 0 and 1 by definition."""
    rows = []
    for values in faithful.values():
        whole = np.concatenate([np.zeros_like(values[:1]), values, np.ones_like(values[:1])])
        parts = (np.abs(1 - whole), whole.clip(0, 1), whole)
        rows.append([np.trapezoid(part, shares, axis=0) for part in parts])
    table = np.array(rows)  # [method, area, draw]
    names = list(faithful)
    over = np.full_like(table[:, 0], np.nan)
    if "learned" in names:
        others = [place for place, name in enumerate(names) if name != "learned"]
        over[others] = table[others, 0] - table[names.index("learned"), 0]
    table = np.concatenate([table, over[:, None]], axis=1).swapaxes(0, 1)
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(table[..., 1:], [0.025, 0.975], axis=-1)
    return Effects("Areas over size", AREAS, "method", tuple(names), table[..., 0], low, high, notes=dict(notes))
