"""Models that TransformerLens builds itself (`TransformerBridge.boot_native`): plain modules without files.

Their settings are in `cfg` instead of a Hugging Face `config`, and they return logits instead of an output with names.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bigram_circuits.models.model import Model

_WRAPPED = (("_original_component.", ""), ("parametrizations.weight.original", "weight"))


def is_native(plain: Any) -> bool:
    """Whether a module, hooked or not, is a `NativeModel` of TransformerLens."""
    return any(kind.__name__ == "NativeModel" for kind in type(plain).__mro__)


def build(cfg: Any, **changed: Any) -> Any:
    """Build a `NativeModel` of a configuration, with some of its settings changed; its weights mean nothing yet."""
    from transformer_lens.model_bridge.sources.native import NativeModel

    cfg = copy.deepcopy(cfg)
    for name, value in changed.items():
        setattr(cfg, name, value)
    return NativeModel(cfg)


def with_tensors(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Give a `NativeModel` these tensors, by its own names, in their precision; it shares their storage.

    A `head.bias` is added if there is one: `NativeModel` has none, but checkpoints may have a bias of the unembedding.

    Raises:
        ValueError: If a parameter has no tensor, a tensor no parameter, or a shape is another.
    """
    if "head.bias" in tensors and plain.head.bias is None:
        plain.head.bias = nn.Parameter(torch.zeros(plain.head.out_features))
    wanted = dict(plain.named_parameters())
    for name in (*wanted, *tensors):
        here, there = wanted.get(name), tensors.get(name)
        if here is None or there is None or here.shape != there.shape:
            shapes = [None if one is None else tuple(one.shape) for one in (there, here)]
            raise ValueError(
                f"the weight {name} has shape {shapes[0]} but should have {shapes[1]} by its configuration"
            )
        here.data = there.detach()
    return plain


def untrained(plain: Any, seed: int) -> Any:
    """A model of the configuration of `plain` and in its precision, initialised as that says (`init_mode`)."""
    from transformer_lens.model_bridge.sources.native import initialize_native_model

    other = build(plain.cfg)
    if plain.head.bias is not None:
        other.head.bias = nn.Parameter(torch.zeros_like(plain.head.bias))
    initialize_native_model(other, other.cfg, seed=seed)
    return other.to(next(plain.parameters()).dtype)


def rebuilt(model: Model) -> Any:
    """The plain model behind a hooked one that `boot_native` made: built again, over the same tensors."""
    wrapped = model.original_model
    tensors = {_plain_name(name): parameter for name, parameter in wrapped.named_parameters()}
    bias = getattr(model, "b_U", None)  # TransformerLens adds one, of zeros
    if bias is not None and bool(bias.any()):
        tensors["head.bias"] = bias
    return with_tensors(build(wrapped.cfg), tensors).eval()


def _plain_name(name: str) -> str:
    for found, instead in _WRAPPED:
        name = name.replace(found, instead)
    return name
