"""Circuits of edges in the JSON files of EAP-IG (Hanna et al. 2024, arXiv 2403.17806), which MIB's circuits share.

The file of their `Graph.to_json` holds `cfg` (`n_layers`, `n_heads`, `parallel_attn_mlp`, `d_model`), `nodes` and
`edges` by name, each edge with its `score` and whether it is `in_graph`:

| here | there |
|---|---|
| `embed->L0.mlp` | `input->m0` |
| `L0H3->L1H2.k` | `a0.h3->a1.h2<k>` |
| `L0.mlp->logits` | `m0->logits` |

There, query heads that share keys and values have edges of their own into them; here these are one edge. Their `input`
is the token embedding alone; here, it is the residual stream before the first block, with the position embedding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bigram_circuits.circuit import EDGE, Circuit
from bigram_circuits.masking.apply import as_mask
from bigram_circuits.models.edges import EdgeSite
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import in_use, uses_model
from bigram_circuits.names import EMBED, LOGITS
from bigram_circuits.storage.files import whole_file
from bigram_circuits.storage.records import opened, parse_json, regular_size, shown

_LARGEST = 1 << 28  # bytes of a file
_LARGEST_SCORE = 1e300

_Edge = tuple[str, int, int]  # hook point of the reader, index of the reader, index of the writer


def import_eap(path: str | os.PathLike[str], model: Model, *, size: int | None = None) -> Circuit:
    """Import a circuit of edges that EAP-IG or MIB wrote as JSON.

    Args:
        path: The file.
        model: The model that it is of.
        size: Number of edges to keep: those with the largest absolute score, where the scores of heads that share keys
            or values are added up. None: the edges that the file says are in the graph.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is no such file, or of another model; if it keeps an edge for some of the heads that share
            keys or values; if no edge is in the graph, but there are scores, as in MIB's `importances.json`, and no
            `size`; or if the model has no edges.

    Example:
        >>> edges = bc.Circuit.empty(model, "edge").keep("embed->L0.mlp", "L0.mlp->logits")
        >>> bc.export_eap(model, edges, "graph.json")
        >>> bc.import_eap("graph.json", model) == edges
        True
    """
    with in_use(model, "import_eap"):
        empty = Circuit.empty(model, EDGE)
    try:
        record = _read(path)
        _check_model(record["cfg"], model, empty.edge_sites)
        of_theirs = {theirs: edge for edge, names in _names(empty.edge_sites) for theirs in names}
        entries = _entries(record, of_theirs)
        kept = _in_graph(entries, of_theirs) if size is None else _largest(entries, of_theirs, size)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be read as a circuit of this model: {error}") from error
    masks = dict(empty.items())
    for name, reader, writer in kept:
        masks[name][reader, writer] = True
    lineage = Path(path).name
    return Circuit(masks, model_name=empty.model_name, weight_hash=empty.weight_hash, lineage=lineage)


@uses_model
def export_eap(model: Model, circuit: Any, path: str | os.PathLike[str]) -> Path:
    """Write a circuit of edges as EAP-IG's JSON: kept edges are in the graph, with score 1; the others have score 0.

    Args:
        model: The model that it is of.
        circuit: A circuit of edges, or what holds one.
        path: The file.

    Raises:
        ValueError: If it has other masks than of edges, or does not fit the model.
        OSError: If the file cannot be written.

    Example:
        >>> edges = bc.Circuit.empty(model, "edge").keep("embed->L0.mlp", "L0.mlp->logits")
        >>> bc.export_eap(model, edges, "graph.json")
    """
    given = as_mask(circuit)
    sites = given.edge_sites if isinstance(given, Circuit) else ()
    if not isinstance(given, Circuit) or len(sites) != len(given):
        raise ValueError(f"only a circuit of edges can be written for EAP-IG, not {given!r}")
    given.check_fits(model)
    masks = dict(given.items())
    edges, in_graph = {}, {"logits", *map(_node, given.to_nodes().nodes)}
    in_graph |= {"input"} if any(label.startswith(f"{EMBED}->") for label in given.edges) else set()
    for (name, reader, writer), names in _names(sites):
        kept = bool(masks[name][reader, writer])
        edges |= {theirs: {"score": float(kept), "in_graph": kept} for theirs in names}
    nodes = [*dict.fromkeys(name.partition("->")[0] for name in edges), "logits"]
    record = {
        "cfg": _config(model, sites),
        "nodes": {name: {"in_graph": name in in_graph} for name in nodes},
        "edges": edges,
    }
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(record), encoding="utf-8")
    return Path(path)


def _config(model: Model, sites: tuple[EdgeSite, ...]) -> dict[str, Any]:
    mlp = next(site for site in sites if site.kind == "mlp")
    return {
        "n_layers": sites[-1].layer,
        "n_heads": sites[0].count,
        "parallel_attn_mlp": len(mlp.writers) == 1,
        "d_model": model.cfg.d_model,
    }


def _names(sites: tuple[EdgeSite, ...]) -> Iterator[tuple[_Edge, tuple[str, ...]]]:
    """Every edge, and its names in EAP-IG: several if heads share what it goes into."""
    heads = sites[0].count
    for site in sites:
        writers = [_node(writer) for writer in site.writers]
        for index in range(site.count):
            if site.kind in ("q", "k", "v"):
                group = heads // site.count
                served = range(index * group, (index + 1) * group) if site.kind != "q" else (index,)
                readers = [f"a{site.layer}.h{head}<{site.kind}>" for head in served]
            else:
                readers = [_node(site.readers[index])]
            for place, writer in enumerate(writers):
                yield (site.name, index, place), tuple(f"{writer}->{reader}" for reader in readers)


def _node(label: str) -> str:
    """The name in EAP-IG of `embed`, a head, an MLP or `logits`."""
    if label in (EMBED, LOGITS):
        return "input" if label == EMBED else "logits"
    layer, _, head = label.removeprefix("L").removesuffix(".mlp").partition("H")
    return f"a{layer}.h{head}" if head else f"m{layer}"


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    size = regular_size(path)
    if size > _LARGEST:
        raise ValueError(f"it has {size:,} bytes, more than the {_LARGEST:,} that are read")
    with opened(path) as file:
        content = file.read(_LARGEST + 1)
    if content[:2] == b"PK" or content[:1] == b"\x80":
        raise ValueError("it is a pickle of torch, which is not read: write it with to_json instead of to_pt")
    record = parse_json(content)
    parts = ("cfg", "nodes", "edges")
    if not isinstance(record, dict) or not all(isinstance(record.get(part), dict) for part in parts):
        raise ValueError("it lacks cfg, nodes and edges")
    for name, node in record["nodes"].items():
        neurons = node.get("neurons") if isinstance(node, dict) else None
        if neurons is not None and not (isinstance(neurons, list) and all(neurons)):
            raise ValueError(f"it keeps a part of the output of {shown(name)}, which edges cannot express")
    return record


def _check_model(theirs: Mapping[str, Any], model: Model, sites: tuple[EdgeSite, ...]) -> None:
    ours = _config(model, sites)
    for key, value in ours.items():
        found = theirs.get(key)
        if found != value and not (key == "d_model" and found is None):  # which earlier versions left out
            raise ValueError(f"it is of a model with {key} {shown(found)}, but here it is {value}")


def _entries(record: Mapping[str, Any], of_theirs: Mapping[str, _Edge]) -> dict[str, Mapping[str, Any]]:
    for name, entry in record["edges"].items():
        if name not in of_theirs:
            raise ValueError(f"the model has no edge {shown(name)}")
        if not isinstance(entry, dict) or not isinstance(entry.get("in_graph"), bool):
            raise ValueError(f"the edge {shown(name)} does not say whether it is in_graph")
    return record["edges"]


def _in_graph(entries: Mapping[str, Mapping[str, Any]], of_theirs: Mapping[str, _Edge]) -> list[_Edge]:
    kept = {name for name, entry in entries.items() if entry["in_graph"]}
    if not kept and any(entry.get("score") for entry in entries.values()):
        raise ValueError("it has scores, but no edge is in the graph: give size=, the number of edges to keep")
    edges = dict.fromkeys(of_theirs[name] for name in kept)
    for name, edge in of_theirs.items():
        if edge in edges and name not in kept:
            raise ValueError(f"it drops {shown(name)} and keeps it for a head that shares these keys or values")
    return list(edges)


def _largest(entries: Mapping[str, Mapping[str, Any]], of_theirs: Mapping[str, _Edge], size: int) -> list[_Edge]:
    scores: dict[_Edge, float] = dict.fromkeys(of_theirs.values(), 0.0)
    for name, entry in entries.items():
        score = entry.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= _LARGEST_SCORE:
            raise ValueError(f"the edge {shown(name)} has the score {shown(score)}, not a number")
        scores[of_theirs[name]] += float(score)
    if not 0 <= size <= len(scores):
        raise ValueError(f"size must be 0 to {len(scores)}, the number of edges, not {size}")
    if not any(scores.values()):
        raise ValueError("its edges have no scores by which to choose")
    return sorted(scores, key=lambda edge: -abs(scores[edge]))[:size]
