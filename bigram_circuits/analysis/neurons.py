"""Which neurons serve which tokens, and how many neurons an average token uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer

from bigram_circuits.analysis.arguments import usual_order
from bigram_circuits.analysis.atlas import frequent_tokens, prompts_of
from bigram_circuits.analysis.conditions import check_arguments, checked_text, conditions
from bigram_circuits.analysis.explaining import functional, taken_apart
from bigram_circuits.analysis.prompts import token_words
from bigram_circuits.analysis.registry import Subject, in_suite
from bigram_circuits.masking.apply import Mask, MaskLike
from bigram_circuits.measures import statistics
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Effects, Maps
from bigram_circuits.models.activations import NotShownError
from bigram_circuits.models.linearised import Heads, Neurons
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.progress import steps

_SHARES = (0.5, 0.9)  # of the strength of all flows


@usual_order
@uses_model
def neuron_map(
    model: Model, subnetwork: MaskLike | None = None, text: Any = None, *, tokens: int = 60, neurons: int = 40
) -> Maps:
    """Which neurons serve which tokens: what flows through each to the prediction after each token.

    Args:
        model: From `load_model`, on its raw weights.
        subnetwork: As for `explain`.
        text: A `Corpus` (its held-out part) or token ids [sequence, position], in which tokens are counted.
        tokens: Number of tokens: the most frequent.
        neurons: Number of neurons: those with the largest flows over these tokens.

    Returns:
        `Maps` [flow, condition, neuron, token]: how much each neuron adds, along all paths, to the logit of the token
        that the masked model predicts. Neurons with similar rows, and tokens with similar columns, stand side by side
        (average linkage of correlations, leaves in optimal order).

    Raises:
        ValueError: If a number is below 1, or subnetwork or text do not fit the model.
        NotShownError: If there are no neurons, or as for `explain`.

    Example:
        >>> analysis.neuron_map(model, found, text, tokens=5, neurons=8).plot()
    """
    if min(tokens, neurons) < 1:
        raise ValueError(f"tokens and neurons must be at least 1, not {tokens} and {neurons}")
    kept, _ = check_arguments(model, subnetwork)
    return _neuron_map(model, kept, checked_text(model, text), tokens, neurons)


def _neuron_map(
    model: Model, kept: Mask | None, array: Integer[np.ndarray, "sequence position"], tokens: int, neurons: int
) -> Maps:
    chosen, _ = frequent_tokens(model, array, tokens)
    traced = traced_tokens(model, kept, chosen, neurons_only=True)
    flows = traced.values
    best = np.argsort(-np.abs(flows).sum(0), kind="stable")[:neurons]
    best = best[np.abs(flows[:, best]).sum(0) > 0]
    if not len(best):
        raise NotShownError("nothing flows through any neuron")
    values = flows[:, best].T
    rows, columns = _clustered(values), _clustered(values.T)
    words, predicted = token_words(model, chosen), token_words(model, traced.answers)
    values = values[np.ix_(rows, columns)]
    return Maps(
        title="Which neurons serve which tokens",
        quantities=(
            Quantity("flow", "logits", "What the neuron adds, along all paths, to the logit of the predicted token."),
        ),
        row_axis="neuron",
        rows=tuple(traced.labels[best[row]] for row in rows),
        column_axis="token",
        columns=tuple(f"{words[column]} → {predicted[column]}" for column in columns),
        conditions=("full" if kept is None else kept.noun,),
        values=values[None, None],
        notes={"tokens": len(chosen), "share_shown": float(np.abs(values).sum() / np.abs(flows).sum())},
    )


@dataclass(frozen=True, eq=False)
class TracedTokens:
    """What flows through heads and neurons after each of some tokens."""

    labels: tuple[str, ...]
    """Labels of the units."""
    values: Float[np.ndarray, "token unit"]
    """Flows to the logit of the predicted token, over all positions."""
    answers: tuple[int, ...]
    """The predicted tokens."""


def traced_tokens(
    model: Model, kept: Mask | None, tokens: Sequence[int], *, neurons_only: bool = False
) -> TracedTokens:
    """Trace the predictions after some tokens, each by itself.

    Raises:
        NotShownError: If there are no units that can be taken apart.
    """
    kinds = Neurons if neurons_only else Neurons | Heads
    labels, rows, answers = list[str](), [], []
    with torch.no_grad(), taken_apart(model, kept) as apart:
        for passed in steps(apart(prompts_of(model, tokens)), len(tokens), desc="tracing tokens", unit="token"):
            place = len(passed.shown) - 1
            asked = functional(model, None, None, passed.shown[place])
            flows, _ = passed.flows(passed.direction(asked.weights, place))
            units = [(one, flow) for one, flow in zip(passed.writers, flows, strict=True) if isinstance(one, kinds)]
            if not units:
                what = "neurons" if neurons_only else "heads or neurons"
                raise NotShownError(f"this model has no {what} that can be taken apart")
            rows.append(torch.cat([flow.sum(0) * writer.kept for writer, flow in units]).double().cpu().numpy())
            answers.append(int(asked.weights.argmax()))
            labels = labels or [writer.label(i) for writer, flow in units for i in range(flow.shape[1])]
    return TracedTokens(tuple(labels), np.stack(rows), tuple(answers))


def _clustered(rows: Float[np.ndarray, "row column"]) -> list[int]:
    """An order of rows in which similar ones stand side by side."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    if len(rows) < 3:
        return list(range(len(rows)))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    tree = linkage(rows / np.where(lengths > 0, lengths, 1), "average", optimal_ordering=True)
    return leaves_list(tree).tolist()


@usual_order
@uses_model
def neurons_used(
    model: Model, subnetwork: MaskLike | None = None, text: Any = None, *, tokens: int = 60, seed: int = 0
) -> Effects:
    """How many neurons an average token uses, in the subnetwork, in the full model and in a matched random subnetwork.

    Args:
        model: From `load_model`, on its raw weights.
        subnetwork: If given, also measured: the subnetwork, its complement, and a matched random one.
        text: A `Corpus` (its held-out part) or token ids [sequence, position], in which tokens are counted.
        tokens: Number of tokens: the most frequent.
        seed: Seed of the matched random subnetwork.

    Returns:
        `Effects` by condition, means over tokens with 95% intervals from a bootstrap over tokens: `for_half` and
        `for_90_percent`, the least number of neurons through which so much of the strength of all flows (the sum of
        absolute values) goes; and `effective`, the participation ratio of the flows.

    Raises:
        ValueError: If `tokens` is below 1, or subnetwork or text do not fit the model.
        NotShownError: If there are no neurons, or as for `explain`.

    Example:
        >>> analysis.neurons_used(model, found, text, tokens=5).to_dataframe()
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, not {tokens}")
    kept, _ = check_arguments(model, subnetwork, seed=seed)
    return _neurons_used(model, conditions(kept, seed=seed), checked_text(model, text), tokens, seed)


def _neurons_used(
    model: Model,
    by_name: Mapping[str, Mask | None],
    array: Integer[np.ndarray, "sequence position"],
    tokens: int,
    seed: int,
) -> Effects:
    chosen, _ = frequent_tokens(model, array, tokens)
    per_token = [_used(traced_tokens(model, kept, chosen, neurons_only=True).values) for kept in by_name.values()]
    ends = [np.quantile(statistics.bootstrap(rows) / len(rows), [0.025, 0.975], axis=0) for rows in per_token]
    return Effects(
        title="Neurons that an average token uses",
        quantities=_USED,
        subject="condition",
        names=tuple(by_name),
        values=np.stack([rows.mean(0) for rows in per_token], 1),
        low=np.stack([one[0] for one in ends], 1),
        high=np.stack([one[1] for one in ends], 1),
        notes={"tokens": len(chosen), "random_seed": seed, "interval": "95%, bootstrap over tokens"},
    )


_USED = (
    Quantity("for_half", "neurons", "Neurons through which half of the strength of all flows goes."),
    Quantity("for_90_percent", "neurons", "Neurons through which 90% of it goes."),
    Quantity("effective", "neurons", "Participation ratio: the squared sum of absolute flows over the sum of squares."),
)


def _used(flows: Float[np.ndarray, "token neuron"]) -> Float[np.ndarray, "token three"]:
    sizes = -np.sort(-np.abs(flows), axis=1)
    total = sizes.sum(1, keepdims=True)
    shares = np.cumsum(sizes, 1) / np.where(total > 0, total, 1)
    counts = [((shares < share - 1e-12).sum(1) + 1) * (total[:, 0] > 0) for share in _SHARES]
    squares = (sizes**2).sum(1)
    effective = np.divide(total[:, 0] ** 2, squares, out=np.zeros_like(squares), where=squares > 0)
    return np.stack([*counts, effective], 1).astype(float)


# --- steps of `analyze` ---

_TOKENS, _NEURONS = 32, 40


@in_suite("neuron_map")
def _(subject: Subject) -> Maps:
    return _neuron_map(subject.model, subject.subnetwork, subject.corpus.held_out, _TOKENS, _NEURONS)


@in_suite("neurons_used")
def _(subject: Subject) -> Effects:
    by_name = {name: kept for name, kept in subject.conditions.items() if name != "complement"}
    return _neurons_used(subject.model, by_name, subject.corpus.held_out, _TOKENS, subject.seed)
