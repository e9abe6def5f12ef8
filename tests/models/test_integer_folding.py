"""Folded normalisations: the same outputs, fewer arrays, and only where nobody else reads the layer's output."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn

from jaxvision.core import trees
from jaxvision.models import integer_file, integer_folding, integer_network, zoo
from jaxvision.models.integer_file import IntegerModel
from jaxvision.models.layers import BatchNorm, Conv, Dense
from jaxvision.models.quantized import Bits, LayerQuant, QuantizedNetwork, Recipe, Rule
from jaxvision.quant.families import FAMILIES
from tests.models.networks import SMALL

IMAGES = np.random.default_rng(0).standard_normal((2, 6, 6, 3)).astype(np.float32)


class Net(nn.Module):
    """A normalisation behind a convolution with bias, one that isn't the only reader, one behind a sum."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(BatchNorm(name="alone")(Conv(4, 3, padding=1, name="one")(x), train=train))
        y = Conv(4, 1, use_bias=False, name="two")(x)
        x = nn.relu(BatchNorm(name="shared")(y, train=train) + y)
        x = nn.relu(BatchNorm(name="sum")(Conv(4, 1, name="three")(x) + x, train=train))
        x = nn.relu(BatchNorm(name="vector", eps=0.1)(Dense(5, name="four")(jnp.mean(x, (1, 2))), train=train))
        return Dense(3, name="head")(x)


def layer(family, bits):
    chosen = FAMILIES[family]
    recipes = (
        Recipe(getattr(chosen, role), dict(getattr(chosen, f"{role}_settings"))) for role in ("weight", "activation")
    )
    return LayerQuant(*recipes, bits, output_scale=chosen.output_scale)


def trained(network, images):
    """Calibrated, with statistics and gains (of both signs) away from their start."""
    variables = jax.jit(lambda x: network.calibrate(network.init(jax.random.key(0), x), x))(images)
    rng = np.random.default_rng(1)

    def moved(name, leaf):
        if name.endswith("/var"):
            return rng.uniform(0.2, 2, leaf.shape).astype(np.float32)
        if name.startswith("batch_stats") or name.endswith(("/bias", "/scale")):
            return rng.normal(0.2, 1, leaf.shape).astype(np.float32)
        return leaf

    return trees.map_named(moved, variables)


@pytest.mark.parametrize(("family", "bits"), [("trs", Bits(2, 2)), ("ewgs", Bits(3, 4)), ("affine", Bits(4, 8))])
def test_the_same_outputs(family, bits):
    network = QuantizedNetwork(Net(), (Rule("head", None), Rule("kernel$", layer(family, bits))))
    variables = trained(network, IMAGES)
    integers = integer_network.convert(network, variables)
    folded = integer_folding.fold(network, integers, IMAGES[:1])
    exact, found = jax.jit(lambda v, i: (network.apply(v, IMAGES), network.apply(i, IMAGES)))(variables, folded)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())
    gone = trees.named_leaves(integers).keys() - trees.named_leaves(folded).keys()
    assert gone == {
        f"{collection}/{norm}/{leaf}"
        for norm in ("alone", "vector")
        for collection, leaf in (("params", "scale"), ("batch_stats", "mean"), ("batch_stats", "var"))
    }
    described = integer_network.describe(network, folded, IMAGES[:1])
    norms = {name.removesuffix("/kernel"): each.norm for name, each in described.items()}
    assert norms == {"one": "alone", "two": "", "three": "", "four": "vector"}
    assert not any(each.norm for each in integer_network.describe(network, integers, IMAGES[:1]).values())


def test_a_float_layer_keeps_its_normalisation():
    network = QuantizedNetwork(Net(), (Rule("one|head", None), Rule("kernel$", layer("trs", Bits(2, 2)))))
    folded = integer_folding.fold(
        network, integer_network.convert(network, trained(network, IMAGES)), IMAGES[:1]
    )  # fmt: skip
    assert set(folded["batch_stats"]) == {"alone", "shared", "sum"}


@pytest.mark.parametrize("case", ["cifar_b", "densenet", "mobilenet", "reactnet"])
def test_networks_of_the_zoo(case):
    """Every normalisation right behind an integer convolution is folded; outputs stay what they are."""
    name, settings, size = SMALL[case]
    images = np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
    module = zoo.build(name, num_classes=5, **settings)
    bits = Bits(1, 1) if case == "reactnet" else Bits(3, 3)
    chosen = layer("reactnet" if case == "reactnet" else "affine", bits)
    network = QuantizedNetwork(module, (Rule(r"^conv1/|^features_0_0/", None), Rule("kernel$", chosen)))
    variables = trained(network, images)
    integers = integer_network.convert(network, variables)
    folded = integer_folding.fold(network, integers, images[:1])
    exact, found = jax.jit(lambda v, i: (network.apply(v, images), network.apply(i, images)))(integers, folded)
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-4 * np.abs(exact).max())
    before, after = (len(trees.named_leaves(tree["batch_stats"])) // 2 for tree in (integers, folded))
    # Left: the stem's; where blocks normalise first all but the one between the two convolutions of each of 5 blocks.
    assert after == (before - 5 if case == "densenet" else 1)


def test_another_program_needs_only_the_file(tmp_path):
    """The first layer of Net with its folded normalisation, from the file alone."""
    network = QuantizedNetwork(Net(), (Rule("head", None), Rule("kernel$", layer("trs", Bits(3, 3)))))
    variables = trained(network, IMAGES)
    integers = integer_folding.fold(network, integer_network.convert(network, variables), IMAGES[:1])
    model = IntegerModel(integers, integer_network.describe(network, integers, IMAGES[:1]))
    integer_file.save(tmp_path / "net", model)
    entry = json.loads((tmp_path / "net.json").read_text())["layers"][0]
    arrays = safetensors.numpy.load_file(tmp_path / "net.safetensors")
    codes = (IMAGES[..., None] >= arrays["inputs/one/kernel/thresholds"]).sum(-1) + entry["input"]["lowest"]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(codes, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (1, 2))
    sums = np.einsum("bhwcij,ijco->bhwo", windows, arrays["variables/params/one/kernel"].astype(np.int64))
    y = sums * arrays["variables/params/one/kernel_step"] * arrays["inputs/one/kernel/step"]
    y = y + arrays["variables/params/one/bias"] + arrays[f"variables/params/{entry['norm']}/bias"]
    seen = {}

    def watch(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if context.module.name == "alone" and context.method_name == "__call__":
            seen["y"] = result
        return result

    with nn.intercept_methods(watch):
        network.apply(variables, IMAGES)
    np.testing.assert_allclose(y, seen["y"], rtol=1e-4, atol=1e-4)
    again = integer_file.load(tmp_path / "net")
    assert again.layers["one/kernel"].norm == "alone" and again.layers["two/kernel"].norm == ""
