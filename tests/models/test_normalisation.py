"""The hand-written derivative of batch normalisation against that of its single operations."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.models.normalisation import normalise, normalise_by_batch


def by_operations(x, scale, bias, eps):
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    var = jnp.mean(jnp.square(x - mean), axes)
    return normalise(x, mean, var, scale, bias, eps), mean, var


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


ARGUMENTS = draw(5, 3, 2, 4) * 3 + 1, draw(4, seed=1), draw(4, seed=2)
DIRECTIONS = draw(5, 3, 2, 4, seed=3), draw(4, seed=4), draw(4, seed=5)


def assert_close(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def scalar(normalisation):
    """A number that depends on all three outputs, none of them linearly."""

    def loss(*arguments):
        y, mean, var = normalisation(*arguments, 1e-3)
        return jnp.sum(jnp.sin(y) * draw(*y.shape, seed=6)) + jnp.sum(mean**3) + jnp.sum(jnp.log(var))

    return loss


def test_values_are_those_of_the_single_operations_to_the_bit():
    for one, other in zip(normalise_by_batch(*ARGUMENTS, 1e-3), by_operations(*ARGUMENTS, 1e-3), strict=True):
        np.testing.assert_array_equal(one, other)


def test_gradients_through_output_mean_and_variance():
    numbers = (0, 1, 2)
    assert_close(*(jax.grad(scalar(form), numbers)(*ARGUMENTS) for form in (normalise_by_batch, by_operations)))


def test_forward_mode():
    assert_close(
        *(jax.jvp(lambda *a, form=form: form(*a, 1e-3), ARGUMENTS, DIRECTIONS)[1]
          for form in (normalise_by_batch, by_operations))
    )  # fmt: skip


def test_second_order_in_the_order_of_hessian_products():
    """Forward over reverse, as the traces of Hessians and GraSP take it."""
    forms = normalise_by_batch, by_operations
    assert_close(*(jax.jvp(jax.grad(scalar(form), (0, 1, 2)), ARGUMENTS, DIRECTIONS)[1] for form in forms))


def test_the_backward_pass_keeps_the_input_and_no_other_array_of_its_size():
    x = ARGUMENTS[0]
    kept = jax.vjp(lambda *a: normalise_by_batch(*a, 1e-3)[0], *ARGUMENTS)[1]
    large = [leaf for leaf in jax.tree.leaves(kept) if jnp.size(leaf) == x.size]
    assert len(large) <= 1
