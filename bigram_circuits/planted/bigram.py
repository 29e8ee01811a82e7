"""Models in which a known set of weights computes a known bigram distribution, to test whether a method finds them.

The residual stream is divided into slots, and the circuit moves one number from slot to slot:

- The embedding of token j writes E into slot j, and nothing else.
- Neuron j of the first MLP reads slot j. It fires for token j alone.
- With one layer, it writes the logits of token j's successors into the output slots, which the unembedding reads.
  With two layers, it writes a number into slot j of a second row of slots. Neuron j of the second MLP reads that and
  writes the logits.

Every token has the same number of successors, with the same logits in a different order; all other tokens have logit 0.
So the residual stream has the same mean and norm whatever the token, and every normalisation layer divides by a
constant that its own weight (always kept, like embeddings and biases) undoes. An activation function that is 0 at 0
keeps the other neurons at exactly 0. What the circuit alone computes is therefore known in closed form:

    P(v | j) = exp(logit of v after j) / sum over v' of exp(logit of v' after j)

In a closed model the distractors lead nowhere: they write only into spare coordinates, whose weight in every
normalisation layer is 0, and planted neurons have no weights but their own. Two more such coordinates hold a number
that is large beside all others, and its negative, so that every normalisation divides by nearly the same. The full
model then computes the same as the circuit, whatever part of the distractors is taken away, up to the mean that a
LayerNorm subtracts, which moves a little.

For each i, the i-th successors of all tokens are a permutation of the vocabulary, so the stationary distribution is
uniform. All other attention and MLP weights are distractors: Gaussian noise.

With two layers and strong distractors there would be other paths from a token to its second neuron: past the first MLP,
or through neurons that are not planted. Distractors on these paths are negative, so that the paths lead nowhere.

A circuit need not be unique: with `unique=False` every planted neuron has a twin, which reads and writes the same. For
each token and in each MLP that the circuit uses, one of the two must be kept, whichever it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from bigram_circuits.models.identity import weight_hash
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import usual_torch
from bigram_circuits.models.weights import weight_sites
from bigram_circuits.names import WeightName
from bigram_circuits.planted.building import N_HEADS, WRITING, blocks, check, hooked, norms, plain_model, set_norm
from bigram_circuits.subnetwork import Subnetwork, SubnetworkLike, as_subnetwork
from bigram_circuits.text.corpus import Corpus
from bigram_circuits.text.ngrams import NGramTable

ARCHITECTURES = ("gpt2", "neox", "llama")
"""In turn: learned positions and LayerNorm; rotary positions, LayerNorm and parallel blocks; RMSNorm and gated MLPs."""

_EMBEDDED, _CODE, _READ = 3.0, 3.0, 2.0  # value in a token's slot, in its second slot, and as a neuron reads either
_LOGITS = (2.5, 4.5)  # of the least and the most likely successor
_BALLAST = 1000.0  # in closed models: in the last slot but one of every token, and its negative in the last
_SPARE = 4  # slots at least that distractors of closed models write into
_TRAIN, _HELD_OUT, _LENGTH = 256, 64, 32  # training and held-out sequences, tokens per sequence


@dataclass(frozen=True)
class Planted:
    """A model with a planted circuit, and the ground truth about it.

    Example:
        >>> planted = bc.plant_bigram(d_vocab=8, successors=2)
        >>> planted.recovery(planted.circuit)  # precision and recall
        (1.0, 1.0)
    """

    model: Model
    """The hooked model, from `load_model`."""
    circuit: Subnetwork
    """The planted weights; of twins those of the first."""
    target: NGramTable
    """The bigram distribution that the circuit computes."""
    corpus: Corpus
    """Text sampled from that distribution."""
    probs: Float[Tensor, "d_vocab d_vocab"] = field(repr=False)
    """The same distribution, P(next | current), float64."""
    solutions: tuple[Subnetwork, ...] = field(repr=False)
    """The circuit and, if it is not unique, that of the twins, which shares no weight with it. Each computes the
    distribution alone, and so do their mixtures (`is_solution`)."""

    def is_solution(self, found: SubnetworkLike) -> bool:
        """Whether a mask is the circuit, or a mixture that has one of each neuron and its twin, whole, and no more."""
        found = as_subnetwork(found)
        whole: dict[int, Tensor] = {}  # for every solution and token, whether its neuron is kept whole
        for name in (name for name, mask in self.circuit.items() if mask.any()):
            kept = _rows(name, found[name])
            rows = [_rows(name, one[name]) for one in self.solutions]
            here = torch.stack([(kept | ~row).all(1)[row.any(1)] for row in rows])
            layer = WeightName.parse(name).layer
            whole[layer] = whole.get(layer, torch.ones_like(here)) & here
        return found.kept == self.circuit.kept and all(bool((one.sum(0) == 1).all()) for one in whole.values())

    def recovery(self, found: SubnetworkLike) -> tuple[float, float]:
        """Return (precision, recall): the share of `found` that is planted, and the share of planted weights found.

        Precision is nan if `found` is empty.
        """
        found = as_subnetwork(found)
        both = (found & self.circuit).kept
        return both / found.kept if found.kept else math.nan, both / self.circuit.kept


@usual_torch()
def plant_bigram(
    architecture: str = "gpt2",
    *,
    d_vocab: int = 24,
    successors: int = 4,
    d_model: int | None = None,
    d_mlp: int | None = None,
    n_layers: int = 2,
    layers: int = 1,
    distractors: float | int = 0.1,
    unique: bool = True,
    closed: bool = False,
    logits: tuple[float | int, float | int] = _LOGITS,
    seed: int = 0,
    folder: str | Path | None = None,
) -> Planted:
    """Build a model whose planted weights compute a known bigram distribution; all other weights are distractors.

    Args:
        architecture: `gpt2` (LayerNorm, learned positions), `neox` (LayerNorm, rotary positions, parallel blocks) or
            `llama` (RMSNorm, gated MLP). Activation functions are the architecture's own.
        d_vocab: Size of the vocabulary.
        successors: Number of likely next tokens of each token, which is also the number of planted output weights of
            each neuron that writes logits.
        d_model: Width of the residual stream, at least `(layers + 1) * d_vocab`, and 6 more in a closed model; by
            default the least that fits.
        d_mlp: Number of neurons in an MLP, at least `d_vocab` (twice that if not `unique`); by default twice that (four
            times if not `unique`).
        n_layers: Number of blocks.
        layers: Number of MLPs that the circuit uses: 1 (the first) or 2 (the first two).
        distractors: Standard deviation of the other weights, relative to the root mean square of the planted weights
            that read (for W_Q, W_K, W_V, W_in, W_gate) or write (for W_O, W_out). 0: none; 1: as strong.
        unique: False plants every neuron twice, so that one of the two can be left out: `Planted.solutions`.
        closed: Whether all distractors lead nowhere, so that the full model computes the same as the circuit, and so
            does every model between them. With LayerNorm it does so nearly, the closer the smaller the distractors.
        logits: Those of the least and of the most likely successor; a single successor has the former.
        seed: Seed of the bigram distribution, the distractors and the text.
        folder: Hugging Face folder to save the model in; a temporary one by default.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> planted = bc.plant_bigram(d_vocab=8, successors=2)
        >>> found = bc.find_subnetwork(planted.model, planted.target, planted.corpus, config)
        >>> precision, recall = planted.recovery(found)
    """
    copies, least = 1 if unique else 2, _least_width(d_vocab, layers, closed)
    width, d_mlp = d_model or least, d_mlp or 2 * copies * d_vocab
    _check(architecture, d_vocab, successors, width, least, d_mlp, n_layers, layers, distractors, copies, logits)
    rng = np.random.default_rng(seed)
    rows = _successor_logits(rng, d_vocab, successors, logits)
    probs = rows.softmax(-1)
    plain = plain_model(architecture, d_vocab, width, d_mlp, n_layers, 2 * _LENGTH)
    planted = _planted_weights(plain, rows, width, d_mlp, layers, copies)
    _write_weights(plain, planted, rows, layers, float(distractors), copies, closed, seed)
    model = hooked(plain, d_vocab, f"planted {architecture}", folder)
    solutions = tuple(_solution(model, planted, slice(copy * d_vocab, (copy + 1) * d_vocab)) for copy in range(copies))
    tokens = _sample(rng, probs.numpy(), _TRAIN + _HELD_OUT, _LENGTH)
    corpus = Corpus.from_tokens(tokens[:_TRAIN], tokens[_TRAIN:], source=f"a planted bigram, seed {seed}")
    return Planted(model, solutions[0], NGramTable.from_probs(probs), corpus, probs, solutions)


def _least_width(d_vocab: int, layers: int, closed: bool) -> int:
    """Return the smallest width that has room for all slots and divides into heads of even width."""
    slots = (layers + 1) * d_vocab + (_SPARE + 2 if closed else 0)
    return -(-slots // (2 * N_HEADS)) * 2 * N_HEADS


def _check(
    architecture: str, d_vocab: int, successors: int, d_model: int, least: int, d_mlp: int, n_layers: int, layers: int,
    distractors: float | int, copies: int, logits: tuple[float | int, float | int],
) -> None:  # fmt: skip
    wanted: dict[str, tuple[Any, bool, str]] = {
        "architecture": (architecture, architecture in ARCHITECTURES, f"one of {', '.join(ARCHITECTURES)}"),
        "d_vocab": (d_vocab, d_vocab >= 4, "at least 4"),
        "successors": (successors, 1 <= successors < d_vocab, f"from 1 to {d_vocab - 1}, below d_vocab"),
        "layers": (layers, layers in (1, 2), "1 or 2"),
        "n_layers": (n_layers, n_layers >= layers, f"at least {layers}"),
        "d_model": (
            d_model,
            d_model >= least and d_model % (2 * N_HEADS) == 0,
            f"a multiple of {2 * N_HEADS}, at least {least}",
        ),
        "d_mlp": (d_mlp, d_mlp >= copies * d_vocab, f"at least the number of planted neurons, {copies * d_vocab}"),
        "distractors": (distractors, 0 <= distractors < math.inf, "a number of at least 0"),
        "logits": (logits, 0 < logits[0] <= logits[1] < math.inf, "two numbers above 0, the smaller first"),
    }
    check(wanted)


def _successor_logits(
    rng: np.random.Generator, n: int, successors: int, ends: tuple[float | int, float | int]
) -> Float[Tensor, "current next"]:
    """Draw the logits after every token, such that the i-th successors of all tokens are a permutation."""
    current, following = rng.permutation(n), rng.permutation(n)
    logits = torch.zeros(n, n, dtype=torch.float64)
    for place, value in enumerate(np.linspace(*ends, successors)):
        logits[current, following[(np.arange(n) + place) % n]] = float(value)
    return logits


# --- the weights ---


def _rows(name: str, mask: Bool[Tensor, "..."]) -> Bool[Tensor, "neuron other"]:
    """Return the mask of an MLP's matrix with a row for every neuron."""
    return mask if WeightName.parse(name).matrix == "W_out" else mask.T


def _solution(model: Model, planted: Mapping[str, Tensor], neurons: slice) -> Subnetwork:
    """Return the planted weights of some neurons."""
    masks = {site.name: torch.zeros(site.shape, dtype=torch.bool) for site in weight_sites(model)}
    for name, weight in planted.items():
        _rows(name, masks[name])[neurons] = _rows(name, weight != 0)[neurons]
    return Subnetwork(masks, model_name=model.cfg.model_name, weight_hash=weight_hash(model), lineage="planted")


def _mlp_weights(plain: Any, layer: int) -> dict[str, Tensor]:
    """Return an MLP's weights by canonical name and in canonical axes, as views of the Hugging Face parameters."""
    block = blocks(plain)[layer].mlp
    kind = plain.config.model_type
    if kind == "gpt2":
        return {"W_in": block.c_fc.weight, "W_out": block.c_proj.weight}
    if kind == "gpt_neox":
        return {"W_in": block.dense_h_to_4h.weight.T, "W_out": block.dense_4h_to_h.weight.T}
    return {"W_in": block.up_proj.weight.T, "W_gate": block.gate_proj.weight.T, "W_out": block.down_proj.weight.T}


def _fires(plain: Any) -> float:
    """Return the activation of a neuron that reads `_READ` through a weight of 1."""
    from transformers.activations import ACT2FN

    config = plain.config
    name = config.activation_function if config.model_type == "gpt2" else config.hidden_act
    active = ACT2FN[name](torch.tensor(_READ, dtype=torch.float64)).item()
    return active * _READ if config.model_type == "llama" else active


def _planted_weights(
    plain: Any, logits: Float[Tensor, "current next"], d_model: int, d_mlp: int, layers: int, copies: int
) -> dict[str, Tensor]:
    """Build the planted weights by canonical name, those of all copies: 0 where none is planted."""
    n, fires = len(logits), _fires(plain)
    neurons, tokens = torch.arange(copies * n), torch.arange(n).repeat(copies)
    planted: dict[str, Tensor] = {}
    for layer in range(layers):
        reads = torch.zeros(d_model, d_mlp)
        reads[layer * n + tokens, neurons] = 1.0
        writes = torch.zeros(d_mlp, d_model)
        if layer == layers - 1:
            writes[: copies * n, layers * n : (layers + 1) * n] = (logits / fires).float().repeat(copies, 1)
        else:
            writes[neurons, n + tokens] = _CODE / fires
        for name in _mlp_weights(plain, layer):
            planted[str(WeightName(layer, "mlp", name))] = writes if name == "W_out" else reads
    return planted


@torch.no_grad()
def _write_weights(
    plain: Any, planted: Mapping[str, Tensor], logits: Float[Tensor, "current next"], layers: int,
    distractors: float, copies: int, closed: bool, seed: int,
) -> None:  # fmt: skip
    """Set all parameters: distractors, the circuit, the embeddings, and norms whose weights undo their division."""
    n, d_model = len(logits), plain.config.hidden_size
    writing = torch.cat(
        [weight[weight != 0] for name, weight in planted.items() if WeightName.parse(name).matrix == "W_out"]
    )
    strength = {True: distractors * writing.square().mean().sqrt().item(), False: distractors}
    noise = torch.Generator().manual_seed(seed)
    for name, parameter in plain.named_parameters():
        if parameter.ndim < 2 or "wpe" in name:
            parameter.zero_()
        else:
            parameter.copy_(strength[name.endswith(WRITING)] * torch.randn(parameter.shape, generator=noise))
            if closed and name.endswith(WRITING):
                written = parameter.T if plain.config.model_type == "gpt2" else parameter
                written[: (layers + 1) * n] = written[-2:] = 0.0
    for layer in range(layers):
        for name, weight in _mlp_weights(plain, layer).items():
            _close_detours(name, weight, layer, n, layers, copies)
            if closed:
                (weight if name == "W_out" else weight.T)[: copies * n] = 0.0
            circuit = planted[str(WeightName(layer, "mlp", name))]
            weight.copy_(torch.where(circuit != 0, circuit, weight))
    unread = torch.zeros(d_model, dtype=torch.float64)
    if closed:
        unread[(layers + 1) * n :] = 1.0
    _write_embeddings(plain, n, layers * n, closed)
    _write_norms(plain, _streams(plain, logits, d_model, layers, closed), unread)


def _close_detours(name: str, weight: Tensor, layer: int, n: int, layers: int, copies: int) -> None:
    """With two layers, make the distractors negative that would lead from a token to its second neuron on another path.

    These are the second neurons' weights from the embedding, and other neurons' weights into the second row of slots.
    """
    if layers == 1:
        return
    if layer == 0 and name == "W_out":
        part = weight[copies * n :, n : 2 * n]
        part.copy_(-part.abs())
    elif layer == 1 and name != "W_out":
        part = weight[:n, : copies * n]
        part.copy_(-part.abs())


def _write_embeddings(plain: Any, n: int, output: int, closed: bool) -> None:
    embedding, unembedding = plain.get_input_embeddings().weight, plain.get_output_embeddings().weight
    embedding.zero_()
    embedding[:, :n] = _EMBEDDED * torch.eye(n)
    if closed:
        embedding[:, -2:] = torch.tensor([_BALLAST, -_BALLAST])
    unembedding.zero_()
    unembedding[:, output : output + n] = torch.eye(n)


def _streams(
    plain: Any, logits: Float[Tensor, "current next"], d_model: int, layers: int, closed: bool
) -> list[tuple[Float[Tensor, " d_model"], float]]:
    """Compute the circuit's residual stream at the input of each block and of the final norm, for token 0.

    Each comes with the factor by which the norm should scale it. Other tokens give the same values in other slots.
    """
    n = len(logits)
    stream = torch.zeros(d_model, dtype=torch.float64)
    stream[0] = _EMBEDDED
    if closed:
        stream[-2:] = torch.tensor([_BALLAST, -_BALLAST])
    streams = [(stream, _READ / _EMBEDDED)]
    for layer in range(plain.config.num_hidden_layers):
        stream = stream.clone()
        if layer < layers - 1:
            stream[n] = _CODE
        elif layer == layers - 1:
            stream[layers * n : (layers + 1) * n] = logits[0]
        streams.append((stream, _READ / _CODE))
    return [*streams[:-1], (stream, 1.0)]


def _write_norms(
    plain: Any, streams: list[tuple[Float[Tensor, " d_model"], float]], unread: Float[Tensor, " d_model"]
) -> None:
    """Set every norm's weight (and bias, if any) such that it multiplies the circuit's stream by the given factor.

    Coordinates where `unread` is not 0 come out as 0.
    """
    pairs, last = norms(plain)
    for those, (stream, factor) in zip([*pairs, (last,)], streams, strict=True):
        for norm in those:
            set_norm(norm, stream, factor, unread)


# --- the text ---


def _sample(
    rng: np.random.Generator, probs: Float[np.ndarray, "current next"], sequences: int, length: int
) -> Integer[np.ndarray, "sequence position"]:
    """Sample sequences from the Markov chain, starting from its stationary distribution, which is uniform."""
    upto = probs.cumsum(1)
    upto[:, -1] = 1.0
    tokens = np.zeros((sequences, length), dtype=np.int64)
    tokens[:, 0] = rng.integers(0, len(probs), sequences)
    for place in range(1, length):
        tokens[:, place] = (upto[tokens[:, place - 1]] < rng.random(sequences)[:, None]).sum(1)
    return tokens
