"""``kept``: the identity, and what XLA's CPU backend makes of a network with and without it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxvision.models import layers
from jaxvision.models.convolution import kept


def test_kept_is_the_identity_to_the_bit():
    x = np.array([0.0, -0.0, 1e-40, -3.5, np.inf, -np.inf, np.nan], np.float32)
    kept_x = np.asarray(jax.jit(kept)(x))
    np.testing.assert_array_equal(kept_x, x)
    np.testing.assert_array_equal(np.signbit(kept_x[:2]), [False, True])
    assert kept(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16


def test_derivatives_of_kept_are_those_of_the_identity():
    x, v = jnp.array([1.0, -2.0, 0.5]), jnp.array([3.0, 1.0, -1.0])

    def cubes(x):
        return jnp.sum(kept(x) ** 3)

    np.testing.assert_array_equal(jax.grad(cubes)(x), 3 * x**2)
    np.testing.assert_array_equal(jax.jvp(kept, (x,), (v,))[1], v)
    np.testing.assert_array_equal(jax.jvp(jax.grad(cubes), (x,), (v,))[1], 6 * x * v)


def transposing_fusions(product):
    """The fused computations that transpose a layer's input, of the gradients of a residual network's kernels."""
    kernels = [jnp.full((3, 3, 8, 8), 0.01 * (1 + layer)) for layer in range(4)]

    def loss(kernels, x):
        for kernel in kernels:
            x = nn.relu(product(x, kernel) * 2.0 + x)
        return jnp.sum(x * x)

    compiled = jax.jit(jax.grad(loss)).lower(kernels, jnp.ones((4, 8, 8, 8))).compile()
    computations = re.findall(r"^%fused_computation.*?^}", compiled.as_text(), re.MULTILINE | re.DOTALL)
    return [text for text in computations if re.search(r"f32\[8,8,8,4\]\S* transpose\(", text)]


@pytest.mark.parametrize("helped", [True, False])
def test_xla_transposes_a_kept_input_and_nothing_else(helped):
    """Without :func:`kept` it computes the rectifiers again in the transposing loop: where that ends, kept can go."""
    layer = layers.Conv(8, 3, padding=1, use_bias=False)

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    fusions = transposing_fusions(layer.product if helped else plain)
    assert fusions
    assert any(" maximum(" in text for text in fusions) != helped
