"""Binary weights and inputs on their oracles, and ReActNet's shifts."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.quant import binary
from jaxvision.quant.binary import BinaryActivation, BinaryWeight, RSign
from tests.arrays import load

CASES = sorted((Path(__file__).parents[1] / "oracles" / "quantizers").glob("binary_*.npz"))


@jax.jit
def run(q, x, upstream):
    value, back = jax.vjp(q, x)
    return value, *back(upstream)


def test_there_are_oracles():
    assert len(CASES) >= 2


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_oracle(path):
    o = load(path)
    w, upstream, expected, gradient = (np.moveaxis(o[name], 0, -1) for name in ("W", "upstream_w", "Wq", "dW"))
    with jax.enable_x64(True):
        value, dw = run(BinaryWeight(), w, upstream)
        np.testing.assert_allclose(value, expected, rtol=1e-10)
        np.testing.assert_allclose(dw, gradient, rtol=1e-10)
        value, dx = run(BinaryActivation(), o["x"], o["upstream_x"])
    np.testing.assert_array_equal(value, o["xq"])
    np.testing.assert_allclose(dx, o["dx"], rtol=1e-10)


def test_reactnets_weights_have_the_same_values_and_a_gradient_without_the_mean():
    """Official ``HardBinaryConv``: the mean is detached, and so is everything but the clipped weights."""
    w, upstream = jnp.asarray([[0.5, -0.25], [-1.0, 1.5]]), jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    value, dw = run(BinaryWeight(scaled_gradient=False), w, upstream)
    np.testing.assert_array_equal(value, [[0.75, -0.875], [-0.75, 0.875]])
    np.testing.assert_array_equal(value, BinaryWeight()(w))
    np.testing.assert_array_equal(dw, [[1, 2], [3, 0]])


def test_sign_of_zero_is_one_and_the_edges_are_declared():
    x = jnp.asarray([-2.0, -1.0, -0.0, 0.0, 1.0, 1.5])
    np.testing.assert_array_equal(BinaryActivation().codes(x), [-1, -1, 1, 1, 1, 1])
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: binary.clipped_sign(x).sum()))(x), [0, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: binary.approx_sign(x).sum()))(x), [0, 0, 2, 2, 0, 0])
    assert np.isnan(binary.sign(jnp.float32(np.nan)))


def test_learned_thresholds():
    x = jnp.asarray([[0.2, -0.3], [0.6, 0.1]])
    q = RSign.fit(x, 1)
    np.testing.assert_array_equal(q(x), BinaryActivation()(x))
    q = q.replace(shift=jnp.asarray([0.5, -0.5]))
    np.testing.assert_array_equal(q(x), [[-1, 1], [1, 1]])
    dx, shift = jax.jit(jax.grad(lambda x, s: q.replace(shift=s)(x).sum(), (0, 1)))(x, q.shift)
    np.testing.assert_allclose(dx, 2 - 2 * np.abs(x - q.shift), rtol=1e-5)
    np.testing.assert_allclose(shift, -dx.sum(0), rtol=1e-5)


def test_shifted_prelu():
    x = np.linspace(-2, 2, 9).astype(np.float32)
    shift, slope, offset = (jnp.float32(v) for v in (0.5, 0.25, -1.0))
    expected = np.where(x > 0.5, x - 0.5, 0.25 * (x - 0.5)) - 1
    np.testing.assert_allclose(binary.rprelu(x, shift, slope, offset), expected, rtol=1e-6)
    gradients = jax.jit(jax.grad(lambda *p: binary.rprelu(x, *p).sum(), (0, 1, 2)))(shift, slope, offset)
    below = x <= 0.5
    np.testing.assert_allclose(gradients, (-np.where(below, 0.25, 1).sum(), (x - 0.5)[below].sum(), x.size), rtol=1e-5)


def test_more_bits_or_no_weights_are_named():
    with pytest.raises(ConfigError, match="BinaryWeight: bits=2 must be 1"):
        BinaryWeight.fit(jnp.ones(3), 2)
    with pytest.raises(ConfigError, match=r"call step\(x\)"):
        BinaryWeight().step()
