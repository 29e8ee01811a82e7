"""Draw explanations: as a page that can be explored, offline, and as a part of other pages.

The picture is drawn by `templates/circuit.js` from the values that `circuit_view` packs: buttons in columns, with
curves between them. Its tables and sentences are there without a script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from bigram_circuits.explanations import words
from bigram_circuits.measures import html
from bigram_circuits.measures.words import flat

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

    from bigram_circuits.explanations.explanation import Atlas, Explanation, UnitTokens

_DIGITS = 4  # of the numbers in a picture
_PATHS_OF_A_TOKEN = 3  # in the table of an atlas


@dataclass(frozen=True)
class CircuitView:
    """What the template `circuit.html` shows: the picture of one explanation, or of one at a time of an atlas."""

    says: Sequence[str]
    """Sentences about the explanation that is shown first."""
    data: Mapping[str, Any]
    """What the script draws, as JSON values."""
    paths: Markup
    """Table of its paths."""
    nodes: Markup
    """Table of its nodes."""
    tokens: Markup | None
    """Of an atlas: the table of its tokens."""
    notes: Markup | None
    """Table of how it was made."""


def explanation_page(explanation: Explanation) -> str:
    """A complete HTML document about an explanation; it requests nothing."""
    return _document(words.title(explanation), explanation.model, circuit_view(explanation))


def atlas_page(atlas: Atlas) -> str:
    """A complete HTML document about an atlas, one token at a time; it requests nothing.

    Raises:
        ValueError: If the atlas is empty.
    """
    return _document(atlas.title, f"{len(atlas.explanations)} tokens", atlas_view(atlas))


def circuit_view(explanation: Explanation) -> CircuitView:
    """What the picture of an explanation shows."""
    return _view([explanation], explanation, explanation.units, explanation.notes)


def atlas_view(atlas: Atlas) -> CircuitView:
    """What the picture of an atlas shows.

    Raises:
        ValueError: If the atlas is empty.
    """
    if not atlas.explanations:
        raise ValueError("the atlas is empty: there is no token to show")
    paths = [
        "\n".join(f"{path}  {words.number(value)}" for path, value, _ in words.path_rows(one)[:_PATHS_OF_A_TOKEN])
        for one in atlas.explanations
    ]
    rows = [
        (words.quoted(row[0]), row[1], f"{words.quoted(row[2])} {words.share_words(row[3])}", row[6], row[7], strongest)
        for row, strongest in zip(words.atlas_rows(atlas), paths, strict=True)
    ]
    columns = ("after", "count", "prediction", "neurons", "heads", "strongest paths, and what each adds")
    tokens = _table(columns, rows, "All tokens of the atlas")
    return _view(atlas.explanations, words.clearest(atlas), atlas.units, atlas.notes, atlas.counts, tokens)


def _document(title: str, about: str, view: CircuitView) -> str:
    text = _environment().get_template("explanation.html").render(title=title, about=about, view=view)
    return text.encode("utf-8", "replace").decode("utf-8")  # a token may hold half a character


@cache
def _environment() -> Environment:
    return html.environment("explanations")


def _view(
    explanations: Sequence[Explanation],
    first: Explanation,
    units: Mapping[str, UnitTokens],
    notes: Mapping[str, Any],
    counts: Sequence[int] = (),
    tokens: Markup | None = None,
) -> CircuitView:
    paths = [(path, adds, words.share_words(share)) for path, adds, share in words.path_rows(first)]
    labels = _Strings()
    graphs = [_graph(one, labels) for one in explanations]
    for graph, count in zip(graphs, counts, strict=False):
        graph["count"] = count
    shown = {node.label for one in explanations for node in one.nodes}
    known = {label: _unit(one) for label, one in units.items() if label in shown}
    return CircuitView(
        says=(words.prediction_words(first), words.sum_words(first)),
        data={"graphs": graphs, "first": list(explanations).index(first), "labels": labels.found, "units": known},
        paths=_table(words.PATH_COLUMNS, paths, "Strongest paths"),
        nodes=_table(words.NODE_COLUMNS, words.node_rows(first, units), "Nodes"),
        tokens=tokens,
        notes=_table(("setting", "value"), flat(notes), "How it was made") if notes else None,
    )


class _Strings:
    """Strings that are written once and referred to by their index."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def place(self, text: str) -> int:
        return self._places.setdefault(text, len(self._places))

    @property
    def found(self) -> list[str]:
        return list(self._places)


def _graph(explanation: Explanation, labels: _Strings) -> dict[str, Any]:
    """An explanation as JSON values, in which nodes are their place in the list and labels their place in `labels`."""
    places = {node.key: place for place, node in enumerate(explanation.nodes)}
    answer = words.answer_words(explanation)
    return {
        "says": [words.prediction_words(explanation), words.sum_words(explanation)],
        "prompt": list(explanation.prompt),
        "position": explanation.position,
        "answer": explanation.answer,
        "likely": _short(words.answer_probability(explanation)),
        "value": _short(explanation.value),
        "predictions": [[token, _short(probability)] for token, probability in explanation.predictions],
        "nodes": [
            [node.kind, labels.place(answer if node.kind == "answer" else node.label), node.layer, node.position,
             *map(_short, (node.direct, node.flow, node.unseen, node.activation))]
            for node in explanation.nodes
        ],
        "edges": [[places[one.source], places[one.target], _short(one.flow)] for one in explanation.edges],
        "paths": [
            [_short(value), _short(share), [places.get(key, -1) for key in path.nodes],
             [labels.place(label) for label in (*path.labels[:-1], answer)]]
            for path, (_, value, share) in zip(explanation.paths, words.path_rows(explanation), strict=True)
        ],
    }  # fmt: skip


def _unit(known: UnitTokens) -> list[Any]:
    tokens = (known.drives, known.promotes, known.suppresses)
    return [*([[token, _short(value)] for token, value in pairs] for pairs in tokens), _short(known.lost)]


def _short(value: float | None) -> float | None:
    """A number with few digits; None if it is not finite, which JSON cannot say."""
    short = math.nan if value is None else float(f"{value:.{_DIGITS}g}")
    return short if math.isfinite(short) else None


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> Markup:
    """A table; `html.table` escapes its cells."""
    from markupsafe import Markup

    return Markup(html.table(columns, rows, caption, words.MEANINGS))
