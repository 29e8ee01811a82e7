"""What `evaluate` measured of a run, as the pages need it: the only place in the report that reads `run.metrics`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def interval(
    metrics: Mapping[str, Any], condition: str, quantity: str = "surprisal_correlation"
) -> tuple[float | None, float | None]:
    """Of r, or of another quantity; ends are None where it is undefined."""
    low, high = (metrics.get("intervals") or {}).get(condition, {}).get(quantity) or (None, None)
    return low, high
