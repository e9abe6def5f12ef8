"""The straight-through building blocks: exact values, and the gradients that they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.quant import ste

X = np.array([-2.5, -1.5, -1.0, -0.5, -0.0, 0.3, 0.5, 1.0, 1.5, 2.5, 3.0], np.float32)


def pullback(function, *args, g=None):
    value, back = jax.vjp(function, *args)
    return value, back(jnp.ones_like(value) if g is None else g)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "remat"])
def test_round_is_half_to_even_and_passes_the_gradient(wrap):
    g = np.linspace(-1, 1, X.size).astype(np.float32)
    value, (dx,) = pullback(wrap(ste.ste_round), X, g=g)
    np.testing.assert_array_equal(value, np.round(X))
    np.testing.assert_array_equal(dx, g)


def test_round_works_in_forward_mode_and_twice():
    value, tangent = jax.jvp(ste.ste_round, (X,), (2 * X,))
    np.testing.assert_array_equal((value, tangent), (np.round(X), 2 * X))
    assert jax.hessian(lambda x: ste.ste_round(x) ** 2)(jnp.float32(1.3)) == 2


def test_clip_passes_the_gradient_at_its_bounds_and_gives_the_rest_to_them():
    g = np.arange(1, X.size + 1, dtype=np.float32)
    value, (dx, lower, upper) = pullback(ste.clip, X, jnp.float32(-1), jnp.float32(1.5), g=g)
    np.testing.assert_array_equal(value, np.clip(X, -1, 1.5))
    inside = (X >= -1) & (X <= 1.5)
    np.testing.assert_array_equal(dx, np.where(inside, g, 0))
    assert (lower, upper) == (g[X < -1].sum(), g[X > 1.5].sum())
    assert np.isnan(ste.clip(jnp.float32(np.nan), -1, 1))


@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.7])
def test_ewgs_round_scales_the_gradient_by_its_sign_and_the_error(delta):
    g = np.linspace(-1, 1, X.size).astype(np.float32)
    value, (dx, ddelta) = pullback(ste.ewgs_round, X, jnp.float32(delta), g=g)
    np.testing.assert_array_equal(value, np.round(X))
    np.testing.assert_allclose(dx, g * (1 + delta * np.sign(g) * (X - np.round(X))), rtol=1e-6)
    assert ddelta == 0
    jitted = jax.jit(lambda x, g: pullback(lambda x: ste.ewgs_round(x, delta), x, g=g)[1][0])(X, g)
    np.testing.assert_allclose(jitted, dx, rtol=1e-6)


def test_ewgs_round_can_be_differentiated_twice_in_reverse_mode():
    def first(x):
        return jax.grad(lambda x: jnp.sum(ste.ewgs_round(x, 0.5) ** 2) / 2)(x)

    # round(x) (1 + delta sign(round(x)) e), the error e a constant; its round passes a gradient in the same way.
    second = jax.grad(lambda x: jnp.sum(first(x)))(jnp.asarray([1.3, -0.8], jnp.float32))
    np.testing.assert_allclose(second, [1.15 * 1.15, 0.9 * 1.1], rtol=1e-5)


def test_values_with_another_gradient_are_exact_to_the_bit():
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    value, (dx,) = pullback(lambda x: ste.grad_scale(x, 0.3), x)
    np.testing.assert_array_equal(value, x)
    np.testing.assert_allclose(dx, 0.3, rtol=1e-6)
    value, (hard, soft) = pullback(ste.straight_through, x, 7 * x)
    np.testing.assert_array_equal(value, x)
    assert (hard == 0).all() and (soft == 1).all()
