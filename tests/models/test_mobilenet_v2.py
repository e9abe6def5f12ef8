"""MobileNetV2: torchvision's names, sizes and arithmetic (against NumPy), taps, ReLU6's gradient, initial values."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.models import torch_import, zoo
from jaxvision.models.mobilenet_v2 import InvertedResidual, MobileNetV2, make_divisible, relu6
from tests.models import networks

# A block without expansion, one with stride 2, one with a residual, one that only changes channels.
STAGES = ((1, 8, 1, 1), (6, 16, 2, 2), (2, 24, 1, 1))
TINY = partial(MobileNetV2, num_classes=5, width_multiplier=0.25, stages=STAGES, divisor=4)


def state_shapes(num_classes=1000, width=32, last=1280):
    """torchvision's ``mobilenet_v2().state_dict()``, without ``num_batches_tracked``: names and shapes."""
    shapes = {}

    def conv(name, out, channels, size):
        shapes[f"{name}.weight"] = (out, channels, size, size)

    def norm(name, size):
        shapes.update({f"{name}.{leaf}": (size,) for leaf in ("weight", "bias", "running_mean", "running_var")})

    conv("features.0.0", width, 3, 3)
    norm("features.0.1", width)
    index = 0
    for t, c, n, _ in ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
                       (6, 320, 1, 1)):  # fmt: skip
        for _ in range(n):
            index += 1
            layers = []
            hidden = width * t
            if t != 1:
                layers.append([(hidden, width, 1), (hidden,)])
            layers += [[(hidden, 1, 3), (hidden,)], (c, hidden, 1), (c,)]
            for number, layer in enumerate(layers):
                name = f"features.{index}.conv.{number}"
                if isinstance(layer, list):
                    conv(f"{name}.0", *layer[0])
                    norm(f"{name}.1", *layer[1])
                elif len(layer) == 3:
                    conv(name, *layer)
                else:
                    norm(name, *layer)
            width = c
    conv("features.18.0", last, width, 1)
    norm("features.18.1", last)
    shapes["classifier.1.weight"], shapes["classifier.1.bias"] = (num_classes, last), (num_classes,)
    return shapes


def test_names_and_shapes_are_torchvisions():
    shapes = zoo.variable_shapes(zoo.build("mobilenet_v2", num_classes=1000), (224, 224))
    assert networks.exported_shapes("mobilenet_v2", shapes) == state_shapes()
    assert trees.count_parameters(shapes["params"]) == 3_504_872
    info = zoo.spec("mobilenet_v2")
    assert (info.naming, info.crop_fraction, info.interpolation) == ("torchvision", 0.875, "bilinear")


@pytest.mark.parametrize(
    ("width", "parameters"),
    [(0.5, 1_968_680), (1.4, 6_108_776)],
)
def test_other_widths_have_the_published_sizes(width, parameters):
    """timm's mobilenetv2_050 and mobilenetv2_140."""
    shapes = zoo.variable_shapes(zoo.build("mobilenet_v2", num_classes=1000, width_multiplier=width), (32, 32))
    assert trees.count_parameters(shapes["params"]) == parameters


def test_channels_are_multiples_not_far_below_what_was_asked():
    assert [make_divisible(c) for c in (1, 12, 16.8, 24 * 0.35, 100, 33.6)] == [8, 16, 16, 8, 104, 32]
    assert make_divisible(11.5) == 16  # 8 would be less than 90 %
    assert make_divisible(11.5, 4) == 12


def reference(state, x, stages):
    """torchvision's forward in evaluation mode, float64, NCHW."""

    def conv(x, name, stride=1):
        kernel = state[f"{name}.weight"].astype(np.float64)
        pad = kernel.shape[2] // 2
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], (2, 3))[:, :, ::stride, ::stride]
        if kernel.shape[1] == 1 and len(kernel) == x.shape[1]:
            return np.einsum("bchwij,cij->bchw", windows, kernel[:, 0])
        return np.einsum("bchwij,ocij->bohw", windows, kernel)

    def norm(x, name):
        scale, bias, mean, var = (
            state[f"{name}.{key}"].astype(np.float64)[:, None, None]
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    def layer(x, name, stride=1):
        return np.clip(norm(conv(x, f"{name}.0", stride), f"{name}.1"), 0, 6)

    x = layer(x, "features.0", 2)
    index = 0
    for expansion, _, blocks, first_stride in stages:
        for block in range(blocks):
            index += 1
            name, stride, y, number = f"features.{index}.conv", first_stride if block == 0 else 1, x, 0
            if expansion != 1:
                y, number = layer(y, f"{name}.0"), 1
            y = layer(y, f"{name}.{number}", stride)
            y = norm(conv(y, f"{name}.{number + 1}"), f"{name}.{number + 2}")
            x = x + y if stride == 1 and x.shape == y.shape else y
    x = layer(x, f"features.{index + 1}").mean((2, 3))
    return x @ state["classifier.1.weight"].T.astype(np.float64) + state["classifier.1.bias"]


def variables_of(module, images):
    """Variances positive, activations on both sides of 0 and 6."""
    drawn = networks.drawn(module, 1, images)

    def shift(name, leaf):
        if name.endswith("var"):
            return np.abs(leaf) + 0.5
        return 3 + leaf if name.endswith("scale") else (3 * leaf if name.endswith("bias") else leaf)

    return trees.map_named(shift, drawn)


def test_the_whole_network_is_torchvisions():
    images = np.random.default_rng(0).standard_normal((2, 20, 14, 3)).astype(np.float32)
    variables = variables_of(TINY(), images)
    state = torch_import.export_state_dict("mobilenet_v2", variables)
    expected = reference(state, images.transpose(0, 3, 1, 2).astype(np.float64), STAGES)
    logits, seen = networks.recorded(TINY(), variables, images)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-3)
    projected = np.asarray(seen["features.2.conv.2"])
    assert (projected == 6).any() and (projected == 0).any()

    # Every convolution and the classifier, by torchvision's names, in order.
    names = [f"features.1.conv.{n}" for n in ("0.0", "1")]
    names += [f"features.{i}.conv.{n}" for i in (2, 3, 4) for n in ("0.0", "1.0", "2")]
    assert sorted(seen) == sorted(["features.0.0", *names, "features.5.0", "classifier.1"])
    # A linear bottleneck goes into an expansion: it has negative values, unlike what a ReLU6 gives.
    assert np.min(seen["features.3.conv.0.0"]) < 0 <= np.min(seen["features.3.conv.1.0"])
    np.testing.assert_array_equal(seen["features.0.0"], images)


def test_pooled_features_and_small_images():
    module = MobileNetV2(0, stem_stride=1)
    images = np.zeros((2, 32, 32, 3), np.float32)
    made = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), images))
    assert made[0].shape == (2, 1280)
    assert not any(name.startswith("params/classifier") for name in trees.named_leaves(made[1]))


def test_training_moves_statistics_drops_and_reaches_every_parameter():
    images = np.random.default_rng(0).standard_normal((4, 16, 16, 3)).astype(np.float32)
    variables = variables_of(TINY(), images)

    @jax.jit
    def gradient(key):
        def loss(params):
            logits, moved = TINY(dropout=0.5).apply(
                {**variables, "params": params}, images, train=True, mutable="batch_stats", rngs={"dropout": key}
            )
            return -jax.nn.log_softmax(logits)[:, 0].mean(), moved

        return jax.grad(loss, has_aux=True)(variables["params"])

    grads, moved = gradient(jax.random.key(0))
    for name, leaf in trees.named_leaves(grads).items():
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, name
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), moved["batch_stats"], variables["batch_stats"])
    assert all(jax.tree.leaves(changed))
    other, _ = gradient(jax.random.key(1))
    assert np.any(other["classifier_1"]["kernel"] != grads["classifier_1"]["kernel"])


def test_relu6_is_torchs_at_its_edges():
    x = jnp.asarray([-1.0, 0.0, 1e-3, 5.0, 6.0, 7.0, jnp.nan])
    np.testing.assert_array_equal(relu6(x), np.asarray([0, 0, 1e-3, 5, 6, 6, np.nan], np.float32))
    np.testing.assert_array_equal(jax.grad(lambda x: relu6(x).sum())(x[:-1]), [0, 0, 1, 1, 0, 0])
    assert relu6(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_initial_values():
    images = np.zeros((1, 8, 8, 96), np.float32)
    block = jax.jit(InvertedResidual(48, expansion=2).init)(jax.random.key(0), images)["params"]
    assert block["conv_1_0"]["kernel"].shape == (3, 3, 1, 192)
    # Kaiming normal over PyTorch's fan-out, which for a depthwise kernel counts all channels.
    for name, fan_out in (("conv_0_0", 192), ("conv_1_0", 9 * 192), ("conv_2", 48)):
        assert np.std(block[name]["kernel"]) == pytest.approx((2 / fan_out) ** 0.5, rel=0.06)
    module = MobileNetV2(50, stages=(), divisor=4)
    params = jax.jit(module.init)(jax.random.key(0), images[..., :3])["params"]
    assert np.std(params["classifier_1"]["kernel"]) == pytest.approx(0.01, rel=0.02)
    assert not np.any(params["classifier_1"]["bias"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width_multiplier": 0}, "width_multiplier=0 must be positive"),
        ({"stages": ((6, 24, 2),)}, r"stages: \(6, 24, 2\) must be four numbers"),
        ({"stages": ((6, 24, 0, 1),)}, "must be four numbers of at least 1"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(TINY(**settings).init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
