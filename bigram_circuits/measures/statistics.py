"""How close a model's predictions are to a target's: per-sequence sums and the statistics computed from them.

Everything that is averaged or correlated over held-out text is kept as one row of sums per sequence. That is all a
bootstrap over sequences needs, so intervals cost no further forward pass and no per-token array is ever stored.

Zero-probability rule: surprisals are compared only where the target's probability of the actual next token is
above 0 (elsewhere its surprisal is infinite); `used` of `positions` next-token positions remain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.storage.typed import Record

_LITTLE = 1e-4  # nats: a KL of the best constant below this means that the context is uninformative
_LOGITS_AT_ONCE = 1 << 22  # logits are copied to float32 in chunks of 16 MiB

COLUMNS = ("used", "x", "y", "xx", "yy", "xy", "positions", "surprisal", "places", "cross_entropy", "kl", "agree")
"""Sums over one sequence. `used` is the number of next-token positions that enter the correlation of x (the model's
surprisal) with y (the target's), `positions` that of all next-token positions, `places` that of all positions at which
the target is defined."""


@dataclass(frozen=True)
class Faithfulness(Record):
    """How faithfully one (masked) model matches the target. Surprisal, CE and KL in nats; nan where undefined.

    Example:
        >>> measured = bc.evaluate(model, found, target, text, controls=False).subnetwork
        >>> print(f"r {measured.surprisal_correlation:.2f}, KL {measured.kl:.2f} nats")
    """

    surprisal_correlation: float
    """Pearson r of the model's and the target's surprisal of the actual next token, with the zero-probability rule."""
    cross_entropy: float
    """Mean CE from the target's distribution to the model's."""
    kl: float
    """Mean KL from the target's distribution to the model's: `cross_entropy` minus the target's entropy."""
    mean_surprisal: float
    """The model's own next-token loss; its exponential is the perplexity."""
    top1_agreement: float
    """Share of positions where the model's most likely token is the target's."""
    kept: int
    """Number of weights kept."""
    total: int
    """Number of maskable weights."""
    fraction: float
    """kept / total."""


def surprisals(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos_minus_1"]:
    """Return -log softmax(logits) of the actual next token, in nats (float32), without a float32 copy of all logits."""
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    following = tokens[:, 1:].reshape(-1).to(logits.device, torch.long)
    rows = max(1, _LOGITS_AT_ONCE // flat.shape[1])
    lse = torch.cat([part.float().logsumexp(-1) for part in flat.split(rows)])
    return (lse - flat.gather(1, following[:, None]).squeeze(1).float()).view(tokens[:, 1:].shape)


def correlation_sums(x: Float[Tensor, "batch n"], y: Float[Tensor, "batch n"]) -> Float[Tensor, "batch six"]:
    """Compute the first six `COLUMNS` for every sequence from surprisals; positions where y is infinite are left out.

    Raises:
        ValueError: If x is not finite, or y is NaN, since the correlation would be meaningless.
    """
    if not torch.isfinite(x).all():
        raise ValueError("a model's surprisal is not finite (NaN or infinity in its logits)")
    if torch.isnan(y).any():
        raise ValueError("a target's surprisal is NaN: where it has no opinion it should be infinite")
    used = torch.isfinite(y)
    x_used, y_used = x * used, torch.where(used, y, 0.0)
    columns = (used.to(x), x_used, y_used, x_used**2, y_used**2, x_used * y_used)
    return torch.stack([column.sum(1) for column in columns], 1)


def correlation(sums: Float[np.ndarray, "... column"]) -> Float[np.ndarray, "..."]:
    """Compute Pearson r from rows of sums (or their totals); nan if undefined (under 2 positions, or a constant)."""
    n, x, y, xx, yy, xy = (sums[..., COLUMNS.index(name)] for name in ("used", "x", "y", "xx", "yy", "xy"))
    with np.errstate(invalid="ignore", divide="ignore"):
        var_x, var_y, cov = xx / n - (x / n) ** 2, yy / n - (y / n) ** 2, xy / n - x * y / n**2
        rounding = 1e-12
        constant = (n < 2) | (var_x <= rounding * (xx / n)) | (var_y <= rounding * (yy / n))
        return np.where(constant, np.nan, cov / np.sqrt(np.where(constant, 1.0, var_x * var_y)))


def mean(sums: Float[np.ndarray, "... column"], name: str) -> Float[np.ndarray, "..."]:
    """Compute the mean per position of a column, from rows of sums or their totals."""
    count = "positions" if name == "surprisal" else "places"
    return np.asarray(sums[..., COLUMNS.index(name)] / sums[..., COLUMNS.index(count)])


Statistic = Callable[[Float[np.ndarray, "... column"]], Float[np.ndarray, "..."]]
"""Computes a number from rows of sums or their totals."""
STATISTICS: Mapping[str, Statistic] = MappingProxyType(
    {
        "surprisal_correlation": correlation,
        "cross_entropy": partial(mean, name="cross_entropy"),
        "kl": partial(mean, name="kl"),
        "mean_surprisal": partial(mean, name="surprisal"),
        "top1_agreement": partial(mean, name="agree"),
    }
)
"""The statistics of a `Faithfulness`, by field."""


@dataclass(frozen=True)
class ContextTold:
    """The statistic 1 - KL / KL0: the share of the context's information about the target that a model recovers.

    1 at the target, 0 if the context is unused. nan where KL0 is unknown or the context is uninformative.
    """

    constant: float
    """KL0, the KL of the best constant prediction (`targets.base.kl_of_best_constant`), in nats."""

    def __call__(self, sums: Float[np.ndarray, "... column"]) -> Float[np.ndarray, "..."]:
        """Compute it from rows of sums or their totals."""
        constant = math.nan if self.constant < _LITTLE else self.constant
        return np.asarray(1 - STATISTICS["kl"](sums) / constant)


def faithfulness(sums: Float[np.ndarray, "sequence column"], kept: int, total: int) -> Faithfulness:
    """Compute the statistics over all sequences."""
    whole = sums.sum(0)
    numbers = {name: float(statistic(whole)) for name, statistic in STATISTICS.items()}
    return Faithfulness(**numbers, kept=kept, total=total, fraction=kept / total)


def bootstrap(
    sums: Float[np.ndarray, "sequence column"], *, draws: int = 1000, seed: int = 0
) -> Float[np.ndarray, "draw column"]:
    """Resample the sequences with replacement `draws` times and return the total of each resample (Efron 1979).

    The same seed gives the same resamples, so the draws of two models on the same text are paired.
    """
    rng = np.random.default_rng(seed)
    share = np.full(len(sums), 1 / len(sums))
    return np.stack([rng.multinomial(len(sums), share) @ sums for _ in range(draws)])


def check_seed(seed: Any) -> None:
    """Raise ValueError unless it is a whole number of at least 0."""
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"a seed must be a whole number, 0 or more, not {seed!r}")


def interval(values: Float[np.ndarray, " draw"], level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of bootstrap draws; (nan, nan) if any draw is undefined."""
    if np.isnan(values).any():
        return (math.nan, math.nan)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high))


def holm(log_ps: Sequence[float]) -> list[float]:
    """Adjust log p-values for multiple comparisons with Holm's step-down method (Holm 1979), in the given order.

    An undefined p-value (nan) stays nan and is not counted as a comparison.
    """
    known = int(len(log_ps) - np.isnan(log_ps).sum())
    order = np.argsort(log_ps, kind="stable")[:known]  # nan comes last
    adjusted = np.full(len(log_ps), np.nan)
    highest = -math.inf
    for rank, place in enumerate(order):
        highest = max(highest, min(0.0, log_ps[place] + math.log(known - rank)))
        adjusted[place] = highest
    return adjusted.tolist()


def mean_over_log_size(fractions: Float[np.ndarray, " size"], values: Float[np.ndarray, " size"]) -> float:
    """Average a curve of values over log10(size): the area by the trapezoid rule, divided by the width.

    For faithfulness values this is the circuit performance ratio (CPR) of Mueller et al. 2025 (arXiv 2504.13151), and
    for their distance from 1 the circuit-model distance (CMD), on a log axis instead of a linear one.

    Raises:
        ValueError: If there are fewer than two different sizes, or a size is not above 0.
    """
    if len(fractions) < 2 or (fractions <= 0).any() or len(np.unique(fractions)) < 2:
        raise ValueError(f"a curve needs at least two different sizes above 0, not {fractions.tolist()}")
    order = np.argsort(fractions)
    x, y = np.log10(fractions[order]), values[order]
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def size_reaching(
    sizes: Float[np.ndarray, " size"], losses: Float[np.ndarray, " size"], wanted: float
) -> tuple[float, float]:
    """Return the ends of the range in which a curve of losses by size first comes down to a wanted loss.

    Between two measured sizes the loss is interpolated linearly over log(size), and both ends are the size found. Where
    the wanted loss is out of the curve's range, the ends are (0, smallest size) or (largest size, inf).
    """
    order = np.argsort(sizes)
    sizes, losses = sizes[order], losses[order]
    reached = np.flatnonzero(losses <= wanted)
    if not len(reached):
        return float(sizes[-1]), math.inf
    at = int(reached[0])
    if at == 0:
        return (float(sizes[0]) if losses[0] == wanted else 0.0), float(sizes[0])
    way = (losses[at - 1] - wanted) / (losses[at - 1] - losses[at])
    size = float(sizes[at - 1] * (sizes[at] / sizes[at - 1]) ** way)
    return size, size
