"""The actual next token."""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.targets.base import Target, TargetKind


class NextTokenTarget(Target):
    """The actual next token: all probability on it. The CE is a language model's own loss.

    Its surprisal is 0 everywhere, so a correlation with it is undefined. It says nothing about the last position.
    """

    positions = slice(0, -1)
    fingerprint = "next token"

    def cross_entropy(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos_minus_1"]:
        """-log softmax(logits) of the actual next token."""
        following = tokens[:, 1:].to(logits.device, torch.long)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), following.flatten(), reduction="none"
        )
        return loss.view(following.shape)

    def surprisal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """0: the actual next token has probability 1."""
        return torch.zeros(tokens[:, 1:].shape, device=tokens.device)

    def entropy(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """0."""
        return self.surprisal(tokens)

    def top1(self, tokens: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "batch pos_minus_1"]:
        """The actual next token."""
        return tokens[:, 1:].long()


TARGET = TargetKind(
    make=lambda model, corpus, order: NextTokenTarget(),
    label=lambda order: "next-token",
    meaning=lambda order: "the actual next token",
)
