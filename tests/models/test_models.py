import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig

import bigram_circuits as bc
from bigram_circuits.models import loading
from tests.conftest import hub_response, save_tiny


def test_a_local_folder_loads_in_eval_mode_on_raw_weights(any_model, random_tokens):
    plain = AutoModelForCausalLM.from_pretrained(any_model.cfg.model_name, attn_implementation="eager").eval()
    tokens = torch.from_numpy(random_tokens)
    assert not any_model.training
    torch.testing.assert_close(any_model(tokens), plain(tokens).logits, atol=1e-5, rtol=1e-4)


def test_the_reference_model_is_a_pythia_shaped_folder_of_under_8_megabytes(reference_model):
    assert reference_model.cfg.architecture == "GPTNeoXForCausalLM"
    assert reference_model.cfg.n_layers >= 4
    assert not torch.equal(reference_model.W_U.T, reference_model.W_E)
    assert (loading.REFERENCE_FOLDER / "model.safetensors").stat().st_size < 8_000_000
    assert "MIT" in (loading.REFERENCE_FOLDER / "README.md").read_text()


def test_dtype_is_float32_or_what_was_asked_for(tiny_folders):
    assert bc.load_model(tiny_folders["gpt2"]).W_E.dtype == torch.float32
    assert bc.load_model(str(tiny_folders["gpt2"]), dtype="bfloat16").W_E.dtype == torch.bfloat16


def test_the_weight_hash_tells_weights_apart_but_not_precisions(tiny_folders, tmp_path):
    model = bc.load_model(tiny_folders["gpt_neox"])
    for dtype in ("bfloat16", "float16", "float64"):
        other = bc.weight_hash(bc.load_model(tiny_folders["gpt_neox"], dtype=dtype))
        assert bc.same_model(bc.weight_hash(model), other)
        assert bc.same_model(other, bc.weight_hash(model))
    original = bc.weight_hash(model)
    with torch.no_grad():
        bc.weight_sites(model)[5].original[3, 4] += 0.1
    assert bc.weight_hash(model) != original
    with bc.masked(model, bc.Subnetwork.empty(model)):
        assert bc.weight_hash(model) != original
    with torch.no_grad():
        bc.weight_sites(model)[5].original[3, 4] -= 0.1


def test_every_activation_point_has_the_named_shape_that_the_cache_holds(any_model):
    points = {point.name: point for point in bc.activation_points(any_model)}
    _, cache = any_model.run_with_cache(torch.zeros(3, 7, dtype=torch.long))
    assert set(any_model.hook_dict) == set(points)
    reached = {name: point for name, point in points.items() if point.shape is not None}
    for name, point in reached.items():
        sizes = [{"batch": 3, "pos": 7}.get(size, size) for size in point.shape]
        assert list(cache[name].shape) == sizes, name
    assert points["blocks.0.hook_out"].axes == ("batch", "pos", "d_model")
    assert "blocks.0.hook_resid_post" in points["blocks.0.hook_out"].aliases
    assert points["blocks.1.attn.hook_pattern"].axes == ("batch", "head", "pos", "pos")
    assert points["blocks.1.mlp.in.hook_out"].axes == ("batch", "pos", "d_mlp")
    assert points["unembed.hook_out"].axes == ("batch", "pos", "d_vocab")


def test_sites_have_layers_components_and_shapes(any_model):
    sites = {site.name: site for site in bc.weight_sites(any_model)}
    n_key_value_heads = 2 if any_model.cfg.architecture.startswith("Llama") else 4
    assert sites["blocks.0.attn.W_Q"].shape == (4, 24, 6)
    assert sites["blocks.1.attn.W_K"].shape == (n_key_value_heads, 24, 6)
    assert sites["blocks.1.attn.W_O"].shape == (4, 6, 24)
    assert sites["blocks.1.mlp.W_in"].shape == (24, 40)
    assert sites["blocks.1.mlp.W_out"].shape == (40, 24)
    assert ("blocks.0.mlp.W_gate" in sites) == (n_key_value_heads == 2)
    assert {(site.layer, site.component) for site in sites.values()} == {
        (i, c) for i in (0, 1) for c in ("attn", "mlp")
    }


def test_a_mixture_of_experts_is_refused_by_name(tmp_path):
    config = MixtralConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, num_local_experts=2, max_position_embeddings=32,
    )  # fmt: skip
    model = bc.load_model(save_tiny(tmp_path / "mixtral", config))
    with pytest.raises(ValueError, match=r"cannot be masked: blocks\.0\.mlp .* has no plain W_in"):
        bc.weight_sites(model)


# --- bad input: one line each ---


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "a/b/c"])
def test_a_path_to_nothing(name):
    with pytest.raises(FileNotFoundError, match="no model folder") as error:
        bc.load_model(name)
    assert name in one_line(error)


def test_a_folder_of_a_model_s_nickname_is_that_folder_and_not_the_hub_s_model(tiny_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for nickname in ("pythia-70m", "gpt2-small", "gpt2"):
        shutil.copytree(tiny_folders["llama"], tmp_path / nickname)
        model = bc.load_model(nickname, device="cpu")
        assert model.cfg.architecture == "LlamaForCausalLM"
        assert model.cfg.model_name == str(tmp_path / nickname)
        assert loading.model_source(model) == (str(tmp_path / nickname), None)


def test_names_are_stored_so_that_they_find_the_model_from_everywhere(tiny_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny_folders["gpt2"], tmp_path / "m")
    for name in ("m", "./m", "~/m", Path("m"), "m/", "../" + tmp_path.name + "/m"):
        assert bc.load_model(name, device="cpu").cfg.model_name == str(tmp_path / "m")
    for name in ("reference", "EleutherAI/pythia-70m", "gpt2"):
        assert loading.full_name(name) == name


def test_reference_is_a_name_and_a_path_of_that_name_a_folder(tiny_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model folder 'reference'"):
        bc.load_model(Path("reference"))
    with pytest.raises(FileNotFoundError, match=r"no model folder 'gpt2' \(that is, '/.*/gpt2'\)"):
        bc.load_model(Path("gpt2"))
    shutil.copytree(tiny_folders["gpt2"], tmp_path / "reference")
    assert bc.load_model("reference", device="cpu").cfg.architecture == "GPTNeoXForCausalLM"
    assert bc.load_model("./reference", device="cpu").cfg.architecture == "GPT2LMHeadModel"
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="'file' is a file, not a model folder"):
        bc.load_model("file")


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json") as error:
        bc.load_model(tmp_path)
    one_line(error)


def test_a_folder_without_a_tokenizer(tiny_folders, tmp_path):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(tiny_folders["gpt_neox"] / file, tmp_path)
    with pytest.raises(FileNotFoundError, match="has no tokenizer") as error:
        bc.load_model(tmp_path)
    one_line(error)


def test_a_damaged_model_file(tiny_folders, tmp_path):
    shutil.copytree(tiny_folders["gpt_neox"], tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot load the model") as error:
        bc.load_model(tmp_path / "damaged")
    one_line(error)


def test_a_tokenizer_may_have_more_tokens_than_the_model_but_a_text_may_not_use_them(tmp_path):
    config = GPTNeoXConfig(
        vocab_size=100, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = bc.load_model(save_tiny(tmp_path / "small", config), device="cpu")
    assert len(model.tokenizer) == 257
    most = np.arange(32).reshape(4, 8) + 68
    table = bc.count_ngrams(most, 2, d_vocab=100)
    corpus = bc.Corpus.from_tokens(most, most)
    found = bc.find_subnetwork(model, table, corpus, bc.SparsifyConfig(max_steps=1)).subnetwork
    wrong = np.where(np.arange(8) == 5, 100, most)
    said = r"token ids must be 0 to 99 for this model, but there is 100, .*, for which it has no embedding"
    for enters in (
        lambda: bc.find_subnetwork(model, table, bc.Corpus.from_tokens(wrong, most)),
        lambda: bc.evaluate(model, found, table, wrong),
        lambda: bc.logit_lens(model, wrong),
        lambda: bc.InducedTarget(model, wrong),
    ):
        with pytest.raises(ValueError, match=said) as error:
            enters()
        one_line(error)


def test_a_revision_of_a_folder(tiny_folders):
    with pytest.raises(ValueError, match="is a local folder"):
        bc.load_model(tiny_folders["gpt2"], revision="step1000")


@pytest.mark.parametrize("dtype", ["int8", "float33", torch.int64])
def test_a_dtype_that_is_none(dtype):
    with pytest.raises(ValueError, match="dtype must be a floating-point type"):
        bc.load_model("reference", dtype=dtype)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("RepositoryNotFoundError", "there is no model 'some/model' on the hub"),
        ("GatedRepoError", "is gated"),
        ("RevisionNotFoundError", "has no revision 'step7'"),
    ],
)
def test_what_the_hub_says_is_said_in_one_line(monkeypatch, raised, said):
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*_, **__):
        raise getattr(errors, raised)("long\ntext", response=hub_response(404))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(OSError, match=said) as error:
        bc.load_model("some/model", revision="step7")
    one_line(error)


def test_a_hub_that_cannot_be_reached_is_said_at_once_and_in_one_line(no_network):
    with pytest.raises(OSError, match="cannot reach the model hub for the model 'some/model'") as error:
        bc.load_model("some/model")
    one_line(error)


def test_a_name_that_cannot_be_a_hub_id(monkeypatch):
    with pytest.raises(ValueError, match="is not 'reference', a folder, or a hub id"):
        bc.load_model("not a model")
