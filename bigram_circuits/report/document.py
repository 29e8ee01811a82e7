"""Sections to one HTML file: no server, no network, nothing beside it.

Sections hold plain text; only here and in `markup` is HTML written, and all that comes from data is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from string import Template
from typing import Any

from bigram_circuits.measures.html import escape, table
from bigram_circuits.report.blocks import Attention, Block, Chart, Code, Opening, Reading, Section

_SURPRISED = "#d55e00"


def document(opening: Opening, sections: Sequence[Section], footer: str) -> str:
    """A page as text."""
    drawn = _Drawn()
    told = "".join(_section(one, drawn) for one in sections)
    marks = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in opening.marks)
    return Template(_PAGE).substitute(
        title=escape(opening.title),
        asked=escape(opening.asked),
        answer=escape(opening.answer),
        marks=f'<dl class="marks">{marks}</dl>' if marks else "",
        contents="".join(f'<li><a href="#{escape(one.key)}">{escape(one.heading)}</a></li>' for one in sections),
        sections=told,
        footer=escape(footer),
        figures=_script_json(drawn.figures),
        views=_script_json(drawn.views),
        style=_STYLE,
        draw=_DRAW,
        libraries="".join(f"<script>{library}</script>\n" for library in drawn.libraries()),
    )


@dataclass
class _Drawn:
    """What scripts will draw, in the order of the page."""

    figures: list[Any] = field(default_factory=list)
    """Of plotly."""
    views: list[Any] = field(default_factory=list)
    """Components of CircuitsVis, with their properties."""

    def figure(self, figure: Any) -> int:
        """Its place among the figures."""
        self.figures.append(json.loads(figure.to_json()))
        return len(self.figures) - 1

    def view(self, component: str, properties: Mapping[str, Any], pointed: Sequence[Sequence[str]] = ()) -> int:
        """Its place among the views."""
        self.views.append({"component": component, "properties": properties, "pointed": pointed})
        return len(self.views) - 1

    def libraries(self) -> list[str]:
        """The scripts that are needed, each once."""
        from plotly.offline import get_plotlyjs

        return [*([get_plotlyjs()] if self.figures else []), *([_circuitsvis()] if self.views else [])]


def _circuitsvis() -> str:
    """The script of CircuitsVis, from the installed package, which it is read from without importing it."""
    script = files("circuitsvis").joinpath("dist/cdn/iife.js").read_text(encoding="utf-8")
    return script.replace("</script", "<\\/script")  # in a string of the script, the same


def _section(section: Section, drawn: _Drawn) -> str:
    says = "".join(f"<p>{escape(sentence)}</p>" for sentence in section.says if sentence)
    blocks = "".join(_block(block, drawn) for block in section.blocks)
    return f'<section id="{escape(section.key)}"><h2>{escape(section.heading)}</h2>{says}{blocks}</section>\n'


def _block(block: Block, drawn: _Drawn) -> str:
    if isinstance(block, Chart):
        return _chart(block, drawn)
    if isinstance(block, Reading):
        return _reading(block, drawn)
    if isinstance(block, Attention):
        return _attention(block, drawn)
    if isinstance(block, Code):
        return f'<p>{escape(block.says)}</p><div class="wide"><pre><code>{escape(block.text)}</code></pre></div>'
    markup = table(block.columns, block.rows, block.caption)
    markup = f'<div class="wide" tabindex="0">{markup}</div>'
    if block.is_open:
        return markup
    return f"<details><summary>{escape(block.caption)}</summary>{markup}</details>"


def _chart(chart: Chart, drawn: _Drawn) -> str:
    """Where a chart will be drawn, and what it shows in words."""
    spoken = f"{chart.title}. {chart.says}".strip()
    style = f"height:{int(chart.figure.layout.height)}px"
    if chart.min_width:
        style += f";min-width:{chart.min_width}px"
    place = drawn.figure(chart.figure)
    box = f'<div class="chart" role="img" aria-label="{escape(spoken)}" data-figure="{place}" style="{style}"></div>'
    return f'<figure>{_caption(chart)}<div class="wide">{box}</div></figure>'


def _reading(reading: Reading, drawn: _Drawn) -> str:
    """A passage, once for each reader; the words stand there also where no script runs."""
    parts = []
    tokens = [escape(token) for token in reading.tokens]  # CircuitsVis takes a token for markup
    for reader, values in zip(reading.readers, reading.values, strict=True):
        known = [min(value, reading.most) if value == value else 0.0 for value in values]
        colours = {"minValue": 0, "maxValue": reading.most, "positiveColor": _SURPRISED}
        properties = {"tokens": tokens, "values": known} | colours
        place = drawn.view("ColoredTokens", properties, reading.pointed)
        spoken = f'role="group" aria-label="{escape(reader)}"'
        parts.append(
            f'<h4>{escape(reader)}</h4><div class="view tokens" id="view-{place}" {spoken}>{"".join(tokens)}</div>'
        )
    return f"<figure>{_caption(reading)}{''.join(parts)}</figure>"


def _attention(attention: Attention, drawn: _Drawn) -> str:
    properties = {
        "attention": attention.patterns, "tokens": list(attention.tokens), "attentionHeadNames": list(attention.heads),
        "minValue": 0, "maxValue": 1, "maskUpperTri": True,
    }  # fmt: skip
    place = drawn.view("AttentionHeads", properties)
    spoken = f'role="group" aria-label="{escape(f"{attention.title}. {attention.says}")}"'
    return (
        f'<figure class="attention">{_caption(attention)}<div class="view" id="view-{place}" {spoken}></div></figure>'
    )


def _caption(block: Chart | Reading | Attention) -> str:
    says = f"<p>{escape(block.says)}</p>" if block.says else ""
    return f"<figcaption><h3>{escape(block.title)}</h3>{says}</figcaption>"


def _script_json(values: Any) -> str:
    """JSON that can stand in a script element: nothing in it can end the element."""
    text = json.dumps(values, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c1f23; --muted: #5f6670; --line: #d9dde2;
  --soft: #f4f6f8; --link: #0a66a8; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --ink: #e6e8eb; --muted: #9aa3ad; --line: #343a41;
  --soft: #1d2126; --link: #6bb6ee; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
header, main, footer { max-width: 900px; margin: 0 auto; padding: 0 20px; overflow-wrap: anywhere; }
header { padding-top: 40px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .15rem; }
p { margin: 0 0 .7rem; }
a { color: var(--link); }
.asked { color: var(--muted); }
.answer { font-size: 1.15rem; line-height: 1.45; }
.marks { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0; }
.marks div { border-top: 3px solid #0072b2; padding: 8px 0 0; }
.marks dt { color: var(--muted); font-size: .85rem; line-height: 1.3; }
.marks dd { margin: 0; font-size: 1.45rem; font-weight: 600; font-variant-numeric: tabular-nums; }
nav { border: solid var(--line); border-width: 1px 0; padding: 10px 0; font-size: .9rem; }
nav ol { margin: 0; padding: 0 0 0 1.4em; columns: 2 280px; }
section { padding: 40px 0 0; scroll-margin-top: 0; }
figure { margin: 22px 0 10px; break-inside: avoid; }
figcaption p { color: var(--muted); font-size: .95rem; margin: 0 0 .3rem; }
.wide { overflow-x: auto; max-width: 100%; }
.chart { width: 100%; }
figure h4 { font-size: .82rem; font-weight: 600; color: var(--muted); margin: 10px 0 3px; }
.view h3, .view h4 { font-size: .85rem; margin: 0; }
.tokens { background: #ffffff; color: #000000; font-size: .92rem; line-height: 1.5; padding: 2px; }
.tokens .colored-tokens span { white-space: pre-wrap; cursor: default; overflow-wrap: anywhere; max-width: 100%; }
.tokens [data-popper-placement] { display: none; }  /* what is pointed at is told below, in words */
.attention { display: inline-block; vertical-align: top; width: 49%; margin-right: .5%; }
.attention .view { background: #ffffff; color: #222222; padding: 8px 0; }
.attention .view > div > div:nth-of-type(1) > div { width: 16.6% !important; flex-basis: 16.6% !important;
  max-width: 16.6% !important; }
.attention .view h4 { font-size: .62rem; }
@media (max-width: 800px) { .attention { width: 100%; } }
@media (prefers-color-scheme: dark) { .view { filter: invert(.9) hue-rotate(180deg); } }
#pointed { position: fixed; z-index: 9; max-width: min(340px, 92vw); padding: 8px 11px; font-size: .85rem;
  line-height: 1.4; white-space: pre-wrap; pointer-events: none; color: var(--ink); background: var(--page);
  border: 1px solid var(--line); box-shadow: 0 3px 14px rgba(0,0,0,.25); }
#pointed b { display: block; }
details { margin: 4px 0 12px; }
summary { cursor: pointer; color: var(--link); font-size: .9rem; }
details .wide { max-height: 420px; overflow: auto; margin-top: 8px; border: 1px solid var(--line); }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 5px 9px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { white-space: nowrap; }
thead th { color: var(--muted); font-weight: 600; background: var(--soft); }
details thead th { position: sticky; top: 0; }
tbody th { font-weight: 600; }
.n { text-align: right; } td.n { white-space: nowrap; }
td { white-space: pre-wrap; }
section > .wide { border-top: 1px solid var(--line); margin: 8px 0 14px; }
pre { background: var(--soft); border: 1px solid var(--line); padding: 12px 14px; margin: 0 0 12px; font-size: .86rem;
  width: max-content; min-width: 100%; }
code { font-family: ui-monospace, monospace; }
footer { color: var(--muted); font-size: .85rem; padding-top: 40px; padding-bottom: 40px; }
@media (max-width: 600px) { header { padding-top: 24px; } header, main, footer { padding-left: 14px;
  padding-right: 14px; } h1 { font-size: 1.5rem; } }
@media print { :root { color-scheme: light; --page: #ffffff; --ink: #000000; --muted: #444444; --line: #cccccc;
  --soft: #ffffff; --link: #000000; }
  body { font-size: 10.5pt; } nav, details:not([open]) { display: none; } section { padding-top: 20pt; }
  .chart { min-width: 0 !important; } .view { filter: none; }
  .wide, details .wide { overflow: visible; max-height: none; } header, main, footer { max-width: none; }
  h2, h3, figcaption { break-after: avoid; } tr { break-inside: avoid; } }
"""

_DRAW = """
(function () {
  var figures = JSON.parse(document.getElementById('figures').textContent);
  var boxes = Array.prototype.slice.call(document.querySelectorAll('.chart'));
  var dark = window.matchMedia('(prefers-color-scheme: dark)');
  function themed(figure, colours) {
    return JSON.parse(JSON.stringify(figure), function (key, value) {
      return typeof value === 'string' && Object.hasOwn(colours, value) ? colours[value] : value;
    });
  }
  function draw(box, isDark, width) {
    var colours = isDark ? {'#222222': '#e6e8eb', '#808080': '#9aa3ad', '#0072B2': '#3d9fdc', '#D55E00': '#f07f2e'}
                         : {'#808080': '#5f6670'};
    var figure = themed(figures[Number(box.dataset.figure)], colours);
    if (width) { figure.layout.width = width; }
    Plotly.react(box, figure.data, figure.layout, {displayModeBar: false, responsive: true, displaylogo: false});
  }
  function all(isDark, width) { boxes.forEach(function (box) { draw(box, isDark, width); }); }
  var next = 0;
  (function one() {  // a chart at a time, so that the page can be read meanwhile
    if (next < boxes.length) { draw(boxes[next], dark.matches); next += 1; setTimeout(one, 0); }
  })();
  var views = JSON.parse(document.getElementById('views').textContent);
  var pointed = document.getElementById('pointed');
  function point(event) {  // the lines of the token under the mouse or the finger
    var token = event.target.closest('.colored-tokens > span');
    pointed.hidden = !token;
    if (!token) { return; }
    var box = token.closest('.view');
    var place = Array.prototype.indexOf.call(token.parentNode.children, token);
    pointed.replaceChildren();
    views[Number(box.id.slice(5))].pointed[place].forEach(function (line, at) {
      var part = pointed.appendChild(document.createElement(at ? 'div' : 'b'));
      part.textContent = line;
    });
    var at = token.getBoundingClientRect(), own = pointed.getBoundingClientRect();
    var below = at.bottom + 6 + own.height < window.innerHeight;
    pointed.style.left = Math.max(4, Math.min(at.left, document.documentElement.clientWidth - own.width - 4)) + 'px';
    pointed.style.top = (below ? at.bottom + 6 : Math.max(4, at.top - own.height - 6)) + 'px';
  }
  views.forEach(function (view, place) {
    var box = document.getElementById('view-' + place);
    CircuitsVis.render(box.id, CircuitsVis[view.component], view.properties);
    if (view.pointed.length) { box.addEventListener('mouseover', point); box.addEventListener('click', point); }
    box.addEventListener('mouseleave', function () { pointed.hidden = true; });
  });
  window.addEventListener('scroll', function () { pointed.hidden = true; }, {passive: true});
  dark.addEventListener('change', function () { all(dark.matches); });
  window.addEventListener('beforeprint', function () { all(false, 660); });
  window.addEventListener('afterprint', function () { all(dark.matches); });
})();
"""

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="asked">$asked</p>
<p class="answer">$answer</p>
$marks
<nav aria-label="Contents"><ol>$contents</ol></nav>
<noscript><p>The charts need JavaScript. All their numbers are in the tables below them.</p></noscript>
</header>
<main>
$sections</main>
<footer>$footer Opening this page asks for nothing from anywhere.</footer>
<div id="pointed" role="tooltip" hidden></div>
<script type="application/json" id="figures">$figures</script>
<script type="application/json" id="views">$views</script>
$libraries<script>$draw</script>
</body>
</html>
"""
