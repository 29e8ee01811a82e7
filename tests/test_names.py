"""The grammar of names: what is written is read back, and older spellings are still read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigram_circuits.models.weights import weight_sites
from bigram_circuits.names import (
    ATTENTION_MATRICES,
    MLP_MATRICES,
    PartName,
    WeightName,
    head_label,
    in_block,
    layer_of,
    neuron_label,
)

NUMBER = st.integers(0, 999)
INDICES = st.lists(NUMBER, min_size=1, max_size=9, unique=True).map(tuple)
KINDS = st.one_of(
    st.tuples(st.just("head"), st.tuples(NUMBER)),
    st.tuples(st.just("neurons"), INDICES),
    st.tuples(st.sampled_from(["attn", "mlp", "layer"]), st.just(())),
)


@given(NUMBER, KINDS)
def test_a_label_is_read_back(layer, kind):
    part = PartName(kind[0], layer, kind[1])
    assert PartName.parse(part.label) == part


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("head 2.3", "L2H3"),
        ("L2H3", "L2H3"),
        ("neurons 0.5", "L0N5"),
        ("neurons 0.[1, 5]", "L0N[1,5]"),
        ("L0N[1, 5]", "L0N[1,5]"),
        ("L0N[5,5]", "L0N5"),
        ("attn 1", "L1.attn"),
        ("mlp 12", "L12.mlp"),
        ("layer 2", "L2"),
        ("L2", "L2"),
    ],
)
def test_other_spellings_are_read(text, label):
    part = PartName.parse(text)
    assert part is not None
    assert part.label == label


@pytest.mark.parametrize("text", ["", "heads", "L2H", "LH3", "L2.resid", "head 2", "L2H3 ", "2.3", "l2h3", "L2H[1,2]"])
def test_what_is_no_part_is_none(text):
    assert PartName.parse(text) is None


def test_many_neurons_are_counted_where_it_should_be_short():
    assert PartName("neurons", 0, (1, 2, 3, 4, 5)).short == "L0N[1,2,3,4,5]"
    assert PartName("neurons", 0, (1, 2, 3, 4, 5, 6)).short == "L0N[6 of them]"
    assert (head_label(1, 2), neuron_label(0, 711)) == ("L1H2", "L0N711")


def test_every_weight_of_a_model_has_a_name_of_the_grammar(any_model):
    for site in weight_sites(any_model):
        name = WeightName.parse(site.name)
        assert str(name) == site.name
        assert (name.layer, name.component, name.matrix) == (site.layer, site.component, site.matrix)
        assert name.matrix in (ATTENTION_MATRICES if site.component == "attn" else MLP_MATRICES)
        assert name.part.label == f"L{site.layer}.{site.component}"


def test_what_is_no_weight_is_refused():
    for text in ("blocks.0.attn", "blocks.x.attn.W_Q", "transformer.h.0.attn.weight"):
        with pytest.raises(ValueError, match=r"is not the name of a weight matrix, such as 'blocks\.0\.attn\.W_Q'"):
            WeightName.parse(text)
    assert layer_of(in_block(12, "attn.hook_z")) == 12
