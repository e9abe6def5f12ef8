"""DoReFa on its oracles: weights, inputs, gradients."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.quant import gradient
from jaxvision.quant.dorefa import DoReFaActivation, DoReFaWeight
from tests.arrays import load

CASES = sorted((Path(__file__).parents[1] / "oracles" / "quantizers").glob("dorefa_*.npz"))
each = pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def test_there_are_oracles():
    assert {int(load(path)["bits"]) for path in CASES} >= {1, 2, 4}


@pytest.mark.parametrize("traced", [True, False])
@each
def test_weights(path, traced, x64):
    o = load(path)
    known = int(o["bits"])

    @jax.jit
    def run(bits, w, upstream):
        found = []
        for max_gradient in (True, False):
            q = DoReFaWeight(bits if traced else known, max_gradient=max_gradient)
            value, back = jax.vjp(q, w)
            found.append((value, back(upstream)[0], q.codes(w)))
        return found

    for name, (value, dw, codes) in zip(("has", "stop"), run(known, o["W"], o["upstream_w"]), strict=True):
        np.testing.assert_allclose(value, o["Wq"], rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(dw, o[f"dW_max_{name}_gradient"], rtol=1e-9, atol=1e-13)
        np.testing.assert_array_equal(codes % 2, 1)


@each
def test_inputs(path, x64):
    o = load(path)
    q = DoReFaActivation(int(o["bits"]))
    value, dx = jax.jit(lambda x, g: (q(x), *jax.vjp(q, x)[1](g)))(o["x"], o["upstream_x"])
    np.testing.assert_allclose(value, o["xq"], rtol=1e-10)
    np.testing.assert_allclose(dx, o["dx"], rtol=1e-10)


def quantized(g, bits, noise=None):
    return gradient.quantize_gradient(g, 1.0, bits, noise, kind="dorefa").dequantize()


@each
def test_gradients(path, x64):
    o = load(path)
    value = jax.jit(quantized, static_argnums=1)(o["G"], int(o["bits"]), o["grad_noise"])
    np.testing.assert_allclose(value, o["Gq"], rtol=1e-10, atol=1e-14)


def test_gradients_of_zero_stay_and_the_noise_makes_them_unbiased():
    assert (quantized(jnp.zeros((2, 3)), 3) != 0).sum() == 0
    g = jnp.broadcast_to(jnp.asarray([1.0, 0.3, -0.6]), (4000, 3))
    noise = jax.random.uniform(jax.random.key(0), g.shape, minval=-0.5, maxval=0.5)
    mean = jax.jit(lambda g, noise: quantized(g, 3, noise).mean(0))(g, noise)
    np.testing.assert_allclose(mean[1:], g[0, 1:], atol=0.02)


def test_the_step_of_one_bit_needs_the_weights():
    w = jnp.asarray([-1.0, 0.0, 3.0])
    for bits in (1, jnp.int32(1)):
        np.testing.assert_allclose(DoReFaWeight(bits).step(w), 4 / 3, rtol=1e-6)
    with pytest.raises(ConfigError, match=r"call step\(x\)"):
        DoReFaWeight(1).step()
    assert DoReFaWeight(2).step() == pytest.approx(1 / 3)


def test_a_kernel_of_zeros_stays_finite():
    for bits in (1, 4):
        loss, dw = jax.jit(jax.value_and_grad(lambda w, b=bits: DoReFaWeight(b)(w).sum()))(jnp.zeros(5))
        assert np.isfinite(loss) and np.isfinite(dw).all()
