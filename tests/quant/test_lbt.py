"""The quantizers of LBT on the official code's numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.quant.lbt import LBTActivation, LBTWeight
from tests.arrays import load

ORACLES = Path(__file__).parents[1] / "oracles" / "lbt"


def cases(pattern):
    found = sorted(ORACLES.glob(pattern))
    assert found
    return pytest.mark.parametrize("path", found, ids=lambda path: path.stem)


def run(q, x, upstream):
    """x_hat, its gradients, codes and the start value; widths static."""

    @jax.jit
    def program(x, scale, upstream):
        value, back = jax.vjp(lambda x, s: q.replace(scale=s)(x), x, scale)
        settings = {"signed": q.signed} if isinstance(q, LBTActivation) else {}
        return value, *back(upstream), q.codes(x), type(q).fit(x, q.bits, **settings).scale

    return program(x, q.scale, upstream)


@cases("weight_quant_*.npz")
def test_official_weights(path):
    """With a negative s the official weights change their sign with it, and ours stay: |s| in both places."""
    o = load(path)
    double = o["W"].dtype == np.float64
    with jax.enable_x64(double):
        q = LBTWeight(jnp.asarray(o["s"]), int(o["bits"]))
        value, dw, ds, codes, _ = run(q, o["W"], o["upstream"])
    rtol = 1e-10 if double else 2e-6
    sign = np.sign(o["s"])
    np.testing.assert_array_equal(codes, o["signed_code"])
    np.testing.assert_allclose(value, sign * o["Wq"], rtol=rtol, atol=1e-15 if double else 1e-7)
    np.testing.assert_allclose(dw, sign * o["dW"], rtol=rtol)
    np.testing.assert_allclose(ds, sign * o["ds"], rtol=max(rtol, 1e-9) if double else 1e-4)


@cases("act_quant_*.npz")
def test_official_inputs(path):
    o = load(path)
    with jax.enable_x64(True):
        q = LBTActivation(jnp.asarray(o["u"]), int(o["bits"]), signed=bool(o["signed"]))
        value, dx, du, codes, start = run(q, o["x"], o["upstream"])
    if q.signed and o["code"].min() >= 0:  # whether the codes of a signed oracle start at 0 is left open
        codes = codes + 2 ** (int(o["bits"]) - 1) - 1
    np.testing.assert_array_equal(codes, o["code"])
    np.testing.assert_allclose(value, o["xq"], rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(dx, o["dx"], rtol=1e-10)
    np.testing.assert_allclose(du, o["du"], rtol=1e-10)
    np.testing.assert_allclose(start, o["u_init"], rtol=1e-10)


def test_signed_inputs_follow_their_formula():
    """No stored case is signed: x_hat = u q, q = 2 round(n t) / n - 1, t = clip((x + u) / 2u, 0, 1), n = 2^b - 2."""
    x = np.random.default_rng(0).normal(size=200).astype(np.float32)
    u, n = np.float32(1.3), 14
    q = LBTActivation(jnp.float32(u), 4, signed=True)
    value, dx, du, codes, start = run(q, x, np.ones_like(x))
    expected = 2 * np.round(n * np.clip((x + u) / (2 * u), 0, 1)) / n - 1
    inside = np.abs(x) <= u
    np.testing.assert_allclose(value, u * expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, inside, rtol=1e-5)
    np.testing.assert_allclose(du, np.sum(expected - inside * x / u), rtol=1e-4)
    np.testing.assert_array_equal(codes, np.round(7 * expected))
    np.testing.assert_allclose(start, 3 * x.std(ddof=1), rtol=1e-6)


def test_start_value_of_weights():
    w = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    np.testing.assert_allclose(LBTWeight.fit(w, 4).scale, 3 * w.std(ddof=1), rtol=1e-6)


def test_symmetric_codes_need_two_bits():
    with pytest.raises(ConfigError, match="LBTWeight: bits=1 must be a whole number from 2 to 8"):
        LBTWeight.fit(np.arange(5.0, dtype=np.float32), 1)
    with pytest.raises(ConfigError, match="LBTActivation: bits=1"):
        LBTActivation(jnp.float32(1), 1, signed=True)(jnp.ones(3))
    assert LBTActivation(jnp.float32(1), 1)(jnp.ones(3)).sum() == 3
