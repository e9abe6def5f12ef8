"""Searches: ranks that grow are those of the whole, budgets hold, steps of any size give the same population."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import rankdata

from jaxvision.core import rng
from jaxvision.core.errors import ConfigError
from jaxvision.engine.evaluate import compute
from jaxvision.engine.task import State
from jaxvision.methods.az_nas import proposals
from jaxvision.methods.az_nas.history import History, from_bits, to_bits
from jaxvision.methods.az_nas.proposals import Budget, Evolution, Given, Sampling
from jaxvision.methods.az_nas.ranks import Ranks
from jaxvision.methods.az_nas.search import Numbers, Scoring, Search, one_by_one
from tests.methods.az_nas.digit_space import PROXIES, DigitSpace

SPACE = DigitSpace()
INITIAL = np.asarray([1, 1, 1, 1], np.int32)


def make_search(proposer, count, **changes):
    settings = {
        "shape": SPACE.shape,
        "proposer": proposer,
        "scorings": {"az_nas": Scoring(PROXIES[:3], one_by_one(SPACE.scorer(8, 2)))},
        "columns": PROXIES,
        "ranked": PROXIES,
        "count": count,
        "seed": 3,
        "counted": lambda architecture: {"complexity": SPACE.cost(architecture).flops},
    }
    return Search(**{**settings, **changes})


def fold(search, chunk):
    """The search in steps of ``chunk``: its history and the metrics of the steps."""
    numbers = Numbers(search.count, chunk)
    state, rows = State(jnp.zeros((), jnp.int32), extra=search.empty()), []
    for step in range(numbers.steps):
        state, metrics = search.step(state, numbers.batch_at(step), jax.random.key(0))
        rows.append(compute(metrics))
    return search.history(state, search.count), rows


def aggregate(scores):
    """The definition: sum of ln(rank / m), what isn't finite at the bottom."""
    ranks = rankdata(np.where(np.isfinite(scores), scores, -np.inf), axis=0)
    return np.log(ranks / len(scores)).sum(1)


def test_growing_ranks_equal_ranks_of_the_whole():
    draw = rng.generator(0, "test")
    scores = draw.integers(0, 6, (80, 3)).astype(float)
    scores[draw.random((80, 3)) < 0.1] = -np.inf
    scores[draw.random((80, 3)) < 0.1] = np.nan
    scores[draw.random((80, 3)) < 0.1] = np.inf
    for start in (0, 1, 40):
        ranks = Ranks(scores[:start], capacity=80)
        for row in scores[start:]:
            ranks.add(row)
            np.testing.assert_allclose(ranks.aggregate(), aggregate(scores[: ranks.count]), rtol=1e-13, atol=1e-13)


def test_scores_survive_as_bits():
    scores = np.asarray([[np.nan, -np.inf], [1e300, 8e12 + 1]])
    bits = to_bits(scores)
    assert bits.dtype == np.int32 and bits.shape == (2, 2, 2)
    np.testing.assert_array_equal(from_bits(np.asarray(jnp.asarray(bits))), scores)


@pytest.mark.parametrize("kind", ["sampling", "evolution", "one_proxy"])
def test_the_result_does_not_depend_on_the_size_of_a_step(kind):
    budget = Budget(max_flops=25)
    if kind == "sampling":
        search = make_search(Sampling(SPACE, budget, seed=3, tries=100), 40)
    else:
        ranked = PROXIES if kind == "evolution" else ("trainability",)
        search = make_search(Evolution(SPACE, budget, 3, 100, INITIAL, parents=13), 40, ranked=ranked)
    whole, _ = fold(search, 40)
    for chunk in (1, 7):
        history, rows = fold(search, chunk)
        np.testing.assert_array_equal(history.architectures, whole.architectures)
        np.testing.assert_array_equal(history.scores, whole.scores)
        assert rows[-1]["evaluated"] == 40
    assert (whole.architectures.sum(1) <= 25).all()


def test_evolution_takes_parents_from_the_best_of_everything(monkeypatch):
    """The candidates of a plain loop, as in the official ``evolution_search_az.py``."""
    search = make_search(Evolution(SPACE, Budget(max_flops=22), 3, 100, INITIAL, parents=15), 60)
    history, rows = fold(search, 60)
    architectures, rejected = [], 0
    for number in range(60):
        draw = rng.generator(3, "az_nas/candidate", number)
        while True:
            if number <= 10:
                child = SPACE.mutate(INITIAL, draw, 1)
            else:
                order = np.arange(number)
                if number >= 15:
                    order = np.argsort(-aggregate(history.scores[:number]), kind="stable")[:15]
                child = SPACE.mutate(architectures[draw.choice(order)], draw, 2)
            if child.sum() <= 22:
                break
            rejected += 1
        architectures.append(child)
    np.testing.assert_array_equal(history.architectures, np.stack(architectures))
    assert rows[0]["rejected"] == rejected > 0
    assert rows[0]["best"] == np.argmax(aggregate(history.scores))


def test_missing_values_rank_last_and_are_counted():
    given = np.asarray([[5, 5, 0, 5], [5, 5, 1, 5], [0, 5, 2, 5]], np.int32)
    history, rows = fold(make_search(Given(given), 3), 3)
    assert np.isnan(history.scores[0, 1])
    assert rows[0]["no_value/progressivity"] == 1 and rows[0]["no_value/trainability"] == 1
    assert rows[0]["no_value/expressivity"] == 0
    assert history.best(3)[0] == 1


def test_repeats_average_and_functions_are_scored_once():
    given = np.asarray([[5, 5, 1, 2], [5, 5, 1, 7], [6, 5, 1, 7]], np.int32)
    scorer, calls = SPACE.scorer(8, 2), []

    def counted(architecture, key):
        calls.append(architecture)
        return scorer(architecture, key)

    once, _ = fold(make_search(Given(given), 3), 2)
    keys = [rng.key(3, "az_nas/score", 0), jax.random.fold_in(rng.key(3, "az_nas/score", 0), 1)]
    scoring = Scoring(PROXIES[:3], one_by_one(counted), canonical=lambda a: np.append(a[:3], 0))
    shared = make_search(Given(given), 3, scorings={"az_nas": scoring}, repeats=2)
    history, _ = fold(shared, 2)
    assert len(calls) == 4
    assert history.scores[0, 0] == np.mean([scorer(given[0], key)["expressivity"] for key in keys])
    np.testing.assert_array_equal(history.scores[1, :3], history.scores[0, :3])
    assert history.scores[1, 3] == 18 and once.scores[0, 0] != once.scores[1, 0]


def test_scorings_run_side_by_side_and_give_the_same():
    given, meeting = SPACE.sample(rng.generator(0, "test"))[None], threading.Barrier(2, timeout=60)

    def scoring(name, wait):
        def score(architecture, key):
            wait()
            return {name: float(architecture.sum()) + float(jax.random.uniform(key))}

        return Scoring((name,), one_by_one(score))

    def run(workers, wait):
        scorings = {name: scoring(name, wait) for name in ("zen", "zico")}
        columns, proposer = ("zen", "zico", "complexity"), Given(given)
        search = make_search(proposer, 1, scorings=scorings, columns=columns, ranked=columns, workers=workers)
        history, rows = fold(search, 1)
        assert min(rows[0]["seconds/zen"], rows[0]["seconds/zico"]) > 0
        return history.scores

    # Alone, each would wait for the other in vain.
    np.testing.assert_array_equal(run(2, meeting.wait), run(1, lambda: None))


def test_a_budget_that_nothing_meets_is_one_clear_error():
    search = make_search(Sampling(SPACE, Budget(max_flops=30, min_params=390), seed=3, tries=50), 5)
    with pytest.raises(ConfigError, match=r"no architecture within config.budget.max_flops=30 and .*min_params=390 in"):
        fold(search, 5)
    with pytest.raises(ConfigError, match=r"min_params=9 is above max_params=3"):
        Budget(min_params=9, max_params=3)
    assert str(Budget()) == "no limit" and proposals.WARM_UP == 11


def test_history_of_nothing_is_empty():
    assert len(History(np.zeros((2, 4), np.int32), np.zeros((2, 4)), 0, [0]).best(3)) == 0
