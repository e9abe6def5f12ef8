"""What tests of several networks share: timm's oracles, small members of every family, random variables."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import trees
from jaxvision.models import torch_import, zoo

ORACLES = Path(__file__).parents[1] / "oracles" / "vit_models"

# A third of the compile time; only the float32 oracles run what users run.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# --- small members of every family: zoo name, settings, image size -------------------------------------------------

SMALL = {
    "cifar_a": ("resnet20", {"depth": 8, "width_multiplier": 0.25}, 8),
    "cifar_b": ("resnet20", {"depth": 8, "width_multiplier": 0.25, "shortcut": "B"}, 8),
    "cifar_final_norm": ("resnet20", {"depth": 8, "width_multiplier": 0.25, "final_norm": True}, 8),
    "resnet": ("resnet50", {"stage_sizes": (1, 2, 1, 1), "width": 2}, 32),
    "mobilenet": ("mobilenet_v2", {"width_multiplier": 0.1, "stages": ((1, 16, 1, 1), (6, 24, 2, 2))}, 32),
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "width": 8, "depth": 2, "num_heads": 2}, 32),
    "deit": ("deit_tiny_distilled_patch16_224", {"patch_size": 8, "width": 8, "depth": 1, "num_heads": 2}, 32),
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


def recorded(module, variables, images, compile_=quick_jit):
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
        logits = quick_jit(module.apply)(load(name, module, data, images), images.astype(np.float64))
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
