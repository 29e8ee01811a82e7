"""Which model is it: every weight and setting counts, in the precision that both sides have."""

import hashlib
import shutil

import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.models.identity import config_hash, how_models_differ, other_tensors, same_text
from tests.architectures import CONFIGS, each
from tests.conftest import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("gpt_neox"), CONFIGS["gpt_neox"]())


@pytest.fixture(scope="module")
def hashes(folder):
    """The hash of one checkpoint in each precision."""
    return {
        dtype: bc.weight_hash(bc.load_model(folder, device="cpu", dtype=dtype))
        for dtype in ("float64", "float32", "float16", "bfloat16")
    }


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "opt"])
def test_every_live_tensor_counts_and_dead_ones_do_not(tmp_path, name):
    model = bc.load_model(save_tiny(tmp_path, CONFIGS[name]()), device="cpu")
    before = bc.weight_hash(model)
    tokens = torch.arange(16)[None]
    seen = 0
    with torch.no_grad():
        logits = model(tokens)
        for parameter in model.parameters():
            place = (0,) * parameter.ndim
            value = parameter[place].item()
            parameter[place] += 1.0
            matters = not torch.equal(model(tokens), logits)
            if matters:
                assert bc.weight_hash(model) != before
                seen += 1
            parameter[place] = value
    assert bc.weight_hash(model) == before
    assert seen > 2 * 8


def test_a_single_bit_counts_in_float32_and_a_rounding_of_16_bits_does_not(folder, hashes):
    model = bc.load_model(folder, device="cpu")
    weight = bc.weight_sites(model)[3].original
    with torch.no_grad():
        value = weight[2, 2].item()
        weight[2, 2] = torch.nextafter(torch.tensor(value), torch.tensor(9.0))
    changed = bc.weight_hash(model)
    assert "weights in float32 with hash" in how_models_differ(hashes["float32"], changed)
    assert not bc.same_model(hashes["float32"], changed)
    assert bc.same_model(hashes["bfloat16"], changed)  # in which nobody can tell them apart


@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
def test_one_checkpoint_in_several_precisions_is_one_model(hashes, narrow):
    for wide in ("float64", "float32", narrow):
        assert bc.same_model(hashes[wide], hashes[narrow])
        assert bc.same_model(hashes[narrow], hashes[wide])


def test_a_checkpoint_of_16_bits_is_one_model_in_both_formats(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    shutil.copytree(folder, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(tmp_path / "half")
    hashes = [
        bc.weight_hash(bc.load_model(tmp_path / "half", device="cpu", dtype=dtype))
        for dtype in ("float32", "float16", "bfloat16")
    ]
    assert all(bc.same_model(one, other) for one in hashes for other in hashes)


def test_float16_and_bfloat16_of_a_finer_checkpoint_have_nothing_in_common_and_it_is_said(hashes):
    for pair in (("float16", "bfloat16"), ("bfloat16", "float16")):
        how = how_models_differ(*(hashes[dtype] for dtype in pair))
        assert how.endswith("load one of them in float32")


def test_other_tensors_are_told_apart_in_16_bits_too(folder, hashes):
    model = bc.load_model(folder, device="cpu", dtype="bfloat16")
    with torch.no_grad():
        model.ln_final.weight[3] += 0.5
    assert "weights in bfloat16 with hash" in how_models_differ(hashes["float32"], bc.weight_hash(model))
    with torch.no_grad():
        bc.weight_sites(model)[0].original[0, 0] += 0.5
    assert "attention and MLP weights" in how_models_differ(hashes["float32"], bc.weight_hash(model))


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("gpt2", "activation_function", "relu"),
        ("gpt_neox", "hidden_act", "relu"),
        ("gpt_neox", "rope_parameters", {"rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 0.25}),
        ("gpt_neox", "layer_norm_eps", 0.1),
        ("llama", "rms_norm_eps", 0.1),
        ("gemma2", "final_logit_softcapping", 3.0),
        ("granite", "logits_scaling", 2.0),
    ],
)
def test_the_configuration_counts(architecture, key, value):
    config, other = CONFIGS[architecture](), CONFIGS[architecture]()
    setattr(other, key, value)
    assert config_hash(other) != config_hash(config)


@pytest.mark.parametrize("name", each(list(CONFIGS)))
def test_settings_that_logits_do_not_depend_on_do_not_count(name, tmp_path):
    config, other = CONFIGS[name](), CONFIGS[name]()
    for key in ("use_cache", "output_attentions", "output_hidden_states"):
        setattr(other, key, True)
    other.pad_token_id = other.bos_token_id = other.eos_token_id = 0
    other.dtype = torch.bfloat16
    other._attn_implementation = "eager"
    other._name_or_path = "somewhere"
    other.num_labels = 5
    other.initializer_range = 0.5
    other.save_pretrained(tmp_path)
    assert config_hash(other) == config_hash(type(other).from_pretrained(tmp_path)) == config_hash(config)


def test_a_mask_that_is_applied_and_a_mask_being_learned_do_not_count(any_model, random_tokens):
    before = bc.weight_hash(any_model)
    with bc.masked(any_model, bc.Subnetwork.empty(any_model)):
        assert bc.weight_hash(any_model) == before


def test_names_of_other_tensors_are_those_of_hugging_face(any_model):
    from transformers import AutoModelForCausalLM

    state = AutoModelForCausalLM.from_pretrained(any_model.cfg.model_name).state_dict()
    others = other_tensors(any_model)
    split = ("attn.q.bias", "attn.k.bias", "attn.v.bias", "attention.q.bias", "attention.k.bias", "attention.v.bias")
    assert {name for name in others if not name.endswith(split)} <= set(state)
    kept = [name for name in state if "norm" in name or "ln_" in name or "embed" in name or "wte" in name]
    assert set(kept) <= set(others)


# --- hashes of earlier versions ---

OTHER = "0" * 32


def former_hash(model):
    """The hash of version 0.1.0."""
    digest = hashlib.blake2b(digest_size=16)
    for site in bc.weight_sites(model):
        digest.update(f"{site.name} {site.shape}".encode())
        digest.update(site.weight.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def test_a_hash_of_an_earlier_version_is_compared_by_its_rule(folder, hashes, tmp_path):
    model = bc.load_model(folder, device="cpu")
    former = former_hash(model)
    assert all(bc.same_model(former, hashes[dtype]) for dtype in ("float32", "bfloat16"))
    assert "attention and MLP weights" in how_models_differ(OTHER, hashes["float32"])
    assert bc.same_model(former, former)
    assert not bc.same_model(former, OTHER)
    mask = bc.Subnetwork({name: ~mask for name, mask in bc.Subnetwork.full(model).items()}, weight_hash=former)
    mask.save(tmp_path / "mask.safetensors")
    assert bc.Subnetwork.load(tmp_path / "mask.safetensors", model) == mask
    assert (mask | bc.Subnetwork.full(model)).weight_hash == former
    with torch.no_grad():
        model.ln_final.weight[0] += 1
    assert bc.Subnetwork.load(tmp_path / "mask.safetensors", model) == mask  # as it was made: not covered
    with torch.no_grad():
        bc.weight_sites(model)[0].original[0, 0] += 1
    with pytest.raises(ValueError, match=r"is another model \(attention and MLP weights with hash"):
        bc.Subnetwork.load(tmp_path / "mask.safetensors", model)


def test_texts_with_hashes_are_compared_by_their_models(hashes):
    former = hashes["float32"].split("maskable:")[1].split(",")[0]
    for one in (hashes["float32"], hashes["bfloat16"], former):
        assert same_text(f"model {hashes['float32']}", f"model {one}")
        assert same_text(f"renamed {{'of': 'induced {one} 9'}}", f"renamed {{'of': 'induced {former} 9'}}")
        assert not same_text(f"induced {one} 9", f"induced {one} 8")
        assert not same_text(f"model {one}", f"model {OTHER}")
    assert not same_text("bigram 12", "bigram 13")
    assert not same_text(f"model {OTHER}", "model")


@pytest.mark.parametrize("one", [None, "ab12", OTHER])
@pytest.mark.parametrize("other", [None, "ffff", "a:b", ""])
def test_hashes_that_are_none_fit_only_themselves(one, other):
    assert bc.same_model(one, other) == (one == other)
    assert bc.same_model(one, one)
