"""Whether an explanation predicts: what it says that a neuron adds, against what its removal does.

A picture that does not predict is decoration. The fall of a logit when a neuron is removed is compared, over many
neurons and tokens, with the neuron's direct contribution to it and with what flows through the neuron along all paths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.analysis.arguments import usual_order
from bigram_circuits.analysis.atlas import frequent_tokens, prompts_of
from bigram_circuits.analysis.conditions import check_arguments, checked_text
from bigram_circuits.analysis.explaining import Asked, functional, taken_apart
from bigram_circuits.analysis.prompts import token_words
from bigram_circuits.analysis.registry import Subject, in_suite
from bigram_circuits.masking.apply import Mask, MaskLike
from bigram_circuits.measures import statistics
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Scatter
from bigram_circuits.models.activations import NotShownError
from bigram_circuits.models.interventions import intervened
from bigram_circuits.models.linearised import Linearised, Neurons
from bigram_circuits.models.model import Model
from bigram_circuits.models.nodes import UNITS
from bigram_circuits.models.resuming import KnownPasses
from bigram_circuits.models.state import uses_model
from bigram_circuits.names import in_block, neuron_label
from bigram_circuits.progress import progress

_TOKENS_AT_ONCE = 2048  # tokens of a forward pass with a neuron removed in every row
_STORED = 3000  # points of a scatter plot that are kept


@usual_order
@uses_model
def predicted_effects(
    model: Model,
    subnetwork: MaskLike | None = None,
    text: Any = None,
    *,
    tokens: int = 24,
    neurons: int | None = None,
    seed: int = 0,
) -> Scatter:
    """Whether explanations predict what the removal of a neuron does.

    For each of the most frequent tokens, the logit of the token that the masked model predicts next is explained. Every
    neuron that is active is then removed, and the fall of this logit compared with what the explanation says that the
    neuron adds to it: directly, and along all paths.

    Args:
        model: From `load_model`, on its raw weights.
        subnetwork: As for `explain`.
        text: A `Corpus` (its held-out part) or token ids [sequence, position], in which tokens are counted.
        tokens: Number of tokens.
        neurons: Most neurons to remove for each token, drawn at random; None for all.
        seed: Seed of this draw.

    Returns:
        `Scatter` of the pairs of token and neuron: `direct`, `flow` and `measured`, in logits (of many pairs, a random
        part). `notes["direct"]` and `notes["flow"]` have, over all pairs, Pearson's `r` and the `slope` of the measured
        on the predicted effect (1 if the size is right), with 95% intervals from a bootstrap over tokens.

    Raises:
        ValueError: If a number is below 1, or subnetwork or text do not fit the model.
        NotShownError: If no neuron is active, or as for `explain`.

    Example:
        >>> predicted = analysis.predicted_effects(model, found, text, tokens=3)
        >>> predicted.notes["flow"]  # r and slope
    """
    if min(tokens, 1 if neurons is None else neurons) < 1:
        raise ValueError(f"tokens and neurons must be at least 1, not {tokens} and {neurons}")
    kept, _ = check_arguments(model, subnetwork, seed=seed)
    return _predicted_effects(model, kept, checked_text(model, text), tokens, neurons, seed)


@dataclass(frozen=True, eq=False)
class _Removals:
    """The neurons to remove after one prompt, and what is predicted for each."""

    prompt: Integer[Tensor, "1 pos"]
    asked: Asked
    value: float
    """What the model shows, with all neurons."""
    layers: Integer[Tensor, " neuron"]
    indices: Integer[Tensor, " neuron"]
    direct: Float[Tensor, " neuron"]
    flow: Float[Tensor, " neuron"]


def _predicted_effects(
    model: Model,
    kept: Mask | None,
    array: Integer[np.ndarray, "sequence position"],
    tokens: int,
    neurons: int | None,
    seed: int,
) -> Scatter:
    chosen, _ = frequent_tokens(model, array, tokens)
    rng = np.random.default_rng(seed)
    sums, rows, names = [], [], list[str]()
    with torch.no_grad(), taken_apart(model, kept) as apart:
        prompts = prompts_of(model, chosen)
        every = zip(apart(prompts), prompts, strict=True)
        found = [_removals(model, passed, prompt, neurons, rng) for passed, prompt in every]
        with progress(sum(len(one.layers) for one in found), desc="removing neurons", unit="neuron") as bar:
            for word, one in zip(token_words(model, chosen), found, strict=True):
                measured = _measured(model, one, bar.update)
                both = torch.stack([one.direct, one.flow, measured]).double().cpu().numpy()
                sums.append(_moments(both))
                rows.append(both)
                places = zip(one.layers.tolist(), one.indices.tolist(), strict=True)
                names += [f"{neuron_label(*place)} after {word!r}" for place in places]
    values = np.concatenate(rows, 1)
    if not values.size:
        raise NotShownError("no neuron is active after these tokens")
    stored = np.sort(rng.permutation(values.shape[1])[:_STORED])
    unknown = np.full((3, len(stored)), np.nan)
    return Scatter(
        title="Does the picture predict? Each point is a neuron after a token",
        quantities=_PREDICTED,
        subject="neuron",
        names=tuple(names[i] for i in stored),
        values=values[:, stored],
        low=unknown,
        high=unknown,
        against="measured",
        notes={
            "pairs": values.shape[1],
            "tokens": len(chosen),
            "direct": _fit(np.stack(sums), 0),
            "flow": _fit(np.stack(sums), 1),
            "seed": seed,
            "interval": "95%, bootstrap over tokens",
        },
    )


_PREDICTED = (
    Quantity("direct", "logits", "What the neuron adds to the logit of the predicted token by itself."),
    Quantity("flow", "logits", "What it adds along all paths, with patterns, scales and slopes frozen."),
    Quantity("measured", "logits", "How far the logit falls when the neuron is removed."),
)


def _removals(
    model: Model, passed: Linearised, prompt: Integer[Tensor, "1 pos"], most: int | None, rng: np.random.Generator
) -> _Removals:
    place = prompt.shape[1] - 1
    asked = functional(model, None, None, passed.shown[place])
    end = passed.direction(asked.weights, place)
    flows, _ = passed.flows(end)
    layers, indices, direct, flow = [], [], [], []
    for writer, along in zip(passed.writers, flows, strict=True):
        if not isinstance(writer, Neurons):
            continue
        active = (writer.activation.any(0) & writer.kept).nonzero().flatten()
        layers.append(torch.full_like(active, writer.layer))
        indices.append(active)
        direct.append(writer.on(end).sum(0)[active])
        flow.append(along.sum(0)[active])
    if not layers:
        raise NotShownError("this model has no neurons that can be taken apart")
    every = [torch.cat(part) for part in (layers, indices, direct, flow)]
    if most is not None and len(every[0]) > most:
        drawn = torch.from_numpy(np.sort(rng.choice(len(every[0]), most, replace=False))).to(every[0].device)
        every = [part[drawn] for part in every]
    return _Removals(prompt, asked, float(passed.shown[place] @ asked.weights), *every)


def _measured(model: Model, removals: _Removals, done: Callable[[int], Any]) -> Float[Tensor, " neuron"]:
    """How far the functional falls without each neuron."""
    length = removals.prompt.shape[1]
    layers, counts = removals.layers.unique(return_counts=True)
    if not len(layers):
        return removals.direct
    most = min(int(counts.max()), max(1, _TOKENS_AT_ONCE // length))
    passes, found = KnownPasses(model), []
    with passes.first_pass():
        model(removals.prompt.expand(most, length))
    for layer in layers.tolist():
        for part in removals.indices[removals.layers == layer].split(most):
            removed = intervened(model, [(in_block(layer, UNITS["neuron"]), _without(part))])
            with removed, passes.again(0, layer, len(part)):
                logits = model(removals.prompt.expand(len(part), length))[:, -1].float()
            found.append(removals.value - logits @ removals.asked.weights)
            done(len(part))
    return torch.cat(found)


def _without(neurons: Integer[Tensor, " row"]) -> Callable[..., Tensor]:
    """A hook that sets another neuron to 0 in every row of the batch."""

    def hook(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[torch.arange(len(neurons), device=value.device), :, neurons] = 0
        return value

    return hook


def _moments(values: Float[np.ndarray, "quantity neuron"]) -> Float[np.ndarray, " moment"]:
    """For one token: n, then for direct and flow the sums of x, y, xx, yy and xy, where y is measured."""
    y = values[2]
    sums = [[x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()] for x in values[:2]]
    return np.array([len(y), *sums[0], *sums[1]])


def _fit(sums: Float[np.ndarray, "token moment"], which: int) -> dict[str, Any]:
    """Slope and r of measured on predicted effects, with intervals."""

    def both(total: Float[np.ndarray, "... moment"]) -> Float[np.ndarray, "... two"]:
        n = total[..., 0]
        x, y, xx, yy, xy = (total[..., 1 + 5 * which + i] / n for i in range(5))
        with np.errstate(divide="ignore", invalid="ignore"):
            covariance, of_x, of_y = xy - x * y, xx - x * x, yy - y * y
            return np.stack([covariance / of_x, covariance / np.sqrt(of_x * of_y)], -1)

    point = both(sums.sum(0))
    draws = both(statistics.bootstrap(sums))
    ends = [statistics.interval(draws[:, i]) for i in range(2)]
    return {
        "slope": float(point[0]), "slope_interval": list(ends[0]), "r": float(point[1]), "r_interval": list(ends[1]),
    }  # fmt: skip


# --- a step of `analyze` ---

_TOKENS, _REMOVALS = 24, 1 << 13


@in_suite("predicted_effects")
def _(subject: Subject) -> Scatter:
    most = _REMOVALS // _TOKENS
    return _predicted_effects(subject.model, subject.subnetwork, subject.corpus.held_out, _TOKENS, most, subject.seed)
