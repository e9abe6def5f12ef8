"""The moving average against timm's recurrences in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.optim import ema


def test_recurrence_over_parameters_and_statistics():
    rng = np.random.default_rng(0)
    trees = [
        {"params": {"w": rng.normal(size=3)}, "batch_stats": {"mean": rng.normal(size=2), "count": np.int32(t)}}
        for t in range(5)
    ]
    average, w, mean = ema.init(jax.tree.map(jnp.asarray, trees[0])), trees[0]["params"]["w"], None
    mean = trees[0]["batch_stats"]["mean"]
    step = jax.jit(ema.update)
    for tree in trees[1:]:
        average = step(average, jax.tree.map(jnp.asarray, tree), 0.9)
        w = 0.9 * w + 0.1 * tree["params"]["w"]
        mean = 0.9 * mean + 0.1 * tree["batch_stats"]["mean"]
    np.testing.assert_allclose(average["params"]["w"], w, rtol=1e-5)
    np.testing.assert_allclose(average["batch_stats"]["mean"], mean, rtol=1e-5)
    assert average["batch_stats"]["count"] == 4 and average["batch_stats"]["count"].dtype == jnp.int32


def test_average_of_equal_values_stays_exact_and_owns_its_buffers():
    tree = {"w": jnp.asarray([0.1, 1e-8, 3.0])}
    average = ema.init(tree)
    assert average["w"] is not tree["w"]
    for _ in range(3):
        average = ema.update(average, tree, 0.999)
    np.testing.assert_array_equal(average["w"], tree["w"])


def test_dtype_is_kept():
    tree = {"w": jnp.ones(2, jnp.bfloat16)}
    assert ema.update(tree, tree, jnp.float32(0.5))["w"].dtype == jnp.bfloat16


def test_decay_schedules():
    constant = ema.decay_schedule(0.99)
    assert float(constant(0)) == float(constant(10**6)) == pytest.approx(0.99)
    growing = ema.decay_schedule(0.9, warmup=True)
    got = [float(growing(t)) for t in (0, 1, 10, 1000)]
    np.testing.assert_allclose(got, [0.0, 1 - 2 ** (-2 / 3), 1 - 11 ** (-2 / 3), 0.9], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("arguments", [{"decay": 1.0}, {"decay": -0.1}, {"decay": 0.9, "gamma": 0.0}])
def test_wrong_values_are_named(arguments):
    with pytest.raises(ConfigError, match=str(next(reversed(arguments.values())))):
        ema.decay_schedule(**arguments)
