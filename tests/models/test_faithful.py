"""A loaded model is the one in its files: every weight is there, and hooks change nothing."""

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

import bigram_circuits as bc
from bigram_circuits.models.faithful import ModelWarning
from bigram_circuits.models.hooking import hooked
from bigram_circuits.recipe import Inputs
from bigram_circuits.workflow import load_named
from tests.architectures import CONFIGS, D_VOCAB, HEADS
from tests.conftest import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Llama with an unembedding of its own."""
    return save_tiny(tmp_path_factory.mktemp("llama"), CONFIGS["llama"]())


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def configure(folder: Path, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(folder: Path, change):
    """Save other tensors, made from those in the folder."""
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def renamed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


LORA = {f"{Q}.lora_A.weight": torch.ones(2, 24), f"{Q}.lora_B.weight": torch.ones(32, 2)}
FILES = {
    "compiled": (
        renamed("_orig_mod."),
        r"lm_head\.weight \(and 20 others\), but _orig.*: remove .*'_orig_mod\.'",
    ),
    "parallel": (renamed("module."), r"remove the prefix 'module\.' from the names of all tensors"),
    "both": (renamed("module._orig_mod."), r"remove the prefix 'module\._orig_mod\.'"),
    "a shard alone": (
        without("layers.1"),
        r"not hold the weight model\.layers\.1\.\S+ \(and 8 others\): part",
    ),
    "no unembedding": (without("lm_head"), r"do not hold the weight lm_head\.weight: part of the files is missing"),
    "no final norm": (without("model.norm"), r"do not hold the weight model\.norm\.weight: "),
    "an adapter beside": (
        lambda tensors: tensors | LORA,
        r"adapter that is not merged: merge it .*merge_and_unload",
    ),
    "an adapter around": (
        lambda tensors: {n.replace(Q, f"{Q}.base_layer"): tensor for n, tensor in tensors.items()} | LORA,
        "an adapter that is not merged",
    ),
    "another width": (
        lambda tensors: tensors | {"model.norm.weight": torch.ones(25)},
        r"the weight 'model\.norm\.weight' is 25 in its files, but 24 by its config\.json",
    ),
}


@pytest.mark.parametrize("name", list(FILES))
def test_weights_that_the_files_do_not_hold_are_refused_not_made_up(folder, name):
    change, said = FILES[name]
    rewrite(folder, change)
    with pytest.raises(ValueError, match=said) as error:
        bc.load_model(folder, device="cpu")
    assert str(error.value).startswith("cannot load the model")
    assert "\n" not in str(error.value)


def test_a_config_with_more_layers_than_the_weights_is_refused_and_with_fewer_a_warning(folder):
    configure(folder, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"do not hold the weight model\.layers\.2\."):
        bc.load_model(folder, device="cpu")
    configure(folder, num_hidden_layers=1)
    with pytest.warns(ModelWarning, match=r"does not use: 'model\.layers\.1\.\S+', 'model\.layers\.1\.\S+' and 7 more"):
        bc.load_model(folder, device="cpu")


def test_a_tied_unembedding_and_former_buffers_need_not_be_there(folder):
    rewrite(folder, without("lm_head"))
    configure(folder, tie_word_embeddings=True)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "model.layers.0.self_attn.masked_bias": Z}
    rewrite(folder, lambda tensors: tensors | old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = bc.load_model(folder, device="cpu")
    assert torch.equal(model.W_U.T, model.W_E)


Z = torch.zeros(1)


def test_shards_that_are_missing_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    names = list(tensors)
    (folder / "model.safetensors").unlink()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({name: tensors[name] for name in names[:10]}, folder / first, {"format": "pt"})
    with pytest.raises(ValueError, match="cannot load the model"):  # no index
        bc.load_model(folder, device="cpu")
    where = dict.fromkeys(names[:10], first)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    with pytest.raises(ValueError, match=r"do not hold the weight .* \(and 10 others\)"):
        bc.load_model(folder, device="cpu")
    index.write_text(json.dumps({"metadata": {}, "weight_map": where | dict.fromkeys(names[10:], second)}))
    with pytest.raises(ValueError, match=second):
        bc.load_model(folder, device="cpu")


def test_a_folder_of_an_adapter_and_one_without_weights_are_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter \(adapter_config\.json\): merge it"):
        bc.load_model(folder, device="cpu")
    (folder / "adapter_config.json").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        bc.load_model(folder, device="cpu")


def test_what_transformers_found_wrong_is_said_not_that_it_is_in_a_report(tmp_path):
    config = MixtralConfig(**HEADS | {"num_hidden_layers": 1}, num_key_value_heads=2, num_local_experts=2)
    folder = save_tiny(tmp_path / "mixtral", config)
    rewrite(folder, lambda tensors: {n: t[:5] if "experts.1.w1" in n else t for n, t in tensors.items()})
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.experts\.gate_up_proj: .*equal size, but got .*\[5, 24\]"
    ) as error:
        bc.load_model(folder, device="cpu")
    assert "report" not in str(error.value)


def test_an_error_without_words_is_said_with_its_place(tmp_path):
    config = CONFIGS["gpt_neox"]()
    config.attention_bias = False
    with pytest.raises(ValueError, match=r"cannot load the model '.*': AssertionError in \w+\.py, \w+$"):
        bc.load_model(save_tiny(tmp_path / "neox", config), device="cpu")


# --- the hooked model computes what the plain one does ---

DROPPED = {
    "gpt2": {"scale_attn_weights": False},
    "gpt_bigcode": {"scale_attn_weights": False},
    "gemma3": {"attn_logit_softcapping": 0.5},
    "starcoder2": {"norm_epsilon": 0.1},
    "falcon_alibi": {"new_decoder_architecture": True},
}
KEPT = {
    "gpt2": {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu", "layer_norm_epsilon": 0.1},
    "gpt_bigcode": {"activation_function": "relu", "layer_norm_epsilon": 0.1},
    "gemma2": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.5},
    "granite": {"attention_multiplier": 0.7, "logits_scaling": 3.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.5},
    "olmo": {"clip_qkv": 0.05},
    "mistral": {"sliding_window": 3, "rms_norm_eps": 0.1},
}


@pytest.mark.parametrize("name", list(DROPPED))
def test_an_option_that_the_hooked_model_leaves_out_is_refused_with_the_numbers(tmp_path, name):
    config = CONFIGS[name]()
    for key, value in DROPPED[name].items():
        setattr(config, key, value)
    folder = save_tiny(tmp_path / name, config)
    said = r"the logits differ by [\d.e-]+ \(root mean square\), [\d.e-]+ of their standard deviation.*check=False"
    with pytest.raises(ValueError, match=said) as error:
        bc.load_model(folder, device="cpu")
    assert "\n" not in str(error.value)
    taken = bc.load_model(folder, device="cpu", check=False)
    tokens = torch.arange(16)[None]
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert not torch.allclose(taken(tokens), plain(tokens).logits, atol=1e-3)
    assert hooked(copy.deepcopy(plain), like=taken).cfg.architecture == taken.cfg.architecture  # as it was loaded
    taken.cfg.checked = True
    with pytest.raises(ValueError, match="the logits differ by"):
        hooked(plain, like=taken)


@pytest.mark.parametrize("name", list(KEPT))
def test_options_that_it_has_are_taken(tmp_path, name):
    default, config = CONFIGS[name](), CONFIGS[name]()
    for key, value in KEPT[name].items():
        setattr(config, key, value)
    tokens = torch.arange(16)[None]
    model = bc.load_model(save_tiny(tmp_path / "kept", config), device="cpu")
    other = bc.load_model(save_tiny(tmp_path / "default", default), device="cpu")
    assert not torch.allclose(model(tokens), other(tokens), atol=1e-3)


def test_a_model_that_is_not_finite_is_taken_and_one_of_constant_logits_too(folder):
    configure(folder, rms_norm_eps=0.0)
    rewrite(folder, lambda tensors: {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    assert bc.load_model(folder, device="cpu").cfg.d_vocab == D_VOCAB


def test_the_command_line_says_it_and_can_go_on(tmp_path, capsys):
    from bigram_circuits import cli

    config = CONFIGS["gpt2"]()
    config.scale_attn_weights = False
    folder = str(save_tiny(tmp_path / "gpt2", config))
    assert cli.main(["hooks", folder, "--device", "cpu"]) == 1
    assert "TransformerLens does not compute what Hugging Face does" in capsys.readouterr().err
    assert cli.main(["hooks", folder, "--device", "cpu", "--unchecked"]) == 0
    assert load_named(Inputs(model=folder, unchecked=True), "cpu").cfg.n_layers == 2
    with pytest.raises(ValueError, match="the logits differ by"):
        load_named(Inputs(model=folder), "cpu")
