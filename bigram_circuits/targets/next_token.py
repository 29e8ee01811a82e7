"""The actual next token as a target."""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.targets.base import Target, TargetKind


class NextTokenTarget(Target):
    """All probability on the actual next token, so that the CE is the usual language-modelling loss.

    Its surprisal is 0 everywhere, so a correlation with it is undefined. It is not defined at the last position.

    Example:
        >>> bc.evaluate(model, found, bc.NextTokenTarget(), text, controls=False)  # its cross-entropy is the usual loss
    """

    positions = slice(0, -1)
    fingerprint = "next token"

    def cross_entropy(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos_minus_1"]:
        """Return -log softmax(logits) of the actual next token."""
        following = tokens[:, 1:].to(logits.device, torch.long)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), following.flatten(), reduction="none"
        )
        return loss.view(following.shape)

    def surprisal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """Return 0, since the actual next token has probability 1."""
        return torch.zeros(tokens[:, 1:].shape, dtype=torch.float32, device=tokens.device)

    def entropy(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """Return 0, since all probability is on one token."""
        return self.surprisal(tokens)

    def top1(self, tokens: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "batch pos_minus_1"]:
        """Return the actual next tokens."""
        return tokens[:, 1:].long()


TARGET = TargetKind(
    make=lambda model, corpus, order: NextTokenTarget(),
    label=lambda order: "next-token",
    meaning=lambda order: "the actual next token",
    kind="NextTokenTarget",
    does=lambda order: "predict the next token of a text",
    like=lambda order: "the actual next token",
)
