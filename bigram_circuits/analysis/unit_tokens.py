"""What neurons and heads do whatever the prompt: the tokens that drive them, and those that they promote or suppress.

- A neuron is *driven* by a token as far as its preactivation rises with the token's embedding alone, through the norm
  that it reads through (at the embedding's own scale) and its masked input weights; with a gate, the gate's
  preactivation. A head, as far as it writes anything when it attends to the token: the length of what it writes. Of a
  large vocabulary, the first 8,192 tokens are tried for heads: in most, those are the most frequent.
- What it *promotes* and *suppresses* are the logits that its output direction raises and lowers most, through the final
  norm (at the scale of the prompt) and the unembedding, less their mean: for one unit of a neuron's activation; for a
  head, when it attends to an average token.

These are the direct effects. What reaches a neuron through other neurons, and what later layers make of its output, is
in the paths of an explanation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from bigram_circuits.analysis.prompts import token_words
from bigram_circuits.explanations.explanation import UnitTokens
from bigram_circuits.models.activations import rows_at_once
from bigram_circuits.models.linearised import Heads, Linearised, Neurons, Reading, Vector
from bigram_circuits.models.model import Model
from bigram_circuits.models.norms import FrozenNorm
from bigram_circuits.names import PartName

_TOP = 6
_TOKENS_OF_HEADS = 1 << 13


def unit_tokens(
    model: Model, passed: Linearised, labels: Iterable[str], position: int = -1, top: int = _TOP
) -> dict[str, UnitTokens]:
    """The tokens of neurons and heads of a model that was taken apart, by their labels."""
    by_part: dict[tuple[str, int], list[int]] = {}
    for label in dict.fromkeys(labels):
        name = PartName.parse(label)
        assert name is not None, "labels of neurons and heads"
        by_part.setdefault((name.kind.removesuffix("s"), name.layer), []).extend(name.indices)
    embedded = _Embedded(model, passed)
    last = position % len(passed.logits)
    final = passed.final.rows(slice(last, last + 1))
    found: dict[str, UnitTokens] = {}
    for writer in passed.writers:
        if isinstance(writer, Vector) or not (units := by_part.get((writer.kind, writer.layer))):
            continue
        for part in _chunks(units, rows_at_once(model.cfg.d_vocab)):
            of = _of_neurons if isinstance(writer, Neurons) else _of_heads
            drives, out = of(writer, part, embedded)  # type: ignore[arg-type]
            logits = final.of(out) @ passed.W_U
            logits = logits - logits.mean(-1, keepdim=True)
            for row, unit in enumerate(part):
                found[writer.label(unit)] = UnitTokens(
                    () if drives is None else _top(model, drives[:, row], top),
                    _top(model, logits[row], top),
                    tuple((word, -value) for word, value in _top(model, -logits[row], top)),
                )
    return found


class _Embedded:
    """The embeddings of all tokens, as parts of a model read them."""

    def __init__(self, model: Model, passed: Linearised) -> None:
        W_E = model.W_E.detach()
        self.W_E = W_E.float() if W_E.shape[1] == passed.W_U.shape[0] else None
        self._scales: dict[tuple[bool, float], Tensor] = {}

    def read(
        self, reading: Reading | None, weight: Float[Tensor, "d_model unit"], most: int | None = None
    ) -> Float[Tensor, "token unit"] | None:
        """What input weights make of each of the first tokens, through the norm at the embedding's own scale.

        None if embeddings are not as wide as the residual stream, or the part cannot be traced.
        """
        if reading is None or self.W_E is None:
            return None
        norm, rows = reading.norm, self.W_E[:most]
        if norm.scale is None:
            return rows @ weight
        constant = 0.0 if norm.bias is None else norm.bias @ weight
        weight = weight if norm.weight is None else weight * norm.weight[:, None]
        weight = weight - weight.mean(0) if norm.centred else weight
        return rows @ weight / self._scale(norm)[:most] + constant

    def _scale(self, norm: FrozenNorm) -> Float[Tensor, "token one"]:
        key = (norm.centred, norm.eps)
        if key not in self._scales:
            assert self.W_E is not None, "asked for by read"
            squares = self.W_E.norm(dim=1, keepdim=True) ** 2 / self.W_E.shape[1]
            squares = squares - self.W_E.mean(1, keepdim=True) ** 2 if norm.centred else squares
            self._scales[key] = (squares + norm.eps).sqrt()
        return self._scales[key]


def _chunks(units: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(units), size):
        yield units[start : start + size]


def _of_neurons(
    writer: Neurons, units: list[int], embedded: _Embedded
) -> tuple[Float[Tensor, "token unit"] | None, Float[Tensor, "unit d_model"]]:
    """How far each token drives each of some neurons, and what each writes for one unit of activation."""
    drives = embedded.read(writer.reading, writer.inputs[-1][0][:, units]) if writer.inputs else None
    return drives, _average(writer.post).of(writer.W_out[units])


def _of_heads(
    writer: Heads, units: list[int], embedded: _Embedded
) -> tuple[Float[Tensor, "token unit"] | None, Float[Tensor, "unit d_model"]]:
    """The length of what each of some heads writes when it attends to each token, and the mean of what it writes."""
    W_O = _average(writer.post).of(writer.W_O[units])
    lengths, means = [], []
    for W_V, its_W_O in zip(writer.W_V[units], W_O, strict=True):
        z = embedded.read(writer.reading, W_V, _TOKENS_OF_HEADS)
        if z is None:
            return None, torch.einsum("hd,hdm->hm", writer.z.mean(0)[units], W_O)
        lengths.append(((z @ (its_W_O @ its_W_O.T)) * z).sum(-1).clamp(min=0).sqrt())
        means.append(z.mean(0) @ its_W_O)
    return torch.stack(lengths, 1), torch.stack(means)


def _average(norm: FrozenNorm) -> FrozenNorm:
    """A norm at the mean of its scales."""
    return norm if norm.scale is None else replace(norm, scale=norm.scale.mean(0))


def _top(model: Model, values: Float[Tensor, " token"], count: int) -> tuple[tuple[str, float], ...]:
    top = values.topk(min(count, len(values)))
    return tuple(zip(token_words(model, top.indices.tolist()), top.values.tolist(), strict=True))
