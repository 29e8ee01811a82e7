"""What a finding is tried against: models that learned nothing, models without blocks, targets that mean nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.measures.statistics import correlation, correlation_sums, surprisals
from bigram_circuits.models import native
from bigram_circuits.models.activations import batch_size_for, check_has_readout, readout
from bigram_circuits.models.hooking import hooked
from bigram_circuits.models.layouts import huggingface_layout
from bigram_circuits.models.model import Model
from bigram_circuits.models.native import is_native
from bigram_circuits.models.state import uses_model
from bigram_circuits.models.unhooked import unhooked
from bigram_circuits.progress import steps as counted
from bigram_circuits.targets.base import Target, as_target
from bigram_circuits.text.corpus import batch_of, in_order

RANDOM_BLOCKS, RANDOM_MODEL, SHUFFLED = "re-initialised blocks", "everything re-initialised", "shuffled blocks"


class RenamedTarget(Target):
    """A target under a permutation s of the vocabulary, P'(y | x) = P(s(y) | s(x)): same shape, no meaning.

    Example:
        >>> nonsense = bc.RenamedTarget(target, model.cfg.d_vocab)
        >>> bc.evaluate(model, found, nonsense, text, controls=False)
    """

    def __init__(self, target: Any, d_vocab: int, seed: int = 0) -> None:
        """Permute a target's vocabulary; `seed` draws the permutation s.

        Raises:
            ValueError: If `target` is not a target, or has another vocabulary.
        """
        self.target = as_target(target, d_vocab)
        self.d_vocab = d_vocab
        self.positions = self.target.positions
        self.name_of = torch.from_numpy(np.random.default_rng(seed).permutation(d_vocab))
        identity = {"kind": self.target.kind, "fingerprint": self.target.fingerprint}
        self.fingerprint = f"renamed {seed} {identity}"

    def cross_entropy(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch n"]:
        """CE from the permuted distribution to softmax(logits)."""
        return self.target.cross_entropy(logits[..., self._token_of(logits.device)], self._renamed(tokens))

    def surprisal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """-log P'(actual next token)."""
        return self.target.surprisal(self._renamed(tokens))

    def entropy(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch n"] | None:
        """Entropy of the target at the renamed tokens."""
        return self.target.entropy(self._renamed(tokens))

    def top1(self, tokens: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "batch n"] | None:
        """The most likely tokens of the permuted target."""
        found = self.target.top1(self._renamed(tokens))
        return None if found is None else self._token_of(tokens.device)[found]

    def log_probs(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"] | None:
        """Log probabilities of the permuted target."""
        found = self.target.log_probs(self._renamed(tokens))
        return None if found is None else found[..., self.name_of.to(tokens.device)]

    def _renamed(self, tokens: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "batch pos"]:
        return self.name_of.to(tokens.device)[tokens.long()]

    def _token_of(self, device: torch.device) -> Integer[Tensor, " d_vocab"]:
        """The inverse of the renaming."""
        return self.name_of.argsort().to(device)


@uses_model
def with_random_blocks(model: Model, seed: int = 0, *, everything: bool = False) -> Model:
    """Copy a model and re-initialise its blocks as its library does; everything else stays as trained.

    Args:
        model: From `load_model`.
        seed: Seed of the new weights.
        everything: Re-initialise all weights, also embeddings, final norm and unembedding.

    Returns:
        A new hooked model in eval mode, on the device and in the precision of `model`, which is left unchanged.

    Example:
        >>> control = bc.with_random_blocks(model, seed=1)
        >>> bc.evaluate(control, bc.Subnetwork.full(control), target, text, controls=False)
    """
    plain = unhooked(model)
    untrained = _untrained(plain, seed)
    if not everything:
        place = next(iter(huggingface_layout(model).places.values())).parameter
        blocks = place[: place.index(next(part for part in place.split(".") if part.isdigit()))]
        trained = {name: value for name, value in plain.state_dict().items() if not name.startswith(blocks)}
        untrained.load_state_dict(trained, strict=False)
        if hasattr(untrained, "tie_weights"):
            untrained.tie_weights()
    other = hooked(untrained.to(model.cfg.device), like=model)
    what = RANDOM_MODEL if everything else RANDOM_BLOCKS
    other.cfg.model_name = f"{model.cfg.model_name} with {what} (seed {seed})"
    return other


def _untrained(plain: Any, seed: int) -> Any:
    """A model like `plain`, with new weights."""
    if is_native(plain):
        return native.untrained(plain, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(plain)(plain.config).to(plain.dtype)


@uses_model
def with_shuffled_blocks(model: Model, seed: int = 0) -> Model:
    """Copy a model and shuffle the entries of every maskable weight matrix; everything else stays as trained.

    The matrices keep the distribution of their entries, so what masks can find there depends neither on the scale of
    the weights nor on a few large ones; only where each weight is, which training decided, is lost.

    Args:
        model: From `load_model`.
        seed: Seed of the permutations.

    Returns:
        A new hooked model in eval mode, on the device and in the precision of `model`, which is left unchanged.

    Example:
        >>> control = bc.with_shuffled_blocks(model, seed=1)
        >>> bc.evaluate(control, bc.Subnetwork.full(control), target, text, controls=False)
    """
    plain = unhooked(model)
    generator, state = torch.Generator().manual_seed(seed), plain.state_dict()
    for place in huggingface_layout(model).places.values():
        weight = place.view(state[place.parameter])
        order = torch.randperm(weight.numel(), generator=generator)
        weight.copy_(weight.reshape(-1)[order].view(weight.shape))
    other = hooked(plain.to(model.cfg.device), like=model)
    other.cfg.model_name = f"{model.cfg.model_name} with {SHUFFLED} (seed {seed})"
    return other


@uses_model
def correlation_without_blocks(
    model: Model,
    target: Target,
    tokens: Integer[np.ndarray, "sequence position"],
    linear: Float[Tensor, "d_model d_model"] | None = None,
) -> float:
    """Pearson r with a target's surprisals of embedding, linear map if given, final norm and unembedding.

    No block takes part; position embeddings that a model adds before its first block do. Positions count by the
    zero-probability rule of `measures/statistics.py`.

    Args:
        model: From `load_model`.
        target: The target.
        tokens: Held-out token ids.
        linear: From `learn_linear_map`; a row vector times it is what the final norm reads.

    Raises:
        ValueError: If the model does not compute its logits from the residual stream with final norm and unembedding.
    """
    rows = []
    with torch.inference_mode():
        for cpu_batch in in_order(tokens, batch_size_for(model, tokens.shape[1])):
            batch = cpu_batch.to(model.cfg.device)
            x = surprisals(_without_blocks(model, batch, linear), batch).double()
            rows.append(correlation_sums(x, target.surprisal(batch).to(x)).cpu())
    return float(correlation(torch.cat(rows).sum(0).numpy()))


@uses_model
def learn_linear_map(
    model: Model,
    target: Target,
    tokens: Integer[np.ndarray, "sequence position"],
    *,
    steps: int = 400,
    batch_size: int = 16,
    learning_rate: float | int = 1e-2,
    seed: int = 0,
) -> Float[Tensor, "d_model d_model"]:
    """Learn the linear map between a model's embedding and its final norm that best reproduces a target.

    Learned by gradient on the target's mean cross-entropy: Adam, from the identity, with a learning rate that falls
    linearly to 0. Embedding, final norm and unembedding stay as they are.

    Args:
        model: From `load_model`.
        target: The target.
        tokens: Token ids to learn on.
        steps: Number of steps.
        batch_size: Sequences per step.
        learning_rate: Initial learning rate.
        seed: Seed of the data order.

    Raises:
        ValueError: If the model does not compute its logits from the residual stream with final norm and unembedding.
    """
    device = model.cfg.device
    linear = torch.eye(model.cfg.d_model, device=device).requires_grad_()
    optimizer = torch.optim.Adam([linear], lr=learning_rate)
    for step in counted(range(steps), steps, desc="learning a linear map", unit="step"):
        batch = batch_of(tokens, batch_size, step=step, seed=seed).to(device)
        loss = target.cross_entropy(_without_blocks(model, batch, linear), batch).mean()
        (linear.grad,) = torch.autograd.grad(loss, [linear])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        optimizer.step()
    return linear.detach()


def _without_blocks(
    model: Model, tokens: Integer[Tensor, "batch pos"], linear: Float[Tensor, "d_model d_model"] | None
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits read from the residual stream before the first block."""
    check_has_readout(model, model.cfg.d_model)
    with torch.no_grad():
        embedded = model(tokens, stop_at_layer=0)  # what the first block would read
    return readout(model, embedded if linear is None else (embedded.float() @ linear).to(embedded))
