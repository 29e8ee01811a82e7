"""What neurons and heads do whatever the prompt: the tokens that drive them, and those that they promote or suppress.

- A neuron is *driven* by a token as far as its preactivation rises with the token's embedding alone, through the norm
  that it reads through (at the embedding's own scale) and its masked input weights; with a gate, the gate's
  preactivation. A head, as far as it writes anything when it attends to the token: the length of what it writes.
- What it *promotes* and *suppresses* are the logits that its output direction raises and lowers most, through the final
  norm (at the scale of the prompt) and the unembedding, less their mean: for one unit of a neuron's activation; for a
  head, when it attends to an average token.

These are the direct effects. What reaches a neuron through other neurons, and what later layers make of its output, is
in the paths of an explanation.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from bigram_circuits.analysis.prompts import token_words
from bigram_circuits.explanations.explanation import UnitTokens
from bigram_circuits.models.linearised import Heads, Linearised, Neurons, Vector
from bigram_circuits.models.model import Model
from bigram_circuits.models.norms import FrozenNorm
from bigram_circuits.names import PartName

_TOP = 6
_CLOSE = 1e-3


def unit_tokens(
    model: Model, passed: Linearised, labels: Iterable[str], position: int = -1, top: int = _TOP
) -> dict[str, UnitTokens]:
    """The tokens of neurons and heads of a model that was taken apart, by their labels."""
    by_part: dict[tuple[str, int], list[int]] = {}
    for label in dict.fromkeys(labels):
        name = PartName.parse(label)
        assert name is not None, "labels of neurons and heads"
        by_part.setdefault((name.kind.removesuffix("s"), name.layer), []).extend(name.indices)
    embeddings = _embeddings(model, passed)
    last = position % len(passed.logits)
    final = passed.final.rows(slice(last, last + 1))
    found: dict[str, UnitTokens] = {}
    for writer in passed.writers:
        if isinstance(writer, Vector) or not (units := by_part.get((writer.kind, writer.layer))):
            continue
        read = None
        if writer.reading is not None and embeddings is not None:
            read = writer.reading.norm.at(embeddings).of(embeddings) + _bias(writer.reading.norm)
        drives, out = (_of_neurons if isinstance(writer, Neurons) else _of_heads)(writer, units, read)  # type: ignore[arg-type]
        logits = final.of(out) @ passed.W_U
        logits = logits - logits.mean(-1, keepdim=True)
        for row, unit in enumerate(units):
            found[writer.label(unit)] = UnitTokens(
                () if drives is None else _top(model, drives[:, row], top),
                _top(model, logits[row], top),
                tuple((word, -value) for word, value in _top(model, -logits[row], top)),
            )
    return found


def _of_neurons(
    writer: Neurons, units: list[int], read: Float[Tensor, "token d_model"] | None
) -> tuple[Float[Tensor, "token unit"] | None, Float[Tensor, "unit d_model"]]:
    """How far each token drives each of some neurons, and what each writes for one unit of activation."""
    post = _average(writer.post)
    drives = None if read is None else read @ writer.inputs[-1][0][:, units]
    return drives, post.of(writer.W_out[units])


def _of_heads(
    writer: Heads, units: list[int], read: Float[Tensor, "token d_model"] | None
) -> tuple[Float[Tensor, "token unit"] | None, Float[Tensor, "unit d_model"]]:
    """The length of what each of some heads writes when it attends to each token, and the mean of what it writes."""
    post = _average(writer.post)
    if read is None:
        mean = writer.z.mean(0)
        return None, torch.stack([post.of((mean[unit] @ writer.W_O[unit])[None])[0] for unit in units])
    lengths, means = [], []
    for unit in units:
        wrote = post.of(read @ (writer.W_V[unit] @ writer.W_O[unit]))
        lengths.append(wrote.norm(dim=-1))
        means.append(wrote.mean(0))
    return torch.stack(lengths, 1), torch.stack(means)


def _average(norm: FrozenNorm) -> FrozenNorm:
    """A norm at the mean of its scales."""
    return norm if norm.scale is None else FrozenNorm(norm.weight, norm.bias, norm.centred, norm.scale.mean(0))


def _bias(norm: FrozenNorm) -> Tensor | float:
    return 0.0 if norm.bias is None else norm.bias


def _embeddings(model: Model, passed: Linearised) -> Float[Tensor, "token d_model"] | None:
    """The embedding of every token as it enters the residual stream, up to a factor; None if it is not W_E."""
    token = passed.writers[0]
    W_E = model.W_E.detach().float()
    if not isinstance(token, Vector) or W_E.shape[1] != token.written.shape[1]:
        return None
    return W_E


def _top(model: Model, values: Float[Tensor, " token"], count: int) -> tuple[tuple[str, float], ...]:
    top = values.topk(min(count, len(values)))
    return tuple(zip(token_words(model, top.indices.tolist()), top.values.tolist(), strict=True))
