"""Formulas of a model's answers: pure functions of log-probabilities at the places where the answers are predicted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor


def log_total(
    log_probs: Float[Tensor, "*row d_vocab"], ids: Integer[Tensor, "*row candidate"]
) -> Float[Tensor, "*row"]:
    """Log probability of a set of tokens; ids of -1 are padding."""
    return log_probs.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf).logsumexp(-1)


def is_preferred(
    log_probs: Float[Tensor, "row d_vocab"],
    right: Integer[Tensor, "row right"],
    wrong: Integer[Tensor, "row wrong"],
) -> Bool[Tensor, " row"]:
    """Whether the most likely of a row's right and wrong tokens is a right one; ids of -1 are padding."""
    best = [log_probs.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf).amax(1) for ids in (right, wrong)]
    return best[0] > best[1]


@dataclass(frozen=True)
class Answers:
    """Where the answers of some rows are predicted, and which tokens are right and wrong there."""

    places: Integer[Tensor, "row place"]
    """The positions whose logits predict the tokens of the answer, in order; padded with -1."""
    right: Integer[Tensor, "row place right"]
    """The tokens that all count as correct at each place; padded with -1."""
    wrong: Integer[Tensor, "row wrong"] | None
    """The tokens that the right ones are contrasted with, padded with -1; None if there is no contrast."""

    @classmethod
    def of(
        cls,
        tokens: Integer[np.ndarray, "row position"],
        scored: Bool[np.ndarray, "row position"],
        right: Integer[np.ndarray, "row right"] | None,
        wrong: Integer[np.ndarray, "row wrong"] | None,
    ) -> Answers:
        """Find the answers of rows whose scored tokens are marked; `right` and `wrong` are as in `Task`."""
        counts = scored.sum(1)
        most = int(counts.max())
        order = np.argsort(~scored, axis=1, kind="stable")[:, :most]  # scored positions come first, in order
        is_place = np.arange(most) < counts[:, None]
        own = np.where(is_place, np.take_along_axis(tokens, order, 1), -1)
        found = own[:, :, None] if right is None else right[:, None, :]
        tensors = [torch.from_numpy(part.astype(np.int64)) for part in (np.where(is_place, order - 1, -1), found)]
        return cls(tensors[0], tensors[1], None if wrong is None else torch.from_numpy(wrong.astype(np.int64)))

    def at(self, rows: Integer[Tensor, " chosen"], device: torch.device) -> Answers:
        """Some rows, on a device."""
        wrong = None if self.wrong is None else self.wrong[rows].to(device)
        return Answers(self.places[rows].to(device), self.right[rows].to(device), wrong)

    def read(
        self, logits: Float[Tensor, "row pos d_vocab"], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "row place d_vocab"]:
        """Log-probabilities at the places, computed in `dtype`; those of padding mean nothing."""
        each = torch.arange(len(logits), device=logits.device)[:, None]
        return logits[each, self.places.clamp(min=0)].to(dtype).log_softmax(-1)

    def total(self, values: Float[Tensor, "row place"]) -> Float[Tensor, " row"]:
        """The sum over the places of each row."""
        return torch.where(self.places < 0, 0.0, values).sum(1)

    def log_prob(self, log_probs: Float[Tensor, "row place d_vocab"]) -> Float[Tensor, " row"]:
        """Log P(answer | prompt), the sum over the answer's tokens."""
        return self.total(log_total(log_probs, torch.where(self.places[..., None] < 0, 0, self.right)))

    def is_first(self, log_probs: Float[Tensor, "row place d_vocab"]) -> Bool[Tensor, " row"]:
        """Whether every token of the answer is the most likely one, which is what greedy decoding would write."""
        return ((log_probs.argmax(-1)[..., None] == self.right).any(-1) | (self.places < 0)).all(1)

    def log_odds(self, log_probs: Float[Tensor, "row one d_vocab"]) -> Float[Tensor, " row"]:
        """Log P(right) - log P(wrong): for one right and one wrong token, the difference of their logits."""
        assert self.wrong is not None, "checked when the task came in"
        return log_total(log_probs[:, 0], self.right[:, 0]) - log_total(log_probs[:, 0], self.wrong)

    def is_preferred(self, log_probs: Float[Tensor, "row one d_vocab"]) -> Bool[Tensor, " row"]:
        """Whether the most likely of right and wrong tokens is a right one."""
        assert self.wrong is not None, "checked when the task came in"
        return is_preferred(log_probs[:, 0], self.right[:, 0], self.wrong)

    def cross_entropy(
        self, theirs: Float[Tensor, "row place d_vocab"], log_probs: Float[Tensor, "row place d_vocab"]
    ) -> Float[Tensor, " row"]:
        """Cross-entropy from other distributions at the same places, the sum over the answer's tokens."""
        return self.total(-(theirs.exp() * log_probs).sum(-1))
