"""Activations of a hooked model: hook points, residual stream, readout, and forward passes that save memory."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bigram_circuits.models.attention import fused_forwards
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import check_model, usual_torch
from bigram_circuits.names import in_block

_TOKENS_AT_ONCE = 1 << 11  # tokens per forward pass ...
_NUMBERS_AT_ONCE = 1 << 26  # ... as long as logits or residual streams stay within 256 MiB of float32

_LOGITS_AT_ONCE = 1 << 22  # logits computed at once when residual streams are unembedded ...
_ROWS_AT_ONCE = 256  # ... but never fewer rows than this


class NotShownError(ValueError):
    """The arguments are valid, but this model, subnetwork, target or text does not support the analysis.

    `analyze` skips an analysis that raises this error, with the message as the reason; any other error propagates.
    """


@dataclass(frozen=True)
class ActivationPoint:
    """One hook point.

    Example:
        >>> point = bc.activation_points(model)[0]
        >>> print(point.name, point.axes, point.shape)
    """

    name: str
    """The name that `run_with_cache` and `run_with_hooks` use."""
    axes: tuple[str, ...] | None
    """Axis names, for example `("batch", "pos", "d_model")`; None if the forward pass does not reach this point."""
    shape: tuple[int | str, ...] | None
    """Axis sizes, with `batch` and `pos` as names; None if the forward pass does not reach this point."""
    aliases: tuple[str, ...] = ()
    """Other names of the same point, for example `blocks.0.hook_resid_post`."""


@usual_torch()
def activation_points(model: Model) -> tuple[ActivationPoint, ...]:
    """List every hook point of a model in forward-pass order, with named axes.

    The axes are found by running the model on two small batches of different shapes.

    Example:
        >>> [point.name for point in bc.activation_points(model) if "resid_post" in point.name]
    """
    first, second = _shapes(model, batch=2, pos=3), _shapes(model, batch=3, pos=5)
    aliases: dict[int, list[str]] = {}
    for alias, point in model.hook_dict.items():
        aliases.setdefault(id(point), []).append(alias)
    for alias in getattr(model, "_collect_hook_aliases_from_registry", dict)():
        with contextlib.suppress(AttributeError, KeyError):
            aliases.setdefault(id(_hook_at(model, alias)), []).append(alias)
    points = []
    for name, point in model.hook_dict.items():
        others = tuple(sorted(set(aliases[id(point)]) - {name}))
        if name not in first:
            points.append(ActivationPoint(name, None, None, others))
            continue
        axes = _axes(model.cfg, first[name], second[name])
        shape = tuple(axis if axis in ("batch", "pos") else size for axis, size in zip(axes, first[name], strict=True))
        points.append(ActivationPoint(name, axes, shape, others))
    return tuple(points)


def _shapes(model: Model, *, batch: int, pos: int) -> dict[str, tuple[int, ...]]:
    """Run `batch` x `pos` tokens and return the shape of the activation at each hook point."""
    shapes: dict[str, tuple[int, ...]] = {}

    def record(value: Any, hook: Any) -> None:
        if isinstance(value, torch.Tensor):
            shapes[hook.name] = tuple(value.shape)

    tokens = torch.zeros(batch, pos, dtype=torch.long, device=model.cfg.device)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about disabled hook points: we list those as not reached
        model.run_with_hooks(tokens, return_type=None, fwd_hooks=[(lambda _: True, record)])
    return shapes


def _axes(cfg: Any, first: tuple[int, ...], second: tuple[int, ...]) -> tuple[str, ...]:
    """Name the axes of a shape: those that vary with the input are batch and pos; the others are told by their size."""
    names: list[str] = []
    heads = {cfg.n_heads, getattr(cfg, "n_key_value_heads", None) or cfg.n_heads}
    for place in reversed(range(len(first))):
        size = first[place]
        if size != second[place]:
            names.append("batch" if (size, second[place]) == (2, 3) else "pos")
        elif place == len(first) - 1:
            last = {cfg.d_head: "d_head", cfg.d_vocab: "d_vocab", cfg.d_mlp: "d_mlp", cfg.d_model: "d_model"}
            names.append("one" if size == 1 else last.get(size, "feature"))
        else:
            names.append("one" if size == 1 else "head" if size in heads else "feature")
    return tuple(reversed(names))


def _hook_at(model: Model, path: str) -> Any:
    part: Any = model
    for name in path.split("."):
        part = part[int(name)] if name.isdigit() else getattr(part, name)
    return part


def batch_size_for(model: Model, length: int, *, streams: bool = False) -> int:
    """Choose a batch size for sequences of `length` tokens that bounds the logits (and, if kept, residual streams)."""
    per_token = max(model.cfg.d_vocab, (model.cfg.n_layers + 1) * model.cfg.d_model if streams else 0)
    return max(1, min(_TOKENS_AT_ONCE, _NUMBERS_AT_ONCE // per_token) // length)


def n_outputs(model: Model) -> int:
    """Number of logits at a position: the size of the vocabulary, unless `d_vocab_out` in the `cfg` is another."""
    found = getattr(model.cfg, "d_vocab_out", None) or 0
    return found if found > 0 else model.cfg.d_vocab


def predicts_tokens(model: Model) -> bool:
    """Whether the logits are of the tokens that a model reads, not of values of their own (`d_vocab_out`, tracr)."""
    return n_outputs(model) == model.cfg.d_vocab and getattr(model.cfg, "predicts_tokens", True)


def check_predicts_tokens(model: Model) -> None:
    """Raise NotShownError if a model's outputs are no tokens."""
    if not predicts_tokens(model):
        raise NotShownError(
            f"this model's {n_outputs(model)} outputs are not the {model.cfg.d_vocab} tokens that it reads, so that it "
            f"predicts no next token"
        )


def check_tokens(model: Model, tokens: Integer[Tensor, "batch pos"] | Integer[np.ndarray, "batch pos"]) -> None:
    """Raise ValueError if token ids are outside the model's vocabulary or sequences exceed its context length."""
    check_model(model)
    check_length(model, tokens.shape[1])
    least, largest = int(tokens.min()), int(tokens.max())
    if least < 0 or largest >= model.cfg.d_vocab:
        wrong = least if least < 0 else largest
        more = ""
        if model.tokenizer is not None and wrong in range(len(model.tokenizer)):
            more = f", {model.tokenizer.convert_ids_to_tokens(wrong)!r}, for which it has no embedding"
        raise ValueError(f"token ids must be 0 to {model.cfg.d_vocab - 1} for this model, but there is {wrong}{more}")


def check_length(model: Model, length: int, remedy: str = "") -> None:
    """Raise ValueError if sequences of this many tokens are longer than a model's context; `remedy` ends the line."""
    context = getattr(model.cfg, "n_ctx", None)
    if context and length > context:
        what = f"sequences of {length} tokens are longer than this model's context of {context}"
        raise ValueError(f"{what}: {remedy}" if remedy else what)


def shorter_than_context(model: Model, length: int) -> int:
    """A length of sequences, or the model's context if that is shorter."""
    return min(length, getattr(model.cfg, "n_ctx", None) or length)


def rows_at_once(d_vocab: int) -> int:
    """Number of rows of logits to compute at once: 16 MiB of float32, but enough rows for an efficient matmul."""
    return max(_ROWS_AT_ONCE, _LOGITS_AT_ONCE // d_vocab)


def residual_streams(
    model: Model, tokens: Integer[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "layer batch pos d_model"], Float[Tensor, "batch pos d_vocab"]]:
    """Return the residual stream before every block and after the last one, and the logits, from one forward pass.

    The first of the `n_layers + 1` entries is the embedding; the last is what the final norm and unembedding read.

    Raises:
        NotShownError: If the model lacks a hook at one of these points.
    """
    last = model.cfg.n_layers - 1
    names = [*(in_block(layer, "hook_resid_pre") for layer in range(last + 1)), in_block(last, "hook_resid_post")]
    streams: list[Tensor] = []
    hooks = [(name, lambda value, hook: streams.append(value)) for name in names]  # called in forward-pass order
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    if len(streams) != len(names):
        raise NotShownError(
            f"this model exposes its residual stream at {len(streams)} of the {len(names)} points before, between and "
            f"after its blocks"
        )
    return torch.stack([stream.detach().to(logits.device) for stream in streams]), logits


def record(
    model: Model, tokens: Integer[Tensor, "batch pos"], names: Sequence[str]
) -> tuple[dict[str, Tensor], Float[Tensor, "batch pos d_vocab"]]:
    """Return the named activations (by hook name) and the logits of one forward pass.

    Raises:
        NotShownError: If the model has no such hook point, or the forward pass does not reach it.
    """
    seen: dict[str, Tensor] = {}

    def recorder(name: str) -> Any:
        return lambda value, hook: seen.__setitem__(name, value.detach())

    try:
        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, recorder(name)) for name in names])
    except KeyError as error:
        raise NotShownError(f"this model has no activation of that name: {error.args[0]}") from error
    for name in names:
        if name not in seen:
            raise NotShownError(f"this model does not reach the activation {name} in a forward pass")
    return seen, logits


@contextlib.contextmanager
def recomputed(model: Model) -> Iterator[None]:
    """Within the `with` block, recompute each transformer block in the backward pass instead of storing activations.

    Only the input of each transformer block is stored (gradient checkpointing, Chen et al. 2016, arXiv 1604.06174).
    Use it only inside `lean_forward`: a block that writes to a key-value cache cannot be run twice.
    """
    again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    with forwards_replaced({block: functools.partial(again, block.forward) for block in model.blocks}):
        yield


@contextlib.contextmanager
def lean_forward(model: Model) -> Iterator[None]:
    """Within the `with` block, forward passes skip work that does not affect the output.

    The key-value cache is switched off. TransformerLens also recomputes the scale and the normalised residual stream of
    each norm for `hook_scale` and `hook_normalized`, which is skipped where these have no hook. Attention is
    computed by a fused kernel where no hook looks inside (`fused_forwards`), up to rounding with the same output.
    """
    from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

    changed = [
        module
        for module in model.modules()
        if type(module).forward is NormalizationBridge.forward
        and (module.use_native_layernorm_autograd or getattr(module.config, "layer_norm_folding", False))
        and not isinstance(module.original_component, torch.nn.Identity)
    ]

    def lean(module: Any, hidden_states: Tensor, **more: Any) -> Tensor:
        if any(hook.fwd_hooks or hook.bwd_hooks for hook in (module.hook_scale, module.hook_normalized)):
            return NormalizationBridge.forward(module, hidden_states, **more)
        output = module.original_component(module.hook_in(hidden_states))
        return module.hook_out(output.to(hidden_states.dtype))

    forwards = {module: functools.partial(lean, module) for module in changed} | fused_forwards(model)
    try:
        with _without_cache(model), forwards_replaced(forwards):
            yield
    finally:
        for module in model.modules():
            if getattr(module, "_pattern", None) is not None:
                module._pattern = None  # the last attention pattern would keep its whole autograd graph alive


@contextlib.contextmanager
def _without_cache(model: Model) -> Iterator[None]:
    """Within the `with` block, a Hugging Face model keeps no key-value cache; TransformerLens' own models have none."""
    config = getattr(model.original_model, "config", None)
    if config is None:
        yield
        return
    config = config.get_text_config()
    cached = getattr(config, "use_cache", None)
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = cached


@contextlib.contextmanager
def forwards_replaced(forwards: Mapping[torch.nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within the `with` block, replace the forward functions of some modules; blocks may be nested."""
    before = {module: module.__dict__["forward"] for module in forwards if "forward" in module.__dict__}
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward  # setattr on a bridge would set it on the module that it wraps
    try:
        yield
    finally:
        for module in forwards:
            if module in before:
                module.__dict__["forward"] = before[module]
            else:
                del module.__dict__["forward"]


def check_has_readout(model: Model, d_model: int) -> None:
    """Raise NotShownError unless the model has a final norm and an unembedding that reads `d_model`-wide vectors."""
    if not hasattr(model, "ln_final") or model.W_U.shape[0] != d_model:
        raise NotShownError(
            "this model does not compute its logits from the residual stream with a final norm and W_U alone"
        )


def readout(model: Model, residual: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
    """Map residual stream vectors to logits: final norm, unembedding, and any soft cap or scale the model applies.

    Raises:
        NotShownError: If the model has no final norm, or its unembedding expects vectors of another width.
    """
    check_has_readout(model, residual.shape[-1])
    rows = residual.reshape(1, -1, residual.shape[-1])
    logits = transformed_logits(model, model.unembed(model.ln_final(rows)))
    return logits.reshape(*residual.shape[:-1], logits.shape[-1])


def transformed_logits(model: Model, unembedded: Float[Tensor, "*rows d_vocab"]) -> Float[Tensor, "*rows d_vocab"]:
    """Apply to what the unembedding returns any soft cap or scale that the model applies."""
    transform = getattr(model.adapter, "apply_output_logits_transform", None)
    return unembedded if transform is None else transform(unembedded)


def lens_log_probs(
    model: Model, tokens: Integer[Tensor, "batch pos"], lens: Any = None
) -> Float[Tensor, "layer batch pos d_vocab"]:
    """Apply TransformerLens' logit lens: log-probabilities read from the residual stream after every layer.

    Args:
        model: A model from `load_model`.
        tokens: Token ids.
        lens: Translators per layer, as TransformerLens' `logit_lens` takes them; None for the plain logit lens.
    """
    from transformer_lens.tools.analysis import logit_lens

    return logit_lens(model, tokens, positions=None, return_type="log_probs", lens=lens).values
