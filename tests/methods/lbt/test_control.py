"""The choice of gamma: what an arm starts from, what moves it, and how collections carry it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.methods.lbt import control
from jaxvision.quant import gradient, interval

COLLECTIONS = {
    "interval": {"a": {"gamma": jnp.array([0.5, 0, 0])}, "b": {"gamma": jnp.array([0.7, 0, 0])}},
    "bits": {"a": {"widths": jnp.array([4, 4, 3])}, "b": {"widths": jnp.array([4, 4, 8])}},
}


@pytest.fixture(scope="module")
def gradients():
    key = jax.random.key(0)
    return {
        f"{name}/kernel": jax.random.laplace(jax.random.fold_in(key, i), (8, 4, 4, 16)) for i, name in enumerate("ab")
    }


def chosen(how, gradients, **setting):
    setting = {name: jnp.float32(value) for name, value in setting.items()}
    values, distances = control.choose(how, gradients, COLLECTIONS, setting)
    assert set(distances) == set(gradients)
    for leaf in jax.tree.leaves(values):
        assert leaf.shape == (3,) and leaf.dtype == jnp.float32 and not leaf[1:].any()
    return {name: float(gamma) for name, gamma in control.gammas(values).items()}, distances


def test_fixed_is_the_setting_and_piecewise_is_min_max(gradients):
    assert chosen(control.fixed((1.0, 0.6)), gradients, gamma=0.6)[0] == pytest.approx(dict.fromkeys(gradients, 0.6))
    how = control.piecewise()
    assert how.kind == "piecewise" and not how.moves
    assert chosen(how, gradients)[0] == dict.fromkeys(gradients, 1.0)


def test_the_quantile_start_meets_the_target_of_each_layers_own_width(gradients):
    alpha = 0.5
    found, _ = chosen(control.lbt((alpha,), 1e-3, "quantile"), gradients, alpha=alpha)
    for name, bits in (("a/kernel", 3), ("b/kernel", 8)):
        clipped, total = gradient.clip_counts(gradients[name], found[name])
        assert clipped == max(1, round(alpha / (2**bits - 1) * float(total)))
    assert found["a/kernel"] < found["b/kernel"]


@pytest.mark.parametrize(
    ("how", "measure"),
    [
        (control.dsgc(10, 20), interval.cosine_distance),
        (control.whole_error(10, 20), interval.squared_error),
    ],
)
def test_searches_find_the_least_of_their_measure(how, measure, gradients):
    found, distances = chosen(how, gradients, rate_factor=0)
    for name, bits in (("a/kernel", 3), ("b/kernel", 8)):
        values = [float(measure(gradients[name], gamma, bits)) for gamma in np.linspace(0.05, 1, 20, dtype=np.float32)]
        assert found[name] == pytest.approx(np.linspace(0.05, 1, 20)[int(np.argmin(values))])
        assert distances[name] == pytest.approx(min(values), rel=1e-4, abs=1e-6)


def test_the_controller_moves_each_layer_towards_its_target():
    how = control.lbt((0.1,), 1e-3, "one", freeze=5)
    total = 1000.0
    target = {"a": 0.1 / 7, "b": 0.1 / 255}
    # a clips more than its target, b less.
    counts = {"a": {"gamma": jnp.array([9.0, 20, total])}, "b": {"gamma": jnp.array([9.0, 0, total])}}
    assert 20 / total > target["a"]
    setting = {"alpha": jnp.float32(0.1)}
    update = control.controller(how, COLLECTIONS["bits"], setting, jnp.int32(4))
    new = update(COLLECTIONS["interval"], counts)
    np.testing.assert_allclose(new["a"]["gamma"], [0.501, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(new["b"]["gamma"], [0.699, 0, 0], rtol=1e-6)
    frozen = control.controller(how, COLLECTIONS["bits"], setting, jnp.int32(5))(COLLECTIONS["interval"], counts)
    jax.tree.map(np.testing.assert_array_equal, frozen, COLLECTIONS["interval"])
    still = control.controller(control.fixed((1.0,)), COLLECTIONS["bits"], {}, jnp.int32(0))
    assert still(COLLECTIONS["interval"], counts) is COLLECTIONS["interval"]


def test_widths_of_some_kernels_are_replaced():
    new = control.with_gradient_bits(COLLECTIONS["bits"], jnp.int32(2), frozenset({"a/kernel"}))
    assert {name: int(width) for name, width in control.gradient_widths(new).items()} == {"a/kernel": 2, "b/kernel": 8}
    assert new["a"]["widths"][:2].tolist() == [4, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2.0,), 1e-3, "quantile"), "alpha=2.0 must be"),
        (((1e-3,), 0.0, "quantile"), "beta=0.0 must be"),
        (((1e-3,), 1e-3, "quantil"), "did you mean 'quantile'"),
    ],
)
def test_impossible_settings_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        control.lbt(*arguments)
