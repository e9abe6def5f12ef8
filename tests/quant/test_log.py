from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.quant import log
from tests.arrays import load

ORACLES = Path(__file__).parents[1] / "oracles" / "igq_vit"


def cases(pattern):
    found = sorted(ORACLES.glob(pattern))
    assert found
    return pytest.mark.parametrize("path", found, ids=lambda path: path.stem)


@cases("baseline_fq_log2_*.npz")
def test_official_log2(path):
    oracle = load(path)
    x_hat = log.Log2Quantizer(jnp.int32(oracle["bits"]))(oracle["x"], 2)
    np.testing.assert_allclose(x_hat, oracle["dequantized"], rtol=1e-5)


@cases("baseline_repq_logsqrt2_*.npz")
def test_official_log_sqrt2(path):
    oracle = load(path)
    x_hat = log.LogSqrt2Quantizer(jnp.asarray(oracle["delta"]), jnp.int32(oracle["bits"]))(oracle["x"], 2)
    np.testing.assert_allclose(x_hat, oracle["dequantized"], rtol=1e-5)


@cases("baseline_ptq4vit_twin_softmax_*.npz")
def test_official_twin_softmax_adds_both_ranges_and_the_method_does_not(path):
    oracle = load(path)
    a, split, bits = oracle["attention"], oracle["split"], int(oracle["bits"])
    literal = log.TwinSoftmaxQuantizer(split, jnp.int32(bits), official_sum=True)(a, 3)
    np.testing.assert_allclose(literal, oracle["a_hat"], rtol=1e-5, atol=1e-7)
    method = log.TwinSoftmaxQuantizer(split, jnp.int32(bits))(a, 3)
    np.testing.assert_allclose(literal - method, np.where(a > split, split, 0), atol=1e-6)


@cases("baseline_ptq4vit_twin_gelu_*.npz")
def test_official_twin_gelu(path):
    oracle = load(path)
    quantizer = log.TwinGeluQuantizer(
        oracle["act_scale"][0], np.float32(oracle["negative_scale"]), jnp.int32(oracle["bits"])
    )
    np.testing.assert_allclose(quantizer(oracle["x"], 4), oracle["x_hat"], rtol=1e-5, atol=1e-7)


QUANTIZERS = {
    "log2": lambda x, bits: log.log2_quantize(x, bits),
    "log_sqrt2": lambda x, bits: log.log_sqrt2_quantize(x, jnp.float32(0.9), bits),
    "twin_softmax": lambda x, bits: log.twin_softmax_quantize(x, jnp.float32(2.0**-4), bits),
    "twin_gelu": lambda x, bits: log.twin_gelu_quantize(x, jnp.float32(0.1), jnp.float32(0.02), bits),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_contract(name):
    """Finite at 0, idempotent, jit equals eager with traced bits, few levels, better with more bits."""
    quantize = QUANTIZERS[name]
    x = np.concatenate([[0.0, 1e-30, 1.0], np.random.default_rng(0).uniform(size=500)]).astype(np.float32)
    with jax.debug_nans(True):
        x_hat = np.asarray(quantize(x, 4))
    np.testing.assert_array_equal(quantize(x_hat, 4), x_hat)
    np.testing.assert_allclose(jax.jit(quantize)(x, jnp.int32(4)), x_hat, rtol=1e-6)
    assert len(np.unique(x_hat)) <= 2**4 + 1  # the log quantizers of the official codes have a free extra zero
    assert np.all(np.diff(np.asarray(quantize(np.sort(x), 4))) >= 0) or name == "twin_softmax"
    assert np.mean((quantize(x, 8) - x) ** 2) <= np.mean((x_hat - x) ** 2)


def test_zero_attention_is_zero():
    zero = np.zeros(3, np.float32)
    for bits in (3, 4, 8):
        np.testing.assert_array_equal(log.log2_quantize(zero, bits), zero)
        np.testing.assert_array_equal(log.log_sqrt2_quantize(zero, jnp.float32(0.5), bits), zero)
