"""Every architecture: sites that add up, a layout that is exact, and masks that change what they should and no more."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits.models.activations import NotShownError, lean_forward
from tests.architectures import ALIKE, CONFIGS, REFUSED, each
from tests.conftest import save_tiny

TOKENS = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(3))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=each(list(CONFIGS)))
def model(request, tmp_path_factory):
    return bc.load_model(save_tiny(tmp_path_factory.mktemp(request.param), CONFIGS[request.param]()), device="cpu")


@pytest.fixture(scope="module")
def plain(model):
    """The Hugging Face model itself."""
    return AutoModelForCausalLM.from_pretrained(model.cfg.model_name, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def half(model):
    full = bc.Subnetwork.full(model)
    generator = torch.Generator().manual_seed(1)
    return bc.Subnetwork({name: torch.rand(shape, generator=generator) < 0.5 for name, shape in full.shapes.items()})


def test_sites_are_all_matrices_of_all_blocks(model, plain):
    listed = sum(
        weight.numel()
        for name, weight in plain.named_parameters()
        if weight.ndim > 1 and any(part.isdigit() for part in name.split(".")) and "norm" not in name
    )
    sites = {site.name: site for site in bc.weight_sites(model)}
    assert sum(site.size for site in sites.values()) == listed
    config = plain.config
    heads = getattr(config, "num_attention_heads", None)
    for layer in range(2):
        query, output = sites[f"blocks.{layer}.attn.W_Q"].shape, sites[f"blocks.{layer}.attn.W_O"].shape
        assert (query[0], query[2], query[1]) == output
        assert query[0] == heads
        assert query[2] == (getattr(config, "head_dim", None) or query[1] // heads)
        groups = sites[f"blocks.{layer}.attn.W_K"].shape[0]
        assert groups == sites[f"blocks.{layer}.attn.W_V"].shape[0]
        if (grouped := getattr(config, "num_key_value_heads", None)) is not None:
            assert groups == grouped


def test_lean_logits_are_those_of_a_hugging_face_model(model, plain):
    padded = torch.ones_like(TOKENS)
    padded[0, :3] = 0  # at the left
    with torch.no_grad():
        expected = model(TOKENS, attention_mask=padded)
        with lean_forward(model):
            torch.testing.assert_close(model(TOKENS), plain(TOKENS).logits, rtol=1e-4, atol=1e-5)
            found = model(TOKENS, attention_mask=padded)
    torch.testing.assert_close(found[padded == 1], expected[padded == 1], rtol=1e-4, atol=1e-5)


def test_masked_logits_are_those_of_a_hugging_face_model_times_the_exported_mask(model, plain, half):
    masks = half.to_huggingface(model)
    weights = plain.state_dict()
    before = {name: weights[name].clone() for name in masks}
    with torch.no_grad():
        full = plain(TOKENS).logits
        for name, mask in masks.items():
            weights[name].mul_(mask)
        expected = plain(TOKENS).logits
        for name, weight in before.items():
            weights[name].copy_(weight)
    with bc.masked(model, half):
        logits = model(TOKENS)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(logits, full, atol=1e-4)


def test_the_round_trip_is_exact(model, half):
    masks = half.to_huggingface(model)
    assert bc.Subnetwork.from_huggingface(masks, model) == half
    assert bc.Subnetwork.from_huggingface({name: mask.numpy() for name, mask in masks.items()}, model) == half
    assert sum(int(mask.sum()) for mask in masks.values()) == half.kept
    changed = {name: mask.clone() for name, mask in masks.items()}
    name = next(iter(changed))
    changed[name][3, 5] ^= True
    assert abs(bc.Subnetwork.from_huggingface(changed, model).kept - half.kept) == 1


def test_dropping_a_head_changes_only_that_head(model):
    subnetwork = bc.Subnetwork.full(model).drop_head(0, 2)
    n_heads = subnetwork.shapes["blocks.0.attn.W_Q"][0]
    others = [head != 2 for head in range(n_heads)]
    before, after = through(model), through(model, subnetwork)
    assert same_by_head(before["query"], after["query"], n_heads) == others
    if model.cfg.architecture not in ("Olmo2ForCausalLM", "Olmo3ForCausalLM"):  # they norm all queries together
        assert same_by_head(before["heads"], after["heads"], n_heads) == others


def same_by_head(before, after, n_heads):
    return (before == after).reshape(-1, n_heads, before.shape[-1] // n_heads).all(2).all(0).tolist()


def test_dropping_a_neuron_changes_only_that_neuron(model):
    before, after = through(model), through(model, bc.Subnetwork.full(model).drop_neurons(0, [7]))
    # what comes before this MLP is unchanged, so its other neurons are too
    changed = (before["neurons"] != after["neurons"]).reshape(-1, before["neurons"].shape[-1]).any(0)
    assert changed.nonzero().flatten().tolist() == [7]


def through(model, subnetwork=None):
    """What the first block's queries are, and what its W_O and W_out read, in a forward pass."""
    block, seen = model.blocks[0], {}
    handles = [
        block.attn.q.original_component.register_forward_hook(lambda _, __, output: seen.update(query=output)),
        block.attn.o.original_component.register_forward_pre_hook(lambda _, inputs: seen.update(heads=inputs[0])),
        block.mlp.out.original_component.register_forward_pre_hook(lambda _, inputs: seen.update(neurons=inputs[0])),
    ]
    with torch.inference_mode(), bc.masked(model, subnetwork or bc.Subnetwork.full(model)):
        model(TOKENS)
    for handle in handles:
        handle.remove()
    return seen


def test_in_16_bits_it_computes_what_hugging_face_does_and_is_learned_evaluated_and_read(model):
    table = bc.count_ngrams(TOKENS.numpy(), 2, d_vocab=257)
    corpus = bc.Corpus.from_tokens(TOKENS.numpy(), TOKENS.numpy())
    recipe = bc.SparsifyConfig(max_steps=2, batch_size=2)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = bc.load_model(model.cfg.model_name, device="cpu", dtype=dtype)
        alone = AutoModelForCausalLM.from_pretrained(
            model.cfg.model_name, dtype=dtype, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            expected = alone(TOKENS).logits.float()
            difference = narrow(TOKENS).float() - expected
        assert difference.square().mean().sqrt() < 2 * torch.finfo(dtype).eps * expected.std()
        found = bc.find_subnetwork(narrow, table, corpus, recipe, check_memory="off")
        assert len(found.history) == 2
        measured = bc.evaluate(narrow, found.subnetwork, table, TOKENS.numpy(), controls=False).subnetwork
        assert math.isfinite(measured.kl)
        try:
            lens = bc.logit_lens(narrow, TOKENS.numpy())
        except NotShownError:
            assert model.cfg.architecture in ("OPTForCausalLM", "OpenAIGPTLMHeadModel")  # in float32 neither
        else:
            assert np.isfinite(lens.get("kl")).all()


def test_what_is_left_to_the_slow_tests_is_like_what_is_not():
    assert {*ALIKE} | {*ALIKE.values()} <= {*CONFIGS}
    assert not {*ALIKE} & {*ALIKE.values()}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_masked_whole_is_refused_in_one_line(name, tmp_path):
    make, said = REFUSED[name]
    model = bc.load_model(save_tiny(tmp_path / name, make()))
    with pytest.raises(ValueError, match="this model cannot be masked: .*" + said) as error:
        bc.weight_sites(model)
    assert "\n" not in str(error.value)
