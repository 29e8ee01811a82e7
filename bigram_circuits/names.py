"""Names of weight matrices (`blocks.0.attn.W_Q`) and of parts of a model, and how to parse them.

| part | label | also accepted |
|---|---|---|
| an attention head | `L2H3` | `head 2.3` |
| one or several MLP neurons of a layer | `L0N5`, `L0N[1,5]` | `neurons 0.5`, `neurons 0.[1,5]` |
| a block's attention, a block's MLP | `L1.attn`, `L1.mlp` | `attn 1`, `mlp 1` |
| both | `L1` | `layer 1` |

An edge is written `L0H3->L1H2.k`: what head 3 of layer 0 writes, into what head 2 of layer 1 computes its keys from.
Its writers are `embed`, heads and MLPs; its readers `L1H2.q`, `L1H2.k`, `L1H2.v`, `L1.mlp` and `logits`. Where query
heads share keys and values, those are read by key-value heads: `L1KV0.k`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ATTENTION_MATRICES = ("W_Q", "W_K", "W_V", "W_O")
"""The weight matrices of an attention layer; their first axis is the head."""
MLP_MATRICES = ("W_in", "W_gate", "W_out")
"""The weight matrices of an MLP; only a gated MLP has `W_gate`."""
COMPONENTS = ("attn", "mlp")
"""The components of a block."""

_WEIGHT = re.compile(r"blocks\.(\d+)\.(\w+)\.(\w+)")
_LABEL = re.compile(r"L(?P<layer>\d+)(?:H(?P<head>\d+)|N(?P<neurons>\d+|\[[\d,\s]*\])|\.(?P<component>attn|mlp))?")
_SPELLED = re.compile(
    r"head\s+(?P<head_layer>\d+)\.(?P<head>\d+)|neurons\s+(?P<neuron_layer>\d+)\.(?P<neurons>\d+|\[[\d,\s]*\])|"
    r"(?P<kind>attn|mlp|layer)\s+(?P<layer>\d+)"
)
_WRITER = re.compile(r"embed|L\d+(?:H\d+|\.mlp)")
_READER = re.compile(r"logits|L\d+(?:H\d+\.q|(?:H|KV)\d+\.[kv]|\.mlp)")
_MOST_INDICES = 5  # neurons listed in a short label


def short_name(name: str) -> str:
    """A model's name for people: the last part of a path; a hub id and `reference` as they are."""
    is_path = name.startswith(("/", ".", "~")) or "\\" in name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if is_path else name


def model_words(name: str | None) -> str:
    """A model's name in a sentence."""
    return "the reference model" if name == "reference" else short_name(name or "a model")


_IN_MEMORY = " (in memory)"


def name_in_memory(label: str) -> str:
    """The name of a model that was an object in memory: it finds no model, and looks like no hub id or path."""
    return label.removesuffix(_IN_MEMORY) + _IN_MEMORY


def is_in_memory(name: str) -> bool:
    """Whether a name is one of `name_in_memory`, also with words after it (`with re-initialised blocks`)."""
    return _IN_MEMORY in name


def short_hash(whole: str | None) -> str:
    """The first digits of a hash, or of the first of its parts, for people."""
    found = re.search(r"[0-9a-f]{12}", whole or "")
    return found[0] if found else whole or "unknown"


def in_block(layer: int, what: str) -> str:
    """Return the full name of something in a block, for example of the activation `hook_attn_out`."""
    return f"blocks.{layer}.{what}"


def layer_of(address: str) -> int:
    """Return the layer of something in a block, from its full name."""
    return int(address.split(".")[1])


@dataclass(frozen=True)
class WeightName:
    """The canonical name of a weight matrix, parsed; `str` converts it back."""

    layer: int
    """Index of the block."""
    component: str
    """`attn` or `mlp`."""
    matrix: str
    """Name of the matrix, for example `W_Q`."""

    @classmethod
    def parse(cls, name: str) -> WeightName:
        """Parse a canonical name. Raises ValueError if it is not one."""
        found = _WEIGHT.fullmatch(name)
        if found is None:
            raise ValueError(f"{name!r} is not the name of a weight matrix, such as 'blocks.0.attn.W_Q'")
        return cls(int(found[1]), found[2], found[3])

    @classmethod
    def is_one(cls, name: str) -> bool:
        """Whether a name is that of a weight matrix that can be masked, and not, for example, of a hook point."""
        found = _WEIGHT.fullmatch(name)
        matrices = {"attn": ATTENTION_MATRICES, "mlp": MLP_MATRICES}
        return found is not None and found[3] in matrices.get(found[2], ())

    def __str__(self) -> str:
        return in_block(self.layer, f"{self.component}.{self.matrix}")

    @property
    def part(self) -> PartName:
        """The attention layer or MLP that the matrix belongs to."""
        return PartName(self.component, self.layer)


@dataclass(frozen=True)
class PartName:
    """A part of a model."""

    kind: str
    """`head`, `neurons`, `attn`, `mlp`, or `layer` for both."""
    layer: int
    """Index of the block."""
    indices: tuple[int, ...] = ()
    """Index of the head, or indices of the neurons; empty for `attn`, `mlp` and `layer`."""

    @classmethod
    def parse(cls, text: str) -> PartName | None:
        """Parse a label or one of its other spellings; None if it is neither. `L0N[]` is valid and names no neuron."""
        if found := _LABEL.fullmatch(text):
            layer, kind = int(found["layer"]), found["component"] or "layer"
        elif found := _SPELLED.fullmatch(text):
            layer = int(found["head_layer"] or found["neuron_layer"] or found["layer"])
            kind = found["kind"]
        else:
            return None
        if found["head"]:
            return cls("head", layer, (int(found["head"]),))
        if found["neurons"]:
            indices = dict.fromkeys(int(number) for number in re.findall(r"\d+", found["neurons"]))
            return cls("neurons", layer, tuple(indices))
        return cls(kind, layer)

    @property
    def label(self) -> str:
        """The canonical label."""
        return self._label(",".join(map(str, self.indices)))

    @property
    def short(self) -> str:
        """The label, with the number of neurons instead of their indices if there are many."""
        many = len(self.indices) > _MOST_INDICES
        return self._label(f"{len(self.indices)} of them") if many else self.label

    def _label(self, neurons: str) -> str:
        if self.kind == "head":
            return f"L{self.layer}H{self.indices[0]}"
        if self.kind == "neurons":
            return f"L{self.layer}N{neurons}" if len(self.indices) == 1 else f"L{self.layer}N[{neurons}]"
        return f"L{self.layer}" if self.kind == "layer" else f"L{self.layer}.{self.kind}"


def head_label(layer: int, index: int) -> str:
    """Return the label of an attention head."""
    return PartName("head", layer, (index,)).label


def neuron_label(layer: int, index: int) -> str:
    """Return the label of an MLP neuron."""
    return PartName("neurons", layer, (index,)).label


def key_value_label(layer: int, index: int) -> str:
    """Return the label of a key-value head that a group of query heads shares."""
    return f"L{layer}KV{index}"


EMBED = "embed"
"""The writer of the residual stream before the first block."""
LOGITS = "logits"
"""The reader of the residual stream after the last block: the final norm."""
ATTENTION_INPUTS = ("q", "k", "v")
"""What the heads of an attention layer read the residual stream for."""


def reader_label(layer: int, index: int, kind: str, *, shared: bool = False) -> str:
    """Return the label of what reads the residual stream.

    Args:
        layer: Index of the block.
        index: Index of the head.
        kind: `q`, `k`, `v`, `mlp` or `logits`.
        shared: Whether the head is a key-value head of several query heads.
    """
    if kind in ATTENTION_INPUTS:
        return f"{key_value_label(layer, index) if shared else head_label(layer, index)}.{kind}"
    return LOGITS if kind == LOGITS else PartName(kind, layer).label


@dataclass(frozen=True)
class EdgeName:
    """An edge: what a part of a model writes to the residual stream, into what another one reads."""

    writer: str
    """`embed`, or the label of a head or an MLP."""
    reader: str
    """`L1H2.q`, `L1H2.k`, `L1H2.v`, `L1KV0.k`, `L1KV0.v`, `L1.mlp` or `logits`."""

    @classmethod
    def parse(cls, label: str) -> EdgeName:
        """Parse a label. Raises ValueError if it is not that of an edge."""
        writer, arrow, reader = label.partition("->")
        if not arrow or not _WRITER.fullmatch(writer) or not _READER.fullmatch(reader):
            raise ValueError(
                f"{label!r} is not the label of an edge, such as L0H3->L1H2.k, embed->L0.mlp or L3.mlp->logits"
            )
        return cls(writer, reader)

    def __str__(self) -> str:
        return f"{self.writer}->{self.reader}"
