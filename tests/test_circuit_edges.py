"""Circuits of edges: labels, counts, paths, files, and the JSON of EAP-IG."""

import itertools
import json

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.models.edges import EdgeLayout
from bigram_circuits.names import EdgeName
from bigram_circuits.storage.records import HEADER, header_checksum, read_tensors, write_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = np.random.default_rng(0).integers(0, 257, (4, 8))


def shapes(layers, heads, key_values, parallel):
    found, writers = {}, 1
    for layer in range(layers):
        for kind in "qkv":
            count = heads if kind == "q" else key_values
            found[f"blocks.{layer}.attn.hook_{kind}_input"] = (count, writers)
        found[f"blocks.{layer}.hook_mlp_in"] = (1, writers if parallel else writers + heads)
        writers += heads + 1
    return found | {"ln_final.hook_in": (1, writers)}


# --- labels and counts ---


def test_gpt2_small_has_as_many_edges_as_others_count():
    """32,491, as in Conmy et al. 2023 and Hanna et al. 2024."""
    layout = EdgeLayout.of_shapes(shapes(12, 12, 12, parallel=False))
    assert sum(readers * writers for readers, writers in (site.shape for site in layout.sites)) == 32_491
    assert [site.count for site in layout.sites[:4]] == [12, 12, 12, 1]
    assert layout.sites[-1].layer == 12


def test_labels(any_model):
    full = bc.Circuit.full(any_model, "edge")
    parallel, shared = any_model.cfg.parallel_attn_mlp, "L0KV0.k" in str(full.edges)
    assert len(full.edges) == full.kept == len(set(full.edges))
    assert ("L0H3->L0.mlp" in full.edges) is not parallel
    assert {"embed->L0H0.q", "L0.mlp->L1H3.q", "L1H3->logits", "L1.mlp->logits"} < set(full.edges)
    assert ("L0H0->L1KV1.v" in full.edges) is shared
    assert all(str(EdgeName.parse(label)) == label for label in full.edges)
    for site in bc.edge_sites(any_model):
        assert site.shape == full.shapes[site.name] == (site.count, len(site.writers))
        assert site.label(0, 0) == f"embed->{site.readers[0]}"
    one = bc.Circuit.empty(any_model, "edge").keep("embed->L0.mlp", "L0.mlp->logits")
    assert one.edges == ("embed->L0.mlp", "L0.mlp->logits")
    assert one.nodes == ()
    assert one.by_layer()[2] == (1, 11)
    assert one.by_unit()["mlp"].kept == one.by_unit()["logits"].kept == 1
    assert sum(count.total for count in one.by_unit().values()) == full.total
    assert repr(one).startswith(f"Circuit(empty | embed->L0.mlp | L0.mlp->logits: 2 of {full.total:,} edges, ")
    assert (full - one) | one == full
    assert one.random_like(1).by_layer() == one.by_layer()
    assert full.drop(*one.edges) == ~one
    assert one.keep(*full.edges).lineage == f"empty | embed->L0.mlp | L0.mlp->logits | {full.total} edges"


def test_nodes_on_a_path(any_model):
    empty = bc.Circuit.empty(any_model, "edge")
    shared = "L1KV0.k" in str(bc.Circuit.full(any_model, "edge").edges)
    key, group = ("L1KV0", ("L1H0", "L1H1")) if shared else ("L1H0", ("L1H0",))
    path = empty.keep("embed->L0H2.q", f"L0H2->{key}.k", *(f"{head}->logits" for head in group))
    dead = path.keep("embed->L1.mlp", "L0H3->logits", f"L0H0->{key}.v", "L0.mlp->L1H3.q")
    for circuit in (path, dead):
        assert circuit.to_nodes().nodes == ("L0H2", *group)
    assert empty.to_nodes().nodes == empty.keep("embed->logits").to_nodes().nodes == ()
    everything = bc.Circuit.full(any_model, ("head", "mlp"))
    assert bc.Circuit.full(any_model, "edge").to_nodes() == everything
    assert list(bc.Circuit.full(any_model, "edge").to_nodes()) == list(everything)
    assert path.to_nodes().weight_hash == path.weight_hash


def test_paths_are_those_that_a_search_finds(tiny_model):
    full = bc.Circuit.full(tiny_model, "edge")
    rng = np.random.default_rng(0)
    for share in (0.1, 0.15, 0.2, 0.3):
        circuit = full.drop(*(label for label in full.edges if rng.random() > share))
        follow = {}
        for label in circuit.edges:
            writer, reader = label.split("->")
            follow.setdefault(writer, set()).add(reader.split(".")[0] + (".mlp" if reader.endswith(".mlp") else ""))

        def paths(node, follow=follow):
            if node == "logits":
                yield ()
            for other in follow.get(node, ()):
                yield from ((other, *rest) for rest in paths(other))

        wanted = set(itertools.chain(*paths("embed"))) - {"logits"}
        assert set(circuit.to_nodes().nodes) == wanted


# --- files ---


def test_a_file_holds_it_with_its_replacement(any_model, tmp_path):
    circuit = bc.replaced(
        any_model,
        bc.Circuit.full(any_model, "edge").drop(
            "L0H1->L1.mlp" if not any_model.cfg.parallel_attn_mlp else "L0H1->logits"
        ),
        "mean",
        text=TEXT,
    )
    circuit.save(tmp_path / "circuit.safetensors")
    again = bc.Circuit.load(tmp_path / "circuit.safetensors", any_model)
    assert again == circuit
    assert again.edges == circuit.edges
    tokens = torch.from_numpy(TEXT)
    with bc.masked(any_model, circuit), torch.no_grad():
        wanted = any_model(tokens)
    with bc.masked(any_model, again), torch.no_grad():
        assert torch.equal(any_model(tokens), wanted)


def test_masks_that_are_of_no_model():
    right = shapes(2, 4, 2, parallel=False)

    def changed(**entries):
        return {name: shape for name, shape in (right | entries).items() if shape}

    wrong = (
        (changed(**{"blocks.1.hook_mlp_in": None}), "no mask of the edges into mlp of block 1"),
        (changed(**{"ln_final.hook_in": None}), "no mask of the edges into logits"),
        (changed(**{"ln_final.hook_in": (1, 12)}), r"ln_final.hook_in has shape \(1, 12\), but should have \(1, 11\)"),
        (changed(**{"blocks.1.attn.hook_q_input": (4, 5)}), r"should have \(heads, 6\)"),
        (changed(**{"blocks.1.attn.hook_v_input": (1, 6)}), r"should have \(2, 6\)"),
        (
            changed(**{"blocks.1.attn.hook_k_input": (3, 6), "blocks.1.attn.hook_v_input": (3, 6)}),
            "3 key-value heads cannot be shared evenly by 4 heads",
        ),
        (changed(**{"blocks.1.hook_mlp_in": (1, 7)}), r"should have \(1, 6 or 10\)"),
        (changed(**{"blocks.3.hook_mlp_in": (1, 7)}), "is not a hook point of readers in 2 blocks"),
        (changed(**{"blocks.1.hook_mlp_in": (10,)}), "no mask of the edges into mlp of block 1"),
    )
    for masks, said in wrong:
        with pytest.raises(ValueError, match=said) as error:
            bc.Circuit({name: torch.ones(shape, dtype=torch.bool) for name, shape in masks.items()})
        assert "\n" not in str(error.value)
    assert bc.Circuit({name: torch.ones(shape, dtype=torch.bool) for name, shape in right.items()}).kept == 82


def test_a_file_may_not_claim_more_than_it_holds(tiny_model, tmp_path, monkeypatch):
    """Labels are made for masks that are there, not for the shapes that a header claims."""
    path = tmp_path / "circuit.safetensors"
    bc.Circuit.full(tiny_model, "edge").save(path)
    arrays, metadata = read_tensors(path, "")
    metadata["shapes"] = json.dumps({name: [1 << 40, 1] for name in arrays})
    del metadata[HEADER]
    write_tensors(path, arrays, metadata | {HEADER: header_checksum(arrays, metadata)})
    monkeypatch.setattr(bc.Circuit, "_check_shapes", lambda *_: pytest.fail("looked at before the sizes"))
    with pytest.raises(ValueError, match="do not match the names and shapes"):
        bc.Circuit.load(path)


def test_bad_labels_and_models(any_model, reference_model):
    full = bc.Circuit.full(any_model, "edge")
    calls = (
        (lambda: full.keep("L0H1"), "over other nodes than L0H1"),
        (lambda: full.drop("L0H1->L9H1.q"), "nothing is called L9H1.q; the nearest is "),
        (lambda: full.drop("L1H1->L0H1.q"), r"no edge L1H1->L0H1.q here: L0H1.q does not read from L1H1"),
        (lambda: full.drop("L0H1->L1H1"), "is not the label of an edge, such as L0H3->L1H2.k"),
        (lambda: bc.Circuit.full(any_model).drop("L0H1->L1H1.q"), "is not the label of a node"),
        (lambda: bc.Circuit.full(any_model).to_nodes(), "has no edges"),
        (lambda: full.weights(any_model), "own no weights: only heads and neurons do"),
        (lambda: full.check_fits(reference_model), r"has shape \(4, 1\) in this circuit, but \(8, 1\) in the model"),
        (lambda: bc.Circuit.load(__file__), "is not a circuit file"),
    )
    for call, said in calls:
        with pytest.raises(ValueError, match=said) as error:
            call()
        assert "\n" not in str(error.value)


# --- the JSON of EAP-IG ---


def theirs(model):
    """A graph as EAP-IG's `Graph.from_model` builds it and `to_json` writes it, with all edges outside."""
    cfg = {"n_layers": 2, "n_heads": 4, "parallel_attn_mlp": model.cfg.parallel_attn_mlp, "d_model": 24}
    stream, edges = ["input"], []
    for layer in range(2):
        heads, mlp = [f"a{layer}.h{head}" for head in range(4)], f"m{layer}"
        edges += [f"{node}->{head}<{letter}>" for node in stream for head in heads for letter in "qkv"]
        edges += [f"{node}->{mlp}" for node in stream + ([] if cfg["parallel_attn_mlp"] else heads)]
        stream += [*heads, mlp]
    edges += [f"{node}->logits" for node in stream]
    return {
        "cfg": cfg,
        "nodes": {node: {"in_graph": False} for node in (*stream, "logits")},
        "edges": {edge: {"score": 0.0, "in_graph": False} for edge in edges},
    }


def write(path, record):
    path.write_text(json.dumps(record))
    return path


def test_what_eap_writes_is_read(any_model, tmp_path):
    graph, shared = theirs(any_model), any_model.cfg.n_key_value_heads == 2
    assert len(graph["edges"]) == bc.Circuit.full(any_model, "edge").total + (2 * 2 * (1 + 6) if shared else 0)
    inside = ("input->m0", "m0->a1.h2<q>", "a1.h2->logits", "a0.h3->a1.h0<k>", "a0.h3->a1.h1<k>")
    for name in inside:
        graph["edges"][name]["in_graph"] = True
    circuit = bc.import_eap(write(tmp_path / "graph.json", graph), any_model)
    keys = ("L0H3->L1KV0.k",) if shared else ("L0H3->L1H0.k", "L0H3->L1H1.k")
    assert set(circuit.edges) == {"embed->L0.mlp", "L0.mlp->L1H2.q", "L1H2->logits", *keys}
    assert (circuit.lineage, circuit.weight_hash) == ("graph.json", bc.weight_hash(any_model))
    for place, name in enumerate(inside, start=1):
        graph["edges"][name] = {"score": -float(place), "in_graph": False}
    write(tmp_path / "importances.json", graph)
    largest = bc.import_eap(tmp_path / "importances.json", any_model, size=len(keys))
    assert largest.edges == keys
    assert bc.import_eap(tmp_path / "importances.json", any_model, size=0).kept == 0
    with pytest.raises(ValueError, match="has scores, but no edge is in the graph: give size="):
        bc.import_eap(tmp_path / "importances.json", any_model)


def test_what_is_written_is_as_eap_writes_it(any_model, tmp_path):
    full = bc.Circuit.full(any_model, "edge")
    rng = np.random.default_rng(1)
    circuit = full.drop(*(label for label in full.edges if rng.random() > 0.3))
    bc.export_eap(any_model, circuit, tmp_path / "graph.json")
    record, wanted = json.loads((tmp_path / "graph.json").read_text()), theirs(any_model)
    assert record["cfg"] == wanted["cfg"]
    for part in ("nodes", "edges"):
        assert record[part].keys() == wanted[part].keys()
    assert all(
        entry == {"score": float(entry["in_graph"]), "in_graph": entry["in_graph"]}
        for entry in record["edges"].values()
    )
    assert bc.import_eap(tmp_path / "graph.json", any_model) == circuit
    assert bc.import_eap(tmp_path / "graph.json", any_model, size=circuit.kept) == circuit
    inside = {name for name, node in record["nodes"].items() if node["in_graph"]}
    on_path = {
        label.replace("L", "a").replace("H", ".h") if "H" in label else f"m{label[1]}"
        for label in circuit.to_nodes().nodes
    }
    assert inside == {"input", "logits", *on_path}


def test_files_that_are_no_graph_of_the_model(any_model, tiny_folders, tmp_path):
    path, good = tmp_path / "graph.json", theirs(any_model)

    def changed(part, **entries):
        return good | {part: good[part] | entries}

    cases = (
        (b"\x80\x04K\x01.", "it is a pickle of torch, which is not read"),
        (b"PK\x03\x04", "it is a pickle of torch, which is not read"),
        (b"[" * 10_000, "nested too deeply"),
        (b"{", "cannot be read as a circuit"),
        ([], "lacks cfg, nodes and edges"),
        ({"cfg": {}, "nodes": {}}, "lacks cfg, nodes and edges"),
        (changed("cfg", n_layers=3), "n_layers 3, but here it is 2"),
        (changed("cfg", n_heads=[4]), r"n_heads \[4\], but here it is 4"),
        (changed("cfg", parallel_attn_mlp=not good["cfg"]["parallel_attn_mlp"]), "parallel_attn_mlp"),
        (changed("edges", **{"m1->m0": {"score": 1, "in_graph": True}}), "no edge 'm1->m0'"),
        (changed("edges", **{"input->m0": {"score": 1, "in_graph": 1}}), "'input->m0' does not say whether"),
        (changed("edges", **{"input->m0": None}), "'input->m0' does not say whether"),
        (changed("nodes", m0={"in_graph": True, "neurons": [True, False]}), "a part of the output of 'm0'"),
    )
    scores = (
        (good, "no scores by which to choose"),
        (changed("edges", **{"input->m0": {"score": None, "in_graph": True}}), "the score None, not a number"),
        (changed("edges", **{"input->m0": {"score": 10**400, "in_graph": True}}), "the score 1000.*, not a number"),
        (changed("edges", **{"input->m0": {"score": float("nan"), "in_graph": True}}), "the score nan, not a number"),
    )
    for size, (record, said) in [*((None, case) for case in cases), *((3, case) for case in scores)]:
        path.write_bytes(record if isinstance(record, bytes) else json.dumps(record).encode())
        with pytest.raises(ValueError, match=said) as error:
            bc.import_eap(path, any_model, size=size)
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(f"'{path}' cannot be read as a circuit of this model: ")
    write(path, good)
    with pytest.raises(ValueError, match="size must be 0 to"):
        bc.import_eap(path, any_model, size=10_000)
    with pytest.raises(FileNotFoundError):
        bc.import_eap(tmp_path / "nowhere.json", any_model)
    with pytest.raises(ValueError, match="only a circuit of edges can be written for EAP-IG, not Circuit"):
        bc.export_eap(any_model, bc.Circuit.full(any_model), path)
    earlier = good | {"cfg": {k: v for k, v in good["cfg"].items() if k != "d_model"}}
    earlier["nodes"] = dict.fromkeys(good["nodes"], False)  # as earlier versions wrote them
    assert bc.import_eap(write(path, earlier), any_model).kept == 0


def test_heads_that_share_keys_must_share_their_edges(tiny_folders, tmp_path):
    model = bc.load_model(tiny_folders["llama"], device="cpu")
    graph = theirs(model)
    graph["edges"]["a0.h3->a1.h0<k>"]["in_graph"] = True
    with pytest.raises(ValueError, match=r"drops 'a0\.h3->a1\.h1<k>' and keeps it for a head that shares these keys"):
        bc.import_eap(write(tmp_path / "graph.json", graph), model)
