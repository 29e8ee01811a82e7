"""Observables: linear functionals of the logits, pulled back to directions in the residual stream.

An observable is a weight for every token, n; its value is n . logits, for example a difference of two logits. After the
final norm it is the direction W_U n. Pulled back through a path of heads and MLPs it becomes the direction whose dot
product with what the first of them reads is what the observable gets along this path, but for constants and, of heads,
the attention (Dunefsky and Cohan 2023, "Observable Propagation", arXiv 2312.16291). A head pulls d back to W_V W_O d;
an MLP to J^T d with its Jacobian J at what it reads; a norm as `norms` says. How little a norm changes a direction,
which the paper argues for LayerNorm in high dimensions, is measured by `norm_effect`, not assumed.

If x is uniform on a sphere, and all that is known of it is x . a, then x . b is x . a times the coupling coefficient
of a and b, a . b / |a|^2, in expectation (same paper). It is not symmetric; the cosine is.

Logits are those of the unembedding, before any soft cap or scale that the model applies.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.analysis.arguments import usual_order
from bigram_circuits.analysis.components import parse
from bigram_circuits.analysis.conditions import check_arguments, check_of_weights, checked_text, reduced_to
from bigram_circuits.analysis.prompts import is_prompt, prompt_tokens, token_id, token_word, token_words
from bigram_circuits.masking.apply import MaskLike
from bigram_circuits.measures import html, statistics
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Effects, Maps
from bigram_circuits.models.activations import NotShownError, batch_size_for, check_has_readout, check_predicts_tokens
from bigram_circuits.models.model import Model
from bigram_circuits.models.pulling import NORMS, pulled_through
from bigram_circuits.models.state import check_model, uses_model
from bigram_circuits.names import PartName
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.text.corpus import in_order, spread

_MAX_TOKENS = 1 << 11
_SHOWN = 8  # tokens in a table of a notebook, from either end
_COUPLING = (
    Quantity("coupling", "", "Expected value of the column's direction on a vector per value of the row's: a.b/|a|^2."),
    Quantity("cosine", "", "Cosine of the two directions."),
)
_NORM_EFFECT = (
    Quantity("cosine", "", "Cosine with the direction through the true norms at the same position; mean of positions."),
    Quantity("cosine_5_percent", "", "The cosine that 95% of the positions exceed."),
    Quantity("length_ratio", "", "Length, divided by that of the direction through the true norms; mean of positions."),
)
_AS = {name: words for name, words in NORMS.items() if name != "true"} | {
    "average": "the average of `frozen` over the positions: one direction for all"
}


@dataclass(frozen=True, eq=False)
class Observable:
    """A linear functional of the logits.

    Example:
        >>> difference = analysis.observable(model, ("a", "b"))
        >>> difference.value(model("import os"))  # at every position
    """

    name: str
    """What it is, for example `' he' minus ' she'`."""
    weights: Float[np.ndarray, " d_vocab"] = field(repr=False)
    """What each token's logit is multiplied by, by token id."""

    def value(self, logits: Float[Tensor, "*rows d_vocab"]) -> Float[Tensor, "*rows"]:
        """Its value for logits (of the unembedding: without soft caps), in logits."""
        return logits @ torch.as_tensor(self.weights).to(logits)

    def __repr__(self) -> str:
        return f"Observable({self.name}; {np.count_nonzero(self.weights)} tokens with a weight)"


@dataclass(frozen=True, eq=False)
class Direction:
    """An observable as a direction in the residual stream: what it gets from there along a path.

    Example:
        >>> direction = analysis.pulled_back(model, "a", norms="linear")
        >>> direction.top_tokens(3)  # the tokens whose embeddings point most in this direction
    """

    name: str
    """The observable, and the path: `' he' minus ' she' through L1H2 L3.mlp`."""
    through: tuple[str, ...]
    """Labels of the heads, neurons and MLPs that it was pulled back through, the one that reads first at the front."""
    before: int
    """It is in the residual stream before this block (`n_layers`: after the last one), and in the stream before every
    earlier block too, since what is in a residual stream stays in it."""
    norms: str
    """How it was pulled back through norms: `frozen`, `linear`, `ignored` or `true`."""
    vector: Float[np.ndarray, " d_model"] = field(repr=False)
    """The direction; its mean over positions, if it differs between them. In logits per unit of residual stream."""
    positions: int
    """Number of positions of the text that it is the mean of."""
    agreement: float
    """Mean cosine of the directions at single positions with `vector`: 1 if they are all the same."""
    cosines: Float[np.ndarray, " d_vocab"] = field(repr=False)
    """Its cosine with the embedding of every token, by token id."""
    words: tuple[str, ...] = field(repr=False)
    """The tokens as readable strings, by token id."""

    def value(self, residual: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows"]:
        """What the observable gets from residual streams along the path, in logits.

        Constants (biases) are not in it, and of every head it is what is passed on at an attention of 1.
        """
        return residual @ torch.as_tensor(self.vector).to(residual)

    @property
    def norm(self) -> float:
        """Its length."""
        return float(np.linalg.norm(self.vector))

    def top_tokens(self, k: int = 10, *, inhibiting: bool = False) -> list[tuple[str, float]]:
        """The k tokens whose embeddings have the highest cosines with it (or, if inhibiting, the lowest).

        Raises:
            ValueError: If k is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        order = np.argsort(self.cosines if inhibiting else -self.cosines, kind="stable")[:k]
        return [(self.words[token], float(self.cosines[token])) for token in order]

    def to_dataframe(self) -> Any:
        """Convert to a DataFrame: a row per token, highest cosine first.

        `value` is what the observable gets along the path from the token's embedding at length 1: cosine x `norm`.
        """
        import pandas as pd

        order = np.argsort(-self.cosines, kind="stable")
        cosines = self.cosines[order]
        words = [self.words[token] for token in order]
        return pd.DataFrame({"token": words, "id": order, "cosine": cosines, "value": cosines * self.norm})

    def __repr__(self) -> str:
        where = f"before block {self.before}, norms {self.norms}"
        return f"Direction({self.name}; {where}; {', '.join(repr(word) for word, _ in self.top_tokens(3))}, ...)"

    def _repr_html_(self) -> str:
        rows = [
            [word, cosine, cosine * self.norm]
            for inhibiting in (False, True)
            for word, cosine in self.top_tokens(_SHOWN, inhibiting=inhibiting)[:: -1 if inhibiting else 1]
        ]
        says = [
            f"In the residual stream before block {self.before}; length {html.shown(self.norm)}; norms {self.norms}.",
            f"Mean of {self.positions:,} positions; mean cosine of their directions with it: {self.agreement:.3f}.",
        ]
        table = html.table(["token", "cosine", "value of its embedding"], rows, self.name)
        return html.summary(self.name, says, table, html.small(["All tokens: to_dataframe()."]))


def observable(model: Model, what: Any, *, name: str | None = None) -> Observable:
    """A linear functional of the logits of a model.

    Args:
        model: From `load_model`.
        what: A token, as text or id: its logit. A pair (answer, wrong) of tokens: the difference of their logits. A
            mapping from tokens to weights. Or a weight for every token, [d_vocab].
        name: What to call it; by default, its tokens.

    Raises:
        ValueError: If there is no such token, weights are not finite or all 0, or their number is not `d_vocab`.

    Example:
        >>> analysis.observable(model, "a")  # its logit
        >>> analysis.observable(model, ("a", "b"))  # the difference of two
        >>> analysis.observable(model, {"a": 0.5, "b": 0.5, "c": -1.0})
    """
    check_model(model)
    check_predicts_tokens(model)
    if isinstance(what, Observable):
        weights, given = what.weights, what.name
    elif isinstance(what, str | int | np.integer):
        index = token_id(model, what if isinstance(what, str) else int(what))
        weights, given = _weights(model, {index: 1.0}), repr(token_word(model, index))
    elif isinstance(what, tuple) and len(what) == 2:
        answer, wrong = (token_id(model, token) for token in what)
        if answer == wrong:
            raise ValueError(f"answer and wrong are the same token, {token_word(model, answer)!r}")
        weights = _weights(model, {answer: 1.0, wrong: -1.0})
        given = " minus ".join(repr(word) for word in token_words(model, [answer, wrong]))
    elif isinstance(what, Mapping):
        by_id: dict[int, float] = {}
        for token, weight in what.items():
            if (index := token_id(model, token)) in by_id:
                raise ValueError(f"the token {token_word(model, index)!r} has two weights")
            by_id[index] = float(weight)
        weights = _weights(model, by_id)
        terms = zip(by_id.values(), token_words(model, list(by_id)), strict=True)
        given = " + ".join(f"{weight:g} {word!r}" for weight, word in terms) if len(by_id) < 4 else _counted(weights)
    else:
        weights = _vector(model, what)
        given = _counted(weights)
    if weights.shape != (model.cfg.d_vocab,) or not np.isfinite(weights).all() or not weights.any():
        raise ValueError(
            f"an observable has {model.cfg.d_vocab} finite weights here, not all 0; these are {weights.shape}, "
            f"{np.count_nonzero(weights)} of them not 0, {int((~np.isfinite(weights)).sum())} not finite"
        )
    return Observable(given if name is None else name, weights)


def _weights(model: Model, by_id: Mapping[int, float]) -> Float[np.ndarray, " d_vocab"]:
    weights = np.zeros(model.cfg.d_vocab)
    weights[list(by_id)] = list(by_id.values())
    return weights


def _vector(model: Model, what: Any) -> np.ndarray:
    try:
        return np.array(what.numpy(force=True) if isinstance(what, Tensor) else what, dtype=float)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"an observable is a token, a pair (answer, wrong), weights by token, or {model.cfg.d_vocab} weights, not "
            f"a {type(what).__name__}"
        ) from error


def _counted(weights: np.ndarray) -> str:
    return f"weights of {np.count_nonzero(weights)} tokens"


@usual_order
@uses_model
def pulled_back(
    model: Model,
    observable: Any,
    subnetwork: MaskLike | None = None,
    text: Any = None,
    *,
    through: str | Sequence[str] = (),
    norms: str = "frozen",
    position: int | Sequence[int] | None = None,
    max_tokens: int = _MAX_TOKENS,
) -> Direction:
    """Pull an observable back through parts of a model to a direction in the residual stream.

    Args:
        model: From `load_model`.
        observable: An `Observable`, or what the function `observable` takes.
        subnetwork: If given, the weights of the masked model are used.
        text: Where the Jacobians of MLPs and norms are taken: a `Corpus` (its held-out part), token ids [sequence,
            position], or a prompt. Not needed if no MLP is on the path and `norms` is `linear` or `ignored`.
        through: The path: labels of heads (`L1H2`), MLPs (`L3.mlp`) and neurons of an MLP (`L0N[1,5]`), in any order:
            that of the forward pass is used. Without any, the direct path from the residual stream to the logits.
        norms: How the path leads through a norm: `frozen` (linear, with the scale that it has at each position),
            `linear` (with scale 1), `ignored`, or `true` (its Jacobian, in which the scale depends on what is read).
        position: Of a prompt: the position at which everything is read, or several: where each part reads, in the order
            of the forward pass, and last where the final norm does. An MLP writes where it reads. By default the mean
            over all positions of the text, with heads reading where they write.
        max_tokens: Maximum number of tokens, from sequences evenly spread over the text.

    Raises:
        ValueError: If no path leads through these parts; a text or position is needed or does not fit; the model's
            residual stream is not the sum of what its parts write, its logits are not W_U of a final norm, or a norm is
            neither a LayerNorm nor an RMSNorm; or if a circuit is given.

    Example:
        >>> direction = analysis.pulled_back(model, "a", found, text, through="L0.mlp")
        >>> direction.to_dataframe()
    """
    functional, kept, path = _checked(model, observable, subnetwork, through)
    if norms not in NORMS:
        raise ValueError(f"norms must be one of {', '.join(NORMS)}, not {norms!r}")
    tokens = _without_text(path, norms) if text is None else _tokens(model, text, max_tokens)
    places = _places(tokens, text, position, path)
    at = _at_positions(model, functional, kept, tokens, path, norms, places)
    vector = at.mean(0)
    length = np.linalg.norm(vector)
    with np.errstate(invalid="ignore", divide="ignore"):
        agreement = float((at @ vector / (np.linalg.norm(at, axis=1) * length)).mean())
    labels = tuple(part.label for part in path)
    return Direction(
        name=functional.name + (f" through {' '.join(labels)}" if labels else ""),
        through=labels,
        before=path[0].layer if path else model.cfg.n_layers,
        norms=norms,
        vector=vector,
        positions=len(at),
        agreement=agreement,
        cosines=_cosines(model, vector),
        words=tuple(token_words(model, range(model.cfg.d_vocab))),
    )


@usual_order
@uses_model
def norm_effect(
    model: Model,
    observable: Any,
    subnetwork: MaskLike | None = None,
    text: Any = None,
    *,
    through: str | Sequence[str] = (),
    max_tokens: int = _MAX_TOKENS,
) -> Effects:
    """How far the direction of an observable depends on norms not being linear, over the positions of a text.

    Through the true norms, the direction at a position is the gradient, in which a norm's scale depends on what it
    reads. It is compared with those through linear norms.

    Args:
        model: From `load_model`.
        observable: An `Observable`, or what the function `observable` takes.
        subnetwork: If given, the weights of the masked model are used.
        text: As for `pulled_back`.
        through: As for `pulled_back`; without any part, the only norm is the final one.
        max_tokens: As for `pulled_back`.

    Returns:
        For each way through norms, its cosine with the direction through the true norms: the mean over positions, with
        a 95% bootstrap interval over sequences (nan for a prompt), and the 5% quantile; and the ratio of their lengths.
        Ways: `frozen`, `linear` (which at a single position has the direction of `frozen`, and another length),
        `ignored`, and `average`, the one direction that is the mean of `frozen`, as `pulled_back` returns it.

    Raises:
        ValueError: As `pulled_back`.

    Example:
        >>> analysis.norm_effect(model, "a", found, text).to_dataframe()
    """
    functional, kept, path = _checked(model, observable, subnetwork, through)
    tokens = _tokens(model, text, max_tokens)
    found = {norms: _at_positions(model, functional, kept, tokens, path, norms, None) for norms in NORMS}
    found["average"] = np.broadcast_to(found["frozen"].mean(0), found["frozen"].shape)
    true = found.pop("true")
    values, low, high = (np.full((len(_NORM_EFFECT), len(_AS)), np.nan) for _ in range(3))
    for place, name in enumerate(_AS):
        lengths = np.linalg.norm(found[name], axis=1), np.linalg.norm(true, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines = (found[name] * true).sum(1) / (lengths[0] * lengths[1])
            ratio = float((lengths[0] / lengths[1]).mean())
        values[:, place] = cosines.mean(), np.quantile(cosines, 0.05), ratio
        if len(tokens) > 1:
            draws = statistics.bootstrap(cosines.reshape(tokens.shape).mean(1, keepdims=True))[:, 0] / len(tokens)
            low[0, place], high[0, place] = statistics.interval(draws)
    return Effects(
        title=f"Directions through linear norms and through the true ones: {functional.name}",
        quantities=_NORM_EFFECT,
        subject="norms",
        names=tuple(_AS),
        values=values,
        low=low,
        high=high,
        notes={"through": [part.label for part in path], "positions": len(true), "norms": dict(_AS)},
    )


def coupling(*directions: Direction | Observable) -> Maps:
    """Coupling coefficients and cosines of directions, or of observables, pair by pair.

    The coupling coefficient of a (row) and b (column) is `a . b / |a|^2`: what b's value of a vector is expected to be
    where a's is 1, if the vector is uniform on a sphere apart from that (Dunefsky and Cohan 2023, arXiv 2312.16291).

    Returns:
        `Maps` [coupling and cosine, `all`, row, column]; nan where a direction is 0.

    Raises:
        ValueError: If there are fewer than two, two have the same name, or they are not in the same space.

    Example:
        >>> one, other = (analysis.pulled_back(model, token, norms="linear") for token in ("a", "b"))
        >>> analysis.coupling(one, other).get("cosine", "all")
    """
    names = [one.name for one in directions]
    if len(directions) < 2:
        raise ValueError(f"coupling needs at least two directions, not {len(directions)}")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two directions are called {twice!r}: name observables with observable(..., name=)")
    vectors = [one.weights if isinstance(one, Observable) else one.vector for one in directions]
    kinds = {(type(one).__name__, vector.shape) for one, vector in zip(directions, vectors, strict=True)}
    if len(kinds) > 1:
        found = " and ".join(f"{kind}s of {shape[0]} numbers" for kind, shape in sorted(kinds))
        raise ValueError(f"directions are coupled with directions of the same space, not {found}")
    products = np.stack(vectors) @ np.stack(vectors).T
    squares = np.diagonal(products)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.stack([products / squares[:, None], products / np.sqrt(np.outer(squares, squares))])
    return Maps(
        title="Coupling of directions",
        quantities=_COUPLING,
        row_axis="known",
        rows=tuple(names),
        column_axis="expected",
        columns=tuple(names),
        conditions=("all",),
        values=values[:, None],
    )


# --- what is given ---


def _checked(
    model: Model, what: Any, subnetwork: Any, through: str | Sequence[str]
) -> tuple[Observable, Subnetwork | None, list[PartName]]:
    kept, _ = check_arguments(model, subnetwork)
    of_weights = None if kept is None else check_of_weights(kept, "a direction that is pulled back")
    return observable(model, what), of_weights, _path(model, through)


def _path(model: Model, through: str | Sequence[str]) -> list[PartName]:
    """The parts of a path in the order of the forward pass."""
    labels = [through] if isinstance(through, str) else list(through)
    if not labels:
        return []
    parts: list[PartName] = []
    for one in parse(labels, model):
        if len(one.components) != 1 or one.components[0].kind not in ("head", "neurons", "mlp"):
            raise ValueError(
                f"a path leads through heads, neurons of a layer and MLPs (L1H2, L0N[1,5], L3.mlp), not {one.name}"
            )
        parts += one.components
    parts = sorted(parts, key=lambda part: (part.layer, part.kind != "head"))
    for one, other in itertools.pairwise(parts):
        if (one.layer, one.kind == "head") == (other.layer, other.kind == "head"):
            raise ValueError(f"no path leads through both {one.label} and {other.label}: they read the same")
    return parts


def _tokens(model: Model, text: Any, max_tokens: int) -> Integer[np.ndarray, "sequence position"]:
    if is_prompt(text):
        return prompt_tokens(model, text).numpy(force=True)
    return spread(checked_text(model, text), max_tokens)


def _without_text(path: Sequence[PartName], norms: str) -> Integer[np.ndarray, "1 2"]:
    """Any tokens, if the direction does not depend on them."""
    if norms not in ("linear", "ignored") or any(part.kind != "head" for part in path):
        raise ValueError(
            "MLPs, and norms='frozen' or 'true', need a text; heads with norms='linear' or 'ignored' do not"
        )
    return np.zeros((1, 2), dtype=np.int64)


def _places(
    tokens: np.ndarray, text: Any, position: int | Sequence[int] | None, path: Sequence[PartName]
) -> list[int] | None:
    """Where each part reads, and last the final norm; None for every position by itself."""
    if position is None:
        return None
    if text is None or len(tokens) > 1:
        raise ValueError("a position is one of a prompt: give a prompt as text")
    wanted = len(path) + 1
    places = [position] * wanted if isinstance(position, int | np.integer) else list(position)
    if len(places) != wanted:
        raise ValueError(f"{wanted} positions are needed, one for each part and one for the final norm, not {places}")
    length = tokens.shape[1]
    for place in places:
        if not isinstance(place, int | np.integer) or not -length <= place < length:
            raise ValueError(f"there is no position {place} in a prompt of {length} tokens")
    places = [int(place) % length for place in places]
    for part, read, written in zip(path, places, places[1:], strict=False):
        if part.kind != "head" and read != written:
            raise ValueError(f"{part.label} writes where it reads, not at {written} what it read at {read}")
        if read > written:
            raise ValueError(f"{part.label} cannot write at {written} what it reads later, at {read}")
    return places


# --- directions ---


def _at_positions(
    model: Model,
    functional: Observable,
    kept: Subnetwork | None,
    tokens: Integer[np.ndarray, "sequence position"],
    path: Sequence[PartName],
    norms: str,
    places: list[int] | None,
) -> Float[np.ndarray, "place d_model"]:
    """The direction at every position of a text, or at the one of these places where the first part reads."""
    check_has_readout(model, model.cfg.d_model)
    direction = model.W_U.detach().float() @ torch.as_tensor(functional.weights).to(model.W_U.device).float()
    found: list[Tensor] = []
    with reduced_to(model, kept):
        for batch in in_order(tokens, batch_size_for(model, tokens.shape[1], streams=True)):
            at = pulled_through(model, batch.to(model.cfg.device), path, direction, norms, places)
            found.append((at.flatten(0, 1) if places is None else at[:, places[0]]).double().cpu())
    return torch.cat(found).numpy()


def _cosines(model: Model, vector: Float[np.ndarray, " d_model"]) -> Float[np.ndarray, " d_vocab"]:
    embeddings = model.W_E.detach().double().cpu().numpy()
    if embeddings.shape[1] != len(vector):
        raise NotShownError(
            f"this model's embeddings have {embeddings.shape[1]} numbers, its residual stream {len(vector)}"
        )
    with np.errstate(invalid="ignore", divide="ignore"):
        return embeddings @ vector / (np.linalg.norm(embeddings, axis=1) * np.linalg.norm(vector))
