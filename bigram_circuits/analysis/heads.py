"""What attention heads look at, as scores: the mean attention that each pays to certain earlier positions."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bigram_circuits.analysis.conditions import check_arguments, conditions, reduced_to
from bigram_circuits.masking.apply import MaskLike
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Maps
from bigram_circuits.models.activations import NotShownError, batch_size_for, record
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.names import in_block
from bigram_circuits.tasks.builtin import repeated_random_tokens
from bigram_circuits.tasks.task import batches

_SCORES = (
    Quantity("induction", "share", "Attention to the token after the last occurrence of the current one."),
    Quantity("duplicate_token", "share", "Attention to the last occurrence of the current token."),
    Quantity("previous_token", "share", "Attention to the previous token."),
    Quantity("first_position", "share", "Attention to the first position, where there is nothing to look at."),
)


@uses_model
def head_scores(
    model: Model, subnetwork: MaskLike | None = None, *, prompts: int = 16, period: int = 24, seed: int = 0
) -> Maps:
    """Score every attention head by what it attends to on a block of random tokens that is repeated.

    The means are over the positions of the second block (Olsson et al. 2022, arXiv 2209.11895, whose prefix matching
    score is `induction`). Attention that is uniform over n earlier positions would give each score 1 / n.

    Args:
        model: From `load_model`.
        subnetwork: If given, also measured: the subnetwork, its complement, and a matched random one.
        prompts: Number of prompts.
        period: Tokens in a block.
        seed: Seed of the random tokens and of the matched random subnetwork.

    Returns:
        `Maps` [score, condition, layer, head] with the scores `induction`, `duplicate_token`, `previous_token` and
        `first_position`.

    Raises:
        ValueError: If an argument is out of range, the prompts do not fit the context, or the model does not show its
            attention patterns.
    """
    kept, _ = check_arguments(model, subnetwork, seed=seed)
    tokens = repeated_random_tokens(model, prompts=prompts, period=period, seed=seed).tokens
    named = conditions(kept, seed=seed)
    shape = (len(_SCORES), model.cfg.n_layers, model.cfg.n_heads)
    sums = {name: np.zeros(shape) for name in named}
    for name, condition in named.items():
        for part in batches(len(tokens), batch_size_for(model, tokens.shape[1]), smallest=2):
            batch = torch.from_numpy(tokens[part].astype(np.int64)).to(model.cfg.device)
            points = [in_block(layer, "attn.hook_pattern") for layer in range(model.cfg.n_layers)]
            with torch.inference_mode(), reduced_to(model, condition):
                seen, _ = record(model, batch, points)
            for layer, point in enumerate(points):
                if seen[point].shape[1:] != (model.cfg.n_heads, tokens.shape[1], tokens.shape[1]):
                    raise NotShownError(f"the attention pattern of layer {layer} has shape {tuple(seen[point].shape)}")
                sums[name][:, layer] += _scores(seen[point], period).double().sum(1).cpu().numpy()
    return Maps(
        title="What heads attend to, on repeated random tokens",
        quantities=_SCORES,
        row_axis="layer",
        rows=tuple(map(str, range(model.cfg.n_layers))),
        column_axis="head",
        columns=tuple(map(str, range(model.cfg.n_heads))),
        conditions=tuple(named),
        values=np.stack(list(sums.values()), 1) / len(tokens),
        notes={"prompts": len(tokens), "period": period, "seed": seed},
    )


def _scores(pattern: Float[Tensor, "batch head to from"], period: int) -> Float[Tensor, "score batch head"]:
    """The scores of every head on every prompt."""
    second = torch.arange(pattern.shape[2] - period, pattern.shape[2], device=pattern.device)
    places = (second - period + 1, second - period, second - 1, torch.zeros_like(second))
    return torch.stack([pattern[:, :, second, place].float().mean(-1) for place in places])
