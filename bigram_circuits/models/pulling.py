"""Directions pulled back: which direction before a part of the model does to what it writes as one after it does.

A path leads from the residual stream through heads and MLPs, each of which reads what the one before it has written,
to the final norm. At a position, and with attention patterns left out (a head passes on what it reads at its source),
every step has a Jacobian, and a direction d after it has the same effect as J^T d before it. J^T d is computed by
backpropagation through the modules of the (masked) model themselves, step by step, so that no formula of an
architecture is needed; that a residual stream is a sum, and a head's z a mean of values, is checked on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.models.activations import NotShownError, check_has_readout, lean_forward
from bigram_circuits.models.interventions import Hook, hook_point
from bigram_circuits.models.model import Model
from bigram_circuits.models.norms import frozen_norm
from bigram_circuits.models.state import parameters_frozen
from bigram_circuits.names import COMPONENTS, PartName, in_block

NORMS = {
    "frozen": "linear, with the scale that it has at each position",
    "linear": "linear, with scale 1: what it multiplies by, and, if it is a LayerNorm, without the mean",
    "ignored": "left out",
    "true": "with its own Jacobian, in which the scale depends on what is read",
}
"""How a path leads through a norm."""
_TOLERANCE, _TOLERANCE_16_BITS = 1e-4, 5e-2  # of the largest number that is compared
_FINAL = "ln_final"
_OF_BLOCK = ("ln1", "ln1_post", "ln2", "ln2_post")


def pulled_through(
    model: Model,
    tokens: Integer[Tensor, "batch pos"],
    path: Sequence[PartName],
    direction: Float[Tensor, " d_model"],
    norms: str,
    positions: Sequence[int] | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """Pull a direction of the normalised final residual stream back to before the first part of a path.

    Args:
        model: From `load_model`; within `masked`, the masked model.
        tokens: Token ids.
        path: Heads, neurons of a layer, and MLPs, in the order of the forward pass.
        direction: For a linear functional n of the logits: W_U n.
        norms: A key of `NORMS`.
        positions: Where each part of the path reads, and last where the final norm does; the direction is then 0 at
            other positions than the first. By default each position by itself: heads read where they write.

    Returns:
        Directions in the residual stream before the block of the first part (without any: after the last block).

    Raises:
        NotShownError: If the residual stream of this model is not a sum of what its parts write, a head's z no mean of
            values, or its logits not W_U of the final norm.
    """
    seen = _Watched(model, tokens, path, norms, positions)
    with parameters_frozen(model), lean_forward(model):
        seen.run()
    check_has_readout(model, seen.final.shape[-1])
    seen.check(model)
    at = torch.ones(tokens.shape, dtype=torch.bool) if positions is None else torch.zeros(tokens.shape).bool()
    if positions is not None:
        at[:, positions[-1]] = True
    pulled = at.to(direction.device)[..., None] * direction
    pulled = seen.back("ln_final.hook_out", seen.final, pulled)
    for place, part in reversed(list(enumerate(path))):
        before = path[place - 1] if place else None
        inside = before is not None and before.layer == part.layer
        leaf = seen.attn_out[part.layer] if inside else seen.resid_pre[part.layer]
        pulled = seen.back(in_block(part.layer, f"hook_{_component(part)}_out"), leaf, pulled)
    return pulled.float()


def _component(part: PartName) -> str:
    return "attn" if part.kind == "head" else "mlp"


class _Watched:
    """A forward pass that is cut into blocks: gradients are those of each block's parts, values those of the model."""

    def __init__(
        self,
        model: Model,
        tokens: Integer[Tensor, "batch pos"],
        path: Sequence[PartName],
        norms: str,
        positions: Sequence[int] | None,
    ) -> None:
        self.values: dict[str, Tensor] = {}
        self.resid_pre: dict[int, Tensor] = {}
        self.attn_out: dict[int, Tensor] = {}
        self._model, self._tokens = model, tokens
        self._layers = {part.layer for part in path}
        self._first = min(self._layers, default=model.cfg.n_layers)
        hooks: list[Hook] = []
        for layer in sorted(self._layers):
            hooks += [hook for name in _OF_BLOCK for hook in self._norm(in_block(layer, name), norms)]
        hooks += [(f"{_FINAL}.hook_in", self._cut("final")), *self._norm(_FINAL, norms)]
        for place, part in enumerate(path):
            hooks += self._head(part, place, positions) if part.kind == "head" else self._neurons(part)
        for layer in range(self._first, model.cfg.n_layers):
            hooks += self._block(layer)
        hooks.append((f"{_FINAL}.hook_out", self._keep(f"{_FINAL}.hook_out")))
        self._hooks = [hook for hook in hooks if hook_point(model, hook[0]) is not None]

    def run(self) -> None:
        """Run the forward pass."""
        self._model.run_with_hooks(self._tokens, return_type=None, fwd_hooks=self._hooks)
        if "final" not in self.values:
            raise NotShownError("this model does not reach a final norm")

    @property
    def final(self) -> Float[Tensor, "batch pos d_model"]:
        """What the final norm reads."""
        return self.values["final"]

    def back(self, name: str, leaf: Tensor, direction: Tensor) -> Tensor:
        """Pull a direction back from what has been written to what was read."""
        if name not in self.values:
            raise NotShownError(f"this model does not reach the activation {name} in a forward pass")
        written = self.values[name]
        (found,) = torch.autograd.grad(written, leaf, direction.to(written.dtype), retain_graph=True, allow_unused=True)
        if found is None:
            raise NotShownError(
                f"no path leads to {name} from what its block's attention writes: the two of them read the same"
            )
        return found

    # --- hooks ---

    def _keep(self, name: str) -> Callable[..., Any]:
        return lambda value, hook: self.values.__setitem__(name, value)

    def _cut(self, name: str) -> Callable[..., Any]:
        """Let gradients end here."""

        def cut(value: Tensor, hook: Any) -> Tensor:
            self.values[name] = value.detach().requires_grad_()
            return self.values[name]

        return cut

    def _block(self, layer: int) -> list[Hook]:
        on_path = layer in self._layers

        def resid_pre(value: Tensor, hook: Any) -> Tensor:
            self.resid_pre[layer] = value.detach().requires_grad_(on_path)
            return self.resid_pre[layer]

        def attn_out(value: Tensor, hook: Any) -> Tensor:
            self.values[in_block(layer, "hook_attn_out")] = value
            self.attn_out[layer] = value.detach().requires_grad_(on_path)
            return self.attn_out[layer]

        return [
            (in_block(layer, "hook_resid_pre"), resid_pre),
            (in_block(layer, "hook_attn_out"), attn_out),
            *(
                (in_block(layer, point), self._keep(in_block(layer, point)))
                for point in ("hook_mlp_out", "hook_resid_post")
            ),
        ]

    def _norm(self, name: str, norms: str) -> list[Hook]:
        """Give a norm another Jacobian; its output stays what it is."""

        def replaced(out: Tensor, hook: Any) -> Tensor:
            read = self.values[f"{name}.hook_in"]
            if norms == "ignored":
                return _with_gradient_of(out, read)
            norm = frozen_norm(self._model, hook_point(self._model, name), read.detach())
            made = norm.of(read.float())
            _check_equal(out, made if norm.bias is None else made + norm.bias, f"{name} is not the norm it seems to be")
            if norms == "linear" and norm.scale is not None:
                made = replace(norm, scale=torch.ones_like(norm.scale)).of(read.float())
            return _with_gradient_of(out, made)

        read = (f"{name}.hook_in", self._keep(f"{name}.hook_in"))
        return [] if norms == "true" else [read, (f"{name}.hook_out", replaced)]

    def _neurons(self, part: PartName) -> list[Hook]:
        """Let gradients pass through the chosen neurons alone."""

        def chosen(value: Tensor, hook: Any) -> Tensor:
            of = torch.zeros(value.shape[-1], device=value.device, dtype=value.dtype)
            of[list(part.indices)] = 1
            return _with_gradient_of(value, value * of)

        return [(in_block(part.layer, "mlp.hook_post"), chosen)] if part.kind == "neurons" else []

    def _head(self, part: PartName, place: int, positions: Sequence[int] | None) -> list[Hook]:
        """Let gradients pass from a head's z to its values at its source, as if it attended to nothing else."""
        values, pattern, z = (in_block(part.layer, f"attn.{name}") for name in ("hook_v", "hook_pattern", "hook_z"))
        head = part.indices[0]

        def passed(value: Tensor, hook: Any) -> Tensor:
            if values not in self.values:
                raise NotShownError(f"this model does not reach the activation {values} in a forward pass")
            n_heads = self._model.cfg.n_heads
            by_head = value.reshape(*value.shape[:2], n_heads, -1)
            v = self.values[values].reshape(*value.shape[:2], -1, by_head.shape[-1])
            v = v[:, :, head // (n_heads // v.shape[2])]
            if pattern in self.values:
                mean = self.values[pattern][:, head].to(v.dtype) @ v
                _check_equal(by_head[:, :, head], mean, f"z of {part.label} is not the mean of its values")
            else:  # the first position attends to itself alone
                _check_equal(by_head[:, 0, head], v[:, 0], f"z of {part.label} is not the mean of its values")
            if positions is not None:
                v = v[:, [positions[place]] * v.shape[1]]
            out = by_head.detach().clone()
            out[:, :, head] = _with_gradient_of(by_head[:, :, head], v)
            return out.reshape(value.shape)

        return [(values, self._keep(values)), (pattern, self._keep(pattern)), (z, passed)]

    # --- what must hold ---

    def check(self, model: Model) -> None:
        """Raise NotShownError if what was assumed of the model does not hold."""
        after = self.final
        for layer in reversed(range(self._first, model.cfg.n_layers)):
            post = self.values.get(in_block(layer, "hook_resid_post"))
            if post is None or layer not in self.resid_pre:
                raise NotShownError(f"this model does not show its residual stream around block {layer}")
            _check_equal(post, after, f"what follows block {layer} does not read the residual stream after it")
            written = [self.values.get(in_block(layer, f"hook_{part}_out")) for part in COMPONENTS]
            total = self.resid_pre[layer] + sum(out for out in written if out is not None)
            _check_equal(post, total, f"block {layer} does not add what its attention and MLP write")
            after = self.resid_pre[layer]
        normed = self.values[f"{_FINAL}.hook_out"][:1].detach().to(model.W_U.dtype)
        _check_equal(model.unembed(normed), normed @ model.W_U + model.b_U, "its logits are not those of W_U")


def _with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    """A value, with the gradient of another."""
    return value.detach() + (other - other.detach()).to(value.dtype)


def _check_equal(one: Tensor, other: Tensor, otherwise: str) -> None:
    tolerance = _TOLERANCE if one.dtype.itemsize > 2 else _TOLERANCE_16_BITS
    one, other = one.detach().float(), other.detach().float()
    if not float((one - other).abs().max()) <= tolerance * max(float(one.abs().max()), 1e-6):
        raise NotShownError(f"no direction can be pulled back through this model: {otherwise}")
