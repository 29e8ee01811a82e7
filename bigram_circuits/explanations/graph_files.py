"""Write explanations as the JSON of attribution graphs that other viewers open: circuit-tracer's, Neuronpedia's.

The format is that of Neuronpedia's `graph-schema.json` and of github.com/safety-research/circuit-tracer: `metadata`,
`qParams`, `nodes` and `links`. It knows embeddings, features of transcoders, errors and logits. Neurons,
heads and whole components are written as features with their label in `clerp`, biases and replaced nodes as errors.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigram_circuits.explanations import words
from bigram_circuits.measures.html import write_page

if TYPE_CHECKING:
    from bigram_circuits.explanations.explanation import Explanation, Node

_TYPES = {"token": "embedding", "position": "embedding", "bias": "mlp reconstruction error", "answer": "logit"}
_TYPES["replaced"] = _TYPES["bias"]
_FEATURE = "cross layer transcoder"
_NOT_A_NEURON = 1_000_000  # from here on, the numbers of what has no index of a neuron
_TOKENS_NAMED = 3  # in the label of a neuron


def export_graph(explanation: Explanation, path: str | os.PathLike[str]) -> Path:
    """Write an explanation as an attribution graph in JSON; returns the path.

    The weight of a link is what is added to the answer along all paths through it, in the unit of the answer. A node's
    `influence` is what circuit-tracer prunes by: the share of the nodes' summed flows (absolute values) that it and all
    stronger nodes have.

    Raises:
        ValueError: If the path is a folder.
        OSError: If it cannot be written.

    Example:
        >>> bc.export_graph(analysis.explain(model, found, "of"), "graph.json").name
        'graph.json'
    """
    return write_page(path, lambda: json.dumps(graph_json(explanation, Path(path).stem), ensure_ascii=False) + "\n")


def graph_json(explanation: Explanation, slug: str) -> dict[str, Any]:
    """An explanation as the values of such a file; `slug` is the graph's name there."""
    numbers: dict[str, int] = {}
    influence = _influence(explanation)
    nodes = {node.key: _node(node, explanation, numbers, influence.get(node.key)) for node in explanation.nodes}
    return {
        "metadata": {
            "slug": slug,
            "scan": explanation.model,
            "transcoder_list": [],
            "prompt_tokens": list(explanation.prompt),
            "prompt": "".join(explanation.prompt),
            "node_threshold": 1.0,
            "schema_version": 1,
            "info": {
                "description": f"{words.prediction_words(explanation)} {words.sum_words(explanation)}",
                "generator": {"name": "bigram_circuits", "url": "https://github.com/bigram-circuits/bigram_circuits"},
            },
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": list(nodes.values()),
        "links": [
            {"source": nodes[one.source]["node_id"], "target": nodes[one.target]["node_id"], "weight": one.flow}
            for one in explanation.edges
        ],
    }


def _influence(explanation: Explanation) -> dict[str, float]:
    """For every node but the answer, the share of all flows that it and the stronger ones have."""
    ranked = sorted((node for node in explanation.nodes if node.kind != "answer"), key=lambda node: -abs(node.flow))
    total, found, sum_so_far = sum(abs(node.flow) for node in ranked) or 1.0, {}, 0.0
    for node in ranked:
        sum_so_far += abs(node.flow)
        found[node.key] = min(1.0, sum_so_far / total)
    return found


def _node(node: Node, explanation: Explanation, numbers: dict[str, int], influence: float | None) -> dict[str, Any]:
    kind = _TYPES.get(node.kind, _FEATURE)
    place = explanation.position if node.position is None else node.position
    index = _index(node, numbers)
    layer = {"embedding": "E", "logit": str(node.layer + 1)}.get(kind, str(max(0, node.layer)))
    chance = words.answer_probability(explanation) or 0.0
    return {
        "node_id": f"{layer}_{index}_{place}",
        "feature": index if kind != _FEATURE else _paired(node.layer, index),
        "layer": layer,
        "ctx_idx": place,
        "feature_type": kind,
        "token_prob": chance if kind == "logit" else 0.0,
        "is_target_logit": kind == "logit",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{'L' if kind == 'logit' else layer}_{index}-{0 if kind == _FEATURE else place}",
        "clerp": _clerp(node, explanation, chance),
        "influence": influence,
        "activation": node.activation,
    }


def _index(node: Node, numbers: dict[str, int]) -> int:
    """A neuron's index in its layer; of other nodes, a number of their own, the same wherever their label is."""
    neuron = re.fullmatch(r"L\d+N(\d+)", node.label) if node.kind == "neuron" else None
    if neuron is not None:
        return int(neuron[1])
    return numbers.setdefault(f"{node.kind} {node.layer} {node.label}", _NOT_A_NEURON + len(numbers))


def _paired(layer: int, index: int) -> int:
    """One number for a layer and an index (Cantor's pairing), as these files name features."""
    return (layer + index) * (layer + index + 1) // 2 + index


def _clerp(node: Node, explanation: Explanation, chance: float) -> str:
    """What viewers show as a node's name."""
    if node.kind == "answer":
        name = words.answer_words(explanation)
        token = name[1:-1] if name[0] in "'\"" else name
        return f'Output "{token}" (p={chance:.3f})'
    known = explanation.units.get(node.label)
    if known is None or not known.promotes:
        return node.label
    return f"{node.label} → {' '.join(words.quoted(token) for token, _ in known.promotes[:_TOKENS_NAMED])}"
