import itertools
import math

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.capacity import MaskCapacity, mask_bits

D_MODEL, D_MLP, HEADS, D_HEAD = 6, 40, 4, 3


def masks(groups=HEADS, layers=1):
    shapes = {
        "attn.W_Q": (HEADS, D_MODEL, D_HEAD), "attn.W_K": (groups, D_MODEL, D_HEAD),
        "attn.W_V": (groups, D_MODEL, D_HEAD), "attn.W_O": (HEADS, D_HEAD, D_MODEL),
        "mlp.W_in": (D_MODEL, D_MLP), "mlp.W_gate": (D_MODEL, D_MLP), "mlp.W_out": (D_MLP, D_MODEL),
    }  # fmt: skip
    return {
        f"blocks.{layer}.{name}": torch.zeros(shape, dtype=torch.bool)
        for layer, (name, shape) in itertools.product(range(layers), shapes.items())
    }


def choice(n, k):
    """log2 of C(n, k), and of the n + 1 values of k, from integers."""
    return math.log2(math.comb(n, k)) + math.log2(n + 1)


def test_weights_are_priced_matrix_by_matrix():
    rng, given = np.random.default_rng(0), masks(layers=2)
    given = {name: torch.from_numpy(rng.random(tuple(mask.shape)) < 0.4) for name, mask in given.items()}
    expected = sum(choice(mask.numel(), int(mask.sum())) for mask in given.values())
    assert mask_bits(bc.Subnetwork(given)) == pytest.approx(expected + 4)  # a bit for each attention and MLP


def test_a_single_weight():
    given = masks()
    given["blocks.0.mlp.W_in"][2, 7] = True
    # the neuron of the 40, its weight of the 6 in W_in, none of the 6 in W_gate and W_out; nothing in the heads
    neuron = choice(D_MLP, 1) + choice(D_MODEL, 1) + 2 * choice(D_MODEL, 0)
    assert mask_bits(bc.Subnetwork(given)) == pytest.approx(1 + neuron + 1 + choice(HEADS, 0))
    alone = {"blocks.0.mlp.W_out": torch.zeros(1, 64, dtype=torch.bool)}
    alone["blocks.0.mlp.W_out"][0, 5] = True
    assert mask_bits(bc.Subnetwork(alone)) == pytest.approx(1 + math.log2(64) + math.log2(65))


def test_whole_neurons_are_priced_as_neurons():
    neurons = bc.Subnetwork(masks()).add_neurons(0, range(7, 19))
    ends = sum(math.log2(12 * D_MODEL + 1) for _ in range(3))  # that all weights of the 12 are kept, in each matrix
    assert mask_bits(neurons) == pytest.approx(1 + choice(D_MLP, 12) + ends + 1 + choice(HEADS, 0))
    large = bc.Subnetwork({
        "blocks.0.mlp.W_in": torch.zeros(64, 4096, dtype=torch.bool),
        "blocks.0.mlp.W_out": torch.zeros(4096, 64, dtype=torch.bool),
    })  # fmt: skip
    kept = large.add_neurons(0, np.random.default_rng(0).choice(4096, 300, replace=False).tolist())
    assert 1500 < mask_bits(kept) < 1650
    assert mask_bits(kept.random_like()) > 100_000


@pytest.mark.parametrize("groups", [HEADS, 2])
def test_heads_are_priced_as_heads(groups):
    head = bc.Subnetwork(masks(groups)).add_head(0, 1)
    each = math.log2(D_MODEL * D_HEAD + 1)
    if groups == HEADS:
        attention = 1 + choice(HEADS, 1) + 4 * each
    else:  # a key-value head is a unit of its own
        attention = 1 + choice(HEADS, 1) + 2 * each + 1 + choice(2, 1) + 2 * each
    assert mask_bits(head) == pytest.approx(attention + 1 + choice(D_MLP, 0))


def test_full_and_empty_masks_have_hardly_any_bits():
    empty = bc.Subnetwork(masks())
    assert mask_bits(empty) < 10
    assert mask_bits(~empty) < 60


@pytest.fixture(scope="module")
def table(random_tokens):
    return bc.count_ngrams(random_tokens, 2, d_vocab=257)


def test_both_sides_of_the_ratio(tiny_model, table):
    some = bc.Subnetwork.full(tiny_model).drop_layer(1).random_like()
    found = bc.could_mask_hold_it(some, table, 0.3)
    assert (found.mask_bits, found.table_bits, found.kl) == (mask_bits(some), table.message_bits(0.3), 0.3)
    assert found.ratio == found.mask_bits / found.table_bits
    assert bc.could_mask_hold_it(some, table, math.inf).ratio == math.inf


@pytest.mark.parametrize(
    ("mask", "table", "words"),
    [
        (400.0, 270_000.0, ("No: it has 400 bits", "was written in 270,000 (ratio 0.0015)", "from the weights")),
        (27_001.0, 270_000.0, ("NOT excluded", "(ratio 0.1)", "not by a factor of 10")),
        (270_000.0, 270_000.0, ("Yes: ", "(ratio 1)", "shows nothing by itself")),
        (3_240_000.0, 270_000.0, ("Yes: ", "(ratio 12)")),
        (100.0, 0.0, ("There is none to hold",)),
    ],
)
def test_the_answer_is_graded(mask, table, words):
    says = MaskCapacity(mask, table, 0.19).says
    assert says.startswith("Could the mask itself hold the answer? ")
    assert says.endswith(".")
    for part in words:
        assert part in says


def test_bad_input_is_refused(tiny_model, table):
    some = bc.Subnetwork.empty(tiny_model)
    for kl in (-1.0, math.nan):
        with pytest.raises(ValueError, match="kl should be at least 0"):
            bc.could_mask_hold_it(some, table, kl)
    with pytest.raises(ValueError, match="no subnetwork"):
        bc.could_mask_hold_it(table, table, 0.1)
    for wrong in (bc.NextTokenTarget(), None, "bigram"):
        with pytest.raises(ValueError, match=r"for an NGramTable of at most 8,388,608 n-grams, not for"):
            bc.could_mask_hold_it(some, wrong, 0.1)


def test_evaluate_measures_it_with_controls_and_keeps_it(tiny_model, table, random_tokens):
    random_tokens = random_tokens[:4]
    some = bc.Subnetwork.full(tiny_model).random_like().drop_neurons(0, [1, 2, 3])
    found = bc.evaluate(tiny_model, some, table, random_tokens, seeds=1)
    assert found.mask_capacity == bc.could_mask_hold_it(some, table, found.subnetwork.kl)
    assert found.mask_capacity.says in str(found)
    assert "Could the mask itself" in found._repr_html_()
    record = found.to_json()
    assert bc.Evaluation.from_json(record) == found
    assert record["mask_capacity"]["mask_bits"] == found.mask_capacity.mask_bits
    del record["mask_capacity"]  # as earlier versions wrote it
    assert bc.Evaluation.from_json(record).mask_capacity is None
    assert bc.evaluate(tiny_model, some, table, random_tokens, controls=False).mask_capacity is None
    assert bc.evaluate(tiny_model, some, bc.ModelTarget(tiny_model), random_tokens, seeds=1).mask_capacity is None
