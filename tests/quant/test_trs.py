"""The quantizers of TRS on the official code's numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.quant.trs import TRSActivation, TRSWeight
from tests.arrays import load

CASES = sorted((Path(__file__).parents[1] / "oracles" / "trs").glob("quantizer_*.npz"))
each = pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def run(q, x, upstream):
    """x_hat, its gradients, codes and (weights) the distance to transition; widths static."""

    @jax.jit
    def program(x, scale, upstream):
        value, back = jax.vjp(lambda x, s: q.replace(scale=s)(x), x, scale)
        distance = q.mean_distance_to_transition(x) if isinstance(q, TRSWeight) else None
        return value, *back(upstream), q.codes(x), distance

    return program(x, q.scale, upstream)


def test_there_are_oracles():
    assert len(CASES) >= 4


@each
def test_official_weights(path, x64):
    o = load(path)
    q = TRSWeight(jnp.asarray(o["s"]), int(o["bits"]), symmetric=bool(o["symmetric"]))
    value, dw, ds, codes, distance = run(q, o["W"], o["upstream_w"])
    np.testing.assert_allclose(value, o["Wq"], rtol=1e-10)
    np.testing.assert_array_equal(codes, o["code"])
    np.testing.assert_allclose(dw, o["dW"], rtol=1e-10)
    np.testing.assert_allclose(ds, o["ds"], rtol=1e-10)
    np.testing.assert_allclose(distance, o["mean_distance_to_transition"], rtol=1e-10)


@each
def test_official_inputs(path, x64):
    o = load(path)
    q = TRSActivation(jnp.asarray(o["a"]), int(o["bits"]))
    value, dx, da, *_ = run(q, o["x"], o["upstream_x"])
    np.testing.assert_allclose(value, o["xq"], rtol=1e-10)
    np.testing.assert_allclose(dx, o["dx"], rtol=1e-10)
    np.testing.assert_allclose(da, o["da"], rtol=1e-10)


@each
def test_float32_and_traced_bits(path):
    o = load(path)
    q = TRSWeight(jnp.float32(o["s"]), jnp.int32(o["bits"]), symmetric=bool(o["symmetric"]))
    codes, distance = jax.jit(lambda q, w: (q.codes(w), q.mean_distance_to_transition(w)))(q, np.float32(o["W"]))
    assert (np.asarray(codes) != o["code"]).mean() <= 1e-2
    np.testing.assert_allclose(distance, o["mean_distance_to_transition"], rtol=1e-4)


def test_start_values_are_three_deviations():
    x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    np.testing.assert_allclose(TRSWeight.fit(x, 2).scale, 3 * x.std(ddof=1), rtol=1e-6)
    relu = np.maximum(x, 0)
    expected = 3 * relu.std(ddof=1) / np.sqrt(1 - 2 / np.pi)
    np.testing.assert_allclose(TRSActivation.fit(relu, 2).scale, expected, rtol=1e-6)
    np.testing.assert_allclose(TRSActivation.fit(x, 2, signed=True).scale, 3 * x.std(ddof=1), rtol=1e-6)


def test_signed_inputs_have_the_codes_of_weights():
    x = np.random.default_rng(1).normal(size=50).astype(np.float32)
    for bits in (1, 3):
        q = TRSActivation.fit(x, bits, signed=True)
        np.testing.assert_array_equal(q.codes(x), TRSWeight(q.scale, bits).codes(x))


def test_one_bit_takes_zero_down_and_half_to_even():
    assert TRSWeight(jnp.float32(1), 1).codes(jnp.zeros(()))[()] == -1
    codes = TRSWeight(jnp.float32(1 - 1e-6), 3).codes(jnp.asarray([0.125, 0.375, -0.125, 5.0, -5.0]))
    np.testing.assert_array_equal(codes, [0, 2, 0, 3, -4])
