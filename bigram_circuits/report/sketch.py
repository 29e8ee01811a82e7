"""A still picture of an explanation: where its strongest nodes stand and the edges between them run, in pixels."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from bigram_circuits.explanations import words
from bigram_circuits.explanations.explanation import SOURCES, Edge, Explanation, Node, UnitTokens

_NODES = 9  # beside the answer and the token at which it is given
_PER_COLUMN = 4
_WIDTH = 640  # pixels, of the picture
_TOP, _MARGIN = 24, 26  # of the headings of columns, and of edges that go around boxes
_GAP = 24  # between boxes
_NODE_WIDTH, _LOW, _HIGH = 92, 26, 40  # of nodes with one line and with two
_WIDEST = 12.0  # pixels, of the strongest edge
_FAINT = 0.03  # of the strongest edge: fainter ones are not drawn
_FULL = 28.0  # per cent of colour in the strongest node
_CUT = 13  # characters, of a label
_OUT = sys.maxsize  # the column of the answer


@dataclass(frozen=True)
class SketchNode:
    """A box."""

    x: float | int
    y: float | int
    width: float | int
    height: float | int
    label: str
    about: str
    """A second line; may be empty."""
    raises: bool
    """Whether it raises what is explained."""
    fill: float | int
    """Per cent of its colour."""
    is_end: bool
    """Whether it is a token that goes in or the answer."""


@dataclass(frozen=True)
class SketchEdge:
    """A curve between two boxes."""

    path: str
    """In the language of SVG."""
    width: float | int
    raises: bool
    """Whether it raises what is explained."""


@dataclass(frozen=True)
class Sketch:
    """The picture."""

    width: float | int
    height: float | int
    columns: Sequence[tuple[float | int, str]]
    """The middle of each column, and its heading."""
    nodes: Sequence[SketchNode]
    edges: Sequence[SketchEdge]


def sketch_of(explanation: Explanation, units: Mapping[str, UnitTokens]) -> Sketch:
    """Draw the strongest nodes of an explanation, a column for each layer that has some.

    Args:
        explanation: What is drawn.
        units: What is known of neurons and heads, by label.
    """
    shown = _strongest(explanation)
    places = _placed(shown, explanation, units)
    columns = sorted({_column(node) for node in shown})
    most = max([abs(node.flow) for node in shown if node.kind not in (*SOURCES, "answer")], default=0.0) or 1.0
    nodes = [_box(node, places[node.key], most, explanation, units) for node in shown]
    return Sketch(
        width=_WIDTH, height=max(top + height for _, top, height in places.values()) + _MARGIN,
        columns=[(_left(at, len(columns)) + _NODE_WIDTH / 2, _heading(one)) for at, one in enumerate(columns)],
        nodes=nodes, edges=_drawn(explanation.edges, shown, places, columns),
    )  # fmt: skip


def _strongest(explanation: Explanation) -> list[Node]:
    """The nodes that are drawn, at most a few in each column; biases, the same for every prompt, are not."""
    chosen: list[Node] = [node for node in explanation.nodes if node.kind == "answer"]
    asked = [n for n in explanation.nodes if n.kind == "token" and n.position == explanation.position]
    others = [node for node in explanation.nodes if node.kind not in ("answer", "bias") and node not in asked]
    for node in [*asked, *sorted(others, key=lambda node: -abs(node.flow))]:
        is_room = sum(_column(one) == _column(node) for one in chosen) < _PER_COLUMN
        if is_room and len(chosen) < _NODES + 2:
            chosen.append(node)
    return sorted(chosen, key=lambda node: (_column(node), -abs(node.flow)))


def _column(node: Node) -> int:
    return -1 if node.kind in SOURCES else _OUT if node.kind == "answer" else node.layer


def _heading(column: int) -> str:
    return {-1: "in", _OUT: "out"}.get(column, f"layer {column}")


Place = tuple[float | int, float | int, float | int]
"""Left, top and height of a box."""


def _placed(shown: Sequence[Node], explanation: Explanation, units: Mapping[str, UnitTokens]) -> dict[str, Place]:
    """Where each node stands: in the middle of its column, the columns evenly spread."""
    columns = sorted({_column(node) for node in shown})
    cells = {column: [node for node in shown if _column(node) == column] for column in columns}
    heights = {node.key: _HIGH if _about(node, explanation, units) else _LOW for node in shown}
    extents = {column: sum(heights[n.key] + _GAP for n in cell) - _GAP for column, cell in cells.items()}
    places: dict[str, Place] = {}
    for at, (column, cell) in enumerate(cells.items()):
        top = _TOP + _MARGIN + (max(extents.values()) - extents[column]) / 2
        for node in cell:
            places[node.key] = (_left(at, len(columns)), top, heights[node.key])
            top += heights[node.key] + _GAP
    return places


def _left(at: int, count: int) -> float | int:
    return at * (_WIDTH - _NODE_WIDTH) / max(1, count - 1)


def _box(
    node: Node, place: Place, most: float | int, explanation: Explanation, units: Mapping[str, UnitTokens]
) -> SketchNode:
    x, y, height = place
    is_answer = node.kind == "answer"
    label = words.answer_words(explanation) if is_answer else node.label
    return SketchNode(
        x=x, y=y, width=_NODE_WIDTH, height=height, label=_short(label), about=_about(node, explanation, units),
        raises=node.flow >= 0, fill=_FULL * (1.0 if is_answer else min(1.0, abs(node.flow) / most)),
        is_end=is_answer or node.kind in SOURCES,
    )  # fmt: skip


def _about(node: Node, explanation: Explanation, units: Mapping[str, UnitTokens]) -> str:
    """The second line of a box: how likely the answer is, where a token stands, what a neuron raises."""
    if node.kind == "answer":
        likely = words.answer_probability(explanation)
        return "" if likely is None else f"{words.share_words(likely)} likely"
    if node.kind == "replaced":
        return "replaced"
    known = units.get(node.label)
    if known and known.promotes:
        return _short(f"→ {' '.join(words.quoted(token) for token, _ in known.promotes[:1])}")
    return ""


def _short(text: str) -> str:
    return text if len(text) <= _CUT else f"{text[: _CUT - 1]}…"


def _drawn(
    edges: Sequence[Edge], shown: Sequence[Node], places: Mapping[str, Place], columns: Sequence[int]
) -> list[SketchEdge]:
    at = {node.key: columns.index(_column(node)) for node in shown}
    known = [edge for edge in edges if edge.source in at and edge.target in at]
    most = max([abs(edge.flow) for edge in known], default=0.0) or 1.0
    strong = sorted((edge for edge in known if abs(edge.flow) >= _FAINT * most), key=lambda edge: -abs(edge.flow))
    return [
        SketchEdge(
            _curve(places[edge.source], places[edge.target], at[edge.target] - at[edge.source], places.values()),
            round(max(0.8, _WIDEST * abs(edge.flow) / most), 1),
            edge.flow >= 0,
        )
        for edge in strong
    ]


def _curve(start: Place, end: Place, columns: int, places: Collection[Place]) -> str:
    """The path of an edge; one that passes other columns goes around their boxes, below or above."""
    x, y, x2, y2 = start[0] + _NODE_WIDTH, start[1] + start[2] / 2, end[0], end[1] + end[2] / 2
    if columns == 0:  # a head and a neuron of one layer
        x = start[0]
        return f"M{x:.0f},{y:.0f}C{x - 26:.0f},{y:.0f} {x - 26:.0f},{y2:.0f} {x:.0f},{y2:.0f}"
    if columns == 1:
        bend = (x2 - x) / 2
        return f"M{x:.0f},{y:.0f}C{x + bend:.0f},{y:.0f} {x2 - bend:.0f},{y2:.0f} {x2:.0f},{y2:.0f}"
    between = [(top, top + height) for left, top, height in places if x < left < x2 - 1]
    mean = (y + y2) / 2
    above, below = min((top for top, _ in between), default=mean), max((low for _, low in between), default=mean)
    lane = below + 12 if mean >= (above + below) / 2 else above - 12
    lane = (lane - mean / 4) / 0.75  # of the control points, so that the middle of the curve runs in the lane
    bend = (x2 - x) / 4
    return f"M{x:.0f},{y:.0f}C{x + bend:.0f},{lane:.0f} {x2 - bend:.0f},{lane:.0f} {x2:.0f},{y2:.0f}"
