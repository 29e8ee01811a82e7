"""Explanations in sentences and rows: what pages, notebooks and terminals say of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigram_circuits.explanations.explanation import Atlas, CircuitPath, Explanation, Node, UnitTokens

_TOKENS_NAMED = 5  # of a neuron or head, in a table
_LIKELY = 0.2  # a prediction that makes a clear picture
_TITLE = 80  # characters of a prompt in a title
PATH_COLUMNS = ("path", "adds", "share of all paths")
"""Columns of a table of paths."""
NODE_COLUMNS = ("node", "position", "directly", "along all paths", "activation", "driven by", "raises", "lowers")
"""Columns of a table of nodes."""
MEANINGS = {
    "adds": "What it adds to what is explained (in logits); all paths together add up to it.",
    "share of all paths": "Its share of the strength of all paths, whether they raise or lower.",
    "position": "Where in the prompt it is, from 0.",
    "directly": "What it adds by itself, without what later parts make of it.",
    "along all paths": "What it adds along all paths through it.",
    "activation": "How strongly the neuron fires here.",
    "driven by": "Tokens that, taken alone, give it the largest input.",
    "raises": "Tokens whose logits it raises most.",
    "lowers": "Tokens whose logits it lowers most.",
    "count": "How often the token occurs in the text that was counted.",
    "prediction": "The most likely next token, and its probability.",
    "neurons": "Neurons among its nodes.",
    "heads": "Attention heads among its nodes.",
    "strongest paths, and what each adds": "From the token to the answer; what each adds is in logits.",
}
"""What columns of these tables mean, in a sentence each."""


def quoted(token: str) -> str:
    """A token in quotes, with its spaces as they are: `' of'`."""
    return repr(token)


def answer_words(explanation: Explanation) -> str:
    """What is explained, in a picture: the token alone, if it is the logit of one."""
    token = explanation.answer.removeprefix("logit of ")
    return explanation.answer if " minus " in token else token


def path_words(path: CircuitPath, explanation: Explanation, arrow: str = "→") -> str:
    """A path from its input to the answer: `' of' → L0N12 → ' the'`."""
    return f" {arrow} ".join([*path.labels[:-1], answer_words(explanation)])


def number(value: float | None) -> str:
    """Format a number of logits with three digits or two decimals, whichever is shorter."""
    if value is None or math.isnan(value):
        return "undefined"
    if value and abs(value) < 0.005:
        return f"{value:.1e}"
    return f"{value:,.2f}" if abs(value) < 10 else f"{value:,.1f}"


def answer_probability(explanation: Explanation) -> float | None:
    """The probability of the token whose logit is explained; None if it is not the logit of a likely one."""
    name = answer_words(explanation)
    return next((chance for token, chance in explanation.predictions if quoted(token) == name), None)


def share_words(share: float | None) -> str:
    """Format a share as a percentage with two digits."""
    if share is None or math.isnan(share):
        return "undefined"
    return f"{100 * share:.0f}%" if share >= 0.1 or not share else f"{100 * share:.1f}%"


def title(explanation: Explanation) -> str:
    """What was asked: what follows a token, or the end of a prompt."""
    before = explanation.prompt[: explanation.position + 1]
    if len(before) == 1:
        return f"What follows {quoted(before[0])}"
    text = "".join(before)
    return f"What follows “{text if len(text) <= _TITLE else '…' + text[-_TITLE:]}”"


def prediction_words(explanation: Explanation) -> str:
    """What is predicted after which token, by what."""
    last = quoted(explanation.prompt[explanation.position])
    mask = "" if explanation.mask == "full model" else f" with only {explanation.mask}"
    if not explanation.predictions:
        return f"After {last}, {explanation.model}{mask}."
    token, probability = explanation.predictions[0]
    return f"After {last}, {explanation.model}{mask} predicts {quoted(token)} ({share_words(probability)})."


def sum_words(explanation: Explanation) -> str:
    """How much of the answer the listed paths add up to, and what is left out."""
    listed, answer = len(explanation.paths), explanation.answer
    if not listed:
        return f"The {answer} is {number(explanation.value)}; no path is listed."
    paths = f"{listed} paths add up" if listed > 1 else "one path adds up"
    return (
        f"The {answer} is {number(explanation.value)}: {paths} to {number(explanation.value - explanation.left_out)} "
        f"of it; what is left out is {share_words(explanation.left_out_share)} of all paths' strength."
    )


def path_rows(explanation: Explanation, arrow: str = "→") -> list[tuple[str, float, float]]:
    """For every listed path, the strongest first: its words, what it adds, and its share of all paths' strength."""
    listed = sum(abs(path.value) for path in explanation.paths)
    kept = 1 - explanation.left_out_share
    share = kept / listed if listed else 0.0
    return [(path_words(path, explanation, arrow), path.value, abs(path.value) * share) for path in explanation.paths]


def node_rows(explanation: Explanation, units: Mapping[str, UnitTokens]) -> list[list[Any]]:
    """A row of `NODE_COLUMNS` for every node, the strongest first; `units` is what is known of neurons and heads."""
    strongest = sorted(explanation.nodes, key=lambda node: -abs(node.flow))
    return [_node_row(node, units.get(node.label), explanation) for node in strongest]


def _node_row(node: Node, known: UnitTokens | None, explanation: Explanation) -> list[Any]:
    where = "" if node.position is None else f"{node.position} {quoted(explanation.prompt[node.position])}"
    tokens = ("", "", "") if known is None else map(_tokens, (known.drives, known.promotes, known.suppresses))
    label = answer_words(explanation) if node.kind == "answer" else node.label
    return [label, where, node.direct, node.flow, "" if node.activation is None else node.activation, *tokens]


def _tokens(pairs: tuple[tuple[str, float], ...]) -> str:
    return " ".join(quoted(token) for token, _ in pairs[:_TOKENS_NAMED])


ATLAS_COLUMNS = (
    "token", "count", "prediction", "probability", "answer", "value", "neurons", "heads", "left out", "strongest path",
    "adds",
)  # fmt: skip
"""Columns of a table of an atlas."""


def atlas_rows(atlas: Atlas) -> Iterator[tuple[Any, ...]]:
    """A row of `ATLAS_COLUMNS` for every token."""
    for explanation, count in zip(atlas.explanations, atlas.counts, strict=True):
        token, probability = explanation.predictions[0] if explanation.predictions else ("", math.nan)
        rows = zip(explanation.paths, path_rows(explanation, "->"), strict=True)
        of_tokens = (row for path, row in rows if path.nodes[0] != "bias")  # biases write the same after every token
        path, adds, _ = next(of_tokens, ("", math.nan, 0.0))
        kinds = [node.kind for node in explanation.nodes]
        yield (
            explanation.prompt[explanation.position], count, token, probability, explanation.answer, explanation.value,
            kinds.count("neuron"), kinds.count("head"), explanation.left_out_share, path, adds,
        )  # fmt: skip


def clearest(atlas: Atlas) -> Explanation:
    """The first, and so the most frequent, token of an atlas whose picture a stranger understands.

    It is of letters, and another one of letters follows it with a probability of at least 0.2. Without one, the first.
    """
    return next((one for one in atlas.explanations if _is_clear(one)), atlas.explanations[0])


def _is_clear(explanation: Explanation) -> bool:
    if not explanation.predictions:
        return False
    following, probability = explanation.predictions[0]
    said = explanation.prompt[explanation.position].strip(), following.strip()
    return probability >= _LIKELY and said[0] != said[1] and all(one.isalpha() and len(one) > 1 for one in said)
