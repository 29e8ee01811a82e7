"""Scores of attention heads, against Hugging Face's attention patterns and NumPy."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits import analysis
from tests.conftest import TINY_CONFIGS


@pytest.mark.parametrize("architecture", list(TINY_CONFIGS))
def test_scores_are_means_of_attention(tiny_folders, architecture):
    model = bc.load_model(tiny_folders[architecture], device="cpu")
    found = analysis.head_scores(model, prompts=3, period=5, seed=1)
    tokens = analysis.repeated_random_tokens(model, prompts=3, period=5, seed=1).tokens
    plain = AutoModelForCausalLM.from_pretrained(tiny_folders[architecture], attn_implementation="eager")
    with torch.no_grad():
        layers = plain(torch.from_numpy(tokens.astype(np.int64)), output_attentions=True).attentions
    for layer, attention in enumerate(attention.numpy() for attention in layers):
        for name, back in (("induction", 4), ("duplicate_token", 5), ("previous_token", 1), ("first_position", None)):
            to = [
                [attention[:, head, at, 0 if back is None else at - back] for at in range(6, 11)] for head in range(4)
            ]
            np.testing.assert_allclose(found.get(name, "full")[layer], np.mean(to, (1, 2)), rtol=1e-4)


def test_the_reference_model_has_an_induction_circuit(reference_model):
    found = analysis.head_scores(reference_model, prompts=4)
    assert found.get("previous_token", "full")[2, 2] > 0.9
    assert found.get("induction", "full")[3, 3] > 0.9


def test_scores_of_a_subnetwork(tiny_model):
    found = analysis.head_scores(tiny_model, bc.Subnetwork.empty(tiny_model), prompts=2, period=4)
    assert found.conditions == ("full", "subnetwork", "complement", "random")
    with pytest.raises(ValueError, match="period must be"):
        analysis.head_scores(tiny_model, period=1)
