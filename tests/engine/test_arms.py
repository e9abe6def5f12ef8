"""Arms: each member trains as it would alone, all arms start from the same variables, the table chooses fairly."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.engine import arms, seeds
from jaxvision.engine.options import Options
from jaxvision.engine.report import Results
from jaxvision.engine.task import State, Task
from jaxvision.metrics import Mean
from tests.engine import tiny

SEEDS = (3, 8)


class Rows:
    """Batches of the value of a seed."""

    batch_size, num_batches = 4, 1

    def __init__(self, value):
        self.value = value

    def batch_at(self, step, shard_index=0, shard_count=1):
        return {"x": np.full((4, 2), self.value + step, np.float32)}


def begin(variables, setting, key):
    params = {"w": variables["params"]["w"] * 1.0}
    return State(jnp.zeros((), jnp.int32), params, opt_state={"noise": jax.random.normal(key, ()) * setting["lr"]})


def step(state, batch, key):
    w = state.params["w"] + state.extra[arms.SETTING]["lr"] * (batch["x"].mean(0) + jax.random.normal(key, (2,)))
    return state.replace(params={"w": w}), {"size": Mean.of(jnp.abs(w))}


def evaluate(state, batch):
    return {"w": Mean.of(state.params["w"][0], jnp.ones(()))}


ARM = arms.Arm("plain", begin, step, 2, evaluate, grid={"lr": (0.1, 1.0)})


def start(key):
    return arms.start_state(lambda key: {"params": {"w": jax.random.normal(key, (2,))}}, SEEDS, key)


@pytest.mark.parametrize("how", seeds.HOW)
def test_each_member_trains_as_it_would_alone(how):
    key = jax.random.key(0)
    stage = arms.stage(ARM, SEEDS, [Rows(0.0), Rows(10.0)], {}, how=how)
    assert stage.compiled == (how != "call") and stage.traceable
    run = jax.jit(stage.step) if stage.compiled else stage.step
    initial = start(key)
    state = jax.jit(stage.begin)(initial, key)
    for index in range(2):
        state, metrics = run(state, stage.data.batch_at(index), jax.random.fold_in(key, index))
    assert metrics["size"].count == 8
    for index, member in enumerate(ARM.members(SEEDS)):
        seed, value = SEEDS[member.seed], (0.0, 10.0)[member.seed]
        variables = seeds.member(initial.extra[arms.START], member.seed)
        setting = {"lr": jnp.float32(member.setting["lr"])}
        alone = begin(variables, setting, jax.random.fold_in(key, seed)).replace(extra={arms.SETTING: setting})
        for count in range(2):
            keys = jax.random.fold_in(jax.random.fold_in(key, count), seed)
            alone, _ = step(alone, Rows(value).batch_at(count), keys)
        ours = arms.member_state(state, index)
        np.testing.assert_allclose(ours.params["w"], alone.params["w"], rtol=1e-6)
        np.testing.assert_allclose(ours.opt_state["noise"], alone.opt_state["noise"], rtol=1e-6)


def test_the_next_arm_starts_where_the_first_did():
    key = jax.random.key(0)
    stage = arms.stage(ARM, SEEDS, [Rows(0.0), Rows(1.0)], {"test": object()})
    once = jax.jit(stage.begin)(start(key), key)
    trained, _ = jax.jit(stage.step)(once, stage.data.batch_at(0), key)
    again = jax.jit(stage.begin)(trained, key)
    np.testing.assert_array_equal(once.params["w"], again.params["w"])
    metrics = stage.evals["test"].update(again, {})
    assert list(metrics) == ["w_0", "w_1", "w_2", "w_3"]
    np.testing.assert_allclose(metrics["w_1"].compute(), again.params["w"][1, 0])


@pytest.mark.parametrize("how", ("map", "call"))
def test_an_arms_numbers_are_its_own_wherever_it_stands(how, tmp_path):
    """Alone, behind a longer arm, or as two arms under two names: the same draws, so the same rows."""

    def rows(name, *ways):
        data = [Rows(0.0), Rows(10.0)]
        stages = arms.stages(ways, SEEDS, data, {"test": Rows(0.0)}, every=2, how=how)
        options = Options(log_every=1, save_every=100, tensorboard=False)
        results = tiny.run(tmp_path / name, Task("arms", start, stages, report=None), options)
        found = {way.name: [row for row in results.rows if row["stage"] == way.name] for way in ways}
        return {name: [{**row, "step": 0, "stage": ""} for row in each] for name, each in found.items()}

    longer = dataclasses.replace(ARM, name="longer", steps=5, grid={"lr": (0.5,)})
    alone = rows("alone", ARM)["plain"]
    assert len(alone) == 3 and alone[0]["size"] != alone[1]["size"]
    others = rows("others", longer, dataclasses.replace(ARM, name="twin"), ARM)
    assert others["plain"] == others["twin"] == alone


def test_pretrained_values_go_into_every_seeds_start():
    initial = start(jax.random.key(0))

    def load(variables):
        return {"params": {"w": np.asarray([7.0, variables["params"]["w"][1]], np.float32)}}  # the second stays fresh

    loaded, fresh = arms.load_start(load, initial).extra[arms.START], initial.extra[arms.START]
    np.testing.assert_array_equal(loaded["params"]["w"][:, 0], [7.0, 7.0])
    np.testing.assert_array_equal(loaded["params"]["w"][:, 1], fresh["params"]["w"][:, 1])
    assert fresh["params"]["w"][0, 1] != fresh["params"]["w"][1, 1]


def test_the_setting_is_chosen_on_one_set_and_judged_on_another():
    rows = []
    for name, values in (("validation", (0.5, 0.7, 0.9, 0.8)), ("test", (0.4, 0.6, 0.3, 0.5))):
        metrics = {f"accuracy_{index}": value for index, value in enumerate(values)}
        rows.append({"step": 2, "stage": "plain", "kind": "eval", "eval": name, **metrics})
    results = Results(None, rows, [], Path())
    found = arms.outcomes(results, ARM, SEEDS, "accuracy", choose="validation", judge="test")
    assert [outcome.setting for outcome in found] == ["lr=0.1", "lr=1"]
    chosen = arms.best(found)
    assert chosen.setting == "lr=1" and arms.spread(chosen.judged, scale=100) == "40.0 ± 14.1"
    assert arms.best(found, largest=False).setting == "lr=0.1"
    assert arms.spread(np.asarray([0.5]), digits=2) == "0.50"


def test_an_arm_hands_on_what_it_trained_and_what_it_keeps():
    key = jax.random.key(0)
    teacher = arms.Arm("teacher", begin_alone, step_alone, 1, evaluate, pretrains=True, keep=lambda s: s.params["w"][0])
    learner = dataclasses.replace(ARM, name="learner", keep=lambda state: {"w": state.params["w"]})
    first, second, third = arms.stages([teacher, learner, ARM], SEEDS, [Rows(0.0), Rows(1.0)], {})
    state = jax.jit(first.begin)(start(key), key)
    taught, _ = jax.jit(first.step)(state, first.data.batch_at(0), key)
    state = jax.jit(second.begin)(taught, key)
    np.testing.assert_array_equal(state.params["w"], taught.params["w"][np.asarray([0, 1, 0, 1])])
    np.testing.assert_array_equal(state.extra[arms.KEPT]["teacher"], taught.params["w"][:, 0])
    learned, _ = jax.jit(second.step)(state, second.data.batch_at(0), key)
    state = jax.jit(third.begin)(learned, key)
    np.testing.assert_array_equal(state.params["w"], taught.params["w"][np.asarray([0, 1, 0, 1])])
    kept = arms.kept(state, ARM)
    assert set(kept) == {"teacher", "learner"}
    np.testing.assert_array_equal(kept["learner"]["w"], learned.params["w"])
    np.testing.assert_array_equal(arms.kept(learned, learner)["learner"]["w"], learned.params["w"])
    assert arms.KEPT not in arms.member_state(state, 0).extra


def begin_alone(variables, setting, key):
    return State(jnp.zeros((), jnp.int32), variables["params"])


def step_alone(state, batch, key):
    return state.replace(params={"w": state.params["w"] + batch["x"].mean(0)}), {"size": Mean.of(state.params["w"])}
