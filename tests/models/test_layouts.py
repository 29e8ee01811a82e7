"""What the tracing of layouts refuses; what it gets right is in test_architectures.py."""

import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.models import layouts


def refused_after(monkeypatch, model, change):
    """The error when the traced model's weights do not hold the numbers of one regular part of a parameter."""
    hook = layouts.hook

    def changed_hook(small, **options):
        bridge = hook(small, **options)
        with torch.no_grad():
            change({site.name.rsplit(".", 1)[1]: site.original for site in bc.weight_sites(bridge)})
        return bridge

    monkeypatch.setattr(layouts, "hook", changed_hook)
    with pytest.raises(ValueError, match="cannot trace the Hugging Face layout of GPTNeoXForCausalLM: ") as error:
        bc.huggingface_layout(model)
    assert "\n" not in str(error.value)
    return str(error.value)


def swap_rows(weight):
    weight[[5, 9]] = weight[[9, 5]].clone()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: swap_rows(weights["W_K"]), "blocks.0.attn.W_K is not a regular part of one parameter"),
        (lambda weights: weights["W_in"].mul_(0.5), "blocks.0.mlp.W_in"),
        (lambda weights: weights["W_in"].sub_(1e6), "blocks.0.mlp.W_in is computed from its parameters"),
        (lambda weights: weights["W_Q"].copy_(weights["W_V"]), "that are used twice"),
        (lambda weights: weights["W_in"].copy_(weights["W_in"].flip(0)), "in its order"),
    ],
)
def test_what_is_not_one_regular_part_of_a_parameter_is_refused(tiny_model, monkeypatch, change, said):
    assert said in refused_after(monkeypatch, tiny_model, change)


def test_canonical_masks_that_do_not_fit_are_refused_by_name(tiny_model):
    layout = bc.huggingface_layout(tiny_model)
    masks = dict(bc.Subnetwork.full(tiny_model))
    assert set(layout.to_huggingface(masks)) == set(layout.shapes)
    with pytest.raises(ValueError, match=r"blocks.0.attn.W_Q has shape \(24, 4, 6\) but should have \(4, 24, 6\)"):
        layout.to_huggingface(masks | {"blocks.0.attn.W_Q": torch.ones(24, 4, 6, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"unknown by canonical name: blocks.9.attn.W_Q"):
        layout.to_huggingface(masks | {"blocks.9.attn.W_Q": torch.ones(4, 24, 6, dtype=torch.bool)})
    del masks["blocks.1.mlp.W_in"]
    with pytest.raises(ValueError, match=r"missing by canonical name: blocks.1.mlp.W_in"):
        layout.to_huggingface(masks)
