"""Do two masks compute the same? What they do, what their parts do in each other, and how alike their streams are.

Two masks of equal faithfulness may share hardly any weights and still compute the same, or share most and differ where
it matters. Three comparisons tell:

- *Behaviour*. How much of what one masked model's predictions take from the context the other's tell:

      agreement = 1 - KL(a || b) / KL(a || best constant),

  where the best constant is a's mean prediction over the text; 1 if they predict the same, 0 if b is no better than a
  constant. It is measured on held-out text, and out of distribution: by default on the same sequences with their tokens
  shuffled.
- *Splices*. Take one part from the other mask, a layer or the attention or MLP of one, and everything else from this
  one: the share of its own explained information that is kept, beside the share kept without that part (a part that
  nothing needs can be spliced from anywhere). Parts that fit each other compute the same thing in the same place.
- *Streams*. Linear CKA and cosine of their residual streams, layer by layer, over the same tokens.

Beside these stands the overlap of their weights, with its exact null (`overlap`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.analysis.geometry import linear_cka
from bigram_circuits.analysis.overlap import overlap
from bigram_circuits.circuit import Circuit
from bigram_circuits.evaluation import Measured, measure
from bigram_circuits.masking.apply import Mask, MaskLike, as_mask, masked
from bigram_circuits.measures import html, statistics
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Curves, Effects, Ends, Result, effects_of, load_result_and_origin
from bigram_circuits.measures.statistics import STATISTICS
from bigram_circuits.measures.words import listed, percent
from bigram_circuits.models.activations import (
    NotShownError,
    batch_size_for,
    check_tokens,
    residual_streams,
)
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.storage.origin import Origin
from bigram_circuits.targets.base import PlacedTarget, Target, kl_of_best_constant, target_of
from bigram_circuits.text.corpus import in_order, spread, token_array

SAME_WEIGHTS = 0.9
"""Jaccard overlap from which two masks count as the same weights."""
SAME_FUNCTION = 0.9
"""Agreement, of either with the other and on either text, from which two masks count as the same function."""
OTHER_FUNCTION = "other function"
"""The verdict on masks that do not compute the same."""
HELD_OUT, ELSEWHERE = "held out", "out of distribution"
"""The two texts."""
_LEAST = 0.01  # nats: where predictions hardly depend on the context, agreement is measured by this instead of KL0
_SHOWN = 512  # tokens whose residual streams are compared

_BEHAVIOUR = (
    Quantity("agreement", "share", "Share of what the first takes from the context that the second tells."),
    Quantity("agreement_back", "share", "Share of what the second takes from the context that the first tells."),
    Quantity("kl", "nats", "Mean KL from the first's predictions to the second's."),
    Quantity("kl_back", "nats", "Mean KL from the second's predictions to the first's."),
    Quantity("top1_agreement", "share", "Places where both have the same most likely token."),
)
_SPLICES = (
    Quantity("kept_in_a", "share", "Explained information of the first that it keeps with this part of the second."),
    Quantity("without_in_a", "share", "The same without this part: near 1 if nothing needs it."),
    Quantity("kept_in_b", "share", "Explained information of the second that it keeps with this part of the first."),
    Quantity("without_in_b", "share", "The same without this part."),
    Quantity("r_in_a", "share", "r with the target of the first with this part of the second, over its own r."),
    Quantity("r_in_b", "share", "r with the target of the second with this part of the first, over its own r."),
)
_STREAMS = (
    Quantity("cka", "", "Unbiased linear CKA of the two residual streams."),
    Quantity("cosine", "", "Mean cosine of the two residual streams, each minus its mean over the tokens."),
)


@dataclass(frozen=True)
class SameFunction:
    """Whether two masks compute the same, by what they do and what their parts do in each other.

    Example:
        >>> other = bc.Subnetwork.magnitude(model, like=found)
        >>> compared = bc.same_function(model, found, other, target, text)
        >>> compared.verdict  # same weights; other weights, same function; or other function
        'other function'
        >>> compared.splices.to_dataframe()
    """

    overlap: Effects
    """The overlap of their weights or nodes, overall and by component, with its exact null."""
    behaviour: Effects
    """Agreement of their predictions, on `held out` text and `out of distribution`, with 95% intervals."""
    splices: Effects
    """What each keeps with a part of the other, by part, with 95% intervals; parts that are the same are left out."""
    streams: Curves | None
    """CKA and cosine of their residual streams by layer; None if the model does not show them."""
    of: Origin | None = None
    """The first mask and the text, and the run if there is one."""

    @property
    def agreement(self) -> float:
        """The least agreement, of either with the other, on any text."""
        return float(np.nanmin(self.behaviour.values[:2]))

    @property
    def jaccard(self) -> float:
        """The overlap of all weights, or nodes, as a share of those that either keeps."""
        return self.overlap.get("jaccard")["all"]

    @property
    def spliced(self) -> float:
        """The least share kept with a part of the other, of parts whose loss matters (10% or more); nan if none."""
        names = [one.name for one in _SPLICES]
        kept, without = (
            self.splices.values[[names.index(f"{name}_in_a"), names.index(f"{name}_in_b")]]
            for name in ("kept", "without")
        )
        needed = kept[without < SAME_FUNCTION]
        return float(needed.min()) if needed.size else math.nan

    @property
    def verdict(self) -> str:
        """`same weights`; `other weights, same function`; or `other function`."""
        if not self.agreement >= SAME_FUNCTION:
            return OTHER_FUNCTION
        return "same weights" if self.jaccard >= SAME_WEIGHTS else "other weights, same function"

    @property
    def says(self) -> str:
        """The verdict and the numbers behind it, in two or three sentences."""
        units = str(self.behaviour.notes["units"])
        least = {name: float(np.nanmin(self.behaviour.values[:2, at])) for at, name in enumerate(self.behaviour.names)}
        texts = listed([f"{percent(value) if value > 0 else 'none'} {_ON[name]}" for name, value in least.items()])
        chance = self.overlap.get("expected")["all"]
        times = self.overlap.get("intersection")["all"] / chance if chance else math.nan
        words = (
            f"{self.verdict[0].upper()}{self.verdict[1:]}: of what either takes from the context, the other tells "
            f"{texts} (the lower of both directions); they share {percent(self.jaccard)} of the {units} that either "
            f"keeps{'' if math.isnan(times) else f', {times:,.1f} times chance'}."
        )
        if math.isnan(self.spliced):
            return words
        fit = "fit each other" if self.spliced >= SAME_FUNCTION else "do NOT all fit each other"
        kept = max(0.0, self.spliced)
        return f"{words} Their parts {fit}: with one part of the other, at least {percent(kept)} of its own is kept."

    def __str__(self) -> str:
        streams = [] if self.streams is None else ["", str(self.streams)]
        return "\n".join([str(self.behaviour), "", str(self.splices), *streams, "", self.says])

    def _repr_html_(self) -> str:
        """HTML for notebooks: the verdict, and the tables."""
        parts = [one._repr_html_() for one in (self.behaviour, self.splices, self.streams) if one is not None]  # pyright: ignore[reportPrivateUsage]
        return html.summary("Do two masks compute the same?", [self.says], *parts)

    def plot(self) -> Any:
        """A plotly figure of what each keeps with a part of the other."""
        return self.splices.plot("kept_in_a")

    def to_dataframe(self) -> Any:
        """A pandas table of the splices: a row for every part."""
        return self.splices.to_dataframe()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the results to a folder as JSON files.

        Raises:
            OSError: If the folder cannot be written.
        """
        for name in _PARTS:
            if (part := getattr(self, name)) is not None:
                part.save(Path(folder) / f"{name}.json", self.of)


_ON = {HELD_OUT: "on held-out text", ELSEWHERE: "out of distribution"}
_PARTS: Mapping[str, type[Result]] = {"overlap": Effects, "behaviour": Effects, "splices": Effects, "streams": Curves}


def load_same_function(folder: str | os.PathLike[str]) -> SameFunction:
    """Read what `SameFunction.save` wrote.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or of another kind.

    Example:
        >>> other = bc.Subnetwork.magnitude(model, like=found)
        >>> bc.same_function(model, found, other, target, text).save("same")
        >>> bc.load_same_function("same").verdict
        'other function'
    """
    folder = Path(folder)
    needed = [name for name in _PARTS if name != "streams" or (folder / "streams.json").is_file()]
    read = {name: load_result_and_origin(folder / f"{name}.json", follow=False) for name in needed}
    if not all(isinstance(part, _PARTS[name]) for name, (part, _) in read.items()):
        raise ValueError(f"{str(folder)!r} holds results of another kind, not those of `same_function`")
    parts: dict[str, Any] = {"streams": None} | {name: part for name, (part, _) in read.items()}
    return SameFunction(**parts, of=read["behaviour"][1])


@uses_model
def same_function(
    model: Model,
    a: MaskLike,
    b: MaskLike,
    target: Any,
    tokens: Any,
    *,
    out_of_distribution: Any = None,
    seed: int = 0,
) -> SameFunction:
    """Compare what two masks of one model compute: behaviour, splices and residual streams, beside their overlap.

    It takes about two forward passes over the text for every part (a layer, or the attention or MLP of one) in which
    the masks differ, and twice as many again for the controls.

    Args:
        model: From `load_model`.
        a: A `Subnetwork` or `Circuit`, or what holds one.
        b: Another one, over the same weights or nodes.
        target: What both are for, as for `evaluate`: splices are measured by it.
        tokens: Held-out token ids [sequence, position], or a corpus (its held-out part).
        out_of_distribution: Other text of the same kind; by default the same sequences with all tokens but the first
            shuffled. It is left out for circuits with counterfactuals, which are defined on their prompts alone.
        seed: Seed of the shuffling.

    Raises:
        ValueError: If the masks are not over the same weights or nodes, one keeps nothing, or model, target and text do
            not fit together.

    Example:
        >>> other = bc.Subnetwork.magnitude(model, like=found)
        >>> print(bc.same_function(model, found, other, target, text).says)
    """
    statistics.check_seed(seed)
    first, second = as_mask(a), as_mask(b)
    for one in (first, second):
        one.check_fits(model)
    shared = overlap(first, second, by="component")  # checks that they are of the same weights or nodes
    target, text = target_of(target, model), token_array(tokens)
    check_tokens(model, text)
    elsewhere = _elsewhere(model, first, second, text, out_of_distribution, seed)
    rows = {HELD_OUT: _Behaviour.of(model, first, second, text, target)}
    if elsewhere is not None:
        rows[ELSEWHERE] = _Behaviour.of(model, first, second, elsewhere, None)
    notes: dict[str, Any] = {
        "units": first.units_here,
        "noun": first.noun,
        "first": first.lineage,
        "second": second.lineage,
        "masks": [first.checksum, second.checksum],
    }
    notes |= {"sequences": len(text), "shuffled_by_seed": None if out_of_distribution is not None else seed}
    return SameFunction(
        shared,
        effects_of("Behaviour", _BEHAVIOUR, "text", {name: one.numbers() for name, one in rows.items()}, notes),
        _splices(model, first, second, target, text, notes),
        _streams(model, first, second, spread(text, _SHOWN), notes),
        Origin(None, first.checksum, None, None),
    )


def _elsewhere(
    model: Model, first: Mask, second: Mask, text: Integer[np.ndarray, "sequence position"], given: Any, seed: int
) -> Integer[np.ndarray, "sequence position"] | None:
    """The other text; None if there can be none."""
    if any(isinstance(one, Circuit) and one.replacement.kind == "counterfactual" for one in (first, second)):
        return None
    if given is not None:
        tokens = token_array(given)
        check_tokens(model, tokens)
        return tokens
    rng = np.random.default_rng(seed)
    return np.concatenate([text[:, :1], rng.permuted(text[:, 1:], axis=1)], axis=1)


# --- behaviour -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Behaviour:
    """How the predictions of two masked models agree on a text."""

    sums: Float[np.ndarray, "sequence column"]
    """By sequence: places, KL from the first to the second, KL back, places with the same most likely token."""
    constants: tuple[float, float]
    """KL of the best constant prediction, from the first's predictions and from the second's."""

    @classmethod
    def of(
        cls,
        model: Model,
        first: Mask,
        second: Mask,
        text: Integer[np.ndarray, "sequence position"],
        target: Target | None,
    ) -> _Behaviour:
        """Compare predictions at a target's places, or everywhere."""
        least = [one.replacement.smallest_batch for one in (first, second) if isinstance(one, Circuit)]
        rows, entropies, places = [], [0.0, 0.0], 0
        means: list[Any] = [0.0, 0.0]
        with torch.inference_mode():
            for batch in in_order(text, max(1, *least, batch_size_for(model, text.shape[1]) // 2)):
                ids = batch.to(model.cfg.device)
                logs = [_log_probs(model, one, ids, target) for one in (first, second)]
                (ours, of_row), (theirs, _) = logs
                probs = [one.exp() for one in (ours, theirs)]
                columns = [
                    torch.ones_like(ours[:, 0]),
                    (probs[0] * (ours - theirs)).sum(1),
                    (probs[1] * (theirs - ours)).sum(1),
                    (ours.argmax(1) == theirs.argmax(1)).to(ours),
                ]
                sums = torch.zeros(len(ids), len(columns), dtype=torch.float64, device=ours.device)
                rows.append(sums.index_add_(0, of_row, torch.stack(columns, 1)).cpu().numpy())
                places += len(ours)
                for at, (own, log) in enumerate(zip(probs, (ours, theirs), strict=True)):
                    means[at] = means[at] + own.sum(0).cpu()
                    entropies[at] -= float((own * log).sum())
        constants = tuple(
            float(torch.special.entr(torch.as_tensor(mean) / places).sum()) - entropy / places
            for mean, entropy in zip(means, entropies, strict=True)
        )
        return cls(np.concatenate(rows), (constants[0], constants[1]))

    def numbers(self) -> list[Ends]:
        """Each of `_BEHAVIOUR`, with its interval."""
        draws = statistics.bootstrap(self.sums)

        def row(of: Callable[[Float[np.ndarray, "... column"]], Any]) -> Ends:
            return (float(of(self.sums.sum(0))), *statistics.interval(of(draws)))

        def agreement(column: int) -> Callable[[Float[np.ndarray, "... column"]], Any]:
            constant = max(self.constants[column - 1], _LEAST)
            return lambda sums: 1 - sums[..., column] / sums[..., 0] / constant

        means = [lambda sums, at=at: sums[..., at] / sums[..., 0] for at in (1, 2, 3)]
        return [row(agreement(1)), row(agreement(2)), *map(row, means)]


def _log_probs(
    model: Model, mask: Mask, tokens: Integer[Tensor, "batch pos"], target: Target | None
) -> tuple[Float[Tensor, "place d_vocab"], Integer[Tensor, " place"]]:
    """Log-probabilities at a target's places (None: everywhere), float64, and the sequence of each place."""
    with masked(model, mask):
        logits = model(tokens)
    if isinstance(target, PlacedTarget):
        rows = target.counted(tokens).nonzero()
        here = logits[rows[:, 0], rows[:, 1]]
        return here.double().log_softmax(-1), rows[:, 0]
    here = logits if target is None else logits[:, target.positions]
    of_row = torch.arange(len(here), device=here.device).repeat_interleave(here.shape[1:-1].numel())
    return here.flatten(0, -2).double().log_softmax(-1), of_row


# --- splices ---------------------------------------------------------------------------------------------------------


def _splices(
    model: Model,
    first: Mask,
    second: Mask,
    target: Target,
    text: Integer[np.ndarray, "sequence position"],
    notes: Mapping[str, Any],
) -> Effects:
    """What each keeps with a part of the other, for every part in which they differ."""
    of = {one: _Explained.of(model, one, target, text) for one in (first, second)}
    nothing = first.constant(False)
    rows: dict[str, list[Ends]] = {}
    for label, names in _parts(first, second):
        row: list[list[Ends]] = []
        for own, other in ((first, second), (second, first)):
            kept, without = own.with_parts_of(other, names), own.with_parts_of(nothing, names)
            spliced = measure(model, kept, target, text)
            row.append([of[own].share(spliced), of[own].share(measure(model, without, target, text))])
            row[-1].append(of[own].r(spliced))
        (kept_a, without_a, r_a), (kept_b, without_b, r_b) = row
        rows[label] = [kept_a, without_a, kept_b, without_b, r_a, r_b]
    return effects_of("Parts of one mask in the other", _SPLICES, "part", rows, notes)


def _parts(first: Mask, second: Mask) -> Iterator[tuple[str, frozenset[str]]]:
    """The parts in which two masks differ: attention and MLPs (or units, or readers) by layer, then whole layers."""
    differ = {name for name in first if not torch.equal(first[name], second[name])}
    places: dict[tuple[int, str], set[str]] = {}
    layers: dict[int, set[str]] = {}
    for name in first:
        layer, kind = first.place_of(name)
        places.setdefault((layer, kind), set()).add(name)
        layers.setdefault(layer, set()).add(name)
    for (layer, kind), names in sorted(places.items()):
        if names & differ:
            yield f"L{layer}.{kind}", frozenset(names)
    for layer, names in sorted(layers.items()):
        if names & differ and sum(at == layer and bool(of & differ) for (at, _), of in places.items()) > 1:
            yield f"L{layer}", frozenset(names)


@dataclass(frozen=True)
class _Explained:
    """What a mask explains of a target: its gain in cross-entropy over a reference."""

    own: Measured
    reference: float
    """Cross-entropy of the best constant prediction, or where that is unknown, of the empty mask."""

    @classmethod
    def of(cls, model: Model, mask: Mask, target: Target, text: Integer[np.ndarray, "sequence position"]) -> _Explained:
        """Measure a mask, and its reference."""
        own = measure(model, mask, target, text)
        constant = kl_of_best_constant(target, text)
        if math.isnan(constant):
            empty = measure(model, mask.constant(False), target, text)
            return cls(own, empty.faithfulness.cross_entropy)
        return cls(own, own.faithfulness.cross_entropy - own.faithfulness.kl + constant)

    def share(self, other: Measured) -> Ends:
        """The share of the gain that another mask has, with its interval; nan where there is no gain."""
        return self._ratio(other, lambda sums: self.reference - STATISTICS["cross_entropy"](sums))

    def r(self, other: Measured) -> Ends:
        """Another mask's r over this one's, with its interval."""
        return self._ratio(other, STATISTICS["surprisal_correlation"])

    def _ratio(self, other: Measured, of: Callable[[Float[np.ndarray, "... column"]], Any]) -> Ends:
        own = float(of(self.own.sums.sum(0)))
        if not own > 0:
            return (math.nan, math.nan, math.nan)
        draws = of(self.own.draws)
        ratios = np.where(draws > 0, of(other.draws) / np.where(draws > 0, draws, 1), np.nan)
        return (float(of(other.sums.sum(0))) / own, *statistics.interval(ratios))


# --- streams ---------------------------------------------------------------------------------------------------------


def _streams(
    model: Model,
    first: Mask,
    second: Mask,
    text: Integer[np.ndarray, "sequence position"],
    notes: Mapping[str, Any],
) -> Curves | None:
    """CKA and cosine of the residual streams by layer; None if the model does not show them."""
    try:
        ours, theirs = (_residuals(model, masked(model, one), text) for one in (first, second))
    except NotShownError:
        return None
    ours, theirs = (one - one.mean(1, keepdim=True) for one in (ours, theirs))
    cka = [linear_cka(a, b) if ours.shape[1] >= 4 else math.nan for a, b in zip(ours, theirs, strict=True)]
    cosine = torch.cosine_similarity(ours, theirs, dim=-1).mean(1).tolist()
    values = np.array([cka, cosine])[:, None]
    none = np.full_like(values, np.nan)
    points = ("embed", *map(str, range(model.cfg.n_layers)))
    return Curves(
        "Residual streams of two masks", _STREAMS, "layer", points, ("both",), values, none, none,
        notes={**notes, "tokens": int(text.size)},
    )  # fmt: skip


@torch.inference_mode()
def _residuals(
    model: Model, block: AbstractContextManager[Any], text: Integer[np.ndarray, "sequence position"]
) -> Float[Tensor, "layer token d_model"]:
    """Residual streams within a block, float64."""
    with block:
        parts = [
            residual_streams(model, batch.to(model.cfg.device))[0].flatten(1, 2).double().cpu()
            for batch in in_order(text, max(2, batch_size_for(model, text.shape[1], streams=True)))
        ]
    return torch.cat(parts, 1)
