"""PACT on its oracles."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.quant.pact import PACT
from tests.arrays import load

CASES = sorted((Path(__file__).parents[1] / "oracles" / "quantizers").glob("pact_*.npz"))


def test_there_are_oracles():
    assert len(CASES) >= 2


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_oracle(path):
    o = load(path)
    with jax.enable_x64(True):
        q = PACT(jnp.asarray(o["alpha"]), int(o["bits"]))

        @jax.jit
        def run(x, alpha, upstream):
            value, back = jax.vjp(lambda x, a: q.replace(alpha=a)(x), x, alpha)
            return value, *back(upstream)

        value, dx, da = run(o["x"], q.alpha, o["upstream"])
    np.testing.assert_allclose(value, o["xq"], rtol=1e-10)
    np.testing.assert_array_equal(dx, o["dx"])
    np.testing.assert_allclose(da, o["dalpha"], rtol=1e-10)


def test_nothing_is_clipped_at_the_start():
    x = np.random.default_rng(0).uniform(size=20).astype(np.float32)
    assert PACT.fit(x, 4).alpha == x.max()


def test_a_bound_of_zero_is_named():
    with pytest.raises(ConfigError, match=r"PACT.alpha=0 must be finite and not 0"):
        PACT(jnp.float32(0), 4)(jnp.ones(3))
