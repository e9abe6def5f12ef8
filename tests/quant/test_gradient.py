"""Gradient quantization against its oracles, the gate in a backward pass, and the statistics that leave it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import devices
from jaxvision.core.errors import ConfigError
from jaxvision.quant import gradient
from tests.arrays import load

ORACLES = Path(__file__).parents[1] / "oracles"
CASES = sorted((ORACLES / "lbt").glob("grad_quant_[0-9].npz"))
PIECEWISE = sorted((ORACLES / "lbt").glob("grad_quant_piecewise_*.npz"))
GAMMA = jnp.asarray([0.7, 0.0, 0.0], jnp.float32)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def sample(shape=(4, 5, 5, 6), seed=0, dtype=np.float32):
    return (np.random.default_rng(seed).standard_t(3, shape) * 1e-3).astype(dtype)


def test_there_are_oracles():
    assert len(CASES) >= 3 and len(PIECEWISE) >= 2


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_oracle(path, x64):
    o = load(path)
    g, bits, gamma = jnp.asarray(o["G"]), int(o["bits"]), float(o["gamma"])
    codes = gradient.quantize_gradient(g, gamma, bits, jnp.asarray(o["noise"], g.dtype))
    tolerance = {"rtol": 1e-10, "atol": 1e-12 * np.abs(o["G"]).max()}
    if o["G"].dtype == np.float32:
        tolerance = {"rtol": 2e-6, "atol": 1e-6 * np.abs(o["G"]).max()}
    np.testing.assert_allclose(codes.dequantize(), o["Gq"], **tolerance)
    near = gradient.quantize_gradient(g, gamma, bits)
    np.testing.assert_allclose(near.dequantize(), o["Gq_nearest"], **tolerance)
    assert codes.codes.dtype == jnp.int8
    if "code" in o:
        np.testing.assert_array_equal(codes.codes, o["code"])
        np.testing.assert_allclose(codes.step, o["scale"], rtol=1e-6)
        assert codes.n_total == g.size
        assert codes.n_clipped == np.sum(np.abs(o["G"]) > gamma * np.abs(o["G"]).max())
    else:  # all zero
        assert not np.any(codes.dequantize()) and codes.n_total == codes.n_clipped == 0


@pytest.mark.parametrize("path", [p for p in CASES if "code" in load(p)], ids=lambda p: p.stem)
def test_codes_in_float32_through_jit_with_traced_bits(path):
    o = load(path)
    quantize = jax.jit(gradient.quantize_gradient)
    arrays = (jnp.asarray(o[k], jnp.float32) for k in ("G", "gamma"))
    codes = quantize(*arrays, jnp.int32(o["bits"]), jnp.asarray(o["noise"], jnp.float32)).codes
    assert np.mean(np.asarray(codes) != o["code"]) <= 2e-3


@pytest.mark.parametrize("path", PIECEWISE, ids=lambda p: p.stem)
def test_piecewise_oracle(path, x64):
    o = load(path)
    exponent = round(-np.log2(float(o["narrow_ratio"]))) - gradient.NARROW_EXPONENT
    noise = jnp.asarray(o["noise_wide"]), jnp.asarray(o["noise_narrow"])
    codes = gradient.quantize_gradient(
        jnp.asarray(o["G"]), 1.0, int(o["bits"]), noise, kind="piecewise", exponent=exponent
    )
    np.testing.assert_allclose(codes.dequantize(), o["Gq"], rtol=1e-10, atol=1e-12 * np.abs(o["G"]).max())


def test_per_channel_is_the_uniform_quantizer_of_each_channel():
    g = sample() * np.linspace(0.1, 3, 6, dtype=np.float32)
    quantize = jax.jit(gradient.quantize_gradient, static_argnames=("bits", "kind"))
    codes = quantize(jnp.asarray(g), 0.8, 4, kind="per_channel")
    alone = [quantize(jnp.asarray(g[..., c : c + 1]), 0.8, 4) for c in range(6)]
    np.testing.assert_array_equal(codes.codes, np.concatenate([a.codes for a in alone], -1))
    np.testing.assert_allclose(codes.step, [a.step for a in alone], rtol=1e-6)


def test_rounding_is_unbiased_inside_and_exact_at_the_edge():
    g = np.full((20000, 2), 0.123, np.float32)
    g[0] = 1.0
    quantize = jax.jit(gradient.quantize_gradient, static_argnames=("bits", "noise_bits"))
    for noise_bits in (32, 8):
        out = quantize(jnp.asarray(g), 0.5, 4, jax.random.key(0), noise_bits=noise_bits).dequantize()
        np.testing.assert_allclose(np.mean(out[1:]), 0.123, atol=2e-3)
        assert len(np.unique(out[1:])) == 2
        np.testing.assert_allclose(out[0], 0.5, rtol=1e-6)  # beyond the edge: always the edge
    noise = gradient.rounding_noise(jax.random.key(0), (64, 512), noise_bits=8)
    assert len(np.unique(noise)) == 256 and abs(float(noise.min() + noise.max())) == 0


def test_noise_is_uniform_and_independent_between_places_rows_and_keys():
    keys = [jax.random.key(0), jax.random.key(1), jax.random.fold_in(jax.random.key(0), 1)]
    draws = [np.asarray(gradient.rounding_noise(key, (64, 32, 32)), np.float64) * np.sqrt(12) for key in keys]
    for z in draws:
        counts = np.histogram(z, 64, (-(3**0.5), 3**0.5))[0]
        assert np.abs(z).max() < 3**0.5 and abs(np.sum((counts - 1024) ** 2 / 1024) - 63) < 5 * np.sqrt(126)
        pairs = [(z[:, :, :-d], z[:, :, d:]) for d in (1, 2, 16)]
        pairs += [(z[:, :-1], z[:, 1:]), *((z[:-d], z[d:]) for d in (1, 2, 32))]
        assert all(abs(np.mean(a * b)) * np.sqrt(a.size) < 4.5 for a, b in pairs)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.mean(draws[a] * draws[b])) * np.sqrt(draws[a].size) < 4.5


@pytest.mark.parametrize("kind", ["uniform", "piecewise", "per_channel", "dorefa"])
def test_every_kind_keeps_range_and_zero_gradients_and_compiles_once(kind):
    traces = []
    alone = jax.jit(
        lambda g, width: gradient.quantize_gradient(g, 0.9, width, jax.random.key(1), kind=kind), static_argnums=1
    )

    @jax.jit
    def quantize(g, bits, key):
        traces.append(1)
        return gradient.quantize_gradient(g, 0.9, bits, key, kind=kind)

    g = jnp.asarray(sample())
    for width in (3, 8):
        codes = quantize(g, jnp.int32(width), jax.random.key(1))
        np.testing.assert_array_equal(codes.codes, alone(g, width).codes)
        assert np.abs(codes.codes).max() <= (2**width - 1 if kind == "dorefa" else 2 ** (width - 1) - 1)
        assert np.abs(codes.dequantize() - g).max() <= 1.01 * np.abs(g).max()
    assert len(traces) == 1
    zero = quantize(jnp.zeros_like(g), jnp.int32(4), jax.random.key(1))
    assert not np.any(zero.dequantize()) and zero.n_total == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_counts_nothing_and_stays_visible(bad):
    g = sample()
    g[0, 0, 0, 0] = bad
    codes = gradient.quantize_gradient(jnp.asarray(g), 0.7, 4, jax.random.key(0))
    assert codes.n_total == 0 and codes.n_clipped == 0
    assert not np.isfinite(codes.dequantize()).all()


def test_gate_is_the_identity_and_its_cotangents_are_the_quantized_gradient_and_the_counts():
    y, g = jnp.asarray(sample(seed=1)), jnp.asarray(sample())
    out, pull = jax.vjp(lambda y, s: gradient.gradient_gate(y, s, jax.random.key(3), 4), y, GAMMA)
    np.testing.assert_array_equal(out, y)
    dy, dstate = pull(g)
    codes = gradient.quantize_gradient(g, GAMMA[0], 4, jax.random.key(3))
    np.testing.assert_array_equal(dy, codes.dequantize())
    np.testing.assert_array_equal(dstate, [0, codes.n_clipped, codes.n_total])
    assert codes.n_clipped > 0


def test_gate_used_twice_adds_the_counts_and_stores_no_gradient():
    y = jnp.asarray(sample(seed=1))

    def loss(y, state, bits):
        once = gradient.gradient_gate(jnp.sin(y), state, None, bits)
        return jnp.sum(gradient.gradient_gate(once * 2, state, None, bits) ** 2)

    dstate = jax.jit(jax.grad(loss, 1))(y, GAMMA, jnp.int32(4))
    assert dstate[2] == 2 * y.size
    _, pull = jax.vjp(lambda y, s: gradient.gradient_gate(y, s, jax.random.key(0), 4), y, GAMMA)
    assert sum(leaf.size for leaf in jax.tree.leaves(pull)) <= 4


def test_gate_keeps_bfloat16_and_rounds_in_float32():
    y, g = (jnp.asarray(sample(seed=s)).astype(jnp.bfloat16) for s in (1, 2))
    _, pull = jax.vjp(lambda y, s: gradient.gradient_gate(y, s, None, 8), y, GAMMA)
    dy, dstate = pull(g)
    assert dy.dtype == jnp.bfloat16 and dstate.dtype == jnp.float32
    expected = gradient.quantize_gradient(g.astype(jnp.float32), GAMMA[0], 8).dequantize()
    np.testing.assert_array_equal(dy, expected.astype(jnp.bfloat16))


def test_a_gate_that_is_off_passes_the_gradient():
    y, g = jnp.asarray(sample(seed=1)), jnp.asarray(sample())
    _, pull = jax.vjp(lambda y, s: gradient.gradient_gate(y, s, None, gradient.OFF), y, GAMMA)
    dy, dstate = pull(g)
    np.testing.assert_array_equal(dy, g)
    assert not np.any(dstate)


def test_two_devices_under_pmap_quantize_as_one_does():
    """A maximum, counts and noise that depended on the device count would differ here (vmap with an axis name)."""
    g = jnp.asarray(sample((8, 3, 3, 4)))

    def local(part):
        with devices.device_axis("data"):
            codes = gradient.quantize_gradient(part, 0.6, 4, jax.random.key(5))
        return codes.codes, codes.step, codes.n_clipped, codes.n_total

    whole = gradient.quantize_gradient(g, 0.6, 4, jax.random.key(5))
    codes, step, clipped, total = jax.jit(jax.vmap(local, axis_name="data"))(g.reshape(2, 4, 3, 3, 4))
    np.testing.assert_array_equal(codes.reshape(g.shape), whole.codes)
    np.testing.assert_array_equal(step, [whole.step] * 2)
    np.testing.assert_array_equal(clipped, [whole.n_clipped] * 2)
    np.testing.assert_array_equal(total, [whole.n_total] * 2)
    assert devices.max_over_devices({"a": 3}) == {"a": 3}


@pytest.mark.parametrize("bits", [0, 1, True])
def test_impossible_widths_are_named(bits):
    with pytest.raises(ConfigError, match=r"gradient bits=.*2 to 16"):
        gradient.gradient_gate(jnp.ones((2, 3)), GAMMA, None, bits)


def test_other_mistakes_are_named():
    g = jnp.ones((2, 3))
    with pytest.raises(ConfigError, match="did you mean 'piecewise'"):
        gradient.quantize_gradient(g, 1.0, 4, kind="piecewice")
    with pytest.raises(ConfigError, match="3 to 16 for 'piecewise'"):
        gradient.quantize_gradient(g, 1.0, 2, kind="piecewise")
    with pytest.raises(ConfigError, match="noise_bits=16 must be 8 or 32"):
        gradient.quantize_gradient(g, 1.0, 4, noise_bits=16)


@pytest.mark.parametrize("bits", [9, 16])
def test_more_than_8_bits(bits):
    g = jnp.asarray(sample())
    codes = gradient.quantize_gradient(g, 1.0, bits)
    assert codes.codes.dtype == jnp.int32 and np.abs(codes.codes).max() == 2 ** (bits - 1) - 1
    np.testing.assert_allclose(codes.dequantize(), g, atol=float(codes.step) * 0.51)
