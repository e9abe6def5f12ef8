"""ImageNet ResNets: torchvision's sizes, PyTorch-made numbers for stem and bottleneck, stems, dilation, features."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.core.types import no_tap
from jaxvision.models.layers import Conv, max_pool
from jaxvision.models.resnet import PRESETS, Block, ResNet
from tests.arrays import load
from tests.models import networks

ORACLES = Path(__file__).parents[1] / "oracles" / "alife"
TINY = {"block": "bottleneck", "stage_sizes": (1, 2, 2, 2), "width": 4}


def shapes(module, size=32, channels=3):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, size, size, channels))))


def output(module, size, tap=no_tap):
    image = jnp.zeros((2, size, size, 3))
    return jax.eval_shape(lambda v: module.apply(v, image, tap=tap), shapes(module, size))


@pytest.mark.parametrize(("name", "count"), [("resnet18", 11_689_512), ("resnet34", 21_797_672)])
def test_parameter_counts_are_torchvisions(name, count):
    assert trees.count_parameters(shapes(ResNet(1000, **PRESETS[name]), 64)["params"]) == count


@pytest.mark.parametrize(
    "key",
    [*(f"{name}_{data}" for name in PRESETS for data in ("cifar_10", "tiny_200")),
     "resnet50_cifar_100", "resnet101_cifar_100", "resnet50_imagenet_1000", "resnet101_imagenet_1000"],
)  # fmt: skip
def test_sizes_are_those_of_the_calibration_networks(key):
    networks.assert_published(key)


@pytest.mark.parametrize(
    ("case", "block"),
    [
        ("basic_cifar_stride2", Block("basic", 8, 2)),
        ("bottleneck_cifar_stride2", Block("bottleneck", 4, 2)),
        ("bottleneck_cifar_identity", Block("bottleneck", 4)),
    ],
)
def test_blocks_are_those_of_the_calibration_networks(case, block):
    networks.assert_block(case, block)


@pytest.mark.parametrize("case", ["stem_0", "stem_1"])
def test_stem_is_torchs(case):
    oracle = load(ORACLES / f"{case}.npz")
    x = oracle["x"].astype(np.float32)
    conv = Conv(oracle["conv1"].shape[-1], 7, stride=2, padding=3, use_bias=False)
    y = conv.apply({"params": {"kernel": oracle["conv1"].astype(np.float32)}}, x)
    np.testing.assert_allclose(y, oracle["conv_out"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(max_pool(jax.nn.relu(y), 3, 2, 1), oracle["pool_out"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["bottleneck_0", "bottleneck_1", "bottleneck_2"])
def test_bottleneck_is_torchs(case):
    """Evaluation mode; the oracle's rows of a BN are scale, bias, mean, variance."""
    oracle = load(ORACLES / f"{case}.npz")
    names = {"conv1": "conv1", "conv2": "conv2", "conv3": "conv3", "bn1": "bn1", "bn2": "bn2", "bn3": "bn3"}
    if oracle["has_proj"]:
        names |= {"downsample_0": "proj", "downsample_1": "proj_bn"}
    params, stats = {}, {}
    for ours, theirs in names.items():
        value = oracle[theirs].astype(np.float32)
        if value.ndim == 4:
            params[ours] = {"kernel": value}
        else:
            params[ours] = {"scale": value[0], "bias": value[1]}
            stats[ours] = {"mean": value[2], "var": value[3]}
    block = Block("bottleneck", oracle["conv1"].shape[-1], int(oracle["stride"]), int(oracle["dilation"]))
    y = block.apply({"params": params, "batch_stats": stats}, oracle["x"].astype(np.float32))
    np.testing.assert_allclose(y, oracle["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stem", "size", "expected"),
    [("imagenet", 64, [16, 8, 4, 2]), ("cifar", 32, [32, 16, 8, 4]), ("tiny_imagenet", 64, [64, 32, 16, 8])],
)
def test_feature_sizes(stem, size, expected):
    maps = output(ResNet(0, **TINY, stem=stem, features=True), size)
    assert [(m.shape[1], m.shape[2], m.shape[3]) for m in maps] == [
        (side, side, 16 * 2**i) for i, side in enumerate(expected)
    ]


@pytest.mark.parametrize(
    ("settings", "stride", "dilations"),
    [
        ({"replace_stride_with_dilation": (False, False, True)}, 16, {4: (1, 2)}),
        ({"replace_stride_with_dilation": (False, True, True)}, 8, {3: (1, 2), 4: (2, 4)}),
        ({"replace_stride_with_dilation": (False, True, True), "dilate_first_block": True}, 8, {3: (2, 2), 4: (4, 4)}),
        ({"strides": (1, 2, 2, 1)}, 16, {4: (1, 1)}),
    ],
)
def test_output_stride(settings, stride, dilations):
    module = ResNet(0, **TINY, features=True, **settings)
    assert output(module, 64)[-1].shape[1] == 64 // stride
    plan = module._plan()
    for stage, expected in dilations.items():
        assert tuple(dilation for _, dilation in plan[stage - 1]) == expected


def test_dilation_changes_no_parameter_and_reaches_further():
    """A dilated stage has the parameters of the strided one, and its 3x3 kernels skip pixels."""
    plain = ResNet(0, **TINY)
    dilated = ResNet(0, **TINY, replace_stride_with_dilation=(False, True, True), features=True)
    same = jax.tree.map(lambda leaf: leaf.shape, shapes(plain, 32))
    assert jax.tree.map(lambda leaf: leaf.shape, shapes(dilated, 32)) == same
    block = Block("basic", 1, 1, dilation=2)
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), jax.eval_shape(
        lambda: block.init(jax.random.key(0), jnp.zeros((1, 9, 9, 1)))))  # fmt: skip
    dot = jnp.zeros((1, 9, 9, 1)).at[0, 4, 4, 0].set(1.0)
    zeros = jax.tree.map(jnp.zeros_like, ones["batch_stats"])
    stats = trees.map_named(lambda name, leaf: leaf + 1 if name.endswith("var") else leaf, zeros)
    params = trees.map_named(lambda name, leaf: leaf * (not name.endswith("bias")), ones["params"])
    reached = np.asarray(block.apply({"params": params, "batch_stats": stats}, dot))[0, :, :, 0] > 0
    assert sorted(set(np.nonzero(reached)[0])) == [0, 2, 4, 6, 8]


def test_tiny_imagenet_head_flattens_channel_first():
    module = ResNet(3, block="basic", stage_sizes=(1, 1, 1, 1), width=2, stem="tiny_imagenet")
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.uniform(-0.2, 0.4, leaf.shape).astype(np.float32), shapes(module))
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    seen = {}

    @jax.jit
    def run(variables):
        _, more = module.apply(
            variables,
            rng.standard_normal((2, 32, 32, 3)).astype(np.float32),
            tap=lambda name, value: seen.setdefault(name, value),
            capture_intermediates=lambda module, _: module.name == "layer4_0",
            mutable=["intermediates"],
        )
        return seen["fc"], more["intermediates"]["layer4_0"]["__call__"][0]

    flat, last = run(variables)
    means = np.asarray(last).reshape(2, 2, 2, 2, 2, 16).mean((2, 4))  # of [2, 4, 4, 16]
    assert means.std() > 0.01
    np.testing.assert_allclose(flat, np.moveaxis(means, -1, 1).reshape(2, -1), rtol=1e-5, atol=1e-6)


def test_taps_have_torchvision_names():
    seen = []
    module = ResNet(3, block="bottleneck", stage_sizes=(1, 1, 1, 1), width=4)
    output(module, 32, tap=lambda name, value: (seen.append(name), value)[1])
    expected = ["conv1"]
    for stage in range(1, 5):
        expected += [f"layer{stage}.0.{layer}" for layer in ("conv1", "conv2", "conv3", "downsample.0")]
    assert seen == [*expected, "fc"]


def test_zero_init_residual_and_pooled_features():
    module = ResNet(0, **TINY, zero_init_residual=True)

    def scales(key):
        params = module.init(key, jnp.zeros((1, 32, 32, 3)))["params"]
        return {name: leaf for name, leaf in trees.named_leaves(params).items() if name.endswith("scale")}

    made = jax.jit(scales)(jax.random.key(0))
    assert sum(name.endswith("bn3/scale") for name in made) == 7
    assert all(np.any(leaf) != name.endswith("bn3/scale") for name, leaf in made.items())
    assert "fc" not in shapes(module)["params"]
    assert output(module, 32).shape == (2, 128)


def test_initial_values_follow_the_stem():
    """torchvision: N(0, 2 / fan_out). ACLS's CIFAR network: PyTorch's uniform, bounded by 1 / sqrt(fan_in)."""
    kernels = {}
    for stem in ("imagenet", "cifar"):
        module = ResNet(2, block="basic", stage_sizes=(1, 1, 1, 1), width=8, stem=stem)

        def kernel(key, module=module):  # one leaf, so that the compiler leaves out the rest
            return module.init(key, jnp.zeros((1, 32, 32, 3)))["params"]["layer4_0"]["conv1"]["kernel"]

        kernels[stem] = np.asarray(jax.jit(kernel)(jax.random.key(0)))  # [3, 3, 32, 64]
    assert abs(kernels["imagenet"].std() / (2 / (9 * 64)) ** 0.5 - 1) < 0.03
    assert np.abs(kernels["cifar"]).max() <= (9 * 32) ** -0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": "plain"}, "block='plain'"),
        ({"stem": "cifar10"}, "did you mean 'cifar'"),
        ({"strides": (1, 2)}, "strides"),
        ({"replace_stride_with_dilation": (True,)}, "replace_stride_with_dilation"),
        ({"stage_sizes": (1,)}, "stage_sizes"),
        ({"temp": 0.0}, "temp=0.0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        shapes(ResNet(10, **settings))
