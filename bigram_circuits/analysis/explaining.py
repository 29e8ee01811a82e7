"""How a prediction comes about: the parts that write it, and the paths from token in to token out.

On one prompt a masked model is taken apart exactly (`models.linearised`). The logit of an answer, or any other linear
functional of the logits, is then

- a sum of *direct contributions*, what each embedding, head, neuron and bias writes to it by itself (direct logit
  attribution: Elhage et al. 2021);
- a sum over all *paths* from an input to it: token to neuron to neuron to logit. The *flow* of a node or an edge is the
  sum of all the paths through it, found by one backward pass; what flows into a node flows out of it. (Layer-wise
  relevance: Bach et al. 2015; for transformers with frozen patterns and scales Ali et al. 2022, arXiv 2202.07304;
  attribution graphs: Ameisen et al. 2025.)

Paths are too many to list; the strongest are found by following the strongest parts backwards, and the share that is
not listed is stated. A picture of this kind is about one prompt and first of all arithmetic. Whether it predicts what
removing a part does is measured (`predicted_effects`).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from bigram_circuits.analysis.arguments import usual_order
from bigram_circuits.analysis.conditions import check_arguments, reduced_to
from bigram_circuits.analysis.observables import Observable
from bigram_circuits.analysis.prompts import Prompt, position_of, prompt_tokens, token_id, token_word, token_words
from bigram_circuits.analysis.unit_tokens import unit_tokens
from bigram_circuits.circuit import Circuit
from bigram_circuits.explanations.explanation import CircuitPath, Edge, Explanation, Node
from bigram_circuits.explanations.words import quoted
from bigram_circuits.masking.apply import Mask, MaskLike
from bigram_circuits.measures.words import percent
from bigram_circuits.models.activations import NotShownError
from bigram_circuits.models.linearised import Directions, Linearised, Neurons, Vector, Weights, linearise
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.names import model_words
from bigram_circuits.subnetwork import Subnetwork

_PREDICTIONS = 5
_BRANCHES = 24  # parts that a path is followed to from each of its nodes
_EXPANSIONS = 4  # nodes that are followed, for every path that is listed
_TOLERANCE = 1e-4  # of the largest term, that sums may differ by
_ROUNDED = 0.02  # the same, of logits in 16 bits
_TOKENS_AT_ONCE = 64  # in a batch of prompts that are taken apart
_ANSWER, _BIAS = "answer", "bias"


@usual_order
@uses_model
def explain(
    model: Model,
    subnetwork: MaskLike | None = None,
    prompt: Prompt = "",
    answer: Any = None,
    *,
    wrong: str | int | None = None,
    position: int = -1,
    nodes: int = 60,
    edges: int = 300,
    paths: int = 20,
) -> Explanation:
    """How a masked model comes from a prompt, or a single token, to its prediction.

    Args:
        model: From `load_model`, on its raw weights.
        subnetwork: What is kept: a `Subnetwork`, a `Circuit` of nodes, or what holds one; None for the full model.
        prompt: One text (a single token such as `" of"`, or more), or token ids [pos] or [1, pos]. A text begins with
            the BOS that the tokenizer puts there.
        answer: The token whose logit is explained, as text or id; by default the one that the masked model predicts.
            Or an observable (`observable`): any linear functional of the logits.
        wrong: A token to compare with: then the difference of the two logits is explained.
        position: The position whose prediction is explained; negative counts from the end.
        nodes: Most neurons and heads in the graph: those with the largest flows.
        edges: Most edges between them.
        paths: Most paths to list.

    Returns:
        The explanation: its `terms` add up to the logit; so do its `paths` and `left_out`.

    Raises:
        ValueError: If a token or position does not exist, a number is below 1, or the subnetwork does not fit.
        NotShownError: If the model's logits are not a sum over its parts, or the circuit keeps edges: those give every
            reader a residual stream of its own.

    Example:
        >>> explanation = bc.explain(model, found, "import os")
        >>> explanation.to_dataframe()  # the strongest paths
    """
    if min(nodes, edges, paths) < 1:
        raise ValueError(f"nodes, edges and paths must be at least 1, not {nodes}, {edges} and {paths}")
    tokens = prompt_tokens(model, prompt)
    kept, _ = check_arguments(model, subnetwork)
    place = position_of(position, tokens.shape[1])
    with torch.no_grad(), taken_apart(model, kept) as apart:
        passed = next(apart([tokens]))
        asked = functional(model, answer, wrong, passed.shown[place])
        return explained(model, kept, passed, tokens, place, asked, Limits(nodes, edges, paths))


@dataclass(frozen=True)
class Limits:
    """How much of an explanation is listed."""

    nodes: int = 60
    edges: int = 300
    paths: int = 20


@contextmanager
def taken_apart(
    model: Model, kept: Mask | None
) -> Iterator[Callable[[Iterable[Integer[Tensor, "1 pos"]]], Iterator[Linearised]]]:
    """Within the `with` block, a function from prompts to forward passes of the masked model that are taken apart.

    Raises:
        NotShownError: If the mask is of edges.
    """
    replaced: dict[str, Bool[Tensor, " node"]] = {}
    if isinstance(kept, Circuit):
        if kept.edge_sites:
            raise NotShownError(
                "a circuit of edges gives every reader a residual stream of its own, so that there is no sum to "
                "explain: explain its nodes, circuit.to_nodes()"
            )
        replaced = {name: ~mask for name, mask in kept.items() if mask.ndim == 1}
    at_once = _TOKENS_AT_ONCE if kept is None or isinstance(kept, Subnetwork) else 1  # replacements may tell batches
    with reduced_to(model, kept):
        weights = Weights.of(model)
        yield lambda prompts: linearise(model, prompts, weights, replaced, at_once=at_once)


@dataclass(frozen=True)
class Asked:
    """What is explained: a linear functional of the logits."""

    words: str
    """`logit of ' the'`."""
    label: str
    """The same on a node: `' the'`."""
    weights: Float[Tensor, " d_vocab"]


def functional(model: Model, answer: Any, wrong: Any, logits: Float[Tensor, " d_vocab"]) -> Asked:
    """The functional that is asked for; by default the logit of the most likely token.

    Raises:
        ValueError: If a token does not exist, both are the same, or `wrong` comes with an observable.
    """
    weights = torch.zeros_like(logits)
    if isinstance(answer, Observable):
        if wrong is not None:
            raise ValueError("an observable is explained by itself: wrong is for the logit of an answer")
        given = torch.as_tensor(answer.weights, dtype=weights.dtype, device=weights.device)
        if given.shape != weights.shape:
            raise ValueError(f"the observable has {len(given)} weights, but this model {len(weights)} logits")
        return Asked(answer.name, answer.name, given)
    best = int(logits.argmax()) if answer is None else token_id(model, answer)
    weights[best] = 1.0
    label = quoted(token_word(model, best))
    words = f"logit of {label}"
    if wrong is not None:
        other = token_id(model, wrong)
        if other == best:
            raise ValueError(f"answer and wrong are the same token, {label}")
        weights[other] = -1.0
        than = quoted(token_word(model, other))
        words, label = f"{words} minus logit of {than}", f"{label} minus {than}"
    return Asked(words, label, weights)


def explained(
    model: Model,
    kept: Mask | None,
    passed: Linearised,
    tokens: Integer[Tensor, "1 pos"],
    place: int,
    asked: Asked,
    limits: Limits,
    *,
    brief: bool = False,
) -> Explanation:
    """The explanation of a functional of the logits at one position of a forward pass that was taken apart.

    `brief` leaves out the direct contributions and the tokens of neurons and heads.
    """
    end = passed.direction(asked.weights, place)
    words = token_words(model, tokens[0].tolist())
    value = float(passed.logits[place].double() @ asked.weights.double())
    constant = float(passed.constant.double() @ asked.weights.double())
    graph = _Graph(passed, _Reader(end, len(passed.writers), value), constant, words, asked.label)
    direct = torch.cat([one.flatten() for one in passed.written(end)]).double()
    total, largest = float(direct.sum()) + constant, max(1.0, abs(constant), float(direct.abs().max()))
    if not abs(total - value) <= _TOLERANCE * largest:
        raise NotShownError(f"the {asked.words} is {value:.6g}, but the contributions add up to {total:.6g}")
    shown, flows = graph.nodes_and_edges(limits)
    paths, left_out, share = graph.paths(limits.paths)
    probabilities = passed.shown[place].softmax(-1)
    top = probabilities.topk(min(_PREDICTIONS, len(probabilities)))
    notes: dict[str, Any] = {"frozen": ["attention patterns", "scales of norms", "slopes of activation functions"]}
    if passed.whole:
        notes["whole"] = list(passed.whole)
    bound = (_ROUNDED if model.W_U.dtype.itemsize < 4 else _TOLERANCE) * float(passed.shown[place].abs().max())
    if float((passed.logits[place] - passed.shown[place]).abs().max()) > max(bound, _TOLERANCE):
        notes["logits"] = "before the soft cap or scale that the model applies to them"
    units = [node.label for node in shown if node.kind in ("neuron", "head")]
    return Explanation(
        model=model_words(model.cfg.model_name),
        mask="full model" if kept is None else _kept_words(kept),
        prompt=tuple(words),
        position=place,
        answer=asked.words,
        value=value,
        predictions=tuple(zip(token_words(model, top.indices.tolist()), top.values.tolist(), strict=True)),
        terms={} if brief else graph.terms(place),
        nodes=shown,
        edges=flows,
        paths=paths,
        left_out=left_out,
        left_out_share=share,
        units={} if brief else unit_tokens(model, passed, units, place),
        notes=notes,
    )


def _kept_words(kept: Mask) -> str:
    return f"{kept.kept:,} of {kept.total:,} {kept.units_here} ({percent(kept.fraction)})"


@dataclass(frozen=True)
class _At:
    """A unit of a writer at a position."""

    writer: int
    unit: int
    position: int


@dataclass(frozen=True, eq=False)
class _Reader:
    """Something that reads: the answer, or a head or neuron at a position."""

    directions: Directions
    """What it reads along, at every position."""
    limit: int
    """Number of writers that it reads from."""
    value: float
    """Its dot product with what they wrote, and its own biases."""


class _Graph:
    """The flows of one functional through a forward pass that was taken apart."""

    def __init__(self, passed: Linearised, end: _Reader, constant: float, words: Sequence[str], answer: str) -> None:
        self.passed, self.end, self.constant, self.words, self.answer = passed, end, constant, words, answer
        self.writers = passed.writers
        self.flows, self.along = passed.flows(end.directions)
        totals = (torch.zeros_like(end.directions) if one.kind == _BIAS else one.total() for one in self.writers)
        self.unbiased = list(itertools.accumulate(totals, initial=torch.zeros_like(end.directions)))
        """For each limit, the sum of what the first writers wrote, without biases."""

    # --- units ---

    def kind(self, at: _At) -> str:
        """The kind of node that a unit is."""
        writer = self.writers[at.writer]
        is_dropped = not isinstance(writer, Vector) and not writer.kept[at.unit]
        return "replaced" if is_dropped else writer.kind

    def label(self, writer: int, unit: int) -> str:
        """`L0N12`; `token`."""
        found = self.writers[writer]
        return found.label if isinstance(found, Vector) else found.label(unit)

    def name(self, at: _At) -> str:
        """The label of a node: of a token, the token itself."""
        kind = self.kind(at)
        if kind == "token":
            return quoted(self.words[at.position])
        return f"position {at.position}" if kind == "position" else self.label(at.writer, at.unit)

    def key(self, at: _At) -> str:
        """`L0N12@5`."""
        return f"{self.label(at.writer, at.unit)}@{at.position}"

    def traced(self, at: _At, directions: Directions, value: float) -> _Reader | None:
        """A unit as a reader, if it writes along these directions; None if it begins paths."""
        writer = self.writers[at.writer]
        if isinstance(writer, Vector) or writer.reading is None or not writer.kept[at.unit]:
            return None
        return _Reader(writer.traced(directions, at.unit, at.position), writer.reading.limit, value)

    def from_biases(self, reader: _Reader) -> float:
        """What a reader gets from biases: its own, and those written before."""
        return reader.value - float((reader.directions * self.unbiased[reader.limit]).sum())

    # --- direct contributions ---

    def terms(self, place: int) -> dict[str, float]:
        """Direct contributions by label; exact zeros are left out."""
        at = torch.tensor([place], device=self.end.directions.device)
        found: dict[str, float] = {}
        for index, row in enumerate(self.passed.written(self.end.directions, at=at)):
            for unit in row[0].nonzero().flatten().tolist():
                found[self.label(index, unit)] = float(row[0, unit])
        return found | ({"logit bias": self.constant} if self.constant else {})

    # --- nodes and edges ---

    def nodes_and_edges(self, limits: Limits) -> tuple[tuple[Node, ...], tuple[Edge, ...]]:
        """The nodes with the largest flows, and the largest flows between them."""
        listed = self._strongest(limits.nodes)
        readers = {self.key(at): self.traced(at, self.along[at.writer], self._flow(at)) for at in listed}
        outs = torch.stack([self._written(at) for at in listed]) if listed else self.end.directions[:0]
        places = torch.tensor([at.position for at in listed], dtype=torch.long, device=outs.device)
        found: list[tuple[str, str, float]] = []
        for target, reader in {**readers, _ANSWER: self.end}.items():
            if reader is None:
                continue
            found.append((_BIAS, target, self.from_biases(reader)))
            flows = (outs * reader.directions[places]).sum(1).tolist()
            for at, source, flow in zip(listed, readers, flows, strict=True):
                if at.writer < reader.limit:
                    found.append((source, target, flow))
        edges = heapq.nlargest(limits.edges, (one for one in found if one[2]), key=lambda one: abs(one[2]))
        inflow = dict.fromkeys((*readers, _ANSWER), 0.0)
        for _, target, flow in edges:
            inflow[target] += flow
        direct = (outs * self.end.directions[places]).sum(1).tolist()
        nodes = [
            self._node(at, by_itself, inflow[key], readers[key])
            for key, at, by_itself in zip(readers, listed, direct, strict=True)
        ]
        biases = self._biases()
        nodes = [*([biases] if any(source == _BIAS for source, _, _ in edges) else []), *nodes]
        nodes.sort(key=lambda node: (node.layer, -1 if node.position is None else node.position))
        value = self.end.value
        end = Node(_ANSWER, _ANSWER, self.answer, self.passed.layers, None, value, value, value - inflow[_ANSWER])
        return (*nodes, end), tuple(Edge(*one) for one in edges)

    def _strongest(self, count: int) -> list[_At]:
        """The units with the largest flows, and every token of the prompt, unless there are more than that."""
        inputs, others = list[tuple[float, _At]](), list[tuple[float, _At]]()
        for index, (writer, flow) in enumerate(zip(self.writers, self.flows, strict=True)):
            if writer.kind == _BIAS:
                continue
            sizes, places = flow.abs().flatten().topk(min(count, flow.numel()))
            for size, place in zip(sizes.tolist(), places.tolist(), strict=True):
                at = _At(index, place % flow.shape[1], place // flow.shape[1])
                if size > 0:
                    (inputs if writer.kind in ("token", "position") else others).append((size, at))
        chosen = [*heapq.nlargest(count, inputs, key=_size), *heapq.nlargest(count, others, key=_size)]
        return [at for _, at in chosen]

    def _flow(self, at: _At) -> float:
        return float(self.flows[at.writer][at.position, at.unit])

    def _written(self, at: _At) -> Float[Tensor, " d_model"]:
        writer = self.writers[at.writer]
        return writer.written[at.position] if isinstance(writer, Vector) else writer.unit(at.unit, at.position)

    def _node(self, at: _At, direct: float, inflow: float, reader: _Reader | None) -> Node:
        writer, flow = self.writers[at.writer], self._flow(at)
        activation = float(writer.activation[at.position, at.unit]) if isinstance(writer, Neurons) else None
        unseen = 0.0 if reader is None else flow - inflow
        return Node(
            self.key(at), self.kind(at), self.name(at), writer.layer, at.position, direct, flow, unseen, activation
        )

    def _biases(self) -> Node:
        """All biases as one node; its flow is what no other source gives."""
        direct, others = self.constant, 0.0
        for writer, flow in zip(self.writers, self.flows, strict=True):
            if isinstance(writer, Vector):
                if writer.kind == _BIAS:
                    direct += float(writer.on(self.end.directions).sum())
                else:
                    others += float(flow.sum())
            else:
                begins = ~writer.kept if writer.reading is not None else torch.ones_like(writer.kept)
                others += float(flow[:, begins].sum())
        return Node(_BIAS, _BIAS, "biases", -1, None, direct, self.end.value - others)

    # --- paths ---

    def paths(self, count: int) -> tuple[tuple[CircuitPath, ...], float, float]:
        """The strongest paths, what all others add up to, and their share of the strength of all."""
        ties = itertools.count()
        queue: list[tuple[float, int, _Reader, tuple[str, ...], tuple[str, ...]]] = []
        whole: list[CircuitPath] = []
        rest = 0.0

        def follow(reader: _Reader, keys: tuple[str, ...], labels: tuple[str, ...]) -> float:
            if bias := self.from_biases(reader):
                whole.append(CircuitPath((_BIAS, *keys), ("biases", *labels), bias))
            parts, strength = self._parts(reader)
            for at, value in parts:
                its_keys, its_labels = (self.key(at), *keys), (self.name(at), *labels)
                onward = self.traced(at, reader.directions, value)
                if onward is None:
                    whole.append(CircuitPath(its_keys, its_labels, value))
                else:
                    heapq.heappush(queue, (-abs(value), next(ties), onward, its_keys, its_labels))
            return strength

        rest += follow(self.end, (_ANSWER,), (self.answer,))
        for _ in range(count * _EXPANSIONS):
            if not queue:
                break
            least = heapq.nlargest(count, (abs(one.value) for one in whole))
            if len(least) == count and -queue[0][0] <= least[-1]:
                break
            _, _, reader, keys, labels = heapq.heappop(queue)
            rest += follow(reader, keys, labels)
        whole.sort(key=lambda one: -abs(one.value))
        listed = whole[:count]
        rest += sum(abs(one.value) for one in whole[count:]) + sum(-one[0] for one in queue)
        strength = sum(abs(one.value) for one in listed)
        left_out = self.end.value - math.fsum(one.value for one in listed)
        return tuple(listed), left_out, rest / (rest + strength) if rest + strength else 0.0

    def _parts(self, reader: _Reader) -> tuple[list[tuple[_At, float]], float]:
        """The strongest of what a reader reads, but for biases; and the strength of all others."""
        at = reader.directions.any(1).nonzero().flatten()
        rows = self.passed.written(reader.directions, reader.limit, at)
        found, strength = list[tuple[_At, float]](), 0.0
        for index, row in enumerate(rows):
            if self.writers[index].kind == _BIAS or not row.numel():
                continue
            flat = row.flatten()
            strength += float(flat.abs().sum())
            places = flat.abs().topk(min(_BRANCHES, len(flat))).indices
            for place, value in zip(places.tolist(), flat[places].tolist(), strict=True):
                if value:
                    found.append((_At(index, place % row.shape[1], int(at[place // row.shape[1]])), value))
        found = heapq.nlargest(_BRANCHES, found, key=lambda one: abs(one[1]))
        return found, max(0.0, strength - sum(abs(value) for _, value in found))


def _size(one: tuple[float, Any]) -> float:
    return one[0]
