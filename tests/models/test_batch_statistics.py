"""Batch statistics of one batch: NumPy says what they are, with any momentum and any running values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxvision.core.errors import ConfigError
from jaxvision.models import batch_statistics
from jaxvision.models.layers import BatchNorm, Conv
from jaxvision.models.quantized import Bits, LayerQuant, QuantizedNetwork, Recipe, Rule
from jaxvision.quant.binary import BinaryActivation, BinaryWeight


class Net(nn.Module):
    """Two normalisations of different momentum."""

    @nn.compact
    def __call__(self, x, train=False):
        x = BatchNorm(momentum=0.1, name="first")(x, train=train)
        x = Conv(2, 1, use_bias=False, name="conv")(nn.relu(x))
        return BatchNorm(momentum=0.7, name="second")(x, train=train)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = BatchNorm(name="norm")
        return norm(norm(x, train=train), train=train)


IMAGES = np.random.default_rng(0).normal(0.5, 2.0, (3, 4, 5, 3)).astype(np.float32)


def started(network):
    """Variables with running values that a result must not depend on."""
    variables = network.init(jax.random.key(1), IMAGES)
    return {**variables, "batch_stats": jax.tree.map(lambda leaf: leaf + 7, variables["batch_stats"])}


def test_statistics_are_those_that_the_batch_is_normalised_with():
    variables = started(Net())
    found = jax.jit(functools.partial(batch_statistics.of_batch, Net()))(variables, IMAGES)
    first = IMAGES.astype(np.float64)
    normal = (first - first.mean((0, 1, 2))) / np.sqrt(first.var((0, 1, 2)) + 1e-5)
    second = np.maximum(normal, 0) @ np.asarray(variables["params"]["conv"]["kernel"], np.float64)[0, 0]
    for name, x in (("first", first), ("second", second)):
        np.testing.assert_allclose(found[name]["mean"], x.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[name]["var"], x.var((0, 1, 2), ddof=1), rtol=1e-5)


def test_weights_and_inputs_are_quantized_as_in_training():
    layer = LayerQuant(Recipe(BinaryWeight), Recipe(BinaryActivation), Bits(1, 1))
    network = QuantizedNetwork(Net(), (Rule("conv/kernel$", layer),))
    variables = started(network)
    found = batch_statistics.of_batch(network, variables, IMAGES)
    kernel = np.asarray(variables["params"]["conv"]["kernel"])[0, 0]
    # After a ReLU the sign of everything is +1, so that an output is the sum of a column of the quantized kernel.
    column = (np.abs(kernel).mean(0) * np.sign(kernel)).sum(0)
    np.testing.assert_allclose(found["second"]["mean"], column, rtol=1e-5)
    np.testing.assert_allclose(found["second"]["var"], 0, atol=1e-6)


def test_the_average_of_batches_is_their_mean():
    batches = np.random.default_rng(2).standard_normal((4, 3)).astype(np.float32)
    mean = {"mean": jnp.full(3, jnp.float32(1e6))}
    for index, batch in enumerate(batches):
        mean = batch_statistics.average(mean, {"mean": batch}, jnp.int32(index))
        np.testing.assert_allclose(mean["mean"], batches[: index + 1].mean(0), rtol=1e-5)


def test_what_has_no_statistics_of_one_batch_is_refused():
    with pytest.raises(ConfigError, match="norm normalises twice in a pass"):
        batch_statistics.of_batch(Twice(), started(Twice()), IMAGES)
    conv = Conv(2, 1)
    with pytest.raises(ConfigError, match="this network has no batch normalisation"):
        batch_statistics.of_batch(conv, conv.init(jax.random.key(0), IMAGES), IMAGES)
