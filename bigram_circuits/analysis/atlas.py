"""What follows the most frequent tokens in a masked model, and through which neurons: explanations of many tokens.

Every token is explained by itself, after what the tokenizer puts at the beginning of a text. That is all there is to
see for a bigram subnetwork; of a mask that looks further back it shows what the last token alone does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor

from bigram_circuits.analysis.arguments import usual_order
from bigram_circuits.analysis.conditions import check_arguments, checked_text
from bigram_circuits.analysis.explaining import Limits, explained, functional, taken_apart
from bigram_circuits.analysis.prompts import start_of_text
from bigram_circuits.analysis.unit_tokens import unit_tokens
from bigram_circuits.explanations.explanation import Atlas, Explanation
from bigram_circuits.masking.apply import Mask, MaskLike
from bigram_circuits.models.activations import NotShownError
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.names import model_words
from bigram_circuits.progress import steps

TOKENS = 200
"""How many tokens an atlas has if nothing else is asked for."""
_LIMITS = Limits(nodes=40, edges=160, paths=8)


@usual_order
@uses_model
def atlas(model: Model, subnetwork: MaskLike | None = None, text: Any = None, *, tokens: int = TOKENS) -> Atlas:
    """Explain what a masked model predicts after each of the most frequent tokens of a text.

    Args:
        model: From `load_model`, on its raw weights.
        subnetwork: As for `explain`.
        text: A `Corpus` (its held-out part) or token ids [sequence, position], in which tokens are counted.
        tokens: Number of tokens; those that occur most.

    Raises:
        ValueError: If `tokens` is below 1, or subnetwork or text do not fit the model.
        NotShownError: As for `explain`.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, not {tokens}")
    kept, _ = check_arguments(model, subnetwork)
    return atlas_of(model, kept, checked_text(model, text), tokens)


def atlas_of(model: Model, kept: Mask | None, text: Integer[np.ndarray, "sequence position"], tokens: int) -> Atlas:
    """`atlas` on checked arguments."""
    chosen, counts = frequent_tokens(model, text, tokens)
    found: list[Explanation] = []
    with torch.no_grad(), taken_apart(model, kept) as apart:
        prompts = prompts_of(model, chosen)
        for prompt in steps(prompts, len(prompts), desc="explaining tokens", unit="token"):
            passed, place = apart(prompt), prompt.shape[1] - 1
            asked = functional(model, None, None, passed.shown[place])
            found.append(explained(model, kept, passed, prompt, place, asked, _LIMITS, brief=True))
        labels = {node.label: None for one in found for node in one.nodes if node.kind in ("neuron", "head")}
        units = unit_tokens(model, apart(prompts[0]), labels)
    name = model_words(model.cfg.model_name)
    what = f"the {kept.noun} of {name}" if kept is not None else name
    return Atlas(
        title=f"What follows the {len(found)} most frequent tokens in {what}",
        explanations=tuple(found),
        counts=tuple(counts),
        units=units,
        notes={"text_tokens": int(text.size)},
    )


def frequent_tokens(
    model: Model, text: Integer[np.ndarray, "sequence position"], most: int
) -> tuple[list[int], list[int]]:
    """The most frequent tokens of a text, but for those that begin every text, and how often each occurs."""
    counts = np.bincount(text.ravel(), minlength=model.cfg.d_vocab)
    counts[start_of_text(model)] = 0
    order = np.argsort(-counts, kind="stable")[:most]
    order = order[counts[order] > 0]
    if not len(order):
        raise NotShownError("the text has no token but those that begin a text")
    return order.tolist(), counts[order].tolist()


def prompts_of(model: Model, tokens: Sequence[int]) -> list[Integer[Tensor, "1 pos"]]:
    """Each token by itself, after what begins a text."""
    start = start_of_text(model)
    return [torch.tensor([[*start, token]], device=model.cfg.device) for token in tokens]
