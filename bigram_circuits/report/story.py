"""What the report tells, top to bottom, in plain text: sections of sentences, charts and tables.

Every sentence is computed from the results; where a result is missing, the section says so in a line.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bigram_circuits.evaluation import SoftHardGap
from bigram_circuits.experiments.falsification import load_falsification
from bigram_circuits.measures.conditions import CONDITIONS
from bigram_circuits.measures.conditions import label_of as _condition
from bigram_circuits.measures.quantities import MEASURED
from bigram_circuits.measures.results import Curves, Effects, Maps, Result
from bigram_circuits.measures.words import flat, percent, rounded, span
from bigram_circuits.names import PartName, head_label
from bigram_circuits.report import figures
from bigram_circuits.report.blocks import (
    LAYER_CHARTS,
    Attention,
    Block,
    Chart,
    Code,
    Numbers,
    Opening,
    Reading,
    Section,
    interval,
)
from bigram_circuits.runs import STOPS, Run, model_words, target_words

_MOST_BARS = 20
_MOST_STEPS = 60  # rows of the training table
_CELL = 47  # pixels, of width for a column of a wide map


@dataclass
class _Results:
    """A run's results by name; remembers which were told."""

    by_name: Mapping[str, Result]
    left_out: Mapping[str, str] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def curves(self, name: str) -> Curves | None:
        return self._take(name, Curves)

    def maps(self, name: str) -> Maps | None:
        return self._take(name, Maps)

    def effects(self, name: str) -> Effects | None:
        return self._take(name, Effects)

    def _take(self, name: str, kind: type[Any]) -> Any:
        result = self.by_name.get(name)
        if not isinstance(result, kind):
            return None
        self.told.add(name)
        return result

    def reasons(self, *steps: str) -> list[str]:
        """Why steps of `analyze` were left out: a sentence for each that was."""
        return [
            f"Left out: {step.replace('_', ' ')}: {self.left_out[step]}." for step in steps if step in self.left_out
        ]

    def absent(self, done: str, *steps: str) -> list[str]:
        """Why there is nothing to tell."""
        return self.reasons(*steps) or [f"This run was not {done}: no such result is in its folder."]

    def rest(self) -> dict[str, Result]:
        return {name: result for name, result in self.by_name.items() if name not in self.told}


def opening(run: Run) -> Opening:
    """The title, what was asked, and the answer in a sentence."""
    target, model = target_words(run), model_words(run)
    source = str((run.settings.get("corpus") or {}).get("source"))
    text = "the reference text" if source == "reference" else f"the text {source}"
    asked = (
        f"Which weights of {model} suffice to reproduce {target[1]}? Learned on {text}, measured on its held-out part."
    )
    kept = f"{percent(run.subnetwork.fraction)} of the weights ({run.subnetwork.kept:,} of {run.subnetwork.total:,})"
    title = f"The {target[0]} subnetwork of {model}"
    if run.metrics is None:
        return Opening(title, asked, f"{kept} were kept. How well they do is not known: the run was not evaluated.")
    own = run.metrics["subnetwork"]
    low, high = interval(run.metrics, "subnetwork")
    pair = "" if low is None else f" (95% interval {span(low, high)})"
    r = own.get("surprisal_correlation")
    tried = load_falsification(run.path / "falsify")
    refuted = f" REFUTED by its own controls: {', '.join(tried.refuted)}." if tried and tried.refuted else ""
    answer = f"{kept} correlate with the target at r = {rounded(r)}{pair}. {_verdict_words(run.metrics)}{refuted}"
    return Opening(title, asked, answer, _marks(run, run.metrics))


def _marks(run: Run, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    marks = [("of the weights kept", percent(run.subnetwork.fraction))]
    marks.append(("r with the target", rounded(metrics["subnetwork"].get("surprisal_correlation"))))
    if metrics.get("random"):
        marks.append(("r of matched random weights", rounded(metrics["random"]["mean"].get("surprisal_correlation"))))
    if metrics.get("full"):
        marks.append(("r of the whole model", rounded(metrics["full"].get("surprisal_correlation"))))
    return marks


def sections(run: Run) -> list[Section]:
    """The story of a run."""
    results = _Results(run.analyses, run.left_out)
    steps: list[Callable[[Run, _Results], Section]] = [
        _controls, _refuted, _training, _location, _needed, _layers, _passage, _read, _tokens, _heads, _attribution,
        _overlap, _lacking, _other,
    ]  # fmt: skip
    told = [step(run, results) for step in steps]
    return [*(one for one in told if one.says or one.blocks), _settings(run, results)]


# --- the sections ---


def _controls(run: Run, results: _Results) -> Section:
    heading = "Does it do the job better than chance would?"
    if run.metrics is None:
        return Section("controls", heading, ["This run was not evaluated, so there are no controls to compare with."])
    metrics = run.metrics
    rows = list(_control_rows(metrics))
    says = [_verdict_words(metrics)]
    rule = metrics.get("zero_rule")
    if rule:
        says.append(
            f"The zero-probability rule: {rule['rule']}. These are {rule['used']:,} of {rule['positions']:,} held-out "
            f"positions ({percent(rule['share'])})."
        )
    dots = [(name, value.get("surprisal_correlation"), low, high) for name, value, low, high in rows]
    columns = ["", "r", "interval of r", "cross-entropy", "KL", "own loss", "top-1", "weights kept", "share"]
    table = [
        [name, value.get("surprisal_correlation"), span(low, high),
         value.get("cross_entropy"), value.get("kl"), value.get("mean_surprisal"), value.get("top1_agreement"),
         value.get("kept"), value.get("fraction")]
        for name, value, low, high in rows
    ]  # fmt: skip
    blocks: list[Block] = []
    if len(rows) > 1:
        says_so = f"{_closest(rows)} {_INTERVALS}".strip()
        blocks.append(Chart("r with the target, subnetwork and controls", says_so, figures.controls(dots)))
    blocks.append(Numbers("Subnetwork and controls", columns, table, is_open=True))
    blocks.append(Numbers("What the rows and columns are", ["name", "what it is"], _glossary(rows)))
    if metrics.get("advantage"):
        pairs = [[name, *pair] for name, pair in metrics["advantage"].items()]
        caption = "r of the subnetwork less r of each control: 95% paired intervals"
        blocks.append(Numbers(caption, ["control", "low", "high"], pairs))
    seeds = [
        [f"{name} {one['seed']}", *(one.get(key) for key in MEASURED)]
        for name, key_of in (("random", "random"), ("full - random", "full_minus_random"))
        for one in (metrics.get(key_of) or {}).get("seeds", [])
    ]
    if seeds:
        blocks.append(Numbers("Every random control by itself", ["", *map(_spaced, MEASURED)], seeds))
    return Section("controls", heading, says, blocks)


_INTERVALS = "Intervals: 95%, bootstrap over sequences; for random weights, the lowest and the highest seed."
_MEANINGS = {name: one.meaning for name, one in CONDITIONS.items()} | {
    "r": "correlation of the model's surprisals with the target's",
    "cross-entropy, KL": "from the target, nats",
    "own loss": "the masked model's own next-token loss, nats",
    "top-1": "share of positions where model and target find the same token most likely",
}
_NOT_ROWS = ("r", "cross-entropy, KL", "own loss", "top-1")

_Row = tuple[str, Mapping[str, Any], float | None, float | None]


def _control_rows(metrics: Mapping[str, Any]) -> Iterator[_Row]:
    for name in ("subnetwork", "full", "complement", "magnitude"):
        if metrics.get(name):
            low, high = interval(metrics, name)
            yield name, metrics[name], low, high
    for name, key in (("random", "random"), ("full - random", "full_minus_random")):
        group = metrics.get(key)
        if group:
            known = [one["surprisal_correlation"] for one in group["seeds"] if one["surprisal_correlation"] is not None]
            low, high = (min(known), max(known)) if len(known) > 1 else (None, None)
            yield name, group["mean"], low, high
    if metrics.get("empty"):
        low, high = interval(metrics, "empty")
        yield "empty", metrics["empty"], low, high


def _glossary(rows: Sequence[_Row]) -> list[list[str]]:
    names = {name for name, *_ in rows}
    return [[name, meaning] for name, meaning in _MEANINGS.items() if name in names or name in _NOT_ROWS]


def _closest(rows: Sequence[_Row]) -> str:
    own = rows[0][1].get("surprisal_correlation")
    known = {name: value["surprisal_correlation"] for name, value, *_ in rows[1:] if _is_known(value)}
    if own is None or not known:
        return ""
    best = max(known, key=lambda name: known[name])
    return f"The subnetwork has r = {rounded(own)}; the highest of the others is {best}, with {rounded(known[best])}."


def _is_known(value: Mapping[str, Any]) -> bool:
    return value.get("surprisal_correlation") is not None


def _verdict_words(metrics: Mapping[str, Any]) -> str:
    return str(metrics.get("verdict") or "")


def _refuted(run: Run, results: _Results) -> Section:
    heading = "Could it be refuted?"
    tried = load_falsification(run.path / "falsify")
    if tried is None:
        return Section("refuted", heading, ["Nobody tried: `bigram-circuits find --falsify` does."])
    shown = {"KL": "kl", "r": "surprisal_correlation", "share kept": "fraction"}
    known = {name: tried.controls.get(key) for name, key in shown.items()}
    charts: list[Block] = [
        Chart(
            f"{name} of what was found, and of every attempt",
            "",
            figures.bars(tried.controls.names, {name: list(values.values())}, name),
        )
        for name, values in known.items()
        if not all(math.isnan(value) for value in values.values())
    ]
    tables = [
        _table(tried.controls, "every attempt"), _table(tried.spread, "spread over seeds"),
        _table(tried.seeds, "overlap between seeds"),
    ]  # fmt: skip
    return Section("refuted", heading, [tried.verdict, *tried.says], [*charts, *tables])


def _training(run: Run, results: _Results) -> Section:
    heading = "How it was found"
    history, outcome = run.history, run.outcome
    if not history:
        return Section("training", heading, ["The folder holds no record of the training steps."])
    why = STOPS.get(outcome.get("stopped_because", ""), outcome.get("stopped_because"))
    attempts = outcome.get("attempts", 1)
    tries = "one attempt" if attempts == 1 else f"{attempts} attempts"
    last = [record for record in history if record.get("attempt", 0) == history[-1].get("attempt", 0)]
    first, end = last[0], last[-1]
    seconds = rounded(outcome.get("seconds"), 0)
    says = (
        f"The masks were learned in {len(last):,} steps ({tries}, {seconds} seconds in all); it stopped because {why}. "
        f"Meanwhile the cross-entropy went from {rounded(first['cross_entropy'], 2)} to "
        f"{rounded(end['cross_entropy'], 2)} nats, and the share kept from {percent(first['fraction'])} to "
        f"{percent(end['fraction'])}."
    )
    gap = outcome.get("soft_hard")
    hardened = SoftHardGap(**gap) if gap else None
    lost = (
        f"On the last batch the cross-entropy was {rounded(hardened.soft)} nats with the soft gates, and is "
        f"{rounded(hardened.hard)} with the mask made of them."
        if hardened
        else ""
    )
    went_back = [
        f"At step {one['step']} {one['what']}: the run went back to step {one['back_to']}, with the learning rate "
        f"{one['learning_rate']:g}."
        for one in outcome.get("rollbacks", ())
    ]
    warning = f"Warning: {hardened.warning}." if hardened and hardened.warning else ""
    every = max(1, math.ceil(len(history) / _MOST_STEPS))
    shown = [record for place, record in enumerate(history) if place % every == 0 or record is history[-1]]
    columns = list(dict.fromkeys(key for record in shown for key in record))
    caption = "Every step" if every == 1 else f"Every {every}th step and the last one"
    table = Numbers(caption, [_spaced(key) for key in columns], [[one.get(key) for key in columns] for one in shown])
    chart = Chart("Training", "Cross-entropy, share kept and undecided gates by step.", figures.training(history))
    return Section("training", heading, [says, *went_back, lost, warning], [chart, table])


def _location(run: Run, results: _Results) -> Section:
    blocks: list[Block] = [*_by_component(run, results)]
    heads = results.maps("by_head")
    if heads:
        says = [f"{_densest(heads, name)} in the {_condition(name)}" for name in heads.conditions]
        title = "Kept weights by layer and head: share of each head's weights"
        figure = figures.dressed(heads.plot("density")).update_layout(coloraxis_colorbar_tickformat="~%")
        blocks.append(Chart(title, f"The densest head is {', and '.join(says)}.", figure))
        blocks.append(_table(heads, "by head"))
    dense = results.curves("concentration")
    if dense:
        blocks += _told(dense, dense.title, _concentration_words(dense))
    neurons, tokens = results.effects("whole_neurons"), results.maps("max_activating_tokens")
    if neurons and neurons.names:
        densest = [
            f"In {name}, the densest neuron, {percent(x)} of its weights are kept." for name, x in neurons.top(1)
        ]
        series = {"share of the neuron's weights that are kept": neurons.values[0].tolist()}
        blocks += [
            Chart(neurons.title, "".join(densest), figures.bars(neurons.names, series, neurons.quantities[0].label))
        ]
        blocks += [_table(neurons, "densest neurons")]
    if tokens and tokens.text:
        blocks += [_excited(tokens), _table(tokens, "tokens that excite the densest neurons")]
    says = [_component_words(run)]
    if not run.analyses:
        says.append("This run was not analysed, so nothing is known about single neurons.")
    says += results.reasons("by_layer", "by_head", "concentration", "whole_neurons", "max_activating_tokens")
    return Section("where", "Where the kept weights are", says, blocks)


def _by_component(run: Run, results: _Results) -> list[Block]:
    """Layers and components, from the subnetwork itself."""
    counts = run.subnetwork.by_component()
    layers, parts = sorted({layer for layer, _ in counts}), sorted({part for _, part in counts})
    share = [
        [counts[x, p].kept / max(run.subnetwork.kept, 1) if (x, p) in counts else 0.0 for p in parts] for x in layers
    ]
    densest = max(counts, key=lambda at: counts[at].fraction)
    density = percent(counts[densest].fraction)
    says = f"Densest is the {densest[1]} of layer {densest[0]}: {density} of its weights are kept."
    chart = figures.heat_map(share, [str(layer) for layer in layers], parts, "layer", "share")
    rows = [[PartName(part, x).label, n.kept, n.total, n.fraction] for (x, part), n in counts.items()]
    blocks: list[Block] = [Chart("Of all kept weights, the share in each place", says, chart)]
    blocks.append(Numbers("Numbers: kept weights", ["layer and component", "kept", "of", "share"], rows))
    measured = results.maps("by_layer")
    return [*blocks, _table(measured, "by layer")] if measured else blocks


def _component_words(run: Run) -> str:
    counts, kept = run.subnetwork.by_component(), run.subnetwork.kept
    if not kept:
        return "No weight was kept."
    parts = {part: sum(n.kept for (_, p), n in counts.items() if p == part) for part in sorted({p for _, p in counts})}
    layers = {layer: sum(n.kept for (x, _), n in counts.items() if x == layer) for layer in {x for x, _ in counts}}
    part, layer = max(parts, key=lambda one: parts[one]), max(layers, key=lambda one: layers[one])
    return (
        f"{percent(parts[part] / kept)} of the kept weights are in {part} matrices, and "
        f"{percent(layers[layer] / kept)} are in layer {layer}."
    )


def _densest(heads: Maps, condition: str) -> str:
    density = heads.get("density", condition)
    if np.isnan(density).all():
        return "unknown"
    row, column = np.unravel_index(int(np.nanargmax(density)), density.shape)
    return (
        f"{head_label(int(heads.rows[row]), int(heads.columns[column]))} ({percent(float(density[row, column]))} kept)"
    )


def _concentration_words(dense: Curves) -> str:
    near = int(np.argmin([abs(float(point) - 0.1) for point in dense.points]))
    shares = [
        f"{percent(float(line[near]))} in the {_condition(name)}"
        for name, line in zip(dense.conditions, dense.values[0], strict=True)
    ]
    neurons = f"{100 * float(dense.points[near]):.0f}%"
    return f"The densest {neurons} of the neurons hold this share of the kept MLP weights: {', '.join(shares)}."


def _excited(tokens: Maps) -> Numbers:
    """A row for every neuron: the tokens that excite it, by condition."""
    assert tokens.text is not None
    wanted = [name for name in ("subnetwork", "full") if name in tokens.conditions] or list(tokens.conditions[:1])
    rows = [
        [neuron, *(_spoken_tokens(tokens.text[tokens.conditions.index(name)][r]) for name in wanted)]
        for r, neuron in enumerate(tokens.rows)
    ]
    columns = ["neuron", *(f"tokens that excite it most ({_condition(name)})" for name in wanted)]
    return Numbers(tokens.title, columns, rows, is_open=True)


def _spoken_tokens(tokens: Sequence[str]) -> str:
    """Tokens beside each other."""
    return "  ".join(map(_spoken, tokens))


def _spoken(token: str) -> str:
    """A token in quotes; a space in it is shown as a dot."""
    return f"“{token.replace(' ', '·')}”"


def _expected(cell: str) -> str:
    """What was expected, from the lines of a cell: its first is the token itself, the others end in a percentage."""
    pairs = [line.rsplit(" ", 1) for line in cell.split("\n")[1:]]
    return ", ".join(f"{_spoken(pair[0])} {pair[-1]}" for pair in pairs)


def _needed(run: Run, results: _Results) -> Section:
    blocks: list[Block] = []
    for name, what in (("ablation_components", "components"), ("ablation_heads", "heads")):
        effects = results.effects(name)
        if effects:
            blocks += _ablation(effects, what)
    removed = results.curves("stochastic_ablation")
    if removed:
        says = [
            f"where the {_condition(name)} stay{'' if name == 'random' else 's'}, "
            f"from {rounded(float(line[0]), 2)} to {rounded(float(line[-1]), 2)}"
            for name, line in zip(removed.conditions, removed.values[0], strict=True)
        ]
        words = f"As the rest is removed, r goes, {'; '.join(says)}."
        blocks += _told(removed, "Removing the rest at random: r with the target", words)
    heading = "What the model and the subnetwork need"
    steps = ("ablation_components", "ablation_heads", "stochastic_ablation")
    return Section("needed", heading, results.reasons(*steps) if blocks else results.absent("ablated", *steps), blocks)


def _ablation(effects: Effects, what: str) -> list[Block]:
    keys = {"full": "rise_in_loss", "subnetwork": "rise_in_loss_in_subnetwork"}
    names = [one.name for one in effects.quantities]
    series = {name: effects.get(key) for name, key in keys.items() if key in names}
    if not series:
        return _told(effects, effects.title, "")
    chosen = [name for name, _ in effects.top(_MOST_BARS, keys["full"] if "full" in series else None)]
    if len(effects.names) <= _MOST_BARS:
        chosen = list(effects.names)
    at = [effects.names.index(name) for name in chosen]
    ends = {
        name: (effects.low[names.index(keys[name])][at].tolist(), effects.high[names.index(keys[name])][at].tolist())
        for name in series
    }
    says = [
        f"{effects.top(1, keys[name])[0][0]} costs the {_condition(name)} most, "
        f"{rounded(effects.top(1, keys[name])[0][1], 2)} nats"
        for name in series
        if effects.top(1, keys[name])
    ]
    words = f"Set to zero, {'; '.join(says)}.{_beyond_chance(effects)}" if says else ""
    shown = {name: [values[one] for one in chosen] for name, values in series.items()}
    few = f", the {len(chosen)} largest of {len(effects.names)}" if len(chosen) < len(effects.names) else ""
    title = f"Rise in loss without single {what}{few}"
    return [
        Chart(title, words, figures.bars(chosen, shown, "rise in loss (nats)", ends)),
        _table(effects, f"ablation of {what}"),
    ]


def _beyond_chance(effects: Effects) -> str:
    names = [one.name for one in effects.quantities]
    if "excess" not in names or np.isnan(effects.low[names.index("excess")]).all():
        return ""
    above = int((effects.low[names.index("excess")] > 0).sum())
    return f" {above} of {len(effects.names)} cost more than a random choice of the same size does (95% intervals)."


def _layers(run: Run, results: _Results) -> Section:
    blocks: list[Block] = []
    for place, (name, quantity, title, what) in enumerate(LAYER_CHARTS):
        curves = results.curves(name)
        if curves and name not in [other for other, *_ in LAYER_CHARTS[:place]]:
            blocks.append(_table(curves, f"{curves.title}, by layer"))
        names = [one.name for one in curves.quantities] if curves else []
        if not curves or quantity not in names or np.isnan(curves.values[names.index(quantity)]).all():
            continue
        words, figure = _course(curves, quantity, what), None
        if f"{quantity}_baseline" in names:
            words += " Dashed: the same with tokens of other positions."
            figure = figures.with_baseline(curves, quantity)
        blocks.insert(len(blocks) - 1, Chart(title, words, figure or figures.dressed(curves.plot(quantity))))
    alike = results.maps("covariance")
    if alike:
        blocks += _told(alike, alike.title, _alike_words(alike), min_width=620 if len(alike.conditions) > 1 else 0)
    says = (
        "A line for each: the whole model, the subnetwork, the model without it (complement), matched random weights."
    )
    steps = ("layer by layer", "covariance")
    words = [says, *results.reasons(*steps)] if blocks else results.absent("looked at layer by layer", *steps)
    return Section("layers", "Layer by layer", words, blocks)


def _course(curves: Curves, quantity: str, what: str) -> str:
    """From the first layer to the last, and the block that changes it most."""
    parts = []
    for condition in (name for name in ("subnetwork", "full") if name in curves.conditions):
        values = curves.get(quantity, condition)
        steps = np.abs(np.diff(values))
        if np.isnan(steps).all():
            continue
        place = curves.points[int(np.nanargmax(steps)) + 1]
        known = values[~np.isnan(values)]
        most = f" (largest step: layer {place})" if steps.size > 1 and np.nanmax(steps) > 0.01 else ""
        parts.append(f"in the {_condition(condition)} from {rounded(known[0], 2)} to {rounded(known[-1], 2)}{most}")
    return f"From the first layer to the last, {what} goes {'; '.join(parts)}." if parts else ""


def _alike_words(alike: Maps) -> str:
    both = [name for name in alike.conditions if "full" in name and "subnetwork" in name]
    if not both or len(alike.rows) != len(alike.columns):
        return ""
    own = np.diag(alike.get(alike.quantities[0].name, both[0]))
    return (
        f"The same layer of the whole model and of the subnetwork: {rounded(float(own[0]), 2)} alike at "
        f"{alike.rows[0]}, {rounded(float(own[-1]), 2)} at layer {alike.rows[-1]}."
    )


def _passage(run: Run, results: _Results) -> Section:
    lens, cosine = results.maps("prompt_lens"), results.maps("prompt_cosine")
    blocks: list[Block] = []
    for result, title, words in (
        (lens, "Most likely token after every layer, and its probability", _prompt_words(lens) if lens else ""),
        (cosine, "Cosine with the current token's embedding, token by token", _cosine_words(cosine) if cosine else ""),
    ):
        if result:
            figure = figures.dressed(result.plot()).update_annotations(x=0, xanchor="left")
            figures.shorten_words(figure)
            figures.without_first_row(figure)
            blocks.append(Chart(title, words, figure, 90 + _CELL * len(result.columns)))
            blocks.append(_table(result, title))
    says = "The first tokens of the held-out text, read through the model's own output layer after every layer."
    steps = ("prompt_lens", "prompt_cosine")
    words = [says, *results.reasons(*steps)] if blocks else results.absent("shown a passage", *steps)
    return Section("passage", "One passage, token by token", words, blocks)


def _prompt_words(lens: Maps) -> str:
    """From which layer on the most likely token is the one that comes out."""
    if lens.text is None:
        return ""
    parts = []
    for condition in (name for name in ("subnetwork", "full") if name in lens.conditions):
        text = lens.text[lens.conditions.index(condition)]
        first = [[cell.split("\n")[0] for cell in row] for row in text]
        same = [sum(a == b for a, b in zip(row, first[-1], strict=True)) for row in first]
        if len(same) > 1:
            parts.append(f"{same[-2]} of {len(lens.columns)} in the {_condition(condition)}")
    return (
        f"One layer before the last, the most likely token is already the final one at {' and '.join(parts)}."
        if parts
        else ""
    )


def _cosine_words(cosine: Maps) -> str:
    last = {name: cosine.values[0, c, -1] for c, name in enumerate(cosine.conditions)}
    means = [
        f"{rounded(float(np.nanmean(last[name])), 2)} in the {_condition(name)}"
        for name in ("subnetwork", "full")
        if name in last and not np.isnan(last[name]).all()
    ]
    return f"After the last layer it is on average {' and '.join(means)}." if means else ""


def _read(run: Run, results: _Results) -> Section:
    """Passages, coloured by surprisal."""
    heading = "Real text, read by the model, the subnetwork and the target"
    found = results.maps("passages")
    if not found or found.text is None:
        return Section("read", heading, results.absent("shown passages", "passages"))
    by_condition = {name: found.get(found.quantities[0].name, name) for name in found.conditions}
    readers = {name: _reader(run, name) for name in ("full", "subnetwork", "target") if name in by_condition}
    most = _full_colour([by_condition[name] for name in readers])
    blocks: list[Block] = []
    for row, passage in enumerate(found.rows):
        cells = {name: found.text[found.conditions.index(name)][row] for name in readers}
        values = {name: by_condition[name][row].tolist() for name in readers}
        pointed = [
            _pointed({readers[name]: (cells[name][at], values[name][at]) for name in readers}, at)
            for at in range(len(found.columns))
        ]
        first = next(iter(cells.values()), ())
        means = {name: float(np.nanmean(v)) for name, v in values.items() if not np.isnan(v).all()}
        says = ", ".join(f"{readers[name].lower()} {rounded(mean, 2)}" for name, mean in means.items())
        blocks.append(
            Reading(
                title=f"Passage {int(passage) + 1}" if passage.isdigit() else passage,
                says=f"Mean surprisal in nats: {says}." if says else "",
                tokens=[cell.split("\n")[0] for cell in first],
                readers=list(readers.values()),
                values=[  # a probability of 0 is as surprising as can be
                    [0.0 if not at else most if math.isnan(v) else v for at, v in enumerate(values[name])]
                    for name in readers
                ],
                most=most,
                pointed=pointed,
            )
        )
    blocks.append(_reading_table(found))
    says = (
        f"Held-out text. The more orange a token, the less it was expected: white at 0 nats, full colour from "
        f"{rounded(most, 1)} nats. Point at a token, or touch it, to see what each expected in its place."
    )
    return Section("read", heading, [says], blocks)


def _reader(run: Run, condition: str) -> str:
    return f"The {target_words(run)[0] if condition == 'target' else _condition(condition)}"


def _full_colour(values: Sequence[np.ndarray]) -> float:
    """The surprisal that nineteen of twenty tokens stay below, in nats."""
    known = np.concatenate([one[~np.isnan(one)] for one in values]) if values else np.zeros(0)
    return max(1.0, float(np.quantile(known, 0.95))) if known.size else 1.0


def _pointed(readers: Mapping[str, tuple[str, float]], at: int) -> list[str]:
    """What is told about a token: itself, then for each reader its surprisal and what was expected."""
    token = next(iter(readers.values()))[0].split("\n")[0] if readers else ""
    if not at:
        return [_spoken(token), "The first token: nothing was expected."]
    lines = [_spoken(token)]
    for reader, (cell, value) in readers.items():
        how = "probability 0" if math.isnan(value) else f"{rounded(value, 2)} nats"
        lines.append(f"{reader}: {how}; expected {_expected(cell)}")
    return lines


def _reading_table(found: Maps) -> Numbers:
    """A row for every token; surprisal and expectation of each condition."""
    assert found.text is not None
    values = found.values[0]
    rows = []
    for r, passage in enumerate(found.rows):
        for c in range(len(found.columns)):
            cells = [of[r][c] for of in found.text]
            told = [x for k, cell in enumerate(cells) for x in (float(values[k, r, c]), _expected(cell))]
            rows.append([passage, c, _spoken(cells[0].split("\n")[0]), *told])
    conditions = [x for name in found.conditions for x in (f"{name}: surprisal (nats)", f"{name}: expected")]
    return Numbers("Numbers: every token of the passages", ["passage", "position", "token", *conditions], rows)


def _tokens(run: Run, results: _Results) -> Section:
    """After which tokens the target is reproduced."""
    found = results.maps("faithful_tokens")
    heading = "After which tokens it is right, and after which not"
    if not found or found.text is None:
        return Section("tokens", heading, results.absent("looked at token by token", "faithful_tokens"))
    own = next((name for name in ("subnetwork", "full") if name in found.conditions), found.conditions[0])
    shown = [name for name in (own, "full") if name in found.conditions]
    texts = {name: found.text[found.conditions.index(name)] for name in (*dict.fromkeys((own, *found.conditions)),)}
    rows, names = [], []
    series: dict[str, list[float]] = {name: [] for name in dict.fromkeys(shown)}
    for r, row in enumerate(found.rows):
        for c in range(len(found.columns)):
            cells = {name: of[r][c] for name, of in texts.items()}
            kl = {name: float(found.get("kl", name)[r, c]) for name in series}
            names.append(f"{row} {c + 1}: {_spoken(cells[own].split(chr(10))[0])}")
            for name, value in kl.items():
                series[name].append(value)
            told = [_expected(cells[name]) for name in ("target", own) if name in cells]
            rows.append([names[-1], float(found.get("count", own)[r, c]), *kl.values(), *told])
    columns = ["token", "times", *(f"KL, {_condition(name)}" for name in series)]
    columns += [f"{_reader(run, name).lower()} expects" for name in ("target", own) if name in texts]
    best, worst = (found.get("kl", own)[found.rows.index(name)] for name in ("best", "worst"))
    says = (
        f"Of {found.notes.get('frequent', 0):,} frequent tokens, the best and the worst by KL from the target, "
        f"mean over the places where they stand: {rounded(float(best[0]), 3)} nats after "
        f"{names[0].split(': ', 1)[1]}, {rounded(float(worst[0]), 3)} after "
        f"{names[len(found.columns)].split(': ', 1)[1]}."
    )
    chart = Chart("KL from the target after single tokens", "", figures.bars(names, series, "KL (nats)"))
    table = Numbers("What follows these tokens", columns, rows, is_open=True)
    return Section("tokens", heading, [says], [chart, table, _table(found, found.title)])


def _heads(run: Run, results: _Results) -> Section:
    """Attention patterns of the heads that survive."""
    heading = "Where the heads that survive look"
    found = results.maps("attention")
    if not found:
        return Section("heads", heading, results.absent("shown attention patterns", "attention"))
    panels = [tuple(name.rsplit(" ", 1)) for name in found.conditions]
    heads = list(dict.fromkeys(head for _, head in panels))
    blocks: list[Block] = []
    rows = []
    numbers = []
    tokens = [name.split(": ", 1)[-1] for name in found.rows]
    for condition in (name for name in ("full", "subnetwork") if (name, heads[0]) in panels):
        patterns = [found.get(found.quantities[0].name, f"{condition} {head}") for head in heads]
        blocks.append(
            Attention(f"In the {_condition(condition)}", "", tokens, heads, [one.tolist() for one in patterns])
        )
        for head, pattern in zip(heads, patterns, strict=True):
            rows.append([head, _condition(condition), *_looks(pattern)])
            numbers += [
                [head, _condition(condition), name, *(float(x) if c <= r else "" for c, x in enumerate(pattern[r]))]
                for r, name in enumerate(found.rows)
            ]
    rows.sort(key=lambda row: heads.index(row[0]))
    blocks.append(
        Numbers("Mean attention", ["head", "in", "the token before", "itself", "the first token"], rows, is_open=True)
    )
    blocks.append(Numbers("Numbers: attention patterns", ["head", "in", "from", *found.rows], numbers))
    says = (
        "The heads of which most weights are kept, on the first tokens of the held-out text. A row is a token that "
        "looks; below, the mean share of attention to the token before, to itself, and to the first token."
    )
    return Section("heads", heading, [says, _most_backward(rows)], blocks)


def _most_backward(rows: Sequence[Sequence[Any]]) -> str:
    """Which head looks most at the token before, and whether it does so in the subnetwork."""
    by_condition = {condition: {row[0]: row[2] for row in rows if row[1] == condition} for _, condition, *_ in rows}
    parts = []
    for condition, shares in by_condition.items():
        known = {head: share for head, share in shares.items() if not math.isnan(share)}
        if known:
            head = max(known, key=lambda one: known[one])
            parts.append(f"in the {condition} {head} does most, with {percent(known[head])}")
    return f"Looking at the token before: {'; '.join(parts)}." if parts else ""


def _looks(pattern: np.ndarray) -> tuple[float, float, float]:
    """Mean attention to the token before, to itself and to the first token, from the third token on."""
    places = np.arange(2, len(pattern))
    if not len(places):
        return math.nan, math.nan, math.nan
    targets = (places - 1, places, np.zeros_like(places))
    before, same, first = (float(pattern[places, at].mean()) for at in targets)
    return before, same, first


def _attribution(run: Run, results: _Results) -> Section:
    found = results.maps("attribution")
    heading = "Which components write the prediction"
    if not found:
        return Section("attribution", heading, results.absent("attributed to components", "attribution"))
    parts = []
    for condition in (name for name in ("subnetwork", "full") if name in found.conditions):
        values = found.get(found.quantities[0].name, condition)
        if not np.isnan(values).all():
            row, column = np.unravel_index(int(np.nanargmax(values)), values.shape)
            value = rounded(float(values[row, column]), 2)
            token = f"“{found.columns[column]}”"
            parts.append(f"in the {_condition(condition)}, {found.rows[row]} adds most to {token} ({value})")
    words = "; ".join(parts)
    if len(found.columns) > 1:
        return Section("attribution", heading, [], _told(found, found.title, f"{words[:1].upper()}{words[1:]}."))
    series = {name: found.values[0, c, :, 0].tolist() for c, name in enumerate(found.conditions)}
    chart = figures.bars(found.rows, series, found.quantities[0].label)
    says = f"{words[:1].upper()}{words[1:]}." if words else ""
    return Section("attribution", heading, [], [Chart(found.title, says, chart), _table(found, "attribution")])


def _overlap(run: Run, results: _Results) -> Section:
    found = results.effects("overlap_magnitude")
    heading = "Is it just the largest weights?"
    if not found:
        return Section("overlap", heading, results.absent("compared with the largest weights", "overlap_magnitude"))
    shares, expected, kept = found.get("share_of_a_in_b"), found.get("expected"), found.get("kept_a")
    common = found.get("intersection")
    chance = [expected[name] / kept[name] if kept[name] else math.nan for name in found.names]
    whole = found.names[0]
    says = (
        f"Of the subnetwork's weights, {percent(shares[whole])} ({common[whole]:,.0f}) are also among the largest of "
        f"their matrices; by chance it would be {percent(chance[0])} ({expected[whole]:,.0f})."
    )
    series = {"subnetwork": list(shares.values()), "random": chance}
    chart = figures.bars(found.names, series, "share among the largest weights")
    title = "Kept weights that are among the largest (random: expected by chance)"
    return Section("overlap", heading, [], [Chart(title, says, chart), _table(found, "overlap")])


def _lacking(run: Run, results: _Results) -> Section:
    blocks: list[Block] = []
    for name, title in (
        ("induction", "Single heads added to the subnetwork"),
        ("induction_pairs", "The best head, with another"),
    ):
        found = results.effects(name)
        if found:
            blocks += _sufficient(found, title)
    heading = "What it lacks: continuing repeated text"
    if not blocks:
        return Section("lacks", heading, results.absent("tried with added heads", "induction"))
    notes = next(results.by_name[name].notes for name in ("induction", "induction_pairs") if name in results.by_name)
    known = {key: notes.get(f"loss_of_{key}") for key in ("base", "full", "guessing")}
    says = (
        f"On repeated random tokens the subnetwork's loss is {rounded(known['base'], 2)} nats; the whole model's is "
        f"{rounded(known['full'], 2)}, and guessing would give {rounded(known['guessing'], 2)}."
    )
    return Section("lacks", heading, [says if None not in known.values() else ""], blocks)


def _sufficient(found: Effects, title: str) -> list[Block]:
    top = found.top(_MOST_BARS)
    if not top:
        return _told(found, title, "")
    at = [found.names.index(name) for name, _ in top]
    unit = found.quantities[0].label
    name, value = top[0]
    says = f"{name[:1].upper()}{name[1:]} helps most: the loss falls by {rounded(value, 2)} nats."
    table = _table(found, title)
    if len(top) < len(found.names):
        title = f"{title}: the {len(top)} that help most, of {len(found.names)}"
    chart = figures.bars(
        [name for name, _ in top], {"fall": [value for _, value in top]}, unit,
        {"fall": (found.low[0][at].tolist(), found.high[0][at].tolist())},
    )  # fmt: skip
    return [Chart(title, says, chart), table]


def _other(run: Run, results: _Results) -> Section:
    blocks: list[Block] = []
    for name, result in results.rest().items():
        blocks += _told(result, f"{result.title} ({name})", "")
    return Section("other", "Other results", [], blocks)


# --- how to do it again ---


def _settings(run: Run, results: _Results) -> Section:
    lines = [["folder", str(run.path)], ["lineage", run.subnetwork.lineage], *flat(run.settings)]
    files = sorted(path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file())
    sizes = [[name, (run.path / name).stat().st_size] for name in files if not name.endswith("report.html")]
    told = [[name, f"{type(result).__name__}: {result.title}"] for name, result in results.by_name.items()]
    blocks: list[Block] = []
    command = command_line(run)
    if command:
        blocks.append(Code("This command finds it again:", command))
    blocks.append(Numbers("Settings and hashes", ["setting", "value"], lines))
    blocks.append(Numbers("Versions", ["package", "version"], [[*pair] for pair in run.versions.items()]))
    if told:
        blocks.append(Numbers("Results in analysis/", ["name", "what it is"], told))
    blocks.append(Numbers("Files", ["file", "bytes"], sizes))
    return Section("again", "How to do it again", [] if command else [_why_no_command(run)], blocks)


_OPTIONS = {
    "sparsity_weight": "--sparsity-weight",
    "target_fraction": "--target-fraction",
    "method": "--method",
    "granularity": "--granularity",
    "layers": "--layers",
    "max_steps": "--steps",
    "batch_size": "--batch-size",
    "learning_rate": "--learning-rate",
    "seed": "--seed",
}


def command_line(run: Run) -> str | None:
    """The `bigram-circuits find` command that reproduces a run; None if no command can."""
    recipe = run.settings.get("recipe")
    if run.rebuild is None or not recipe or run.settings.get("within") is not None:
        return None
    options = _recipe_options(recipe)
    if options is None:
        return None
    model, corpus = run.rebuild["model"], run.rebuild["corpus"]
    given = {
        "--revision": model.get("revision"),
        "--dtype": None if model.get("dtype") == "float32" else model.get("dtype"),
        "--corpus": corpus.get("source"),
        "--context-length": corpus.get("context_length"),
        "--max-tokens": corpus.get("max_tokens"),
        "--target": run.rebuild.get("target"),
        "--order": run.rebuild.get("order") if run.rebuild.get("target") == "ngram" else None,
        **options,
    }
    seeds = len(((run.metrics or {}).get("random") or {}).get("seeds", [])) or 3
    if seeds != 3:
        given["--random-seeds"] = seeds
    words = ["bigram-circuits", "find", str(model["name"])]
    for name, value in given.items():
        words += [] if value is None else [name, str(value)]
    return shlex.join(words)


def _recipe_options(recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options that make a recipe; None if it has a setting that no option sets."""
    from bigram_circuits.learning.training import SparsifyConfig

    for name, base in (("default", SparsifyConfig()), ("paper", SparsifyConfig.paper())):
        changed = {key: recipe.get(key) for key, value in asdict(base).items() if recipe.get(key) != value}
        if set(changed) <= set(_OPTIONS) and None not in changed.values():
            if "target_fraction" in changed and "sparsity_weight" in changed:  # the command takes one of them
                return None
            named = {_OPTIONS[key]: _option(value) for key, value in changed.items()}
            return ({} if name == "default" else {"--recipe": name}) | named
    return None


def _option(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}={one}" for key, one in value.items())
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _why_no_command(run: Run) -> str:
    if run.rebuild is None:
        return "This run was made in Python from objects, so no command reproduces it; its settings are below."
    if run.settings.get("within") is not None:
        return "This run looked only inside another subnetwork, so no single command reproduces it."
    return "Some of its settings can only be given in Python, so no command reproduces it; they are below."


# --- words and numbers ---


def _told(result: Result, title: str, says: str, quantity: str | None = None, min_width: int = 0) -> list[Block]:
    """A result's own chart, and its table."""
    return [Chart(title, says, figures.dressed(result.plot(quantity)), min_width), _table(result, title)]


def _table(result: Result, title: str) -> Numbers:
    frame = result.to_dataframe()
    rows = [
        [value.item() if isinstance(value, np.generic) else value for value in row]
        for row in frame.itertuples(index=False, name=None)
    ]
    return Numbers(f"Numbers: {title}", [_spaced(str(name)) for name in frame.columns], rows)


def _spaced(name: str) -> str:
    return name.replace("_", " ")
