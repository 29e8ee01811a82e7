"""A directive that documents the command line from its own parser, so that the page says what the program does."""

from __future__ import annotations

import argparse
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


class CommandLine(SphinxDirective):
    """`{command-line}`: a section for every subcommand, with its usage, arguments and options."""

    def run(self) -> list[nodes.Node]:
        """The sections."""
        from bigram_circuits.cli import parser

        (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
        summaries = {choice.dest: choice.help for choice in commands._choices_actions}
        return [
            _section(self.state.document, name, summaries[name] or name, one) for name, one in commands.choices.items()
        ]


def _section(document: nodes.document, name: str, summary: str, parser: argparse.ArgumentParser) -> nodes.Node:
    section = nodes.section(names=[nodes.fully_normalize_name(name)])
    section += nodes.title("", "", nodes.literal("", name))
    section += nodes.paragraph("", f"{summary[:1].upper()}{summary[1:]}.")
    section += nodes.literal_block("", _usage(parser), language="none")
    rows = nodes.definition_list(classes=["options"])
    for action in sorted(parser._actions, key=lambda action: bool(action.option_strings)):
        if action.help and action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            rows += _row(action)
    section += rows
    document.note_implicit_target(section, section)
    return section


def _usage(parser: argparse.ArgumentParser) -> str:
    formatter = argparse.HelpFormatter(parser.prog, width=80)  # whatever the terminal's
    formatter.add_usage(None, parser._actions, parser._mutually_exclusive_groups, prefix="")
    return formatter.format_help().strip()


def _row(action: argparse.Action) -> nodes.Node:
    value = action.metavar or ("" if action.choices is None else "{" + ",".join(map(str, action.choices)) + "}")
    value = str(value) or ("" if action.nargs == 0 or not action.option_strings else action.dest.upper())
    names = [f"{name} {value}".strip() for name in action.option_strings] or [value or action.dest]
    term = nodes.term("", "", *_between([nodes.literal("", name) for name in names]))
    if action.required and action.option_strings:
        term += nodes.emphasis("", " (required)")
    says = argparse.HelpFormatter("")._expand_help(action)
    if action.choices is not None and "default" not in says and action.default is not None:
        says += f" (default: {action.default})"
    return nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph("", says)))


def _between(names: list[nodes.literal]) -> list[nodes.Node]:
    return [node for name in names for node in (nodes.Text(", "), name)][1:]


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
