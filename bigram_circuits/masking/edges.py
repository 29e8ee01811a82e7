"""Apply masks or gates of edges to a live model: hooks give every reader its own sum of what writers write.

With gates g, a reader reads b + sum over writers w of g_w out_w + (1 - g_w) out'_w, where out_w is what w writes in
this forward pass, out'_w its replacement, and b the biases of W_O before it, which belong to no head. It is computed as

    b + sum_w out'_w + sum_w g_w (out_w - out'_w),

whose first two terms all readers of a hook point share. The differences are kept once for each hook point of writers,
as rows [writer, batch x pos x d_model], so that the last sum is one matrix product for each of them and each hook point
of readers. What no reader of a hook point keeps is skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bigram_circuits.masking.replacing import Replacer
from bigram_circuits.models.activations import NotShownError
from bigram_circuits.models.edges import EdgeLayout, EdgeSite, WriterSite, attention_biases, edge_layout, edges_exposed
from bigram_circuits.models.interventions import Hook, intervened
from bigram_circuits.models.model import Model
from bigram_circuits.replacement import Replacement

Gate = Callable[[str], Bool[Tensor, "reader writer"] | Float[Tensor, "reader writer"]]
"""Name of the readers' hook point -> one value per edge: whether it is kept, or its soft gate."""

_REPLACED: WeakSet[Any] = WeakSet()


@contextmanager
def edges_replaced(model: Model, gate: Gate, replacement: Replacement) -> Iterator[None]:
    """Within the `with` block, every reader reads from each writer as much as their edge's gate is open.

    Hold the model meanwhile (`in_use`). A forward pass must reach the final norm, and must not be recomputed in the
    backward pass (`recomputed`).

    Args:
        model: From `load_model`.
        gate: Asked for the gates of a hook point of readers (`edge_sites`) in every forward pass.
        replacement: What takes the place of what a writer writes, at the hook points of writers.

    Raises:
        NotShownError: If the model has no edges; or in a forward pass that is recomputed.
        ValueError: If its edges are replaced already, or the replacement lacks something; in a forward pass, if gates
            have another shape.
    """
    if model in _REPLACED:
        raise ValueError("the edges of this model are masked already: leave that `with` block first")
    layout = edge_layout(model)
    replacer = Replacer(model, replacement, [source.name for source in layout.sources])
    streams = _Streams(layout, gate, replacer, attention_biases(model))
    with edges_exposed(model), replacer.ready(), intervened(model, streams.hooks()):
        _REPLACED.add(model)
        try:
            yield
        finally:
            _REPLACED.discard(model)


class _Streams:
    """What has been written in the current forward pass, and what every reader reads of it."""

    def __init__(
        self,
        layout: EdgeLayout,
        gate: Gate,
        replacer: Replacer,
        biases: tuple[Float[Tensor, " d_model"] | None, ...],
    ) -> None:
        self._layout = layout
        self._gate = gate
        self._replacer = replacer
        self._biases = biases
        self._written: dict[str, Float[Tensor, "writer number"]] = {}
        self._shared: dict[str, Float[Tensor, "..."]] = {}  # what is read of a hook point whatever the gates

    def hooks(self) -> list[Hook]:
        writing: list[Hook] = [(source.name, self._writing(source)) for source in self._layout.sources]
        return writing + [(site.name, self._reading(site)) for site in self._layout.sites]

    def _writing(self, source: WriterSite) -> Callable[..., None]:
        first, bias = source == self._layout.sources[0], self._biases[source.layer] if source.heads else None

        def hook(value: Float[Tensor, "batch pos *head d_model"], hook: Any) -> None:
            if first:
                self._forget()
            shared = value.new_zeros(value.shape[-1]) if bias is None else bias
            if not self._replacer.is_zero:
                other = self._replacer.at(source.name, value)
                value = value - other
                other = other.expand_as(value)
                shared = shared + (other.sum(2) if source.heads else other)
            rows = value.permute(2, 0, 1, 3) if source.heads else value
            self._written[source.name] = rows.reshape(len(source.writers), -1)
            self._shared[source.name] = shared

        return hook

    def _reading(self, site: EdgeSite) -> Callable[..., Tensor]:
        sources = self._layout.sources_of(site)
        last = site == self._layout.sites[-1]

        def hook(value: Float[Tensor, "batch pos *head d_model"], hook: Any) -> Tensor:
            gates = self._gate(site.name)
            if tuple(gates.shape) != site.shape:
                raise ValueError(f"the gates of {site.name} have shape {tuple(gates.shape)}, not {site.shape}")
            if any(source.name not in self._written for source in sources):
                raise NotShownError("edges cannot be masked in a forward pass that is recomputed in the backward pass")
            batch, pos, d_model = value.shape[0], value.shape[1], value.shape[-1]
            shared = functools.reduce(torch.add, (self._shared[source.name] for source in sources))
            total = shared.expand(site.count, batch, pos, d_model).clone(memory_format=torch.contiguous_format)
            rows, start = total.view(site.count, -1), 0
            for source in sources:
                part = gates[:, start : start + len(source.writers)]
                start += len(source.writers)
                if part.dtype != torch.bool or bool(part.any()):
                    rows.addmm_(part.to(rows), self._written[source.name].to(rows.dtype))
            if last:
                self._forget()
            total = total.to(value.dtype)
            return total[0] if value.ndim == 3 else total.permute(1, 2, 0, 3)

        return hook

    def _forget(self) -> None:
        self._written.clear()
        self._shared.clear()
