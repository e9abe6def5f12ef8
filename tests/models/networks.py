"""What tests of several networks share: oracles, small members of every family, random variables, NumPy layers."""

from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxvision.core import trees
from jaxvision.models import torch_import, zoo

ORACLES = Path(__file__).parents[1] / "oracles" / "vit_models"
CALIBRATION = ORACLES.parent / "calibration_metrics"

# --- small members of every family: zoo name, settings, image size -------------------------------------------------

SMALL = {
    "cifar_a": ("resnet20", {"depth": 8, "width_multiplier": 0.25}, 8),
    "cifar_b": ("resnet20", {"depth": 8, "width_multiplier": 0.25, "shortcut": "B"}, 8),
    "cifar_final_norm": ("resnet20", {"depth": 8, "width_multiplier": 0.25, "final_norm": True}, 8),
    "resnet": ("resnet50", {"stage_sizes": (1, 2, 1, 1), "width": 2}, 32),
    "wide": ("wrn26_10_cifar", {"depth": 8, "width": 1, "stem": "tiny_imagenet"}, 8),
    "densenet": ("densenet121_cifar", {"stage_sizes": (1, 2, 1, 1), "growth_rate": 3}, 8),
    "deeplab": ("deeplabv3_resnet50", {"stage_sizes": (1, 2, 1, 1), "width": 2, "channels": 3, "rates": (1, 2, 3)}, 32),
    "mobilenet": ("mobilenet_v2", {"width_multiplier": 0.1, "stages": ((1, 16, 1, 1), (6, 24, 2, 2))}, 32),
    "reactnet": ("reactnet18", {"stage_sizes": (1, 2, 1, 1), "width": 2}, 32),
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "width": 8, "depth": 2, "num_heads": 2}, 32),
    "deit": ("deit_tiny_distilled_patch16_224", {"patch_size": 8, "width": 8, "depth": 1, "num_heads": 2}, 32),
    "autoformer": ("autoformer", {"architecture": "E8-H1R2-H2R3", "patch_size": 8}, 32),
    "nas_bench_201": ("nas_bench_201", {"architecture": "|nor_conv_3x3~0|+|none~0|avg_pool_3x3~1|+"
                                        "|skip_connect~0|nor_conv_1x1~1|none~2|", "width": 2, "cells": 1}, 8),
    "mbv2_searched": ("mbv2_searched",
                      {"structure": "SuperConvK3BNRELU(3,8,2,1)SuperResIDWE1K3(8,8,2,4,1)SuperConvK1BNRELU(8,8,1,1)",
                       "use_se": True}, 16),
    "swin": ("swin_tiny_patch4_window7_224",
             {"width": 4, "depths": (1, 2, 1), "num_heads": (1, 2, 2), "window": 4}, 32),
}  # fmt: skip


def small(case, num_classes=5):
    """Zoo name, and variables with distinct random values."""
    name, settings, size = SMALL[case]
    shapes = zoo.variable_shapes(zoo.build(name, num_classes=num_classes, **settings), (size, size))
    rng = np.random.default_rng(0)
    return name, jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


def assert_equal(one, other):
    """The same names, dtypes and values."""
    one, other = trees.named_leaves(one), trees.named_leaves(other)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# --- variables and intermediates -----------------------------------------------------------------------------------


def drawn(module, seed, images):
    """Random variables, biases and scales included, of standard deviation 0.3; drawn by NumPy, so nothing compiles."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    return jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), shapes)


BLOCK_SITES = (
    "norm1",
    "attn.qkv",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.softmax",
    "attn.proj",
    "norm2",
    "mlp.fc1",
    "mlp.fc2",
)
"""The taps of a transformer block in the order of the forward pass, but for those of outputs."""


def sites(module, variables, images):
    """The names of a network's taps, each met once, but for those of outputs."""
    names = []

    def tap(name, value):
        names.append(name)
        return value

    jax.eval_shape(partial(module.apply, tap=tap), variables, images)
    assert len(names) == len(set(names))
    return [name for name in names if not name.endswith(".out")]


def recorded(module, variables, images, compile_=jax.jit):
    """The output and everything that a tap saw, by one compiled program."""

    def run(variables, images):
        seen = {}
        output = module.apply(variables, images, tap=lambda name, value: seen.setdefault(name, value))
        return output, seen

    return compile_(run)(variables, images)


# --- timm's numbers and names --------------------------------------------------------------------------------------


def oracle(name):
    """The arrays of an oracle, and its images as [B, H, W, C]."""
    with np.load(ORACLES / f"{name}.npz") as file:
        data = dict(file)
    return data, data["input_nchw"].transpose(0, 2, 3, 1)


def load(name, module, data, images):
    """Variables of ``module``, of the zoo's family of ``name``, from the oracle's weights, by the strict converter."""
    template = jax.eval_shape(module.init, jax.random.key(0), images)
    state = {key[2:]: value for key, value in data.items() if key.startswith("w/")}
    return torch_import.convert(name, state, template)


def assert_timms_intermediates(name, module, data, images, intermediates, at_least):
    """Logits, and the taps that ``intermediates`` names by the oracle's key, at least so many of them, in float32."""
    logits, seen = recorded(module, load(name, module, data, images), images, jax.jit)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, data["logits"], rtol=1e-4, atol=1e-5)
    compared = {key: tap for key, tap in intermediates.items() if key in data}
    assert len(compared) >= at_least
    for key, tap in compared.items():
        np.testing.assert_allclose(seen[tap], data[key], rtol=1e-4, atol=1e-5, err_msg=key)


def assert_timms_float64_logits(name, build, data, images):
    """The logits of ``build(data, dtype=)`` in float64."""
    with jax.enable_x64(True):
        module = build(data, dtype=jnp.float64)
        logits = jax.jit(module.apply)(load(name, module, data, images), images.astype(np.float64))
        assert logits.dtype == jnp.float64
        np.testing.assert_allclose(logits, data["logits_float64"], rtol=1e-9, atol=1e-9)


def key_list(name):
    """PyTorch names and shapes of timm's checkpoint of ``name``, and its number of parameters."""
    *lines, last = (ORACLES / f"keys_{name}.txt").read_text().splitlines()
    keys = {key: tuple(map(int, shape.split(","))) for key, shape in (line.split("\t") for line in lines)}
    return keys, int(last.split()[-1])


def exported_shapes(name, shapes):
    """PyTorch names and shapes of the variables ``shapes``, without making any."""
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.int8(0), leaf.shape), shapes)
    return {key: value.shape for key, value in torch_import.export_state_dict(name, zeros).items()}


# --- the official code's numbers of the calibration networks ---------------------------------------------------------


@lru_cache
def _published():
    with np.load(CALIBRATION / "networks_0.npz") as file:
        return dict(file)


def assert_published(key):
    """Counts and map sizes of "<zoo name>_<classes>" (the oracle says "tiny") are those of the official class."""
    *words, classes = key.split("_")
    name = "_".join(words).replace("tiny", "tiny_imagenet").removesuffix("_imagenet" if words[-1] == "imagenet" else "")
    module = zoo.build(name, num_classes=int(classes))
    outputs = {}

    def watch(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if len(context.module.path) == 1 and context.method_name == "__call__":
            outputs[context.module.path[0].split("_")[0]] = output.shape  # a stage's last block is the last to write
        return output

    with nn.intercept_methods(watch):
        image = jax.ShapeDtypeStruct((2, *zoo.spec(name).input_size, 3), jnp.float32)
        shapes = jax.eval_shape(module.init, jax.eval_shape(lambda: jax.random.key(0)), image)
    oracle = {path[len(key) + 1 :]: value for path, value in _published().items() if path.startswith(f"{key}/")}
    assert trees.count_parameters(shapes["params"]) == oracle["params"]
    assert trees.count_parameters(shapes["batch_stats"]) == oracle["bn_buffers"]
    assert len(trees.named_leaves(shapes["params"])) == oracle["num_param_arrays"]
    children = {path.split("/")[1]: tuple(value) for path, value in oracle.items() if path.startswith("out_nhwc/")}
    compared = children.keys() - {"relu", "maxpool", "avgpool"}  # no modules here
    assert compared >= {"conv1"} and len(compared) >= 5
    assert {child: outputs[child] for child in compared} == {child: children[child] for child in compared}


def assert_block(case, block):
    """A forward pass in training, the statistics after it, and one in evaluation with those."""
    with np.load(CALIBRATION / f"block_{case}.npz") as file:
        oracle = dict(file)
    variables = {"params": {}, "batch_stats": {}}
    for key in (key for key in oracle if key.startswith("w/")):
        layer, _, leaf = key[2:].rpartition(".")
        collection = "batch_stats" if leaf.startswith("running") else "params"
        names = {"weight": "kernel" if oracle[key].ndim == 4 else "scale", "running_mean": "mean", "running_var": "var"}
        module = variables[collection].setdefault(layer.replace("shortcut", "downsample").replace(".", "_"), {})
        module[names.get(leaf, leaf)] = oracle[key]

    @jax.jit
    def run(variables, x):
        train, moved = block.apply(variables, x, train=True, mutable=["batch_stats"])
        return train, moved["batch_stats"], block.apply({**variables, **moved}, x)

    train, moved, evaluation = run(variables, oracle["x"])
    np.testing.assert_allclose(train, oracle["out_train"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(evaluation, oracle["out_eval_after"], rtol=1e-5, atol=1e-5)
    after = [key for key in oracle if key.startswith("after_train_pass/")]
    assert len(after) == len(jax.tree.leaves(moved)) > 0
    for key in after:
        layer, _, leaf = key.split("/")[1].rpartition(".")
        ours = moved[layer.replace("shortcut", "downsample").replace(".", "_")][leaf.removeprefix("running_")]
        np.testing.assert_allclose(ours, oracle[key], rtol=1e-5, atol=1e-6, err_msg=key)


# --- PyTorch's layers in float64 NumPy, on a PyTorch-named state dict ------------------------------------------------


def positive(variables):
    """Scales around 1 and variances above 0.5, so that no map dies."""

    def shift(name, leaf):
        return np.abs(leaf) + 0.5 if name.endswith("var") else leaf + name.endswith("scale")

    return trees.map_named(lambda name, leaf: np.asarray(shift(name, leaf), np.float32), variables)


def torch_conv(state, x, name, stride=1, dilation=1):
    """[B, H, W, C]: the convolution of that name, padded to keep the size at stride 1."""
    kernel = state[f"{name}.weight"].astype(np.float64)  # OIHW
    (height, width), pad = x.shape[1:3], dilation * (kernel.shape[2] // 2)
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    total = 0
    for i, j in np.ndindex(kernel.shape[2:]):
        rows = slice(i * dilation, i * dilation + height, stride)
        total = total + padded[:, rows, j * dilation : j * dilation + width : stride] @ kernel[:, :, i, j].T
    return total


def torch_norm(state, x, name):
    """Batch normalisation of that name, in evaluation."""
    scale, bias, mean, var = (
        state[f"{name}.{key}"].astype(np.float64) for key in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def torch_residual(state, x, name, stride=1, dilation=1):
    """torchvision's BasicBlock or Bottleneck, whichever has these weights; stride and dilation in its first 3x3."""
    y, strided = x, False
    number = 1
    while f"{name}.conv{number}.weight" in state:
        large = state[f"{name}.conv{number}.weight"].shape[2] == 3
        y = np.maximum(y, 0) if number > 1 else y
        y = torch_conv(state, y, f"{name}.conv{number}", stride if large and not strided else 1, dilation)
        y, strided, number = torch_norm(state, y, f"{name}.bn{number}"), strided or large, number + 1
    if f"{name}.downsample.0.weight" in state:
        x = torch_norm(state, torch_conv(state, x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
    return np.maximum(x + y, 0)
