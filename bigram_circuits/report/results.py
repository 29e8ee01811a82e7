"""The results that a page shows, and how a result becomes a chart and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bigram_circuits.experiments.seeds import Seeds
from bigram_circuits.experiments.stricter import StricterTests
from bigram_circuits.explanations.explanation import Atlas
from bigram_circuits.measures.conditions import OWN, label_of
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Curves, Effects, Maps, Result
from bigram_circuits.report import figures
from bigram_circuits.report.blocks import Block, Chart, Numbers
from bigram_circuits.report.words import spaced, spoken_tokens


@dataclass(frozen=True)
class LayerChart:
    """A chart of one quantity by layer."""

    result: str
    """The result that has it."""
    quantity: str
    """Its key in that result."""
    title: str
    """The chart's title."""
    label: str
    """The quantity on an axis."""
    words: str
    """The quantity in a sentence."""


LAYER_CHARTS = (
    LayerChart(
        "logit_lens", "surprisal_correlation", "Logit lens: r with the target", "r with the target", "r with the target"
    ),
    LayerChart(
        "affine_lens",
        "surprisal_correlation",
        "Affine lens: r with the target",
        "r with the target",
        "r with the target",
    ),
    LayerChart("affine_lens", "recall_at_1", "Recall of the current token", "recall@1", "recall@1"),
    LayerChart(
        "cosine", "current_embedding", "Cosine with the current token's embedding", "mean cosine", "the mean cosine"
    ),
    LayerChart(
        "cosine",
        "target_unembedding",
        "Cosine with the unembedding of the target's next token",
        "mean cosine",
        "the mean cosine",
    ),
    LayerChart(
        "rotations",
        "output_angle",
        "Rotation of the affine map to the output",
        "median angle (degrees)",
        "the median angle (in degrees)",
    ),
)
"""The charts by layer, on both pages."""


@dataclass
class Results:
    """A run's results by name, and which of them a section has shown."""

    by_name: Mapping[str, Result]
    """All of them."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """The steps that `analyze` left out, with the reasons."""
    atlas: Atlas | None = None
    """Explanations of predictions, if there are any."""
    seeds: Seeds | None = None
    """What several seeds found, if there are several."""
    stricter: StricterTests = field(default_factory=StricterTests)
    """What the stricter tests found, as far as they were made."""
    shown: set[str] = field(default_factory=set)
    """Names of the results that were shown."""

    def curves(self, name: str) -> Curves | None:
        """The curves of this name, or None."""
        return self._take(name, Curves)

    def maps(self, name: str) -> Maps | None:
        """The maps of this name, or None."""
        return self._take(name, Maps)

    def effects(self, name: str) -> Effects | None:
        """The effects of this name, or None."""
        return self._take(name, Effects)

    def _take(self, name: str, kind: type[Any]) -> Any:
        result = self.by_name.get(name)
        if not isinstance(result, kind):
            return None
        self.shown.add(name)
        return result

    def reasons(self, *steps: str) -> list[str]:
        """Why steps of `analyze` were left out: a sentence for each that was."""
        return [f"Left out: {spaced(step)}: {self.left_out[step]}." for step in steps if step in self.left_out]

    def absent(self, what: str, *steps: str) -> list[str]:
        """Why there is nothing to show: steps were left out, or never measured."""
        return self.reasons(*steps) or [f"Not measured: {what} (bigram-circuits analyze RUN measures it)."]

    def rest(self) -> dict[str, Result]:
        """The results that no section has shown so far."""
        return {name: result for name, result in self.by_name.items() if name not in self.shown}


def result_blocks(
    result: Result, title: str, says: str, quantity: str | None = None, min_width: int = 0
) -> list[Block]:
    """A result's own chart and its table."""
    return [Chart(title, says, figures.dressed(result.plot(quantity)), min_width), result_table(result, title)]


def result_table(result: Result, title: str) -> Numbers:
    """A table with all numbers of a result."""
    frame = result.to_dataframe()
    named = [name == "condition" for name in frame.columns]
    rows = [
        [
            label_of(value) if is_name else value.item() if isinstance(value, np.generic) else value
            for is_name, value in zip(named, row, strict=True)
        ]
        for row in frame.itertuples(index=False, name=None)
    ]
    columns = [spaced(str(name)) for name in frame.columns]
    return Numbers(f"Numbers: {title}", columns, rows, meanings=_meanings(result.quantities))


def _meanings(quantities: Sequence[Quantity]) -> dict[str, str]:
    """What the columns of a result's table mean: every quantity, and the ends of its interval."""
    found = {spaced(one.name): one.meaning for one in quantities}
    ends = {"low": "Lower", "high": "Upper"}
    return found | {
        f"{name} {end}": f"{words} end of the 95% interval of: {meaning}"
        for name, meaning in found.items()
        for end, words in ends.items()
    }


def activating_tokens(tokens: Maps) -> Numbers:
    """A row for every neuron: its maximally activating tokens, by condition."""
    assert tokens.text is not None
    wanted = [name for name in (*OWN, "full") if name in tokens.conditions] or list(tokens.conditions[:1])
    rows = [
        [neuron, *(spoken_tokens(list(filter(None, tokens.text[tokens.conditions.index(name)][r]))) for name in wanted)]
        for r, neuron in enumerate(tokens.rows)
    ]
    columns = ["neuron", *(f"maximally activating tokens ({label_of(name)})" for name in wanted)]
    return Numbers(tokens.title, columns, rows, is_open=True)
