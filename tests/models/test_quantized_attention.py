"""Quantized products of attention: the tap of the models themselves is the reference, values and gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.models import macs, quantized_attention, zoo
from jaxvision.models.attention import Attention
from jaxvision.models.quantized import Bits, LayerQuant, QuantizedNetwork, Recipe, Rule, product_names
from jaxvision.quant import bops
from jaxvision.quant.lsq import LSQ
from jaxvision.quant.trs import TRSActivation
from tests.models.networks import SMALL, drawn

SIGNED, UNSIGNED = Recipe(LSQ, {"signed": True}), Recipe(LSQ, {"signed": False})
RULES = (
    Rule("q_k$", LayerQuant(SIGNED, SIGNED, Bits(4, 3))),
    Rule("softmax_v$", LayerQuant(SIGNED, UNSIGNED, Bits(2, 5))),
)
WIDTHS = {"q": 3, "k": 4, "softmax": 5, "v": 2}


def network(case, rules=RULES):
    name, settings, size = SMALL[case]
    images = np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
    return QuantizedNetwork(zoo.build(name, num_classes=5, **settings), (), rules), images


def calibrated(quantized, images):
    variables = drawn(quantized.module, 1, images)
    fresh = jax.eval_shape(quantized.init, jax.random.key(0), images)
    known = trees.named_leaves(variables)
    full = trees.map_named(lambda name, leaf: known.get(name, jnp.ones(leaf.shape, leaf.dtype)), fresh)
    return jax.jit(quantized.calibrate)(full, images)


def tap_of(params):
    """Quantizes the operands with the learned scales, by what the models' documentation says a tap sees."""
    leaves = trees.named_leaves(params)

    def tap(name, value):
        *path, operand = name.split(".")
        if operand not in WIDTHS or path[-1:] != ["attn"]:
            return value
        scope = re.sub(r"(layers|blocks)/(\d+)", r"\1_\2", "/".join(path))
        scale = leaves[f"{scope}/product_{operand}_scale"]
        return LSQ(scale, WIDTHS[operand], signed=operand != "softmax")(value)

    return tap


@pytest.mark.parametrize("case", ["vit", "deit", "swin"])
def test_products_are_those_of_quantized_operands(case):
    quantized, images = network(case)
    variables = calibrated(quantized, images)
    upstream = np.random.default_rng(3).standard_normal((2, 5)).astype(np.float32)

    def by_rule(variables):
        return quantized.apply(variables, images)

    def by_tap(variables):
        return quantized.module.apply(variables, images, tap=tap_of(variables["params"]))

    @jax.jit
    def both(variables):
        results = []
        for function in (by_rule, by_tap, lambda v: quantized.module.apply(v, images)):
            value, back = jax.vjp(function, variables)
            results.append((value, back(upstream)[0]))
        return results

    (value, gradient), (expected, expected_gradient), (plain, _) = both(variables)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(value) - plain).max() > 1e-3
    found, wanted = trees.named_leaves(gradient), trees.named_leaves(expected_gradient)
    assert found.keys() == wanted.keys()
    for name in found:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5, err_msg=name)
    scales = [name for name in found if "/product_" in name]
    assert len(scales) == 2 * len(product_names(quantized.module, images))
    assert all(np.any(found[name]) for name in scales)


def attention(x, rules):
    quantized = QuantizedNetwork(Attention(2), (), rules)
    return quantized, drawn(quantized.module, 5, x)


@functools.cache
def example():
    return np.random.default_rng(4).standard_normal((2, 6, 8)).astype(np.float32)


def test_scales_start_at_what_fits_the_operands_as_they_come():
    """LSQ of q, k, v and of the probabilities, those after k and q were quantized; nothing else changes."""
    x = example()
    quantized, variables = attention(x, RULES)
    variables = jax.tree.map(lambda leaf: leaf, variables)
    seen = {}

    def keep(name, value):
        seen[name] = value
        if name in ("q", "k"):
            return LSQ.fit(value, WIDTHS[name], signed=True)(value)
        return value

    quantized.module.apply(variables, x, tap=keep)
    fitted = QuantizedAttention(quantized).calibrate(variables, x)
    for operand, bits in WIDTHS.items():
        expected = LSQ.fit(seen[operand], bits, signed=operand != "softmax").scale
        np.testing.assert_allclose(fitted["params"][f"product_{operand}_scale"], expected, rtol=1e-4)


class QuantizedAttention:
    """Attention takes tokens and no images; its calibration is that of a network."""

    def __init__(self, quantized):
        self.quantized = quantized

    def calibrate(self, variables, x):
        fresh = self.quantized.init(jax.random.key(0), x)
        return self.quantized.calibrate({"params": {**fresh["params"], **variables["params"]}}, x)


def test_a_product_whose_quantizers_drop_the_scale_learns_one():
    """TRS: the start value makes the mean size of the product that of the float one; its gradient is the product."""
    x = example()
    signed = Recipe(TRSActivation, {"signed": True})
    options = {"needs_norm": True, "output_scale": True}
    rules = (
        Rule("q_k$", LayerQuant(signed, signed, Bits(4, 4), **options)),
        Rule("softmax_v$", LayerQuant(signed, Recipe(TRSActivation), Bits(4, 4), **options)),
    )
    quantized, variables = attention(x, rules)
    fitted = QuantizedAttention(quantized).calibrate(variables, x)["params"]
    seen = {}
    quantized.module.apply(variables, x, tap=lambda name, value: seen.setdefault(name, value))
    hats = {name: TRSActivation(fitted[f"product_{name}_scale"], 4, signed=True)(seen[name]) for name in "qk"}
    sizes = [np.abs(np.einsum("bhnd,bhmd->bhnm", *(pair[n] for n in "qk"))).mean() for pair in (seen, hats)]
    np.testing.assert_allclose(fitted["product_q_k_output"], sizes[0] / sizes[1], rtol=1e-4)
    # Twice the output scale of softmax v is twice the input of proj, whose bias stays.
    out = lambda p: quantized.apply({"params": p}, x) - p["proj"]["bias"]  # noqa: E731
    doubled = {**fitted, "product_softmax_v_output": 2 * fitted["product_softmax_v_output"]}
    np.testing.assert_allclose(out(doubled), 2 * out(fitted), rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda c: jnp.sum(out({**fitted, "product_softmax_v_output": c})))
    c = fitted["product_softmax_v_output"]
    np.testing.assert_allclose(gradient(c), jnp.sum(out(fitted)) / c, rtol=1e-4)


def test_names_are_those_of_the_multiply_accumulates():
    quantized, images = network("deit")
    layers = quantized.check_products(images[:1])
    costs = macs.count(quantized.module, images.shape[1:])
    assert list(layers) == [cost.name for cost in costs if not cost.weights]
    counted = bops.network(costs, {name: layer.bits for name, layer in layers.items()})
    for cost in costs:
        if not cost.weights:
            assert counted[cost.name] == cost.macs * (12 if cost.name.endswith("q_k") else 10)


def test_a_rule_for_kernels_reaches_no_product():
    name, settings, size = SMALL["deit"]
    quantized = QuantizedNetwork(zoo.build(name, num_classes=5, **settings), (Rule("", LayerQuant()),))
    shapes = jax.eval_shape(quantized.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    assert not any("product_" in name for name in trees.named_leaves(shapes))
    assert quantized.check_products(jnp.zeros((1, size, size, 3))) == {}


def test_the_names_of_what_is_learned():
    quantized, images = network("vit")
    shapes = jax.eval_shape(quantized.init, jax.random.key(0), images)
    leaves = {name.rpartition("/")[-1] for name in trees.named_leaves(shapes) if "/product_" in name}
    assert quantized_attention.parameter_names(rule.layer for rule in RULES) == leaves


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            LayerQuant(SIGNED, SIGNED, Bits(4, 4, 4)),
            "blocks_0/attn/q_k is a product of activations: its gradients stay",
        ),
        (LayerQuant(SIGNED, SIGNED, Bits(4, 4), execution="int"), "its execution is 'fake'"),
        (LayerQuant(SIGNED, SIGNED, Bits(4, 4), needs_norm=True), "no normalisation follows it; give it output_scale"),
    ],
)
def test_what_a_product_cannot_have(layer, message):
    quantized, images = network("vit", (Rule("q_k", layer),))
    with pytest.raises(ConfigError, match=message):
        quantized.check(images)
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(quantized.init, jax.random.key(0), images)


def test_a_scale_of_zero_is_named():
    quantized, images = network("vit")
    shapes = jax.eval_shape(quantized.init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    quantized.check_fitted(params)
    params["blocks_1"]["attn"]["product_v_scale"] *= 0
    with pytest.raises(ConfigError, match=r"blocks_1/attn.product_v_scale=0 must be finite and not 0"):
        quantized.check_fitted(params)


def test_a_rule_without_a_product_is_an_error():
    quantized, images = network("vit", (Rule("q_v", LayerQuant(SIGNED, SIGNED, Bits(4, 4))),))
    with pytest.raises(ConfigError, match="the network's rules for products has 'q_v', which matches no"):
        quantized.check(images)
