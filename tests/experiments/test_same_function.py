"""Whether two masks compute the same: agreement, splices and streams against plain Hugging Face and NumPy."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits.experiments.same_function import ELSEWHERE, HELD_OUT
from bigram_circuits.planted.bigram import Planted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("planted")


@pytest.fixture(scope="module")
def planted(folder) -> Planted:
    return bc.plant_bigram(d_vocab=8, successors=2, folder=folder)


@pytest.fixture(scope="module")
def text(planted):
    return planted.corpus.held_out[:6]


@pytest.fixture(scope="module")
def other(planted) -> bc.Subnetwork:
    """The circuit without two neurons, and with some weights that were not planted."""
    return (planted.circuit | planted.circuit.random_like(seed=3)).drop_neurons(0, [2, 3])


@pytest.fixture(scope="module")
def compared(planted, other, text) -> bc.SameFunction:
    return bc.same_function(planted.model, planted.circuit, other, planted.target, text)


def plain_log_probs(folder, mask, tokens):
    """Of a GPT-2 whose weight matrices were multiplied by masks."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for layer, block in enumerate(model.transformer.h):
            of = {name.rpartition(".")[2]: mask[name].float() for name in mask if name.startswith(f"blocks.{layer}.")}
            block.mlp.c_fc.weight *= of["W_in"]
            block.mlp.c_proj.weight *= of["W_out"]
            heads, d_model, d_head = of["W_Q"].shape
            reads = [of[name].permute(1, 0, 2).reshape(d_model, heads * d_head) for name in ("W_Q", "W_K", "W_V")]
            block.attn.c_attn.weight *= torch.cat(reads, 1)
            block.attn.c_proj.weight *= of["W_O"].reshape(heads * d_head, d_model)
        return model(torch.as_tensor(tokens)).logits.double().log_softmax(-1).numpy()


def test_behaviour_equals_plain_numbers(planted, other, text, compared, folder):
    p, q = (plain_log_probs(folder, mask, text) for mask in (planted.circuit, other))
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    mean = np.exp(p).mean((0, 1))
    constant = -(mean * np.log(mean)).sum() + (np.exp(p) * p).sum(-1).mean()
    behaviour = compared.behaviour
    assert behaviour.get("kl")[HELD_OUT] == pytest.approx(kl, abs=1e-6)
    assert behaviour.get("agreement")[HELD_OUT] == pytest.approx(1 - kl / constant, abs=1e-5)
    back = (np.exp(q) * (q - p)).sum(-1).mean()
    assert behaviour.get("kl_back")[HELD_OUT] == pytest.approx(back, abs=1e-6)
    assert behaviour.get("top1_agreement")[HELD_OUT] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    at = behaviour.names.index(HELD_OUT)
    assert behaviour.low[0, at] < behaviour.values[0, at] < behaviour.high[0, at]


def test_splices_equal_plain_numbers(planted, other, text, compared, folder):
    """The share of explained information, from the target's own probabilities."""
    probs = planted.probs[torch.as_tensor(text)].numpy()
    mean = probs.mean((0, 1))
    constant = -(mean * np.log(mean)).sum() + (probs * np.log(probs)).sum(-1).mean()

    def gain(mask):
        log_probs = plain_log_probs(folder, mask, text)
        return constant - (probs * (np.log(probs) - log_probs)).sum(-1).mean()

    taken = {name: (other if ".0.mlp" in name else planted.circuit)[name] for name in planted.circuit}
    without = {name: torch.zeros_like(mask) if ".0.mlp" in name else mask for name, mask in taken.items()}
    own = gain(planted.circuit)
    assert compared.splices.get("kept_in_a")["L0.mlp"] == pytest.approx(gain(taken) / own, abs=1e-5)
    assert compared.splices.get("without_in_a")["L0.mlp"] == pytest.approx(gain(without) / own, abs=1e-5)
    assert compared.spliced < 0.95


def test_streams(planted, other, text, compared):
    """The embedding is the same; the cosine is of centred streams."""
    assert compared.streams is not None
    cosine = compared.streams.get("cosine", "both")
    assert cosine[0] == pytest.approx(1)
    streams = []
    for mask in (planted.circuit, other):
        with bc.masked(planted.model, mask), torch.no_grad():
            _, cache = planted.model.run_with_cache(torch.as_tensor(text))
        stream = cache["blocks.1.hook_resid_post"].flatten(0, 1).double().numpy()
        streams.append(stream - stream.mean(0))
    a, b = streams
    wanted = ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()
    assert cosine[-1] == pytest.approx(wanted, abs=1e-6)


def test_verdicts(planted, text):
    """The same mask; weights that nothing reads; and a mask that does something else."""
    model, circuit, target = planted.model, planted.circuit, planted.target
    same = bc.same_function(model, circuit, circuit, target, text)
    assert same.verdict == "same weights"
    assert (same.agreement, same.jaccard) == (pytest.approx(1), 1)
    assert not same.splices.names
    assert math.isnan(same.spliced)
    assert "Same weights" in str(same)
    more = circuit | circuit.random_like(seed=1)
    alike = bc.same_function(model, circuit, more, target, text, out_of_distribution=text)
    agreements = alike.behaviour.get("agreement")
    assert agreements[ELSEWHERE] == agreements[HELD_OUT]
    assert alike.verdict == "other weights, same function"
    assert alike.spliced > 0.95
    assert "fit each other" in alike.says
    assert bc.same_function(model, circuit, ~circuit, target, text).verdict == "other function"


def test_it_looks_elsewhere_too():
    """A full model may do the same as its circuit on a task's prompts alone."""
    planted = bc.plant_attention("induction", d_vocab=8, length=11)
    whole = bc.Circuit.full(planted.model)
    rows = planted.corpus.held_out[:4]
    compared = bc.same_function(planted.model, planted.nodes, whole, planted.target, rows)
    assert compared.behaviour.get("agreement")[HELD_OUT] > 0.9 > compared.behaviour.get("agreement")[ELSEWHERE]
    assert compared.verdict == "other function"
    assert set(compared.splices.names) >= {"L0.head", "L1.head", "L0"}


def test_saved(compared, tmp_path):
    compared.save(tmp_path)
    again = bc.load_same_function(tmp_path)
    assert (again.says, again.verdict) == (compared.says, compared.verdict)
    assert again.of is not None
    (tmp_path / "streams.json").unlink()
    assert bc.load_same_function(tmp_path).streams is None
    compared.overlap.save(tmp_path / "streams.json")
    with pytest.raises(ValueError, match="of another kind"):
        bc.load_same_function(tmp_path)


def test_it_is_shown(compared):
    assert "L0.mlp" in compared._repr_html_()
    assert compared.plot().data
    assert list(compared.to_dataframe().part) == list(compared.splices.names)


def test_bad_input(planted, text):
    model, circuit, target = planted.model, planted.circuit, planted.target
    with pytest.raises(ValueError, match="keeps no weight"):
        bc.same_function(model, circuit, circuit.constant(False), target, text)
    with pytest.raises(ValueError, match="a subnetwork and a circuit"):
        bc.same_function(model, circuit, bc.Circuit.full(model), target, text)
    with pytest.raises(ValueError, match="seed"):
        bc.same_function(model, circuit, circuit, target, text, seed=-1)
