import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigram_circuits.measures import statistics
from bigram_circuits.measures.statistics import (
    COLUMNS,
    bootstrap,
    correlation,
    faithfulness,
    interval,
    mean,
    surprisals,
)


def sums_of(x, y) -> np.ndarray:
    """A row of sums for each sequence of surprisals x (the model's) and y (the target's, infinite where it has 0)."""
    used = np.isfinite(y)
    y_used, x_used = np.where(used, y, 0.0), x * used
    one = np.ones_like(x)
    columns = {
        "used": used, "x": x_used, "y": y_used, "xx": x_used**2, "yy": y_used**2, "xy": x_used * y_used,
        "positions": one, "surprisal": x, "places": one, "cross_entropy": 2 * x, "kl": 3 * x, "agree": x > 0,
    }  # fmt: skip
    assert tuple(columns) == COLUMNS
    return np.stack([np.asarray(column, float).sum(1) for column in columns.values()], 1)


@pytest.mark.parametrize("at_once", [1, 30, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_surprisals_are_torch_s_cross_entropy_of_the_next_token(monkeypatch, at_once, dtype):
    monkeypatch.setattr(statistics, "_LOGITS_AT_ONCE", at_once)
    logits = (5 * torch.randn(3, 7, 11)).to(dtype)
    tokens = torch.randint(0, 11, (3, 7))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].float().mT, tokens[:, 1:], reduction="none")
    actual = surprisals(logits, tokens)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(surprisals(logits, tokens.int()), expected)


def test_surprisals_of_sequences_of_one_token_are_none():
    assert surprisals(torch.zeros(2, 1, 5), torch.zeros(2, 1, dtype=torch.long)).shape == (2, 0)


@given(seed=st.integers(0, 999), shift=st.sampled_from([0.0, 100.0]), share=st.sampled_from([0.0, 0.3]))
def test_the_correlation_from_sums_is_numpy_s_over_the_positions_with_a_finite_target(seed, shift, share):
    rng = np.random.default_rng(seed)
    x = rng.exponential(3.0, (8, 12)) + shift
    y = 0.3 * x + rng.exponential(1.0, x.shape)
    y[rng.random(x.shape) < share] = np.inf
    used = np.isfinite(y)
    sums = sums_of(x, y)
    assert correlation(sums.sum(0)) == pytest.approx(np.corrcoef(x[used], y[used])[0, 1], abs=1e-8)
    assert correlation(sums) == pytest.approx([np.corrcoef(x[i][used[i]], y[i][used[i]])[0, 1] for i in range(8)])
    assert sums.sum(0)[COLUMNS.index("used")] == used.sum()


@pytest.mark.parametrize("constant", [0.0, 0.1, 5.545177444479562])
def test_the_correlation_with_a_constant_or_of_one_position_is_undefined(constant):
    rng = np.random.default_rng(0)
    varied, same = rng.exponential(3.0, (50, 200)), np.full((50, 200), constant)
    for x, y in ((varied, same), (same, varied), (same, same), (varied[:1, :1], varied[:1, 1:2])):
        assert np.isnan(correlation(sums_of(x, y).sum(0)))
    nowhere = sums_of(varied, np.full_like(varied, np.inf))
    assert np.isnan(correlation(nowhere.sum(0)))
    assert not np.isnan(correlation(sums_of(varied, same + 1e-3 * varied).sum(0)))  # hardly varied, but not constant


def test_means_are_per_position_of_their_own_kind():
    rng = np.random.default_rng(0)
    x = rng.normal(1.0, 1.0, (9, 5))
    y = np.where(rng.random(x.shape) < 0.5, np.inf, 1.0 * rng.random(x.shape))
    sums = sums_of(x, y)
    sums[:, COLUMNS.index("places")] += 1  # a sequence has one place more than next tokens
    result = faithfulness(sums, kept=3, total=12)
    assert result.mean_surprisal == pytest.approx(x.mean())  # also where the target has probability 0
    assert result.cross_entropy == pytest.approx(2 * x.sum() / (9 * 6))
    assert result.kl == pytest.approx(3 * x.sum() / (9 * 6))
    assert result.top1_agreement == pytest.approx((x > 0).sum() / (9 * 6))
    assert result.surprisal_correlation == pytest.approx(correlation(sums.sum(0)))
    assert (result.kept, result.total, result.fraction) == (3, 12, 0.25)
    assert mean(sums, "surprisal") == pytest.approx(x.mean(1))


def test_an_undefined_number_is_none_in_json():
    sums = sums_of(np.ones((2, 3)), np.ones((2, 3)))
    result = faithfulness(sums, kept=0, total=4).to_json()
    assert result["surprisal_correlation"] is None
    assert result["cross_entropy"] == 2.0
    assert result["kept"] == 0


def test_bootstrap_draws_are_sums_of_as_many_sequences_and_pair_by_seed():
    sums = sums_of(np.arange(12.0).reshape(4, 3), np.ones((4, 3)))
    draws = bootstrap(sums, draws=50)
    assert draws.shape == (50, len(COLUMNS))
    assert (draws[:, COLUMNS.index("positions")] == sums[:, COLUMNS.index("positions")].sum()).all()
    assert len(np.unique(draws[:, COLUMNS.index("x")])) > 5
    np.testing.assert_array_equal(draws, bootstrap(sums, draws=50))
    np.testing.assert_allclose(2 * draws, bootstrap(2 * sums, draws=50))  # the same sequences for another model
    assert not np.array_equal(draws, bootstrap(sums, draws=50, seed=1))


def test_the_95_percent_interval_covers_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(200):  # sequences differ in their own means: positions within one are not independent
        x = rng.normal(1.0, 1.0, (60, 1)) + rng.normal(0.0, 0.5, (60, 4))
        low, high = interval(mean(bootstrap(sums_of(x, x), draws=200), "surprisal"))
        covered.append(low <= 1.0 <= high)
    assert 0.89 <= np.mean(covered) <= 0.985  # 0.95, less a little for 60 sequences, within 3 standard deviations


def test_an_interval_is_of_the_level_asked_for_and_undefined_with_an_undefined_draw():
    values = np.linspace(0.0, 1.0, 1001)
    assert interval(values) == pytest.approx((0.025, 0.975))
    assert interval(values, 0.5) == pytest.approx((0.25, 0.75))
    assert all(math.isnan(end) for end in interval(np.append(values, np.nan)))


def test_holm_is_monotone_and_the_textbook_s():
    logs = [math.log(p) for p in (0.01, 0.04, 0.03, 0.005)]
    assert np.exp(statistics.holm(logs)) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([]) == []
    rng = np.random.default_rng(0)
    ps = np.sort(rng.random(50))
    adjusted = np.exp(statistics.holm(np.log(ps).tolist()))
    assert (np.diff(adjusted) >= 0).all()
    assert (adjusted >= ps).all()
    assert adjusted.max() <= 1
    assert np.exp(statistics.holm([math.log(0.6), math.log(0.9)])) == pytest.approx([1, 1])
