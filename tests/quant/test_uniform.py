"""The uniform quantizer against its oracles, and what holds for every interval."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.quant import uniform
from tests.arrays import load

ORACLES = Path(__file__).parents[1] / "oracles" / "igq_vit"
CASES = sorted(ORACLES.glob("uniform_quantizer_*.npz"))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def run(oracle, dtype):
    x, lower, upper = (jnp.asarray(oracle[name], dtype) for name in ("x", "lower", "upper"))
    bits, clip = int(oracle["bits"]), bool(oracle["clip_zero_point"])
    scale, zero = uniform.affine_params(lower, upper, bits, clip_zero_point=clip, eps=float(oracle["eps"]))
    codes = uniform.quantize(x, scale, zero, bits)
    return scale, zero, codes, uniform.dequantize(codes, scale, zero), uniform.fake_quant(x, scale, zero, bits)


def test_there_are_oracles():
    assert len(CASES) >= 6


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_oracle_in_float64_is_exact(path, x64):
    oracle = load(path)
    scale, zero, codes, dequantized, faked = run(oracle, jnp.float64)
    np.testing.assert_array_equal(scale, oracle["scale"])
    np.testing.assert_array_equal(zero, oracle["zero_point"])
    np.testing.assert_array_equal(codes, oracle["codes"])
    np.testing.assert_allclose(dequantized, oracle["dequantized"], rtol=1e-15)
    np.testing.assert_array_equal(faked, dequantized)


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_oracle_in_float32(path):
    oracle = load(path)
    scale, zero, codes, dequantized, _ = run(oracle, jnp.float32)
    np.testing.assert_allclose(scale, oracle["scale"], rtol=1e-6)
    np.testing.assert_allclose(zero, oracle["zero_point"], rtol=1e-6)
    different = np.asarray(codes) != oracle["codes"]
    if scale.min() > 1e-7:  # the constant channel's codes have no bits left in float32; its value has
        assert different.sum() <= max(1, 1e-3 * different.size)
        np.testing.assert_allclose(np.where(different, oracle["dequantized"], dequantized), oracle["dequantized"], 1e-5)
    else:
        np.testing.assert_allclose(dequantized, oracle["dequantized"], rtol=1e-6)


@pytest.mark.parametrize("divisor", [np.float32(0.377), np.linspace(0.1, 1, 64, dtype=np.float32)])
def test_divide_is_a_division_in_every_mode(divisor):
    x = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    np.testing.assert_array_equal(uniform.divide(jnp.asarray(x), divisor), x / divisor)
    np.testing.assert_array_equal(jax.jit(uniform.divide)(x, divisor), x / divisor)
    np.testing.assert_array_equal(jax.jit(lambda x: uniform.divide(x, divisor))(x), x / divisor)
    assert np.isnan(uniform.divide(jnp.float32(np.nan), 2.0))


def test_bits_may_be_traced_and_share_one_program():
    traces = []

    @jax.jit
    def quantize(x, bits):
        traces.append(1)
        return uniform.fake_quant_interval(x, -1.0, 2.0, bits)

    x = jnp.linspace(-3, 3, 101)
    for bits in (1, 3, 4, 6, 8):
        expected = uniform.fake_quant_interval(x, -1.0, 2.0, bits)
        np.testing.assert_array_equal(quantize(x, np.int32(bits)), expected)
        assert len(np.unique(expected)) <= 2**bits
    assert len(traces) == 1


def test_half_rounds_to_even_and_zero_point_is_added_after_rounding():
    # scale 1, zero point 3: adding before rounding would take 0.5 + 3 to 4, not to 3
    codes = uniform.quantize(jnp.asarray([-0.5, 0.5, 1.5, 2.5, 99.0, -99.0]), 1.0, 3.0, 4)
    np.testing.assert_array_equal(codes, [3, 3, 5, 5, 15, 0])


def test_low_precision_activations_keep_their_type_and_are_quantized_in_float32():
    x = jnp.linspace(-1, 1, 33).astype(jnp.bfloat16)
    out = uniform.fake_quant(x, jnp.float32(0.1), jnp.float32(8), 4)
    assert out.dtype == jnp.bfloat16
    expected = uniform.fake_quant(x.astype(jnp.float32), jnp.float32(0.1), jnp.float32(8), 4)
    np.testing.assert_array_equal(out, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("bits", [0, 17, 2.5, True])
def test_impossible_widths_are_named(bits):
    with pytest.raises(ConfigError, match=r"act_bits=.*1 to 16"):
        uniform.check_bits(bits, "act_bits")
    assert uniform.check_bits(4) == 4
