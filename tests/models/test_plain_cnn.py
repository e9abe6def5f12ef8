"""The plain network: shapes, strides, dilations, the logits of pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.models import zoo
from jaxvision.models.plain_cnn import PlainCNN


def test_parameters_and_logits():
    module = zoo.build("plain_cnn", num_classes=10)
    shapes = zoo.variable_shapes(module, (8, 8), 1)
    weights = 9 * (1 * 16 + 16 * 16 + 16 * 32 + 32 * 32) + 2 * (16 + 16 + 32 + 32) + 33 * 10
    assert trees.count_parameters(shapes["params"]) == weights
    taps = {}
    jax.eval_shape(lambda v: module.apply(v, jnp.zeros((2, 8, 8, 1)), tap=lambda n, x: taps.setdefault(n, x)), shapes)
    assert [taps[f"conv{i}"].shape[1:] for i in (2, 3, 4)] == [(8, 8, 16), (4, 4, 16), (4, 4, 32)]
    assert taps["fc"].shape == (2, 32)


def test_a_dense_network_sees_as_far_as_its_dilations_say():
    module = PlainCNN(3, features=(2, 2), strides=(1, 1), dilations=(1, 3), dense=True)
    image = jax.random.normal(jax.random.key(0), (1, 11, 12, 1))
    variables = jax.jit(module.init)(jax.random.key(0), image)
    apply = jax.jit(lambda image: module.apply(variables, image))
    logits = apply(image)
    assert logits.shape == (1, 11, 12, 3) and logits.dtype == jnp.float32
    changed = np.abs(apply(image.at[0, 5, 6].add(9.0)) - logits).max(-1)[0] > 0
    rows, columns = np.nonzero(changed)
    assert set(rows) <= set(range(1, 10)) and set(columns) <= set(range(2, 11)) and {1, 9} & set(rows)


def test_numbers_of_layers_must_agree():
    with pytest.raises(ConfigError, match=r"features=\(4,\), strides=\(1, 1\) and dilations=\(1,\) must have one"):
        zoo.variable_shapes(PlainCNN(3, features=(4,), strides=(1, 1), dilations=(1,)), (8, 8), 1)
