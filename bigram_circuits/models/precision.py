"""Hooked models in 16 bits: rotated queries and keys are rounded, as Hugging Face does.

Tables of rotary embeddings are in float32 in some architectures (OLMo, CodeGen), and TransformerLens leaves queries and
keys in float32 after the rotation: without a key-value cache the forward pass then fails, and with one it computes the
rest of attention in another precision than Hugging Face.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from bigram_circuits.models.model import Model


def round_rotations(model: Model) -> None:
    """Make a hooked model's attention round queries and keys to the precision of its weights after their rotation."""
    from transformer_lens.model_bridge.generalized_components import CodeGenAttentionBridge

    for block in getattr(model, "blocks", ()):
        attention = getattr(block, "attn", None)
        for name in ("hook_rot_q", "hook_rot_k"):
            point, leaf = getattr(attention, name, None), getattr(getattr(attention, "q", None), "weight", None)
            if point is not None and leaf is not None:
                point.__dict__["forward"] = functools.partial(_rounded, point.forward, leaf.dtype)
        if isinstance(attention, CodeGenAttentionBridge):
            cached = attention._update_kv_cache  # pyright: ignore[reportPrivateUsage]
            attention.__dict__["_update_kv_cache"] = functools.partial(_cached, cached)


def _rounded(forward: Any, dtype: Any, value: Tensor) -> Tensor:
    return forward(value.to(dtype))


def _cached(update: Any, keys: Tensor, values: Tensor, **options: Any) -> Any:
    return update(keys.to(values.dtype), values, **options)
