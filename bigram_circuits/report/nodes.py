"""The section about a circuit's nodes: which are kept, in grids, counts and lists."""

from __future__ import annotations

from collections.abc import Sequence

from bigram_circuits.circuit import WEIGHT, Circuit
from bigram_circuits.measures.words import listed, percent
from bigram_circuits.report import figures
from bigram_circuits.report.blocks import Block, Chart, Content, Numbers
from bigram_circuits.report.results import Results, activating_tokens, result_table
from bigram_circuits.report.words import dropped_words, unit_words

_IN_GRIDS = 64  # nodes of a unit in a layer; more are counted
_LISTED = 40  # labels of a unit in a layer


def nodes_kept(circuit: Circuit, results: Results) -> Content:
    """Which nodes a circuit keeps: a grid for units with few nodes in a layer, counts for the others, and a list."""
    says = [_words(circuit), f"In the circuit we {dropped_words(circuit)}."]
    blocks: list[Block] = []
    for unit in (unit for unit in circuit.by_unit() if unit != WEIGHT):
        blocks += _of_unit(circuit, unit)
    blocks.append(_list(circuit))
    tokens = results.maps("max_activating_tokens")
    if tokens and tokens.text:
        blocks += [activating_tokens(tokens), result_table(tokens, "maximally activating tokens of kept neurons")]
    for name, title in (("by_layer", "by layer"), ("by_head", "by head")):
        measured = results.maps(name)
        blocks += [result_table(measured, title)] if measured else []
    says += results.reasons("by_layer", "by_head", "concentration", "whole_neurons", "max_activating_tokens")
    return Content(says, blocks, "Which nodes are kept")


def _words(circuit: Circuit) -> str:
    if not circuit.kept:
        return "No node was kept."
    counts = [f"{count.kept:,} of {count.total:,} {unit_words(unit)}" for unit, count in circuit.by_unit().items()]
    kept = {layer: count.kept for layer, count in circuit.by_layer().items()}
    most = max(kept, key=lambda layer: kept[layer])
    says = f"It keeps {listed(counts)}."
    if list(kept.values()).count(kept[most]) > 1:
        return says
    return f"{says} {percent(kept[most] / circuit.kept)} of the kept {circuit.units} are in layer {most}."


def _of_unit(circuit: Circuit, unit: str) -> list[Block]:
    """The nodes of a unit: one by one if there are few in each layer, else counted."""
    places = {layer: name for name, layer in _places(circuit, unit)}
    rows = [str(layer) for layer in places]
    masks = [circuit[name].flatten().tolist() for name in places.values()]
    words = unit_words(unit)
    if max(map(len, masks)) <= _IN_GRIDS:
        wide = max(map(len, masks))
        kept: list[list[bool | None]] = [[*map(bool, mask), *[None] * (wide - len(mask))] for mask in masks]
        columns = [str(index) for index in range(wide)] if wide > 1 else [words]
        figure = figures.grid(rows, columns, kept, "layer")
        return [Chart(f"The {words} that are kept", "", figure, 80 + 28 * wide)]
    shares = [sum(mask) / len(mask) for mask in masks]
    counts = [f"layer {layer}: {sum(mask):,} of {len(mask):,}" for layer, mask in zip(places, masks, strict=True)]
    figure = figures.bars(rows, {circuit.noun: shares}, f"share of the layer's {words}")
    figure.update_xaxes(tickformat="~%").update_yaxes(title="layer")
    return [Chart(f"Share of each layer's {words} that is kept", f"{'; '.join(counts)}.", figure)]


def _places(circuit: Circuit, unit: str) -> Sequence[tuple[str, int]]:
    """The hook points of a unit, with their layers."""
    return [(name, layer) for name, (layer, of) in circuit.places.items() if of == unit]


def _list(circuit: Circuit) -> Numbers:
    """The labels of the kept nodes, by layer and unit; where there are many, their number."""
    rows = []
    for (layer, unit), count in circuit.by_place().items():
        said = "none"
        if count.kept:
            names = [name for name, place in circuit.places.items() if place == (layer, unit)]
            said = ", ".join(Circuit({name: circuit[name] for name in names}).nodes)
            said = said if unit != WEIGHT and count.kept <= _LISTED else "many: the circuit's file has them"
        rows.append([layer, unit_words(unit), count.kept, count.total, count.fraction, said])
    columns = ["layer", "nodes", "kept", "of", "fraction", "which"]
    return Numbers("The nodes that are kept", columns, rows, is_open=True)
