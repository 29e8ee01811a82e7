"""Models that are objects in memory: which of them can be hooked, and what to do about the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from bigram_circuits.models.converted import from_tracr, is_tracr
from bigram_circuits.models.hooking import hook
from bigram_circuits.models.model import Model
from bigram_circuits.models.native import is_native
from bigram_circuits.models.plain import HOOKS, twin
from bigram_circuits.models.quantised import check_module
from bigram_circuits.models.state import check_model
from bigram_circuits.names import name_in_memory

_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def hook_object(
    given: Any, *, tokenizer: Any, device: str | torch.device | None, dtype: torch.dtype | None, check: bool
) -> Model:
    """Hook a model that is an object in memory; see `load_model`.

    Args:
        given: A Hugging Face causal language model or TransformerLens' `NativeModel`, also compiled, or a
            `TransformerBridge`, which is returned as it is.
        tokenizer: A Hugging Face tokenizer, or None.
        device: Where to copy the weights to; None: they stay where they are, and are shared.
        dtype: Precision to copy the weights to; None: they stay as they are, and are shared.
        check: Compare the hooked model with the plain one.

    Raises:
        ValueError: If it is no language model, or one that cannot be hooked as it is.
    """
    if hasattr(given, "cfg") and hasattr(given, "run_with_hooks"):
        return _as_it_is(given, tokenizer, device, dtype)
    if is_tracr(given):
        check_tokenizer(tokenizer)
        plain = from_tracr(given).model.to(device=device, dtype=dtype)
        return hook(plain, tokenizer=tokenizer, name=name_in_memory("tracr"), check=check)
    plain = getattr(given, "_orig_mod", given)  # what torch.compile wraps
    if not is_native(plain):
        _check_kind(plain)
    check_module(plain)
    check_tokenizer(tokenizer)
    _check_weights(plain)
    _check_hooks(plain)
    if device is not None or dtype is not None:
        plain = twin(plain).to(device=device, dtype=dtype)
    return hook(plain, tokenizer=tokenizer, name=name_in_memory(_label(plain)), check=check)


def _as_it_is(bridge: Any, *options: Any) -> Model:
    """A `TransformerBridge` of the user's, which has its own tokenizer, device and precision."""
    check_model(bridge)
    if any(option is not None for option in options):
        raise ValueError(
            f"a {type(bridge).__name__} is hooked already, with a tokenizer, device and dtype of its own: leave these "
            "options out"
        )
    return bridge


def _check_kind(plain: Any) -> None:
    from transformers import PreTrainedModel

    kind = type(plain).__name__
    if hasattr(plain, "merge_and_unload"):
        raise ValueError(f"a {kind} has adapters beside its weights: pass model.merge_and_unload()")
    if kind in _WRAPPERS:
        raise ValueError(f"a {kind} wraps a model: pass model.module")
    if not isinstance(plain, nn.Module) and isinstance(getattr(plain, "model", None), nn.Module):
        raise ValueError(f"a {kind} holds a model: pass its .model, with tokenizer=")
    if not isinstance(plain, PreTrainedModel):
        raise ValueError(
            f"a {kind} is not a model: give 'reference', a hub id, a folder, a Hugging Face causal language model with "
            f"its tokenizer=, or a TransformerBridge"
        )
    if plain.get_output_embeddings() is None:
        raise ValueError(f"a {kind} has no unembedding: load the checkpoint with AutoModelForCausalLM")


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ValueError unless `tokenizer` is one of transformers, or None."""
    from transformers import PreTrainedTokenizerBase

    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"tokenizer must be a Hugging Face tokenizer, not a {type(tokenizer).__name__} (a tokenizers.Tokenizer can "
            f"be wrapped: PreTrainedTokenizerFast(tokenizer_object=...))"
        )


def _check_weights(plain: Any) -> None:
    """Raise ValueError unless all weights are there, on one device, and plain numbers."""
    kind = type(plain).__name__
    devices: dict[str, str] = {}
    for name, parameter in plain.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(
                f"this {kind} has no weights: {name} is on the meta device; load it with from_pretrained, without "
                f"device_map='meta'"
            )
        if "lora_" in name:
            raise ValueError(f"this {kind} has an adapter beside its weights ({name}): merge it first (peft)")
        devices.setdefault(str(parameter.device), name)
    if len(devices) > 1:
        (first, one), (second, other) = list(devices.items())[:2]
        raise ValueError(
            f"this {kind} is split over devices ({one} is on {first}, {other} on {second}): move it to one with "
            f"model.to(...), or load it without device_map"
        )
    for name, module in plain.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"a weight of this {kind} is computed by a parametrization, in {name}: make it permanent with "
                f"torch.nn.utils.parametrize.remove_parametrizations"
            )


def _check_hooks(plain: Any) -> None:
    """Raise ValueError if another library's hooks take part in the forward pass."""
    for name, module in plain.named_modules():
        hooks = [found for kind in HOOKS for found in getattr(module, kind).values() if not _is_of_transformers(found)]
        if hasattr(module, "_hf_hook"):
            hooks.append(module._hf_hook)
        if hooks:
            where = f"its module {name}" if name else "it"
            raise ValueError(
                f"this {type(plain).__name__} has hooks of its own ({where} has {_kind_of(hooks[0])}), which change "
                f"what it computes: remove them before loading it (hook handles have .remove(); accelerate has "
                f"remove_hook_from_submodules; torch.nn.utils.prune has remove)"
            )


def _is_of_transformers(hook: Any) -> bool:
    """Whether a hook is transformers' own, which makes embeddings require gradients while a model is trained."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def _kind_of(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)


def _label(plain: Any) -> str:
    """What the model is called: the last part of the name that it was loaded from, or its class."""
    name = str(getattr(getattr(plain, "config", None), "_name_or_path", "") or "").rstrip("/\\")
    return name.replace("\\", "/").rsplit("/", 1)[-1] or type(plain).__name__
