"""MACs and weights by layer: against the oracles, against the products in the traced program, and by hand."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend import core

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.models import macs, zoo
from jaxvision.models.layers import Conv, Dense
from jaxvision.models.macs import LayerCost
from tests.models.networks import SMALL

ORACLES = Path(__file__).parents[1] / "oracles" / "quantizers"


@pytest.mark.parametrize(("case", "name", "classes"), [(0, "resnet20", 100), (1, "resnet18", 1000)])
def test_oracles(case, name, classes):
    with np.load(ORACLES / f"bops_{case}.npz") as file:
        oracle = dict(file)
    costs = macs.count(zoo.build(name, num_classes=classes), (*zoo.spec(name).input_size, 3))
    assert len(costs) == len(oracle["macs"])
    assert sum(cost.macs for cost in costs) == oracle["total_macs"]

    def rows(*columns):
        return sorted(zip(*(np.asarray(column).tolist() for column in columns)))

    # Sorted: the downsample convolution comes after the block's second here, before it in the oracle.
    found = [
        (
            cost.macs,
            cost.weights,
            cost.in_channels,
            cost.out_channels,
            *set(cost.kernel),
            cost.groups,
            math.prod(cost.output_size),
        )
        for cost in costs
    ]
    keys = ("macs", "weights", "in_ch", "out_ch", "kernel", "groups")
    assert sorted(found) == rows(*(oracle[key] for key in keys), oracle["out_hw"] ** 2)


def test_mobilenet_is_the_specifications():
    """trs.md, section 2.9."""
    costs = macs.count(zoo.build("mobilenet_v2", num_classes=1000), (224, 224, 3))
    total = sum(cost.macs for cost in costs)
    depthwise = [cost for cost in costs if cost.groups > 1]
    assert (len(costs), len(depthwise)) == (53, 17)
    assert all(cost.groups == cost.in_channels == cost.out_channels and cost.fan_in == 9 for cost in depthwise)
    quantized = total - costs[0].macs - costs[-1].macs - sum(cost.macs for cost in depthwise)
    assert total == pytest.approx(300.8e6, abs=0.05e6)
    assert 100 * quantized / total == pytest.approx(89.1, abs=0.05)
    assert costs[2] == LayerCost(
        "features_1/conv_1/kernel", 112 * 112 * 32 * 16, 32 * 16, 32, 16, (1, 1), 1, (112, 112)
    )


def program_macs(jaxpr):
    """Every product in a program, found without knowing any layer."""
    total = 0
    for equation in jaxpr.eqns:
        for inner in core.jaxprs_in_params(equation.params):
            total += program_macs(inner)
        output = equation.outvars[0].aval.shape
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += math.prod(output) * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            total += math.prod(output) * math.prod(equation.invars[1].aval.shape[:-1])
    return total


# The resize of DeepLab's logits to the images' size, 4x4x5 by the rows and then the columns to 32x32, has no weights.
UNCOUNTED = {"deeplab": 32 * 4 * 4 * 5 + 32 * 32 * 4 * 5}


@pytest.mark.parametrize("case", SMALL)
def test_nothing_in_the_program_is_missed(case):
    name, settings, size = SMALL[case]
    module = zoo.build(name, num_classes=5, **settings)
    variables = zoo.variable_shapes(module, (size, size))
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    costs = macs.count(module, (size, size, 3))
    counted = sum(cost.macs for cost in costs) + UNCOUNTED.get(case, 0)
    assert counted == program_macs(jax.make_jaxpr(module.apply)(variables, image).jaxpr)
    kernels = {key: leaf for key, leaf in trees.named_leaves(variables["params"]).items() if key.endswith("kernel")}
    named = {cost.name: cost for cost in costs if cost.weights}
    assert named.keys() == kernels.keys()
    for key, leaf in kernels.items():
        assert named[key].weights == math.prod(leaf.shape)
        assert named[key].out_channels == leaf.shape[-1] and named[key].fan_in == math.prod(leaf.shape[:-1])


def test_attention_and_windows_by_hand():
    name, settings, _ = SMALL["vit"]
    costs = {cost.name: cost for cost in macs.count(zoo.build(name, num_classes=5, **settings), (32, 32, 3))}
    tokens = 17
    assert costs["patch_embed/kernel"] == LayerCost("patch_embed/kernel", 16 * 192 * 8, 1536, 3, 8, (8, 8), 1, (4, 4))
    assert costs["blocks_1/attn/q_k"] == LayerCost(
        "blocks_1/attn/q_k", 2 * tokens * tokens * 4, 0, 4, tokens, output_size=(1, 2, tokens)
    )
    assert costs["blocks_1/attn/softmax_v"].macs == costs["blocks_1/attn/q_k"].macs
    assert costs["blocks_1/attn/softmax_v"].in_channels == tokens
    assert costs["blocks_0/mlp/fc1/kernel"].output_size == (tokens,)
    assert costs["head/kernel"].output_size == ()

    name, settings, _ = SMALL["autoformer"]
    costs = {cost.name: cost for cost in macs.count(zoo.build(name, num_classes=5, **settings), (32, 32, 3))}
    product = LayerCost("blocks_1/attn/q_position", 2 * 17 * 17 * 64, 0, 64, 17, output_size=(1, 2, 17))
    assert costs[product.name] == product
    for other in ("q_k", "softmax_v", "softmax_position"):
        assert costs[f"blocks_1/attn/{other}"].macs == product.macs

    name, settings, _ = SMALL["swin"]
    costs = {cost.name: cost for cost in macs.count(zoo.build(name, num_classes=5, **settings), (32, 32, 3))}
    assert costs["layers_0/blocks_0/attn/qkv/kernel"].output_size == (4, 16)  # 8x8 pixels in four windows
    assert costs["layers_0/blocks_0/attn/q_k"].output_size == (4, 1, 16)


class Odd(nn.Module):
    """A grouped, dilated, strided convolution; a matrix used twice; somebody else's layer."""

    @nn.compact
    def __call__(self, x):
        x = Conv(6, (3, 1), stride=(2, 1), padding=(2, 0), dilation=(2, 1), groups=2, name="conv")(x)
        dense = Dense(6, name="dense")
        return nn.Dense(3)(dense(dense(x.mean((1, 2)))))


def test_shared_layers_count_twice_and_other_layers_not():
    conv, dense = macs.count(Odd(), (9, 5, 4))
    assert conv == LayerCost("conv/kernel", 5 * 5 * 3 * 2 * 6, 36, 4, 6, (3, 1), 2, (5, 5))
    assert conv.fan_in == 6
    assert dense == LayerCost("dense/kernel", 2 * 36, 36, 6, 6)
    assert macs.count(Dense(2), (4, 4, 3))[0].name == "kernel"


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"image_shape=\(32, 32\) must be \(height, width, channels\)"):
        macs.count(Odd(), (32, 32))
    with pytest.raises(ConfigError, match="Dense has no layer whose"):
        macs.count(nn.Dense(2), (4, 4, 3))
