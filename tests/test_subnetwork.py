"""A subnetwork against a plain set of (weight, index) pairs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bigram_circuits as bc
from bigram_circuits.bitmasks import Count
from bigram_circuits.subnetwork import Subnetwork

SHAPES = {  # two layers with grouped queries; the sizes of the bytes' last bits differ
    f"blocks.{layer}.{name}": shape
    for layer in (0, 1)
    for name, shape in {
        "attn.W_Q": (4, 5, 3), "attn.W_K": (2, 5, 3), "attn.W_V": (2, 5, 3), "attn.W_O": (4, 3, 5),
        "mlp.W_in": (5, 7), "mlp.W_gate": (5, 7), "mlp.W_out": (7, 5),
    }.items()
}  # fmt: skip
TOTAL = 2 * (60 + 30 + 30 + 60 + 3 * 35)


def random_masks(seed, density=0.5):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()}


masks = st.builds(random_masks, st.integers(0, 1 << 30), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
subnetworks = st.builds(Subnetwork, masks)
full = Subnetwork(random_masks(0, 2.0))
empty = Subnetwork(random_masks(0, -1.0))


def as_set(subnetwork):
    return {(name, *index) for name, mask in subnetwork.items() for index in mask.nonzero().tolist()}


@given(masks=masks)
def test_a_subnetwork_gives_back_the_masks_it_was_made_of(masks):
    subnetwork = Subnetwork(masks)
    assert list(subnetwork) == list(masks) == list(subnetwork.shapes)
    for name, mask in masks.items():
        assert subnetwork[name].dtype == torch.bool
        assert torch.equal(subnetwork[name], mask)
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert (subnetwork.kept, subnetwork.total, subnetwork.fraction) == (kept, TOTAL, kept / TOTAL)
    assert subnetwork.by_weight() == {name: Count(int(mask.sum()), mask.numel()) for name, mask in masks.items()}


@given(a=subnetworks, b=subnetworks, c=subnetworks)
def test_operators_are_those_of_sets(a, b, c):
    assert as_set(a & b) == as_set(a) & as_set(b)
    assert as_set(a | b) == as_set(a) | as_set(b)
    assert as_set(a - b) == as_set(a) - as_set(b)
    assert as_set(~a) == as_set(full) - as_set(a)
    assert ~~a == a
    assert ~(a & b) == ~a | ~b
    assert a & (b | c) == (a & b) | (a & c)
    assert a - b == a & ~b
    assert a | ~a == full
    assert a & ~a == empty
    assert (a & b).kept + (a | b).kept == a.kept + b.kept
    assert (~a).kept == TOTAL - a.kept


@given(masks=masks, other=masks)
def test_equality_and_hash_are_by_value(masks, other):
    one, same = Subnetwork(masks), Subnetwork(dict(reversed(masks.items())), model_name="other")
    assert one == same
    assert hash(one) == hash(same)
    assert len({one, same}) == 1
    assert (one == Subnetwork(other)) == (as_set(one) == as_set(Subnetwork(other)))


def test_a_subnetwork_is_not_equal_to_other_shapes_or_things():
    square, flat = (
        Subnetwork({"blocks.0.mlp.W_in": torch.zeros(shape, dtype=torch.bool)}) for shape in ((2, 2), (4, 1))
    )
    assert square != flat
    assert square != dict(square)
    assert flat != "flat"


def test_nothing_done_to_masks_given_or_read_changes_a_subnetwork():
    masks = random_masks(1)
    subnetwork = Subnetwork(masks)
    before = as_set(subnetwork)
    for mask in masks.values():
        mask.logical_not_()
    for _, mask in subnetwork.items():
        mask.fill_(True)
    ~subnetwork, subnetwork.drop_layer(0), subnetwork | full
    assert as_set(subnetwork) == before
    with pytest.raises(TypeError):
        subnetwork["blocks.0.mlp.W_in"] = torch.ones(5, 7, dtype=torch.bool)
    with pytest.raises(TypeError):
        subnetwork.shapes["blocks.0.mlp.W_in"] = (1,)
    with pytest.raises(AttributeError):
        subnetwork.model_name = "another"
    with pytest.raises(AttributeError):
        subnetwork.weight_hash = "another"


def test_looking_up_a_name_it_does_not_have_is_a_key_error():
    assert "blocks.0.mlp.W_in" in full
    assert "blocks.9.mlp.W_in" not in full
    with pytest.raises(KeyError):
        full["blocks.9.mlp.W_in"]


def test_masks_that_are_none_or_not_boolean_or_do_not_match_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        Subnetwork({})
    with pytest.raises(ValueError, match=r"blocks.0.mlp.W_in has dtype torch.float32 but should be torch.bool"):
        Subnetwork.__init__.__wrapped__(Subnetwork.__new__(Subnetwork), {"blocks.0.mlp.W_in": torch.ones(2, 2)})
    fewer = Subnetwork({name: full[name] for name in list(SHAPES)[:-1]})
    wider = Subnetwork(
        {
            name: torch.ones(9 if name.endswith("W_out") else shape[0], shape[1] if name.endswith("W_out") else 9) > 0
            if len(shape) == 2
            else full[name]
            for name, shape in SHAPES.items()
        }
    )
    for other in (fewer, wider):
        for operation in ("__and__", "__or__", "__sub__"):
            with pytest.raises(ValueError, match="in this subnetwork, but"):
                getattr(full, operation)(other)
    with pytest.raises(TypeError):
        full & {"blocks.0.mlp.W_in"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"blocks.x.attn.W_Q": (2, 6, 3)}, "'blocks.x.attn.W_Q' is not the name of a weight matrix"),
        ({"blocks.0.attn.W_in": (6, 5)}, "'blocks.0.attn.W_in' is not the name"),
        ({"blocks.00.mlp.W_in": (6, 5)}, "'blocks.00.mlp.W_in' is not the name"),
        ({"blocks.\u0663.mlp.W_in": (6, 5)}, "is not the name"),
        ({"../../out": (6, 5)}, "is not the name"),
        ({"blocks.0.attn.W_Q": (6, 6)}, "W_Q has shape .6, 6., but its axes are head, d_model, d_head"),
        ({"blocks.0.mlp.W_in": (2, 3, 4)}, "W_in has shape .2, 3, 4., but its axes are d_model, d_mlp"),
        ({"blocks.0.mlp.W_in": ()}, "W_in has shape"),
        ({"blocks.0.mlp.W_in": (6, 0)}, "W_in has shape .6, 0."),
        ({"blocks.0.mlp.W_in": (6, 5), "blocks.0.mlp.W_out": (4, 6)}, "but d_mlp is 5 in blocks.0.mlp.W_in"),
        ({"blocks.0.mlp.W_in": (6, 5), "blocks.1.mlp.W_in": (7, 5)}, "but d_model is 6 in blocks.0.mlp.W_in"),
        ({"blocks.0.attn.W_Q": (4, 6, 3), "blocks.0.attn.W_K": (3, 6, 3)}, "W_K has 3 heads, which 4 query heads"),
    ],
)
def test_names_and_shapes_that_no_model_has_are_refused(tmp_path, changed, said):
    masks = {name: torch.ones(shape) > 0 for name, shape in changed.items()}
    with pytest.raises(ValueError, match=said):
        Subnetwork(masks)
    packed = {name: np.packbits(mask.numpy()) for name, mask in masks.items()}
    forged = Subnetwork._from_packed({name: mask.shape for name, mask in masks.items()}, packed, None, None, "found")
    forged.save(tmp_path / "forged.safetensors")
    with pytest.raises(ValueError, match=r"forged.safetensors' is damaged: ") as told:
        Subnetwork.load(tmp_path / "forged.safetensors")
    assert "\n" not in str(told.value)


def test_bits_after_the_last_weight_are_refused(tmp_path):
    shapes, packed = {"blocks.0.mlp.W_in": (1, 1)}, {"blocks.0.mlp.W_in": np.array([0b1111_1000], np.uint8)}
    forged = Subnetwork._from_packed(shapes, packed, None, None, "found")
    assert forged.kept == 5
    forged.save(tmp_path / "forged.safetensors")
    with pytest.raises(ValueError, match="W_in has bits after the last of its weights"):
        Subnetwork.load(tmp_path / "forged.safetensors")


def test_the_same_mask_is_saved_as_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        Subnetwork({name: full[name] for name in SHAPES}, model_name="m", weight_hash="h").save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    Subnetwork.load(tmp_path / "a").save(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


# --- random controls ---


@given(subnetwork=subnetworks, seed=st.integers(0, 1 << 20))
def test_a_matched_random_subnetwork_keeps_as_many_in_every_matrix(subnetwork, seed):
    random = subnetwork.random_like(seed=seed)
    assert random.by_weight() == subnetwork.by_weight()
    assert random == subnetwork.random_like(seed=seed)
    if 0 < subnetwork.kept < TOTAL:
        assert random != subnetwork.random_like(seed=seed + 1)


def test_matched_random_subnetworks_are_uniform_and_independent_between_matrices():
    shape, draws = (3, 7), 2_000
    mask = torch.arange(21).view(shape) < 5
    like = Subnetwork({"blocks.0.mlp.W_in": mask, "blocks.1.mlp.W_in": mask})
    drawn = np.array([[mask.flatten().numpy() for mask in like.random_like(seed).values()] for seed in range(draws)])
    share, deviation = 5 / 21, np.sqrt(5 / 21 * 16 / 21 / draws)
    assert np.abs(drawn.mean(0) - share).max() < 4.5 * deviation
    both = (drawn[:, 0] & drawn[:, 1]).sum(1)  # hypergeometric, with mean 25 / 21
    assert both.mean() == pytest.approx(25 / 21, abs=4.5 * both.std() / np.sqrt(draws))


# --- from a model ---


def test_full_and_empty_have_the_model_s_weights_and_its_hash(any_model):
    sites = bc.weight_sites(any_model)
    every, none = Subnetwork.full(any_model), Subnetwork.empty(any_model)
    assert dict(every.shapes) == {site.name: site.shape for site in sites}
    assert (every.kept, none.kept) == (every.total, 0) == (sum(site.size for site in sites), 0)
    assert ~every == none
    assert every.weight_hash == bc.weight_hash(any_model)
    assert every.model_name == any_model.cfg.model_name


def test_magnitude_keeps_the_largest_weights_of_every_matrix(any_model):
    every = Subnetwork.full(any_model)
    generator = torch.Generator().manual_seed(0)
    like = Subnetwork({name: torch.rand(shape, generator=generator) < 0.2 for name, shape in every.shapes.items()})
    largest = Subnetwork.magnitude(any_model, like=like)
    assert largest.by_weight() == like.by_weight()
    for site in bc.weight_sites(any_model):
        mask, size = largest[site.name], site.weight.abs()
        assert size[mask].min() >= size[~mask].max()


def test_magnitude_and_loading_refuse_the_shapes_of_another_model(any_model, tmp_path):
    with pytest.raises(ValueError, match=r"but .* in the model"):
        Subnetwork.magnitude(any_model, like=full)
    full.save(tmp_path / "full.safetensors")
    with pytest.raises(ValueError, match=r"but .* in the model"):
        Subnetwork.load(tmp_path / "full.safetensors", model=any_model)
