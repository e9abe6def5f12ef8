"""Scores any MobileNetV2-type structure with a few hundred small programs that all structures share.

Shapes differ from structure to structure, so one program a structure, or even a residual unit, would compile all
through a search. Here a unit runs as its layers: a convolution with its normalisation, forward and pulled back. Their
shapes repeat, the more so because channels are padded with zeros to :func:`padded` numbers, which changes no value: a
zero channel stays zero through convolution, normalisation and ReLU, takes no probe and adds the eigenvalue 0. At any
time one unit is in memory, never the network.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core.errors import ConfigError
from jaxvision.methods.az_nas import nb201_cell, proxies
from jaxvision.models import mbv2_structure
from jaxvision.models.mbv2_structure import Unit

EPS = 1e-3
Weights = Mapping[str, np.ndarray]
Draw = Callable[[Unit, tuple[int, int, int, int]], tuple[Weights, np.ndarray]]


def padded(channels: int) -> int:
    """The next number of channels that programs are made for: a multiple of 8, four an octave above 32."""
    step = max(8, 2 ** math.ceil(math.log2(max(channels, 1))) // 8)
    return -(-channels // step) * step


# --- layers --------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def normalise(x: jax.Array) -> jax.Array:
    """Batch normalisation of [B, H, W, C] without scale and shift, by the batch's own biased variance, eps 1e-3."""
    return nb201_cell.normalise(x, EPS).output


def _normalise(x: jax.Array) -> tuple[jax.Array, nb201_cell.Residual]:
    normalised = nb201_cell.normalise(x, EPS)
    return normalised.output, normalised


def _normalise_back(normalised: nb201_cell.Residual, g: jax.Array) -> tuple[jax.Array]:
    # The output is all that the gradient needs beside the rate, so that one array is kept instead of three.
    return (nb201_cell.normalise_vjp(g, normalised),)


normalise.defvjp(_normalise, _normalise_back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Each channel of [B, H, W, C] with its own kernel of [k, k, 1, C], k odd, padding (k - 1) / 2.

    A sum of k^2 shifted products. XLA's CPU backend takes 16 times as long for the same by a grouped convolution
    (8x56x56x96, k 3). The kernel is constant.
    """
    size = kernel.shape[0]
    pad, height, width = size // 2, -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    total = jnp.zeros((), x.dtype)
    for i, j in np.ndindex(size, size):
        rows, columns = (slice(o, o + (n - 1) * stride + 1, stride) for o, n in ((i, height), (j, width)))
        total = total + x[:, rows, columns] * kernel[i, j, 0]
    return total


def _depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, tuple[jax.Array, tuple[int, int]]]:
    return depthwise(x, kernel, stride), (kernel, x.shape[1:3])


def _depthwise_back(stride: int, saved: tuple[jax.Array, tuple[int, int]], g: jax.Array) -> tuple[jax.Array, None]:
    kernel, (height, width) = saved
    if stride > 1:
        # Zeros between the pixels, and behind the last where the input had more.
        config = [(0, n - (m - 1) * stride - 1, stride - 1) for n, m in ((height, g.shape[1]), (width, g.shape[2]))]
        g = jax.lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *config, (0, 0, 0)])
    return depthwise(g, kernel[::-1, ::-1], 1), None


depthwise.defvjp(_depthwise, _depthwise_back)


def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """[B, H, W, C] by [k, k, C, D], or by [k, k, 1, C] channel by channel; k odd, padding (k - 1) / 2."""
    if kernel.shape[2] == 1 and x.shape[-1] > 1:
        return depthwise(x, kernel, stride)
    if kernel.shape[:2] == (1, 1):
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


# --- programs, by the shapes of what they are given ----------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("stride", "activate"))
def _layer(x: jax.Array, kernel: jax.Array, *, stride: int = 1, activate: bool = True) -> tuple[jax.Array, Any]:
    """``normalise(convolve(relu x))``, or of x itself, and its pull-back as a tree of arrays."""
    return jax.vjp(lambda x: normalise(convolve(jax.nn.relu(x) if activate else x, kernel, stride)), x)


@jax.jit
def _pull(pull_back: Any, g: jax.Array) -> jax.Array:
    return pull_back(g)[0]


@jax.jit
def _finish(y: jax.Array, shortcut: jax.Array | None, probe: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The unit's output, its entropy, and the probe through the unit's last ReLU."""
    features = jax.nn.relu(y if shortcut is None else y + shortcut)
    gated = jnp.where(features > 0, probe.astype(features.dtype), 0)
    return features, proxies.spectrum_entropy(features), gated


@jax.jit
def _jacobian(g: jax.Array, g_shortcut: jax.Array | None, probe: jax.Array) -> tuple[jax.Array, jax.Array]:
    g = g if g_shortcut is None else g + g_shortcut
    probe = probe.astype(g.dtype)
    return proxies.block_singular_value(g, probe), proxies.is_identity(g, probe)


_summarise = jax.jit(proxies.summarise)

MAX_PROGRAMS = 1500
"""Two megabytes each; a long search would compile many thousand."""


def bound_programs(limit: int = MAX_PROGRAMS) -> None:
    """Forgets all programs of this module where they are more than ``limit``; those still needed compile again."""
    functions = (_layer, _pull, _finish, _jacobian, _summarise)
    if sum(function._cache_size() for function in functions) > limit:
        for function in functions:
            function.clear_cache()


def unit_statistics(weights: Weights, x: jax.Array, probe: jax.Array, stride: int) -> proxies.BlockStatistics:
    """:func:`jaxvision.methods.az_nas.proxies.block_statistics` of one unit, layer by layer.

    Args:
      weights: ``conv``, or ``expand``, ``depthwise``, ``project`` and, for a projection, ``shortcut``: kernels
        float32 [k, k, C, D]. Biases don't matter, a normalisation follows.
      x: [B, H, W, C].
      probe: +-1, 0 in padded channels, the shape of the output.
      stride: of ``conv``, or of ``depthwise`` and ``shortcut``.
    """
    if "conv" in weights:
        y, conv = _layer(x, weights["conv"], stride=stride, activate=False)
        features, entropy, g = _finish(y, None, probe)
        return proxies.BlockStatistics(features, entropy, *_jacobian(_pull(conv, g), None, probe))
    y, expand = _layer(x, weights["expand"], activate=False)
    y, middle = _layer(y, weights["depthwise"], stride=stride)
    y, project = _layer(y, weights["project"])
    shortcut, projection = x, None
    if "shortcut" in weights:
        shortcut, projection = _layer(x, weights["shortcut"], stride=stride, activate=False)
    features, entropy, gated = _finish(y, shortcut, probe)
    g_shortcut = gated if projection is None else _pull(projection, gated)
    g = _pull(expand, _pull(middle, _pull(project, gated)))
    return proxies.BlockStatistics(features, entropy, *_jacobian(g, g_shortcut, probe))


# --- a structure ---------------------------------------------------------------------------------------------------


def measure(units: Sequence[Unit], images: jax.Array, draw: Draw) -> dict[str, jax.Array]:
    """The proxies of :func:`jaxvision.methods.az_nas.proxies.summarise` of a chain of units.

    Args:
      units: of the structure. The first is the stem: its output is the first feature, its Jacobian isn't looked at.
      images: float32 [B, H, W, 3].
      draw: (unit, shape of its output without padding) -> its weights and its probe, in the order of the units.
    """
    x, statistics = images, []
    for unit in units:
        shape = (x.shape[0], x.shape[1] // unit.stride, x.shape[2] // unit.stride, unit.features)
        weights, probe = draw(unit, shape)
        x, *numbers = unit_statistics(weights, x, probe, unit.stride)
        statistics.append(numbers)
    entropies, sigma, identical = (np.stack(values) for values in zip(*jax.device_get(statistics), strict=True))
    return _summarise(entropies, sigma[1:], identical[1:])


def random_draw(generator: np.random.Generator) -> Draw:
    """Weights N(0, 2 / fan_in) (of a depthwise kernel: its k^2 values) and probes, padded with zeros; from NumPy,
    because a random program for each shape takes longer to compile than all others together."""

    def kernel(size: int, inputs: int, outputs: int) -> np.ndarray:
        # One input channel is a group's own, three are an image's: neither is padded.
        shape = (size, size, inputs if inputs in (1, 3) else padded(inputs), padded(outputs))
        values = np.zeros(shape, np.float32)
        draws = generator.standard_normal((size, size, inputs, outputs), np.float32)
        values[:, :, :inputs, :outputs] = draws * np.float32(math.sqrt(2 / (size**2 * inputs)))
        return values

    def draw(unit: Unit, shape: tuple[int, int, int, int]) -> tuple[Weights, np.ndarray]:
        c, d, f, k = unit.inputs, unit.hidden, unit.features, unit.kernel
        kernels = {"expand": (1, c, d), "depthwise": (k, 1, d), "project": (1, d, f)} if d else {"conv": (k, c, f)}
        if unit.projection:
            kernels["shortcut"] = (1, c, f)
        weights = {name: kernel(*sizes) for name, sizes in kernels.items()}
        probe = np.zeros((*shape[:3], padded(f)), np.int8)
        probe[..., :f] = _signs(generator, shape)
        return weights, probe

    return draw


def _signs(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """+-1, int8; a bit each."""
    count = math.prod(shape)
    words = np.frombuffer(generator.bytes(-(-count // 8)), np.uint8)
    return 2 * np.unpackbits(words, count=count).view(np.int8).reshape(shape) - 1


def check_resolution(blocks: Sequence[mbv2_structure.Block], resolution: int) -> None:
    """Raises ConfigError for a resolution that the strides don't divide."""
    stride = mbv2_structure.total_stride(blocks)
    if resolution % stride:
        raise ConfigError(f"resolution={resolution} must be a multiple of {stride}, the product of the strides")


def score(
    blocks: Sequence[mbv2_structure.Block], generator: np.random.Generator, resolution: int, batch_size: int
) -> dict[str, float]:
    """E, P and T of a structure with fresh weights, on Gaussian images.

    Raises:
      ConfigError: a resolution that the strides don't divide.
    """
    check_resolution(blocks, resolution)
    bound_programs()
    images = generator.standard_normal((batch_size, resolution, resolution, 3), np.float32)
    scores = measure(mbv2_structure.units(blocks), images, random_draw(generator))
    return {name: float(value) for name, value in scores.items()}
