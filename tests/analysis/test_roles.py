"""What neurons and heads do, and whether explanations predict it: against plain removals, one at a time."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits import analysis
from bigram_circuits.analysis.atlas import atlas_of_task
from bigram_circuits.analysis.neurons import _used
from bigram_circuits.analysis.prompts import start_of_text, token_words
from bigram_circuits.masking.apply import masked
from tests.conftest import D_VOCAB

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = np.random.default_rng(0).integers(0, 40, (8, 12))
TARGET = bc.count_ngrams(TEXT, d_vocab=D_VOCAB)


@pytest.fixture(scope="module")
def planted():
    return bc.plant_bigram("gpt2", d_vocab=12, successors=3, distractors=0.3)


def half(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = bc.Subnetwork.full(model).shapes
    return bc.Subnetwork({name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()})


def frequent(model, most):
    """The most frequent tokens of the text, but for what every text begins with, and their counts."""
    counts = np.bincount(TEXT.ravel(), minlength=D_VOCAB)
    counts[start_of_text(model)] = 0
    tokens = np.argsort(-counts, kind="stable")[:most].tolist()
    return tokens, counts[tokens].tolist()


def without(model, layer, neuron):
    """A hook that removes a neuron."""
    return [(f"blocks.{layer}.mlp.hook_post", lambda value, hook: value.index_fill(-1, torch.tensor([neuron]), 0.0))]


# --- does the picture predict? ---


def test_what_is_measured_is_the_fall_of_the_logit_without_the_neuron(any_model):
    kept = half(any_model)
    found = analysis.predicted_effects(any_model, kept, TEXT, tokens=2, neurons=5)
    assert found.quantities[2].name == found.against == "measured"
    tokens, _ = frequent(any_model, 2)
    rows = dict(zip(found.names, found.values.T, strict=True))
    assert len(rows) == found.notes["pairs"] == 10
    for token, names in zip(tokens, (list(rows)[:5], list(rows)[5:]), strict=True):
        prompt = torch.tensor([[*start_of_text(any_model), token]])
        explanation = bc.explain(any_model, kept, prompt, nodes=200)
        with torch.no_grad(), masked(any_model, kept):
            before = any_model(prompt)[0, -1]
            answer = int(before.argmax())
            for name in names:
                layer, neuron = map(int, name.split(" after ")[0][1:].split("N"))
                after = any_model.run_with_hooks(prompt, fwd_hooks=without(any_model, layer, neuron))[0, -1]
                direct, flow, measured = rows[name]
                assert measured == pytest.approx(float(before[answer] - after[answer]), abs=1e-5)
                node = next(
                    one
                    for one in explanation.nodes
                    if one.label == f"L{layer}N{neuron}" and one.position == prompt.shape[1] - 1
                )
                assert direct == pytest.approx(node.direct, abs=1e-5)
                if prompt.shape[1] == 1:
                    assert flow == pytest.approx(node.flow, abs=1e-5)


def test_slope_and_r_are_those_of_all_pairs(any_model):
    found = analysis.predicted_effects(any_model, TEXT, tokens=4)
    direct, flow, measured = found.values
    for name, x in (("direct", direct), ("flow", flow)):
        slope, _ = np.polyfit(x, measured, 1)
        assert found.notes[name]["slope"] == pytest.approx(slope, rel=1e-6)
        assert found.notes[name]["r"] == pytest.approx(np.corrcoef(x, measured)[0, 1], rel=1e-6)
        low, high = found.notes[name]["r_interval"]
        assert low <= found.notes[name]["r"] <= high


def test_in_a_planted_circuit_the_picture_predicts_exactly(planted):
    found = analysis.predicted_effects(planted.model, planted.circuit, planted.corpus, tokens=12)
    assert found.notes["direct"]["r"] > 0.999
    assert found.notes["direct"]["slope"] == pytest.approx(1, abs=0.1)
    figure = found.plot("direct")
    assert len(figure.data[1].x) == len(found.names)


# --- which neurons serve which tokens ---


def test_in_a_planted_circuit_every_token_has_its_neuron(planted):
    n = 12 - len(start_of_text(planted.model))
    found = analysis.neuron_map(planted.model, planted.circuit, planted.corpus, tokens=12, neurons=n)
    values = found.get("flow", "subnetwork")
    assert values.shape == (n, n)
    words = token_words(planted.model, range(12))
    for row, name in enumerate(found.rows):
        column = int(np.abs(values[row]).argmax())
        assert found.columns[column].startswith(f"{words[int(name.removeprefix('L0N'))]} → ")
        assert np.abs(np.delete(values[row], column)).max() < 1e-3 * values[row, column]
    assert found.notes["share_shown"] == pytest.approx(1, abs=1e-3)


def test_the_map_has_the_flows_of_explanations(any_model):
    kept = half(any_model)
    found = analysis.neuron_map(any_model, kept, TEXT, tokens=3, neurons=4)
    for token in frequent(any_model, 3)[0]:
        prompt = [*start_of_text(any_model), token]
        explanation = bc.explain(any_model, kept, prompt, nodes=300)
        word, answer = explanation.prompt[-1], explanation.predictions[0][0]
        column = found.columns.index(f"{word} → {answer}")
        for row, name in enumerate(found.rows):
            flow = sum(node.flow for node in explanation.nodes if node.label == name)
            assert found.get("flow", "subnetwork")[row, column] == pytest.approx(flow, abs=1e-5)


def test_a_planted_token_uses_one_neuron(planted):
    found = analysis.neurons_used(planted.model, planted.circuit, planted.corpus, tokens=12)
    assert found.names == ("full", "subnetwork", "complement", "random")
    for quantity in ("for_half", "for_90_percent", "effective"):
        assert found.get(quantity)["subnetwork"] == pytest.approx(1, abs=1e-3)
        assert found.get(quantity)["full"] > 1.5


def test_how_many_are_used_by_hand():
    flows = np.array([[4.0, -3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 5.0, 0.0, 0.0], [0.0] * 5])
    np.testing.assert_allclose(_used(flows), [[2, 3, 100 / 30], [1, 1, 1], [0, 0, 0]])


# --- what is lost without each ---


def test_what_is_lost_is_the_rise_of_the_cross_entropy(any_model):
    kept = half(any_model)
    found = analysis.unit_effects(any_model, kept, TARGET, TEXT, most=6)
    tokens = torch.from_numpy(TEXT)
    probs = TARGET.log_probs(tokens).exp()

    def cross_entropy(hooks=()):
        logits = any_model.run_with_hooks(tokens, fwd_hooks=list(hooks))
        return float(-(probs * logits.log_softmax(-1)).nan_to_num(0).sum(-1).mean())

    mean = probs.reshape(-1, D_VOCAB).mean(0)
    told = float(torch.special.entr(mean).sum() - torch.special.entr(probs).sum(-1).mean())
    assert found.notes["information"] == pytest.approx(told, rel=1e-4)
    with torch.no_grad(), masked(any_model, kept):
        before = cross_entropy()
        for label, rise in found.get("rise").items():
            layer, index = map(int, label[1:].replace("H", "N").split("N"))
            hooks = without(any_model, layer, index)
            if "H" in label:
                hooks = [
                    (f"blocks.{layer}.attn.hook_z", lambda z, hook, i=index: z.index_fill(2, torch.tensor([i]), 0.0))
                ]
            assert rise == pytest.approx(cross_entropy(hooks) - before, abs=1e-5), label
            assert found.get("lost")[label] == pytest.approx(rise / told, rel=1e-6)
    values = list(found.get("rise").values())
    assert values == sorted(values, reverse=True)
    assert (found.low[0] <= found.values[0] + 1e-9).all()
    assert set(found.notes["units"]) == set(found.names)


def test_only_what_is_kept_is_removed(any_model):
    kept = bc.Subnetwork.empty(any_model).add_head(1, 2).add_neurons(0, [3, 4])
    found = analysis.unit_effects(any_model, kept, TARGET, TEXT)
    assert set(found.names) == {"L1H2", "L0N3", "L0N4"}
    circuit = bc.Circuit.empty(any_model, ("head", "neuron")).keep("L0H1", "L1N7")
    found = analysis.unit_effects(any_model, circuit, TARGET, TEXT)
    assert set(found.names) == {"L0H1", "L1N7"}
    with pytest.raises(ValueError, match="nothing of any neuron or head is kept"):
        analysis.unit_effects(any_model, bc.Subnetwork.empty(any_model), TARGET, TEXT)


# --- atlases ---


def test_an_atlas_explains_the_most_frequent_tokens(any_model, tmp_path):
    kept = half(any_model)
    found = bc.atlas(any_model, kept, TEXT, tokens=5)
    tokens, counts = frequent(any_model, 5)
    assert list(found.counts) == counts
    alone = bc.explain(any_model, kept, [*start_of_text(any_model), tokens[0]])
    first = found.explanations[0]
    assert (first.prompt, first.answer) == (alone.prompt, alone.answer)
    assert first.value == pytest.approx(alone.value, abs=1e-6)
    path, other = first.paths[0], alone.paths[0]  # of a batch and of one prompt: equal up to rounding
    assert replace(path, value=0.0) == replace(other, value=0.0)
    assert path.value == pytest.approx(other.value, abs=1e-5)
    labels = {node.label for one in found.explanations for node in one.nodes if node.kind in ("neuron", "head")}
    assert set(found.units) == labels
    found.save(tmp_path / "atlas.json")
    assert bc.load_atlas(tmp_path / "atlas.json") == found


def test_the_atlas_of_a_task_explains_its_answers(tiny_model):
    task = analysis.repeated_random_tokens(tiny_model, prompts=3, period=4)
    found = atlas_of_task(tiny_model, None, task, 2)
    assert len(found.explanations) == 2
    place = int(task.scored[0].argmax())
    with torch.no_grad():
        logits = tiny_model(torch.from_numpy(task.tokens[:1, :place].astype(np.int64)))[0, -1]
    assert found.explanations[0].value == pytest.approx(float(logits[task.tokens[0, place]]), abs=1e-5)
    assert math.fsum(path.value for path in found.explanations[0].paths) + found.explanations[0].left_out == (
        pytest.approx(found.explanations[0].value, abs=1e-5)
    )
