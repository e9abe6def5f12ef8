"""Activation quantizers that need no calibration, and fixed ones."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.quant import uniform
from jaxvision.quant.activation import AffineQuantizer, DynamicGroupQuantizer, group_of_unit, per_instance


def values(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def reference(x, lower, upper, bits):
    levels = np.float32(2**bits - 1)
    scale = np.maximum((upper - lower) / levels, np.float32(1e-8))
    zero = np.round(-lower / scale)
    return scale * (np.clip(np.round(x / scale) + zero, 0, levels) - zero)


def test_affine_per_tensor_and_per_channel():
    x = values(2, 5, 4)
    lower, upper = x.min((0, 1)), x.max((0, 1))
    per_channel = AffineQuantizer.from_interval(lower, upper, 3)
    np.testing.assert_array_equal(per_channel(jnp.asarray(x), 2), reference(x, lower, upper, 3))
    per_tensor = AffineQuantizer.from_interval(np.float32(-1), np.float32(2), 4)
    np.testing.assert_array_equal(per_tensor(jnp.asarray(x), 2), reference(x, np.float32(-1), np.float32(2), 4))
    assert per_tensor.bits.dtype == np.int32 and per_tensor.scale.shape == ()


def test_dynamic_groups_are_consecutive_channels_of_each_image():
    x = values(3, 7, 8)
    out = DynamicGroupQuantizer.create(4, num_groups=2)(jnp.asarray(x), 3)
    for i in range(3):
        for part in (slice(0, 4), slice(4, 8)):
            block = x[i, :, part]
            np.testing.assert_array_equal(out[i, :, part], reference(block, block.min(), block.max(), 4))


def test_dynamic_limits_one_group_and_own_group():
    x = values(3, 7, 8)
    one = DynamicGroupQuantizer.create(4, num_groups=1)(jnp.asarray(x), 3)
    lower, upper = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
    np.testing.assert_array_equal(one, reference(x, lower, upper, 4))
    own = DynamicGroupQuantizer.create(4)(jnp.asarray(x), 3)
    np.testing.assert_array_equal(own, reference(x, x.min(1, keepdims=True), x.max(1, keepdims=True), 4))
    np.testing.assert_array_equal(own, DynamicGroupQuantizer.create(4, num_groups=8)(jnp.asarray(x), 3))


def test_groups_that_do_not_divide_the_channels():
    np.testing.assert_array_equal(group_of_unit(7, 3), [0, 0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(group_of_unit(3, 8), [0, 1, 2])
    x = values(2, 5, 7)
    out = DynamicGroupQuantizer.create(5, num_groups=3)(jnp.asarray(x), 2)
    block = x[1, :, 3:5]
    np.testing.assert_array_equal(out[1, :, 3:5], reference(block, block.min(), block.max(), 5))


def test_rows_of_attention():
    a = np.abs(values(4, 2, 5, 5))
    own = DynamicGroupQuantizer.create(4, axis="rows")(jnp.asarray(a), 2)
    np.testing.assert_array_equal(own, reference(a, a.min(-1, keepdims=True), a.max(-1, keepdims=True), 4))
    image = DynamicGroupQuantizer.create(4, num_groups=1, axis="rows")(jnp.asarray(a), 2)
    block = a[2:]  # the second image's two windows
    np.testing.assert_array_equal(image[2:], reference(block, block.min(), block.max(), 4))
    window = DynamicGroupQuantizer.create(4, num_groups=1, axis="rows", instance="window")(jnp.asarray(a), 2)
    np.testing.assert_array_equal(window[3], reference(a[3], a[3].min(), a[3].max(), 4))


def test_windows_of_one_image_share_their_statistics_unless_asked():
    x = values(6, 4, 3)  # two images of three windows
    assert per_instance(jnp.asarray(x), 2).shape == (2, 12, 3)
    image = DynamicGroupQuantizer.create(4)(jnp.asarray(x), 2)
    block = x[:3].reshape(12, 3)
    np.testing.assert_array_equal(image[:3].reshape(12, 3), reference(block, block.min(0), block.max(0), 4))
    window = DynamicGroupQuantizer.create(4, instance="window")(jnp.asarray(x), 2)
    np.testing.assert_array_equal(window[0], reference(x[0], x[0].min(0), x[0].max(0), 4))


def test_maps_with_more_than_one_spatial_axis():
    x = values(2, 3, 4, 5)
    out = DynamicGroupQuantizer.create(4)(jnp.asarray(x), 2)
    assert out.shape == x.shape
    flat = DynamicGroupQuantizer.create(4)(jnp.asarray(x.reshape(2, 12, 5)), 2)
    np.testing.assert_array_equal(out.reshape(2, 12, 5), flat)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="num_groups=0"):
        DynamicGroupQuantizer.create(4, num_groups=0)
    with pytest.raises(ConfigError, match="axis='columns'"):
        DynamicGroupQuantizer.create(4, axis="columns")
    with pytest.raises(ConfigError, match="instance='head'"):
        DynamicGroupQuantizer.create(4, instance="head")
    with pytest.raises(ConfigError, match="3 images"):
        per_instance(jnp.zeros((4, 2, 2)), 3)


def test_constant_input_survives():
    x = jnp.full((2, 3, 4), 0.75)
    out = DynamicGroupQuantizer.create(4)(x, 2)
    np.testing.assert_allclose(out, x, rtol=1e-6)
    assert np.isfinite(uniform.affine_params(jnp.zeros(3), jnp.zeros(3), 4)[0]).all()
