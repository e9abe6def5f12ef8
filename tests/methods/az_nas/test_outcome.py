"""Rankings, correlations and small searches of made-up scores."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from jaxvision.methods.az_nas import outcome as outcomes
from jaxvision.methods.az_nas.outcome import Ranking, Truth

PROXIES = ("expressivity", "progressivity", "trainability", "complexity")


@pytest.fixture(scope="module")
def outcome():
    """Scores that agree more or less with an accuracy, some missing."""
    draw = np.random.default_rng(0)
    accuracy = draw.uniform(60, 95, 120)
    scores = accuracy[:, None] + draw.normal(0, (8, 12, 20, 10, 9, 30, 25), (120, 7))
    scores[:5, 0] = np.nan
    scores[5:7, 2] = -np.inf, np.inf
    columns = (*PROXIES, "synflow", "te_nas_ntk", "te_nas_regions")
    architectures = draw.integers(0, 5, (120, 6)).astype(np.int32)
    return outcomes.read(architectures, scores, columns, PROXIES), Truth("made", np.arange(120), accuracy, 95, "all")


def test_rankings_are_the_aggregate_its_variants_and_each_proxy(outcome):
    found, _ = outcome
    names = [each.name for each in found.rankings]
    assert names == ["az_nas", "az_nas_linear", "az_nas+synflow", *PROXIES, "synflow", "te_nas"]
    assert found.rankings[-1] == Ranking("te_nas", ("te_nas_ntk", "te_nas_regions"), "linear")
    assert [each.name for each in found.ablation] == ["E+C", "E+P+C", "E+T+C", "E+P+T+C"]
    assert found.missing["expressivity"] == 5 and found.missing["trainability"] == 2
    assert found.found == np.argmax(found.main.of(found.scores))


def test_a_search_by_one_proxy_ranks_by_it_alone():
    scores = np.asarray([[1.0, 5.0], [3.0, np.nan]])
    found = outcomes.read(np.zeros((2, 6), np.int32), scores, ("trainability", "complexity"), ("trainability",))
    assert [each.name for each in found.rankings] == ["trainability", "complexity"] and not found.ablation
    assert found.found == 1


def test_correlations_are_those_of_the_known_rows_ranked_among_all(outcome):
    found, truth = outcome
    some = Truth("some", truth.rows[40:80], truth.accuracy[40:80], 95, "all")
    linear = found.rankings[1]
    tau = outcomes.correlations(found, (linear,), some, 10)["az_nas_linear"].kendall
    assert tau == pytest.approx(kendalltau(linear.of(found.scores)[40:80], some.accuracy).statistic, rel=1e-12)


def test_picks_are_the_same_for_the_same_seed_and_never_better_than_the_pool(outcome):
    found, truth = outcome
    one, again = (outcomes.picks(found, truth, pool=300, runs=30, seed=1) for _ in range(2))
    assert one.pool == 60
    for name, values in one.accuracy.items():
        np.testing.assert_array_equal(values, again.accuracy[name])
        assert (values <= one.best).all()
    assert one.accuracy["az_nas"].mean() > one.random.mean()
