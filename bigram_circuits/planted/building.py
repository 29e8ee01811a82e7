"""What planted models share: the plain model that is filled in, its norms, and the hooked model that comes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bigram_circuits.models.hooking import hook
from bigram_circuits.models.loading import load_model
from bigram_circuits.models.model import Model
from bigram_circuits.models.quiet import quiet_transformers

N_HEADS = 4
WRITING = ("c_proj.weight", "dense.weight", "4h_to_h.weight", "o_proj.weight", "down_proj.weight")
"""Ends of the names of Hugging Face parameters that write to the residual stream."""


def check(wanted: Mapping[str, tuple[Any, bool, str]]) -> None:
    """Raise ValueError for the first argument, name -> (value, whether it is right, what it must be), that is wrong."""
    for name, (value, holds, words) in wanted.items():
        if not holds:
            raise ValueError(f"{name} must be {words}, not {value!r}")


def plain_model(architecture: str, d_vocab: int, d_model: int, d_mlp: int, n_layers: int, n_positions: int) -> Any:
    """Build a model of an architecture (`gpt2`, `neox`, `llama`), whose parameters are to be set."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

    shared: dict[str, Any] = {
        "vocab_size": d_vocab, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    sizes: dict[str, Any] = {
        "hidden_size": d_model, "num_hidden_layers": n_layers, "num_attention_heads": N_HEADS,
        "intermediate_size": d_mlp, "max_position_embeddings": n_positions,
    }  # fmt: skip
    if architecture == "gpt2":
        old: dict[str, Any] = {
            "n_embd": d_model,
            "n_layer": n_layers,
            "n_head": N_HEADS,
            "n_inner": d_mlp,
            "n_positions": n_positions,
        }
        config = GPT2Config(**shared, **old)
    else:
        config = {"neox": GPTNeoXConfig, "llama": LlamaConfig}[architecture](**shared, **sizes)
    with torch.random.fork_rng():
        return AutoModelForCausalLM.from_config(config)


def blocks(plain: Any) -> Any:
    """Return the blocks."""
    return plain.base_model.h if plain.config.model_type == "gpt2" else plain.base_model.layers


def norms(plain: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Return the two norms of every block, and the final norm."""
    names = ("ln_1", "ln_2") if plain.config.model_type == "gpt2" else ("input_layernorm", "post_attention_layernorm")
    last = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm", "llama": "norm"}[plain.config.model_type]
    first, second = names
    pairs = [(getattr(block, first), getattr(block, second)) for block in blocks(plain)]
    return pairs, getattr(plain.base_model, last)


def set_norm(
    norm: Any, stream: Float[Tensor, " d_model"], factor: float, unread: Float[Tensor, " d_model"] | None = None
) -> None:
    """Set a norm's weight (and bias, if any) such that it multiplies a stream by a factor.

    Coordinates where `unread` is not 0 come out as 0.
    """
    subtracted = stream.mean().item() if getattr(norm, "bias", None) is not None else 0.0
    eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", 0.0)
    divided = math.sqrt((stream - subtracted).square().mean().item() + eps)
    norm.weight.fill_(factor * divided)
    if subtracted:
        norm.bias.fill_(factor * subtracted)
    if unread is not None:
        norm.weight[unread != 0] = 0.0
        if getattr(norm, "bias", None) is not None:
            norm.bias[unread != 0] = 0.0


def hooked(plain: Any, d_vocab: int, name: str, folder: str | Path | None) -> Model:
    """Return the hooked model, with a tokenizer; saved in a folder and loaded from there, if one is given."""
    tokenizer = _tokenizer(d_vocab)
    if folder is None:
        return hook(plain, tokenizer=tokenizer, name=name)
    with quiet_transformers():
        plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(folder, device="cpu")


def _tokenizer(n: int) -> Any:
    """Build a tokenizer with one word per token: `<|endoftext|>` (token 0), `a` to `z`, `aa` to `az`, and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({_word(index): index for index in range(n)}, unk_token=_word(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict.fromkeys(("bos_token", "eos_token", "unk_token"), _word(0))
    )


def _word(index: int) -> str:
    """Return the word of a token, its index in bijective base 26."""
    if index == 0:
        return "<|endoftext|>"
    letters = ""
    while index:
        index, letter = divmod(index - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return letters
