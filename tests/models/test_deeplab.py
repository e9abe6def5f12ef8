"""DeepLabV3: published sizes, strides and dilations, the whole network against float64 NumPy by SMP's names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.models import macs, torch_import, zoo
from jaxvision.models.deeplab import DeepLabV3
from jaxvision.models.heads import corner_matrix
from jaxvision.models.layers import Conv
from tests.models import networks

SMALL = {"block": "basic", "stage_sizes": (1, 1, 2, 2), "width": 2, "channels": 3, "rates": (1, 2, 3)}


def output(module, height, width):
    return jax.eval_shape(
        lambda image: module.init_with_output(jax.random.key(0), image), jnp.zeros((2, height, width, 3))
    )


@pytest.mark.parametrize(
    ("name", "encoder"), [("deeplabv3_resnet50", 25_557_032 - 2_049_000), ("deeplabv3_resnet101", 42_500_160)]
)
def test_sizes_are_the_published_ones(name, encoder):
    """alife.md, section 3: ASPP 15,535,104 and decoder with 21 classes 595,733; encoder: torchvision's without fc."""
    logits, variables = output(zoo.build(name, num_classes=21), 512, 512)
    assert (logits.shape, logits.dtype) == ((2, 512, 512, 21), jnp.float32)
    params = variables["params"]
    aspp = trees.count_parameters(params["decoder"]["aspp"])
    assert (trees.count_parameters(params["encoder"]), aspp) == (encoder, 15_535_104)
    assert trees.count_parameters(params) - encoder - aspp == 595_733
    plain = name.removeprefix("deeplabv3_")
    torchvision = networks.exported_shapes(
        plain, zoo.variable_shapes(zoo.build(plain, num_classes=1000), (224, 224))
    )  # fmt: skip
    ours = networks.exported_shapes(name, variables)
    expected = {f"encoder.{key}": shape for key, shape in torchvision.items() if not key.startswith("fc.")}
    assert {key: shape for key, shape in ours.items() if key.startswith("encoder.")} == expected


def test_the_cost_of_the_largest_layer():
    costs = {cost.name: cost for cost in macs.count(zoo.build("deeplabv3_resnet50", num_classes=21), (512, 512, 3))}
    atrous = costs["decoder/aspp/convs_3_0/kernel"]
    assert (atrous.macs, atrous.output_size) == (64 * 64 * 9 * 2048 * 256, (64, 64))
    assert costs["decoder/aspp/convs_4_1/kernel"].macs == 2048 * 256
    assert costs["segmentation_head_0/kernel"].macs == 64 * 64 * 256 * 21


def convolutions(module, size=64):
    found = {}

    def watch(call, args, kwargs, context):
        if isinstance(context.module, Conv) and context.method_name == "__call__":
            found["/".join(context.module.path)] = context.module
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        output(module, size, size)
    return found


def test_output_stride_8_dilates_every_convolution_of_the_last_two_stages():
    found = convolutions(DeepLabV3(2, stage_sizes=(1, 2, 2, 2), width=2, channels=3))
    stages = {1: (1, 1), 2: (2, 1), 3: (1, 2), 4: (1, 4)}  # stride of the first block, dilation
    seen = 0
    for name, conv in found.items():
        _, _, rest = name.partition("encoder/layer")
        if rest:
            seen += 1
            stride, dilation = stages[int(rest[0])]
            strided = rest[2] == "0" and rest[4:] in ("conv2", "downsample_0")
            assert conv.stride == (stride if strided else 1), name
            if conv.kernel_size == 3:
                assert conv.dilation == conv.padding == dilation, name
    assert seen == 7 * 3 + 4
    rates = [
        (found[f"decoder/aspp/convs_{n}_0"].dilation, found[f"decoder/aspp/convs_{n}_0"].padding) for n in (1, 2, 3)
    ]
    assert rates == [(12, 12), (24, 24), (36, 36)]


@pytest.mark.parametrize(
    ("stem", "stride", "dilations"),
    [("imagenet", 4, (2, 4, 8)), ("imagenet", 16, (1, 1, 2)), ("imagenet", 32, (1, 1, 1)),
     ("cifar", 4, (1, 1, 2)), ("cifar", 8, (1, 1, 1))],
)  # fmt: skip
def test_output_strides_and_images_of_any_size(stem, stride, dilations):
    module = DeepLabV3(2, **SMALL, stem=stem, output_stride=stride)
    found = convolutions(module)
    assert tuple(found[f"encoder/layer{stage}_0/conv1"].dilation for stage in (2, 3, 4)) == dilations
    height, width = 64, 49
    assert output(module, height, width)[0].shape == (2, height, width, 2)
    features, variables = output(module.clone(num_classes=0), height, width)
    assert features.shape == (2, height // stride, -(-width // stride), 3)
    assert "segmentation_head_0" not in variables["params"]


def reference(state, x, rates, temp):
    """SMP's forward in evaluation mode at output stride 2, with the CIFAR stem."""

    def layer(x, conv, norm, dilation=1):
        return np.maximum(networks.torch_norm(state, networks.torch_conv(state, x, conv, 1, dilation), norm), 0)

    size = x.shape[1:3]
    x = layer(x, "encoder.conv1", "encoder.bn1")
    for stage, (stride, dilation) in enumerate([(1, 1), (2, 1), (1, 2), (1, 4)], 1):
        for index in range(SMALL["stage_sizes"][stage - 1]):
            x = networks.torch_residual(
                state, x, f"encoder.layer{stage}.{index}", stride if index == 0 else 1, dilation
            )  # fmt: skip
    aspp = "decoder.aspp"
    maps = [layer(x, f"{aspp}.convs.0.0", f"{aspp}.convs.0.1")]
    for number, rate in enumerate(rates, 1):
        maps.append(layer(x, f"{aspp}.convs.{number}.0", f"{aspp}.convs.{number}.1", rate))
    mean = layer(x.mean((1, 2), keepdims=True), f"{aspp}.convs.4.1", f"{aspp}.convs.4.2")
    maps.append(np.zeros_like(maps[0]) + mean)
    x = layer(np.concatenate(maps, -1), f"{aspp}.project.0", f"{aspp}.project.1")
    x = layer(x, "decoder.conv", "decoder.bn")
    x = (networks.torch_conv(state, x, "segmentation_head.0") + state["segmentation_head.0.bias"]) / temp
    down, across = (corner_matrix(have, want).astype(np.float64) for have, want in zip(x.shape[1:3], size))
    return np.einsum("yh,xw,bhwc->byxc", down, across, x, optimize=True)


def test_the_whole_network():
    images = np.random.default_rng(0).standard_normal((2, 16, 12, 3)).astype(np.float32)
    module = DeepLabV3(4, **SMALL, stem="cifar", output_stride=2, temp=2.0)
    variables = networks.positive(networks.drawn(module, 1, images))
    state = torch_import.export_state_dict("deeplabv3_resnet50", variables)
    logits, seen = networks.recorded(module, variables, images)
    expected = reference(state, images, SMALL["rates"], 2.0)
    assert logits.dtype == jnp.float32 and np.std(expected) > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert sorted(f"{name}.weight" for name in seen) == sorted(name for name, value in state.items() if value.ndim == 4)
    assert seen["decoder.aspp.convs.4.1"].shape == (2, 1, 1, 16)
    assert seen["decoder.aspp.project.0"].shape == (2, 8, 6, 15)


def test_training_drops_and_moves_every_statistic():
    images = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)
    module = DeepLabV3(3, **{**SMALL, "stage_sizes": (1, 1, 1, 1), "rates": (1, 2)}, stem="cifar")
    variables = networks.positive(networks.drawn(module, 1, images))

    @networks.jax.jit
    def run(key):
        return module.apply(variables, images, train=True, mutable="batch_stats", rngs={"dropout": key})

    (logits, moved), (other, again) = (run(jax.random.key(seed)) for seed in (0, 1))
    before = trees.named_leaves({"batch_stats": variables["batch_stats"]})
    # Behind the dropout everything depends on the key, before it nothing does.
    assert np.any(logits != other)
    for name, leaf in trees.named_leaves(moved).items():
        assert np.any(leaf != before[name]), name
        assert np.array_equal(leaf, trees.named_leaves(again)[name]) == (not name.startswith("batch_stats/decoder/bn"))


def test_initial_values():
    """SMP: kaiming_uniform_ for the decoder, xavier_uniform_ for the head, biases 0; He et al. for the encoder."""
    module = DeepLabV3(32, **{**SMALL, "channels": 32}, stem="cifar")

    def chosen(key):  # few leaves, so that the compiler leaves out the rest
        params = module.init(key, jnp.zeros((1, 8, 8, 3)))["params"]
        return params["decoder"]["conv"]["kernel"], params["segmentation_head_0"]

    conv, head = networks.jax.jit(chosen)(jax.random.key(0))
    for kernel, bound in ((conv, (6 / (9 * 32)) ** 0.5), (head["kernel"], (6 / (32 + 32)) ** 0.5)):
        assert 0.98 * bound < np.abs(kernel).max() <= bound
        assert np.std(kernel) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not np.any(head["bias"])


def test_half_precision_gives_float32_logits():
    assert output(DeepLabV3(2, **SMALL, dtype=jnp.bfloat16), 32, 32)[0].dtype == jnp.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_stride": 64}, r"output_stride=64 must be one of \[4, 8, 16, 32\] with stem='imagenet'"),
        ({"stem": "cifar", "output_stride": 16}, r"output_stride=16 must be one of \[1, 2, 4, 8\]"),
        ({"stem": "voc"}, "stem='voc' is unknown"),
        ({"block": "plain"}, "block='plain' is unknown"),
        ({"rates": (0, 1)}, r"rates=\(0, 1\) must be at least 1"),
        ({"channels": 0}, "channels=0 and"),
        ({"dropout": 1.0}, "Dropout rate=1.0"),
        ({"temp": 0.0}, "temp=0.0"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        output(DeepLabV3(2, **{**SMALL, **settings}), 32, 32)
