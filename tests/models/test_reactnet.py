"""ReActNet: the official parameters at full size, and a binary block against the formula written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.models import reactnet, torch_import, zoo
from jaxvision.models.quantized import Bits, LayerQuant, QuantizedNetwork, Recipe, Rule
from jaxvision.quant.families import FAMILIES


def expected_parameters(num_classes, stem):
    """Convolutions of ResNet-18, three 1x1 shortcuts, BN, and a shift before and three numbers behind each."""
    widths, total = (64, 128, 256, 512), stem + 2 * 64
    before = 64
    for width in widths:
        for index in range(4):
            inputs = before if index == 0 else width
            total += 9 * inputs * width + inputs + 2 * width + 3 * width
        if before != width:
            total += before * width + 2 * width
        before = width
    return total + 512 * num_classes + num_classes


@pytest.mark.parametrize(
    ("name", "classes", "stem"), [("reactnet18", 1000, 7 * 7 * 3 * 64), ("reactnet18_cifar", 10, 3 * 3 * 3 * 64)]
)
def test_full_size(name, classes, stem):
    model = zoo.build(name, num_classes=classes)
    size = zoo.spec(name).input_size
    shapes = zoo.variable_shapes(model, size)
    assert trees.count_parameters(shapes["params"]) == expected_parameters(classes, stem)
    logits = jax.eval_shape(lambda v: model.apply(v, jnp.zeros((2, *size, 3))), shapes)
    assert logits.shape == (2, classes)
    if name == "reactnet18":
        assert trees.count_parameters(shapes["params"]) == 11_704_424


def test_names_and_shapes_are_the_official_codes():
    shapes = zoo.variable_shapes(zoo.build("reactnet18", num_classes=1000), (224, 224))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    state = torch_import.export_state_dict("reactnet18", zeros)
    for key, shape in {
        "conv1.weight": (64, 3, 7, 7),
        "layer1.3.move0.bias": (1, 64, 1, 1),
        "layer2.0.move0.bias": (1, 64, 1, 1),
        "layer2.0.binary_conv.weight": (128, 64, 3, 3),
        "layer2.0.bn1.running_var": (128,),
        "layer2.0.move1.bias": (1, 128, 1, 1),
        "layer2.0.prelu.weight": (128,),
        "layer2.0.move2.bias": (1, 128, 1, 1),
        "layer2.0.downsample.1.weight": (128, 64, 1, 1),
        "layer2.0.downsample.2.running_mean": (128,),
        "fc.bias": (1000,),
    }.items():
        assert state[key].shape == shape, key
    assert not any("layer1.0.downsample" in key for key in state)


def block_variables(block, x):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)
    drawn = jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)
    return trees.map_named(lambda name, leaf: np.abs(leaf) + 0.5 if name.endswith("/var") else leaf, drawn)


def test_a_binary_block_is_the_formula():
    """Values and gradients with stride and a shortcut that changes the shape, at W1A1 with float shortcut."""
    block = reactnet.Block(3, stride=2)
    x = np.random.default_rng(1).normal(size=(2, 4, 4, 2)).astype(np.float32)
    variables = block_variables(block, x)
    family = FAMILIES["reactnet"]
    layer = LayerQuant(Recipe(family.weight, dict(family.weight_settings)), Recipe(family.activation), Bits(1, 1))
    network = QuantizedNetwork(block, (Rule("binary_conv", layer),))
    assert list(network.check(x)) == ["binary_conv/kernel"]

    def conv(x, kernel, stride, padding):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, [(padding,) * 2] * 2, dimension_numbers=dims)

    def norm(p, stats, x):
        return (x - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5) * p["scale"] + p["bias"]

    def tail(p, stats, signs, binary, x):
        """From the binary operands on: what autodiff does without any quantizer."""
        mean = x.reshape(2, 2, 2, 2, 2, 2).mean((2, 4))
        shortcut = norm(p["downsample_2"], stats["downsample_2"], conv(mean, p["downsample_1"]["kernel"], 1, 0))
        y = norm(p["bn1"], stats["bn1"], conv(signs, binary, 2, 1)) + shortcut + p["move1"]["bias"]
        return jnp.where(y > 0, y, p["prelu"]["slope"] * y) + p["move2"]["bias"]

    p, stats = variables["params"], variables["batch_stats"]
    kernel, shifted = p["binary_conv"]["kernel"], x + p["move0"]["bias"]
    signs, binary = np.sign(shifted), np.sign(kernel) * np.abs(kernel).mean((0, 1, 2))
    upstream = np.random.default_rng(2).normal(size=(2, 2, 2, 3)).astype(np.float32)

    @jax.jit
    def both(p, x):
        y, back = jax.vjp(lambda p, x: network.apply({"params": p, "batch_stats": stats}, x), p, x)
        plain, pull = jax.vjp(lambda p, s, b, x: tail(p, stats, s, b, x), p, signs, binary, x)
        return y, back(upstream), plain, pull(upstream)

    y, (dp, dx), plain, (dp_tail, dsigns, dbinary, dx_tail) = both(p, x)
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-5)
    through = np.asarray(dsigns) * np.where(np.abs(shifted) < 1, 2 - 2 * np.abs(shifted), 0)
    np.testing.assert_allclose(dx, dx_tail + through, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dp["move0"]["bias"], through.sum((0, 1, 2)), rtol=1e-4, atol=1e-5)
    expected = np.asarray(dbinary) * (np.abs(kernel) <= 1)
    np.testing.assert_allclose(dp["binary_conv"]["kernel"], expected, rtol=1e-4, atol=1e-5)
    for name in ("bn1", "move1", "prelu", "move2", "downsample_1", "downsample_2"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), dp[name], dp_tail[name])


def test_the_start_is_officials():
    params = jax.jit(reactnet.Block(4).init)(jax.random.key(0), jnp.zeros((1, 3, 3, 4)))["params"]
    assert (np.asarray(params["prelu"]["slope"]) == 0.25).all()
    assert all((np.asarray(params[f"move{index}"]["bias"]) == 0).all() for index in range(3))


def test_mistakes():
    with pytest.raises(ConfigError, match="did you mean 'cifar'"):
        zoo.variable_shapes(zoo.build("reactnet18", num_classes=2, stem="cifra"), (32, 32))
    with pytest.raises(ConfigError, match=r"stage_sizes=.* must have 4 entries"):
        zoo.variable_shapes(zoo.build("reactnet18", num_classes=2, stage_sizes=(1, 1)), (32, 32))
