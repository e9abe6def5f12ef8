"""The random numbers of one NAS-Bench-201 score: weights, noise images and Rademacher probes, in two calls."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.models.nas_bench_201 import CONV_1X1

WORD = 32


class Sizes(NamedTuple):
    """The fixed part of the networks: ``cells`` cells a stage, ``width`` channels in the first, on square images."""

    resolution: int = 32
    batch_size: int = 64
    width: int = 16
    cells: int = 5

    def stage_shape(self, stage: int) -> tuple[int, int, int, int]:
        """[B, H, W, C] of stage 0, 1 or 2."""
        side = self.resolution >> stage
        return self.batch_size, side, side, self.width << stage


class Reduction(NamedTuple):
    """Kernels of a reduction block: [3, 3, C, 2C], [3, 3, 2C, 2C], [1, 1, C, 2C]."""

    conv_a: jax.Array
    conv_b: jax.Array
    shortcut: jax.Array


class Weights(NamedTuple):
    """Kernels of a network; scales are 1, biases 0, and no proxy looks at the classifier.

    Attributes:
      stem: float32 [3, 3, 3, C].
      stages: of each stage float32 [cells, 6, 3, 3, C, C]; an edge has one operation, so its 1x1 kernel is the centre
        of its 3x3 numbers.
      reductions: after the first and the second stage.
    """

    stem: jax.Array
    stages: tuple[jax.Array, jax.Array, jax.Array]
    reductions: tuple[Reduction, Reduction]


class Draws(NamedTuple):
    """Everything random in a score.

    Attributes:
      weights: of the network.
      images: float32 [B, H, W, 3], N(0, 1).
      stage_probes: of each stage uint32 [cells, words]: the signs of each cell's output (:func:`unpack`).
      reduction_probes: uint32 [words] each.
    """

    weights: Weights
    images: jax.Array
    stage_probes: tuple[jax.Array, jax.Array, jax.Array]
    reduction_probes: tuple[jax.Array, jax.Array]


# --- initial values: standard deviation by (fan_in, fan_out), and whether uniform -----------------------------------

INITS: dict[str, tuple[Callable[[float, float], float], bool]] = {
    "kaiming_normal_in": (lambda fan_in, fan_out: math.sqrt(2 / fan_in), False),
    "kaiming_normal_out": (lambda fan_in, fan_out: math.sqrt(2 / fan_out), False),
    "kaiming_uniform_in": (lambda fan_in, fan_out: math.sqrt(2 / fan_in), True),
    "kaiming_uniform_out": (lambda fan_in, fan_out: math.sqrt(2 / fan_out), True),
    "xavier_normal": (lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)), False),
    "xavier_uniform": (lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)), True),
    "normal": (lambda fan_in, fan_out: 0.1, False),
    "uniform": (lambda fan_in, fan_out: 0.1 / math.sqrt(3), True),
}


# --- signs ---------------------------------------------------------------------------------------------------------


def words(shape: tuple[int, ...]) -> int:
    """How many 32-bit words hold the signs of an array."""
    return -(-math.prod(shape) // WORD)


def unpack(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 [n] -> float32 ``shape`` of +-1: element ``k n + j`` is -1 where bit k of word j is set."""
    planes = (packed[None, :] >> jnp.arange(WORD, dtype=jnp.uint32)[:, None]) & 1
    signs = 1 - 2 * planes.astype(jnp.float32)
    return signs.reshape(-1)[: math.prod(shape)].reshape(shape)


def pack(signs: jax.Array) -> jax.Array:
    """The inverse of :func:`unpack`."""
    number = words(signs.shape)
    bits = jnp.pad(jnp.reshape(signs < 0, -1), (0, number * WORD - signs.size))
    shifted = bits.reshape(WORD, number).astype(jnp.uint32) << jnp.arange(WORD, dtype=jnp.uint32)[:, None]
    return jnp.sum(shifted, 0, dtype=jnp.uint32)


# --- the draw ------------------------------------------------------------------------------------------------------


def draw(architecture: jax.Array, key: jax.Array, sizes: Sizes, init: str = "kaiming_normal_in") -> Draws:
    """Fresh weights, images and probes.

    One call draws all normal numbers and one all bits: forty calls would triple the time to compile.

    Args:
      architecture: int32 [6]; decides by which fan an edge's kernel is scaled.
      key: typed, [].
      sizes: of networks and images.
      init: of ``INITS``; the official code's default, and its ablation.

    Raises:
      ConfigError: an unknown ``init``, a resolution that two reductions don't divide, or a size below 1.
    """
    check(sizes, init)
    normals, bits = jax.random.split(key)
    image_shape = (sizes.batch_size, sizes.resolution, sizes.resolution, 3)
    shapes = _weight_shapes(sizes)
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda leaf: isinstance(leaf, tuple) and isinstance(leaf[0], int))
    if INITS[init][1]:
        # Unit variance, as the normal numbers have.
        kernels = jax.random.uniform(jax.random.fold_in(normals, 1), (_total(leaves),), minval=-1, maxval=1) * 3**0.5
        (images,) = _cut(jax.random.normal(normals, (math.prod(image_shape),)), [image_shape])
        pieces = _cut(kernels, leaves)
    else:
        drawn = jax.random.normal(normals, (math.prod(image_shape) + _total(leaves),))
        images, *pieces = _cut(drawn, [image_shape, *leaves])
    weights = _scaled(jax.tree.unflatten(tree, pieces), architecture, INITS[init][0])

    shapes = [(sizes.cells, words(sizes.stage_shape(stage))) for stage in range(3)]
    shapes += [(words(sizes.stage_shape(stage)),) for stage in (1, 2)]
    *stages, first, second = _cut(jax.random.bits(bits, (_total(shapes),), jnp.uint32), shapes)
    return Draws(weights, images, tuple(stages), (first, second))


def check(sizes: Sizes, init: str) -> None:
    """Raises the ConfigErrors of :func:`draw`."""
    if init not in INITS:
        raise unknown("init", init, INITS)
    for name, value in sizes._asdict().items():
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    if sizes.resolution % 4:
        raise ConfigError(f"resolution={sizes.resolution} must be a multiple of 4: two blocks halve it")


def _weight_shapes(sizes: Sizes) -> Weights:
    channels = [sizes.width << stage for stage in range(3)]
    stages = tuple((sizes.cells, 6, 3, 3, c, c) for c in channels)
    reductions = tuple(Reduction((3, 3, c, 2 * c), (3, 3, 2 * c, 2 * c), (1, 1, c, 2 * c)) for c in channels[:2])
    return Weights((3, 3, 3, sizes.width), stages, reductions)


def _scaled(weights: Weights, architecture: jax.Array, deviation: Callable[[float, float], float]) -> Weights:
    def plain(kernel: jax.Array, field: int | None = None) -> jax.Array:
        size, _, fan_in, fan_out = kernel.shape[-4:]
        field = size * size if field is None else field
        return kernel * deviation(field * fan_in, field * fan_out)

    def edges(kernels: jax.Array) -> jax.Array:
        is_1x1 = (architecture == CONV_1X1).reshape(6, 1, 1, 1, 1)
        return lax.select_n(jnp.broadcast_to(is_1x1, kernels.shape), plain(kernels), plain(kernels, 1))

    return Weights(
        plain(weights.stem), tuple(map(edges, weights.stages)),
        tuple(Reduction(*map(plain, reduction)) for reduction in weights.reductions),
    )  # fmt: skip


def _total(shapes: list[tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes))


def _cut(flat: jax.Array, shapes: list[tuple[int, ...]]) -> list[jax.Array]:
    pieces, begin = [], 0
    for shape in shapes:
        end = begin + math.prod(shape)
        pieces.append(lax.slice_in_dim(flat, begin, end).reshape(shape))
        begin = end
    return pieces
