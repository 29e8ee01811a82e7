import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

import bigram_circuits as bc
from bigram_circuits.analysis.overlap import Cell, jaccard, log_p_value, overlap, overlaps
from bigram_circuits.measures import results

SHAPES = {
    "blocks.0.attn.W_Q": (2, 6, 3), "blocks.0.attn.W_K": (2, 6, 3), "blocks.0.attn.W_V": (2, 6, 3),
    "blocks.0.attn.W_O": (2, 3, 6), "blocks.0.mlp.W_in": (6, 10), "blocks.0.mlp.W_out": (10, 6),
}  # fmt: skip


def random_masks(seed: int, density: float = 0.3, shapes=SHAPES) -> bc.Subnetwork:
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()}
    return bc.Subnetwork(masks, lineage=f"draw {seed}")


def brute_force(cells: list[Cell]) -> float:
    """P(total >= observed) by adding up every combination."""
    observed = sum(cell.both for cell in cells)
    total = 0.0
    for xs in itertools.product(*(range(cell.least, cell.most + 1) for cell in cells)):
        if sum(xs) >= observed:
            pairs = zip(cells, xs, strict=True)
            total += math.prod(stats.hypergeom.pmf(x, cell.total, cell.a, cell.b) for cell, x in pairs)
    return total


def test_counts_and_shares_are_those_of_the_sets():
    a, b = random_masks(0), random_masks(1, 0.5)
    result = overlap(a, b)
    both = sum(int((a[name] & b[name]).sum()) for name in a)
    either = sum(int((a[name] | b[name]).sum()) for name in a)
    assert result.names == ("all", *SHAPES)
    assert result.get("intersection")["all"] == both
    assert result.get("jaccard")["all"] == pytest.approx(both / either)
    assert result.get("share_of_a_in_b")["all"] == pytest.approx(both / a.kept)
    assert result.get("share_of_b_in_a")["all"] == pytest.approx(both / b.kept)
    assert sum(value for name, value in result.get("intersection").items() if name != "all") == both


def test_mean_sd_and_p_of_one_matrix_are_the_hypergeometric_s():
    a, b = random_masks(0), random_masks(1, 0.5)
    result = overlap(a, b)
    for name, shape in SHAPES.items():
        null = stats.hypergeom(math.prod(shape), a.by_weight()[name].kept, b.by_weight()[name].kept)
        assert result.get("expected")[name] == pytest.approx(null.mean())
        assert result.get("sd")[name] == pytest.approx(null.std())
        assert result.get("p")[name] == pytest.approx(null.sf(result.get("intersection")[name] - 1))
    variances = [result.get("sd")[name] ** 2 for name in SHAPES]
    assert result.get("sd")["all"] == pytest.approx(math.sqrt(sum(variances)))


@pytest.mark.parametrize(
    "counts",
    [
        [(10, 4, 5, 3), (8, 3, 2, 1), (12, 6, 6, 5)],
        [(10, 4, 5, 4), (8, 3, 2, 2), (12, 6, 6, 5)],  # one short of the most
        [(10, 4, 5, 4), (8, 3, 2, 2)],  # the most
        [(10, 4, 5, 0), (8, 3, 2, 0)],  # the least
        [(10, 9, 8, 7), (5, 5, 3, 3), (6, 0, 4, 0)],  # some are settled by their counts
        [(10, 2, 5, 0), (8, 3, 2, 1), (12, 6, 6, 2)],  # below the mean
    ],
)
def test_the_convolution_is_what_adding_up_all_combinations_gives(counts):
    cells = [Cell(*one) for one in counts]
    assert math.exp(log_p_value(cells)) == pytest.approx(brute_force(cells), rel=1e-9)
    mirrored = [cell.mirrored() for cell in cells]
    assert math.exp(log_p_value(cells, "less")) == pytest.approx(brute_force(mirrored), rel=1e-9)
    two = min(1, 2 * min(brute_force(cells), brute_force(mirrored)))
    assert math.exp(log_p_value(cells, "two-sided")) == pytest.approx(two, rel=1e-9)


@pytest.mark.parametrize("both", [50, 200, 300, 1000, 9_999, 10_000])
def test_tails_are_right_far_out(both):
    """Against a sum over the whole support in logarithms, down to 10 to the minus thousands."""
    cell = Cell(1_000_000, 10_000, 20_000, both)
    x = np.arange(both, 10_001)
    log_pmf = stats.hypergeom.logpmf(x, 1_000_000, 10_000, 20_000)
    peak = log_pmf.max()
    assert log_p_value([cell]) == pytest.approx(
        min(0.0, peak + math.log(np.exp(log_pmf - peak).sum())), rel=1e-7, abs=1e-7
    )


def test_a_billion_weights_take_no_time():
    cells = [Cell(64_000_000, 9_000_000, 8_000_000, 1_125_000 + 200 * i) for i in range(16)]
    z = (sum(c.both for c in cells) - sum(c.mean for c in cells)) / math.sqrt(sum(c.variance for c in cells))
    assert log_p_value(cells) == pytest.approx(stats.norm.logsf(z), rel=0.02)


def test_identical_subnetworks():
    a = random_masks(0)
    result = overlap(a, a.named("again"))
    assert result.get("jaccard")["all"] == 1
    assert result.get("excess")["all"] == pytest.approx(1)
    assert result.get("log2_ratio")["all"] > 1
    assert 0 < result.get("p")["all"] < 1e-50
    assert result.get("p_adjusted")["blocks.0.mlp.W_in"] < 1e-6


def test_p_is_never_zero():
    shapes = {"blocks.0.mlp.W_in": (100, 100)}
    result = overlap(random_masks(0, shapes=shapes), random_masks(0, shapes=shapes))
    assert result.get("p")["all"] > 0
    assert result.get("log10_p")["all"] < -1000


def test_a_subnetwork_and_its_complement():
    a = random_masks(0)
    result = overlap(a, ~a)
    assert result.get("intersection")["all"] == result.get("jaccard")["all"] == 0
    assert result.get("excess")["all"] == pytest.approx(-1)
    assert result.get("p")["all"] == 1
    assert math.isnan(result.get("log2_ratio")["all"])
    assert overlap(a, ~a, alternative="less").get("p")["all"] < 1e-30
    assert overlap(a, ~a, alternative="two-sided").get("p")["all"] < 1e-30


@pytest.mark.parametrize("by", ["matrix", "head"])
def test_the_null_is_what_random_draws_do(by):
    """Draws of `random_like`: mean, spread and the level of the test."""
    draws = 1000 if by == "matrix" else 500
    shapes = {"blocks.0.attn.W_Q": (1, 12, 10), "blocks.0.attn.W_O": (1, 10, 12), "blocks.0.mlp.W_in": (12, 20)}
    a, b = random_masks(3, shapes=shapes), random_masks(4, 0.5, shapes)
    results_of = [overlap(a.random_like(seed), b, by=by) for seed in range(draws)]
    row = "all" if by == "matrix" else "L0H0"  # one head: its slices are the matrices
    seen = np.array([one.get("intersection")[row] for one in results_of])
    null = results_of[0]
    mean, sd = null.get("expected")[row], null.get("sd")[row]
    assert seen.mean() == pytest.approx(mean, abs=4 * sd / math.sqrt(len(seen)))
    assert seen.std() == pytest.approx(sd, rel=0.08)
    p = np.array([one.get("p")[row] for one in results_of])
    for level in (0.01, 0.05, 0.2, 0.5):  # a discrete test keeps its level; it is short of it by one step at most
        share, error = (p <= level).mean(), 4 * math.sqrt(level / len(p))
        step = stats.hypergeom.pmf(round(mean), 480, a.kept, b.kept) if by == "matrix" else 0.1
        assert level - 1.5 * step - error <= share <= level + error


def test_independent_subnetworks_are_not_significant():
    assert overlap(random_masks(5), random_masks(6)).get("p")["all"] > 0.01
    assert abs(overlap(random_masks(5), random_masks(6)).get("z")["all"]) < 3


def test_liking_the_same_matrix_is_no_evidence():
    """Two subnetworks that sit in one matrix overlap a lot and yet as much as chance says."""
    a, b = random_masks(7, 0.5), random_masks(8, 0.5)
    keep = bc.Subnetwork({name: torch.full(s, name.endswith("W_in")) for name, s in SHAPES.items()})
    result = overlap(a & keep, b & keep)
    assert result.get("jaccard")["all"] > 0.2
    assert result.get("p")["all"] > 0.01
    assert result.get("p_adjusted")["blocks.0.attn.W_Q"] == 1  # nothing there to test
    assert result.notes["adjustment"] == "Holm, over 1 strata"


def test_components_and_heads_add_up():
    a, b = random_masks(0), random_masks(1)
    by_component = overlap(a, b, by="component").get("intersection")
    by_head = overlap(a, b, by="head").get("intersection")
    assert list(by_component) == ["all", "L0.attn", "L0.mlp"]
    assert list(by_head) == ["all", "L0H0", "L0H1"]
    assert by_head["L0H0"] + by_head["L0H1"] == by_component["L0.attn"]
    assert by_component["all"] == by_head["all"] == by_component["L0.attn"] + by_component["L0.mlp"]
    expected = sum(
        int(a[name][1].sum()) * int(b[name][1].sum()) / a[name][1].numel() for name in SHAPES if "attn" in name
    )
    assert overlap(a, b, by="head").get("expected")["L0H1"] == pytest.approx(expected)


def test_shared_keys_and_values_get_strata_of_their_own():
    shapes = SHAPES | {"blocks.0.attn.W_K": (1, 6, 3), "blocks.0.attn.W_V": (1, 6, 3)}
    result = overlap(random_masks(0, shapes=shapes), random_masks(1, shapes=shapes), by="head")
    assert result.names == ("all", "L0H0", "L0H1", "L0KV0")


def test_pairs_of_seeds(tmp_path):
    seeds = {f"seed {i}": random_masks(i) for i in range(3)} | {"seed 0 again": random_masks(0)}
    result = overlaps(seeds)
    table = result.get("jaccard", "subnetwork")
    assert np.allclose(table, table.T)
    assert np.allclose(np.diag(table), 1)
    assert table[0, 3] == 1
    assert table[0, 1] == pytest.approx(jaccard(seeds["seed 0"], seeds["seed 1"]))
    share = result.get("share_in", "subnetwork")
    assert share[0, 1] == pytest.approx((seeds["seed 0"] & seeds["seed 1"]).kept / seeds["seed 0"].kept)
    assert result.get("log10_p", "subnetwork")[0, 3] < -50 < result.get("log10_p", "subnetwork")[0, 1]
    result.save(tmp_path / "pairs.json")
    assert results.load_result(tmp_path / "pairs.json").rows == result.rows
    assert overlaps(list(seeds.values())).rows == ("0", "1", "2", "3")  # two of them have one lineage
    assert overlaps([random_masks(1), random_masks(2)]).rows == ("draw 1", "draw 2")


def test_what_cannot_be_compared_is_said_in_one_line():
    a = random_masks(0)
    smaller = {name: shape for name, shape in SHAPES.items() if "mlp" in name}
    with pytest.raises(ValueError, match=r"W_Q has shape"):
        overlap(a, random_masks(0, shapes=smaller))
    with pytest.raises(ValueError, match=r"the second subnetwork \(.*\) keeps no weight"):
        overlap(a, a - a)
    with pytest.raises(ValueError, match="by must be one of matrix, component, head, not 'layer'"):
        overlap(a, a, by="layer")
    with pytest.raises(ValueError, match="alternative must be one of"):
        overlap(a, a, alternative="more")
    with pytest.raises(ValueError, match="no attention heads"):
        overlap(random_masks(0, shapes=smaller), random_masks(1, shapes=smaller), by="head")
    with pytest.raises(ValueError, match="at least two, not 1"):
        overlaps([a])
