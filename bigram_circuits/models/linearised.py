"""A forward pass taken apart: what every head, neuron and bias writes on a prompt, and what each of them reads.

On one prompt, with attention patterns, the scales of norms and the slopes of activation functions frozen at the values
that they take there, a transformer is linear from its embeddings to its logits. So the dot product of any direction
with a residual stream is a sum over what was written to it before (`Linearised.written`), what a head or neuron wrote
can be traced to what it read (`Linearised.read`), and a whole logit to the inputs (`Linearised.flows`), each time
without a rest (Elhage et al. 2021; frozen slopes as in Bach et al. 2015 and Ali et al. 2022, arXiv 2202.07304).

| frozen | of | so that |
|---|---|---|
| pattern | an attention head | z is a sum over the positions that it attends to |
| scale | a norm | the norm of a sum is the sum of norms |
| slope a / x | a neuron with preactivation x, activation a | a is proportional to x |
| both slopes, half of a each | a neuron with a gate, a = f(gate) x | each factor gets half of a (Arras et al. 2019) |

Nothing here knows an architecture. Which norm a part reads through, whether attention and MLP are parallel, and whether
what is written really adds up are measured on the prompt. A part that does not add up stays whole: it is in the sum,
but cannot be traced further. In 16 bits, what rounding takes away is a writer too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from bigram_circuits.models.activations import NotShownError, check_has_readout, check_predicts_tokens, readout
from bigram_circuits.models.interventions import hook_point
from bigram_circuits.models.model import Model
from bigram_circuits.models.norms import IDENTITY, FrozenNorm, frozen_norm
from bigram_circuits.models.weights import WeightSite, weight_sites
from bigram_circuits.names import PartName, head_label, in_block, neuron_label

_TOLERANCE = 1e-4  # of the largest number compared, in float32 ...
_TOLERANCE_16_BITS = 0.05  # ... and in 16 bits
_TINY = 1e-7  # of an activation's size: smaller preactivations have no slope

Vectors = Float[Tensor, "pos d_model"]
Directions = Float[Tensor, "pos d_model"]
Rows = slice | Integer[Tensor, " row"]
ALL = slice(None)
"""Every position."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight as the forward pass sees it, with its bias; in float32."""

    weight: Float[Tensor, "..."]
    """In canonical axes."""
    bias: Float[Tensor, " d_out"] | None


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of a model as they are now, masked or not, by block and matrix; made once for many prompts."""

    by_layer: tuple[Mapping[str, Matrix], ...]
    """For each block: `W_V`, `W_O`, `W_in`, ..."""

    @classmethod
    def of(cls, model: Model) -> Weights:
        """Those of a model; within `masked`, the masked ones."""
        found: list[dict[str, Matrix]] = [{} for _ in range(model.cfg.n_layers)]
        for site in weight_sites(model):
            if site.matrix not in ("W_Q", "W_K"):
                found[site.layer][site.matrix] = _matrix(site)
        return cls(tuple(found))


def _matrix(site: WeightSite) -> Matrix:
    bias = getattr(site.leaf, "bias", None)
    weight = site.from_stored(site.leaf.weight).detach().float()  # type: ignore[arg-type,union-attr]
    return Matrix(weight, None if bias is None else bias.detach().float())


@dataclass(frozen=True, eq=False)
class Reading:
    """How a part reads the residual stream: through which norm, and what was written before."""

    norm: FrozenNorm
    limit: int
    """Number of writers whose sum it reads."""


@dataclass(frozen=True, eq=False)
class Vector:
    """A writer that is one vector at every position: an embedding, biases, or a part that stays whole."""

    kind: str
    """`token`, `position`, `bias`, `attn`, `mlp` or `replaced`."""
    layer: int
    label: str
    written: Vectors

    def on(self, directions: Directions, at: Rows = ALL) -> Float[Tensor, "row one"]:
        """Dot products of what is written at some positions with the directions there."""
        return (self.written[at] * directions[at]).sum(-1, keepdim=True)

    def total(self) -> Vectors:
        """All that is written."""
        return self.written


@dataclass(frozen=True, eq=False)
class Heads:
    """The heads of an attention."""

    layer: int
    z: Float[Tensor, "pos head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    post: FrozenNorm
    """The norm between the attention and the residual stream."""
    reading: Reading | None
    """How the values are read; None if the heads cannot be traced further."""
    W_V: Float[Tensor, "head d_model d_head"]
    """Of every query head."""
    pattern: Float[Tensor, "head pos pos"] | None
    kept: Bool[Tensor, " head"]
    """Whether a head computes; what stands for others is constant."""
    kind: str = "head"

    def on(self, directions: Directions, at: Rows = ALL) -> Float[Tensor, "row head"]:
        """Dot products of what each head writes at some positions with the directions there."""
        out = self.post.rows(at).pulled_back(directions[at])
        return torch.einsum("phd,hdm,pm->ph", self.z[at], self.W_O, out)

    def unit(self, head: int, position: int) -> Float[Tensor, " d_model"]:
        """What a head writes at a position."""
        at = slice(position, position + 1)
        return self.post.rows(at).of((self.z[position, head] @ self.W_O[head])[None])[0]

    def total(self) -> Vectors:
        """All that is written."""
        return self.post.of(torch.einsum("phd,hdm->pm", self.z, self.W_O))

    def traced(self, directions: Directions, head: int, position: int) -> Directions:
        """The directions, for every position that a head reads, along which it makes its dot product with one."""
        assert self.reading is not None, "cannot be traced"
        assert self.pattern is not None, "cannot be traced"
        out = self.post.rows(slice(position, position + 1)).pulled_back(directions[position : position + 1])[0]
        read = self.W_V[head] @ (self.W_O[head] @ out) * float(self.kept[head])
        return self.reading.norm.pulled_back(self.pattern[head, position, :, None] * read)

    def all_traced(self, directions: Directions) -> Directions:
        """The sum of `traced` over all heads and positions."""
        assert self.reading is not None, "cannot be traced"
        assert self.pattern is not None, "cannot be traced"
        out = torch.einsum("hdm,pm->phd", self.W_O, self.post.pulled_back(directions))
        read = torch.einsum("hqk,qhd,hmd,h->km", self.pattern, out, self.W_V, self.kept.to(out))
        return self.reading.norm.pulled_back(read)

    def label(self, index: int) -> str:
        """`L0H3`."""
        return head_label(self.layer, index)


@dataclass(frozen=True, eq=False)
class Neurons:
    """The neurons of an MLP."""

    layer: int
    activation: Float[Tensor, "pos d_mlp"]
    W_out: Float[Tensor, "d_mlp d_model"]
    post: FrozenNorm
    """The norm between the MLP and the residual stream."""
    reading: Reading | None
    """How the MLP's input is read; None if the neurons cannot be traced further."""
    inputs: tuple[tuple[Float[Tensor, "d_model d_mlp"], Float[Tensor, "pos d_mlp"]], ...]
    """W_in, and W_gate if there is one, each with the slopes from its preactivation to its share of `activation`."""
    kept: Bool[Tensor, " d_mlp"]
    """Whether a neuron computes; what stands for others is constant."""
    kind: str = "neuron"

    def on(self, directions: Directions, at: Rows = ALL) -> Float[Tensor, "row d_mlp"]:
        """Dot products of what each neuron writes at some positions with the directions there."""
        return self.activation[at] * (self.post.rows(at).pulled_back(directions[at]) @ self.W_out.T)

    def unit(self, neuron: int, position: int) -> Float[Tensor, " d_model"]:
        """What a neuron writes at a position."""
        at = slice(position, position + 1)
        return self.post.rows(at).of((self.activation[position, neuron] * self.W_out[neuron])[None])[0]

    def total(self) -> Vectors:
        """All that is written."""
        return self.post.of(self.activation @ self.W_out)

    def traced(self, directions: Directions, neuron: int, position: int) -> Directions:
        """The direction, at the position of a neuron (0 elsewhere), along which it makes its dot product with one."""
        assert self.reading is not None, "cannot be traced"
        at = slice(position, position + 1)
        out = float(self.post.rows(at).pulled_back(directions[at])[0] @ self.W_out[neuron])
        read = sum(weight[:, neuron] * (float(slope[position, neuron]) * out) for weight, slope in self.inputs)
        assert isinstance(read, Tensor), "every MLP has a W_in"
        found = torch.zeros_like(directions)
        found[at] = self.reading.norm.rows(at).pulled_back(read[None])
        return found

    def all_traced(self, directions: Directions) -> Directions:
        """The sum of `traced` over all neurons and positions."""
        assert self.reading is not None, "cannot be traced"
        out = self.post.pulled_back(directions) @ self.W_out.T
        read = sum((out * slope) @ weight.T for weight, slope in self.inputs)
        assert isinstance(read, Tensor), "every MLP has a W_in"
        return self.reading.norm.pulled_back(read)

    def label(self, index: int) -> str:
        """`L0N12`."""
        return neuron_label(self.layer, index)


Writer = Vector | Heads | Neurons


@dataclass(frozen=True, eq=False)
class Linearised:
    """A forward pass on one prompt, taken apart."""

    writers: tuple[Writer, ...]
    """All that is written to the residual stream, in order; the sum is the final residual stream."""
    final: FrozenNorm
    """The final norm, at every position."""
    W_U: Float[Tensor, "d_model d_vocab"]
    constant: Float[Tensor, " d_vocab"]
    """The logits of a residual stream of zeros: the final norm's bias through W_U, and b_U."""
    logits: Float[Tensor, "pos d_vocab"]
    """The logits of the unembedding, before any soft cap or scale."""
    shown: Float[Tensor, "pos d_vocab"]
    """The logits of the model."""
    layers: int
    """Number of blocks."""
    whole: tuple[str, ...] = field(default=())
    """Labels of the parts that cannot be traced further, though they are in every sum."""

    def direction(self, weights: Float[Tensor, " d_vocab"], position: int) -> Directions:
        """The directions before the final norm of a linear functional of the logits at one position."""
        found = torch.zeros(self.logits.shape[0], self.W_U.shape[0], device=self.W_U.device)
        at = slice(position, position + 1)
        found[at] = self.final.rows(at).pulled_back((self.W_U @ weights)[None])
        return found

    def written(
        self, directions: Directions, limit: int | None = None, at: Rows = ALL
    ) -> list[Float[Tensor, "row unit"]]:
        """Dot products of a direction for every position with what each of the first `limit` writers wrote there."""
        return [writer.on(directions, at) for writer in self.writers[:limit]]

    def flows(self, directions: Directions) -> tuple[list[Float[Tensor, "pos unit"]], list[Directions]]:
        """What goes through every unit along all paths to the directions at the end, and the directions that it meets.

        One backward pass. The second list has, for each writer, the sum of the directions that all later parts read
        along; its dot product with what a unit wrote is the unit's flow.
        """
        adds: dict[int, Directions] = {len(self.writers): directions}
        met = torch.zeros_like(directions)
        found, along = [], []
        for index in range(len(self.writers) - 1, -1, -1):
            if index + 1 in adds:
                met = met + adds.pop(index + 1)
            writer = self.writers[index]
            found.append(writer.on(met))
            along.append(met)
            if not isinstance(writer, Vector) and writer.reading is not None:
                limit = writer.reading.limit
                adds[limit] = adds.get(limit, torch.zeros_like(met)) + writer.all_traced(met)
        return found[::-1], along[::-1]


def linearise(
    model: Model,
    prompts: Iterable[Integer[Tensor, "1 pos"]],
    weights: Weights | None = None,
    replaced: Mapping[str, Bool[Tensor, " node"]] | None = None,
    *,
    at_once: int = 1,
) -> Iterator[Linearised]:
    """Run a model, as it is now, on one prompt after another, and take each forward pass apart.

    Args:
        model: From `load_model`; within `masked`, the masked model.
        prompts: The prompts.
        weights: `Weights.of(model)`, to be used again for other prompts.
        replaced: Nodes whose values are replaced, by hook point (as a circuit has them); what stands for them is
            constant.
        at_once: Tokens in a batch, of prompts of one length; at least one prompt.

    Raises:
        NotShownError: If the residual stream is not a sum of what attentions and MLPs write, or logits are not read
            from it with a final norm and W_U.
    """
    check_predicts_tokens(model)
    weights = weights or Weights.of(model)
    for length, alike in itertools.groupby(prompts, lambda prompt: prompt.shape[1]):
        while batch := list(itertools.islice(alike, max(1, at_once // length))):
            with torch.no_grad():
                seen, logits = _record(model, torch.cat(batch))
            for row in range(len(batch)):
                mine = {name: value[row : row + 1] if len(value) > 1 else value for name, value in seen.items()}
                with torch.no_grad():
                    passed = _Anatomy(model, mine, logits[row].float(), weights, replaced or {}).taken_apart()
                yield passed


class _Anatomy:
    """A recorded forward pass, while it is being taken apart."""

    def __init__(
        self,
        model: Model,
        seen: Mapping[str, Tensor],
        shown: Float[Tensor, "pos d_vocab"],
        weights: Weights,
        replaced: Mapping[str, Bool[Tensor, " node"]],
    ) -> None:
        self.model, self.weights, self.replaced = model, weights, replaced
        self.seen, self.shown = seen, shown
        self.is_rounded = model.W_U.dtype.itemsize < 4
        """Whether sums are rounded to 16 bits, so that they are not those of what was added."""
        self.tolerance = _TOLERANCE_16_BITS if self.is_rounded else _TOLERANCE
        self.writers: list[Writer] = []
        self.whole: list[str] = []

    def taken_apart(self) -> Linearised:
        total = self._stream(in_block(0, "hook_resid_pre"))
        self._embeddings(total)
        for layer in range(self.model.cfg.n_layers):
            total = self._block(layer, total)
        check_has_readout(self.model, total.shape[1])
        W_U, b_U = self.model.W_U.detach().float(), self.model.b_U.detach().float()
        final = frozen_norm(self.model, self.model.ln_final, total)
        constant = b_U if final.bias is None else b_U + final.bias @ W_U
        logits = final.of(total) @ W_U + constant
        read = readout(self.model, total.to(self.model.W_U.dtype)).float()
        if not self._same(read, self.shown):
            raise NotShownError("this model's logits are not read from the sum of what its blocks write")
        return Linearised(
            tuple(self.writers), final, W_U, constant, logits, self.shown, self.model.cfg.n_layers, tuple(self.whole)
        )

    # --- what is written ---

    def _embeddings(self, total: Vectors) -> None:
        both = [self.seen.get(name) for name in ("embed.hook_out", "pos_embed.hook_out")]
        token, position = map(_row, both)
        shapes = {None if one is None else one.shape[1:] for one in (token, position)}
        if shapes == {total.shape[1:]} and self._same(position := position.expand_as(total), total - token):
            self.writers.append(Vector("token", -1, "token", token))
            self.writers.append(Vector("position", -1, "position", position))
        else:
            self.writers.append(Vector("token", -1, "token", total))

    def _block(self, layer: int, before: Vectors) -> Vectors:
        """Take a block apart; returns the residual stream after it."""
        limit, has = len(self.writers), self.weights.by_layer[layer]
        attention = self.seen.get(in_block(layer, "hook_attn_out")) if "W_O" in has else None
        mlp = self.seen.get(in_block(layer, "hook_mlp_out")) if "W_out" in has else None
        attention, mlp = _row(attention), _row(mlp)
        middle = before
        if attention is not None:
            self._attention(layer, before, attention, limit)
            middle = before + attention
        after = middle
        if mlp is not None:
            self._mlp(layer, ((before, limit), (middle, len(self.writers))), mlp)
            after = middle + mlp
        there = self._stream(in_block(layer, "hook_resid_post"))
        if not self._same(after, there):
            raise NotShownError(
                f"block {layer} of this model does not add what its attention and MLP write to the residual stream"
            )
        if self.is_rounded:
            lost = there - sum(writer.total() for writer in self.writers)
            self.writers.append(Vector("bias", layer, f"{PartName('layer', layer).label} rounding", lost))
        return there

    def _attention(self, layer: int, before: Vectors, out: Vectors, limit: int) -> None:
        label, W_O = PartName("attn", layer).label, self.weights.by_layer[layer]["W_O"]
        post, inner = self._post(layer, "ln1_post", out)
        z = _row(self.seen.get(in_block(layer, "attn.hook_z")))
        heads = None if z is None else z.reshape(len(z), *W_O.weight.shape[:2])
        written = None if heads is None else torch.einsum("phd,hdm->pm", heads, W_O.weight) + _or_zero(W_O.bias)
        if heads is None or written is None or post is None or not self._same(written, inner):
            kind = "replaced" if self._is_replaced(layer, "hook_attn_out") else "attn"
            self._whole(Vector(kind, layer, label, out))
            return
        reading, W_V, pattern = self._values(layer, before, heads, limit)
        kept = ~self._dropped(layer, "attn.hook_z", heads.shape[1])
        self.writers.append(Heads(layer, heads, W_O.weight, post, reading, W_V, pattern, kept))
        self._bias(layer, label, W_O.bias, post, out)
        if reading is None:
            self.whole.append(label)

    def _values(
        self, layer: int, before: Vectors, z: Float[Tensor, "pos head d_head"], limit: int
    ) -> tuple[Reading | None, Float[Tensor, "head d_model d_head"], Float[Tensor, "head pos pos"] | None]:
        """How heads read their values: through which norm, W_V of every head, and their attention patterns."""
        V = self.weights.by_layer[layer]["W_V"]
        W_V = V.weight.repeat_interleave(z.shape[1] // len(V.weight), 0)
        read, values = (_row(self.seen.get(in_block(layer, f"attn.v.hook_{end}"))) for end in ("in", "out"))
        pattern = _row(self.seen.get(in_block(layer, "attn.hook_pattern")))
        if read is None or values is None or pattern is None or read.ndim != 2:
            return None, W_V, None
        values = values.reshape(len(values), *V.weight.shape[::2])
        made = (torch.einsum("pm,hmd->phd", read, V.weight).flatten(1) + _or_zero(V.bias)).view(values.shape)
        values = values.repeat_interleave(z.shape[1] // values.shape[1], 1)
        mixed = torch.einsum("hqk,khd->qhd", pattern, values)
        mine = ~self._dropped(layer, "attn.hook_z", z.shape[1])
        if not self._same(made.repeat_interleave(z.shape[1] // made.shape[1], 1), values):
            return None, W_V, None
        if mixed.shape != z.shape or not self._same(mixed[:, mine], z[:, mine]):
            return None, W_V, None
        return self._reading(layer, read, ((before, limit),)), W_V, pattern

    def _mlp(self, layer: int, streams: Sequence[tuple[Vectors, int]], out: Vectors) -> None:
        label, has = PartName("mlp", layer).label, self.weights.by_layer[layer]
        post, inner = self._post(layer, "ln2_post", out)
        activation = _row(self.seen.get(in_block(layer, "mlp.hook_post")))
        W_out = has["W_out"]
        written = None if activation is None else activation @ W_out.weight + _or_zero(W_out.bias)
        if activation is None or written is None or post is None or not self._same(written, inner):
            kind = "replaced" if self._is_replaced(layer, "hook_mlp_out") else "mlp"
            self._whole(Vector(kind, layer, label, out))
            return
        kept = ~self._dropped(layer, "mlp.hook_post", activation.shape[1])
        reading, inputs = self._inputs(layer, activation, kept, streams)
        self.writers.append(Neurons(layer, activation, W_out.weight, post, reading, inputs, kept))
        self._bias(layer, label, W_out.bias, post, out)
        if reading is None:
            self.whole.append(label)

    def _inputs(
        self,
        layer: int,
        activation: Float[Tensor, "pos d_mlp"],
        kept: Bool[Tensor, " d_mlp"],
        streams: Sequence[tuple[Vectors, int]],
    ) -> tuple[Reading | None, tuple[tuple[Tensor, Tensor], ...]]:
        """How neurons read: through which norm, and their input weights with the slopes of the activation function."""
        has = self.weights.by_layer[layer]
        names = {name: f"mlp.{part}" for name, part in (("W_in", "in"), ("W_gate", "gate")) if name in has}
        read = _row(self.seen.get(in_block(layer, "mlp.in.hook_in")))
        found = []
        for name, module in names.items():
            before = _row(self.seen.get(in_block(layer, f"{module}.hook_out")))
            if read is None or before is None or before.shape != activation.shape:
                return None, ()
            if not self._same(read @ has[name].weight + _or_zero(has[name].bias), before):
                return None, ()
            far = before.abs() > _TINY * activation.abs().max()
            slope = torch.where(far & kept, activation / torch.where(far, before, 1.0), 0.0) / len(names)
            found.append((has[name].weight, slope))
        assert read is not None, "every MLP has a W_in"
        return self._reading(layer, read, streams), tuple(found)

    # --- how it is read ---

    def _reading(self, layer: int, read: Vectors, streams: Sequence[tuple[Vectors, int]]) -> Reading | None:
        """The norm and the residual stream that give what a part reads; None if there are none."""
        block = self.model.blocks[layer]
        for stream, limit in reversed(streams):
            for name in ("ln2", "ln1", None):
                if name is not None and not hasattr(block, name):
                    continue
                try:
                    norm = IDENTITY if name is None else frozen_norm(self.model, getattr(block, name), stream)
                except NotShownError:
                    continue
                if self._same(norm.of(stream) + _or_zero(norm.bias), read):
                    return Reading(norm, limit)
        return None

    def _post(self, layer: int, name: str, out: Vectors) -> tuple[FrozenNorm | None, Vectors]:
        """The norm after a part, and what it reads; None if what it writes is not what is added."""
        inner = _row(self.seen.get(in_block(layer, f"{name}.hook_in")))
        if inner is None:
            return IDENTITY, out
        try:
            norm = frozen_norm(self.model, getattr(self.model.blocks[layer], name), inner)
        except NotShownError:
            return None, inner
        return (norm if self._same(norm.of(inner) + _or_zero(norm.bias), out) else None), inner

    def _bias(self, layer: int, label: str, bias: Tensor | None, post: FrozenNorm, out: Vectors) -> None:
        if bias is None and post.bias is None:
            return
        written = post.of(_or_zero(bias) + torch.zeros_like(out)) + _or_zero(post.bias)
        self.writers.append(Vector("bias", layer, f"{label} bias", written))

    def _whole(self, vector: Vector) -> None:
        self.writers.append(vector)
        if vector.kind != "replaced":
            self.whole.append(vector.label)

    def _dropped(self, layer: int, point: str, count: int) -> Bool[Tensor, " node"]:
        there = self.replaced.get(in_block(layer, point))
        device = self.shown.device
        return torch.zeros(count, dtype=torch.bool, device=device) if there is None else there.to(device)

    def _is_replaced(self, layer: int, point: str) -> bool:
        there = self.replaced.get(in_block(layer, point))
        return there is not None and bool(there.any())

    def _stream(self, name: str) -> Vectors:
        found = _row(self.seen.get(name))
        if found is None:
            raise NotShownError(f"this model does not reach the activation {name} in a forward pass")
        return found

    def _same(self, one: Tensor, other: Tensor) -> bool:
        """Whether two tensors are equal but for rounding."""
        if one.shape != other.shape:
            return False
        if one.numel() == 0:
            return True
        return bool((one - other).abs().max() <= self.tolerance * other.abs().max().clamp(min=1e-6))


_POINTS = (
    "hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "ln1_post.hook_in", "ln2_post.hook_in",
    "attn.v.hook_in", "attn.v.hook_out", "attn.hook_pattern", "attn.hook_z",
    "mlp.in.hook_in", "mlp.in.hook_out", "mlp.gate.hook_out", "mlp.hook_post",
)  # fmt: skip


def _record(model: Model, tokens: Integer[Tensor, "batch pos"]) -> tuple[dict[str, Tensor], Tensor]:
    """The activations, of those that there may be, that a forward pass reaches, and the logits."""
    names = [in_block(layer, point) for layer in range(model.cfg.n_layers) for point in _POINTS]
    names = [name for name in ("embed.hook_out", "pos_embed.hook_out", *names) if hook_point(model, name) is not None]
    seen: dict[str, Tensor] = {}

    def recorder(name: str) -> Any:
        return lambda value, hook: seen.__setitem__(name, value.detach()) if isinstance(value, Tensor) else None

    logits = model.run_with_hooks(tokens, fwd_hooks=[(name, recorder(name)) for name in names])
    return seen, logits


def _row(value: Tensor | None) -> Any:
    """The activations of the only sequence, in float32; None if there are none."""
    return None if value is None else value[0].float()


def _or_zero(bias: Tensor | None) -> Any:
    return 0.0 if bias is None else bias
