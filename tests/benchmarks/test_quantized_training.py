"""What the benchmarks of quantized training measure without a clock: memory of states and of the backward pass."""

import jax
import jax.numpy as jnp

from jaxvision.benchmarks import lbt, training, trs


def test_residuals_count_each_array_once_and_parameters_never():
    def function(params, x):
        y = jnp.sin(x)  # keeps cos x
        return params * y * y  # keeps y and the parameters

    shapes = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((8, 4), jnp.float32)
    assert training.residual_bytes(function, *shapes) == 3 * 8 * 4 * 4  # cos x, y, and params * y
    assert training.residual_bytes(lambda params, x: params * x, *shapes) == 8 * 4 * 4  # x


def test_integers_keep_two_bytes_an_input_element():
    """At most 0.35 of what the simulation keeps."""
    batch = 4
    found = {execution: lbt.layer_residuals(execution, batch) for execution in ("fake", "int")}
    elements = batch * 16 * 16 * 32
    assert elements * 2 <= found["int"] <= elements * 2.01
    assert found["int"] <= lbt.RESIDUALS * found["fake"]


def test_the_rates_state_is_a_byte_a_latent_weight():
    network = training.quantized("trs", trs.BITS)
    image = jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
    assert trs.extra_bytes(network, params)[0] == 1
