"""A model's own next-token distribution, the target of optimal pruning."""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.models.activations import check_tokens, n_outputs, predicts_tokens
from bigram_circuits.models.identity import weight_hash
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import check_model, in_use, memo
from bigram_circuits.models.weights import full_weights
from bigram_circuits.targets.base import Target, TargetKind


class ModelTarget(Target):
    """A model's own next-token distribution: the target of optimal pruning.

    The model may be the one that is being masked; the target always uses its full weights. If the model's outputs are
    no tokens (`d_vocab_out`), it is the distribution over these.

    Example:
        >>> bc.evaluate(model, found, bc.ModelTarget(model), text, controls=False)  # KL from the full model
    """

    d_vocab: int

    def __init__(self, model: Model) -> None:
        """Take a model from `load_model`."""
        check_model(model)
        self.model = model
        self.d_vocab = n_outputs(model)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.over_tokens = predicts_tokens(model)

    @property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The hash of the model's weights as they are now."""
        return f"model {weight_hash(self.model)}"

    def log_probs(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Return log softmax of the full model's logits, on their device.

        Within one call of a public function, such as `evaluate`, the result for the last batch is remembered.

        Raises:
            ValueError: If a token id is outside the model's vocabulary, or the sequences exceed its context length.
        """
        known = memo()
        last: tuple[Tensor, Tensor] | None = None if known is None else known.get(self)
        if last is None or last[0].device != tokens.device or not torch.equal(last[0], tokens):
            check_tokens(self.model, tokens)
            with in_use(self.model, "ModelTarget"), torch.no_grad(), full_weights(self.model):
                last = tokens, self.model(tokens.clone().to(self.model.cfg.device)).float().log_softmax(-1)
            if known is not None:
                known[self] = last
        return last[1]

    def cross_entropy(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos"]:
        """Return CE(full model, softmax(logits)) in nats."""
        return -(self.log_probs(tokens).to(logits.device).exp() * logits.float().log_softmax(-1)).sum(-1)

    def surprisal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """Return the full model's surprisal of the actual next token, in nats; inf if its outputs are no tokens."""
        if not self.over_tokens:
            return torch.full(tokens[:, 1:].shape, torch.inf, dtype=torch.float32, device=tokens.device)
        log_probs = self.log_probs(tokens)
        following = tokens[:, 1:, None].to(log_probs.device, torch.long)
        return -log_probs[:, :-1].gather(2, following).squeeze(2)

    def entropy(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
        """Return the entropy of the full model's distribution, in nats."""
        log_probs = self.log_probs(tokens)
        return -(log_probs.exp() * log_probs).sum(-1)

    def top1(self, tokens: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "batch pos"]:
        """Return the full model's most likely next tokens."""
        return self.log_probs(tokens).argmax(-1)


TARGET = TargetKind(
    make=lambda model, corpus, order: ModelTarget(model),
    label=lambda order: "self-faithful",
    meaning=lambda order: "the model's own predictions",
    kind="ModelTarget",
    does=lambda order: "predict the next token as the whole model does",
    like=lambda order: "those of the whole model",
)
