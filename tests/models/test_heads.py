"""Pooled vectors, temperatures and resizing with aligned corners, against PyTorch's definitions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.models import zoo
from jaxvision.models.heads import corner_matrix, pooled_vector, resize_corners, scaled_logits
from tests.models import networks
from tests.models.networks import SMALL


def test_pooled_vectors_are_channel_first():
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 3)).astype(np.float32)
    np.testing.assert_allclose(pooled_vector(x), x.mean((1, 2)), rtol=1e-5, atol=1e-6)
    cells = x.reshape(2, 2, 2, 2, 3, 3).mean((2, 4))  # [B, row, column, C]
    np.testing.assert_allclose(pooled_vector(x, 2), cells.transpose(0, 3, 1, 2).reshape(2, 12), rtol=1e-5, atol=1e-6)
    assert pooled_vector(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_logits_are_float32_over_the_temperature():
    logits = jnp.asarray([[1.0, -3.0]], jnp.bfloat16)
    for temp in (1.0, 2.0):
        scaled = scaled_logits(logits, temp)
        assert scaled.dtype == jnp.float32
        np.testing.assert_array_equal(scaled, np.asarray([[1.0, -3.0]]) / temp)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="divides the logits and must be positive"):
            scaled_logits(logits, wrong)


@pytest.mark.parametrize("case", ["cifar_a", "resnet", "wide", "densenet", "deeplab"])
def test_every_network_of_the_calibration_literature_has_a_temperature(case):
    """The program of ``temp=2`` is that of ``temp=1`` and one division."""
    name, settings, size = SMALL[case]
    shape = (2, size, size, 3)

    def primitives(temp):
        module = zoo.build(name, num_classes=5, **settings, temp=temp)
        variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))
        return [str(e.primitive) for e in jax.make_jaxpr(module.apply)(variables, jnp.zeros(shape)).eqns]

    one, two = primitives(1.0), primitives(2.0)
    assert len(two) == len(one) + 1 and two.count("div") == one.count("div") + 1


def four_neighbours(x, size):
    """``align_corners=True``, a pixel at a time, float64."""
    y = np.zeros((x.shape[0], *size, x.shape[3]))
    for i, j in np.ndindex(*size):
        spots = []
        for index, have, want in ((i, x.shape[1], size[0]), (j, x.shape[2], size[1])):
            place = index * (have - 1) / (want - 1) if want > 1 else 0.0
            low = int(place)
            spots.append((low, min(low + 1, have - 1), place - low))
        (top, bottom, v), (left, right, u) = spots
        rows = [(1 - u) * x[:, row, left] + u * x[:, row, right] for row in (top, bottom)]
        y[:, i, j] = (1 - v) * rows[0] + v * rows[1]
    return y


@pytest.mark.parametrize(
    ("have", "want"),
    [((3, 4), (24, 32)), ((5, 3), (7, 1)), ((1, 2), (4, 5)), ((9, 6), (4, 6)), ((1, 1), (3, 2)), ((2, 2), (1, 1))],
)
def test_resize_with_aligned_corners(have, want):
    x = np.random.default_rng(0).standard_normal((2, *have, 3)).astype(np.float32)
    y = resize_corners(jnp.asarray(x), want)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, four_neighbours(x, want), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y[:, 0, 0], x[:, 0, 0])
    if min(want) > 1:
        np.testing.assert_allclose(y[:, -1, -1], x[:, -1, -1], rtol=1e-6)


def test_resize_keeps_ramps_constants_and_what_has_the_size():
    np.testing.assert_allclose(corner_matrix(5, 33) @ np.arange(5), np.linspace(0, 4, 33), rtol=1e-6)
    np.testing.assert_allclose(corner_matrix(7, 50).sum(1), np.ones(50), rtol=1e-6)
    x = jnp.ones((1, 4, 4, 2), jnp.bfloat16)
    assert resize_corners(x, (4, 4)) is x
    assert jax.eval_shape(lambda x: resize_corners(x, (8, 8)), x).dtype == jnp.bfloat16
    # What each pixel gives away is what it gets back.
    gradient = jax.grad(lambda x: resize_corners(x, (6, 5)).sum())(x.astype(jnp.float32))
    np.testing.assert_allclose(gradient.sum(), 2 * 6 * 5, rtol=1e-5)


def test_numpy_helper_knows_stride_and_dilation():
    """The float64 layers that the networks' tests compare with, against one output pixel by hand."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((1, 7, 7, 2)), rng.standard_normal((3, 2, 3, 3))
    y = networks.torch_conv({"conv.weight": kernel}, x, "conv", 2, 2)
    assert y.shape == (1, 4, 4, 3)
    window = x[0, 0:5:2, 2:7:2]  # around (2, 4)
    np.testing.assert_allclose(y[0, 1, 2], np.einsum("ijc,ocij->o", window, kernel))
