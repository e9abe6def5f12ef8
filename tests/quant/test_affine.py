"""Affine quantization on its oracles, and how its intervals are found."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.quant import observers, uniform, weights
from jaxvision.quant.activation import AffineQuantizer
from jaxvision.quant.affine import Affine
from tests.arrays import load

CASES = sorted((Path(__file__).parents[1] / "oracles" / "quantizers").glob("affine_*.npz"))


def test_there_are_oracles():
    assert len(CASES) >= 4


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_oracle(path):
    o = {name: np.asarray(value) for name, value in load(path).items()}
    settings = {"symmetric": bool(o["symmetric"]), "per_channel": bool(o["per_channel"]), "clip": float(o["clip"])}
    if settings["per_channel"]:  # channels last
        o = {name: np.moveaxis(a, 0, -1) if a.ndim == 4 else a for name, a in o.items()}
    with jax.enable_x64(True):

        @jax.jit
        def run(x, upstream):
            q = Affine.fit(x, int(o["bits"]), **settings)
            value, back = jax.vjp(lambda x, s: q.replace(scale=s)(x), x, q.scale)
            return q, value, *back(upstream), q.codes(x)

        q, value, dx, ds, codes = run(o["x"], o["upstream"])
    np.testing.assert_allclose(q.scale, o["scale"].reshape(q.scale.shape), rtol=1e-12)
    np.testing.assert_array_equal(q.zero_point, o["zero_point"].reshape(q.scale.shape))
    np.testing.assert_array_equal(codes, o["code"])
    np.testing.assert_allclose(value, o["xq"], rtol=1e-10)
    np.testing.assert_array_equal(dx, o["dx"])
    assert not np.any(ds)  # calibrated, not learned


def test_squared_error_search_is_that_of_the_weights_and_of_the_observers():
    x = np.random.default_rng(0).standard_t(3, size=(60, 5)).astype(np.float32)
    found = Affine.fit(x, 3, method="mse", per_channel=True)
    expected = uniform.affine_params(*weights.mse_interval(x, 3), 3)
    np.testing.assert_array_equal((found.scale, found.zero_point), expected)
    symmetric = Affine.fit(x, 3, method="mse", symmetric=True)
    widest = Affine.fit(x, 3, symmetric=True)
    assert np.square(symmetric(x) - x).sum() < np.square(widest(x) - x).sum()
    assert symmetric.scale < widest.scale


def test_percentiles_are_the_observers_and_can_be_traced():
    x = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    found = jax.jit(lambda x: Affine.fit(x, 4, method="percentile", epsilon=1.0, per_channel=True))(x)
    lower, upper = observers.quantile(x, (0.01, 0.99), axis=0)
    np.testing.assert_allclose(found.scale, (upper - lower) / 15, rtol=1e-5)
    np.testing.assert_allclose(
        found.scale, uniform.affine_params(*weights.percentile_interval(x, 1.0), 4)[0], rtol=1e-4
    )


def test_the_quantizer_of_a_site_is_one_of_them():
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    site = AffineQuantizer.from_interval(x.min(0), x.max(0), 4)
    own = Affine.fit(x, 4, per_channel=True)
    np.testing.assert_array_equal(site(x, 4), own(x))
    np.testing.assert_array_equal(site(x, 4), uniform.fake_quant(x, site.scale, site.zero_point, 4))
    np.testing.assert_array_equal(site.zero(), own.zero())


def test_mistakes_are_named():
    x = np.arange(6, dtype=np.float32)
    with pytest.raises(ConfigError, match="method='mean' is unknown"):
        Affine.fit(x, 4, method="mean")
    with pytest.raises(ConfigError, match="Affine: bits=1 must be a whole number from 2 to 16"):
        Affine.fit(x, 1, symmetric=True)
    with pytest.raises(ConfigError, match="clip=0"):
        Affine.fit(x, 4, clip=0)
