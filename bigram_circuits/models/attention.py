"""Attention by PyTorch's fused kernel where nothing looks at its scores or patterns, which are then never written down.

TransformerLens computes attention step by step, for its hooks, and keeps the last pattern of every layer. Where none of
these hooks is in use, and the kernel computes the same, it takes the place of these steps; everywhere else, what
TransformerLens does is done. Of architectures whose attention TransformerLens leaves to Hugging Face, nothing changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bigram_circuits.models.model import Model

_SEEN = {"hook_in", "hook_out", "hook_hidden_states"}  # hook points that are reached all the same


def fused_forwards(model: Model) -> dict[nn.Module, Callable[..., Any]]:
    """Return forward functions for the attention of every block that has one that can be fused.

    Whether it is, each decides at every call.
    """
    from transformer_lens.model_bridge.generalized_components import (
        JointQKVAttentionBridge,
        JointQKVPositionEmbeddingsAttentionBridge,
        PositionEmbeddingsAttentionBridge,
    )

    kinds: tuple[Any, ...] = (JointQKVAttentionBridge, JointQKVPositionEmbeddingsAttentionBridge)
    joint = {one._reconstruct_attention for one in kinds}
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for block in model.blocks:
        attention: Any = getattr(block, "attn", None)
        kind: Any = type(attention)
        if getattr(kind, "forward", None) is JointQKVAttentionBridge.forward:
            if kind._reconstruct_attention in joint and not getattr(attention, "_reorder_and_upcast_attn", False):
                forwards[attention] = functools.partial(_fused, _joint, attention)
        elif getattr(kind, "forward", None) is PositionEmbeddingsAttentionBridge.forward:
            plain = attention.original_component
            capped = any(getattr(plain, name, None) is not None for name in ("attn_logit_softcapping", "sinks"))
            if getattr(model.original_model, "_supports_sdpa", False) and not capped:
                forwards[attention] = functools.partial(_fused, _of_hugging_face, attention)
    return forwards


def _fused(fused: Callable[..., Tensor], attention: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the fused function, or, unless it is sure to do the same, TransformerLens'."""
    config = attention.config
    hidden = args[0] if args else kwargs.get("hidden_states")
    if (
        not isinstance(hidden, Tensor)
        or hidden.device.type not in ("cpu", "cuda")
        or len(args) > 1
        or attention.training
        or attention.compatibility_mode
        or any(kwargs.get(name) is not None for name in ("past_key_values", "layer_past", "query_input", "head_mask"))
        or kwargs.get("output_attentions")
        or any(getattr(config, name, False) for name in ("use_attn_result", "use_split_qkv_input", "use_attn_in"))
        or getattr(config, "scale_attn_by_inverse_layer_idx", False)
        or any(_is_watched(point) for name, point in attention.named_children() if name not in _SEEN)
    ):
        return type(attention).forward(attention, *args, **kwargs)
    return fused(attention, hidden, **{name: value for name, value in kwargs.items() if name != "hidden_states"})


def _is_watched(module: Any) -> bool:
    """Whether this is a hook point in use."""
    is_point = hasattr(module, "fwd_hooks")
    return is_point and bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def _joint(attention: Any, hidden: Tensor, **kwargs: Any) -> Any:
    """Attention whose queries, keys and values Hugging Face computes at once, as `_reconstruct_attention` does it."""
    hidden = attention.hook_in(hidden)
    heads = attention.config.n_heads
    groups = getattr(attention.config, "n_key_value_heads", None) or heads
    parts = (attention.q(hidden), attention.k(hidden), attention.v(hidden))
    query, key, value, batch, length, width = attention._reshape_qkv_to_heads(*parts, heads, groups)
    rotation = kwargs.get("position_embeddings")
    if isinstance(rotation, tuple) and hasattr(attention, "_apply_rotary_pos_emb"):
        query, key = attention._apply_rotary_pos_emb(query, key, *rotation)
    mask = attention._apply_reconstruct_attention_mask(
        attn_scores=query.new_zeros(1, 1, length, length),
        attention_mask=kwargs.get("attention_mask"),
        seq_len=length,
        q_seq_len=length,
    )
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=width**-0.5, enable_gqa=groups != heads
    )
    output = attention._reshape_attn_output(output, batch, length, heads, width)
    return attention._process_output((attention._apply_output_projection(output), None))


def _of_hugging_face(attention: Any, hidden: Tensor, **kwargs: Any) -> Any:
    """Hugging Face's own forward function, whose projections are those with hooks, by the fused kernel."""
    plain = attention.original_component
    config, usual = plain.config, plain.config._attn_implementation
    config._attn_implementation = "sdpa"
    try:
        output = plain(attention.hook_in(hidden), **kwargs)[0]
    finally:
        config._attn_implementation = usual
    return attention.hook_out(output), None
