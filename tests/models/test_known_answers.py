"""A zoo of models whose circuits are known: written by hand in tracr's format and as an induction circuit.

They compute what NumPy does with the same weights; the weights and heads that matter are found, and no other; and
ablations do what the construction says.
"""

import math

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits import analysis
from tests.known_models import (
    BOS,
    CONTEXT,
    INDUCTION_HEADS,
    LENGTH,
    LETTERS,
    PERIOD,
    SYMBOLS,
    UPPER,
    induction_module,
    induction_weights,
    numpy_logits,
    repeated,
    tracr_model,
    tracr_tokens,
)

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = [(layer, head) for layer in (0, 1) for head in range(3)]


def logits_of(model, tokens, kept=None):
    with torch.no_grad(), bc.masked(model, bc.Subnetwork.full(model) if kept is None else kept):
        return model(torch.from_numpy(tokens)).numpy()


# --- tracr ---


@pytest.fixture(scope="module")
def compiled():
    """A model by tracr, and the weights that compute its program."""
    assembled, masks, weights = tracr_model()
    model = bc.load_model(assembled)
    names = [site.name for site in bc.weight_sites(model)]
    return model, bc.Subnetwork({name: masks[name] for name in names}), weights


def upper_case(tokens):
    """What the program says, by its own words."""
    words = np.array([*LETTERS, BOS])[tokens]
    before = np.concatenate([words[:, :1], words[:, :-1]], 1)
    return np.vectorize(list(UPPER.values()).index)(np.vectorize(UPPER.get)(before))


def test_a_compiled_program_computes_what_numpy_and_the_program_do(compiled):
    model, _, weights = compiled
    tokens = tracr_tokens()
    np.testing.assert_allclose(logits_of(model, tokens), numpy_logits(weights, tokens, causal=False), atol=1e-5)
    assert (logits_of(model, tokens).argmax(-1) == upper_case(tokens)).all()
    broken = bc.load_model(tracr_model(broken=True)[0])
    assert (logits_of(broken, tokens).argmax(-1) == upper_case(tokens)).mean() < 0.5


def test_the_weights_of_the_program_are_found_all_of_them_and_no_other(compiled):
    model, circuit, _ = compiled
    tokens = tracr_tokens()
    config = bc.SparsifyConfig(
        max_steps=100, batch_size=27, sparsity_weight=10.0, first_score=1.0, learning_rate=0.05, retries=0
    )  # fmt: skip
    target, corpus = bc.ModelTarget(model), bc.Corpus.from_tokens(tokens, tokens)
    found = bc.find_subnetwork(model, target, corpus, config, check_memory="off").subnetwork
    assert found == circuit
    measured = bc.evaluate(model, found, target, tokens, seeds=1)
    assert measured.subnetwork.kl == pytest.approx(0, abs=1e-5)
    assert measured.subnetwork.top1_agreement == 1
    assert measured.empty.kl > 1
    assert measured.complement.kl > 1
    assert np.isnan(measured.subnetwork.mean_surprisal)  # its outputs are no tokens
    assert measured.used == 0
    assert "sufficient: 100.0% of the full model's gain" in measured.verdict


def test_every_weight_of_the_program_is_needed_and_no_other(compiled):
    model, circuit, _ = compiled
    tokens = tracr_tokens()
    whole, target = logits_of(model, tokens), bc.ModelTarget(model)
    np.testing.assert_allclose(logits_of(model, tokens, circuit), whole, atol=1e-6)
    for name in ("blocks.0.attn.W_Q", "blocks.0.attn.W_O", "blocks.0.mlp.W_in"):
        for place in circuit[name].nonzero()[::2].tolist():
            mask = circuit[name]
            mask[tuple(place)] = False
            without = bc.Subnetwork({**circuit, name: mask})
            assert bc.evaluate(model, without, target, tokens, controls=False).subnetwork.kl > 0.05, (name, place)


def test_ablations_of_the_program_do_what_it_says(compiled):
    model, _, weights = compiled
    tokens, full = tracr_tokens(), bc.Subnetwork.full(model)
    expected = numpy_logits(weights, tokens, causal=False, without={(0, 0)})
    np.testing.assert_allclose(logits_of(model, tokens, full.drop_head(0, 0)), expected, atol=1e-5)
    np.testing.assert_allclose(logits_of(model, tokens, full.drop_head(0, 1)), logits_of(model, tokens), atol=1e-6)
    scored = np.zeros(tokens.shape, dtype=bool)
    scored[:, LENGTH - 1] = True  # scored are outputs at the position before
    task = analysis.Task("upper case", tokens, scored, math.log(len(UPPER)), right=upper_case(tokens)[:, -2:-1])
    rises = analysis.ablate(model, ["L0H0", "L0H1", "L0.mlp", "L0N0", "L0N5"], tokens=task, seeds=0).get("rise_in_loss")
    assert min(rises["L0H0"], rises["L0.mlp"]) > 1
    assert rises["L0N0"] > 0.1  # the neuron of the letter a
    assert rises["L0H1"] == rises["L0N5"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="predicts no next token"):
        analysis.ablate(model, "heads", tokens=tokens)


# --- induction ---


@pytest.fixture(scope="module")
def inducing():
    return bc.load_model(induction_module())


@pytest.fixture(scope="module")
def task():
    """Repeated random tokens, of which those are scored that the circuit can predict."""
    tokens = repeated(32)
    scored = np.zeros(tokens.shape, dtype=bool)
    scored[:, PERIOD + 2 :] = True
    return analysis.Task("repeated tokens", tokens, scored, math.log(SYMBOLS))


def test_a_hand_written_induction_circuit_continues_what_was_repeated(inducing, task):
    found = logits_of(inducing, task.tokens)
    np.testing.assert_allclose(found, numpy_logits(induction_weights(), task.tokens), atol=1e-5)
    assert (found.argmax(-1)[:, :-1] == task.tokens[:, 1:])[task.scored[:, 1:]].all()
    assert analysis.ability(inducing, task).able
    broken = bc.load_model(induction_module(broken=True))
    assert not analysis.ability(broken, task).able
    with pytest.raises(ValueError, match="no neurons"):
        analysis.max_activating_tokens(inducing, [(0, 1)], task.tokens)


def test_exactly_the_heads_of_the_circuit_are_found(inducing):
    config = bc.SparsifyConfig(max_steps=80, batch_size=32, sparsity_weight=0.5, granularity="head")
    corpus = bc.Corpus.from_tokens(repeated(128), repeated(32, seed=1))
    found = bc.find_subnetwork(inducing, bc.ModelTarget(inducing), corpus, config, check_memory="off").subnetwork
    assert {head for head, count in found.by_head().items() if count.kept} == INDUCTION_HEADS
    with pytest.raises(ValueError, match=r"this model has no MLP, but granularity .* needs one"):
        bc.find_subnetwork(inducing, bc.ModelTarget(inducing), corpus, bc.SparsifyConfig(granularity="neuron"))


def test_ablating_heads_does_what_the_construction_says(inducing, task):
    full, weights = bc.Subnetwork.full(inducing), induction_weights()
    rises = analysis.ablate(inducing, "heads", tokens=task, seeds=0).get("rise_in_loss")
    assert set(rises) == {f"L{layer}H{head}" for layer, head in HEADS}
    for layer, head in HEADS:
        alone = {(layer, head)}
        dropped = logits_of(inducing, task.tokens, full.drop_head(layer, head))
        np.testing.assert_allclose(dropped, numpy_logits(weights, task.tokens, without=alone), atol=1e-5)
        if alone <= INDUCTION_HEADS:
            assert rises[f"L{layer}H{head}"] > 1
        else:
            assert rises[f"L{layer}H{head}"] == pytest.approx(0, abs=1e-6)
    kept = bc.Subnetwork.full(inducing).only(heads=INDUCTION_HEADS)
    np.testing.assert_allclose(logits_of(inducing, task.tokens, kept), logits_of(inducing, task.tokens), atol=1e-5)


def test_its_patterns_are_those_of_the_two_heads(inducing):
    prompt = torch.from_numpy(repeated(1)[0])
    found = analysis.attention_patterns(inducing, prompt=prompt, heads=sorted(INDUCTION_HEADS))
    before, induced = found.get("attention", "full L0H1"), found.get("attention", "full L1H2")
    np.testing.assert_allclose(np.diagonal(before, -1), 1, atol=1e-5)
    again = np.arange(PERIOD + 1, CONTEXT)
    np.testing.assert_allclose(induced[again, again - PERIOD + 1], 1, atol=1e-5)
