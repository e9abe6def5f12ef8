"""The table of families is usable as configurations use it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.quant import families
from jaxvision.quant.families import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("role", ["weight", "activation"])
def test_learned_fields_and_settings_make_the_quantizer(name, role):
    """As ``models/quantized_layer.py`` does it: fit, keep the learned arrays as parameters, build again from them."""
    kind, settings = getattr(FAMILIES[name], role), getattr(FAMILIES[name], f"{role}_settings")
    x = np.abs(np.random.default_rng(0).normal(size=(3, 3, 2, 4)).astype(np.float32))
    bits = 1 if name in ("binary", "reactnet") else 3
    fitted = kind.fit(x, bits, **settings)
    learned = {field: getattr(fitted, field) for field in kind.LEARNED}
    assert all(value.dtype == jnp.float32 for value in learned.values())
    assert [field.name for field in dataclasses.fields(kind)][: len(kind.LEARNED) + 1] == [*kind.LEARNED, "bits"]
    again = kind(**learned, bits=bits, **settings)
    np.testing.assert_array_equal(again(x), fitted(x))
    traced = jax.eval_shape(lambda x: kind.fit(x, bits, **settings), x)
    assert jax.tree.map(jnp.shape, traced) == jax.tree.map(jnp.shape, fitted)


def test_a_wrong_name_is_answered_with_the_nearest():
    assert families.family("trs") is FAMILIES["trs"]
    with pytest.raises(ConfigError, match=r"config.quantizer='lqs' is unknown; did you mean 'lsq'"):
        families.family("lqs", "config.quantizer")
