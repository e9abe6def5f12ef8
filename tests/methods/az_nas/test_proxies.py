"""The proxies against the official code's numbers, on given features and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.methods.az_nas import proxies
from tests.arrays import load
from tests.methods.az_nas.networks import NETS, ORACLES, oracle

spectrum_entropy = jax.jit(proxies.spectrum_entropy, static_argnames="clamp")
gradient_statistics = jax.jit(lambda *pair: (proxies.block_singular_value(*pair), proxies.is_identity(*pair)))


@pytest.mark.parametrize("number", [2, 3, 5, 6])
def test_entropy_is_the_official_one(number):
    given = load(ORACLES / f"expressivity_{number}.npz")
    entropy = spectrum_entropy(given["feat"])
    assert entropy.dtype == jnp.float32
    # All-zero features (6) have no spectrum; the others are finite, also where the official float32 result is not.
    assert np.isnan(entropy) == (number == 6)
    np.testing.assert_allclose(entropy, given["clamped_float64"], rtol=1e-5)
    with jax.enable_x64(True):
        features = given["feat"].astype(np.float64)
        for clamp, expected in ((True, "clamped_float64"), (False, "official_float64")):
            value = spectrum_entropy(features, clamp=clamp)
            np.testing.assert_allclose(value, np.nan if number == 6 else given[expected], rtol=1e-12)


def test_without_the_clamp_float32_rounding_ends_in_nan():
    """As the official float32 result of this case: more channels than samples."""
    given = load(ORACLES / "expressivity_5.npz")
    assert given["official_float32"] == -np.inf
    assert np.isnan(spectrum_entropy(given["feat"], clamp=False))


@pytest.mark.parametrize("number", NETS)
def test_proxies_of_whole_networks(number):
    net = oracle(number)
    blocks = range(1, len(net["sigma_max_per_block"]) + 1)
    pairs = [(net[f"gin_{l}"], net[f"probe_{l}"].astype(np.float32)) for l in blocks]
    sigma, identical = map(np.stack, zip(*(gradient_statistics(*pair) for pair in pairs), strict=True))
    np.testing.assert_allclose(sigma, net["sigma_max_per_block"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(identical, net["trainability_per_block"] == -np.inf)
    found = jax.jit(proxies.summarise)(net["expressivity_per_block"].astype(np.float32), sigma, identical)
    for name, value in found.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, net[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_block_is_measured_by_its_own_vjp():
    """A strided linear block, whose Jacobian is known: with few samples A = W (G^T G / N), not W."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(2, 4, 4, 3)).astype(np.float32)
    weights = generator.normal(size=(12, 5)).astype(np.float32)
    probe = generator.choice([-1.0, 1.0], (2, 2, 2, 5)).astype(np.float32)
    found = jax.jit(proxies.block_statistics, static_argnums=0)(
        lambda x: proxies.space_to_depth(x, 2) @ weights, features, probe
    )
    windows = features.reshape(2, 2, 2, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(8, 12)
    np.testing.assert_allclose(found.features.reshape(8, 5), windows @ weights, rtol=1e-5)
    signs = probe.reshape(8, 5)
    expected = np.linalg.norm(weights @ signs.T @ signs / 8, 2)
    np.testing.assert_allclose(found.sigma, expected, rtol=1e-5)
    np.testing.assert_allclose(found.entropy, spectrum_entropy(windows @ weights), rtol=1e-5)
    assert not found.identical
    assert proxies.block_statistics(lambda x: x, features, np.sign(features)).identical


def test_identical_blocks_sink_trainability_or_are_left_out():
    sigma, identical = jnp.asarray([1.0, 1.0, 2.0]), jnp.asarray([True, False, False])
    assert proxies.trainability(sigma, identical) == -jnp.inf
    np.testing.assert_allclose(proxies.trainability(sigma, identical, leave_out=True), -0.25, atol=1e-5)
    np.testing.assert_allclose(proxies.trainability(jnp.zeros(1), jnp.zeros(1, bool)), 2 - 1e6)


def test_one_nan_sends_both_entropy_proxies_to_the_bottom():
    found = proxies.summarise(jnp.asarray([1.0, jnp.nan, 2.0]), jnp.ones(2), jnp.zeros(2, bool))
    assert found["expressivity"] == found["progressivity"] == -jnp.inf
    assert np.isfinite(found["trainability"])


def test_entropy_has_no_gradient():
    gradient = jax.jit(jax.grad(proxies.spectrum_entropy))(jnp.arange(12.0).reshape(6, 2) ** 2)
    assert not np.any(gradient)


def test_a_stride_that_does_not_divide_is_named():
    with pytest.raises(ConfigError, match="stride 2 on 5x4 pixels"):
        proxies.space_to_depth(jnp.zeros((1, 5, 4, 1)), 2)
