"""What a gate governs: single weights, or all weights of a neuron, a head or a block."""

from __future__ import annotations

UNITS = {"weight": ("attn", "mlp"), "neuron": ("mlp",), "head": ("attn",), "block": ("attn", "mlp")}
"""The units a gate may govern, and the components that have them."""
