"""Deltas of a network from its curvature: one layer whose Hessian is known, and what the network does with them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxvision.models import ewgs_delta
from jaxvision.models.layers import Conv
from jaxvision.models.quantized import Bits, LayerQuant, QuantizedNetwork, Recipe, Rule
from jaxvision.models.quantized_layer import DELTA
from jaxvision.quant.ewgs import EWGSActivation, EWGSWeight

IMAGES = np.abs(np.random.default_rng(0).standard_normal((5, 1, 1, 4))).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return Conv(3, 1, use_bias=False, name="conv")(x)


def network(weight=2, inputs=3):
    layer = LayerQuant(Recipe(EWGSWeight), Recipe(EWGSActivation), Bits(weight, inputs))
    return QuantizedNetwork(Net(), (Rule("conv", layer),))


def variables_of(network, delta=0.5):
    variables = network.calibrate(network.init(jax.random.key(1), IMAGES), IMAGES)
    return {**variables, DELTA: ewgs_delta.start(network, variables["params"], delta)}


def operands(network, variables):
    params, quantizers = variables["params"], network.quantizers(variables["params"])
    kernel = np.asarray(quantizers["conv"]["kernel"](params["conv"]["kernel"]))[0, 0]
    inputs = network.quantizers(params, "input")["conv"]["kernel"]
    return np.asarray(inputs(IMAGES))[:, 0, 0], kernel


def test_ratios_of_a_quadratic_loss():
    """y = X W, loss = |y|^2 / 2: tr(H_W) = 3 |X|^2 and tr(H_X) = 5 |W|^2; W is 2 q - 1 of the value q in [0, 1]."""
    net = network()
    variables = variables_of(net)
    loss = lambda y: jnp.sum(y**2) / 2  # noqa: E731
    found = jax.jit(
        lambda v: ewgs_delta.measure(net, v, loss, IMAGES, jax.random.key(0), max_draws=3000, tolerance=0.0)
    )(variables)["conv"]["delta"]
    x, w = operands(net, variables)
    spread = lambda g: 3 * g.std(ddof=1)  # noqa: E731
    weight = 4 * 3 * np.sum(x**2) / w.size / spread(2 * x.T @ x @ w)
    inputs = 5 * np.sum(w**2) / x.size / spread(x @ w @ w.T)
    np.testing.assert_allclose(found, [weight, inputs], rtol=0.08)
    # A float operand has no delta; a loss that curves downwards has a negative ratio.
    half = network(inputs=None)
    down = ewgs_delta.measure(half, variables_of(half), lambda y: -loss(y), IMAGES, jax.random.key(0), max_draws=200)
    assert down["conv"]["delta"][0] < 0 and down["conv"]["delta"][1] == 0


def test_the_integer_execution_has_the_same_ratios():
    options = {"execution": "int", "gradient": "uniform"}
    layer = LayerQuant(Recipe(EWGSWeight), Recipe(EWGSActivation), Bits(2, 3, 4), **options)
    nets = network(), QuantizedNetwork(Net(), (Rule("conv", layer),))
    variables = variables_of(nets[0])
    one, other = (
        ewgs_delta.measure(net, variables, lambda y: jnp.sum(y**2), IMAGES, jax.random.key(0), max_draws=5)
        for net in nets
    )  # fmt: skip
    np.testing.assert_array_equal(one["conv"]["delta"], other["conv"]["delta"])


def test_a_networks_gradients_use_its_deltas():
    net = network()
    variables = variables_of(net, 0.5)

    def gradient(apply, variables):
        return jax.grad(lambda p: jnp.sum(apply({**variables, "params": p}) ** 2))(variables["params"])["conv"]

    found = gradient(lambda v: net.apply(v, IMAGES), variables)
    layer = LayerQuant(Recipe(EWGSWeight, {"delta": 0.5}), Recipe(EWGSActivation, {"delta": 0.5}), Bits(2, 3))
    fixed = QuantizedNetwork(Net(), (Rule("conv", layer),))
    plain = {"params": variables["params"]}
    expected = gradient(lambda v: fixed.apply(v, IMAGES), plain)
    before = gradient(lambda v: net.apply(v, IMAGES), plain)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(found["kernel"]) - before["kernel"]).max() > 1e-3


def test_layers_of_other_quantizers_have_none():
    float_net = QuantizedNetwork(Net(), (Rule("conv", LayerQuant()),))
    assert ewgs_delta.start(float_net, float_net.init(jax.random.key(0), IMAGES)["params"], 0.1) == {}
