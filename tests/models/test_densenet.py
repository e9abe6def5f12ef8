"""DenseNet-121: sizes and blocks of the official class, the whole network against float64 NumPy, settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.models import torch_import, zoo
from jaxvision.models.densenet import DenseLayer, DenseNet, Transition
from tests.models import networks

SMALL = {"stage_sizes": (2, 1, 2), "growth_rate": 3}


@pytest.mark.parametrize("data", ["cifar_10", "cifar_100", "tiny_200"])
def test_sizes_are_the_official_ones(data):
    networks.assert_published(f"densenet121_{data}")


@pytest.mark.parametrize(
    ("case", "block"), [("densenet_bottleneck", DenseLayer(4)), ("densenet_transition", Transition(4))]
)
def test_blocks_are_the_official_ones(case, block):
    networks.assert_block(case, block)


def reference(state, x, stage_sizes, temp):
    def conv(x, norm, conv):
        return networks.torch_conv(state, np.maximum(networks.torch_norm(state, x, norm), 0), conv)

    x = networks.torch_conv(state, x, "conv1")
    for stage, layers in enumerate(stage_sizes, 1):
        for index in range(layers):
            name = f"dense{stage}.{index}"
            y = conv(conv(x, f"{name}.bn1", f"{name}.conv1"), f"{name}.bn2", f"{name}.conv2")
            x = np.concatenate([y, x], -1)
        if stage < len(stage_sizes):
            x = conv(x, f"trans{stage}.bn", f"trans{stage}.conv")
            x = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    x = np.maximum(networks.torch_norm(state, x, "bn"), 0).mean((1, 2))
    return (x @ state["linear.weight"].T + state["linear.bias"]) / temp


def test_the_whole_network():
    images = np.random.default_rng(0).standard_normal((2, 12, 8, 3)).astype(np.float32)
    module = DenseNet(5, **SMALL, temp=0.5)
    variables = networks.positive(networks.drawn(module, 1, images))
    state = torch_import.export_state_dict("densenet121_cifar", variables)
    logits, seen = networks.recorded(module, variables, images)
    assert logits.dtype == jnp.float32
    expected = reference(state, images, SMALL["stage_sizes"], 0.5)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    # 6 + 2 x 3 channels, half of them, + 3, half of 9 rounded down, + 2 x 3.
    assert [state[f"{name}.weight"].shape[:2] for name in ("trans1.conv", "trans2.conv", "linear")] == [
        (6, 12), (4, 9), (5, 10)
    ]  # fmt: skip
    assert sorted(f"{name}.weight" for name in seen) == sorted(
        name for name, value in state.items() if value.ndim in (2, 4)
    )


def test_presets_and_pooled_features():
    for stem, size in (("cifar", 32), ("tiny_imagenet", 64)):
        assert zoo.spec(f"densenet121_{stem}").input_size == (size, size)
        assert zoo.build(f"densenet121_{stem}", num_classes=3).stage_sizes == (6, 12, 24, 16)
    images = jnp.zeros((2, 8, 8, 3))
    output, variables = jax.eval_shape(lambda: DenseNet(0, **SMALL).init_with_output(jax.random.key(0), images))
    assert output.shape == (2, 10) and "linear" not in variables["params"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage_sizes": (2, 0)}, r"stage_sizes=\(2, 0\) must be"),
        ({"stage_sizes": ()}, r"stage_sizes=\(\) must be"),
        ({"growth_rate": 0}, "growth_rate=0 must be at least 1"),
        ({"reduction": 1.5}, "reduction=1.5 must be above 0"),
        ({"reduction": 0.0}, "reduction=0.0 must be above 0"),
        ({"stage_sizes": (1,) * 5}, "images of 8x8 pixels are too small for 5 stages, which need at least 16x16"),
        ({**SMALL, "temp": 0.0}, "temp=0.0"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(DenseNet(3, **settings).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
