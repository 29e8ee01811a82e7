"""Dictionaries in SAELens' folders, against their formulas in NumPy; and what cannot be read."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import bigram_circuits as bc

D_IN, D_SAE, D_OUT = 6, 10, 5
NEW = {"metadata": {"hook_name": "blocks.1.hook_resid_post", "model_name": "gpt2", "sae_lens_version": "6.21.0"}}


def random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def weights(d_out=D_IN):
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, d_out), "b_dec": (d_out,)}
    return {name: random(*shape) for name, shape in shapes.items()}


def save(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    usual = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False}
    (folder / "cfg.json").write_text(json.dumps(usual | NEW | {"normalize_activations": "none"} | config))
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def relu(x):
    return np.maximum(x, 0)


THRESHOLD = np.abs(random(D_SAE, seed=1))
GATED = {"b_mag": random(D_SAE, seed=2), "b_gate": random(D_SAE, seed=3), "r_mag": random(D_SAE, seed=4)}
W, X = weights(), random(2, 3, D_IN, seed=5)
PRE = X @ W["W_enc"] + W["b_enc"]
NORMS = np.linalg.norm(W["W_dec"], axis=1)


def largest(h, k):
    kept = np.zeros_like(h)
    for place in np.ndindex(h.shape[:-1]):
        for latent in sorted(range(h.shape[-1]), key=lambda index: -h[place][index])[:k]:
            kept[place][latent] = max(h[place][latent], 0)
    return kept


def of_gated(x):
    gates = x @ W["W_enc"] + GATED["b_gate"] > 0
    return np.where(gates, relu(x @ (W["W_enc"] * np.exp(GATED["r_mag"])) + GATED["b_mag"]), 0)


# name -> (tensors, settings, latents of X in NumPy, reconstruction of latents in NumPy)
CASES = {
    "standard": (W, {"architecture": "standard"}, relu(PRE), lambda f: f @ W["W_dec"] + W["b_dec"]),
    "with b_dec subtracted": (
        W,
        {"architecture": "standard", "apply_b_dec_to_input": True},
        relu((X - W["b_dec"]) @ W["W_enc"] + W["b_enc"]),
        lambda f: f @ W["W_dec"] + W["b_dec"],
    ),
    "gated": (
        {name: value for name, value in W.items() if name != "b_enc"} | GATED,
        {"architecture": "gated"},
        of_gated(X),
        lambda f: f @ W["W_dec"] + W["b_dec"],
    ),
    "jumprelu": (
        W | {"threshold": THRESHOLD},
        {"architecture": "jumprelu"},
        np.where(PRE > THRESHOLD, PRE, 0),
        lambda f: f @ W["W_dec"] + W["b_dec"],
    ),
    "topk": (W, {"architecture": "topk", "k": 3}, largest(PRE, 3), lambda f: f @ W["W_dec"] + W["b_dec"]),
    "topk, rescaled": (
        W,
        {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True},
        largest(PRE * NORMS, 4),
        lambda f: f / NORMS @ W["W_dec"] + W["b_dec"],
    ),
    "batchtopk, in training": (
        W | {"topk_threshold": np.array(0.7)},
        {"architecture": "batchtopk", "k": 4},
        np.where(PRE * NORMS > 0.7, PRE * NORMS, 0),
        lambda f: f @ (W["W_dec"] / NORMS[:, None]) + W["b_dec"],
    ),
    "matryoshka, not rescaled": (
        W | {"topk_threshold": np.array(0.3)},
        {"architecture": "matryoshka_batchtopk", "k": 4.0, "rescale_acts_by_decoder_norm": False},
        np.where(PRE > 0.3, PRE, 0),
        lambda f: f @ W["W_dec"] + W["b_dec"],
    ),
    "rescaled to a constant norm": (
        W,
        {"architecture": "standard", "normalize_activations": "constant_norm_rescale"},
        relu(X * np.sqrt(D_IN) / np.linalg.norm(X, axis=-1, keepdims=True) @ W["W_enc"] + W["b_enc"]),
        lambda f: (f @ W["W_dec"] + W["b_dec"]) * np.linalg.norm(X, axis=-1, keepdims=True) / np.sqrt(D_IN),
    ),
    "layer norm": (
        W,
        {"architecture": "standard", "normalize_activations": "layer_norm"},
        relu((X - X.mean(-1, keepdims=True)) / (X.std(-1, ddof=1, keepdims=True) + 1e-5) @ W["W_enc"] + W["b_enc"]),
        lambda f: (f @ W["W_dec"] + W["b_dec"]) * X.std(-1, ddof=1, keepdims=True) + X.mean(-1, keepdims=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_formulas(tmp_path, name):
    tensors, config, latents, reconstruction = CASES[name]
    found = bc.load_dictionary(save(tmp_path / "sae", tensors, **config))
    assert (found.d_in, found.d_sae, found.d_out) == (D_IN, D_SAE, D_IN)
    assert found.place == found.hook_name == "blocks.1.hook_resid_post"
    assert found.hook_name_out is None
    encoded = found.encode(torch.from_numpy(X))
    np.testing.assert_allclose(encoded, latents, rtol=1e-4, atol=1e-5)
    assert 0 < (latents > 0).mean() < 1
    decoded = found.decode(encoded, torch.from_numpy(X))
    np.testing.assert_allclose(decoded, reconstruction(latents), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["transcoder", "jumprelu_transcoder"])
def test_transcoders_write_elsewhere(tmp_path, architecture):
    tensors = weights(D_OUT) | ({"threshold": THRESHOLD} if "jumprelu" in architecture else {})
    metadata = {"hook_name": "blocks.0.ln2.hook_normalized", "hook_name_out": "blocks.0.hook_mlp_out"}
    folder = save(tmp_path / "transcoder", tensors, architecture=architecture, d_out=D_OUT, metadata=metadata)
    found = bc.load_dictionary(str(folder))
    assert found.place == ("blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out")
    latents = np.where(tensors.get("threshold", 0) < PRE, PRE, 0)
    np.testing.assert_allclose(found.encode(torch.from_numpy(X)), latents, rtol=1e-4, atol=1e-5)
    decoded = latents @ tensors["W_dec"] + tensors["b_dec"]
    np.testing.assert_allclose(found.decode(torch.from_numpy(latents)), decoded, rtol=1e-4, atol=1e-4)
    assert "blocks.0.ln2.hook_normalized to blocks.0.hook_mlp_out" in repr(found)


def former(folder, **config):
    """A folder as SAELens wrote it before version 6: all settings at one level."""
    folder.mkdir(exist_ok=True)
    usual = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "hook_layer": 1, "hook_head_index": None}
    (folder / "cfg.json").write_text(json.dumps(usual | config))
    save_file(W | {"scaling_factor": np.ones(D_SAE, np.float32)}, folder / "sae_weights.safetensors")
    return folder


def test_folders_of_earlier_versions(tmp_path):
    found = bc.load_dictionary(
        former(tmp_path / "a", hook_point="blocks.1.hook_resid_pre", normalize_activations=False)
    )
    assert (found.architecture, found.hook_name, found.subtract_b_dec) == ("standard", "blocks.1.hook_resid_pre", True)
    of_k = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}, "apply_b_dec_to_input": False}
    found = bc.load_dictionary(
        former(tmp_path / "b", hook_name="blocks.0.attn.hook_z", normalize_activations=None, **of_k)
    )
    assert (found.architecture, found.k, found.subtract_b_dec) == ("topk", 2, False)


def test_half_precision_becomes_float32(tmp_path):
    folder = save(tmp_path / "sae", W, architecture="standard")
    halved = {name: torch.from_numpy(value).bfloat16() for name, value in W.items()}
    save_torch(halved, folder / "sae_weights.safetensors")
    found = bc.load_dictionary(folder)
    assert torch.equal(found.W_enc, halved["W_enc"].float())
    assert found.encode(torch.from_numpy(X).bfloat16()).dtype == torch.float32


# --- what cannot be read ---


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*cfg\.json"):
        bc.load_dictionary(tmp_path)
    (save(tmp_path / "sae", W, architecture="standard") / "sae_weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*sae_weights\.safetensors"):
        bc.load_dictionary(tmp_path / "sae")


KNOWN = "not one of standard, gated, jumprelu, topk, batchtopk, transcoder, jumprelu_transcoder"


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (W, {"architecture": "crosscoder"}, f"its architecture is 'crosscoder', {KNOWN}"),
        (W, {"architecture": ["standard"]}, KNOWN),
        (W, {"architecture": "skip_transcoder"}, "skip_transcoder"),
        (W, {"activation_fn": "tanh-relu"}, "activation function is 'tanh-relu', not relu or topk"),
        (W, {"normalize_activations": "expected_average_only_in"}, "by a factor that is not in the folder"),
        (W, {"normalize_activations": True}, "by a factor that is not in the folder"),
        (W, {"normalize_activations": "whiten"}, "normalize_activations must be one of none, .*, not 'whiten'"),
        (W, {"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        (W, {"hook_head_index": 3}, "it is of the head 3 alone"),
        (W, {"d_in": 7}, "says d_in 7, but its tensors 6"),
        (W, {"d_sae": None}, "its d_sae should be a whole number, not None"),
        (W, {"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input should be true or false, not 'yes'"),
        (W, {"metadata": {"hook_name": 3}}, "hook_name should be the name of a hook point, not 3"),
        (W, {"metadata": []}, "should be a record with names"),
        (W, {"architecture": "topk"}, "its k should be a whole number, not None"),
        (W, {"architecture": "topk", "k": 11}, "k must be 1 to 10, the number of latents, not 11"),
        (W, {"architecture": "jumprelu"}, "lacks the tensor 'threshold': a jumprelu dictionary has W_enc, b_enc"),
        (W | {"W_skip": random(2)}, {}, "has the unknown tensor 'W_skip'"),
        (W | {"scaling_factor": 2 * np.ones(D_SAE)}, {}, "has the unknown tensor 'scaling_factor'"),
        (W | {"b_enc": random(D_SAE + 1)}, {}, r"b_enc has shape \[11\], but should have \[10\]"),
        (W | {"W_dec": random(D_SAE + 1, D_IN)}, {}, r"W_dec has shape \[11, 6\], but should have \[10, 6\]"),
        (W | {"W_enc": random(D_IN)}, {}, r"W_enc should be \[d_in, d_sae\]"),
        (W | {"b_dec": W["b_dec"] * np.nan}, {}, "b_dec has 6 values that are no finite numbers"),
        (weights(D_OUT), {"apply_b_dec_to_input": True}, "b_dec cannot be subtracted"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_read(tmp_path, tensors, config, words):
    folder = save(tmp_path / "sae", tensors, **config)
    with pytest.raises(ValueError, match=words) as caught:
        bc.load_dictionary(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_damaged_files(tmp_path, name):
    folder = save(tmp_path / "sae", W)
    (folder / name).write_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        bc.load_dictionary(folder)
    assert "\n" not in str(caught.value)


def test_a_dictionary_of_tensors():
    tensors = {name: torch.from_numpy(value) for name, value in W.items()}
    found = bc.Dictionary("standard", **tensors)
    for call, words in (
        (lambda: found.place, "does not say at which hook point"),
        (lambda: found.encode(torch.zeros(2, 7)), "reads activations of width 6, not 7"),
        (lambda: found.decode(torch.zeros(2, 7)), "has 10 latents, not 7"),
        (lambda: bc.Dictionary("jumprelu", **tensors), "of the architecture jumprelu needs threshold"),
        (lambda: bc.Dictionary("sparse", **tensors), "must be one of standard, gated"),
        (
            lambda: bc.Dictionary("standard", **tensors, normalize_activations="layer_norm").decode(torch.zeros(2, 10)),
            "give decode those that were encoded",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert torch.equal(found.to("cpu").W_dec, found.W_dec)
    assert repr(found) == "Dictionary(standard: 10 latents)"
