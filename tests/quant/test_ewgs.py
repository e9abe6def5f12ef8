"""EWGS on the official code's numbers, and its delta."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.quant import ewgs
from jaxvision.quant.ewgs import EWGSActivation, EWGSWeight
from tests.arrays import load

CASES = sorted((Path(__file__).parents[1] / "oracles" / "quantizers").glob("ewgs_*.npz"))
each = pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def test_there_are_oracles():
    assert len(CASES) >= 3


def made(kind, o, tensor):
    bits = int(o[f"levels_{tensor}"]).bit_length() - 1
    return kind(jnp.asarray(o[f"lower_{tensor}"]), jnp.asarray(o[f"upper_{tensor}"]), bits, float(o[f"delta_{tensor}"]))


@pytest.mark.parametrize("tensor", ["w", "x"])
@each
def test_official_values_and_gradients(path, tensor, x64):
    o = load(path)
    name, kind = {"w": ("W", EWGSWeight), "x": ("x", EWGSActivation)}[tensor]
    q = made(kind, o, tensor)

    @jax.jit
    def run(x, lower, upper, upstream):
        value, back = jax.vjp(lambda x, l, u: q.replace(lower=l, upper=u)(x), x, lower, upper)
        return value, *back(upstream)

    value, dx, lower, upper = run(o[name], q.lower, q.upper, o[f"upstream_{tensor}"])
    np.testing.assert_allclose(value, o[f"{name}q"], rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(dx, o[f"d{name}"], rtol=1e-10)
    np.testing.assert_allclose(lower, o[f"dlower_{tensor}"], rtol=1e-9)
    np.testing.assert_allclose(upper, o[f"dupper_{tensor}"], rtol=1e-9)


@each
def test_official_start_of_the_output_scale(path, x64):
    o = load(path)

    def layer(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID")

    wide = EWGSActivation(jnp.asarray(o["lower_x"]), jnp.asarray(o["upper_x"] / 0.7), made(EWGSActivation, o, "x").bits)
    kernel = made(EWGSWeight, o, "w")
    scale = jax.jit(lambda x, w: ewgs.output_scale(layer(x, w), layer(wide(x), kernel(w))))(o["x"], o["W"])
    np.testing.assert_allclose(scale, o["output_scale_init"], rtol=1e-9)


def test_delta_zero_is_the_straight_through_estimator():
    w = np.random.default_rng(0).normal(size=40).astype(np.float32)
    q = EWGSWeight.fit(w, 2, delta=0.0)
    dw = jax.jit(jax.grad(lambda w: q(w).sum()))(w)
    width = float(q.upper - q.lower)
    np.testing.assert_allclose(dw, np.where(np.abs(w) <= q.upper, 2 / width, 0), rtol=1e-5)


def test_start_values():
    x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    q = EWGSWeight.fit(x, 4)
    np.testing.assert_allclose((q.lower, q.upper), (-3 * x.std(ddof=1), 3 * x.std(ddof=1)), rtol=1e-6)
    q = EWGSActivation.fit(np.abs(x), 4)
    expected = np.abs(x).min(), 3 * np.abs(x).std(ddof=1) / np.sqrt(1 - 2 / np.pi)
    np.testing.assert_allclose((q.lower, q.upper), expected, rtol=1e-6)


def test_trace_of_a_diagonal_hessian_is_exact_and_of_a_full_one_close():
    x, key = jnp.arange(1.0, 5), jax.random.key(0)
    trace = jax.jit(lambda x: ewgs.hessian_trace(jax.grad(lambda x: jnp.sum(x**3)), x, key))(x)
    np.testing.assert_allclose(trace, 6 * x.sum(), rtol=1e-5)
    matrix = np.random.default_rng(0).normal(size=(30, 30)).astype(np.float32)
    hessian, x = matrix @ matrix.T, jnp.zeros(30)
    trace = jax.jit(lambda x: ewgs.hessian_trace(lambda x: hessian @ x, x, key, max_draws=400, tolerance=0.0))(x)
    np.testing.assert_allclose(trace, np.trace(hessian), rtol=0.1)


def test_delta_is_the_mean_curvature_over_the_gradients_spread_and_never_negative():
    x = jnp.asarray([0.0, 0.5, 1.0, 0.25])

    def gradient(x, factor):
        return factor * x

    delta = jax.jit(lambda x: ewgs.hutchinson_delta(gradient, x, (1.0, 2.0, 4.0), jax.random.key(0)))(x)
    np.testing.assert_allclose(delta, 1 / (3 * np.std(x, ddof=1)), rtol=1e-5)  # the factor cancels
    assert ewgs.hutchinson_delta(lambda x, f: -f * x, x, (1.0,), jax.random.key(0)) == 0
    with pytest.raises(ConfigError, match="no batch"):
        ewgs.hutchinson_delta(gradient, x, (), jax.random.key(0))


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"EWGSWeight: lower=1 must lie below upper=1"):
        EWGSWeight(jnp.float32(1), jnp.float32(1), 4)(jnp.ones(3))
    with pytest.raises(ConfigError, match=r"EWGSActivation.delta=-1 must be at least 0"):
        EWGSActivation(jnp.float32(0), jnp.float32(1), 4, -1.0)(jnp.ones(3))
