"""Planted circuits that use attention do what they say, to the bound that they say, and no smaller circuit does."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

import bigram_circuits as bc
from bigram_circuits.planted.attention import KINDS

pytestmark = pytest.mark.usefixtures("one_thread", "no_forecast")
ROUNDING = 2e-5


@cache
def made(kind, **options):
    return bc.plant_attention(kind, **options)


def text_of(planted, sequences=16):
    return np.asarray(planted.corpus.held_out[:sequences]).astype(np.int64)


def deviation(planted, kept=None, sequences=16):
    """The largest deviation from the ideal of what a mask computes, in nats, where the behaviour is defined."""
    tokens = torch.from_numpy(text_of(planted, sequences))
    ideal = planted.ideal(tokens)
    with torch.no_grad():
        if kept is None:
            logits = planted.model(tokens)
        else:
            with bc.masked(planted.model, kept):
                logits = planted.model(tokens)
    found = (logits.double().log_softmax(-1) - ideal).abs()
    return found[~ideal.isnan()].max().item()


# --- the same in NumPy, edge by edge ---


def gelu(x):
    """The approximation by a tanh, which GPT-2 uses."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def computed(planted, edges):
    """Log-probabilities when each part reads what the given edges bring it, and all biases; float64, by hand."""
    weights = {
        name.replace("_original_component.", "").removeprefix("transformer."): one.detach().double().numpy()
        for name, one in planted.model.named_parameters()
    }
    heads, tokens = 4, text_of(planted)
    d_model = weights["wte.weight"].shape[1]
    d_head, length = d_model // heads, tokens.shape[1]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    written = {"embed": weights["wte.weight"][tokens] + weights["wpe.weight"][:length]}
    biases = np.zeros(d_model)

    def read(reader, name):
        arriving = [value for writer, value in written.items() if f"{writer}->{reader}" in edges]
        return norm(sum(arriving, np.zeros((*tokens.shape, d_model))) + biases, name)

    for layer in range(2):
        into, out = weights[f"h.{layer}.attn.qkv.weight"], weights[f"h.{layer}.attn.o.weight"]
        new = {}
        for head in range(heads):
            parts = {}
            for place, part in enumerate("qkv"):
                columns = slice(place * d_model + head * d_head, place * d_model + (head + 1) * d_head)
                parts[part] = read(f"L{layer}H{head}.{part}", f"h.{layer}.ln_1") @ into[:, columns]
            scores = parts["q"] @ parts["k"].transpose(0, 2, 1) / np.sqrt(d_head)
            scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
            mixed = softmax(scores, axis=-1) @ parts["v"]
            new[f"L{layer}H{head}"] = mixed @ out[head * d_head : (head + 1) * d_head]
        written |= new
        biases = biases + weights[f"h.{layer}.attn.o.bias"]
        inside = read(f"L{layer}.mlp", f"h.{layer}.ln_2") @ weights[f"h.{layer}.mlp.c_fc.weight"]
        inside = gelu(inside + weights[f"h.{layer}.mlp.c_fc.bias"])
        written[f"L{layer}.mlp"] = inside @ weights[f"h.{layer}.mlp.c_proj.weight"]
        biases = biases + weights[f"h.{layer}.mlp.c_proj.bias"]
    return log_softmax(read("logits", "ln_f") @ weights["lm_head.weight"].T, axis=-1)


class Everything:
    def __contains__(self, edge):
        return True


def deviation_by_hand(planted, edges):
    ideal = planted.ideal(torch.from_numpy(text_of(planted))).numpy()
    return np.nanmax(np.abs(computed(planted, edges) - ideal))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {"sharpness": sharpness, "n_layers": 2}) for kind in KINDS for sharpness in (7, 14)),
        ("previous_token", {"length": 40, "d_vocab": 6}), ("trigram", {"length": 6, "d_vocab": 5, "seed": 3}),
        ("induction", {"length": 31, "d_vocab": 24, "seed": 5}),
    ],
)  # fmt: skip
def test_the_bound_holds_and_is_not_much_too_large(kind, options):
    planted = made(kind, distractors=0, **options)
    worst = deviation_by_hand(planted, Everything())
    assert worst <= planted.bound + 1e-6  # the weights are float32
    assert planted.bound < 200 * worst


@pytest.mark.parametrize("kind", KINDS)
def test_with_distractors_the_planted_weights_and_nodes_alone_are_as_exact_and_the_full_model_is_not(kind):
    planted = made(kind)
    for kept in (planted.circuit, planted.nodes):
        assert deviation(planted, kept, 64) <= planted.bound + ROUNDING
    assert planted.bound < 1e-3
    assert deviation(planted) > 1
    random = planted.circuit.random_like(seed=0)
    assert deviation(planted, random) > 1
    noisy = made(kind, inside=True)
    assert deviation(noisy, noisy.circuit, 64) <= noisy.bound + ROUNDING
    assert deviation(noisy, noisy.nodes) > 10 * deviation(noisy, noisy.circuit)


@pytest.mark.parametrize("kind", KINDS)
def test_every_planted_node_is_needed_and_every_planted_weight(kind):
    planted = made(kind)
    for label in planted.nodes.nodes[:: 1 if kind != "trigram" else 8]:
        assert deviation(planted, planted.nodes.drop(label), 64) > 2
    for name, mask in planted.circuit.items():
        for place in mask.nonzero()[:: max(1, int(mask.sum()) // 3)].tolist():
            one = {key: torch.zeros(shape, dtype=torch.bool) for key, shape in planted.circuit.shapes.items()}
            one[name][tuple(place)] = True
            assert deviation(planted, planted.circuit - bc.Subnetwork(one), 48) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_planted_edges_are_enough_and_each_is_needed(kind):
    planted = made(kind, distractors=0)  # an MLP is read whole, with its neurons that are not planted
    assert deviation_by_hand(planted, planted.edges) < (0.15 if kind == "induction" else 0.01)
    for edge in planted.edges:
        assert deviation_by_hand(planted, set(planted.edges) - {edge}) > 3
    if kind != "trigram":
        noisy = made(kind)
        assert deviation_by_hand(noisy, noisy.edges) == pytest.approx(deviation_by_hand(planted, planted.edges))


def test_the_ideal_is_what_it_says():
    planted = made("trigram")
    table = planted.after.numpy()
    np.testing.assert_allclose(table.mean(0), 1 / 8)  # neither token alone says anything
    np.testing.assert_allclose(table.mean(1), 1 / 8)
    tokens = text_of(planted)
    rows = planted.ideal(torch.from_numpy(tokens)).exp().numpy()
    np.testing.assert_allclose(rows[:, 1:], table[tokens[:, :-1], tokens[:, 1:]])
    np.testing.assert_allclose(rows, planted.target.log_probs(tokens).exp(), rtol=1e-5)
    planted = made("previous_token")
    rows = planted.ideal(torch.from_numpy(text_of(planted))).numpy()
    assert (rows[:, 1:-1].argmax(-1) == text_of(planted)[:, 2:]).all()
    np.testing.assert_allclose(np.exp(rows).sum(-1), 1)
    planted = made("induction")
    task, rows = planted.task, planted.ideal(torch.from_numpy(text_of(planted))).numpy()
    places = planted.target.task_of(text_of(planted)).scored[:, 1:]
    assert (rows[:, :-1][places].argmax(-1) == text_of(planted)[:, 1:][places]).all()
    assert np.isnan(rows[:, : task.tokens.shape[1] // 2]).all()


def test_nodes_are_found_again_by_what_they_are():
    planted = made("induction")
    assert planted.nodes.nodes == ("L0H1", "L1H2")
    assert set(planted.edges) >= {"L0H1->L1H2.k", "L1H2->logits"}
    assert planted.nodes.weights(planted.model) & planted.circuit == planted.circuit
    assert planted.recovery(planted.circuit) == planted.node_recovery(planted.nodes) == (1, 1)
    assert planted.edge_recovery(planted.edges) == (1, 1)
    assert planted.edge_recovery(["L0H1->L1H2.k", "L0H0->L1H2.k"]) == (1 / 2, 1 / len(planted.edges))
    assert planted.node_recovery(bc.Circuit.full(planted.model)) == (2 / planted.nodes.total, 1)
    assert np.isnan(planted.node_recovery(bc.Circuit.empty(planted.model))[0])
    assert planted.recovery(bc.Subnetwork.full(planted.model)) == (planted.circuit.fraction, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_on_nodes_find_them(kind):
    """Sigmoids on what heads and neurons write, learned by hand."""
    planted, rng = made(kind), np.random.default_rng(0)
    scores = {name: torch.ones(shape, requires_grad=True) for name, shape in planted.nodes.shapes.items()}
    optimizer = torch.optim.Adam(scores.values(), lr=0.15)
    price = 0.004 if kind == "trigram" else 0.2

    def gating(name, beta):
        return lambda value, hook: value * torch.sigmoid(beta * scores[name])[(..., *[None] * (value.ndim - 3))]

    for step in range(60):
        tokens = np.asarray(planted.corpus.train)[rng.integers(0, len(planted.corpus.train), 24)]
        tokens, beta = torch.from_numpy(tokens.astype(np.int64)), 10 ** (step / 30)
        logits = planted.model.run_with_hooks(tokens, fwd_hooks=[(name, gating(name, beta)) for name in scores])
        cost = price * sum(torch.sigmoid(beta * one).sum() for one in scores.values())
        loss = planted.target.cross_entropy(logits, tokens).mean() + cost
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = bc.Circuit({name: one.detach() > 0 for name, one in scores.items()})
    assert min(planted.node_recovery(found)) >= 0.95


def test_seeds_and_folders(tmp_path):
    planted = made("trigram")
    again = bc.plant_attention("trigram", folder=tmp_path / "model")
    other = bc.plant_attention("trigram", seed=1)
    assert again.circuit == planted.circuit
    assert bc.weight_hash(again.model) == bc.weight_hash(planted.model) != bc.weight_hash(other.model)
    assert not torch.equal(other.after, planted.after)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("copying", {}, "kind must be one of previous_token, trigram, induction"),
        ("trigram", {"d_vocab": 4}, "d_vocab must be at least 5"), ("trigram", {"length": 5}, "from 6 to 64"),
        ("trigram", {"n_layers": 0}, "n_layers must be at least 1"), ("induction", {"n_layers": 1}, "at least 2"),
        ("induction", {"length": 14}, "length must be odd, and at most 2 . d_vocab - 1 = 23"),
        ("trigram", {"sharpness": 0}, "a number above 0"), ("trigram", {"distractors": -1}, "at least 0"),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(kind, options, words):
    with pytest.raises(ValueError, match=words):
        bc.plant_attention(kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_in_closed_models_heads_and_neurons_that_are_not_planted_change_nothing(kind):
    """Up to the mean that a LayerNorm subtracts, which moves a little."""
    planted = made(kind, closed=True)
    assert deviation(planted, planted.circuit) < planted.bound + ROUNDING
    assert deviation(planted) < 0.1
    assert deviation(planted, planted.nodes | planted.nodes.random_like(0) | (~planted.nodes).random_like(1)) < 0.1
    assert deviation(planted, planted.nodes.drop("L0H1")) > 1


def test_planted_parts_of_closed_models_have_no_distractors():
    with pytest.raises(ValueError, match="inside and closed exclude each other"):
        bc.plant_attention("induction", closed=True, inside=True)
