"""Worst-case ablation: its gradients, its ascent and its numbers are those of plain PyTorch; what is planted holds."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits.evaluation import own_behaviour
from bigram_circuits.experiments.worst_case import SHUFFLED, SIGNS, WORST, worst_case_words
from bigram_circuits.masking.apply import gate_values, opened
from tests.conftest import D_VOCAB, planted_circuit

pytestmark = pytest.mark.usefixtures("one_thread", "no_forecast")
TEXT = np.random.default_rng(0).integers(0, D_VOCAB, (8, 12))
CLOSED = {"d_vocab": 8, "successors": 1, "closed": True, "logits": (4.5, 4.5)}


@pytest.fixture(scope="module")
def model(tiny_folders):
    return bc.load_model(tiny_folders["gpt2"], device="cpu")


@pytest.fixture(scope="module")
def plain(tiny_folders):
    return AutoModelForCausalLM.from_pretrained(tiny_folders["gpt2"], attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def masks(model):
    draw = torch.Generator().manual_seed(1)
    half = {name: torch.rand(shape, generator=draw) < 0.5 for name, shape in bc.Subnetwork.full(model).shapes.items()}
    return {
        "weight": bc.Subnetwork(half),
        "node": bc.Circuit.empty(model).keep("L0H1", "L1H2", "L0N3", "L1N5"),
        "edge": bc.Circuit.full(model, "edge").drop(
            "L0H1->L1H2.k", "embed->L0.mlp", "L0.mlp->L1H0.q", "L1.mlp->logits"
        ),
    }


@pytest.mark.parametrize("unit", ["weight", "node", "edge"])
def test_gradients_of_gates_are_those_of_finite_differences(tiny_folders, masks, unit):
    """In float64."""
    model = bc.load_model(tiny_folders["gpt2"], device="cpu").double()
    mask, tokens = masks[unit], torch.from_numpy(TEXT[:4])
    gates = gate_values(model, mask)
    name, dropped = next((name, gate == 0) for name, gate in gates.items() if not gate.all())
    draw = torch.Generator().manual_seed(0)
    for gate in gates.values():
        gate.copy_(torch.where(gate == 0, 0.2 + 0.6 * torch.rand(gate.shape, generator=draw), gate)).requires_grad_(
            True
        )

    def loss():
        return -model(tokens).log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None]).mean()

    with opened(model, mask, gates):
        gradient = torch.autograd.grad(loss(), [gates[name]])[0]
        place = int((gradient.abs() * dropped).argmax())
        with torch.no_grad():
            ends = []
            for shift in (1e-3, -2e-3):
                gates[name].view(-1)[place] += shift
                ends.append(loss().item())
    assert gradient.flatten()[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-3)


def test_the_ascent_is_that_of_plain_pytorch(model, plain, masks):
    """Two steps from the mask, with Hugging Face's model and multiplied weights."""
    mask, train, held_out = masks["weight"], TEXT[:4], torch.from_numpy(TEXT[4:])
    corpus = bc.Corpus.from_tokens(train, TEXT[4:])
    curves = bc.worst_case_ablation(
        model, mask, bc.ModelTarget(model), corpus, (0, 1, 2), 1, step=0.3, batch_size=4, force=True
    )
    stored = {}  # as Hugging Face stores them, with 1 for what is never masked
    for layer in range(2):
        at, into = f"transformer.h.{layer}.", f"blocks.{layer}."
        heads = [mask[f"{into}attn.W_{letter}"].permute(1, 0, 2).flatten(1) for letter in "QKV"]
        stored[at + "attn.c_attn.weight"] = torch.cat(heads, 1)
        stored[at + "attn.c_proj.weight"] = mask[into + "attn.W_O"].flatten(0, 1)
        stored[at + "mlp.c_fc.weight"] = mask[into + "mlp.W_in"]
        stored[at + "mlp.c_proj.weight"] = mask[into + "mlp.W_out"]
    gates = {name: kept.float().requires_grad_(True) for name, kept in stored.items()}
    weights = dict(plain.named_parameters())

    def losses(tokens):
        with torch.no_grad():
            wanted = plain(tokens).logits.log_softmax(-1)
        changed = {name: weights[name].detach() * gate for name, gate in gates.items()}
        found = functional_call(plain, changed, (tokens,)).logits.log_softmax(-1)
        return -(wanted.exp() * found).sum(-1), (wanted.exp() * (wanted - found)).sum(-1)

    for steps in range(3):
        if steps:
            found = torch.autograd.grad(losses(torch.from_numpy(train))[0].mean(), list(gates.values()))
            with torch.no_grad():
                for (name, gate), gradient in zip(gates.items(), found, strict=True):
                    gate.copy_((gate + 0.3 * gradient.sign() * ~stored[name]).clamp(0, 1))
        with torch.no_grad():
            loss, kl = (one.double().mean().item() for one in losses(held_out))
        dropped = torch.cat([gate[~stored[name]] for name, gate in gates.items()])
        assert curves.get("cross_entropy", WORST)[steps] == pytest.approx(loss, abs=2e-5)
        assert curves.get("kl", WORST)[steps] == pytest.approx(kl, abs=2e-5)
        assert curves.get("mean_gate", WORST)[steps] == pytest.approx(dropped.mean().item(), abs=1e-3)
    assert curves.get("cross_entropy", WORST)[2] > curves.get("cross_entropy", WORST)[0] + 0.01


@pytest.mark.parametrize("unit", ["weight", "node", "edge"])
def test_without_steps_it_is_the_mask_and_the_model_is_left_as_it_was(model, masks, unit):
    before, own = {name: tensor.clone() for name, tensor in model.state_dict().items()}, bc.ModelTarget(model)
    curves = bc.worst_case_ablation(model, masks[unit], own, TEXT, (0, 1), 2, force=True)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    evaluation = bc.evaluate(model, masks[unit], own, TEXT[1::2], controls=False)
    for name in ("kl", "cross_entropy", "surprisal_correlation"):
        for condition in (WORST, SIGNS, SHUFFLED):
            assert curves.get(name, condition)[0] == pytest.approx(getattr(evaluation.subnetwork, name), abs=1e-6)
    low, high = curves.interval("cross_entropy", WORST)
    assert (low[0], high[0]) == pytest.approx(evaluation.interval("subnetwork", "cross_entropy"))
    assert curves.get("mean_gate", WORST)[0] == 0
    assert curves.get("cross_entropy", WORST)[1] > curves.get("cross_entropy", SIGNS)[1]
    assert curves.get("mean_gate", SHUFFLED)[1] == pytest.approx(curves.get("mean_gate", WORST)[1], abs=1e-6)
    assert bc.worst_case_ablation(model, masks[unit], own, TEXT, (0, 1), 2, force=True).to_json() == curves.to_json()


def test_a_corpus_is_split_in_its_own_way(model, masks):
    own, mask = bc.ModelTarget(model), masks["node"]
    array = bc.worst_case_ablation(model, mask, own, TEXT, (1,), 1, force=True)
    corpus = bc.Corpus.from_tokens(TEXT[::2], TEXT[1::2])
    assert bc.worst_case_ablation(model, mask, own, corpus, (1,), 1, force=True).to_json() == array.to_json()


def test_more_starts_and_more_steps_find_no_less(model, masks):
    """On the text of the ascent itself, up to what differs between a batch and the whole."""
    corpus = bc.Corpus.from_tokens(TEXT, TEXT[::-1])
    found = [
        bc.worst_case_ablation(model, masks["weight"], bc.ModelTarget(model), corpus, (1, 3), starts, force=True)
        for starts in (1, 2)
    ]
    one, two = (curves.get("cross_entropy", WORST) for curves in found)
    assert (two >= one - 1e-6).all()
    assert (np.diff(one) > 0).all()


def test_planted_circuits_hold_and_with_a_weight_missing_they_do_not():
    planted = planted_circuit("gpt2", **CLOSED)
    known = planted.model, planted.target, replace(planted.corpus, held_out=planted.corpus.held_out[:16])
    flat = bc.worst_case_ablation(known[0], planted.circuit, *known[1:], (0, 2, 6), 2)
    assert flat.get("kl", WORST).max() < 1e-3
    assert flat.get("mean_gate", WORST)[-1] > 0.1
    assert "Nothing that was dropped does harm, as far as 6 steps" in worst_case_words(flat)
    name, at = "blocks.0.mlp.W_in", planted.circuit["blocks.0.mlp.W_in"].nonzero()[3]
    masks = dict(planted.circuit.items())
    masks[name][tuple(at)] = False
    broken = bc.worst_case_ablation(known[0], bc.Subnetwork(masks), *known[1:], (0, 2), 1)
    assert (broken.get("kl", WORST) > 0.1).all()


def test_a_behaviour_that_is_not_the_models_own_is_refused_unless_forced():
    planted = planted_circuit("gpt2", d_vocab=8, distractors=1.0)
    known = planted.model, planted.circuit, planted.target, planted.corpus.held_out[:16]
    with pytest.raises(
        ValueError, match=r"does something else than the target: over the empty mask it gains -?\d"
    ) as e:
        bc.worst_case_ablation(*known, (0, 1), 1)
    assert "force=True" in str(e.value)
    assert "\n" not in str(e.value)
    assert bc.worst_case_ablation(*known, (0, 1), 1, force=True).notes["forced"]


def test_the_rule_for_own_behaviour():
    assert own_behaviour(full=1.09, mask=1.0, empty=2.0) is None
    assert "gains 0.890 nats of cross-entropy, and the mask 1.000" in str(own_behaviour(full=1.11, mask=1.0, empty=2.0))
    assert own_behaviour(full=1.0, mask=2.5, empty=2.0) is None


def test_the_empty_mask_has_nothing_to_lose_and_the_full_one_nothing_to_open(model):
    own = bc.ModelTarget(model)
    curves = bc.worst_case_ablation(model, bc.Subnetwork.empty(model), own, TEXT, (0, 1), 1)
    assert curves.get("cross_entropy", WORST)[0] == curves.notes["cross_entropy"]["empty"]
    with pytest.raises(ValueError, match=r"keeps all \d+,\d+ weights: there is nothing to open"):
        bc.worst_case_ablation(model, bc.Subnetwork.full(model), own, TEXT)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budgets": ()}, "budgets must be numbers of steps, 0 or more, not ()"),
        ({"budgets": (0, -1)}, "budgets must be numbers of steps, 0 or more, not (0, -1)"),
        ({"starts": 0}, "starts must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"step": 0}, "step must be above 0 and at most 1, not 0"),
        ({"step": math.nan}, "step must be above 0 and at most 1, not nan"),
        ({"seed": -1}, "a seed must be a whole number, 0 or more, not -1"),
        ({"tokens": TEXT[:1]}, "1 sequence is given, but the ascent needs others than the measurement"),
        ({"tokens": TEXT + D_VOCAB}, "token ids must be 0 to 256 for this model"),
        ({"tokens": bc.Corpus.from_tokens(TEXT[:0], TEXT)}, "tokens have shape (0, 12)"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(model, masks, options, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        bc.worst_case_ablation(model, masks["node"], bc.NextTokenTarget(), **({"tokens": TEXT} | options))
    assert "\n" not in str(error.value)


def curves_of(shares, told=True, replaced="zero"):
    planted = planted_circuit("gpt2", **CLOSED)
    tokens = planted.corpus.held_out[:4]
    made = bc.worst_case_ablation(planted.model, planted.circuit, planted.target, tokens, (0,), 1)
    values = np.full((5, 3, len(shares)), math.nan)
    values[0] = [share if told else math.nan for share in shares.values()]
    values[2] = [2 - share for share in shares.values()]
    notes = dict(made.notes) | {"cross_entropy": {"empty": 2.0, "full": 1.0, "mask": 1.0}, "replace": replaced}
    return replace(made, points=tuple(shares), values=values, low=values, high=values, notes=notes)


@pytest.mark.parametrize(
    ("shares", "options", "says"),
    [
        (
            {0: 0.8, 20: 0.76, 80: 0.74},
            {},
            "Nothing that was dropped does harm, as far as 80 steps of ascent can tell.",
        ),
        ({0: 1.0, 20: 0.95, 80: 0.3}, {}, "as far as 20 steps of ascent can tell; 80 steps find values that do."),
        ({0: 1.0, 20: 0.7, 80: 0.3}, {}, "Some of what was dropped matters"),
        ({0: 0.5, 20: 0.2}, {}, "What was dropped matters: the mask is only sufficient with the rest exactly at zero."),
        ({0: 0.5, 4: 0.2}, {"replaced": "mean"}, "with the rest exactly at what replaces it."),
        ({0: 1.0, 4: 0.25}, {"told": False}, "own gain in cross-entropy over the empty mask, 25.0% is left after 4"),
        ({0: 0.0, 4: -0.2}, {}, "undefined"),
    ],
)
def test_the_words_follow_from_the_shares(shares, options, says):
    assert says in worst_case_words(curves_of(shares, **options))


def test_words_need_the_mask_itself():
    with pytest.raises(ValueError, match="no curves of worst_case_ablation with budget 0 and another"):
        worst_case_words(curves_of({0: 1.0}))
