"""Splice dictionaries of features into a hooked model, so that their latents are nodes like others.

Within `spliced` the activation x of a hook point passes through a dictionary of features: f = encode(x) goes through a
hook point of its own, whose name is that of the first with `.features` behind it. If hooks make f' of it, x becomes

    x + decode(f') - decode(f).

So the dictionary's error, x - decode(f), is kept (as by Marks et al. 2024, arXiv 2403.19647), and what is not changed
gives x itself. A transcoder reads x at one hook point, and out + decode(f') - decode(f) replaces what another has.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bigram_circuits.models.activations import NotShownError, record
from bigram_circuits.models.dictionaries import Dictionary
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import in_use
from bigram_circuits.storage.records import shown

FEATURES = "features"
"""Last part of the name of the hook point of a dictionary's latents."""


@dataclass(frozen=True, eq=False)
class _Splice:
    """A dictionary, and the hook points between which it is."""

    reads: str
    writes: str
    dictionary: Any

    @property
    def name(self) -> str:
        """The hook point of the latents."""
        return f"{self.writes}.{FEATURES}"

    def encode(self, x: Float[Tensor, "batch pos ..."]) -> Tensor:
        """Latents, which should be [batch, pos, d_sae]."""
        return self.dictionary.encode(x.flatten(2))

    def decode(self, f: Tensor, x: Float[Tensor, "batch pos ..."]) -> Tensor:
        """What latents that were read from x stand for, which should be [batch, pos, d_out]."""
        if isinstance(self.dictionary, Dictionary):
            return self.dictionary.decode(f, x.flatten(2))
        return self.dictionary.decode(f)


@contextmanager
def spliced(model: Model, dictionaries: Mapping[str | tuple[str, str], Any]) -> Iterator[Any]:
    """Within the `with` block, the latents of dictionaries are nodes: `blocks.1.hook_resid_post.features[17]`.

    Their hook points can be used like others, by name: with `run_with_hooks`, `run_with_cache`, `activation_points`, in
    a `Circuit`, and to learn gates for. Afterwards the model is as it was, also after an exception. Blocks can be
    nested; another thread that uses the model waits. Hooks at the hook point of a dictionary see what it has written
    there, and do not change what it reads.

    Args:
        model: From `load_model`.
        dictionaries: By the hook point whose activation passes through them, for example `blocks.1.hook_resid_post`;
            for one that reads elsewhere than it writes, such as a transcoder, by both hook points,
            `("blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out")`. A dictionary is a `Dictionary` from `load_dictionary`,
            or any object with differentiable `encode(x)` from [batch, pos, d_in] to [batch, pos, d_sae] and `decode(f)`
            back to [batch, pos, d_out]. Axes after the second, like those of heads, are flattened.

    Yields:
        The model.

    Raises:
        ValueError: If there is no dictionary or no such hook point (the nearest are named), the widths differ, hook
            points are not reached in this order, or another activation there does not change the logits.
        RuntimeError: If another thread keeps the model masked.

    Example:
        >>> with bc.spliced(model, {"blocks.1.hook_resid_post": dictionary}):
        ...     _, cache = model.run_with_cache("import os")
        >>> cache["blocks.1.hook_resid_post.features"].shape  # [batch, pos, latent]
    """
    if not isinstance(dictionaries, Mapping) or not dictionaries:
        raise ValueError("dictionaries should be a dictionary by hook point, {'blocks.0.hook_resid_post': dictionary}")
    with in_use(model, "spliced", block=True), ExitStack() as stack:
        splices = [_splice(model, place, dictionary) for place, dictionary in dictionaries.items()]
        _check_apart(model, splices)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that other numerics follow where TransformerLens cannot edit in place
            reached = _check_fit(model, splices)
        for splice in sorted(splices, key=lambda splice: reached.index(splice.writes)):  # what reads there comes later
            stack.enter_context(_within(model, splice))
        yield model


def _splice(model: Model, place: Any, dictionary: Any) -> _Splice:
    reads, writes = _ends(place)
    for name in (reads, writes):
        if name not in model.hook_dict:
            near = difflib.get_close_matches(name, [*model.hook_dict], 3)
            hint = f"; the nearest are {', '.join(near)}" if near else ""
            raise ValueError(f"{name!r} is not a hook point of this model{hint}")
    if not callable(getattr(dictionary, "encode", None)) or not callable(getattr(dictionary, "decode", None)):
        raise ValueError(f"a dictionary has encode and decode, but a {type(dictionary).__name__} has not")
    return _Splice(reads, writes, dictionary.to(model.cfg.device) if isinstance(dictionary, Dictionary) else dictionary)


def _ends(place: Any) -> tuple[str, str]:
    """The hook points that a dictionary reads and writes."""
    if isinstance(place, str):
        return place, place
    if isinstance(place, tuple) and len(place) == 2 and all(isinstance(name, str) for name in place):
        return place
    raise ValueError(f"the place of a dictionary is a hook point, or a pair of two, not {shown(place)}")


def _check_apart(model: Model, splices: list[_Splice]) -> None:
    """Raise ValueError if two dictionaries write at one hook point, or one is there already."""
    points = [model.hook_dict[splice.writes] for splice in splices]
    for splice, point in zip(splices, points, strict=True):
        if points.count(point) > 1 or hasattr(point, FEATURES):
            raise ValueError(f"there can be only one dictionary at {splice.writes}")
        if "forward" in vars(point):
            raise ValueError(
                f"a dictionary of an enclosing `with` block reads at {splice.writes}: give both to one `spliced`"
            )


def _check_fit(model: Model, splices: list[_Splice]) -> list[str]:
    """Raise ValueError unless every dictionary fits the activations at its hook points, and changes matter there.

    Returns:
        The names of the hook points, in the order in which a forward pass reaches them.
    """
    tokens = torch.arange(2, device=model.cfg.device)[None] % model.cfg.d_vocab
    seen, logits = record(model, tokens, [name for splice in splices for name in (splice.reads, splice.writes)])
    order = list(seen)
    for splice in splices:
        x, out = seen[splice.reads], seen[splice.writes]
        if order.index(splice.reads) > order.index(splice.writes):
            raise ValueError(f"{splice.reads} is reached after {splice.writes}, which is to be written from it")
        for name, value in ((splice.reads, x), (splice.writes, out)):
            if value.ndim < 3 or value.shape[:2] != (1, 2):
                raise NotShownError(f"the activation {name} has the axes {list(value.shape)}, not [batch, pos, ...]")
        try:
            latents = splice.encode(x)
            written = splice.decode(latents, x)
        except (ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"the dictionary at {splice.writes} does not fit this model: {reason}") from error
        if latents.ndim != 3 or latents.shape[:2] != (1, 2):
            raise ValueError(
                f"the dictionary at {splice.writes} encodes activations of shape {list(x.flatten(2).shape)} as "
                f"{list(latents.shape)}, but should as [1, 2, d_sae]"
            )
        if written.shape != out.flatten(2).shape:
            raise ValueError(
                f"the dictionary at {splice.writes} writes activations of shape {list(written.shape)}, but there are "
                f"{list(out.flatten(2).shape)}"
            )
        another = model.run_with_hooks(tokens, fwd_hooks=[(splice.writes, _disturbed)])
        if torch.equal(another, logits):
            raise NotShownError(f"the logits do not depend on what a hook writes at {splice.writes}")
    return order


def _disturbed(value: Tensor, hook: Any) -> Tensor:
    """Another activation, which no norm makes the same again."""
    return value + torch.linspace(-1, 1, value.numel(), device=value.device).to(value).view(value.shape)


@contextmanager
def _within(model: Model, splice: _Splice) -> Iterator[None]:
    """Within the `with` block, activations pass through one dictionary.

    This is not done by hooks, which may be switched off, but by what the hook points themselves compute.
    """
    from transformer_lens.hook_points import HookPoint

    latents, read = HookPoint(), {}
    latents.name = splice.name
    source, sink = model.hook_dict[splice.reads], model.hook_dict[splice.writes]
    at_source, at_sink = source.forward, sink.forward  # the identity, or what other dictionaries do there

    def keep(value: Any) -> Any:
        value = at_source(value)
        read["x"] = _shown_to_hooks(source, value)
        return value

    def replace(value: Any) -> Any:
        value = at_sink(value)
        out = _shown_to_hooks(sink, value)
        x = out if source is sink else read.pop("x", None)
        if x is None:
            raise RuntimeError(f"this forward pass reaches {splice.writes}, but not {splice.reads} before it")
        changed = _replaced(splice, latents, x, out)
        if changed is None:
            return value
        return changed if sink.hook_conversion is None else sink.hook_conversion.revert(changed)

    with ExitStack() as stack:
        # plain attributes, so that the model gets no new modules, and a registry that lists what has a name
        for point in (source, sink):
            stack.enter_context(_noticed(point))
        if source is not sink:
            stack.enter_context(_entered(vars(source), "forward", keep))
        stack.enter_context(_entered(vars(sink), "forward", replace))
        stack.enter_context(_entered(vars(sink), FEATURES, latents))
        stack.enter_context(_entered(vars(model)["_hook_registry"], splice.name, latents))
        yield


def _shown_to_hooks(point: Any, value: Any) -> Any:
    """An activation in the layout that hooks of this point see."""
    return value if point.hook_conversion is None else point.hook_conversion.convert(value)


def _replaced(splice: _Splice, point: Any, x: Tensor, out: Tensor) -> Tensor | None:
    """What a dictionary makes of an activation; None if nothing has changed its latents.

    The latents that hooks see are a view, so that a gradient with respect to them is that of decode(f') alone.
    """
    latents = splice.encode(x)
    seen = latents.view_as(latents)
    changed = point(seen)
    if changed is seen and not changed.requires_grad:
        return None
    difference = splice.decode(changed, x) - splice.decode(latents, x)  # exactly 0 where nothing has changed
    return out + difference.to(out.dtype).view(out.shape)


@contextmanager
def _noticed(point: Any) -> Iterator[None]:
    """Within the `with` block, a hook point has a hook: without, norms compute what it shows without gradients."""
    handle = point.add_hook(_nothing, is_permanent=True)
    try:
        yield
    finally:
        handle.hook.remove()
        point.fwd_hooks = [one for one in point.fwd_hooks if one is not handle]


def _nothing(value: Any, hook: Any) -> None:
    """A hook that changes nothing."""


@contextmanager
def _entered(names: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """Within the `with` block, a name has a value."""
    before = {name: names[name]} if name in names else {}
    names[name] = value
    try:
        yield
    finally:
        del names[name]
        names.update(before)
