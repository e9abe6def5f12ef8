"""WRN-26-10: sizes of the official class, the whole network against float64 NumPy by PyTorch's names, settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.models import torch_import, zoo
from jaxvision.models.wide_resnet import WideResNet
from tests.models import networks


@pytest.mark.parametrize("data", ["cifar_10", "cifar_100", "tiny_200"])
def test_sizes_are_the_official_ones(data):
    networks.assert_published(f"wrn26_10_{data}")


def reference(state, x, blocks, stem, temp):
    x = np.maximum(networks.torch_norm(state, networks.torch_conv(state, x, "conv1"), "bn1"), 0)
    for stage in (1, 2, 3):
        for index in range(blocks):
            x = networks.torch_residual(state, x, f"layer{stage}.{index}", 2 if stage > 1 and index == 0 else 1)
    if stem == "cifar":
        x = x.mean((1, 2))
    else:
        height, width = x.shape[1] // 2, x.shape[2] // 2
        x = x.reshape(len(x), 2, height, 2, width, -1).mean((2, 4)).transpose(0, 3, 1, 2).reshape(len(x), -1)
    return (x @ state["fc.weight"].T + state["fc.bias"]) / temp


@pytest.mark.parametrize(("stem", "depth"), [("cifar", 14), ("tiny_imagenet", 8)])
def test_the_whole_network(stem, depth):
    images = np.random.default_rng(0).standard_normal((2, 16, 8, 3)).astype(np.float32)
    module = WideResNet(5, depth, width=1, stem=stem, temp=1.5)
    variables = networks.positive(networks.drawn(module, 1, images))
    state = torch_import.export_state_dict(f"wrn26_10_{stem}", variables)
    logits, seen = networks.recorded(module, variables, images)
    assert logits.dtype == jnp.float32
    expected = reference(state, images, (depth - 2) // 6, stem, 1.5)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert seen["fc"].shape == (2, 64 if stem == "cifar" else 256)
    assert sorted(f"{name}.weight" for name in seen) == sorted(
        name for name, value in state.items() if value.ndim in (2, 4)
    )


def test_presets_and_pooled_features():
    tiny = zoo.build("wrn26_10_tiny_imagenet", num_classes=200)
    assert (tiny.depth, tiny.width, tiny.stem) == (26, 10, "tiny_imagenet")
    assert zoo.spec("wrn26_10_tiny_imagenet").input_size == (64, 64)
    images = jnp.zeros((2, 32, 32, 3))
    for stem, size in (("cifar", 128), ("tiny_imagenet", 512)):
        module = WideResNet(0, 8, 2, stem)
        output, variables = jax.eval_shape(
            lambda module=module: module.init_with_output(jax.random.key(0), images)
        )  # fmt: skip
        assert output.shape == (2, size) and "fc" not in variables["params"]


def test_convolutions_start_kaiming_normal_over_the_fan_out():
    module = WideResNet(2, 8, 1)

    def kernel(key):  # one leaf, so that the compiler leaves out the rest
        return module.init(key, jnp.zeros((1, 8, 8, 3)))["params"]["layer3_0"]["conv1"]["kernel"]

    made = np.asarray(networks.jax.jit(kernel)(jax.random.key(0)))  # [3, 3, 32, 64]
    assert abs(made.std() / (2 / (9 * 64)) ** 0.5 - 1) < 0.03


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 28}, r"depth=28 is not 6n \+ 2"),
        ({"depth": 2}, "depth=2 is not"),
        ({"width": 0}, "width=0 must be at least 1"),
        ({"stem": "imagenet"}, "stem='imagenet' is unknown"),
        ({"depth": 8, "width": 1, "temp": -1.0}, "temp=-1.0"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(WideResNet(3, **settings).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
