"""Norms with their scales frozen, so that they are linear: a sum can be normalised part by part.

LayerNorm (Ba et al. 2016, arXiv 1607.06450) maps x to (x - mean(x)) w / scale + b, RMSNorm (Zhang and Sennrich 2019,
arXiv 1910.07467) to x w / scale; the scale is the root of the mean square of x, centred for LayerNorm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bigram_circuits.models.activations import NotShownError
from bigram_circuits.models.model import Model


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm as a linear map and a constant, at the scales that it has for given vectors."""

    weight: Float[Tensor, " d_model"] | None
    """What each normalised coordinate is multiplied by; None for 1."""
    bias: Float[Tensor, " d_model"] | None
    """What is added; None for 0."""
    centred: bool
    """Whether the mean is subtracted (LayerNorm)."""
    scale: Float[Tensor, "*rows 1"] | None
    """What vectors are divided by; None for a norm that does nothing."""
    eps: float = 0.0
    """Added to the mean square before the root is taken."""

    def of(self, part: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """What the norm makes of a part of the vectors, without the bias; parts add up to the norm of the sum."""
        if self.scale is None:
            return part
        part = part - part.mean(-1, keepdim=True) if self.centred else part
        return part / self.scale if self.weight is None else part * self.weight / self.scale

    def pulled_back(self, direction: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The direction before the norm with whose dot product it has the same effect: the transpose of `of`."""
        if self.scale is None:
            return direction
        direction = (direction if self.weight is None else direction * self.weight) / self.scale
        return direction - direction.mean(-1, keepdim=True) if self.centred else direction

    def rows(self, at: Any) -> FrozenNorm:
        """The norm at some of the rows."""
        scale = None if self.scale is None else self.scale[at]
        return replace(self, scale=scale)

    def at(self, whole: Float[Tensor, "*rows d_model"]) -> FrozenNorm:
        """The norm with the scales that it has for other vectors."""
        if self.scale is None:
            return self
        whole = whole - whole.mean(-1, keepdim=True) if self.centred else whole
        return replace(self, scale=(whole.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())


IDENTITY = FrozenNorm(None, None, False, None)
"""Where there is no norm."""


def frozen_norm(model: Model, norm: Any, whole: Float[Tensor, "*rows d_model"]) -> FrozenNorm:
    """A norm of a model, with its scale frozen at the value that it has for these vectors; in float32.

    Raises:
        NotShownError: If it is neither a LayerNorm nor an RMSNorm.
    """
    inner = norm.original_component
    if isinstance(inner, torch.nn.Identity):
        return IDENTITY
    kind = _kind(model, inner)
    if kind not in ("LN", "RMS"):
        raise NotShownError(
            f"direct logit attribution needs a LayerNorm or RMSNorm, not {model.cfg.normalization_type!r}"
        )
    eps = next((getattr(inner, name) for name in ("eps", "variance_epsilon") if hasattr(inner, name)), model.cfg.eps)
    weight, bias = (getattr(inner, name, None) for name in ("weight", "bias"))
    if weight is not None:
        weight = weight.detach().float() + (1.0 if getattr(model.cfg, "rmsnorm_uses_offset", False) else 0.0)
    bias = None if bias is None else bias.detach().float()
    return FrozenNorm(weight, bias, kind == "LN", whole.new_ones(1).float(), float(eps)).at(whole.float())


def _kind(model: Model, inner: Any) -> str:
    """LN or RMS; a final norm may be of another kind than those of the blocks (`final_rms`)."""
    if "RMS" in type(inner).__name__:
        return "RMS"
    return str(model.cfg.normalization_type).upper().removesuffix("PRE")
