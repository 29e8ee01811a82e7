"""What the latents of a dictionary write, in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.analysis.prompts import token_words
from bigram_circuits.models.activations import (
    NotShownError,
    check_has_readout,
    check_predicts_tokens,
    rows_at_once,
)
from bigram_circuits.models.dictionaries import Dictionary
from bigram_circuits.models.model import Model
from bigram_circuits.models.norms import frozen_norm
from bigram_circuits.models.state import uses_model

_ELSEWHERE = ("hook_z", "hook_q", "hook_k", "hook_v", "hook_normalized")  # as wide as the residual stream, perhaps


@dataclass(frozen=True, eq=False)
class FeatureTokens:
    """The tokens whose logits each latent of a dictionary raises most.

    Example:
        >>> features = analysis.feature_tokens(model, dictionary, top=3)
        >>> print(features.words[17])  # the tokens that latent 17 raises most
    """

    tokens: Integer[np.ndarray, "feature rank"]
    """Token ids, from the largest logit down."""
    logits: Float[np.ndarray, "feature rank"]
    """Logits of these tokens for the latent's direction alone, through the final norm without its bias."""
    words: tuple[tuple[str, ...], ...]
    """The tokens as readable strings, [feature][rank]; without a tokenizer, their ids."""

    def name(self, feature: int) -> str:
        """Name a latent by its tokens: `feature 17: ' the', ' a'`.

        Raises:
            ValueError: If there is no such latent.
        """
        if not 0 <= feature < len(self.words):
            raise ValueError(f"there is no feature {feature}: there are 0 to {len(self.words) - 1}")
        return f"feature {feature}: {', '.join(map(repr, self.words[feature]))}"

    def __len__(self) -> int:
        return len(self.words)

    def __repr__(self) -> str:
        return f"FeatureTokens({len(self)} features; {self.name(0)}, ...)"


@uses_model
def feature_tokens(model: Model, dictionary: Any, *, top: int = 5) -> FeatureTokens:
    """The tokens whose logits the decoder direction of each latent raises most.

    As in direct logit attribution, a direction d gives the logits norm(d) . W_U, where norm is the final norm of d
    alone without its bias. A sum over paths through later blocks is not in it.

    Args:
        model: From `load_model`.
        dictionary: One that writes to the residual stream: a `Dictionary`, or what `spliced` takes, whose decoder is
            linear.
        top: Number of tokens for each latent.

    Raises:
        ValueError: If `top` is not from 1 to the size of the vocabulary, or the dictionary does not write to the
            residual stream.

    Example:
        >>> features = analysis.feature_tokens(model, dictionary, top=3)
        >>> print(features.words[17], features.logits[17])
    """
    check_predicts_tokens(model)
    if not 1 <= top <= model.cfg.d_vocab:
        raise ValueError(f"top must be from 1 to {model.cfg.d_vocab}, the size of the vocabulary, not {top}")
    with torch.no_grad():
        directions = _directions(model, dictionary)
        check_has_readout(model, directions.shape[1])
        found = []
        for part in directions.split(rows_at_once(model.cfg.d_vocab)):
            part = part.to(model.W_U.device).float()
            found.append((frozen_norm(model, model.ln_final, part).of(part) @ model.W_U.float()).topk(top))
    tokens = torch.cat([one.indices for one in found]).cpu()
    words = tuple(tuple(token_words(model, ids)) for ids in tokens.tolist())
    return FeatureTokens(tokens.numpy(), torch.cat([one.values for one in found]).cpu().numpy(), words)


def _directions(model: Model, dictionary: Any) -> Float[Tensor, "feature d_out"]:
    """What each latent writes, up to its scale."""
    if not isinstance(dictionary, Dictionary):
        latents = dictionary.encode(torch.zeros(1, 1, model.cfg.d_model, device=model.cfg.device))
        units = torch.eye(latents.shape[-1], device=latents.device, dtype=latents.dtype)
        return (dictionary.decode(units[None]) - dictionary.decode(torch.zeros_like(units[:1])[None]))[0]
    writes = dictionary.hook_name_out or dictionary.hook_name or ""
    if dictionary.d_out != model.cfg.d_model or writes.endswith(_ELSEWHERE):
        where = f"{dictionary.d_out} numbers{f' at {writes}' if writes else ''}"
        raise NotShownError(f"this dictionary writes {where}, not to the residual stream of {model.cfg.d_model}")
    return dictionary.W_dec
