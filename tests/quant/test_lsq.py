"""LSQ on its oracles."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.quant.lsq import LSQ
from tests.arrays import load

CASES = sorted((Path(__file__).parents[1] / "oracles" / "quantizers").glob("lsq_*.npz"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_oracle(path):
    o = {name: np.asarray(value) for name, value in load(path).items()}
    per_channel = bool(o["per_channel"])
    if per_channel:  # channels last
        o = {name: np.moveaxis(a, 0, -1) if a.ndim == 4 else a for name, a in o.items()}
        o = {name: a.reshape(-1) if name in ("s", "s_init", "ds") else a for name, a in o.items()}
    settings = {
        "signed": bool(o["signed"]),
        "per_channel": per_channel,
        "scale_gradient": bool(o["grad_scale"] != 1),
    }
    with jax.enable_x64(True):
        q = LSQ(jnp.asarray(o["s"]), int(o["bits"]), **settings)

        @jax.jit
        def run(v, s, upstream):
            value, back = jax.vjp(lambda v, s: q.replace(scale=s)(v), v, s)
            return value, *back(upstream), q.codes(v), LSQ.fit(v, q.bits, **settings).scale

        value, dv, ds, codes, start = run(o["v"], q.scale, o["upstream"])
        low, high = q.code_range()
    np.testing.assert_array_equal(codes, o["code"])
    np.testing.assert_allclose(value, o["vq"], rtol=1e-10)
    np.testing.assert_allclose(dv, o["dv"], rtol=1e-10)
    np.testing.assert_allclose(ds, o["ds"], rtol=1e-10)
    np.testing.assert_allclose(start, o["s_init"], rtol=1e-10)
    assert (-low, high) == (o["Qn"], o["Qp"])


def test_there_are_oracles():
    assert len(CASES) >= 4


def test_one_signed_bit_has_three_codes():
    v = np.linspace(-3, 3, 13).astype(np.float32)
    q = LSQ(jnp.float32(1), 1)
    np.testing.assert_array_equal(q.codes(v), np.round(np.clip(v, -1, 1)))
    np.testing.assert_allclose(LSQ.fit(v, 1).scale, 2 * np.abs(v).mean(), rtol=1e-6)


def test_a_negative_scale_does_not_mirror_the_levels():
    v = np.linspace(-3, 3, 50).astype(np.float32)
    np.testing.assert_array_equal(LSQ(jnp.float32(-0.4), 3)(v), LSQ(jnp.float32(0.4), 3)(v))


def test_a_scale_of_other_channels_is_named():
    with pytest.raises(ConfigError, match=r"\(4,\) doesn't fit the channels of \(2, 3\)"):
        LSQ(jnp.ones(4), 4, per_channel=True)(jnp.ones((2, 3)))
