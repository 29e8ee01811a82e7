"""Attribution graphs: the files have what circuit-tracer's and Neuronpedia's viewers require, and say the same."""

import json

import pytest

from bigram_circuits.explanations.graph_files import export_graph
from tests.explanations.examples import example, prompt_example

# what the two viewers' formats require, with the types of the values
METADATA = {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str, "transcoder_list": list,
            "node_threshold": float, "schema_version": int}  # fmt: skip
PARAMETERS = {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str}
NODE = {"node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str, "token_prob": float,
        "is_target_logit": bool, "run_idx": int, "reverse_ctx_idx": int, "jsNodeId": str, "clerp": str}  # fmt: skip
LINK = {"source": str, "target": str, "weight": float}
FEATURE_TYPES = {"embedding", "logit", "cross layer transcoder", "mlp reconstruction error"}


def fits(record, types):
    return all(type(record[name]) is kind for name, kind in types.items())


@pytest.mark.parametrize("made", [example(), prompt_example()], ids=["bigram", "prompt"])
def test_a_graph_has_what_viewers_require_and_the_same_numbers(made, tmp_path):
    path = export_graph(made, tmp_path / "my-graph.json")
    graph = json.loads(path.read_text())
    assert set(graph) == {"metadata", "qParams", "nodes", "links"}
    assert fits(graph["metadata"], METADATA)
    assert graph["metadata"]["slug"] == "my-graph"
    assert graph["metadata"]["prompt_tokens"] == list(made.prompt)
    assert fits(graph["qParams"], PARAMETERS)
    assert all(fits(node, NODE) for node in graph["nodes"])
    assert all(fits(link, LINK) for link in graph["links"])
    assert {node["feature_type"] for node in graph["nodes"]} <= FEATURE_TYPES

    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(set(ids)) == len(ids) == len(made.nodes)
    assert len({(node["feature"], node["layer"], node["ctx_idx"]) for node in graph["nodes"]}) == len(ids)
    assert all(0 <= node["ctx_idx"] < len(made.prompt) for node in graph["nodes"])
    keys = dict(zip(ids, (node.key for node in made.nodes), strict=True))
    again = [(keys[link["source"]], keys[link["target"]], link["weight"]) for link in graph["links"]]
    assert again == [(edge.source, edge.target, edge.flow) for edge in made.edges]

    (answer,) = [node for node in graph["nodes"] if node["is_target_logit"]]
    assert answer["clerp"] == f'Output "{made.predictions[0][0]}" (p=0.310)'
    assert (answer["layer"], answer["ctx_idx"], answer["token_prob"]) == ("5", made.position, 0.31)
    for node, ours in zip(graph["nodes"], made.nodes, strict=True):
        assert node["layer"] == {"token": "E", "position": "E", "answer": "5"}.get(ours.kind, str(max(0, ours.layer)))
        assert node["activation"] == ours.activation
        assert ours.kind == "answer" or node["clerp"].startswith(ours.label)
    neuron = next(node for node, ours in zip(graph["nodes"], made.nodes, strict=True) if ours.kind == "neuron")
    layer, index, _ = neuron["node_id"].split("_")
    assert neuron["clerp"].startswith(f"L{layer}N{index} → '")
    strongest = max(made.nodes[:-1], key=lambda node: abs(node.flow))
    influence = {keys[node["node_id"]]: node["influence"] for node in graph["nodes"]}
    total = sum(abs(node.flow) for node in made.nodes[:-1])
    assert influence[strongest.key] == pytest.approx(abs(strongest.flow) / total)
    assert max(value for value in influence.values() if value) == pytest.approx(1)
    assert influence["answer"] is None


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder: name a file in it"):
        export_graph(example(), tmp_path)
