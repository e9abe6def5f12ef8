"""CIFAR ResNets: sizes, option A and B, taps, and the whole network against a NumPy forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.models.cifar_resnet import PRESETS, CifarResNet, shortcut_a


def shapes(module, size=32, channels=3):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, size, size, channels))))


def random_variables(module, size, channels=3):
    """Positive variances, scales near 1, everything else normal: a network that is no special case."""
    rng = np.random.default_rng(0)

    def draw(name, leaf):
        noise = rng.standard_normal(leaf.shape)
        if name.endswith("kernel"):
            return (noise * (2 / np.prod(leaf.shape[:-1])) ** 0.5).astype(np.float32)
        return ((np.exp(0.3 * noise)) if name.endswith(("var", "scale")) else 0.3 * noise).astype(np.float32)

    return trees.map_named(draw, shapes(module, size, channels))


def conv3x3(x, kernel, stride):
    """Padding 1, in float64, one offset of the kernel at a time."""
    size = kernel.shape[0]
    pad = size // 2
    x = np.pad(x.astype(np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    y = 0
    for i in range(size):
        for j in range(size):
            window = x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride]
            y = y + window @ kernel[i, j].astype(np.float64)
    return y


def forward(variables, x, blocks, shortcut):
    """He et al. 2015, sections 3.3 and 4.2, in evaluation mode."""
    params, stats = variables["params"], variables["batch_stats"]

    def norm(x, path):
        p, s = params, stats
        for key in path.split("/"):
            p, s = p[key], s[key]
        return (x - s["mean"]) / np.sqrt(s["var"].astype(np.float64) + 1e-5) * p["scale"] + p["bias"]

    x = np.maximum(norm(conv3x3(x, params["conv1"]["kernel"], 1), "bn1"), 0)
    for stage in (1, 2, 3):
        for index in range(blocks):
            name = f"layer{stage}_{index}"
            block, stride = params[name], 2 if stage > 1 and index == 0 else 1
            y = np.maximum(norm(conv3x3(x, block["conv1"]["kernel"], stride), f"{name}/bn1"), 0)
            y = norm(conv3x3(y, block["conv2"]["kernel"], 1), f"{name}/bn2")
            if stride == 2 and shortcut == "A":
                extra = y.shape[-1] // 4
                zeros = np.zeros((*y.shape[:3], extra))
                x = np.concatenate([zeros, x[:, ::2, ::2], zeros], -1)
            elif stride == 2:
                x = norm(x[:, ::2, ::2] @ block["shortcut_0"]["kernel"][0, 0], f"{name}/shortcut_1")
            x = np.maximum(x + y, 0)
    linear = params["linear"]
    return x.mean((1, 2)) @ linear["kernel"].astype(np.float64) + linear["bias"]


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_network_equals_a_numpy_forward(shortcut):
    module = CifarResNet(5, depth=14, width_multiplier=0.25, shortcut=shortcut)
    x = np.random.default_rng(1).standard_normal((2, 12, 9, 3)).astype(np.float32)
    variables = random_variables(module, 12)
    logits = jax.jit(module.apply)(variables, x)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, forward(variables, x, 2, shortcut), rtol=1e-4, atol=1e-5)


# Weights and biases of convolutions, BN and the linear layer; the published table of akamaster counts the same
# (0.27M, 0.46M, 0.66M, 0.85M, 1.7M).
@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet20", 269722), ("resnet32", 464154), ("resnet44", 658586), ("resnet56", 853018), ("resnet110", 1727962)],
)
def test_parameter_counts(name, count):
    assert trees.count_parameters(shapes(CifarResNet(10, **PRESETS[name]))["params"]) == count


def test_option_b_adds_two_projections():
    plain, projected = (shapes(CifarResNet(10, shortcut=kind))["params"] for kind in "AB")
    extra = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert trees.count_parameters(projected) - trees.count_parameters(plain) == extra


def test_option_a_pads_both_sides():
    x = np.arange(1 * 4 * 4 * 4, dtype=np.float32).reshape(1, 4, 4, 4)
    y = np.asarray(shortcut_a(x, 8, 2))
    assert y.shape == (1, 2, 2, 8)
    np.testing.assert_array_equal(y[..., 2:6], x[:, [0, 2]][:, :, [0, 2]])
    assert not y[..., :2].any() and not y[..., 6:].any()


def test_taps_have_torch_names_and_see_the_inputs():
    module = CifarResNet(4, depth=8, width_multiplier=0.25, shortcut="B", final_norm=True)
    seen = {}

    def tap(name, value):
        seen[name] = value.shape
        return value

    x = jnp.zeros((2, 8, 8, 1))
    variables = shapes(module, 8, 1)
    jax.eval_shape(lambda v: module.apply(v, x, tap=tap), variables)
    assert seen == {
        "conv1": (2, 8, 8, 1),
        "layer1.0.conv1": (2, 8, 8, 4), "layer1.0.conv2": (2, 8, 8, 4),
        "layer2.0.conv1": (2, 8, 8, 4), "layer2.0.conv2": (2, 4, 4, 8), "layer2.0.shortcut.0": (2, 8, 8, 4),
        "layer3.0.conv1": (2, 4, 4, 8), "layer3.0.conv2": (2, 2, 2, 16), "layer3.0.shortcut.0": (2, 4, 4, 8),
        "linear": (2, 16),
    }  # fmt: skip
    assert variables["params"]["bn2"]["scale"].shape == (16,)


def test_a_tap_replaces_what_it_sees():
    module = CifarResNet(3, depth=8, width_multiplier=0.25)
    variables = random_variables(module, 8)
    x = np.random.default_rng(2).standard_normal((1, 8, 8, 3)).astype(np.float32)
    logits = module.apply(variables, x, tap=lambda name, v: jnp.zeros_like(v) if name == "linear" else v)
    np.testing.assert_array_equal(logits, variables["params"]["linear"]["bias"][None])


def test_training_updates_every_statistic():
    module = CifarResNet(3, depth=8, width_multiplier=0.25)
    x = np.random.default_rng(2).standard_normal((4, 8, 8, 3)).astype(np.float32)
    variables = random_variables(module, 8)
    _, changed = jax.jit(lambda v: module.apply(v, x, train=True, mutable=["batch_stats"]))(variables)
    before, after = trees.named_leaves(variables["batch_stats"]), trees.named_leaves(changed["batch_stats"])
    assert before.keys() == after.keys()
    assert all(np.any(before[name] != after[name]) for name in before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"depth": 21}, "depth=21"), ({"shortcut": "C"}, "shortcut='C'"), ({"width_multiplier": 0.01}, "no channel")],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        shapes(CifarResNet(10, **settings))
