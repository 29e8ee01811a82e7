"""Write sections as one HTML file that needs no server, no network and no other file.

Sections hold plain text. Their markup is in `templates/`: `page.html` is the whole document, `blocks/` has a template
for every kind of block, named after its class. Jinja2 escapes everything that comes from data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import TYPE_CHECKING, Any

from bigram_circuits.explanations.page import CircuitView
from bigram_circuits.measures import html
from bigram_circuits.report.blocks import (
    OUTCOMES,
    Attention,
    Block,
    Chart,
    Circuit,
    Numbers,
    Opening,
    Reading,
    Section,
)
from bigram_circuits.report.words import COLUMNS

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_SURPRISED = "#f5a352"  # black on it, and what the dark theme makes of both, can be read


def document(opening: Opening, sections: Sequence[Section], footer: str) -> str:
    """The HTML of a page."""
    template = _environment().get_template("page.html")
    text = template.render(opening=opening, sections=sections, footer=footer, drawn=_Drawn())
    return text.encode("utf-8", "replace").decode("utf-8")  # a path may hold bytes that are not UTF-8


@cache
def _environment() -> Environment:
    """Jinja2 with the templates of reports and of circuits."""
    environment = html.environment("report", "explanations")
    environment.filters["template"] = _template
    environment.filters["groups"] = _groups
    environment.globals["table"] = _table
    environment.globals["explained"] = _explained
    environment.globals["outcomes"] = OUTCOMES
    return environment


def _template(block: Block) -> str:
    """The template of a block, named after its class."""
    return f"blocks/{type(block).__name__.lower()}.html"


def _table(numbers: Numbers) -> Markup:
    """The table that notebooks show too; `html.table` escapes its cells."""
    from markupsafe import Markup

    meanings = {**COLUMNS, **numbers.meanings}
    return Markup(html.table(numbers.columns, numbers.rows, numbers.caption, meanings))


def _explained(name: str, meaning: str) -> Markup:
    """A name with what it means; `html.explained` escapes both."""
    from markupsafe import Markup

    return Markup(html.explained(name, meaning))


def _groups(sections: Sequence[Section]) -> list[tuple[str, list[Section]]]:
    """The sections under each heading, in their order."""
    return [(group, list(members)) for group, members in groupby(sections, key=lambda section: section.group)]


@dataclass
class _Drawn:
    """What the page's script draws. Templates register charts and views here and write down the index they get."""

    figures: list[Any] = field(default_factory=list)
    """Plotly figures."""
    views: list[Any] = field(default_factory=list)
    """CircuitsVis components with their properties."""
    circuits: list[CircuitView] = field(default_factory=list)
    """Pictures of explanations; each has its data in its own markup."""

    def chart(self, chart: Chart) -> int:
        """Register a chart; returns its index among the figures."""
        self.figures.append(chart.drawn())
        return len(self.figures) - 1

    def reading(self, reading: Reading, reader: int) -> int:
        """Register a passage as one reader sees it; returns its index among the views."""
        properties = {
            "tokens": [html.escape(token) for token in reading.tokens],  # CircuitsVis takes a token for markup
            "values": [min(max(one, 0.0), reading.most) if one == one else 0.0 for one in reading.values[reader]],
            "minValue": 0, "maxValue": reading.most, "positiveColor": _SURPRISED,
        }  # fmt: skip
        return self._view("ColoredTokens", properties, reading.pointed)

    def attention(self, attention: Attention) -> int:
        """Register attention patterns; returns their index among the views."""
        properties = {
            "attention": [[[_share(x) for x in row] for row in head] for head in attention.patterns],
            "tokens": list(attention.tokens),
            "attentionHeadNames": list(attention.heads), "minValue": 0, "maxValue": 1, "maskUpperTri": True,
        }  # fmt: skip
        return self._view("AttentionHeads", properties)

    def circuit(self, circuit: Circuit) -> CircuitView:
        """Register the picture of an explanation; returns what its template shows."""
        self.circuits.append(circuit.view)
        return circuit.view

    def _view(self, component: str, properties: Mapping[str, Any], pointed: Sequence[Sequence[str]] = ()) -> int:
        self.views.append({"component": component, "properties": properties, "pointed": pointed})
        return len(self.views) - 1

    def libraries(self) -> list[str]:
        """The script libraries the page needs."""
        from plotly.offline import get_plotlyjs

        return [*([get_plotlyjs()] if self.figures else []), *([_circuitsvis()] if self.views else [])]


def _share(value: float) -> float:
    """A share of attention; 0 where it is undefined."""
    return value if math.isfinite(value) else 0.0


def _circuitsvis() -> str:
    """The script of CircuitsVis, read from the installed package without importing it."""
    script = files("circuitsvis").joinpath("dist/cdn/iife.js").read_text(encoding="utf-8")
    return script.replace("</script", "<\\/script")  # the same within a JavaScript string
