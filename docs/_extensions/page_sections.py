"""A directive that lists the sections of a run's page from their registry."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


class PageSections(SphinxDirective):
    """`{page-sections}`: the heading of every section, and what it shows, by group."""

    def run(self) -> list[nodes.Node]:
        """A list for every group, with its name above."""
        from bigram_circuits.report.page import SECTIONS

        found: list[nodes.Node] = []
        for group, sections in groupby(SECTIONS, key=lambda section: section.group):
            rows = nodes.definition_list()
            for section in sections:
                says = nodes.paragraph("", (section.tell.__doc__ or "").split("\n")[0])
                rows += nodes.definition_list_item("", nodes.term("", section.heading), nodes.definition("", says))
            found += [nodes.paragraph("", "", nodes.strong("", group)), rows]
        return found


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("page-sections", PageSections)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
