"""Checkpoints in TransformerLens' former format: computed as NumPy does, and refused in a line if they cannot be."""

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.models.converted import from_legacy_hub, from_tracr
from tests.conftest import byte_tokenizer
from tests.known_models import numpy_logits, tracr_model

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = {
    "d_model": 8, "n_layers": 2, "d_mlp": 12, "d_head": 4, "n_heads": 2, "n_ctx": 9, "d_vocab": 11, "act_fn": "gelu",
    "attn_only": False, "normalization": "LN",
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 11, (3, 7))


def weights(*, attn_only=False):
    """Random weights by TransformerLens' former names, with the buffers of its former checkpoints."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return 0.4 * torch.randn(shape, generator=generator)

    found = {"embed.W_E": random(11, 8), "pos_embed.W_pos": random(9, 8), "unembed.W_U": random(8, 11)}
    found |= {"unembed.b_U": random(11), "ln_final.w": random(8), "ln_final.b": random(8)}
    for at in ("blocks.0.", "blocks.1."):
        found |= {f"{at}attn.mask": torch.ones(9, 9), f"{at}attn.IGNORE": torch.tensor(-1e5)}
        found |= {f"{at}ln1.w": random(8), f"{at}ln1.b": random(8), f"{at}attn.b_O": random(8)}
        found |= {f"{at}attn.W_{name}": random(2, 8, 4) for name in "QKV"} | {f"{at}attn.W_O": random(2, 4, 8)}
        found |= {f"{at}attn.b_{name}": random(2, 4) for name in "QKV"}
        if not attn_only:
            found |= {f"{at}ln2.w": random(8), f"{at}ln2.b": random(8), f"{at}mlp.b_out": random(8)}
            found |= {f"{at}mlp.W_in": random(8, 12), f"{at}mlp.b_in": random(12), f"{at}mlp.W_out": random(12, 8)}
    return found


def saved(folder, state=None, **options):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | options))
    torch.save(weights(attn_only=options.get("attn_only", False)) if state is None else state, folder / "final.pth")
    return folder


@pytest.mark.parametrize("attn_only", [False, True])
def test_a_former_checkpoint_computes_what_numpy_does(tmp_path, attn_only):
    model = bc.load_model(saved(tmp_path / "model", attn_only=attn_only))
    state = weights(attn_only=attn_only)
    with torch.no_grad():
        found = model(torch.from_numpy(TOKENS)).numpy()
    np.testing.assert_allclose(found, numpy_logits(state, TOKENS, act="gelu"), atol=1e-5)
    for site in bc.weight_sites(model):
        assert torch.equal(site.weight, state[site.name])
    assert model.tokenizer is None
    without = bc.Subnetwork.full(model).drop_head(1, 0)
    state["blocks.1.attn.W_O"][0] = 0
    with torch.no_grad(), bc.masked(model, without):
        found = model(torch.from_numpy(TOKENS)).numpy()
    np.testing.assert_allclose(found, numpy_logits(state, TOKENS, act="gelu"), atol=1e-5)


def test_a_checkpoint_without_a_bias_has_one_of_zeros_and_norms_without_weights_have_none(tmp_path):
    state = {name: value for name, value in weights().items() if ".ln" not in name and not name.startswith("ln_")}
    del state["unembed.b_U"]
    model = bc.load_model(saved(tmp_path / "model", state, normalization="LNPre"))
    ones = {f"{name}.{end}": np.full(8, float(end == "w")) for name in ("ln_final",) for end in "wb"}
    for layer in (0, 1):
        ones |= {f"blocks.{layer}.ln{one}.{end}": np.full(8, float(end == "w")) for one in (1, 2) for end in "wb"}
    with torch.no_grad():
        found = model(torch.from_numpy(TOKENS)).numpy()
    np.testing.assert_allclose(found, numpy_logits(state | ones, TOKENS, act="gelu"), atol=1e-5)


def test_a_tokenizer_in_the_folder_is_used(tmp_path):
    folder = saved(tmp_path / "model")
    byte_tokenizer().save_pretrained(folder)
    assert bc.load_model(folder).tokenizer.eos_token_id == 0


REFUSED = {
    "shortformer_pos": ({"shortformer_pos": True}, "shortformer_pos True"),
    "rotary": ({"positional_embedding_type": "rotary"}, "positional_embedding_type 'rotary'"),
    "parallel": ({"parallel_attn_mlp": True}, "parallel_attn_mlp True"),
    "unscaled": ({"use_attn_scale": False}, "use_attn_scale False"),
    "act_fn": ({"act_fn": "mish"}, "mish"),
    "huge": ({"d_vocab": 10**12}, "hold .* numbers, but its config.json asks for 8,000,000,000,000"),
    "heads": ({"n_heads": 4, "d_head": 2}, r"has shape \(2, 8, 4\)"),
    "layers": ({"n_layers": 1}, "do not fit its config.json"),
    "size": ({"n_ctx": -1}, "n_ctx of .* should be a number of at least 1"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_converted_is_refused_in_one_line(tmp_path, name):
    options, said = REFUSED[name]
    with pytest.raises(ValueError, match=said) as caught:
        bc.load_model(saved(tmp_path / "model", **options))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_weights_are_refused(tmp_path):
    folder = saved(tmp_path / "model")
    for content in ([1, 2], {"a": 1}, {"path": Path("x")}):
        torch.save(content, folder / "final.pth")
        with pytest.raises(ValueError, match=r"tensors by name|cannot be read as weights"):
            bc.load_model(folder)
    torch.save(weights(), folder / "other.pth")
    (folder / "final.pth").unlink()
    assert bc.load_model(folder).cfg.n_layers == 2
    torch.save(weights(), folder / "another.pth")
    with pytest.raises(FileNotFoundError, match=r"one named \.\.\.final\.pth"):
        bc.load_model(folder)
    with pytest.raises(ValueError, match="is for models on the hub"):
        bc.load_model(folder, revision="100")


def test_a_former_repository_is_downloaded_with_a_checkpoint(tmp_path, monkeypatch):
    folder = saved(tmp_path / "model")
    later = weights()
    later["unembed.b_U"] += 1
    (folder / "checkpoints").mkdir()
    torch.save(later, folder / "checkpoints" / "model_200.pth")
    files = [str(file.relative_to(folder)) for file in folder.rglob("*.*")]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name: files)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, **options: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(folder / file))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    last, first = bc.load_model("NeelNanda/tiny"), bc.load_model("NeelNanda/tiny", revision="200")
    torch.testing.assert_close(first.b_U, last.b_U + 1)
    assert first.cfg.revision == "200"
    assert from_legacy_hub("NeelNanda/tiny").tokenizer is None
    with pytest.raises(ValueError, match="number of a training checkpoint"):
        bc.load_model("NeelNanda/tiny", revision="main")
    with pytest.raises(FileNotFoundError, match=r"ends in _7\.pth"):
        bc.load_model("NeelNanda/tiny", revision="7")


def test_a_compiled_model_with_a_numerical_output_or_norms_is_refused():
    for change in ("output_encoder", "layer_norm"):
        assembled, _, _ = tracr_model()
        if change == "layer_norm":
            assembled.model_config.layer_norm = True
        else:
            assembled.output_encoder = object()
        with pytest.raises(ValueError, match="cannot convert this tracr model"):
            from_tracr(assembled)
