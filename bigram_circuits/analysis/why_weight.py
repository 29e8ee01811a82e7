"""What single weights serve: the tokens after which a weight is needed, and how much of its effect they account for.

The effect of a kept weight at a position is the rise of the loss there, the cross-entropy from the target's
distribution, when this weight alone is dropped. On one half of the text, effects are added up by current token; the
*predicate* of the weight is the smallest set of tokens that holds most of the effect of those that it serves. On the
other half, with the predicate as it is,

    recovery = effect at positions whose current token is in the predicate / effect at all positions,

the share of the harm that is undone if the weight is put back after these tokens alone. `inverse` is the same for all
other tokens. The loss at a position is either that with or that without the weight, so the two add up to 1; they are
above 1 and below 0 where the weight does harm after other tokens. Random sets of tokens that cover as many positions
say what a predicate of this size recovers by chance: about the share of positions that it covers.

That single weights have predicates which are verified on held-out text is the idea of "The parameters in weight-sparse
transformers are interpretable" (Mechanistic Interpretability Workshop, ICML 2026), where a language model writes them;
here they are sets of current tokens, and the scores are as defined above. A weight of W_K or W_V acts at the position
that is attended to; the current token is then still that of the position whose loss changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.analysis.arguments import usual_order
from bigram_circuits.analysis.conditions import check_arguments, check_of_weights, checked_text
from bigram_circuits.analysis.prompts import token_words
from bigram_circuits.masking.apply import MaskLike, switched
from bigram_circuits.measures import html, statistics
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Effects
from bigram_circuits.models.activations import NotShownError, batch_size_for, check_predicts_tokens, lean_forward
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.models.weights import WeightSite, weight_sites
from bigram_circuits.progress import progress
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.targets.base import PlacedTarget, Target, target_of
from bigram_circuits.text.corpus import in_order, spread

Weight = tuple[str, Sequence[int]]
"""The canonical name of a weight matrix, and an index in its canonical shape: `("blocks.0.mlp.W_in", (12, 700))`."""

SERVES, NONE, HARMS = "serves", "no effect", "harms"
"""What is said of a weight: dropping it raises the loss, is not shown to change it, or lowers it."""
_MAX_TOKENS = 1 << 12
_LEAST_SEQUENCES = 4
_LEAST_EFFECT = 1e-6  # nats per position: the rounding of a loss in float32
_WORDS = 6  # tokens shown of a predicate
_QUANTITIES = (
    Quantity("effect", "nats", "Rise of the mean loss of the held-out half when the weight is dropped."),
    Quantity("recovery", "share", "Share of the effect at positions after tokens of the predicate."),
    Quantity("inverse", "share", "Share of the effect at all other positions."),
    Quantity("positions", "share", "Share of the positions whose current token is in the predicate."),
    Quantity("random_recovery", "share", "Mean recovery of random sets of tokens that cover as many positions."),
    Quantity("beaten", "share", "Share of these random sets that recover less."),
)


@dataclass(frozen=True)
class WeightRoles:
    """What some weights serve."""

    scores: Effects
    """The numbers of every weight; of those without a proven effect, all but `effect` and `positions` are nan."""
    verdicts: tuple[str, ...]
    """Of every weight: `serves`, `no effect` or `harms`, by the 95% interval of its effect."""
    predicates: tuple[tuple[tuple[str, float], ...], ...] = field(repr=False)
    """Of every weight: its tokens, each with its share of the effect in the half they were chosen on; empty if no
    token is served."""

    def to_dataframe(self) -> Any:
        """Convert to a DataFrame: a row per weight, with its verdict and the tokens of its predicate."""
        table = self.scores.to_dataframe()
        table["verdict"] = self.verdicts
        table["tokens"] = [" ".join(repr(word) for word, _ in predicate) for predicate in self.predicates]
        return table

    def plot(self, quantity: str = "recovery") -> Any:
        """Draw one quantity of all weights, as a plotly figure."""
        return self.scores.plot(quantity)

    def __len__(self) -> int:
        return len(self.verdicts)

    def __str__(self) -> str:
        return f"{self.scores.title}\n{self.to_dataframe().to_string(index=False, float_format=lambda x: f'{x:.3g}')}"

    def _repr_html_(self) -> str:
        columns = ["weight", "verdict", "tokens", *(one.name for one in _QUANTITIES)]
        rows = [
            [name, verdict, _listed(predicate), *self.scores.values[:, place].tolist()]
            for place, (name, verdict, predicate) in enumerate(
                zip(self.scores.names, self.verdicts, self.predicates, strict=True)
            )
        ]
        says = [f"{one.label}: {one.meaning}" for one in _QUANTITIES[:3]]
        table = html.table(columns, rows, self.scores.title)
        return html.summary(self.scores.title, says, table, html.small(["All numbers: to_dataframe()."]))


def _listed(predicate: Sequence[tuple[str, float]]) -> str:
    words = [repr(word) for word, _ in predicate[:_WORDS]]
    return " ".join(words if len(predicate) <= _WORDS else [*words, f"and {len(predicate) - _WORDS} more"])


@usual_order
@uses_model
def why_weight(
    model: Model,
    weight: Weight | Sequence[Any] | int,
    subnetwork: MaskLike | None = None,
    target: Any = None,
    text: Any = None,
    *,
    most: float | int = 0.8,
    draws: int = 100,
    max_tokens: int = _MAX_TOKENS,
    seed: int = 0,
) -> WeightRoles:
    """Tell after which tokens single kept weights are needed, and test it on held-out text.

    Every weight costs one pass of the masked model over the text.

    Args:
        model: From `load_model`.
        weight: A kept weight, as its canonical name and index: `("blocks.0.mlp.W_in", (12, 700))`. Or a list of these;
            or a number k: the k kept weights with the largest |weight x gradient| on the half on which predicates are
            chosen.
        subnetwork: The weights that are kept; by default all.
        target: The target whose cross-entropy is the loss.
        text: A `Corpus` (its held-out part) or token ids [sequence, position]. Predicates are chosen on every other
            sequence, and tested on the rest.
        most: The share of the effect that a predicate must hold, of that of all tokens that the weight serves.
        draws: Number of random sets of tokens that each predicate is compared with.
        max_tokens: Maximum number of tokens, from sequences evenly spread over the text.
        seed: Seed of the random sets.

    Returns:
        For each weight its predicate, `effect` (nats per position of the tested half) and `recovery`, with 95%
        bootstrap intervals over sequences, `inverse`, `positions`, `random_recovery` and `beaten`. If the interval of
        the effect includes 0, or the effect is below the rounding of a loss (1e-6 nats), the verdict is `no effect`; if
        dropping the weight lowers the loss, it is `harms`. Of these, shares of the effect are undefined (nan).

    Raises:
        ValueError: If there is no such weight or it is not kept, a number is out of range, there are fewer than 4
            sequences, or subnetwork, target and text do not fit the model; if a circuit is given, or a target that is
            defined at some places of a sequence only.
    """
    if not 0 < most <= 1:
        raise ValueError(f"most must be a share above 0, up to 1, not {most!r}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    given, _ = check_arguments(model, subnetwork, seed=seed)
    kept = Subnetwork.full(model) if given is None else check_of_weights(given, "what a single weight serves")
    tokens = spread(checked_text(model, text), max_tokens)
    if len(tokens) < _LEAST_SEQUENCES:
        raise ValueError(f"{_LEAST_SEQUENCES} sequences are needed, half of them to test on, not {len(tokens)}")
    target = target_of(target, model)
    check_predicts_tokens(model)
    if isinstance(target, PlacedTarget):
        raise NotShownError("the target is defined at some places of a sequence, not after every token")
    known = {site.name: site for site in weight_sites(model)}
    asked = weight if isinstance(weight, int | np.integer) else _addresses(weight, known, kept)
    switches = {
        name: site.to_stored(kept[name]).to(site.original.device, torch.float32) for name, site in known.items()
    }
    with switched(model, switches), lean_forward(model):
        if not isinstance(asked, list):
            asked = _strongest(model, target, tokens[::2], known, kept, switches, int(asked))
        before = _losses(model, target, tokens)
        effects = []
        with progress(total=len(asked), desc="dropping weights", unit="weight") as bar:
            for name, index in asked:
                place = _stored_index(known[name], index)
                switches[name][place] = 0
                effects.append(_losses(model, target, tokens) - before)
                switches[name][place] = 1
                bar.update()
    current = tokens[:, target.positions]
    roles = [_role(one, current, model.cfg.d_vocab, most, draws, seed) for one in effects]
    labels = tuple(f"{name}[{', '.join(map(str, index))}]" for name, index in asked)
    return WeightRoles(
        Effects(
            title="What single weights serve",
            quantities=_QUANTITIES,
            subject="weight",
            names=labels,
            values=np.array([role.values for role in roles]).T,
            low=np.array([role.low for role in roles]).T,
            high=np.array([role.high for role in roles]).T,
            notes={"tokens": int(tokens.size), "kept": kept.kept, "most": most, "draws": draws, "random_seed": seed},
        ),
        tuple(role.verdict for role in roles),
        tuple(
            tuple(zip(token_words(model, role.tokens.tolist()), role.shares.tolist(), strict=True)) for role in roles
        ),
    )


# --- which weights ---


def _addresses(weight: Any, known: dict[str, WeightSite], kept: Subnetwork) -> list[tuple[str, tuple[int, ...]]]:
    one = isinstance(weight, tuple) and len(weight) == 2 and isinstance(weight[0], str)
    found = [_address(item, known, kept) for item in ([weight] if one else weight)]
    if not found:
        raise ValueError("at least one weight is needed")
    if twice := next((address for address in found if found.count(address) > 1), None):
        raise ValueError(f"the weight {twice[0]}{list(twice[1])} is asked for twice")
    return found


def _address(item: Any, known: dict[str, WeightSite], kept: Subnetwork) -> tuple[str, tuple[int, ...]]:
    if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[0], str):
        raise ValueError(f"a weight is given as its matrix and index, ('blocks.0.mlp.W_in', (12, 700)), not {item!r}")
    name, index = item[0], tuple(int(place) for place in item[1])
    if name not in known:
        raise ValueError(f"there is no weight matrix {name!r}: there are {', '.join(list(known)[:4])}, ...")
    shape = known[name].shape
    if len(index) != len(shape) or not all(0 <= place < size for place, size in zip(index, shape, strict=True)):
        raise ValueError(f"{name} has the shape {shape} ({known[name].axes}), and no weight {index}")
    if not bool(kept[name][index]):
        raise ValueError(f"the weight {name}{list(index)} is not kept, so that nothing changes when it is dropped")
    return name, index


def _strongest(
    model: Model,
    target: Target,
    tokens: Integer[np.ndarray, "sequence position"],
    known: dict[str, WeightSite],
    kept: Subnetwork,
    switches: dict[str, Float[Tensor, "..."]],
    k: int,
) -> list[tuple[str, tuple[int, ...]]]:
    """The kept weights with the largest |weight x gradient| of the loss, the largest first."""
    if not 1 <= k <= kept.kept:
        raise ValueError(f"the number of weights must be from 1 to {kept.kept}, the number kept, not {k}")
    total = {name: torch.zeros_like(switch) for name, switch in switches.items()}
    for switch in switches.values():
        switch.requires_grad_()
    for batch in in_order(tokens, batch_size_for(model, tokens.shape[1])):
        batch = batch.to(model.cfg.device)
        loss = target.cross_entropy(model(batch), batch).sum()
        for name, gradient in zip(switches, torch.autograd.grad(loss, list(switches.values())), strict=True):
            total[name] += gradient
    for switch in switches.values():
        switch.requires_grad_(False)
    found: list[tuple[float, str, tuple[int, ...]]] = []
    for name, site in known.items():
        scores = site.from_stored(total[name]).abs().cpu()
        scores[~kept[name]] = -1
        top = scores.flatten().topk(min(k, kept.by_name()[name].kept))
        places = np.unravel_index(top.indices.numpy(), site.shape)
        indices = [tuple(int(at) for at in place) for place in zip(*places, strict=True)]
        found += [(score, name, index) for score, index in zip(top.values.tolist(), indices, strict=True)]
    found.sort(key=lambda item: -item[0])
    return [(name, index) for _, name, index in found[:k]]


def _stored_index(site: WeightSite, index: tuple[int, ...]) -> tuple[int, ...]:
    """The place of a weight in the layout of the leaf module."""
    one = torch.zeros(site.shape, dtype=torch.bool)
    one[index] = True
    return tuple(site.to_stored(one).nonzero()[0].tolist())


# --- what they serve ---


def _losses(
    model: Model, target: Target, tokens: Integer[np.ndarray, "sequence position"]
) -> Float[np.ndarray, "sequence place"]:
    """The cross-entropy at every position, in nats, under the present switches."""
    found = []
    with torch.no_grad():
        for batch in in_order(tokens, batch_size_for(model, tokens.shape[1])):
            batch = batch.to(model.cfg.device)
            found.append(target.cross_entropy(model(batch), batch).double().cpu())
    losses = torch.cat(found).numpy()
    if not np.isfinite(losses).all():
        raise ValueError("the cross-entropy of the masked model is not finite (NaN or infinity in its logits)")
    return losses


@dataclass(frozen=True, eq=False)
class _Role:
    """What one weight serves; values are in the order of the quantities."""

    values: list[float]
    low: list[float]
    high: list[float]
    verdict: str
    tokens: Integer[np.ndarray, " token"]
    shares: Float[np.ndarray, " token"]


def _role(
    effects: Float[np.ndarray, "sequence place"],
    current: Integer[np.ndarray, "sequence place"],
    d_vocab: int,
    most: float,
    draws: int,
    seed: int,
) -> _Role:
    by_token = np.bincount(current[::2].ravel(), effects[::2].ravel(), d_vocab)
    tokens, shares = predicate_of(by_token, most)
    effects, current = effects[1::2], current[1::2]
    inside = np.isin(current, tokens)
    sums = np.stack([(effects * inside).sum(1), effects.sum(1)], 1)
    mean, covered = float(effects.mean()), float(inside.mean())
    resampled = statistics.bootstrap(sums, seed=seed)
    low, high = statistics.interval(resampled[:, 1] / effects.size)
    verdict = NONE if abs(mean) < _LEAST_EFFECT or low <= 0 <= high else SERVES if mean > 0 else HARMS
    values = [mean, *[math.nan] * 2, covered, *[math.nan] * 2]
    ends = [[low, *[math.nan] * 5], [high, *[math.nan] * 5]]
    if verdict == SERVES:
        by_token = np.bincount(current.ravel(), effects.ravel(), d_vocab) / effects.sum()
        recovery = float(by_token[tokens].sum())
        counts = np.bincount(current.ravel(), minlength=d_vocab)
        random = _random_recoveries(by_token, counts, int(inside.sum()), draws, seed)
        values = [mean, recovery, 1 - recovery, covered, float(random.mean()), float((random < recovery).mean())]
        resampled = resampled[resampled[:, 1] > 0]  # in a few, none of the tokens that matter may be left
        least, largest = statistics.interval(resampled[:, 0] / resampled[:, 1])
        ends = [[low, least, 1 - largest, *[math.nan] * 3], [high, largest, 1 - least, *[math.nan] * 3]]
    return _Role(values, ends[0], ends[1], verdict, tokens, shares)


def predicate_of(
    by_token: Float[np.ndarray, " d_vocab"], most: float
) -> tuple[Integer[np.ndarray, " token"], Float[np.ndarray, " token"]]:
    """The smallest set of tokens that holds a share of what is positive, the strongest first, and the share of each."""
    positive = np.maximum(by_token, 0)
    if not positive.any():
        return np.zeros(0, dtype=int), np.zeros(0)
    order = np.argsort(-positive, kind="stable")
    shares = positive[order] / positive.sum()
    size = min(int(np.searchsorted(np.cumsum(shares), most - 1e-12)) + 1, int((shares > 0).sum()))
    return order[:size], shares[:size]


def _random_recoveries(
    by_token: Float[np.ndarray, " d_vocab"],
    counts: Integer[np.ndarray, " d_vocab"],
    positions: int,
    draws: int,
    seed: int,
) -> Float[np.ndarray, " draw"]:
    """What random sets of tokens recover: tokens in random order, as long as they fit in so many positions."""
    there = np.flatnonzero(counts)
    rng = np.random.default_rng(seed)
    recovered = np.zeros(draws)
    for draw in range(draws):
        left = positions
        for token in rng.permutation(there):
            if counts[token] <= left:
                left -= int(counts[token])
                recovered[draw] += by_token[token]
                if not left:
                    break
    return recovered
