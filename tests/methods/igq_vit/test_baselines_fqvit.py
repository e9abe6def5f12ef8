import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.methods.igq_vit.baselines import fqvit


@pytest.mark.parametrize("scale, tolerance", [(0.02, 0.06), (0.002, 0.01)])
def test_integer_exp_is_close_to_exp(scale, tolerance):
    """The error is that of ln 2 rounded to whole codes, once an octave."""
    codes = -np.round(np.arange(0, 3, 0.05) / scale).astype(np.float32)
    value, unit = fqvit.integer_exp(codes, jnp.float32(scale))
    assert np.all(np.asarray(value) == np.round(value))
    np.testing.assert_allclose(value * unit, np.exp(codes * scale), rtol=tolerance)


def test_integer_softmax_gives_the_rounded_log2_of_softmax():
    scale = 0.05
    logits = np.round(np.random.default_rng(0).normal(size=(2, 3, 7, 20)) * 2 / scale).astype(np.float32) * scale
    got = np.asarray(fqvit.integer_softmax(logits, jnp.float32(scale), 4))
    exact = np.asarray(jax.nn.softmax(logits))
    code = -np.log2(exact)
    kept = got > 0
    assert np.all(code[~kept] > 14.4)
    error = np.abs(-np.log2(got[kept]) - code[kept])
    # Nearest power of two in the linear sense (from 1.5 up), so up to log2(4/3) and log2(1.5) away.
    assert error.max() < 0.68 and np.mean(error < 0.6) > 0.95
    np.testing.assert_array_equal(np.unique(np.log2(got[kept])) % 1, 0)


def test_integer_softmax_drops_what_is_too_small():
    logits = jnp.asarray([[0.0, -40.0, -1000.0]])
    np.testing.assert_array_equal(fqvit.integer_softmax(logits, jnp.float32(0.1), 4), [[1.0, 0.0, 0.0]])


def test_integer_layer_norm_is_close_to_layer_norm():
    rng = np.random.default_rng(1)
    channels = 32
    step = 0.02
    in_scale = (step * 2.0 ** rng.integers(0, 4, channels)).astype(np.float32)
    x = np.round(rng.normal(size=(3, 9, channels)) * 3 / in_scale).astype(np.float32) * in_scale
    weight, bias = (rng.normal(size=channels).astype(np.float32) for _ in range(2))
    out_scale = np.float32(0.03)
    got = np.asarray(jax.jit(fqvit.integer_layer_norm)(x, in_scale, weight, bias, out_scale))
    centred = x - x.mean(-1, keepdims=True)
    exact = centred / np.sqrt((centred**2).mean(-1, keepdims=True)) * weight + bias
    np.testing.assert_allclose(np.round(got / out_scale), got / out_scale, atol=1e-3)
    # 8-bit multipliers are rounded down: up to 1/128 of |x| A, besides half a step of the output.
    bound = out_scale + np.abs(x / x.std(-1, keepdims=True) * weight) / 128
    assert np.all(np.abs(got - exact) <= bound)


def test_constant_token_and_zero_weight_stay_finite():
    x = jnp.ones((1, 2, 4))
    weight = jnp.asarray([0.0, 1.0, 1.0, 1.0])
    got = fqvit.integer_layer_norm(x, jnp.full(4, 0.5), weight, jnp.zeros(4), jnp.float32(0.1))
    assert np.isfinite(got).all()


def test_kernels_are_rounded_symmetrically_per_output_channel():
    kernel = np.asarray([[1.0, 8.0], [3.0, -2.0]], np.float32)
    rounded = fqvit.minmax_variables({"params": {"a": {"kernel": kernel, "bias": np.ones(2)}}, "other": 1}, 4)
    step = np.asarray([3.0, 8.0]) / 7.5
    expected = np.clip(np.round(kernel / step), -8, 7) * step
    np.testing.assert_allclose(rounded["params"]["a"]["kernel"], expected, rtol=1e-6)
    np.testing.assert_array_equal(rounded["params"]["a"]["bias"], 1)
    assert rounded["other"] == 1
