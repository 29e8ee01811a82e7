"""A model's own distribution over the next token: optimal pruning."""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.models.model import Model
from bigram_circuits.models.weights import full_weights, weight_hash
from bigram_circuits.targets.base import Target, TargetKind


class ModelTarget(Target):
    """A model's own distribution over the next token: what optimal pruning asks for.

    The model may be the one that is being masked: for the target it runs on all its weights.
    """

    d_vocab: int

    def __init__(self, model: Model) -> None:
        """Take a model from `load_model`."""
        self.model = model
        self.d_vocab = model.cfg.d_vocab  # pyright: ignore[reportIncompatibleVariableOverride]
        self.fingerprint = f"model {weight_hash(model)}"
        self._last: tuple[Tensor, Tensor] | None = None

    def log_probs(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """log softmax of the full model's logits; that of the last batch is remembered."""  # noqa: D403
        if self._last is None or not torch.equal(self._last[0], tokens):
            with torch.inference_mode(False), torch.no_grad(), full_weights(self.model):
                log_probs = self.model(tokens.clone()).float().log_softmax(-1)
            self._last = (tokens, log_probs)
        return self._last[1]

    def cross_entropy(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos"]:
        """CE from the full model's distribution to softmax(logits)."""
        return -(self.log_probs(tokens).exp() * logits.float().log_softmax(-1)).sum(-1)

    def surprisal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """The full model's surprisal of the actual next token."""
        following = tokens[:, 1:, None].long()
        return -self.log_probs(tokens)[:, :-1].gather(2, following).squeeze(2)

    def entropy(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
        """Entropy of the full model's distribution."""
        log_probs = self.log_probs(tokens)
        return -(log_probs.exp() * log_probs).sum(-1)

    def top1(self, tokens: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "batch pos"]:
        """The full model's most likely token."""
        return self.log_probs(tokens).argmax(-1)


TARGET = TargetKind(
    make=lambda model, corpus, order: ModelTarget(model),
    label=lambda order: "self-faithful",
    meaning=lambda order: "the model's own predictions",
)
