"""Ranks and their aggregation against scipy's and the official code's numbers."""

import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.methods.az_nas import aggregation
from jaxvision.metrics import ranking
from tests.arrays import load
from tests.methods.az_nas.networks import ORACLES


@pytest.mark.parametrize("number", range(3))
def test_aggregates_are_the_official_ones(number):
    given = load(ORACLES / f"aggregate_{number}.npz")
    np.testing.assert_array_equal(aggregation.average_ranks(given["scores"]), given["ranks"])
    scores = dict(zip("EPTC", given["scores"], strict=True))
    log = aggregation.aggregate(scores)
    np.testing.assert_allclose(log, given["nonlinear"], rtol=1e-14)
    np.testing.assert_array_equal(aggregation.aggregate(scores, "linear"), given["linear"])
    assert np.argmax(log) == given["best"]
    assert ranking.kendall_tau(log, given["ground_truth"]) == pytest.approx(given["kendall_tau_b"], rel=1e-12)
    assert ranking.spearman_rho(log, given["ground_truth"]) == pytest.approx(given["spearman"], rel=1e-12)


def test_what_has_no_value_ties_at_the_bottom():
    ranks = aggregation.average_ranks([3.0, -np.inf, 5.0, -np.inf, 3.0])
    np.testing.assert_array_equal(ranks, [3.5, 1.5, 5, 1.5, 3.5])
    values = aggregation.aggregate({"E": [3.0, -np.inf, 5.0], "C": [1, 1, 1]})
    np.testing.assert_allclose(values, np.log([2 / 3, 1 / 3, 1]) + np.log(2 / 3))


@pytest.mark.parametrize(
    ("scores", "how", "message"),
    [
        ({"E": [1.0, np.nan]}, "log", "1 of 2 scores are NaN"),
        ({}, "log", "no proxies"),
        ({"E": [1.0]}, "product", "aggregation='product' is unknown"),
    ],
)
def test_mistakes_are_named(scores, how, message):
    with pytest.raises(ConfigError, match=message):
        aggregation.aggregate(scores, how)
