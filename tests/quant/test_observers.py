from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.quant import observers
from tests.arrays import load

ORACLES = Path(__file__).parents[1] / "oracles" / "igq_vit"
BY_NAME = {
    "minmax": observers.MINMAX,
    "ema": observers.EMA,
    "percentile": observers.PERCENTILES,
    "omse": observers.OMSE,
    "ptf": observers.PTF,
}


def cases(pattern):
    found = sorted(ORACLES.glob(pattern))
    assert found
    return pytest.mark.parametrize("path", found, ids=lambda path: path.stem)


@cases("baseline_fq_[!l]*.npz")
def test_official_fq_vit_observer(path):
    oracle = load(path)
    observer = BY_NAME[path.stem.split("_")[2]]
    channels = oracle["batches"].shape[-1] if oracle["per_channel"] else None
    scale, zero = observers.observe(observer, oracle["batches"], int(oracle["bits"]), channels)
    np.testing.assert_allclose(scale, oracle["scale"], rtol=1e-5)
    np.testing.assert_array_equal(zero, oracle["zero_point"])
    x_hat = observers.fake_quant_clipped(oracle["batches"][-1], scale, zero, int(oracle["bits"]))
    np.testing.assert_allclose(x_hat, oracle["dequantized"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_quantile_agrees_with_numpy_on_host_and_device(axis):
    x = np.random.default_rng(0).normal(size=(37, 5)).astype(np.float32)
    levels = (0.0, 0.1, 0.5, 0.987, 1.0)
    expected = np.quantile(x, levels, axis=axis)
    host = observers.quantile(x, levels, axis)
    assert isinstance(host, np.ndarray)
    np.testing.assert_allclose(host, expected, rtol=1e-5, atol=1e-6)
    device = jax.jit(lambda x: observers.quantile(x, levels, axis))(x)
    np.testing.assert_allclose(device, expected, rtol=1e-5, atol=1e-6)


def test_batches_in_any_split_give_the_same_minmax_but_not_the_same_ema():
    x = np.random.default_rng(1).normal(size=(6, 4, 3)).astype(np.float32)
    whole = observers.observe(observers.MINMAX, [x], 4)
    parts = observers.observe(observers.MINMAX, np.split(x, 3), 4)
    np.testing.assert_array_equal(np.array(whole), np.array(parts))
    averaged = observers.observe(observers.EMA, np.split(x, 3), 4)
    assert float(averaged[0]) < float(whole[0])


def test_symmetric_form_has_the_zero_in_the_middle():
    scale, zero = observers.affine_symmetric(jnp.float32(-3.0), jnp.float32(1.5), 4)
    assert float(scale) == pytest.approx(3.0 / 7.5) and float(zero) == 8


def test_omse_never_errs_more_than_the_full_range():
    x = np.random.default_rng(2).standard_t(2, size=(5, 400)).astype(np.float32)
    errors = [
        np.mean((x - observers.fake_quant_clipped(x, *observers.observe(observer, [x], 4), 4)) ** 2)
        for observer in (observers.OMSE, observers.MINMAX)
    ]
    assert errors[0] < errors[1]


def test_constant_data_stays_finite():
    x = np.full((2, 3, 4), 2.5, np.float32)
    for observer in (observers.MINMAX, observers.EMA, observers.PERCENTILES, observers.OMSE):
        scale, zero = observers.observe(observer, [x], 4)
        assert np.isfinite(observers.fake_quant_clipped(x, scale, zero, 4)).all()


def test_mistakes_are_named():
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(ConfigError, match="per tensor only"):
        observers.observe(observers.PERCENTILES, [x], 4, channels=3)
    with pytest.raises(ConfigError, match="5 channels and got 3"):
        observers.observe(observers.MINMAX, [x], 4, channels=5)
    with pytest.raises(ConfigError, match="per-channel state"):
        observers.observe(observers.PTF, [x], 4)
    with pytest.raises(ConfigError, match="no batch"):
        observers.observe(observers.MINMAX, [], 4)
