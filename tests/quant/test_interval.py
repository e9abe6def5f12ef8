"""The interval controller, its starts, error measures and searches against their oracles."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import devices
from jaxvision.core.errors import ConfigError
from jaxvision.quant import gradient, interval
from tests.arrays import load

ORACLES = Path(__file__).parents[1] / "oracles" / "lbt"
INTERVAL = sorted(ORACLES.glob("interval_*.npz"))
BOUND = sorted(ORACLES.glob("error_bound_*.npz"))
DSGC = sorted(ORACLES.glob("dsgc_*.npz"))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def sample(n=20000, seed=0):
    return np.random.default_rng(seed).standard_t(4, n).astype(np.float32)


def test_there_are_oracles():
    assert len(INTERVAL) >= 3 and len(BOUND) >= 2 and len(DSGC) >= 2


@pytest.mark.parametrize("path", INTERVAL, ids=lambda p: p.stem)
def test_controller_oracle(path):
    o = load(path)
    bits, alpha, beta = int(o["bits"]), float(o["alpha"]), float(o["beta"])
    np.testing.assert_allclose(interval.target_ratio(alpha, bits), o["target_ratio"], rtol=1e-6)
    errors, start = jax.jit(interval.gradient_errors), jax.jit(interval.start_gamma, static_argnums=1)

    @jax.jit
    def move(g, gamma, tau):
        counts, large = gradient.clip_counts(g, gamma), gradient.clip_counts(g, tau)
        gamma = interval.update_interval(gamma, *counts, bits, alpha=alpha, beta=beta)
        return gamma, interval.update_large_threshold(tau, *large, alpha=alpha, beta=beta)

    gamma = tau = jnp.float32(1)
    for t, g in enumerate(jnp.asarray(o["G"])):
        if np.any(g):
            measured = errors(g, gamma, bits, alpha)
            np.testing.assert_allclose(measured.clip_ratio, o["clip_out_ratio_before"][t], rtol=1e-5)
            np.testing.assert_allclose(measured.large_mean, o["err_top_alpha_before"][t], rtol=1e-4, atol=5e-7)
            np.testing.assert_allclose(measured.all_mean, o["err_all_before"][t], rtol=1e-4, atol=5e-7)
        if t == 0:
            gamma = start(g, "search", bits, alpha)
            tau = jnp.float32(o["large_threshold_after"][0])
        else:
            gamma, tau = move(g, gamma, tau)
        np.testing.assert_allclose(gamma, o["gamma_after"][t], atol=1e-5)
        np.testing.assert_allclose(tau, o["large_threshold_after"][t], atol=1e-5)


@pytest.mark.parametrize("path", BOUND, ids=lambda p: p.stem)
def test_error_bound_oracle(path, x64):
    o = load(path)
    bits, alpha, g = int(o["bits"]), float(o["alpha"]), jnp.asarray(o["G"])
    measured = jax.jit(jax.vmap(lambda gamma: interval.gradient_errors(g, gamma, bits, alpha)))(o["gamma"])
    np.testing.assert_allclose(measured.clip_ratio, o["clip_out_ratio"], rtol=1e-10)
    np.testing.assert_allclose(measured.large_mean, o["err_large"], rtol=1e-10)
    np.testing.assert_allclose(measured.all_mean, o["err_all"], rtol=1e-10)
    bound = interval.error_bound(measured.clip_ratio, o["gamma"], alpha, bits)
    np.testing.assert_allclose(bound, o["bound"], rtol=1e-10)
    assert np.all(measured.large_mean <= bound + 1e-12)


@pytest.mark.parametrize("path", DSGC, ids=lambda p: p.stem)
def test_dsgc_oracle(path, x64):
    o = load(path)
    g, bits = jnp.asarray(o["G"]), int(o["bits"])

    @jax.jit
    def run(gammas):
        distance = jax.vmap(lambda gamma: interval.cosine_distance(g, gamma, bits))(gammas)
        gamma, value = interval.least(interval.cosine_distance, g, bits, gammas)
        return distance, gamma, interval.dsgc_rate_factor(value)

    distance, gamma, factor = run(jnp.asarray(o["gamma"]))
    np.testing.assert_allclose(distance, o["cosine_distance"], rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(gamma, o["gamma_best"])
    np.testing.assert_allclose(factor, o["lr_scale"], rtol=1e-10)
    np.testing.assert_allclose(interval.GAMMAS, o["gamma"], rtol=1e-12)


def test_least_squared_error_is_below_every_other_gamma_of_the_grid():
    g = jnp.asarray(sample(2000))
    gamma, value = jax.jit(lambda g: interval.least(interval.squared_error, g, 3))(g)
    error = jax.jit(lambda c: jnp.mean((gradient.quantize_gradient(g, c, 3).dequantize() - g) ** 2))
    assert value <= min(error(c) for c in (0.1, 0.5, 1.0)) and 0.05 <= gamma < 1
    np.testing.assert_allclose(error(gamma), value, 1e-5)


def test_layers_are_updated_together_and_the_switches_hold_them():
    gamma = jnp.asarray([0.5, 0.5, 0.5, 1.0, 0.001], jnp.float32)
    clipped, total = jnp.asarray([9.0, 0, 5, 9, 0]), jnp.asarray([1000.0, 1000, 0, 1000, 1000])
    update = jax.jit(interval.update_interval, static_argnames=())
    moved = update(gamma, clipped, total, jnp.int32(4), alpha=0.01)
    np.testing.assert_allclose(moved, [0.501, 0.499, 0.5, 1.0, 0.001], rtol=1e-6)
    np.testing.assert_array_equal(update(gamma, clipped, total, jnp.int32(4), alpha=0.01, frozen=True), gamma)
    # exactly on target: sign(0) = 0
    np.testing.assert_array_equal(interval.update_interval(jnp.float32(0.5), 1, 15, 4, alpha=1.0), np.float32(0.5))


def test_quantile_start_clips_the_target_count_and_the_controller_stays_there():
    g = sample()
    count = round(0.01 * g.size / 15)
    ordered = np.sort(np.abs(g))[::-1]
    gamma = jax.jit(lambda g, bits: interval.start_gamma(g, "quantile", bits, 0.01))(g, jnp.int32(4))
    np.testing.assert_allclose(gamma, ordered[count] / ordered[0], rtol=1e-6)
    assert np.sum(np.abs(g) > gamma * ordered[0]) == count
    path, x = [], jnp.asarray(g)
    step = jax.jit(lambda c: interval.update_interval(c, *gradient.clip_counts(x, c), 4, alpha=0.01))
    for _ in range(50):
        path.append(float(gamma))
        gamma = step(gamma)
    assert np.ptp(path) < 0.005


@pytest.mark.parametrize("start", interval.STARTS)
@pytest.mark.parametrize("g", [np.zeros(64), np.full(64, np.nan), np.ones(64)], ids=["zero", "nan", "equal"])
def test_starts_of_useless_gradients_end_and_lie_in_range(start, g):
    gamma = jax.jit(interval.start_gamma, static_argnums=1)(jnp.asarray(g, jnp.float32), start, 4, 1e-3)
    assert 0.001 <= gamma <= 1
    if not np.all(g == 1) or start == "one":
        assert gamma == 1


def test_errors_of_other_quantizers():
    g = jnp.asarray(sample(1000))
    errors = jax.jit(interval.gradient_errors, static_argnames="kind")(g, 1.0, jnp.int32(4), 0.05, kind="piecewise")
    quantized = gradient.quantize_gradient(g, 1.0, 4, kind="piecewise").dequantize()
    error = np.abs(quantized - g) / np.abs(g).max()
    np.testing.assert_allclose(errors.all_mean, error.mean(), rtol=1e-5)
    np.testing.assert_allclose(errors.large_mean, error[np.argsort(-np.abs(g))[:50]].mean(), rtol=1e-5)


def test_two_devices_find_what_one_finds():
    g = jnp.asarray(sample(4000))

    def local(part):
        with devices.device_axis("data"):
            starts = [interval.start_gamma(part, s, 4, 0.01) for s in ("search", "quantile")]
            errors = interval.gradient_errors(part, 0.5, 4, 0.01)
            return [*starts, errors, interval.least(interval.cosine_distance, part, 4, np.float32([0.2, 0.5, 0.9]))]

    run = jax.jit(jax.vmap(local, axis_name="data"))
    shared, alone = run(g.reshape(2, -1)), run(g[None])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, [b[0]] * 2, rtol=1e-5), shared, alone)


def test_too_few_elements_are_told_with_the_number():
    assert interval.warn_if_too_few(60_000, 1e-3, 4) is None
    text = interval.warn_if_too_few(1500, 1e-3, 4)
    assert "1500 elements" in text and "0.1 be clipped" in text and "above 0.04" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0}, "alpha=0 must be a fraction"),
        ({"alpha": 1e-3, "beta": 1.0}, "beta=1.0 must be a step"),
        ({"alpha": 1e-3, "start": "quantiles"}, "did you mean 'quantile'"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        interval.check_controller(**settings)
