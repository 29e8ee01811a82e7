"""Activations of a hooked model: its hook points, residual streams, readout, and forward passes that keep little."""

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

from bigram_circuits.models.model import Model
from bigram_circuits.names import in_block

_TOKENS_AT_ONCE = 1 << 11  # in one forward pass,
_NUMBERS_AT_ONCE = 1 << 26  # if that is at most so many logits, or residual stream: 256 MiB of float32

_LOGITS_AT_ONCE = 1 << 22  # when residual streams are read out,
_ROWS_AT_ONCE = 256  # but at least so many rows


class NotShownError(ValueError):
    """The arguments are right, but the model, the subnetwork, the target or the text lacks what was asked to be shown.

    `analyze` leaves an analysis out that raises this, with the message as the reason, and nothing else.
    """


@dataclass(frozen=True)
class ActivationPoint:
    """One hook point."""

    name: str
    """Its name, for `run_with_cache` and `run_with_hooks`."""
    axes: tuple[str, ...] | None
    """Names of its axes, for example `("batch", "pos", "d_model")`; None if the forward pass does not reach it."""
    shape: tuple[int | str, ...] | None
    """Sizes of its axes, with `batch` and `pos` by name; None if the forward pass does not reach it."""
    aliases: tuple[str, ...] = ()
    """Other names of the same point, for example `blocks.0.hook_resid_post`."""


def activation_points(model: Model) -> tuple[ActivationPoint, ...]:
    """Every hook point of a model, in the order of the forward pass, with named axes (found by running it)."""
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
    """The shape of what passes each hook point, from one forward pass of `batch` x `pos` tokens."""
    shapes: dict[str, tuple[int, ...]] = {}

    def record(value: Any, hook: Any) -> None:
        if isinstance(value, torch.Tensor):
            shapes[hook.name] = tuple(value.shape)

    tokens = torch.zeros(batch, pos, dtype=torch.long, device=model.cfg.device)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the hook points that are switched off: they are listed as not reached
        model.run_with_hooks(tokens, return_type=None, fwd_hooks=[(lambda _: True, record)])
    return shapes


def _axes(cfg: Any, first: tuple[int, ...], second: tuple[int, ...]) -> tuple[str, ...]:
    """Names for the axes of a shape: by whether they change with the input, then by size, from the last backwards."""
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
    """How many sequences of `length` tokens to run at once: what keeps the logits, and all streams if kept, small."""
    per_token = max(model.cfg.d_vocab, (model.cfg.n_layers + 1) * model.cfg.d_model if streams else 0)
    return max(1, min(_TOKENS_AT_ONCE, _NUMBERS_AT_ONCE // per_token) // length)


def check_model(model: Model) -> None:
    """Raise ValueError unless it is a hooked model."""
    if not hasattr(model, "cfg") or not hasattr(model, "run_with_hooks"):
        raise ValueError(f"a {type(model).__name__} is no model: pass one from load_model")


def check_tokens(model: Model, tokens: Integer[Tensor, "batch pos"] | Integer[np.ndarray, "batch pos"]) -> None:
    """Raise ValueError if token ids are outside a model's vocabulary, or sequences longer than its context."""
    check_model(model)
    least, largest = int(tokens.min()), int(tokens.max())
    if least < 0 or largest >= model.cfg.d_vocab:
        wrong = least if least < 0 else largest
        raise ValueError(f"token ids must be 0 to {model.cfg.d_vocab - 1} for this model, but there is {wrong}")
    context = getattr(model.cfg, "n_ctx", None)
    if context and tokens.shape[1] > context:
        raise ValueError(f"sequences of {tokens.shape[1]} tokens are longer than this model's context of {context}")


def rows_at_once(d_vocab: int) -> int:
    """How many rows of logits to compute at once: 16 MiB, but never fewer rows than make the unembedding efficient."""
    return max(_ROWS_AT_ONCE, _LOGITS_AT_ONCE // d_vocab)


def residual_streams(
    model: Model, tokens: Integer[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "layer batch pos d_model"], Float[Tensor, "batch pos d_vocab"]]:
    """The residual stream before every block and after the last, and the logits, from one forward pass.

    There are n_layers + 1 entries: the first is the embedding, the last is what the final norm and unembedding read.

    Raises:
        NotShownError: If the model does not show one of them.
    """
    last = model.cfg.n_layers - 1
    names = [*(in_block(layer, "hook_resid_pre") for layer in range(last + 1)), in_block(last, "hook_resid_post")]
    streams: list[Tensor] = []
    hooks = [(name, lambda value, hook: streams.append(value)) for name in names]  # run in the order of the pass
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    if len(streams) != len(names):
        raise NotShownError(
            f"this model shows its residual stream at {len(streams)} of the {len(names)} places before, between and "
            f"after its blocks"
        )
    return torch.stack([stream.detach() for stream in streams]), logits


def record(
    model: Model, tokens: Integer[Tensor, "batch pos"], names: Sequence[str]
) -> tuple[dict[str, Tensor], Float[Tensor, "batch pos d_vocab"]]:
    """Activations by hook name, and the logits, from one forward pass.

    Raises:
        NotShownError: If the model has no such activation, or the forward pass does not show it.
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
            raise NotShownError(f"this model does not show the activation {name}")
    return seen, logits


@contextlib.contextmanager
def recomputed(model: Model) -> Iterator[None]:
    """Within the block, what a transformer block computes is not kept for the backward pass, but computed once more.

    Of each block only its input is kept (gradient checkpointing, Chen et al. 2016, arXiv 1604.06174). Only within
    `lean_forward`: a block that adds to a store of keys and values cannot be computed twice.
    """
    again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    with _forwards({block: functools.partial(again, block.forward) for block in model.blocks}):
        yield


@contextlib.contextmanager
def lean_forward(model: Model) -> Iterator[None]:
    """Within the block, a forward pass computes what leads to its output and nothing else; the output is the same.

    Keys and values are not kept for further tokens. And of normalisations TransformerLens computes the scale and the
    normalised stream beside what the model's own module computes, for hooks that look at them: where there are no such
    hooks on entering this is left out.
    """
    from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

    changed = [
        module
        for module in model.modules()
        if type(module).forward is NormalizationBridge.forward
        and (module.use_native_layernorm_autograd or getattr(module.config, "layer_norm_folding", False))
        and not isinstance(module.original_component, torch.nn.Identity)
        and not any(hook.fwd_hooks or hook.bwd_hooks for hook in (module.hook_scale, module.hook_normalized))
    ]

    def lean(module: Any, hidden_states: Tensor, **_: Any) -> Tensor:
        output = module.original_component(module.hook_in(hidden_states))
        return module.hook_out(output.to(hidden_states.dtype))

    config = model.original_model.config.get_text_config()
    cached = getattr(config, "use_cache", None)
    config.use_cache = False
    try:
        with _forwards({module: functools.partial(lean, module) for module in changed}):
            yield
    finally:
        config.use_cache = cached
        for module in model.modules():
            if getattr(module, "_pattern", None) is not None:
                module._pattern = None  # the last attention pattern, and with it all that it was computed from


@contextlib.contextmanager
def _forwards(forwards: Mapping[torch.nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within the block, modules have other forward functions, which hide those of their classes."""
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward  # setting an attribute of a bridge would set it on what it wraps
    try:
        yield
    finally:
        for module in forwards:
            del module.__dict__["forward"]


def check_has_readout(model: Model, d_model: int) -> None:
    """Raise NotShownError unless the model has a final norm, and an unembedding that reads vectors of this width."""
    if not hasattr(model, "ln_final") or model.W_U.shape[0] != d_model:
        raise NotShownError(
            "this model does not read its logits from the residual stream by a final norm and W_U alone"
        )


def readout(model: Model, residual: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
    """Logits of residual stream vectors: through the final norm, the unembedding and what the model does after it.

    Raises:
        NotShownError: If the model has no final norm, or its unembedding reads vectors of another width.
    """
    check_has_readout(model, residual.shape[-1])
    rows = residual.reshape(1, -1, residual.shape[-1])
    logits = model.unembed(model.ln_final(rows))
    transform = getattr(model.adapter, "apply_output_logits_transform", None)  # soft caps and scales
    logits = logits if transform is None else transform(logits)
    return logits.reshape(*residual.shape[:-1], logits.shape[-1])


# --- what can go wrong, in one line each ---


def lens_log_probs(
    model: Model, tokens: Integer[Tensor, "batch pos"], lens: Any = None
) -> Float[Tensor, "layer batch pos d_vocab"]:
    """What TransformerLens' logit lens reads from the residual stream: log-probabilities after every layer.

    Args:
        model: From `load_model`.
        tokens: Token ids.
        lens: A translator for each layer, as that function takes it; None reads the stream itself.
    """
    from transformer_lens.tools.analysis import logit_lens

    return logit_lens(model, tokens, positions=None, return_type="log_probs", lens=lens).values
