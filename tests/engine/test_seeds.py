"""Seeds as an axis: each one's part of the run is the run of that seed alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.engine import seeds
from jaxvision.engine.task import State
from jaxvision.metrics import Mean
from tests.engine import tiny

SEEDS = (3, 8)


class Constant:
    batch_size = 4

    def __init__(self, value):
        self.value = value

    def batch_at(self, step, shard_index=0, shard_count=1):
        return {"x": np.full((4, 2), self.value + step, np.float32)}


def init(key):
    return State(jnp.zeros((), jnp.int32), {"w": jax.random.normal(key, (2,))})


def step(state, batch, key):
    noise = jax.random.normal(key, (2,))
    w = state.params["w"] + batch["x"].mean(0) + noise
    return state.replace(params={"w": w}), {"loss": Mean.of(w)}


def test_batches_are_stacked_behind_the_rows():
    batch = seeds.SeedBatches([Constant(0.0), Constant(10.0)]).batch_at(1)
    assert batch["x"].shape == (4, 2, 2)
    np.testing.assert_array_equal(batch["x"][0, :, 0], [1.0, 11.0])


@pytest.mark.parametrize("how", seeds.HOW)
def test_each_seed_runs_as_it_would_alone(how):
    key = jax.random.key(0)
    state = seeds.init_seeds(init, SEEDS)(key)
    assert state.step.shape == ()
    batch = seeds.SeedBatches([Constant(0.0), Constant(10.0)]).batch_at(0)
    run = seeds.call_seeds(step, SEEDS) if how == "call" else jax.jit(seeds.step_seeds(step, SEEDS, how=how))
    new, metrics = run(state, batch, key)
    losses = []
    for index, (seed, value) in enumerate(zip(SEEDS, (0.0, 10.0))):
        alone = init(jax.random.fold_in(key, seed))
        np.testing.assert_allclose(seeds.member(state.params, index)["w"], alone.params["w"], rtol=1e-6)
        alone, one = step(alone, Constant(value).batch_at(0), jax.random.fold_in(key, seed))
        np.testing.assert_allclose(seeds.member(new.params, index)["w"], alone.params["w"], rtol=1e-6)
        losses.append(float(one["loss"].compute()))
    assert float(metrics["loss"].compute()) == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_tiny_batches_differ_between_steps():
    data = tiny.Data()
    assert not np.array_equal(data.batch_at(0)["x"], data.batch_at(1)["x"])
    parts = [data.batch_at(3, index, 4)["x"] for index in range(4)]
    np.testing.assert_array_equal(np.concatenate(parts), data.batch_at(3)["x"])
