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
from bigram_circuits.tasks.task import Task

TOKENS = 200
"""How many tokens an atlas has if nothing else is asked for."""
PROMPTS = 12
"""How many prompts of a task are explained."""
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

    Example:
        >>> atlas = analysis.atlas(model, found, corpus, tokens=3)
        >>> atlas.to_dataframe()
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, not {tokens}")
    kept, _ = check_arguments(model, subnetwork)
    return atlas_of(model, kept, checked_text(model, text), tokens)


def atlas_of(model: Model, kept: Mask | None, text: Integer[np.ndarray, "sequence position"], tokens: int) -> Atlas:
    """`atlas` on checked arguments."""
    chosen, counts = frequent_tokens(model, text, tokens)
    asked = [(prompt, None, None) for prompt in prompts_of(model, chosen)]
    title = f"What follows the {len(chosen)} most frequent tokens in {_what(model, kept)}"
    return _atlas(model, kept, asked, counts, title, {"text_tokens": int(text.size)})


def atlas_of_task(model: Model, kept: Mask | None, task: Task, prompts: int = PROMPTS) -> Atlas:
    """Explain how a masked model comes to its answers: the first prompts of a task, each up to its answer.

    Explained is the logit of the right answer (its first token), less that of the first wrong one if there are any.

    Raises:
        NotShownError: As for `explain`.
    """
    asked = []
    for row in range(min(prompts, len(task))):
        place = int(task.scored[row].argmax())
        right = int(task.tokens[row, place]) if task.right is None else int(task.right[row, 0])
        wrong = None if task.wrong is None else int(task.wrong[row, 0])
        ids = torch.from_numpy(task.tokens[row : row + 1, :place].astype(np.int64)).to(model.cfg.device)
        asked.append((ids, right, None if wrong == right else wrong))
    title = f"How {_what(model, kept)} answers: {len(asked)} prompts of {task.name}"
    return _atlas(model, kept, asked, [1] * len(asked), title, {"task": task.name})


def _atlas(
    model: Model,
    kept: Mask | None,
    asked: Sequence[tuple[Integer[Tensor, "1 pos"], int | None, int | None]],
    counts: Sequence[int],
    title: str,
    notes: dict[str, Any],
) -> Atlas:
    """Explanations of the last position of prompts, each with the answer and the wrong token to explain."""
    found: list[Explanation] = []
    with torch.no_grad(), taken_apart(model, kept) as apart:
        every = zip(asked, apart(prompt for prompt, _, _ in asked), strict=True)
        for (prompt, answer, wrong), passed in steps(every, len(asked), desc="explaining", unit="prompt"):
            place = prompt.shape[1] - 1
            about = functional(model, answer, wrong, passed.shown[place])
            found.append(explained(model, kept, passed, prompt, place, about, _LIMITS, brief=True))
        labels = {node.label: None for one in found for node in one.nodes if node.kind in ("neuron", "head")}
        units = unit_tokens(model, next(apart([asked[0][0]])), labels)
    return Atlas(title, tuple(found), tuple(counts), units, notes)


def _what(model: Model, kept: Mask | None) -> str:
    name = model_words(model.cfg.model_name)
    return name if kept is None else f"the {kept.noun} of {name}"


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
