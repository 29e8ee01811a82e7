"""The edges of a hooked model: what one part of it writes to the residual stream, into what another one reads.

| writer | what it writes | hook point |
|---|---|---|
| `embed` | the residual stream before the first block | `blocks.0.hook_resid_pre` |
| `L0H3` | the result of a head, z W_O[head] | `blocks.0.attn.hook_result`, one head's slice |
| `L0.mlp` | the output of an MLP | `blocks.0.hook_mlp_out` |

| reader | what reads the residual stream, before its norm | hook point |
|---|---|---|
| `L0H3.q`, `L0H3.k`, `L0H3.v` | a head, for its queries, keys and values | `blocks.0.attn.hook_q_input`, ... |
| `L0.mlp` | an MLP | `blocks.0.hook_mlp_in` |
| `logits` | the final norm | `ln_final.hook_in` |

A reader reads the sum of all that was written before it, and the biases of W_O, which no head owns. Query heads that
share keys and values read them through one key-value head, `L0KV1.k`: one key is computed, from one input. In blocks
whose attention and MLP are parallel, the MLP does not read its own block's heads.
"""

from __future__ import annotations

import difflib
import functools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bigram_circuits.models.activations import NotShownError, record
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import in_use
from bigram_circuits.names import ATTENTION_INPUTS, EMBED, LOGITS, EdgeName, head_label, in_block, reader_label

POINTS = {"q": "attn.hook_q_input", "k": "attn.hook_k_input", "v": "attn.hook_v_input", "mlp": "hook_mlp_in"}
"""Hook point of each kind of reader within a block."""
LOGITS_POINT = "ln_final.hook_in"
"""The hook point of the reader `logits`."""
EMBED_POINT = in_block(0, "hook_resid_pre")
"""The hook point of the writer `embed`."""
RESULTS, MLP_OUT = "attn.hook_result", "hook_mlp_out"
"""Hook points of what heads and the MLP write, within a block."""

_KINDS = {point: kind for kind, point in POINTS.items()}
_IN_BLOCK = re.compile(r"blocks\.(\d{1,9})\.(.+)")
_FLAGS = {"use_attn_in": False, "use_split_qkv_input": True, "use_attn_result": True, "use_hook_mlp_in": True}
_TOLERANCE, _TOLERANCE_16_BITS = 1e-4, 5e-2  # of the largest number in a residual stream


@dataclass(frozen=True)
class EdgeSite:
    """The readers of one hook point, and what they can read from: a mask of their edges is [readers, writers].

    Example:
        >>> site = bc.edge_sites(model)[0]
        >>> print(site.readers[0], "reads", ", ".join(site.writers))
        L0H0.q reads embed
    """

    name: str
    """The hook point, for example `blocks.0.attn.hook_q_input`."""
    kind: str
    """`q`, `k`, `v`, `mlp` or `logits`."""
    layer: int
    """Index of the block; of `logits`, the number of blocks."""
    readers: tuple[str, ...]
    """Labels of the readers: one for every head (for `k` and `v`, every key-value head), else one."""
    writers: tuple[str, ...]
    """Labels of the writers that they can read from, in the order of the forward pass."""

    @property
    def count(self) -> int:
        """Number of readers."""
        return len(self.readers)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of readers and writers."""
        return len(self.readers), len(self.writers)

    def label(self, reader: int, writer: int) -> str:
        """The label of the edge with these indices: `L0H3->L1H2.k`."""
        return str(EdgeName(self.writers[writer], self.readers[reader]))


@dataclass(frozen=True)
class WriterSite:
    """The writers of one hook point."""

    name: str
    """The hook point, for example `blocks.0.attn.hook_result`."""
    layer: int
    """Index of the block; of `embed`, 0."""
    writers: tuple[str, ...]
    """Labels of its writers: every head of a block, else one."""
    heads: bool
    """Whether they are heads, whose activation is [batch, pos, head, d_model]; otherwise [batch, pos, d_model]."""


@dataclass(frozen=True)
class EdgeLayout:
    """The writers and readers of a model. A reader can read from all writers of the first few `sources`."""

    sources: tuple[WriterSite, ...]
    """Sites of the writers, in the order of the forward pass."""
    sites: tuple[EdgeSite, ...]
    """Sites of the readers, in the order of the forward pass."""

    def sources_of(self, site: EdgeSite) -> tuple[WriterSite, ...]:
        """The sites of the writers that the readers of a site can read from."""
        last = next(i for i, source in enumerate(self.sources) if source.writers[-1] == site.writers[-1])
        return self.sources[: last + 1]

    def find(self, label: str) -> tuple[str, int, int]:
        """The hook point, and the indices of reader and writer, of an edge's label.

        Raises:
            ValueError: If the label is not that of an edge here.
        """
        name = EdgeName.parse(label)
        if name.reader not in self._readers:
            near = difflib.get_close_matches(name.reader, self._readers, 1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise ValueError(f"there is no edge {label} here: nothing is called {name.reader}{hint}")
        site, index = self._readers[name.reader]
        if name.writer not in site.writers:
            raise ValueError(f"there is no edge {label} here: {name.reader} does not read from {name.writer}")
        return site.name, index, site.writers.index(name.writer)

    @functools.cached_property
    def _readers(self) -> dict[str, tuple[EdgeSite, int]]:
        """The site and the index in it of each reader, by label."""
        return {reader: (site, index) for site in self.sites for index, reader in enumerate(site.readers)}

    def on_path(self, masks: Mapping[str, Bool[Tensor, "reader writer"]]) -> frozenset[str]:
        """Labels of the writers that lie on a path of kept edges from `embed` to `logits`.

        Args:
            masks: The kept edges, by the hook point of their readers.
        """
        reads = {  # what each reader, in the order of the forward pass, reads from
            reader: {site.writers[writer] for writer in masks[site.name][index].nonzero().flatten().tolist()}
            for site in self.sites
            for index, reader in enumerate(site.readers)
        }
        feeds: dict[str, list[set[str]]] = {writer: [] for source in self.sources for writer in source.writers}
        for site in self.sites[:-1]:
            for index, reader in enumerate(site.readers):
                for writer in self._served(site, index):
                    feeds[writer].append(reads[reader])
        reached = {EMBED}
        for writer, read in feeds.items():
            if any(one & reached for one in read):
                reached.add(writer)
        needed = set(reads[LOGITS])
        for writer, read in reversed(feeds.items()):
            if writer in needed:
                needed = needed.union(*read)
        return frozenset(reached & needed)

    def _served(self, site: EdgeSite, index: int) -> tuple[str, ...]:
        """Labels of the writers that a reader is a part of: its head or MLP, or all heads of a key-value head."""
        if site.kind == "mlp":
            return site.readers
        heads = next(one.writers for one in self.sources if one.heads and one.layer == site.layer)
        group = len(heads) // site.count
        return heads[index * group : (index + 1) * group]

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> EdgeLayout:
        """The layout of which masks of these names and shapes are.

        Raises:
            ValueError: If there is none.
        """
        places = {edge_place(name): name for name in shapes}
        blocks, writers = list[_Block](), 1

        def check(layer: int | None, kind: str, rows: int | None, *columns: int) -> tuple[int, int]:
            name = places.pop((layer, kind), None)
            if name is None:
                raise ValueError(f"there is no mask of the edges into {kind} of block {layer}")
            shape = shapes[name]
            if len(shape) != 2 or shape[0] < 1 or rows not in (None, shape[0]) or shape[1] not in columns:
                wanted = f"({'heads' if rows is None else rows}, {' or '.join(map(str, columns))})"
                raise ValueError(f"the mask of {name} has shape {shape}, but should have {wanted}")
            return shape[0], shape[1]

        while any(place is not None and place[0] == len(blocks) for place in places):
            layer = len(blocks)
            heads, _ = check(layer, "q", None, writers)
            key_values, _ = check(layer, "k", None, writers)
            check(layer, "v", key_values, writers)
            _, read = check(layer, "mlp", 1, writers, writers + heads)
            if heads % key_values:
                raise ValueError(
                    f"{key_values} key-value heads cannot be shared evenly by {heads} heads of block {layer}"
                )
            blocks.append(_Block(heads, key_values, parallel=read == writers))
            writers += heads + 1
        check(None, LOGITS, 1, writers)
        if places:
            raise ValueError(f"{next(iter(places.values()))} is not a hook point of readers in {len(blocks)} blocks")
        return _layout(tuple(blocks))


@dataclass(frozen=True)
class _Block:
    """What there is in a block."""

    heads: int
    key_values: int
    parallel: bool


@functools.lru_cache(maxsize=16)
def _layout(blocks: tuple[_Block, ...]) -> EdgeLayout:
    sources, sites = [WriterSite(EMBED_POINT, 0, (EMBED,), heads=False)], list[EdgeSite]()

    def add(name: str, kind: str, layer: int, readers: Iterable[str]) -> None:
        writers = tuple(writer for source in sources for writer in source.writers)
        sites.append(EdgeSite(name, kind, layer, tuple(readers), writers))

    for layer, block in enumerate(blocks):
        shared = block.key_values != block.heads
        for kind in ATTENTION_INPUTS:
            heads = range(block.heads if kind == "q" else block.key_values)
            labels = (reader_label(layer, head, kind, shared=shared and kind != "q") for head in heads)
            add(in_block(layer, POINTS[kind]), kind, layer, labels)
        results = tuple(head_label(layer, head) for head in range(block.heads))
        mlp = reader_label(layer, 0, "mlp")
        attention = WriterSite(in_block(layer, RESULTS), layer, results, heads=True)
        if not block.parallel:
            sources.append(attention)
        add(in_block(layer, POINTS["mlp"]), "mlp", layer, (mlp,))
        if block.parallel:
            sources.append(attention)
        sources.append(WriterSite(in_block(layer, MLP_OUT), layer, (mlp,), heads=False))
    add(LOGITS_POINT, LOGITS, len(blocks), (LOGITS,))
    return EdgeLayout(tuple(sources), tuple(sites))


def edge_place(name: str) -> tuple[int | None, str] | None:
    """Layer and kind of the readers at a hook point; None if it has none. `logits` is in no layer."""
    if name == LOGITS_POINT:
        return None, LOGITS
    found = _IN_BLOCK.fullmatch(name)
    return (int(found[1]), _KINDS[found[2]]) if found and found[2] in _KINDS else None


# --- in a model ---


@contextmanager
def edges_exposed(model: Model) -> Iterator[None]:
    """Within the `with` block, a forward pass goes through the hook points of all edges; then, as before.

    TransformerLens gives every head inputs of its own for queries, keys and values, and computes the heads' results
    one by one, only when it is told to. Hold the model meanwhile (`in_use`).

    Raises:
        NotShownError: If TransformerLens cannot do this for the model's attention.
    """
    before = {flag: bool(getattr(model.cfg, flag, False)) for flag in _FLAGS}
    try:
        _set_flags(model, _FLAGS)
        yield
    finally:
        _set_flags(model, dict(reversed(before.items())))


def _set_flags(model: Any, flags: Mapping[str, bool]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about some of the layers: `edge_layout` looks at every one
            for flag, value in flags.items():
                getattr(model, f"set_{flag}")(value)
    except NotImplementedError as error:
        kinds = sorted({type(block.attn).__name__ for block in model.blocks if hasattr(block, "attn")})
        raise NotShownError(
            f"this model has no edges: TransformerLens cannot split the inputs of its attention ({', '.join(kinds)})"
        ) from error


def edge_sites(model: Model) -> tuple[EdgeSite, ...]:
    """List the readers of a model, in the order of the forward pass, each with what it can read from.

    Args:
        model: From `load_model`.

    Raises:
        ValueError: If the model has no edges: what its heads and MLPs write is not simply added, or their inputs cannot
            be replaced one by one.

    Example:
        >>> for site in bc.edge_sites(model):
        ...     print(site.name, site.shape)
    """
    return edge_layout(model).sites


_LAYOUTS: WeakKeyDictionary[Any, EdgeLayout] = WeakKeyDictionary()


def edge_layout(model: Model) -> EdgeLayout:
    """The writers and readers of a model, found once; see `edge_sites`."""
    with in_use(model, "edge_sites", block=True):
        if model not in _LAYOUTS:
            with in_use(model, "edge_sites"), edges_exposed(model):
                _LAYOUTS[model] = _found(model)
        return _LAYOUTS[model]


def attention_biases(model: Model) -> tuple[Float[Tensor, " d_model"] | None, ...]:
    """The bias of W_O in every block, which belongs to no head; None where there is none."""
    return tuple(getattr(block.attn.o.original_component, "bias", None) for block in model.blocks)


def _found(model: Model) -> EdgeLayout:
    """The layout of a model, after a look at whether each input really is the sum of what was written before it."""
    points = (*POINTS.values(), RESULTS, MLP_OUT)
    layers = range(model.cfg.n_layers)
    names = [EMBED_POINT, *(in_block(layer, point) for layer in layers for point in points), LOGITS_POINT]
    with torch.inference_mode():
        try:
            seen, _ = record(model, torch.tensor([[0, 1]], device=model.cfg.device), names)
        except NotShownError as error:
            raise NotShownError(f"this model has no edges: {error}") from error
    parallel = bool(getattr(model.cfg, "parallel_attn_mlp", False))
    heads = [[seen[in_block(layer, POINTS[kind])].shape[2] for kind in ("q", "k")] for layer in layers]
    layout = _layout(tuple(_Block(queries, keys, parallel) for queries, keys in heads))
    biases = attention_biases(model)
    for site in layout.sites:
        total = torch.zeros_like(seen[EMBED_POINT], dtype=torch.float64)
        for source in layout.sources_of(site):
            total += seen[source.name].double().sum(2) if source.heads else seen[source.name].double()
            if source.heads and (bias := biases[source.layer]) is not None:
                total += bias.detach().double()
        read = seen[site.name].double()
        read = read[:, :, 0] if site.kind in ATTENTION_INPUTS else read
        tolerance = _TOLERANCE if seen[site.name].dtype.itemsize > 2 else _TOLERANCE_16_BITS
        if not float((read - total).abs().max()) <= tolerance * float(read.abs().max()):
            raise NotShownError(
                f"this model has no edges: {site.readers[0]} does not read the sum of what embed, heads and MLPs write "
                f"before it; where a norm or a scale follows on attention, what it adds cannot be split into heads"
            )
    return layout
