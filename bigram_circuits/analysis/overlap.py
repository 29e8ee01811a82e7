"""The overlap of two subnetworks, and that of random ones of the same sizes.

The null hypothesis: `b` is fixed, and `a` is drawn uniformly among all sets with as many weights in every weight
matrix. The overlap in matrix i, of N_i weights of which `a` keeps a_i and `b` keeps b_i, is then hypergeometric,

    P(X_i = x) = C(a_i, x) C(N_i - a_i, b_i - x) / C(N_i, b_i),   mean a_i b_i / N_i,
    variance a_i b_i (N_i - a_i) (N_i - b_i) / (N_i^2 (N_i - 1)),

independent between matrices, so means and variances add. A preference of both subnetworks for the same matrices is no
evidence under this null, which conditions on it. By head, the null conditions on more: `a` is uniform among sets with
as many weights in every head's slice of every attention matrix.

Of two circuits over the same nodes, nodes are counted in place of weights, and hook points (the nodes of one kind in
one layer) stand for matrices.

Tail probabilities of the sum are exact up to rounding, however small. Every X_i is tilted exponentially, by the
factor exp(t x), so that the mean of the sum is near the observed overlap. The tilted probabilities (Fisher's noncentral
hypergeometric) are combined by convolution and tilted back:

    P(X >= x0) = exp(K(t) - t x0) sum_{x >= x0} q(x) exp(-t (x - x0)),   K(t) = sum_i log E exp(t X_i).

Each X_i is restricted to values within 12 tilted standard deviations (plus 40) of its mode; the rest has less than
1e-20 of its mass. The tilt is that of the saddlepoint approximation (Daniels 1954), but nothing is approximated.

Effect sizes: log2 of observed over expected, and Cole's coefficient of association (Cole 1949), here `excess`: 0 for
the expected overlap, 1 for the largest and -1 for the smallest that the counts allow.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from bigram_circuits.analysis.conditions import check_of_weights
from bigram_circuits.analysis.registry import Subject, in_suite
from bigram_circuits.circuit import Circuit, place_label
from bigram_circuits.masking.apply import Mask, MaskLike, as_mask
from bigram_circuits.measures import statistics
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Effects, Maps
from bigram_circuits.models.activations import NotShownError
from bigram_circuits.names import ATTENTION_MATRICES, WeightName, head_label, key_value_label
from bigram_circuits.subnetwork import Subnetwork

_DEVIATIONS = 12  # half the width of a window, in standard deviations,
_MARGIN = 40  # plus this, because the tail of a small count is longer than a normal one
_LARGEST_TILT = 200.0
_STRATA = ("matrix", "component", "head")
_ALTERNATIVES = ("greater", "less", "two-sided")

_QUANTITIES = (
    Quantity("jaccard", "share", "Weights kept by both, as a share of those kept by either."),
    Quantity("intersection", "weights", "Weights kept by both."),
    Quantity("kept_a", "weights", "Weights kept by the first."),
    Quantity("kept_b", "weights", "Weights kept by the second."),
    Quantity("share_of_a_in_b", "share", "Share of the weights kept by the first that the second keeps."),
    Quantity("share_of_b_in_a", "share", "Share of the weights kept by the second that the first keeps."),
    Quantity("expected", "weights", "Expected intersection under the null."),
    Quantity("sd", "weights", "Standard deviation of the intersection under the null."),
    Quantity("z", "", "Intersection minus expected, in standard deviations."),
    Quantity("log2_ratio", "bits", "log2 of intersection over expected; undefined where one of them is 0."),
    Quantity("excess", "", "Cole's coefficient: 0 as expected, 1 the largest possible, -1 the smallest possible."),
    Quantity("p", "", "Exact p-value under the null; if too small for a float, the smallest float."),
    Quantity("log10_p", "", "log10 of the p-value, exact even if p is too small for a float."),
    Quantity("p_adjusted", "", "p after Holm's correction for the number of strata; of `all`, p itself."),
)
_OF_NODES = tuple(
    Quantity(
        one.name,
        one.unit.replace("weights", "nodes"),
        one.meaning.replace("Weights", "Nodes").replace("weights", "nodes"),
    )
    for one in _QUANTITIES
)
_PLACES = {"subnetwork": "weights in every weight matrix", "circuit": "nodes at every hook point"}


@dataclass(frozen=True)
class Cell:
    """A set of weights or nodes within which the null hypothesis draws uniformly, with the numbers that are kept."""

    total: int
    """Its size."""
    a: int
    """Number kept by the first subnetwork."""
    b: int
    """Number kept by the second."""
    both: int
    """Number kept by both."""

    @property
    def least(self) -> int:
        """The smallest overlap that the counts allow."""
        return max(0, self.a + self.b - self.total)

    @property
    def most(self) -> int:
        """The largest overlap that the counts allow."""
        return min(self.a, self.b)

    @property
    def mean(self) -> float:
        """Expected overlap."""
        return self.a * self.b / self.total

    @property
    def variance(self) -> float:
        """Variance of the overlap."""
        if self.total < 2:
            return 0.0
        return self.mean * (self.total - self.a) / self.total * (self.total - self.b) / (self.total - 1)

    def mirrored(self) -> Cell:
        """The same cell, counting weights kept only by the second: its upper tail is this one's lower tail."""
        return Cell(self.total, self.total - self.a, self.b, self.b - self.both)


def overlap(a: MaskLike, b: MaskLike, *, by: str = "matrix", alternative: str = "greater") -> Effects:
    """Test the overlap of two subnetworks, or two circuits, against the exact null of independent draws.

    Args:
        a: The first subnetwork or circuit.
        b: The second, of the same shapes.
        by: Strata beside `all`: every weight `matrix` (of circuits, every hook point), every `component` (a block's
            attention or MLP; of circuits, the nodes of one kind in one layer), or, of subnetworks, every attention
            `head`. `all` and the first two are tested given the counts in every matrix; heads given the
            counts in the head's slice of every matrix. With grouped queries W_K and W_V belong to no single query
            head and get strata of their own, `L0KV1`.
        alternative: The alternative hypothesis: an overlap that is `greater` or `less` than chance, or `two-sided`
            (twice the smaller tail).

    Returns:
        A row for `all` (all maskable weights) and for every stratum; p-values of the strata are adjusted by Holm's
        method over those strata whose overlap is not determined by the counts alone.

    Raises:
        ValueError: If the shapes differ, one is a subnetwork and the other a circuit, one keeps nothing, or an argument
            is not one of its choices.

    Example:
        >>> largest = bc.Subnetwork.magnitude(model, like=found)
        >>> bc.overlap(found, largest).to_dataframe()  # shared weights, beside what chance gives
    """
    for name, value, choices in (("by", by, _STRATA), ("alternative", alternative, _ALTERNATIVES)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    a, b = as_mask(a), as_mask(b)
    matrices = _matrix_cells(a, b)
    if by == "head":
        strata = _head_cells(check_of_weights(a, "the overlap by head"), check_of_weights(b, "the overlap by head"))
    else:
        strata = {}
        for name, cell in matrices.items():
            strata.setdefault(name if by == "matrix" else _component(a, name), []).append(cell)
    logs = {name: log_p_value(cells, alternative) for name, cells in strata.items()}
    open_ones = [name for name, cells in strata.items() if any(cell.most > cell.least for cell in cells)]
    adjusted = dict.fromkeys(strata, 0.0) | dict(
        zip(open_ones, statistics.holm([logs[name] for name in open_ones]), strict=True)
    )
    everything = list(matrices.values())
    log_p = log_p_value(everything, alternative)
    rows = [
        _row(everything, log_p, log_p),
        *(_row(cells, logs[name], adjusted[name]) for name, cells in strata.items()),
    ]
    values = np.array(rows).T
    null = f"as many {_PLACES[a.noun]}"
    if by == "head":
        null += "; for heads: as many in the head's slice of every weight matrix"
    return Effects(
        title=f"Overlap of {a.lineage} with {b.lineage}",
        quantities=_QUANTITIES if a.units == "weights" else _OF_NODES,
        subject=by if a.units == "weights" and by != "matrix" else a.units,
        names=("all", *strata),
        values=values,
        low=np.full(values.shape, np.nan),
        high=np.full(values.shape, np.nan),
        notes={
            "null": f"b fixed, a uniform among sets with {null}",
            "alternative": alternative,
            "adjustment": f"Holm, over {len(open_ones)} strata",
        },
    )


def overlaps(subnetworks: Mapping[str, MaskLike] | Sequence[MaskLike]) -> Maps:
    """Overlap of each pair of subnetworks, or circuits, of one model, for example those found with different seeds.

    Args:
        subnetworks: Subnetworks or circuits by name; or a list, named by lineage if lineages differ, else by number.

    Returns:
        A matrix for every quantity; `share_in` is the share of the row's weights that the column keeps. p-values are
        one-sided (greater) and not adjusted.

    Raises:
        ValueError: If there are fewer than two, shapes differ, or one keeps nothing.

    Example:
        >>> three = {"found": found, "random": found.subnetwork.random_like(), "all": bc.Subnetwork.full(model)}
        >>> analysis.overlaps(three).plot("jaccard")
    """
    named = _named(subnetworks)
    values = np.full((6, 1, len(named), len(named)), np.nan)
    for i, a in enumerate(named.values()):
        for j, b in enumerate(named.values()):
            if j < i:
                continue
            cells = list(_matrix_cells(a, b).values())
            log_p = log_p_value(cells, "greater")
            row = dict(zip((one.name for one in _QUANTITIES), _row(cells, log_p, log_p), strict=True))
            symmetric = [row[name] for name in ("jaccard", "log2_ratio", "excess", "z", "log10_p")]
            values[:, 0, i, j] = [*symmetric, row["share_of_a_in_b"]]
            values[:, 0, j, i] = [*symmetric, row["share_of_b_in_a"]]
    known = {quantity.name: quantity for quantity in _QUANTITIES}
    one = next(iter(named.values()))
    share = Quantity(
        "share_in", "share", f"Share of the {one.units} kept by the row's {one.noun} that the column's keeps."
    )
    return Maps(
        title=f"Overlap between {one.noun}s",
        quantities=(*(known[name] for name in ("jaccard", "log2_ratio", "excess", "z", "log10_p")), share),
        row_axis=one.noun,
        rows=tuple(named),
        column_axis=one.noun,
        columns=tuple(named),
        conditions=(one.noun,),
        values=values,
        notes={"null": f"one fixed, the other uniform among sets with as many {_PLACES[one.noun]}"},
    )


def jaccard(a: Mask, b: Mask) -> float:
    """Jaccard index: weights or nodes kept by both over those kept by either; nan if neither keeps any."""
    both = _both(a, b).kept
    either = a.kept + b.kept - both
    return both / either if either else math.nan


def log_p_value(cells: Sequence[Cell], alternative: str = "greater") -> float:
    """Natural log of the exact p-value of the total overlap of independent cells."""
    greater = _log_upper_tail(cells)
    if alternative == "greater":
        return greater
    less = _log_upper_tail([cell.mirrored() for cell in cells])
    return less if alternative == "less" else min(0.0, math.log(2) + min(greater, less))


# --- counts ---


def _both(a: Any, b: Any) -> Mask:
    """What both keep; raises ValueError if one is a subnetwork and the other a circuit."""
    if type(a) is not type(b):
        raise ValueError(f"a {a.noun} and a {b.noun} have no overlap: one is of {a.units}, the other of {b.units}")
    return a & b


def _matrix_cells(a: Mask, b: Mask) -> dict[str, Cell]:
    both = _both(a, b)
    for which, one in (("first", a), ("second", b)):
        if one.kept == 0:
            unit = one.units.removesuffix("s")
            raise NotShownError(f"the {which} {one.noun} ({one.lineage}) keeps no {unit}, so there is no overlap")
    ours, theirs = a.by_name(), b.by_name()
    return {
        name: Cell(count.total, ours[name].kept, theirs[name].kept, count.kept)
        for name, count in both.by_name().items()
    }


def _component(mask: Mask, name: str) -> str:
    """The component of a matrix, or the kind and layer of a hook point."""
    return place_label(name) if isinstance(mask, Circuit) else WeightName.parse(name).part.label


def _head_cells(a: Subnetwork, b: Subnetwork) -> dict[str, list[Cell]]:
    strata: dict[tuple[int, bool, int], list[Cell]] = {}
    for name, shape in a.shapes.items():
        weight = WeightName.parse(name)
        if weight.matrix not in ATTENTION_MATRICES:
            continue
        shared = shape[0] != a.shapes[str(replace(weight, matrix="W_Q"))][0]
        for index, cell in enumerate(_slices(a, b, name)):
            strata.setdefault((weight.layer, shared, index), []).append(cell)
    if not strata:
        raise NotShownError("this subnetwork has no attention heads")
    label = {False: head_label, True: key_value_label}
    return {label[shared](layer, index): strata[layer, shared, index] for layer, shared, index in sorted(strata)}


def _slices(a: Subnetwork, b: Subnetwork, name: str) -> Iterator[Cell]:
    """A cell for every index of the first axis."""
    ours, theirs = a[name].flatten(1), b[name].flatten(1)
    counts = (ours.sum(1), theirs.sum(1), (ours & theirs).sum(1))
    for kept_a, kept_b, both in zip(*(count.tolist() for count in counts), strict=True):
        yield Cell(ours.shape[1], kept_a, kept_b, both)


def _named(subnetworks: Mapping[str, MaskLike] | Sequence[MaskLike]) -> dict[str, Mask]:
    if isinstance(subnetworks, Subnetwork | Circuit):
        raise ValueError("comparing subnetworks needs at least two, not 1")
    if isinstance(subnetworks, Mapping):
        named = {name: as_mask(one) for name, one in subnetworks.items()}
    else:
        items = [as_mask(one) for one in subnetworks]
        lineages = [one.lineage for one in items]
        distinct = len(set(lineages)) == len(items)
        named = dict(zip(lineages if distinct else map(str, range(len(items))), items, strict=True))
    if len(named) < 2:
        raise ValueError(f"comparing subnetworks needs at least two, not {len(named)}")
    return named


def _row(cells: Sequence[Cell], log_p: float, log_adjusted: float) -> list[float | int]:
    """The values of a stratum, in the order of the quantities."""
    kept_a, kept_b, both = (sum(getattr(cell, name) for cell in cells) for name in ("a", "b", "both"))
    mean, sd = sum(cell.mean for cell in cells), math.sqrt(sum(cell.variance for cell in cells))
    most, least = sum(cell.most for cell in cells), sum(cell.least for cell in cells)
    room = most - mean if both >= mean else mean - least
    either = kept_a + kept_b - both
    return [
        _ratio(both, either),
        both,
        kept_a,
        kept_b,
        _ratio(both, kept_a),
        _ratio(both, kept_b),
        mean,
        sd,
        _ratio(both - mean, sd),
        math.log2(both / mean) if both and mean else math.nan,
        _ratio(both - mean, room) if most > least else math.nan,
        _probability(log_p),
        log_p / math.log(10),
        _probability(log_adjusted),
    ]


def _ratio(above: float | int, below: float | int) -> float | int:
    return above / below if below else math.nan


def _probability(log_p: float) -> float:
    return min(1.0, max(math.exp(log_p), sys.float_info.min))


# --- the exact tail ---


def _log_upper_tail(cells: Sequence[Cell]) -> float:
    """Log of P(X >= observed) for X the total overlap of independent cells."""
    from scipy.signal import convolve  # takes a second to import, which every command would wait for

    observed = sum(cell.both for cell in cells)
    settled = sum(cell.least for cell in cells if cell.least == cell.most)
    cells = [cell for cell in cells if cell.most > cell.least]
    observed -= settled
    if observed <= sum(cell.least for cell in cells):
        return 0.0
    if observed == sum(cell.most for cell in cells):
        return sum(_log_weight(cell, cell.most) for cell in cells)
    tilt = _tilt(cells, observed)
    start, probabilities, cumulant = 0, np.ones(1), 0.0
    for cell in cells:
        first, tilted, log_total = _tilted(cell, tilt)
        start += first
        probabilities = np.maximum(convolve(probabilities, tilted), 0.0)  # rounding in the FFT can give values below 0
        cumulant += log_total
    x = start + np.arange(len(probabilities))
    upper = x >= observed
    with np.errstate(divide="ignore"):
        log_sum = _log_sum_exp(np.log(probabilities[upper]) - tilt * (x[upper] - observed))
    return min(0.0, cumulant - tilt * observed + log_sum)


def _log_weight(cell: Cell, x: int) -> float:
    """Log of the hypergeometric probability P(X = x)."""
    first, second = _log_choose(cell.a, x), _log_choose(cell.total - cell.a, cell.b - x)
    return first + second - _log_choose(cell.total, cell.b)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _log_sum_exp(logs: Float[np.ndarray, " x"]) -> float:
    peak = float(logs.max())
    return peak + math.log(float(np.exp(logs - peak).sum()))


def _tilted(cell: Cell, tilt: float) -> tuple[int, Float[np.ndarray, " x"], float]:
    """The tilted probabilities of a cell in its window: first value, probabilities, log E exp(tilt X)."""
    mode = min(max(round(_tilted_mean(cell, tilt)), cell.least), cell.most)
    terms = (mode, cell.a - mode, cell.b - mode, cell.total - cell.a - cell.b + mode)
    sd = 1 / math.sqrt(sum(1 / max(term, 0.5) for term in terms))
    half = math.ceil(_DEVIATIONS * sd) + _MARGIN
    x = np.arange(max(cell.least, mode - half), min(cell.most, mode + half) + 1)
    before = x[:-1].astype(float)  # ratios of neighbours: exact where the logarithms of large factorials are not
    up = (cell.a - before) * (cell.b - before) / ((before + 1) * (cell.total - cell.a - cell.b + before + 1))
    logs = np.concatenate([[0.0], np.cumsum(np.log(up) + tilt)])
    logs -= logs[mode - x[0]]
    normaliser = _log_sum_exp(logs)
    if tilt == 0:
        return int(x[0]), np.exp(logs - normaliser), 0.0
    at_mode = _log_weight(cell, mode) + tilt * mode
    return int(x[0]), np.exp(logs - normaliser), at_mode + normaliser


def _tilted_mean(cell: Cell, tilt: float) -> float:
    """Approximate mean of a tilted cell: the root of x (N - a - b + x) = exp(tilt) (a - x) (b - x) (Cornfield 1956)."""
    inverse = math.exp(-tilt)
    linear = cell.a + cell.b + (cell.total - cell.a - cell.b) * inverse
    root = math.sqrt(max(0.0, linear**2 - 4 * (1 - inverse) * cell.a * cell.b))
    return 2 * cell.a * cell.b / (linear + root)


def _tilt(cells: Sequence[Cell], observed: int) -> float:
    """The tilt, at least 0, at which the mean of the sum is approximately the observed overlap."""
    low, high = 0.0, _LARGEST_TILT
    if observed <= sum(cell.mean for cell in cells):
        return low
    for _ in range(60):
        middle = (low + high) / 2
        if sum(_tilted_mean(cell, middle) for cell in cells) < observed:
            low = middle
        else:
            high = middle
    return low


# --- steps of `analyze` ---


@in_suite("overlap_magnitude")
def _(subject: Subject) -> Effects:
    return overlap(subject.subnetwork, subject.largest, by="component")
