"""Prompts: a text as token ids, and tokens as readable strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor

from bigram_circuits.models.activations import check_tokens
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import check_model
from bigram_circuits.storage.records import is_text
from bigram_circuits.text.tokenizers import shown_tokens, template_of

Prompt = str | Sequence[int] | Integer[Tensor, "..."] | Integer[np.ndarray, "..."]
"""Text, or the token ids of one sequence."""


def is_prompt(text: Any) -> bool:
    """Whether something is a single prompt (a string, or token ids [position]) and not a corpus."""
    return isinstance(text, str) or getattr(text, "ndim", 0) == 1 or (isinstance(text, list) and bool(text))


def prompt_tokens(model: Model, prompt: Prompt) -> Integer[Tensor, "1 pos"]:
    """The token ids of one prompt, on the model's device.

    A text begins with what the tokenizer itself puts before one (the BOS of Llama and Gemma). If that is nothing, it
    begins with its BOS or end-of-text token where the architecture's models expect one (GPT-2), as
    `model.cfg.default_prepend_bos` says. A prompt that is written with the token already gets no second one.

    Raises:
        ValueError: If it is empty, more than one sequence, longer than the context, or has ids outside the vocabulary.
    """
    check_model(model)
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("the prompt is empty")
        _check_text(model, prompt)
        tokens = _token_ids(_encoded(model, prompt))
    else:
        tokens = _token_ids(prompt)
    if tokens.ndim != 2 or tokens.shape[0] != 1 or tokens.shape[1] == 0:
        raise ValueError(f"a prompt is one sequence of tokens, [pos] or [1, pos], not {list(tokens.shape)}")
    check_tokens(model, tokens)
    return tokens.to(model.cfg.device)


def start_of_text(model: Model) -> list[int]:
    """The tokens that every text begins with, as `prompt_tokens` puts them; none without a tokenizer."""
    if model.tokenizer is None:
        return []
    template = template_of(model.tokenizer)
    start = list(template.before)
    if not start and getattr(model.cfg, "default_prepend_bos", True):
        start = list(template.separator) if template.bos is None else [template.bos]
    return start


def _encoded(model: Model, text: str) -> list[int]:
    start = start_of_text(model)
    ids = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids if start and ids[: len(start)] == start else start + ids


def _token_ids(prompt: Any) -> Integer[Tensor, "..."]:
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"a prompt is a text or the token ids of one sequence, not the {type(prompt).__name__} {str(prompt)[:40]!r}"
        ) from error
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise ValueError(f"tokens have dtype {str(ids.dtype).removeprefix('torch.')} but should be integer ids")
    ids = ids.long()
    return ids[None] if ids.ndim == 1 else ids


def position_of(position: int, length: int) -> int:
    """A position counted from the start. Raises ValueError if there is none."""
    if not -length <= position < length:
        raise ValueError(f"there is no position {position} in a prompt of {length} tokens")
    return position % length


def check_tokenizer(model: Model) -> None:
    """Raise ValueError if the model has no tokenizer."""
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer: give token ids instead of text")


def _check_text(model: Model, text: str) -> None:
    """Raise ValueError if the model has no tokenizer, or there is no such text."""
    check_tokenizer(model)
    if not is_text(text):
        raise ValueError(f"{text[:40]!r} contains an unpaired surrogate, which is half a character and no text")


def token_id(model: Model, token: str | int) -> int:
    """The id of a token given by its id, as a text that is one token, or else as it is shown (`<0x0A>`).

    Raises:
        ValueError: If the text is not one token, or there is no such id.
    """
    if isinstance(token, str):
        _check_text(model, token)
        ids = model.tokenizer(token, add_special_tokens=False)["input_ids"]
        shown = shown_tokens(model.tokenizer, range(min(len(model.tokenizer), model.cfg.d_vocab)))
        if len(ids) != 1 and token in shown:
            return shown.index(token)
        if len(ids) != 1:
            raise ValueError(f"{token!r} is {len(ids)} tokens, but one is needed: give the id of one of {ids}")
        return ids[0]
    if not isinstance(token, int | np.integer) or not 0 <= token < model.cfg.d_vocab:
        raise ValueError(f"there is no token {token}: ids are 0 to {model.cfg.d_vocab - 1}")
    return int(token)


def token_words(model: Model, ids: Sequence[int]) -> list[str]:
    """Tokens as readable strings, by `shown_tokens`; without a tokenizer, their ids."""
    if model.tokenizer is None:
        return [str(index) for index in ids]
    return shown_tokens(model.tokenizer, ids)


def token_word(model: Model, index: int) -> str:
    """One token as a readable string."""
    return token_words(model, [index])[0]


def position_names(model: Model, tokens: Integer[Tensor, "one pos"]) -> tuple[str, ...]:
    """`0: The`, `1: value`, ...: unique names for the positions of a prompt."""
    return tuple(f"{place}: {word}" for place, word in enumerate(token_words(model, tokens[0].tolist())))
