"""Models in which known heads, neurons and weights compute a known behaviour by attention, exact to a stated bound.

The residual stream of a GPT-2 is divided into slots, as in `bigram.py`: one slot for every token where the embedding
writes the current token, one for every token where a head writes the previous one, one for every token that the
unembedding reads, and slots for the position. Three circuits are planted:

- `previous_token`: L0H1 attends to the previous position and writes the logits of s(previous token), s a permutation.
- `trigram`: L0H1 writes the previous token into its slot. Neuron (i, j) of the first MLP fires if the previous token is
  i and the current one j, and writes the logits of that pair's successors.
- `induction`: L0H1 writes the previous token into its slot; L1H2 attends to where the previous token is the current
  one, and copies the token there (Olsson et al. 2022, arXiv 2209.11895).

**Positions.** Position t has a code, (cos w t, sin w t) for each of two angles w per step, and the code of t - 1 in
other slots. L0H1's query reads the latter and its key the former, so position s gets the score A sum over w of
cos w (s - t + 1), which is largest at s = t - 1. The angles are multiples of 2 pi / length that make the second largest
score as small as possible, and A is such that it is `sharpness` nats smaller. At the first position, which has none
before it, L0H1 attends to the position itself.

**Neurons.** With activation g, neuron (i, j) has the bias -r and reads r from either slot, so it is at g(-r), g(0) = 0
or g(r) if none, one or both of its tokens are there. The k-th successors of all pairs (i, j) with the same i, or with
the same j, are all tokens. So what the other neurons write is the same number for every token, which softmax cancels,
and the pair's own logits come out times g(r) + g(-r).

**Normalisation.** Codes have their negatives in further slots, and every token writes the same number, so that the
stream's mean and norm do not depend on the tokens. From the first attention on, biases also write a number into two
slots that is large beside all others (and that no normalisation passes on), so that every normalisation divides by
nearly the same number even if parts of the model are taken away.

**The bound.** Attention is not quite one-hot: a share e of it lies on other positions, known from the scores. From it
follows, step by step and by the triangle inequality, how far any number in the stream is from what it would be with
one-hot attention, and so how far any log-probability is from the ideal (`_Bounds`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.circuit import Circuit
from bigram_circuits.models.identity import weight_hash
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import usual_torch
from bigram_circuits.models.weights import weight_sites
from bigram_circuits.names import WeightName, head_label, neuron_label
from bigram_circuits.planted.building import N_HEADS, blocks, check, hooked, norms, plain_model, set_norm
from bigram_circuits.subnetwork import Subnetwork, SubnetworkLike, as_subnetwork
from bigram_circuits.tasks.builtin import repeated_random_tokens
from bigram_circuits.tasks.target import TaskTarget
from bigram_circuits.tasks.task import Task
from bigram_circuits.text.corpus import Corpus
from bigram_circuits.text.ngrams import Level, NGramTable

KINDS = ("previous_token", "trigram", "induction")
"""The circuits that can be planted."""

_IN, _READ = 3.0, 2.0  # what is written into a slot, and what a weight reads there after normalisation
_BALLAST = 300.0  # written into one slot, and its negative into another
_ANGLES = 2  # in a position's code
_SPARE = 4  # slots of a closed model that distractors write into
_END = 2  # the block from which on nothing is added to the stream
_COPIED = 6.0  # logit of the token that a head predicts
_LOGITS, _SUCCESSORS = (2.5, 4.5), 4  # of a pair, from the least to the most likely
_PREVIOUS, _COPYING = (0, 1), (1, 2)  # layer and head of the two heads
_TRAIN, _HELD_OUT = 256, 64  # sequences
_MOST_STEEP = 1.13  # the largest slope of a GELU, rounded up


@dataclass(frozen=True)
class PlantedAttention:
    """A model with a planted circuit that uses attention, and the ground truth about it at three levels.

    Example:
        >>> planted = bc.plant_attention("previous_token", d_vocab=8)
        >>> planted.node_recovery(planted.nodes)  # precision and recall
        (1.0, 1.0)
    """

    kind: str
    """What it does, one of `KINDS`."""
    model: Model
    """The hooked model."""
    circuit: Subnetwork
    """The planted weights."""
    nodes: Circuit
    """The planted heads and neurons, among all heads and neurons."""
    edges: tuple[str, ...]
    """The planted edges, from what writes (`embed`, of tokens and positions; a head; an MLP with all of its neurons) to
    what reads (a head's query, key or value; an MLP; `logits`): `embed->L0H1.q`, `L0H1->L0.mlp`, `L1H2->logits`."""
    target: NGramTable | TaskTarget
    """What the circuit does: the trigram distribution, or the answers of the task."""
    corpus: Corpus
    """Text on which the target is defined."""
    task: Task | None
    """The prompts that it answers; None for `trigram`, which is defined on all text."""
    bound: float
    """The largest deviation, in nats, of a log-probability that the planted weights alone compute from the ideal one,
    wherever that is defined: in exact arithmetic, to which float32 adds about 1e-5."""
    after: Float[Tensor, "previous current next"] | None = field(repr=False)
    """P(next | previous, current), float64; None for `induction`."""

    def ideal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Log-probabilities that the circuit approximates, float64; nan where the behaviour is undefined.

        At the first position the current token takes the place of the previous one. Induction is defined where every
        earlier occurrence of the current token was followed by the same one (and is not the start token).
        """
        if self.after is not None:
            previous = torch.cat([tokens[:, :1], tokens[:, :-1]], 1)
            return self.after[previous, tokens].log()
        n = self.model.cfg.d_vocab
        found = torch.full((*tokens.shape, n), math.nan, dtype=torch.float64)
        for row, ids in enumerate(tokens.tolist()):
            for at, current in enumerate(ids):
                following = {ids[s] for s in range(1, at + 1) if ids[s - 1] == current}
                if current and len(following) == 1 and 0 not in following:
                    logits = torch.zeros(n, dtype=torch.float64)
                    logits[following.pop()] = _COPIED
                    found[row, at] = logits.log_softmax(0)
        return found

    def recovery(self, found: SubnetworkLike) -> tuple[float, float]:
        """Return (precision, recall) of weights: the share of `found` that is planted, and of planted weights found.

        Precision is nan if `found` is empty.
        """
        weights = as_subnetwork(found)
        return _shares((weights & self.circuit).kept, weights.kept, self.circuit.kept)

    def node_recovery(self, found: Circuit) -> tuple[float, float]:
        """Return (precision, recall) of nodes; raises ValueError if `found` is not over all heads and neurons."""
        return _shares((found & self.nodes).kept, found.kept, self.nodes.kept)

    def edge_recovery(self, found: Iterable[str]) -> tuple[float, float]:
        """Return (precision, recall) of edges, given by labels such as `L0H1->L1H2.k`."""
        edges = set(found)
        return _shares(len(edges & set(self.edges)), len(edges), len(self.edges))


def _shares(both: int, found: int, planted: int) -> tuple[float, float]:
    return both / found if found else math.nan, both / planted


@usual_torch()
def plant_attention(
    kind: str,
    *,
    d_vocab: int | None = None,
    length: int = 15,
    n_layers: int = 2,
    sharpness: float | int = 14.0,
    distractors: float | int = 0.05,
    inside: bool = False,
    closed: bool = False,
    seed: int = 0,
    folder: str | Path | None = None,
) -> PlantedAttention:
    """Build a GPT-2 whose planted weights compute a known behaviour by attention; the other weights are distractors.

    Only this architecture: learned positions can say where the previous token is, while rotary ones give every head a
    preference for distances that smears with the length of the text.

    Args:
        kind: `previous_token`: the next token is a permutation of the previous one, whatever the current one is.
            `trigram`: its distribution depends on the previous and the current token; given one of them alone, all
            tokens are equally likely. `induction`: it is the one that followed the current token before.
        d_vocab: Size of the vocabulary; by default 8 for `trigram`, which has a neuron for every pair of tokens, else
            12.
        length: Tokens in a sequence, which is also the model's context, 6 to 64. For `induction` an odd number: a start
            token and twice a block of random tokens, each of which occurs once in it.
        n_layers: Number of blocks; at least 2 for `induction`.
        sharpness: How much higher the score is of the position that is attended to than any other's, in nats. `bound`
            falls by a factor e with each.
        distractors: Standard deviation of the weights of all other heads and neurons, relative to the root mean square
            of the planted weights that read or write, as in `plant_bigram`.
        inside: Whether planted heads and neurons have such distractors among their own weights too. These must be
            dropped for the bound to hold, so `nodes` alone, which keep them, are then not as exact.
        closed: Whether distractors lead nowhere: they write only into slots that no normalisation passes on, so that
            the full model nearly computes the same as the circuit, and so does every model between them.
        seed: Seed of the behaviour, the distractors and the text.
        folder: Hugging Face folder to save the model in; by default it is in memory only.

    Returns:
        The model and the ground truth. No other part of the model computes the same: what a head needs in order to
        attend to one position is a sum over many slots, which noise does not give.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> planted = bc.plant_attention("previous_token", d_vocab=8)
        >>> print(planted.nodes, planted.bound)
    """
    n = d_vocab if d_vocab is not None else 8 if kind == "trigram" else 12
    _check(kind, n, length, n_layers, sharpness, distractors)
    if inside and closed:
        raise ValueError("inside and closed exclude each other: in a closed model planted parts have no distractors")
    rng = np.random.default_rng(seed)
    layout = _Layout.of(n, length, _SPARE if closed else 0)
    plain = plain_model("gpt2", n, layout.d_model, 2 * n * n if kind == "trigram" else 2 * n, n_layers, length)
    behaviour = _Behaviour.draw(kind, rng, n)
    streams = _Streams(behaviour, layout, _activations(plain))
    planted = _planted_weights(plain, streams, float(sharpness))
    heads, neurons = _owners(behaviour, n)
    _write_weights(plain, planted, streams, float(distractors), None if inside else (heads, neurons), seed)
    model = hooked(plain, n, f"planted {kind}", folder)
    masks = {site.name: torch.zeros(site.shape, dtype=torch.bool) for site in weight_sites(model)}
    masks |= {name: weight != 0 for name, weight in planted.items()}
    circuit = Subnetwork(masks, model_name=model.cfg.model_name, weight_hash=weight_hash(model), lineage="planted")
    nodes = Circuit.empty(model).keep(
        *(head_label(*one) for one in heads), *(neuron_label(0, index) for index in range(neurons))
    )
    target, corpus, task = _text(model, behaviour, rng, length, seed)
    bound = _Bounds(streams, float(sharpness)).bound
    return PlantedAttention(kind, model, circuit, nodes, _EDGES[kind], target, corpus, task, bound, behaviour.after)


_EDGES: Mapping[str, tuple[str, ...]] = {
    "previous_token": ("embed->L0H1.q", "embed->L0H1.k", "embed->L0H1.v", "L0H1->logits"),
    "trigram": (
        "embed->L0H1.q", "embed->L0H1.k", "embed->L0H1.v", "embed->L0.mlp", "L0H1->L0.mlp", "L0.mlp->logits",
    ),
    "induction": (
        "embed->L0H1.q", "embed->L0H1.k", "embed->L0H1.v", "embed->L1H2.q", "L0H1->L1H2.k", "embed->L1H2.v",
        "L1H2->logits",
    ),
}  # fmt: skip


def _check(
    kind: str, d_vocab: int, length: int, n_layers: int, sharpness: float | int, distractors: float | int
) -> None:
    check({"kind": (kind, kind in KINDS, f"one of {', '.join(KINDS)}")})
    least = 2 if kind == "induction" else 1
    check(
        {
            "d_vocab": (d_vocab, d_vocab > _SUCCESSORS, f"at least {_SUCCESSORS + 1}"),
            "length": (length, 6 <= length <= 64, "from 6 to 64"),
            "n_layers": (n_layers, n_layers >= least, f"at least {least}"),
            "sharpness": (sharpness, 0 < sharpness < math.inf, "a number above 0"),
            "distractors": (distractors, 0 <= distractors < math.inf, "a number of at least 0"),
        }
    )
    if kind == "induction":
        fits = length % 2 == 1 and length // 2 < d_vocab
        check({"length": (length, fits, f"odd, and at most 2 * d_vocab - 1 = {2 * d_vocab - 1}, for induction")})


# --- the behaviour ---


@dataclass(frozen=True)
class _Behaviour:
    """What is to be computed."""

    kind: str
    logits: Float[Tensor, "previous current next"] | None
    """float64; None for induction."""

    @classmethod
    def draw(cls, kind: str, rng: np.random.Generator, n: int) -> _Behaviour:
        if kind == "induction":
            return cls(kind, None)
        logits = torch.zeros(n, n, n, dtype=torch.float64)
        first, second = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
        if kind == "previous_token":
            logits[first, second, rng.permutation(n)[first]] = _COPIED
            return cls(kind, logits)
        row, column, names = rng.permutation(n), rng.permutation(n), rng.permutation(n)
        for place, value in enumerate(np.linspace(*_LOGITS, _SUCCESSORS)):
            logits[first, second, names[(row[first] + column[second] + place) % n]] = float(value)
        return cls(kind, logits)

    @property
    def after(self) -> Float[Tensor, "previous current next"] | None:
        """P(next | previous, current)."""
        return None if self.logits is None else self.logits.softmax(-1)

    @property
    def tokens(self) -> slice:
        """The tokens that heads copy: for induction all but the start token."""
        return slice(1 if self.kind == "induction" else 0, None)


def _owners(behaviour: _Behaviour, n: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """The planted heads, and the number of planted neurons, which are the first ones of the first MLP."""
    heads = (_PREVIOUS, _COPYING) if behaviour.kind == "induction" else (_PREVIOUS,)
    return heads, n * n if behaviour.kind == "trigram" else 0


def _text(
    model: Model, behaviour: _Behaviour, rng: np.random.Generator, length: int, seed: int
) -> tuple[NGramTable | TaskTarget, Corpus, Task | None]:
    n, sequences = model.cfg.d_vocab, _TRAIN + _HELD_OUT
    if behaviour.after is None:
        task = repeated_random_tokens(model, prompts=sequences, period=length // 2, seed=seed).distinct()
        return TaskTarget(task), task.corpus(_HELD_OUT / sequences), task
    if behaviour.kind == "trigram":
        tokens = _sample(rng, behaviour.after.numpy(), sequences, length)
        corpus = Corpus.from_tokens(tokens[:_TRAIN], tokens[_TRAIN:], source=f"a planted trigram, seed {seed}")
        return _trigram_table(behaviour.after), corpus, None
    following = behaviour.after[:, 0].argmax(1).numpy()
    pairs = rng.permutation(n * n)[:sequences]
    tokens = np.stack(np.divmod(pairs, n), 1)
    for _ in range(2, length):
        tokens = np.concatenate([tokens, following[tokens[:, -2]][:, None]], 1)
    scored = np.ones(tokens.shape, dtype=bool)
    scored[:, :2] = False  # no token is two before these
    task = Task("previous token", tokens, scored, math.log(n))
    return TaskTarget(task), task.corpus(), task


def _sample(
    rng: np.random.Generator, after: Float[np.ndarray, "previous current next"], sequences: int, length: int
) -> Integer[np.ndarray, "sequence position"]:
    upto = after.cumsum(2)
    upto[..., -1] = 1.0
    tokens = np.zeros((sequences, length), dtype=np.int64)
    tokens[:, 0] = rng.integers(0, len(after), sequences)
    for place in range(1, length):
        rows = upto[tokens[:, max(place - 2, 0)], tokens[:, place - 1]]
        tokens[:, place] = (rows < rng.random(sequences)[:, None]).sum(1)
    return tokens


def _trigram_table(after: Float[Tensor, "previous current next"]) -> NGramTable:
    """The distribution as a table, whose contexts of one token are those of the first position."""
    n = len(after)
    first = after[torch.arange(n), torch.arange(n)]
    levels = (_level(after.mean((0, 1))[None]), _level(first), _level(after.reshape(n * n, n)))
    return NGramTable(order=3, d_vocab=n, levels=levels)


def _level(rows: Float[Tensor, "context next"]) -> Level:
    """All contexts of one length, with a probability above 0 for every token."""
    contexts, n = rows.shape
    return Level(
        contexts=torch.arange(contexts), offsets=n * torch.arange(contexts + 1),
        tokens=torch.arange(n, dtype=torch.int32).repeat(contexts), probs=rows.flatten().float(),
        entropy=torch.special.entr(rows).sum(1).float(), top=rows.argmax(1).int(),
    )  # fmt: skip


# --- the slots ---


@dataclass(frozen=True)
class _Layout:
    """Where things are in the residual stream."""

    n: int
    """Size of the vocabulary."""
    length: int
    """Number of positions."""
    angles: Float[np.ndarray, " angle"]
    """Those of the code of a position, in radians per step."""
    spare: int
    """Number of slots that the distractors of a closed model write into, after all others; 0 if it is not closed."""

    @classmethod
    def of(cls, n: int, length: int, spare: int) -> _Layout:
        distance = np.arange(1, length)
        table = np.cos(2 * np.pi * np.outer(distance, np.arange(length // 2 + 1)) / length)
        chosen = min(
            combinations(range(1, length // 2 + 1), _ANGLES), key=lambda of: float(table[:, list(of)].sum(1).max())
        )
        return cls(n, length, 2 * np.pi * np.array(chosen) / length, spare)

    # the first slot of each: of the current and the previous token, of the output, of the code of this position (cosine
    # and sine for each angle, then their negatives) and of the one before, and of what is large beside all others

    current = 0
    previous = property(lambda self: self.n)
    output = property(lambda self: 2 * self.n)
    here = property(lambda self: 3 * self.n)
    before = property(lambda self: self.here + 4 * _ANGLES)
    ballast = property(lambda self: self.before + 4 * _ANGLES)

    @property
    def d_model(self) -> int:
        least = max(self.ballast + 2 + self.spare, N_HEADS * max(self.n, 2 * _ANGLES))
        return -(-least // (2 * N_HEADS)) * 2 * N_HEADS

    @property
    def d_head(self) -> int:
        return self.d_model // N_HEADS

    def codes(self) -> Float[Tensor, "length d_model"]:
        """What the position embeddings write."""
        rows = torch.zeros(self.length, self.d_model, dtype=torch.float64)
        for start, shift in ((self.here, 0), (self.before, -1)):
            turns = np.outer(np.arange(self.length) + shift, self.angles)
            code = torch.from_numpy(np.stack([np.cos(turns), np.sin(turns)], 2).reshape(self.length, -1))
            rows[:, start : start + 4 * _ANGLES] = _IN * torch.cat([code, -code], 1)
        return rows

    def scores(self) -> Float[np.ndarray, "query key"]:
        """Scores of L0H1 for A = 1: the sum over angles of cos w (s - t + 1); -inf for later keys."""
        distance = np.arange(self.length)[None, :] - np.arange(self.length)[:, None] + 1
        found = np.cos(distance[..., None] * self.angles).sum(-1)
        return np.where(distance > 1, -np.inf, found)

    @property
    def gap(self) -> float:
        """How much higher the score of the previous position is than any other's, for A = 1."""
        rest = self.scores()[1:]
        at = np.arange(len(rest))
        rest[at, at] = -np.inf
        return float(_ANGLES - rest.max())


# --- the weights ---


def _planted_weights(plain: Any, streams: _Streams, sharpness: float) -> dict[str, Float[Tensor, "..."]]:
    """Build the planted weights by canonical name: 0 where none is planted."""
    behaviour, layout = streams.behaviour, streams.layout
    n, kind = layout.n, behaviour.kind
    made: dict[str, Tensor] = {}
    tokens = range(n)[behaviour.tokens]

    def zeros(layer: int, names: Iterable[str], *shape: int) -> Iterator[Tensor]:
        for name in names:
            yield made.setdefault(
                str(WeightName(layer, "attn" if len(shape) == 3 else "mlp", name)), torch.zeros(shape)
            )

    def head(place: tuple[int, int]) -> list[Tensor]:
        layer, at = place
        into = (N_HEADS, layout.d_model, layout.d_head)
        reading = [one[at] for one in zeros(layer, ("W_Q", "W_K", "W_V"), *into)]
        return [*reading, *(one[at] for one in zeros(layer, ("W_O",), N_HEADS, layout.d_head, layout.d_model))]

    def strength(gap: float) -> float:
        """A weight of queries and keys, for scores READ**2 gap weight**2 / sqrt(d_head)."""
        return math.sqrt(sharpness * math.sqrt(layout.d_head) / gap) / _READ

    query, key, value, out = head(_PREVIOUS)
    for dim in range(2 * _ANGLES):
        query[layout.before + dim, dim] = key[layout.here + dim, dim] = strength(layout.gap)
    for token in tokens:
        value[layout.current + token, token] = 1.0
        if kind == "previous_token" and behaviour.logits is not None:
            following = int(behaviour.logits[token, 0].argmax())
            out[token, layout.output + following] = _COPIED / _READ
        else:
            out[token, layout.previous + token] = _IN / _READ
    if kind == "induction":
        query, key, value, out = head(_COPYING)
        for token in tokens:
            query[layout.current + token, token] = key[layout.previous + token, token] = strength(1.0)
            value[layout.current + token, token] = 1.0
            out[token, layout.output + token] = _COPIED / _READ
    if kind == "trigram" and behaviour.logits is not None:
        d_mlp = plain.config.n_inner
        (reads,), (writes,) = zeros(0, ("W_in",), layout.d_model, d_mlp), zeros(0, ("W_out",), d_mlp, layout.d_model)
        pair = torch.arange(n * n)
        reads[layout.previous + pair // n, pair] = reads[layout.current + pair % n, pair] = 1.0
        fires, resting = streams.activations
        writes[: n * n, layout.output : layout.output + n] = (
            behaviour.logits.reshape(n * n, n) / (fires + resting)
        ).float()
    return made


def _activations(plain: Any) -> tuple[float, float]:
    """The activations g(r) and g(-r) of a neuron that reads both of its tokens, and none."""
    from transformers.activations import ACT2FN

    found = ACT2FN[plain.config.activation_function](torch.tensor([_READ, -_READ], dtype=torch.float64))
    return found[0].item(), found[1].item()


def _views(plain: Any, layer: int) -> dict[str, Tensor]:
    """A block's weights by canonical name, in canonical axes, as views of the Hugging Face parameters."""
    attention, mlp, d_model = blocks(plain)[layer].attn, blocks(plain)[layer].mlp, plain.config.n_embd
    views = {str(WeightName(layer, "mlp", "W_in")): mlp.c_fc.weight}
    views[str(WeightName(layer, "mlp", "W_out"))] = mlp.c_proj.weight
    for place, name in enumerate(("W_Q", "W_K", "W_V")):
        part = attention.c_attn.weight[:, place * d_model : (place + 1) * d_model]
        views[str(WeightName(layer, "attn", name))] = part.unflatten(1, (N_HEADS, -1)).transpose(0, 1)
    views[str(WeightName(layer, "attn", "W_O"))] = attention.c_proj.weight.unflatten(0, (N_HEADS, -1))
    return views


@torch.no_grad()
def _write_weights(
    plain: Any, planted: Mapping[str, Tensor], streams: _Streams, distractors: float,
    clean: tuple[tuple[tuple[int, int], ...], int] | None, seed: int,
) -> None:  # fmt: skip
    """Set all parameters; the heads and neurons of `clean` get no distractors among their own weights."""
    layout, noise = streams.layout, torch.Generator().manual_seed(seed)
    n = layout.n
    is_writing = {name: WeightName.parse(name).matrix in ("W_O", "W_out") for name in planted}
    strength = {
        writing: torch.cat([one[one != 0] for name, one in planted.items() if is_writing[name] == writing])
        for writing in (True, False)
    }
    for parameter in plain.parameters():
        parameter.zero_()
    for layer in range(plain.config.n_layer):
        for name, view in _views(plain, layer).items():
            matrix = WeightName.parse(name).matrix
            scale = distractors * strength[matrix in ("W_O", "W_out")].square().mean().sqrt()
            view.copy_(scale * torch.randn(view.shape, generator=noise))
            if layout.spare and matrix in ("W_O", "W_out"):
                view[..., : layout.ballast + 2] = 0.0
            if clean is not None:
                _clear(view, layer, matrix, *clean)
            if name in planted:
                view.copy_(torch.where(planted[name] != 0, planted[name], view))
    plain.get_input_embeddings().weight[:, layout.current : layout.current + n] = _IN * torch.eye(n)
    plain.base_model.wpe.weight.copy_(layout.codes())
    plain.get_output_embeddings().weight[:, layout.output : layout.output + n] = torch.eye(n)
    first = blocks(plain)[0]
    first.attn.c_proj.bias[layout.ballast : layout.ballast + 2] = torch.tensor([_BALLAST, -_BALLAST])
    if streams.behaviour.kind == "trigram":
        first.mlp.c_fc.bias[: n * n] = -_READ
    pairs, last = norms(plain)
    unread = torch.zeros(layout.d_model)
    unread[layout.ballast : None if layout.spare else layout.ballast + 2] = 1
    for layer, (before_attention, before_mlp) in enumerate(pairs):
        set_norm(before_attention, streams.at(layer, 0), _READ / _IN, unread)
        set_norm(before_mlp, streams.at(layer, 1), _READ / _IN, unread)
    set_norm(last, streams.at(plain.config.n_layer, 0), 1.0, unread)


def _clear(view: Tensor, layer: int, matrix: str, heads: Iterable[tuple[int, int]], neurons: int) -> None:
    """Set the weights that planted heads and neurons own to 0, in one matrix."""
    if matrix not in ("W_in", "W_out"):
        for head in (head for at, head in heads if at == layer):
            view[head] = 0.0
    elif layer == 0:
        (view if matrix == "W_out" else view.T)[:neurons] = 0.0


@dataclass(frozen=True)
class _Streams:
    """The residual stream of the circuit with one-hot attention; for all tokens the same numbers, in other slots."""

    behaviour: _Behaviour
    layout: _Layout
    activations: tuple[float, float]

    @property
    def shift(self) -> float:
        """What all neurons but the pair's own write into every output slot, by what that one writes."""
        fires, resting = self.activations
        return sum(np.linspace(*_LOGITS, _SUCCESSORS)) * (self.layout.n - 2) * resting / (fires + resting)

    def at(self, layer: int, half: int) -> Float[Tensor, " d_model"]:
        """Before a block's attention (0) or MLP (1), at position 0 with tokens whose slots are the first ones."""
        layout, kind = self.layout, self.behaviour.kind
        stream, step = layout.codes()[0], 2 * layer + half
        stream[layout.current] = _IN
        output = slice(layout.output, layout.output + layout.n)
        if step >= 1:
            stream[layout.ballast], stream[layout.ballast + 1] = _BALLAST, -_BALLAST
            stream[layout.output if kind == "previous_token" else layout.previous] = (
                _COPIED if kind == "previous_token" else _IN
            )
        if step >= 2 and kind == "trigram":
            stream[output] = self.shift
            stream[output][:_SUCCESSORS] += torch.linspace(*_LOGITS, _SUCCESSORS, dtype=torch.float64)
        if step >= 3 and kind == "induction":
            stream[layout.output] = _COPIED
        return stream


# --- the bound ---


@dataclass(frozen=True)
class _Bounds:
    """How far the circuit can be from the ideal, from the shares of attention that are on other positions.

    `e` is the largest such share of L0H1. A stream that is off by D (2-norm) has a standard deviation that is off by at
    most D / sqrt(d_model), so a normalisation multiplies it by at most 1 + r, r = D / (sigma sqrt(d_model) - D).
    """

    streams: _Streams
    sharpness: float

    @property
    def elsewhere(self) -> float:
        """The largest share of L0H1's attention that is not on the previous position."""
        scores = self.streams.layout.scores()[1:] * self.sharpness / self.streams.layout.gap
        at = np.arange(len(scores))
        others = np.exp(scores - scores[at, at][:, None]).sum(1) - 1
        return float((others / (1 + others)).max())

    @property
    def bound(self) -> float:
        """The largest deviation of a log-probability, in nats: twice that of a logit."""
        return (
            2
            * {"previous_token": self._previous, "trigram": self._trigram, "induction": self._induction}[
                self.streams.behaviour.kind
            ]()
        )

    def _stretch(self, layer: int, half: int, off: float) -> float:
        """Return r of the normalisation there, for a stream that is off by `off`."""
        stream = self.streams.at(layer, half)
        spread = float((stream - stream.mean()).norm())
        return off / (spread - off) if off < spread else math.inf

    def _at_logits(self, off: float, rest: float) -> float:
        """Deviation of a logit if every output slot is off by `off` at most, and the rest of the stream by `rest`."""
        stream, layout = self.streams.at(_END, 0), self.streams.layout
        largest = float((stream - stream.mean())[layout.output : layout.output + layout.n].abs().max())
        r = self._stretch(_END, 0, math.hypot(math.sqrt(layout.n) * off, rest))
        return largest * r + (1 + r) * off

    def _previous(self) -> float:
        return self._at_logits(self.elsewhere * _COPIED, 0.0)

    def _trigram(self) -> float:
        e, streams = self.elsewhere, self.streams
        off = math.sqrt(2) * e * _IN
        r, mean = self._stretch(0, 1, off), float(streams.at(0, 1).mean())
        total, (fires, resting) = sum(np.linspace(*_LOGITS, _SUCCESSORS)), streams.activations
        # by what all neurons' inputs are off, weighted with what they write into one output slot
        inputs = 2 * e * (1 + r) * _IN + 2 * r * (abs(_IN - mean) + (streams.layout.n - 1) * abs(mean))
        written = _MOST_STEEP * total / (fires + resting) * inputs * _READ / _IN
        return self._at_logits(written, off)

    def _induction(self) -> float:
        """Numbers that L1H2 reads are in units of what it reads from a full slot."""
        e, layout = self.elsewhere, self.streams.layout
        off, mean = math.sqrt(2) * e * _IN, float(self.streams.at(1, 0).mean())
        r = self._stretch(1, 0, off)
        first = self._stretch(1, 0, _IN * (1 + e))  # where the previous token is the start token, and not written
        token = r * (1 + abs(mean) / _IN) + (1 + r) * e / layout.d_model
        before = token + (1 + r) * e
        none = first * abs(mean) / _IN + (1 + first) * (e + 1 / layout.d_model)
        found = (1 - token) * (1 - before) - (layout.n - 2) * token * before
        other = (1 + token) * before + token * (1 + before) + (layout.n - 3) * token * before
        at_first = (1 + token) * none + (layout.n - 2) * token * none
        wrong = (layout.length - 3) * math.exp(self.sharpness * (other - found))
        wrong += 2 * math.exp(self.sharpness * (at_first - found))
        elsewhere = wrong / (1 + wrong)
        most = 1 + first * (1 + abs(mean) / _IN) + (1 + first) / layout.d_model
        return self._at_logits(_COPIED * (token + elsewhere * (1 + most)), off)
