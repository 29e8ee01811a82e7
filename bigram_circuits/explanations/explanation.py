"""Explanations: how much of a prediction each part of a masked model writes, and along which paths.

With attention patterns, the scales of norms and the slopes of activation functions frozen at the values that they take
on a prompt, a model is linear from its embeddings to its logits. Then a logit is a sum over the parts that write to the
residual stream (their direct contributions), and it is a sum over all paths from an input to it. `flow` is the sum of
all the paths through a node or an edge.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bigram_circuits.explanations import words
from bigram_circuits.explanations.page import atlas_page, explanation_page
from bigram_circuits.measures import html, plots
from bigram_circuits.storage.files import write_text
from bigram_circuits.storage.origin import Origin
from bigram_circuits.storage.records import read_record, sealed, shown
from bigram_circuits.storage.typed import Record, from_json

_FORMAT = "bigram_circuits.atlas/1"
_PATHS_SHOWN = 12  # in a notebook, in a figure

KINDS = {
    "token": "the embedding of a token of the prompt",
    "position": "the embedding of a position",
    "neuron": "an MLP neuron",
    "head": "an attention head",
    "attn": "a whole attention layer",
    "mlp": "a whole MLP",
    "bias": "biases, which are the same for every prompt",
    "replaced": "what stands for nodes that a circuit drops",
    "answer": "what is explained",
}
"""The kinds of nodes, and what each is."""
SOURCES = ("token", "position", "bias", "replaced")
"""The kinds at which paths begin."""


@dataclass(frozen=True)
class Node(Record):
    """A part of the model at a position of the prompt."""

    key: str
    """Names it within an explanation: `L0N12@1`, `token@1`, `answer`."""
    kind: str
    """One of `KINDS`."""
    label: str
    """For example `L0N12`; of a token, the token itself, quoted."""
    layer: int
    """Index of its block; -1 before the blocks, `n_layers` for the answer."""
    position: int | None
    """Position in the prompt; None where it has none (biases, the answer)."""
    direct: float
    """What it adds to the answer by itself, in the unit of the answer (logits)."""
    flow: float
    """What it adds along all paths through it, in the unit of the answer."""
    unseen: float = 0.0
    """The part of `flow` that comes into it from nodes that the explanation does not list."""
    activation: float | None = None
    """Of a neuron: its activation."""


@dataclass(frozen=True)
class Edge(Record):
    """What one node writes for another to read."""

    source: str
    """Key of the node that writes."""
    target: str
    """Key of the node that reads."""
    flow: float
    """What is added to the answer along all paths through this edge, in its unit."""


@dataclass(frozen=True)
class CircuitPath(Record):
    """One path from an input to the answer."""

    nodes: tuple[str, ...]
    """Keys of the nodes, from the input to the answer. Those that no `Node` describes are in no drawing."""
    labels: tuple[str, ...]
    """Their labels."""
    value: float
    """What it adds to the answer, in its unit."""


@dataclass(frozen=True)
class UnitTokens(Record):
    """What is known of a neuron or head, whatever the prompt."""

    drives: tuple[tuple[str, float], ...] = ()
    """Tokens that drive it, with its input (a neuron's preactivation) from each alone, the largest first."""
    promotes: tuple[tuple[str, float], ...] = ()
    """Tokens whose logits it raises most, with how much per unit of activation."""
    suppresses: tuple[tuple[str, float], ...] = ()
    """Tokens whose logits it lowers most, likewise."""
    lost: float | None = None
    """Share of the target's information that is lost without it, if it was measured."""


@dataclass(frozen=True)
class Explanation(Record):
    """A prediction as a sum over the parts of a masked model, and over paths through them.

    Example:
        >>> explained = analysis.explain(model, found, "of")
        >>> explained.to_dataframe().columns.tolist()
        ['path', 'value', 'share']
        >>> page = explained.to_html("explanation.html")
    """

    model: str
    """The model, in words."""
    mask: str
    """What of it is kept, in words: `59,194 of 3,145,728 weights (1.88%)`, or `full model`."""
    prompt: tuple[str, ...]
    """The tokens of the prompt."""
    position: int
    """The position after which the prediction is made."""
    answer: str
    """What is explained: `logit of ' the'`."""
    value: float
    """Its value in the masked model; `terms` add up to it."""
    predictions: tuple[tuple[str, float], ...]
    """The most likely next tokens in the masked model, with their probabilities."""
    terms: Mapping[str, float] = field(repr=False)
    """Direct contributions: of every embedding, head, neuron and bias, by label, none left out but exact zeros."""
    nodes: tuple[Node, ...] = field(repr=False)
    """The nodes with the largest flows, with inputs and answer; from the inputs to the answer."""
    edges: tuple[Edge, ...] = field(repr=False)
    """The edges between them; the edges into a node and its `unseen` add up to its flow."""
    paths: tuple[CircuitPath, ...] = field(repr=False)
    """The strongest paths, strongest first."""
    left_out: float
    """What all other paths add up to: `value` less the listed paths."""
    left_out_share: float
    """How much of the paths' total strength (the sum of absolute values) is not listed, from 0 to 1.

    Paths that were never taken apart count as one with those that they begin with.
    """
    units: Mapping[str, UnitTokens] = field(repr=False, default_factory=dict)
    """What is known of the neurons and heads among the nodes, by label."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """How it was made, as JSON values: what could not be taken apart, what was frozen."""

    def __post_init__(self) -> None:
        length, keys = len(self.prompt), {node.key for node in self.nodes}
        if not 0 <= self.position < length:
            raise ValueError(f"position should be one of a prompt of {length} tokens, not {self.position}")
        for node in self.nodes:
            if node.kind not in KINDS:
                raise ValueError(f"the kind of a node should be one of {', '.join(KINDS)}, not {shown(node.kind)}")
            if node.position is not None and not 0 <= node.position < length:
                raise ValueError(f"the node {shown(node.key)} is at {node.position} of {length} positions")
        if len(keys) < len(self.nodes) or [node.kind for node in self.nodes].count("answer") != 1:
            raise ValueError("nodes should be different, and one of them the answer")
        for end in (end for edge in self.edges for end in (edge.source, edge.target)):
            if end not in keys:
                raise ValueError(f"an edge joins {shown(end)}, which is no node")
        if not all(len(path.labels) == len(path.nodes) > 0 for path in self.paths):
            raise ValueError("a path should have a label for each of its nodes, and one node or more")

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """A page to explore it with, as HTML that requests nothing; also written to a file if a path is given.

        Raises:
            ValueError: If the path is a folder.
            OSError: If the file cannot be written.
        """
        page = explanation_page(self)
        if path is not None:
            html.write_page(path, lambda: page)
        return page

    def plot(self) -> Any:
        """Draw what each of the strongest paths adds to the answer, as a plotly figure."""
        paths = self.paths[:_PATHS_SHOWN]
        names = [words.path_words(path, self) for path in paths]
        values = np.array([path.value for path in paths], dtype=float)
        title = f"Strongest paths to the {self.answer}"
        return plots.ranked("path", names, values, f"added to the {self.answer}", title)

    def to_dataframe(self) -> Any:
        """Convert the paths to a pandas DataFrame, the strongest first.

        Columns: `path`, in words (`' of' -> L0N12 -> ' the'`); `value`, what it adds, in the unit of the answer; and
        `share`, its share of the strength of all paths, also those that are not listed.
        """
        import pandas as pd

        return pd.DataFrame(words.path_rows(self, "->"), columns=["path", "value", "share"])

    def terms_frame(self) -> Any:
        """Convert the direct contributions to a pandas DataFrame of `part` and `value`, the strongest first."""
        import pandas as pd

        ordered = sorted(self.terms.items(), key=lambda term: -abs(term[1]))
        return pd.DataFrame(ordered, columns=["part", "value"])

    def __str__(self) -> str:
        lines = [f"{path.value:+9.3f}  {words.path_words(path, self, '->')}" for path in self.paths[:_PATHS_SHOWN]]
        return "\n".join([words.prediction_words(self), words.sum_words(self), *lines])

    def _repr_html_(self) -> str:
        rows = [(path, value, words.share_words(share)) for path, value, share in words.path_rows(self)]
        table = html.table(words.PATH_COLUMNS, rows[:_PATHS_SHOWN], "Strongest paths")
        return html.summary(words.title(self), [words.prediction_words(self), words.sum_words(self)], table)


@dataclass(frozen=True)
class Atlas(Record):
    """Explanations of what follows each of many tokens.

    Example:
        >>> many = analysis.atlas(model, found, text, tokens=3)
        >>> len(many.to_dataframe())
        3
        >>> page = many.to_html("atlas.html")
    """

    title: str
    """What it is of."""
    explanations: tuple[Explanation, ...] = field(repr=False)
    """One for each token, in order of frequency, without `terms` and `units`."""
    counts: tuple[int, ...] = field(repr=False)
    """How often each token occurs in the text that was counted; of a task's prompts, 1."""
    units: Mapping[str, UnitTokens] = field(repr=False, default_factory=dict)
    """What is known of the neurons and heads, by label."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """How it was made, as JSON values."""

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """A page to explore it with, a token at a time, as HTML that requests nothing; also written if a path is given.

        Raises:
            ValueError: If the atlas is empty, or the path is a folder.
            OSError: If the file cannot be written.
        """
        page = atlas_page(self)
        if path is not None:
            html.write_page(path, lambda: page)
        return page

    def to_dataframe(self) -> Any:
        """Convert to a pandas DataFrame with a row for every token.

        Columns: `token`, `count`, the likeliest next token (`prediction`) and its `probability`, the `answer` that is
        explained and its `value`, how many `neurons` and `heads` are among the nodes, the share of all paths' strength
        that is `left_out`, the `strongest_path` of those that biases do not begin, and what it `adds`.
        """
        import pandas as pd

        columns = [name.replace(" ", "_") for name in words.ATLAS_COLUMNS]
        return pd.DataFrame(list(words.atlas_rows(self)), columns=columns)

    def save(self, path: str | os.PathLike[str], of: Origin | None = None) -> None:
        """Write the atlas as a JSON file with a checksum, which says what it is of if that is given."""
        record = {"format": _FORMAT, "atlas": self.to_json()} | ({} if of is None else {"of": of.to_json()})
        write_text(Path(path), json.dumps(sealed(record)) + "\n")

    def _repr_html_(self) -> str:
        rows = html.shortened([row[:4] for row in words.atlas_rows(self)], _PATHS_SHOWN)
        table = html.table(words.ATLAS_COLUMNS[:4], rows, self.title)
        return html.summary(self.title, [f"{len(self.explanations)} tokens."], table)


def load_atlas(path: str | os.PathLike[str]) -> Atlas:
    """Load an atlas from its file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not an atlas, has another format version, or is damaged.

    Example:
        >>> analysis.atlas(model, found, text, tokens=3).save("atlas.json")
        >>> len(bc.load_atlas("atlas.json").explanations)
        3
    """
    return load_atlas_and_origin(path)[0]


def load_atlas_and_origin(path: str | os.PathLike[str], *, follow: bool = True) -> tuple[Atlas, Origin | None]:
    """Load an atlas, and what it says it is of; `follow` says whether the file may be a symbolic link.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not an atlas, has another format version, or is damaged.
    """
    complaint = "is not an atlas that can be read"
    record = read_record(path, complaint, follow=follow)
    try:
        if record.get("format") != _FORMAT:
            raise ValueError(f"its format is {shown(record.get('format'))}, but {_FORMAT!r} is needed")
        of = from_json(Origin | None, record.pop("of", None), "of")
        atlas = Atlas.from_json(record.get("atlas"))
        if len(atlas.counts) != len(atlas.explanations):
            raise ValueError(f"it has {len(atlas.explanations)} explanations but {len(atlas.counts)} counts")
    except ValueError as error:
        raise ValueError(f"{str(path)!r} {complaint}: {error}") from error
    return atlas, of
