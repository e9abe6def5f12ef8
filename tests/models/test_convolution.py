"""The convolution for CPUs against the plain one, and what XLA makes of a network with and without ``kept``."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxvision.models import layers
from jaxvision.models.convolution import Geometry, convolve, kept


def plain(x, kernel, geometry):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        geometry.stride,
        [(p, p) for p in geometry.padding],
        rhs_dilation=geometry.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=geometry.groups,
    )


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


GEOMETRIES = {
    "3x3": ((9, 8), (3, 3), Geometry((1, 1), (1, 1))),
    "3x3 by 2, even": ((8, 8), (3, 3), Geometry((2, 2), (1, 1))),
    "3x3 by 2, odd": ((9, 7), (3, 3), Geometry((2, 2), (1, 1))),
    "3x3 by 2, no padding": ((9, 8), (3, 3), Geometry((2, 2))),
    "7x7 by 2": ((16, 13), (7, 7), Geometry((2, 2), (3, 3))),
    "2x2 by 2": ((8, 9), (2, 2), Geometry((2, 2))),
    "2x5 by 1 and 3": ((7, 11), (2, 5), Geometry((1, 3), (0, 2))),
    "3x2 by 5, gaps": ((13, 12), (3, 2), Geometry((5, 5), (2, 1))),
    "4x4 by 3, much padding": ((5, 6), (4, 4), Geometry((3, 3), (4, 5))),
    "1x1 by 2": ((8, 7), (1, 1), Geometry((2, 2))),
    "groups": ((8, 8), (3, 3), Geometry((2, 2), (1, 1), (1, 1), 2)),
    "dilation": ((9, 9), (3, 3), Geometry((2, 2), (2, 2), (2, 2))),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolve_is_the_plain_convolution_with_its_derivatives(name):
    size, field, geometry = GEOMETRIES[name]
    x, kernel = draw(2, *size, 4), draw(*field, 4 // geometry.groups, 6, seed=1)
    directions = draw(*x.shape, seed=2), draw(*kernel.shape, seed=3)

    def all_of(convolution):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(convolution(x, kernel, geometry)))

        gradient = jax.grad(loss, (0, 1))
        forward = jax.jvp(lambda x, kernel: convolution(x, kernel, geometry), (x, kernel), directions)
        return *forward, gradient(x, kernel), jax.jvp(gradient, (x, kernel), directions)[1]

    (y, *derivatives), (y_plain, *of_plain) = (jax.jit(lambda form=form: all_of(form))() for form in (convolve, plain))
    np.testing.assert_array_equal(y, y_plain)
    for one, other in zip(jax.tree.leaves(derivatives), jax.tree.leaves(of_plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize(("backend", "zeros"), [("cpu", False), ("tpu", True)])
def test_on_a_cpu_no_gradient_has_zeros_between_its_pixels(monkeypatch, backend, zeros):
    """An accelerator's libraries know the strided gradient, so the convolution stays as it is there."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    geometry = Geometry((2, 2), (1, 1))

    def loss(x, kernel):
        return jnp.sum(convolve(x, kernel, geometry) ** 2)

    text = str(jax.make_jaxpr(jax.grad(loss))(draw(2, 8, 8, 3), draw(3, 3, 3, 4)))
    assert ("lhs_dilation=(2, 2)" in text) == zeros
    assert ("select_n" in text) != zeros


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
    alone = functools.partial(plain, geometry=Geometry(padding=(1, 1)))
    fusions = transposing_fusions(layer.product if helped else alone)
    assert fusions
    assert any(" maximum(" in text for text in fusions) != helped
