"""What latents write, in tokens: against NumPy on Hugging Face's weights."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits import analysis
from bigram_circuits.analysis.prompts import token_word
from tests.conftest import TINY_CONFIGS


def a_dictionary(d_out=24, **more):
    draw = np.random.default_rng(0)
    shapes = {"W_enc": (24, 11), "b_enc": (11,), "W_dec": (11, d_out), "b_dec": (d_out,)}
    tensors = {name: torch.from_numpy(draw.standard_normal(shape)).float() for name, shape in shapes.items()}
    return bc.Dictionary("standard", **tensors, **more)


class Linear:
    """Any dictionary with a linear decoder."""

    def __init__(self, like):
        self.like = like

    def encode(self, x):
        return self.like.encode(x)

    def decode(self, f):
        return self.like.decode(f)


@pytest.mark.parametrize("architecture", list(TINY_CONFIGS))
def test_tokens_are_those_of_the_decoder_directions(tiny_folders, architecture):
    model = bc.load_model(tiny_folders[architecture], device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(tiny_folders[architecture])
    norm, dictionary = (
        plain.base_model.get_submodule({"gpt2": "ln_f", "gpt_neox": "final_layer_norm", "llama": "norm"}[architecture]),
        a_dictionary(),
    )
    directions = dictionary.W_dec.double().numpy()
    if architecture != "llama":  # an RMSNorm does not centre
        directions = directions - directions.mean(1, keepdims=True)
    directions = directions / np.sqrt((directions**2).mean(1, keepdims=True)) * norm.weight.detach().double().numpy()
    logits = directions @ plain.get_output_embeddings().weight.detach().double().numpy().T
    found = analysis.feature_tokens(model, dictionary, top=4)
    assert np.array_equal(found.tokens, np.argsort(-logits, axis=1)[:, :4])
    np.testing.assert_allclose(found.logits, -np.sort(-logits, axis=1)[:, :4], rtol=1e-3)
    again = analysis.feature_tokens(model, Linear(dictionary), top=4)
    assert np.array_equal(again.tokens, found.tokens)


def test_names(tiny_model):
    found = analysis.feature_tokens(tiny_model, a_dictionary(), top=2)
    first, second = found.words[7]
    assert found.name(7) == f"feature 7: {first!r}, {second!r}"
    assert len(found) == 11
    assert repr(found).startswith("FeatureTokens(11 features; feature 0: ")
    assert first == token_word(tiny_model, int(found.tokens[7, 0]))
    with pytest.raises(ValueError, match="no feature 11: there are 0 to 10"):
        found.name(11)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "tokenizer", None)
        assert analysis.feature_tokens(tiny_model, a_dictionary()).words[3][0].isdigit()


def test_errors(tiny_model):
    for call, words in (
        (lambda: analysis.feature_tokens(tiny_model, a_dictionary(), top=0), "top must be from 1 to 257, .* not 0"),
        (lambda: analysis.feature_tokens(tiny_model, a_dictionary(), top=258), "not 258"),
        (
            lambda: analysis.feature_tokens(tiny_model, a_dictionary(40)),
            "writes 40 numbers, not to the residual",
        ),
        (
            lambda: analysis.feature_tokens(tiny_model, a_dictionary(hook_name="blocks.0.attn.hook_z")),
            "writes 24 numbers at blocks.0.attn.hook_z, not to the residual stream",
        ),
        (lambda: analysis.feature_tokens("gpt2", a_dictionary()), "a str is not a model"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
