"""NAS-Bench-201 (Dong and Yang 2020, arXiv:2001.00326): cells of six edges in three stages.

Strings and numbers of architectures, their cost, and the network that trains one.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxvision.core.errors import ConfigError
from jaxvision.core.types import Tap, no_tap, scoped
from jaxvision.models.layers import BatchNorm, Conv, Dense, avg_pool, global_avg_pool

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
NONE, SKIP, CONV_1X1, CONV_3X3, AVG_POOL = range(5)

# (to, from) of the edges in the order of an architecture's numbers.
EDGES = ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
NUM_ARCHITECTURES = len(OPERATIONS) ** len(EDGES)

# The cell with the best test accuracy on CIFAR-10, 94.37 %.
BEST_ON_CIFAR10 = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_1x1~1|nor_conv_3x3~2|"

PRESETS: dict[str, dict[str, Any]] = {"nas_bench_201": {"architecture": BEST_ON_CIFAR10}}


def from_index(index: int) -> np.ndarray:
    """Operation numbers of the six edges, int32 [6], of architecture ``index``; the last edge changes fastest.

    This is the order of the product of the six choices, not the one of the NATS-Bench API.

    Raises:
      ConfigError: an index outside 0 ... 15,624.
    """
    if not 0 <= index < NUM_ARCHITECTURES:
        raise ConfigError(f"architecture {index} must be between 0 and {NUM_ARCHITECTURES - 1:,}")
    return np.asarray(np.unravel_index(index, (len(OPERATIONS),) * len(EDGES)), np.int32)


def all_architectures() -> np.ndarray:
    """int32 [15625, 6] in the order of :func:`from_index`."""
    return np.indices((len(OPERATIONS),) * len(EDGES)).reshape(len(EDGES), -1).T.astype(np.int32)


def to_index(operations: Sequence[int] | np.ndarray) -> int:
    """The inverse of :func:`from_index`."""
    return int(np.ravel_multi_index(tuple(int(op) for op in operations), (len(OPERATIONS),) * len(EDGES)))


def to_string(operations: Sequence[int] | np.ndarray) -> str:
    """``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``, the benchmark's notation."""
    nodes = [""] * 3
    for (node, source), operation in zip(EDGES, operations, strict=True):
        nodes[node - 1] += f"{OPERATIONS[int(operation)]}~{source}|"
    return "+".join(f"|{node}" for node in nodes)


def from_string(text: str) -> np.ndarray:
    """The operations int32 [6] of a string as :func:`to_string` makes it.

    Raises:
      ConfigError: another form; says which node or edge.
    """
    nodes = text.strip().split("+")
    if len(nodes) != 3:
        raise ConfigError(f"architecture '{text}' must have three nodes joined by '+', not {len(nodes)}")
    operations = []
    for node, part in enumerate(nodes, start=1):
        edges = re.fullmatch(r"\|(.+)\|", part)
        names = edges[1].split("|") if edges else []
        if len(names) != node:
            raise ConfigError(f"architecture '{text}': node {node}, '{part}', must be {node} edge(s) like |none~0|")
        for source, name in enumerate(names):
            operation, _, origin = name.partition("~")
            if operation not in OPERATIONS or origin != str(source):
                raise ConfigError(
                    f"architecture '{text}': edge {node}<-{source} is '{name}'; it must be one of "
                    f"{', '.join(OPERATIONS)} followed by ~{source}"
                )
            operations.append(OPERATIONS.index(operation))
    return np.asarray(operations, np.int32)


# --- cost ----------------------------------------------------------------------------------------------------------


def flops(operations: np.ndarray, resolution: int, num_classes: int, width: int = 16, cells: int = 5) -> np.ndarray:
    """Multiply-adds of one image, int64 [...] of int [..., 6]: convolutions and the classifier, exact.

    Edges without effect count, pooling, normalisation and ReLU don't; as the benchmark counts. Whole numbers, because
    the whole space has 28 values and rounding would break the ties.
    """
    channels, sides = [width << stage for stage in range(3)], [resolution >> stage for stage in range(3)]
    kernels = sum((c * side) ** 2 for c, side in zip(channels, sides, strict=True))
    total = cells * kernels * _kernel_areas(operations) + 27 * width * resolution**2
    for before, after, side in zip(channels[:2], channels[1:], sides[1:], strict=True):
        total = total + (9 * before * after + 9 * after**2 + before * after) * side**2
    return total + channels[-1] * num_classes + num_classes


def parameters(operations: np.ndarray, num_classes: int, width: int = 16, cells: int = 5) -> np.ndarray:
    """Trainable parameters, int64 [...] of int [..., 6], exact; 2 C for each normalisation."""
    channels = [width << stage for stage in range(3)]
    edges = np.isin(operations, (CONV_1X1, CONV_3X3)).sum(-1, dtype=np.int64)
    total = cells * (sum(c**2 for c in channels) * _kernel_areas(operations) + 2 * sum(channels) * edges)
    total = total + 27 * width + 2 * width + 2 * channels[-1]
    for before, after in itertools.pairwise(channels):
        total = total + 9 * before * after + 9 * after**2 + 4 * after + before * after
    return total + channels[-1] * num_classes + num_classes


def _kernel_areas(operations: np.ndarray) -> np.ndarray:
    """1 for a 1x1 and 9 for a 3x3 convolution, summed over the edges."""
    return np.asarray([0, 0, 1, 9, 0], np.int64)[np.asarray(operations)].sum(-1)


# --- the network ---------------------------------------------------------------------------------------------------


class ReluConvNorm(nn.Module):
    """ReLU, convolution without bias (``op_1``), batch normalisation (``op_2``)."""

    features: int
    kernel_size: int
    stride: int = 1
    kernel_init: str = "torch"
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        conv = Conv(
            self.features, self.kernel_size, stride=self.stride, padding=self.kernel_size // 2, use_bias=False,
            kernel_init=self.kernel_init, dtype=self.dtype, name="op_1",
        )  # fmt: skip
        return self.norm(dtype=self.dtype, name="op_2")(conv(tap("op.1", nn.relu(x))), train=train)


class Cell(nn.Module):
    """A cell, [B, H, W, C] -> the same: each node the sum of its edges; ``layers_<edge>`` where it convolves."""

    architecture: str
    kernel_init: str = "torch"
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        nodes = [x, jnp.zeros_like(x), jnp.zeros_like(x), jnp.zeros_like(x)]
        for edge, ((node, source), operation) in enumerate(zip(EDGES, from_string(self.architecture), strict=True)):
            y = nodes[source]
            if operation in (CONV_1X1, CONV_3X3):
                size = 1 if operation == CONV_1X1 else 3
                layer = ReluConvNorm(
                    x.shape[-1], size, 1, self.kernel_init, self.norm, self.dtype, name=f"layers_{edge}"
                )
                y = layer(y, train, scoped(tap, f"layers.{edge}"))
            elif operation == AVG_POOL:
                y = avg_pool(y, 3, 1, 1, count_include_pad=False)
            if operation != NONE:
                nodes[node] = nodes[node] + y
        return nodes[-1]


class ReductionBlock(nn.Module):
    """[B, H, W, C] -> [B, H / 2, W / 2, features]: two convolutions beside an averaged and projected shortcut."""

    features: int
    kernel_init: str = "torch"
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        settings = (self.kernel_init, self.norm, self.dtype)
        y = ReluConvNorm(self.features, 3, 2, *settings, name="conv_a")(x, train, scoped(tap, "conv_a"))
        y = ReluConvNorm(self.features, 3, 1, *settings, name="conv_b")(y, train, scoped(tap, "conv_b"))
        shortcut = Conv(
            self.features, 1, use_bias=False, kernel_init=self.kernel_init, dtype=self.dtype, name="downsample_1"
        )
        return y + shortcut(tap("downsample.1", avg_pool(x, 2)))


class NasBench201(nn.Module):
    """[B, H, W, C] float32 -> logits [B, num_classes] float32, for images of about 32x32 pixels.

    ``stem_0`` 3x3, ``stem_1``, then ``cells_0`` ...: three stages of cells with a reduction block between them, batch
    normalisation ``lastact_0``, ReLU, global average, ``classifier``. Names and taps are those of NATS-Bench's code.

    Attributes:
      architecture: the cell, as :func:`to_string` writes it.
      width: channels of the first stage; doubled by each reduction.
      cells: in each stage.
      kernel_init: of convolutions and the classifier, a name of ``layers.KERNEL_INITS``; PyTorch's default, as the
        benchmark trained.
      norm: makes the normalisation layers: ``norm(dtype=, name=)`` and call with ``train=``.

    Raises:
      ConfigError: a malformed architecture, or a size below 1.
    """

    num_classes: int
    architecture: str = BEST_ON_CIFAR10
    width: int = 16
    cells: int = 5
    kernel_init: str = "torch"
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        if self.width < 1 or self.cells < 1:
            raise ConfigError(f"width={self.width} and cells={self.cells} must be at least 1")
        settings = {"kernel_init": self.kernel_init, "norm": self.norm, "dtype": self.dtype}
        stem = Conv(
            self.width, 3, padding=1, use_bias=False, kernel_init=self.kernel_init, dtype=self.dtype, name="stem_0"
        )
        x = self.norm(dtype=self.dtype, name="stem_1")(stem(tap("stem.0", x)), train=train)
        for index in range(3 * self.cells + 2):
            stage, inside = divmod(index, self.cells + 1)
            if inside == self.cells:
                block = ReductionBlock(self.width << (stage + 1), **settings, name=f"cells_{index}")
            else:
                block = Cell(self.architecture, **settings, name=f"cells_{index}")
            x = block(x, train, scoped(tap, f"cells.{index}"))
        x = global_avg_pool(nn.relu(self.norm(dtype=self.dtype, name="lastact_0")(x, train=train)))
        classifier = Dense(self.num_classes, kernel_init=self.kernel_init, dtype=self.dtype, name="classifier")
        return classifier(tap("classifier", x)).astype(jnp.float32)
