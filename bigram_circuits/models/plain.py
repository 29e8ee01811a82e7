"""The plain model behind a hooked one: which is never changed, and from which exports and controls are made.

TransformerLens replaces the modules of the model that it hooks. So it is given a *twin*: modules of its own over the
same tensors. The plain model stays as it was, whether it was loaded here or is an object of the user's, and its weights
are in memory once. (A fused query-key-value matrix that interleaves heads, as in GPT-NeoX, is the exception: the twin
holds its parts as copies.)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from bigram_circuits.models.model import Model


@dataclass(frozen=True)
class Plain:
    """A model before it was hooked."""

    model: Any
    """The module, over the same tensors as the hooked model."""
    tokenizer: Any
    """Its tokenizer, before TransformerLens changed it; None if it has none."""


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Attributes of a module that hold its hooks."""

_PLAIN: WeakKeyDictionary[Any, Plain] = WeakKeyDictionary()  # by the module that a hooked model wraps


def twin(module: nn.Module) -> Any:
    """A copy of a module over the same tensors: changes of its modules, flags and configuration are its own.

    Parameters are new objects with the same storage, so that `requires_grad` and gradients are separate too; those that
    are one in the module (tied weights) are one in the twin. It has no hooks: those of transformers are for training.
    """
    shared: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        for parameter in module.parameters()
    }
    shared |= {id(buffer): buffer.detach() for buffer in module.buffers()}
    copied = copy.deepcopy(module, shared)
    for part in copied.modules():
        for kind in HOOKS:
            getattr(part, kind).clear()
    return copied


def remember_plain(model: Model, plain: Plain) -> None:
    """Note the plain model behind a hooked one, for as long as that lives."""
    _PLAIN[model.original_model] = plain


def known_plain(model: Model) -> Plain | None:
    """The plain model behind a hooked one; None if it was hooked by other means than this package's."""
    return _PLAIN.get(model.original_model)
