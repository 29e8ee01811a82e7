"""The conditions that analyses compare: the full model, a subnetwork, its complement, a matched random subnetwork.

In place of a subnetwork there may be a circuit; its conditions are named `circuit` and `random nodes`.

`observe` is the loop shared by the analyses: for every condition it streams the text through the model once and passes
each batch's residual streams and logits to observers, which accumulate what they need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.circuit import Circuit
from bigram_circuits.masking.apply import Mask, as_mask, masked
from bigram_circuits.measures.conditions import COMPARED, compared
from bigram_circuits.measures.statistics import check_seed
from bigram_circuits.models.activations import (
    NotShownError,
    batch_size_for,
    check_tokens,
    lean_forward,
    residual_streams,
)
from bigram_circuits.models.model import Model
from bigram_circuits.models.products import masked_once
from bigram_circuits.models.state import check_model
from bigram_circuits.progress import progress
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.targets.base import Target, target_of
from bigram_circuits.text.corpus import in_order, token_array

Conditions = Mapping[str, Mask | None]
"""Condition name -> what is kept, or None for the full model."""


def check_arguments(
    model: Model, subnetwork: Any = None, *, target: Any = None, seed: int = 0
) -> tuple[Mask | None, Target | None]:
    """Check the arguments of a public analysis once; private functions take them as they are.

    Returns:
        The subnetwork as a `Subnetwork` or `Circuit`, and the target as a `Target`; None where there is none.

    Raises:
        ValueError: If the model is not a hooked model, subnetwork or target do not fit it, or the seed is below 0.
    """
    check_model(model)
    check_seed(seed)
    kept = check_subnetwork(subnetwork)
    if kept is not None:
        kept.check_fits(model)
    return kept, None if target is None else target_of(target, model)


def checked_text(model: Model, text: Any) -> Integer[np.ndarray, "sequence position"]:
    """Token ids of a text, or of a corpus's held-out part; raises ValueError unless the model can read them."""
    check_model(model)
    array = token_array(text)
    check_tokens(model, array)
    return array


def conditions(subnetwork: Mask | None, *, seed: int = 0) -> dict[str, Mask | None]:
    """`full`, and with a subnetwork also `subnetwork`, `complement` and `random` (one matched random draw)."""
    if subnetwork is None:
        return {COMPARED[0]: None}
    kept = (None, subnetwork, ~subnetwork, subnetwork.random_like(seed=seed))
    return dict(zip(compared(subnetwork.noun), kept, strict=True))


def check_subnetwork(subnetwork: Any) -> Mask | None:
    """Return it as a `Subnetwork` or `Circuit`, or None if it is None; raises ValueError if it is none of these."""
    return None if subnetwork is None else as_mask(subnetwork)


def check_of_weights(kept: Any, what: str) -> Subnetwork:
    """Return a subnetwork; raises NotShownError if it is a circuit, and ValueError if it is neither."""
    if isinstance(found := as_mask(kept), Circuit):
        raise NotShownError(f"{what} is of weights; circuit.weights(model) are those that a circuit owns")
    return found


@contextmanager
def reduced_to(model: Model, subnetwork: Mask | None, tokens: int = 0) -> Iterator[Any]:
    """`masked`, or nothing where everything is kept; in the fastest way to measure, for as many tokens as are told."""
    with ExitStack() as stack:
        if subnetwork is not None:
            stack.enter_context(masked(model, subnetwork))
            stack.enter_context(masked_once(model, tokens))
        stack.enter_context(lean_forward(model))
        yield model


@dataclass(frozen=True)
class Batch:
    """The tokens, residual streams and logits of one forward pass."""

    tokens: Integer[Tensor, "batch pos"]
    """Token ids."""
    residual: Float[Tensor, "layer batch pos d_model"]
    """The residual stream before every block and after the last one (n_layers + 1 entries)."""
    logits: Float[Tensor, "batch pos d_vocab"]
    """The logits of the model under the condition."""


def layer_names(model: Model) -> tuple[str, ...]:
    """`embed`, then the blocks after which the residual stream is read: `0`, `1`, ..."""
    return ("embed", *map(str, range(model.cfg.n_layers)))


class Observer(Protocol):
    """An object that accumulates statistics over a text."""

    def add(self, batch: Batch) -> None:
        """Add a batch; called under `torch.inference_mode`."""
        ...


def observe(
    model: Model,
    tokens: Integer[np.ndarray, "sequence position"],
    subnetworks: Conditions,
    observers: Callable[[str], Sequence[Observer]],
    *,
    what: str = "analysing",
) -> None:
    """Stream a checked text through the model under each condition; `observers(condition)` returns the observers."""
    batch_size = batch_size_for(model, tokens.shape[1], streams=True)
    with progress(total=len(subnetworks) * len(tokens), desc=what, unit="sequence") as bar:
        for name, subnetwork in subnetworks.items():
            bar.set_postfix_str(name, refresh=False)
            watching = observers(name)
            with torch.inference_mode(), reduced_to(model, subnetwork, tokens.size):
                for cpu_batch in in_order(tokens, batch_size):
                    batch = cpu_batch.to(model.cfg.device)
                    seen = Batch(batch, *residual_streams(model, batch))
                    for observer in watching:
                        observer.add(seen)
                    bar.update(len(batch))
