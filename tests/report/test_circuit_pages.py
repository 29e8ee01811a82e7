"""A circuit of a task on the command line: found, evaluated, analysed, reported, compared, tried, exported."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits import cli
from bigram_circuits.experiments.falsification import falsify, load_falsification
from bigram_circuits.report.comparison import page as comparison_page
from bigram_circuits.report.page import page
from tests.conftest import D_VOCAB, UNFIT_INPUTS
from tests.example_runs import Elements

pytestmark = [UNFIT_INPUTS, pytest.mark.usefixtures("one_thread", "no_forecast")]

TEXT = np.random.default_rng(0).integers(0, D_VOCAB, (12, 8))
CORPUS = bc.Corpus.from_tokens(TEXT, TEXT[:6])
TARGET = bc.count_ngrams(TEXT, d_vocab=D_VOCAB)
RECIPE = bc.SparsifyConfig(max_steps=1, batch_size=4, units=("head", "neuron"), target_fraction=0.25)


def words_of(html):
    return " ".join(" ".join(Elements(html).text).split())


@pytest.fixture(scope="module")
def run(tiny_folders, tmp_path_factory):
    """A run of `bigram-circuits find` on a task file."""
    folder = tmp_path_factory.mktemp("circuit")
    letters = "abcdefghij"
    rows = [{"prompt": f"{a}{b}{a}", "answer": b, "wrong": "z"} for a in letters for b in letters if a != b]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows[:30])))
    command = ["find", str(tiny_folders["gpt_neox"]), "--task", str(folder / "rows.jsonl"), "--force"]
    command += ["--unit", "head,neuron", "--replace", "mean", "--target-fraction", "0.25", "--random-seeds", "1"]
    command += [
        "--max-steps",
        "2",
        "--batch-size",
        "8",
        "--no-analysis",
        "--device",
        "cpu",
        "--out",
        str(folder / "run"),
    ]
    assert cli.main(command) == 0
    return folder / "run"


def test_the_command_line_takes_the_run_of_a_circuit(run, tmp_path, capsys):
    assert cli.main(["evaluate", str(run), "--random-seeds", "1"]) == 0
    said = capsys.readouterr().out
    assert "random nodes" in said
    assert "subnetwork" not in said
    assert cli.main(["analyze", str(run), "--tokens", "64"]) == 0
    assert "left out: concentration: concentration is of weights" in capsys.readouterr().out
    assert cli.main(["report", str(run)]) == 0
    found = bc.load_run(run)
    html = (run / "report.html").read_text()
    told = words_of(html)
    circuit = found.circuit
    assert "subnetwork" not in told
    assert "Which few heads and neurons of" in told
    assert "22 of 88 nodes (25.0%) are" in told
    assert "In the circuit we give the rest their mean over the training text." in told
    assert "Which nodes are kept" in told
    heads = [label for label in circuit.nodes if "H" in label]
    assert f"{len(heads)} of 8 heads and {22 - len(heads)} of 80 neurons" in told
    assert all(label in told for label in circuit.nodes)
    kept, dropped = (next(one for one in drawn(html) if one.get("name") == name) for name in ("kept", "dropped"))
    squares = {f"L{layer}H{head}" for layer, head in zip(kept["y"], kept["x"], strict=True)}
    assert squares == set(heads)
    assert len(kept["x"]) + len(dropped["x"]) == 8
    capsys.readouterr()
    assert cli.main(["export", str(run), "--out", str(tmp_path / "model")]) == 1
    assert "weights alone cannot hold a circuit whose nodes are replaced" in capsys.readouterr().err
    other = tmp_path / "other.safetensors"
    circuit.random_like(seed=5).save(other)
    assert cli.main(["compare", str(run), str(other), "--out", str(tmp_path / "both.html")]) == 0
    assert "nodes also kept by" in capsys.readouterr().out
    told = words_of((tmp_path / "both.html").read_text())
    assert "2 circuits of" in told
    assert "Are they the same nodes?" in told
    assert ", ".join(circuit.nodes) in told


def drawn(html):
    """The traces of a page's charts."""
    figures = json.loads(html.split('id="figures">')[1].split("</script>")[0])
    return [trace for figure in figures for trace in figure["data"]]


def test_an_exported_circuit_is_the_model_with_its_nodes_at_zero(tiny_model, tmp_path):
    circuit = bc.Circuit.full(tiny_model).random_like() - bc.Circuit.empty(tiny_model).keep(
        "L0H0", "L0H1", "L1N3", "L1N4"
    )
    bc.export_huggingface(tiny_model, circuit, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokens = torch.from_numpy(TEXT[:3])
    with torch.no_grad(), bc.masked(tiny_model, circuit):
        assert torch.allclose(plain(tokens).logits, tiny_model(tokens), atol=1e-4)
        assert not torch.allclose(tiny_model(tokens), plain(tokens.flip(1)).logits, atol=1e-2)
    bc.export_masks(tiny_model, circuit, tmp_path / "masks.npz")
    with pytest.raises(ValueError, match=r"the nodes of blocks\.0\.hook_mlp_out are no heads or neurons"):
        bc.export_masks(tiny_model, bc.Circuit.full(tiny_model, "mlp"), tmp_path / "other.npz")
    with pytest.raises(ValueError, match="replace='resample'"):
        bc.export_masks(tiny_model, bc.replaced(tiny_model, circuit, "resample"), tmp_path / "other.npz")


def test_a_circuit_is_tried_against_untrained_models_and_random_nodes(tiny_model, tmp_path):
    found = bc.find_circuit(tiny_model, TARGET, CORPUS, RECIPE, run_dir=tmp_path / "run", check_memory="off")
    tried = falsify(
        tiny_model, TARGET, CORPUS, RECIPE, found=found, sizes=[0.25], seeds=2, run_dir=tmp_path / "run" / "falsify"
    )
    assert tried.controls.notes == {"noun": "circuit", "units": "nodes"}
    assert {"re-initialised blocks", "shuffled blocks", "random nodes", "nonsense target", "seed 1"} <= set(
        tried.controls.names
    )
    at_size = {name for name in tried.controls.names if "no penalty" not in name}
    assert {tried.controls.get("fraction")[name] for name in at_size} == {0.25}
    random = bc.evaluate(tiny_model, found.circuit.random_like(seed=0), TARGET, CORPUS.held_out, controls=False)
    assert tried.controls.get("kl")["random nodes"] == pytest.approx(random.subnetwork.kl, abs=1e-6)
    assert any("25.00% of the nodes" in line for line in tried.says)
    read = load_falsification(tmp_path / "run" / "falsify", bc.load_run(tmp_path / "run"))
    assert read is not None
    assert read.verdict == tried.verdict
    assert "With random nodes in its place" in words_of(page(bc.load_run(tmp_path / "run")))
    for recipe, words in (
        (bc.SparsifyConfig(), "the recipe is of weight, and what was found is a circuit"),
        (bc.SparsifyConfig(units=("weight", "head")), "cannot be tried together"),
        (bc.SparsifyConfig(units=("head",)), "the recipe is of 8 nodes, the circuit of 88"),
    ):
        with pytest.raises(ValueError, match=words):
            falsify(tiny_model, TARGET, CORPUS, recipe, found=found)


def test_circuits_along_a_path_are_nested(tiny_model, tmp_path):
    recipe = bc.SparsifyConfig(max_steps=2, batch_size=4, units=("head", "neuron"), replace="mean")
    path = bc.sparsity_path(
        tiny_model, TARGET, CORPUS, recipe, (0.01, 1.0), run_dir=tmp_path / "path", check_memory="off"
    )
    large, small = (one.circuit for one in path.found)
    assert (small - large).kept == 0
    assert (path.empty.kept, path.full.kept) == (0, 88)
    told = words_of(comparison_page(bc.compare(tmp_path / "path")))
    assert "2 circuits of" in told
