"""Rank correlations and their bootstrap against scipy on the very same resamples."""

import numpy as np
import pytest
from scipy import stats

from jaxvision.core.errors import ConfigError
from jaxvision.metrics import ranking

ROWS, RESAMPLES = 37, 40


@pytest.fixture(scope="module")
def data():
    """Scores with many ties, with none, with -inf; a truth with some ties."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 5, ROWS)
    fine = coarse + generator.normal(size=ROWS)
    truth = np.round(fine + generator.normal(size=ROWS), 1)
    return {"coarse": coarse, "fine": fine, "lowest": np.where(coarse == 0, -np.inf, -fine)}, truth


def rows_of(resamples, seed):
    """The rows of each resample."""
    counts = np.concatenate(list(ranking._counts(ROWS, resamples, seed)), 1)
    assert counts.shape == (ROWS, resamples) and (counts.sum(0) == ROWS).all()
    return [np.repeat(np.arange(ROWS), column.astype(int)) for column in counts.T]


def test_values_and_every_resample_are_scipys(data):
    scores, truth = data
    found = ranking.correlations(scores, truth, resamples=RESAMPLES, seed=3)
    for name, values in scores.items():
        values = np.where(np.isinf(values), -1e9, values)
        assert found[name].kendall == pytest.approx(stats.kendalltau(values, truth).statistic, rel=1e-12)
        assert found[name].spearman == pytest.approx(stats.spearmanr(values, truth).statistic, rel=1e-12)
        assert found[name].kendall == pytest.approx(ranking.kendall_tau(scores[name], truth), rel=1e-12)
        assert found[name].spearman == pytest.approx(ranking.spearman_rho(scores[name], truth), rel=1e-12)
        for draw, rows in enumerate(rows_of(RESAMPLES, 3)):
            tau, rho = found[name].draws["kendall"][draw], found[name].draws["spearman"][draw]
            assert tau == pytest.approx(stats.kendalltau(values[rows], truth[rows]).statistic, rel=1e-12)
            assert rho == pytest.approx(stats.spearmanr(values[rows], truth[rows]).statistic, rel=1e-12)


def test_intervals_are_percentiles_and_differences_are_paired(data):
    scores, truth = data
    found = ranking.correlations(scores, truth, resamples=400)
    for statistic in ranking.STATISTICS:
        draws = found["fine"].draws[statistic]
        interval = found["fine"].interval(statistic, 0.9)
        assert (interval.low, interval.high) == tuple(np.quantile(draws, [0.05, 0.95]))
        gap = ranking.difference(found["fine"], found["lowest"], statistic)
        assert 0 < gap.low < getattr(found["fine"], statistic) - getattr(found["lowest"], statistic) < gap.high
    nothing = ranking.difference(found["fine"], found["fine"])
    assert nothing == ranking.Interval(0.0, 0.0)
    again = ranking.correlations({"fine": scores["fine"]}, truth, resamples=400)
    np.testing.assert_array_equal(again["fine"].draws["kendall"], found["fine"].draws["kendall"])


def test_the_interval_covers():
    """tau of a correlated normal pair is 2/pi asin(rho); 200 samples of 60, percentile intervals of 200 resamples."""
    generator, rho, hits = np.random.default_rng(1), 0.6, 0
    for seed in range(200):
        x = generator.normal(size=60)
        y = rho * x + np.sqrt(1 - rho**2) * generator.normal(size=60)
        interval = ranking.correlations({"x": x}, y, resamples=200, seed=seed)["x"].interval()
        hits += interval.low <= 2 / np.pi * np.arcsin(rho) <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_constant_scores_have_no_correlation():
    found = ranking.correlations({"x": np.zeros(4)}, np.arange(4), resamples=5)["x"]
    assert np.isnan([found.kendall, found.spearman]).all()
    assert np.isnan(ranking.spearman_rho(np.zeros(4), np.arange(4)))


@pytest.mark.parametrize(
    ("scores", "truth", "resamples", "message"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0], 5, r"score 'x' has shape \(3,\), but the truth has \(2,\)"),
        ([1.0, np.nan], [1.0, 2.0], 5, "1 of 2 values are NaN"),
        ([1.0], [1.0], 5, "needs 2 rows"),
        ([1.0, 2.0], [1.0, 2.0], 0, "1 resample"),
    ],
)
def test_mistakes_are_named(scores, truth, resamples, message):
    with pytest.raises(ConfigError, match=message):
        ranking.correlations({"x": np.asarray(scores)}, np.asarray(truth), resamples=resamples)
    with pytest.raises(ConfigError, match="statistic='tau' is unknown"):
        ranking.Correlation(0, 0, {}).interval("tau")
