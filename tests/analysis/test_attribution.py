import re

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.analysis.attribution import attention_patterns, logit_attribution
from bigram_circuits.analysis.prompts import prompt_tokens, token_word
from bigram_circuits.masking.apply import masked
from bigram_circuits.models.activations import record
from tests.architectures import CONFIGS
from tests.conftest import save_tiny

PROMPT = "the cat sat"


def some_weights(model, seed: int = 0, density: float = 0.5) -> bc.Subnetwork:
    generator = torch.Generator().manual_seed(seed)
    shapes = bc.Subnetwork.full(model).shapes
    return bc.Subnetwork({name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()})


def logits_at(model, position: int = -1) -> torch.Tensor:
    with torch.inference_mode():
        return model(model.to_tokens(PROMPT))[0, position]


@pytest.mark.parametrize("by", ["component", "head"])
def test_contributions_add_up_to_the_logits_of_every_condition(any_model, by):
    subnetwork = some_weights(any_model)
    result = logit_attribution(any_model, subnetwork, PROMPT, answer="o", wrong="e", by=by, position=3)
    assert result.conditions == ("full", "subnetwork", "complement", "random")
    assert result.columns == ("o", "e", "o minus e")
    ids = [any_model.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "oe"]
    full = logits_at(any_model, 3)[ids]
    with masked(any_model, subnetwork):
        reduced = logits_at(any_model, 3)[ids]
    for name, logits in (("full", full), ("subnetwork", reduced)):
        total = result.get("contribution", name).sum(0)
        assert total[:2] == pytest.approx(logits.numpy(), abs=1e-4)
        assert total[2] == pytest.approx(float(logits[0] - logits[1]), abs=1e-4)
        assert list(result.notes["logits"][name].values()) == pytest.approx(logits.tolist(), abs=1e-4)
    assert abs(full - reduced).max() > 0.01


def test_it_agrees_with_transformer_lens_on_folded_weights(any_model, tiny_folders, request):
    from transformer_lens.tools.analysis.direct_logit_attribution import direct_logit_attribution

    folder = tiny_folders[request.node.callspec.params["any_model"]]
    folded = bc.load_model(folder, device="cpu")
    folded.enable_compatibility_mode()
    tokens = any_model.to_tokens(PROMPT)
    theirs = direct_logit_attribution(folded, tokens, answer_tokens=80, incorrect_tokens=70, unit="component")
    ours = logit_attribution(any_model, PROMPT, answer=80, wrong=70)
    difference = dict(zip(ours.rows, ours.get("contribution")[:, 2], strict=True))
    labels = [re.sub(r"(\d+)_(attn|mlp)_out", r"L\1.\2", label) for label in theirs.labels]
    expected = dict(zip(labels, theirs.attribution.flatten().tolist(), strict=True))
    shared = [name for name in difference if name in expected]
    assert [name for name in shared if name.startswith("L")] == ["L0.attn", "L0.mlp", "L1.attn", "L1.mlp"]
    assert "embed" in shared
    # folding moves biases of W_V and of norms within a component, and constants of the logits into b_U
    for name in shared:
        assert difference[name] == pytest.approx(expected[name], abs=1e-4), name
    with pytest.raises(ValueError, match="masks apply to raw weights, but this model is in compatibility mode"):
        logit_attribution(folded, PROMPT)


def test_heads_add_up_to_their_attention(any_model):
    subnetwork = some_weights(any_model)
    by_component = logit_attribution(any_model, subnetwork, PROMPT, answer=80)
    by_head = logit_attribution(any_model, subnetwork, PROMPT, answer=80, by="head")
    for condition in by_component.conditions:
        whole = dict(zip(by_component.rows, by_component.get("contribution", condition)[:, 0], strict=True))
        heads = dict(zip(by_head.rows, by_head.get("contribution", condition)[:, 0], strict=True))
        for layer in range(2):
            parts = [value for name, value in heads.items() if name.startswith((f"L{layer}H", f"L{layer}.attn"))]
            assert sum(parts) == pytest.approx(whole[f"L{layer}.attn"], abs=1e-5)


def test_a_dropped_head_writes_nothing(tiny_model):
    without = bc.Subnetwork.full(tiny_model).drop_head(1, 2)
    result = logit_attribution(tiny_model, without, PROMPT, answer=80, by="head")
    row = result.rows.index("L1H2")
    assert result.get("contribution", "subnetwork")[row, 0] == 0
    assert abs(result.get("contribution")[row, 0]) > 1e-3


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "cohere", "granite", "gemma", "olmo"])
@pytest.mark.parametrize("by", ["component", "head"])
def test_norms_after_attention_offsets_caps_and_scales(tmp_path, name, by):
    """The function checks the sum itself."""
    model = bc.load_model(save_tiny(tmp_path, CONFIGS[name]()), device="cpu")
    result = logit_attribution(model, some_weights(model), PROMPT, by=by)
    for condition in result.conditions:
        total = result.get("contribution", condition).sum()
        assert total == pytest.approx(next(iter(result.notes["logits"][condition].values())), abs=1e-3)


def test_a_model_that_is_no_such_sum_is_refused(tiny_folders):
    model = bc.load_model(tiny_folders["gpt2"], device="cpu")
    model.blocks[1].hook_in.add_hook(lambda value, hook: value * 2, is_permanent=True)
    with pytest.raises(ValueError, match="not the sum of its components' contributions"):
        logit_attribution(model, PROMPT)


@pytest.mark.parametrize("name", ["opt", "openai_gpt"])
def test_models_of_another_build_are_refused_in_one_line(tmp_path, name):
    """OPT with a narrower embedding, and norms that act on the residual stream itself."""
    model = bc.load_model(save_tiny(tmp_path, CONFIGS[name]()), device="cpu")
    with pytest.raises(ValueError, match="this model does not") as refused:
        logit_attribution(model, model.tokenizer(PROMPT)["input_ids"])
    assert "\n" not in str(refused.value)


def test_the_answer_is_the_full_models_own_prediction(tiny_model):
    result = logit_attribution(tiny_model, PROMPT)
    assert result.columns == (token_word(tiny_model, int(logits_at(tiny_model).argmax())),)
    assert result.conditions == ("full",)


def test_attention_patterns(any_model):
    subnetwork = some_weights(any_model)
    result = attention_patterns(any_model, subnetwork, PROMPT, heads=[(1, 3), (0, 0)])
    assert result.conditions[:5] == ("full L1H3", "subnetwork L1H3", "complement L1H3", "random L1H3", "full L0H0")
    assert [row.split(" ", 1)[1] for row in result.rows[-len(PROMPT) :]] == list(PROMPT)
    with torch.inference_mode(), masked(any_model, subnetwork):
        _, cache = any_model.run_with_cache(any_model.to_tokens(PROMPT))
    expected = cache["blocks.1.attn.hook_pattern"][0, 3].numpy()
    assert np.allclose(result.get("attention", "subnetwork L1H3"), expected, atol=1e-6)
    for panel in result.conditions:
        pattern = result.get("attention", panel)
        assert np.allclose(pattern.sum(1), 1, atol=1e-5)
        assert np.allclose(np.triu(pattern, 1), 0)
    assert len(attention_patterns(any_model, [5, 6, 7]).conditions) == 8
    assert result.plot() is not None


def test_bad_input_is_said_in_one_line(tiny_model):
    for change, match in [
        ({"by": "neuron"}, "by must be one of"),
        ({"answer": "xy"}, "'xy' is 2 tokens, but one is needed"),
        ({"answer": 999}, "there is no token 999: ids are 0 to 256"),
        ({"answer": 5, "wrong": 5}, "the same token"),
        ({"position": 50}, "there is no position 50 in a prompt of 1[12] tokens"),
    ]:
        with pytest.raises(ValueError, match=match):
            logit_attribution(tiny_model, PROMPT, **change)
    with pytest.raises(ValueError, match="the prompt is empty"):
        prompt_tokens(tiny_model, "")
    with pytest.raises(ValueError, match=r"one sequence of tokens, .* not \[2, 3\]"):
        prompt_tokens(tiny_model, np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="token ids must be 0 to 256 for this model, but there is 257"):
        prompt_tokens(tiny_model, [1, 257])
    with pytest.raises(ValueError, match="there is no head 4 in layer 1"):
        attention_patterns(tiny_model, PROMPT, heads=[(1, 4)])
    with pytest.raises(ValueError, match="at least one head"):
        attention_patterns(tiny_model, PROMPT, heads=[])
    with pytest.raises(ValueError, match="no activation of that name"):
        record(tiny_model, prompt_tokens(tiny_model, PROMPT), ["blocks.0.nonsense"])
    with pytest.raises(ValueError, match="does not reach the activation"):
        record(tiny_model, prompt_tokens(tiny_model, PROMPT), ["blocks.0.attn.qkv.hook_out"])
