"""What is measured side by side: the full model, a subnetwork, its complement, a matched random subnetwork.

`observe` is the one loop of the analyses: for every condition it streams the text through the model once and shows
each batch's residual streams and logits to observers, which add up what they need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor
from tqdm.auto import tqdm

from bigram_circuits.masking.apply import masked
from bigram_circuits.measures.conditions import COMPARED
from bigram_circuits.models.activations import batch_size_for, check_model, check_tokens, residual_streams
from bigram_circuits.models.model import Model
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.targets.base import Target, as_target
from bigram_circuits.text.corpus import in_order, token_array

Conditions = Mapping[str, Subnetwork | None]
"""By name: the weights that are kept, or None for all of them."""


def check_arguments(model: Model, subnetwork: Any = None, *, target: Any = None, seed: int = 0) -> Target | None:
    """The door of a public analysis: what is within takes these as they are.

    Returns:
        What to take as the target; None if there is none.

    Raises:
        ValueError: If it is no model, no subnetwork of it, no target of its vocabulary, or the seed is below 0.
    """
    check_model(model)
    check_seed(seed)
    check_subnetwork(subnetwork)
    if subnetwork is not None:
        subnetwork.check_fits(model)
    return None if target is None else as_target(target, model.cfg.d_vocab)


def checked_text(model: Model, text: Any) -> Integer[np.ndarray, "sequence position"]:
    """Token ids that the model can read, of a corpus those of its held-out part. Raises ValueError if they are none."""
    check_model(model)
    array = token_array(text)
    check_tokens(model, array)
    return array


def conditions(subnetwork: Subnetwork | None, *, seed: int = 0) -> dict[str, Subnetwork | None]:
    """`full`, and if there is a subnetwork also `subnetwork`, `complement` and `random` (one matched random draw)."""
    if subnetwork is None:
        return {COMPARED[0]: None}
    return dict(zip(COMPARED, (None, subnetwork, ~subnetwork, subnetwork.random_like(seed=seed)), strict=True))


def check_subnetwork(subnetwork: Any) -> None:
    """Raise ValueError unless it is a subnetwork, or None."""
    if subnetwork is not None and not isinstance(subnetwork, Subnetwork):
        raise ValueError(
            f"a {type(subnetwork).__name__} is no subnetwork: pass a Subnetwork, read from a file if need be"
        )


def check_seed(seed: Any) -> None:
    """Raise ValueError unless it is a whole number from 0."""
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"a seed must be a whole number, 0 or more, not {seed!r}")


def reduced_to(model: Model, subnetwork: Subnetwork | None) -> AbstractContextManager[Any]:
    """`masked`, or nothing where all weights are kept."""
    return nullcontext(model) if subnetwork is None else masked(model, subnetwork)


@dataclass(frozen=True)
class Batch:
    """What one forward pass shows."""

    tokens: Integer[Tensor, "batch pos"]
    """Token ids."""
    residual: Float[Tensor, "layer batch pos d_model"]
    """The residual stream before every block and after the last (n_layers + 1 entries)."""
    logits: Float[Tensor, "batch pos d_vocab"]
    """The model's own."""


def layer_names(model: Model) -> tuple[str, ...]:
    """`embed`, then the blocks after which the residual stream is read: `0`, `1`, ..."""
    return ("embed", *map(str, range(model.cfg.n_layers)))


class Observer(Protocol):
    """Something that adds up what it needs over a text."""

    def add(self, batch: Batch) -> None:
        """Take in a batch, under `torch.inference_mode`."""
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
    with tqdm(total=len(subnetworks) * len(tokens), desc=what, unit="sequence", delay=2, leave=False) as bar:
        for name, subnetwork in subnetworks.items():
            bar.set_postfix_str(name, refresh=False)
            watching = observers(name)
            with torch.inference_mode(), reduced_to(model, subnetwork):
                for cpu_batch in in_order(tokens, batch_size):
                    batch = cpu_batch.to(model.cfg.device)
                    seen = Batch(batch, *residual_streams(model, batch))
                    for observer in watching:
                        observer.add(seen)
                    bar.update(len(batch))
