"""Members keep what they were at their best: each its own, the first of equals, resumed or not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError, Preempted
from jaxvision.engine import arms, loop
from jaxvision.engine.best_so_far import BestSoFar
from jaxvision.engine.interrupt import Interrupt
from jaxvision.engine.options import Options
from jaxvision.engine.task import State, Task
from jaxvision.metrics import Mean
from tests.engine import tiny
from tests.engine.test_arms import SEEDS, Rows
from tests.engine.test_loop import same

SCORES = np.asarray([[0.2, 0.9, 0.9, 0.5], [-0.5, -0.3, -0.4, -0.1]], np.float32)
"""Of each seed after steps 1 to 4."""


def test_each_member_keeps_its_own_best_and_the_first_of_equals():
    best = BestSoFar.of_none({"w": np.ones((2, 3), np.float32)})
    assert np.isfinite(jax.tree.leaves(best)[0]).all() and best.step.tolist() == [-1, -1]
    for step in range(4):
        tree = {"w": np.full((2, 3), step + 1, np.float32)}
        best = jax.jit(BestSoFar.after)(best, SCORES[:, step], jnp.int32(step + 1), tree)
    np.testing.assert_array_equal(best.step, [2, 4])
    np.testing.assert_array_equal(best.score, SCORES[[0, 1], [1, 3]])
    np.testing.assert_array_equal(best.tree["w"][:, 0], [2, 4])


def begin(variables, setting, key):
    return State(jnp.zeros((), jnp.int32), {"count": variables["params"]["count"], "seed": jnp.zeros((), jnp.int32)})


def step(state, batch, key):
    params = {"count": state.params["count"] + 1, "seed": (batch["x"].mean() > 5).astype(jnp.int32)}
    return state.replace(params=params), {"count": Mean.of(params["count"])}


def evaluate(state, batch):
    return {"score": Mean.of(jnp.asarray(SCORES)[state.params["seed"], state.params["count"] - 1])}


ARM = arms.Arm("first", begin, step, 4, evaluate, keep=lambda state: state.params, best="validation/score")
OPTIONS = Options(log_every=2, save_every=3, tensorboard=False)


def task(how="map", **changes):
    """Two arms, evaluated after every step; the second keeps its last."""
    ways = (dataclasses.replace(ARM, **changes), dataclasses.replace(ARM, name="second", best=""))
    evals = {"validation": Rows(0.0), "test": Rows(0.0)}
    stages = arms.stages(ways, SEEDS, [Rows(0.0), Rows(10.0)], evals, every=1, how=how)

    def init(key):
        return arms.start_state(lambda key: {"params": {"count": jnp.zeros((), jnp.int32)}}, SEEDS, key)

    return Task("best", init, stages, report=None), ways[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny.run(tmp_path_factory.mktemp("best"), task()[0], OPTIONS)


def test_an_arm_hands_on_its_members_best(whole):
    last = task()[1]
    kept = arms.kept(whole.state, last)
    np.testing.assert_array_equal(kept["first"]["count"], [2, 4])
    np.testing.assert_array_equal(kept["second"]["count"], [4, 4])
    np.testing.assert_array_equal(kept["first"]["seed"], [0, 1])
    steps = arms.best_steps(whole.state, last)
    assert list(steps) == ["first"] and steps["first"].tolist() == [2, 4]
    assert arms.BEST not in whole.state.extra and arms.BEST not in arms.member_state(whole.state, 0).extra


@pytest.mark.parametrize(("how", "mode"), [("call", "jit"), ("vmap", "pmap")])
def test_python_steps_and_pmap_choose_the_same(how, mode, tmp_path):
    built, last = task(how)
    result = tiny.run(tmp_path, built, dataclasses.replace(OPTIONS, parallel=mode))
    np.testing.assert_array_equal(arms.kept(result.state, last)["first"]["count"], [2, 4])


@pytest.mark.parametrize("asked", [2, 3, 5, 6, 8, 11])
def test_stopped_anywhere_and_continued_equals_uninterrupted(whole, tmp_path, monkeypatch, asked):
    """Also between two evaluations of one step, of which the first is the one that chooses."""
    monkeypatch.setattr(loop, "Interrupt", lambda: tiny.StopAt(asked))
    with pytest.raises(Preempted):
        tiny.run(tmp_path, task()[0], OPTIONS)
    monkeypatch.setattr(loop, "Interrupt", Interrupt)
    result = tiny.run(tmp_path, task()[0], OPTIONS)
    same(whole.state, result.state)
    assert whole.rows == result.rows


def test_an_evaluation_that_isnt_there_is_refused():
    with pytest.raises(ConfigError, match=r"arm 'first': the evaluation in best='valid' is unknown.*validation"):
        task(best="valid/score")
