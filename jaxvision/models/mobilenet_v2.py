"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) as torchvision builds it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core.errors import ConfigError
from jaxvision.core.types import Tap, no_tap, scoped
from jaxvision.models.layers import BatchNorm, Conv, Dense, Dropout, global_avg_pool

PRESETS: dict[str, dict[str, Any]] = {"mobilenet_v2": {}}

# Expansion, channels, blocks, stride of the first block; the paper's table 2.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def relu6(x: jax.Array) -> jax.Array:
    """``min(max(x, 0), 6)``, gradient 0 at both ends as PyTorch's (``jax.nn.relu6`` has a half there)."""
    return jnp.where(x >= 6, jnp.asarray(6, x.dtype), nn.relu(x))


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``channels``, at least ``divisor`` and not below 90 % of ``channels``.

    Source: torchvision's ``_make_divisible``, from the authors' TensorFlow code.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class InvertedResidual(nn.Module):
    """Expand (1x1, ReLU6), filter each channel (3x3, stride, ReLU6), project (1x1, linear): the input is added where
    stride and channels allow.

    Convolutions and normalisations: ``conv_0_0``, ``conv_0_1`` (expansion, absent at ``expansion=1``), ``conv_1_0``,
    ``conv_1_1`` (depthwise), ``conv_2``, ``conv_3`` (projection); without an expansion the numbers are one less.
    """

    features: int
    stride: int = 1
    expansion: int = 6
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        layer = _layers(self.norm, self.dtype, train, tap)
        channels, first, y = x.shape[-1], 0, x
        hidden = channels * self.expansion
        if self.expansion != 1:
            y, first = relu6(layer(y, "conv.0.0", hidden, 1)), 1
        y = relu6(layer(y, f"conv.{first}.0", hidden, 3, stride=self.stride, groups=hidden))
        y = layer(y, f"conv.{first + 1}", self.features, 1)
        return x + y if self.stride == 1 and channels == self.features else y


def _layers(norm: Callable[..., nn.Module], dtype: Any, train: bool, tap: Tap) -> Callable[..., jax.Array]:
    """Makes a convolution by torchvision's name and the normalisation numbered behind it, in the calling module."""

    def layer(x: jax.Array, name: str, features: int, size: int, *, stride: int = 1, groups: int = 1) -> jax.Array:
        conv = Conv(
            features, size, stride=stride, padding=size // 2, groups=groups, use_bias=False,
            kernel_init="kaiming_out", dtype=dtype, name=name.replace(".", "_"),
        )  # fmt: skip
        scope, _, number = name.replace(".", "_").rpartition("_")
        return norm(dtype=dtype, name=f"{scope}_{int(number) + 1}")(conv(tap(name, x)), train=train)

    return layer


class MobileNetV2(nn.Module):
    """[B, H, W, C] float32 -> logits [B, num_classes] float32.

    features_0 (3x3 stride 2), the stages' blocks features_1 ..., a 1x1 convolution, global average, dropout,
    ``classifier_1``. Taps see the input of every convolution and of the classifier under its torchvision name
    (``features.2.conv.1.0``).

    Attributes:
      num_classes: 0 returns the pooled features [B, D] float32 instead.
      width_multiplier: of all channels; the last convolution has no fewer than 1280.
      stages: of (expansion, channels, blocks, stride of the first block), torchvision's ``inverted_residual_setting``.
      stem_stride: of the first convolution.
      divisor: channels are rounded to its multiples (:func:`make_divisible`).
      dropout: rate before the classifier.
      norm: makes the normalisation layers: ``norm(dtype=, name=)`` and call with ``train=``.

    Raises:
      ConfigError: a width that is not positive, or a stage that isn't four numbers of at least 1.
    """

    num_classes: int
    width_multiplier: float = 1.0
    stages: tuple[tuple[int, int, int, int], ...] = STAGES
    stem_stride: int = 2
    divisor: int = 8
    dropout: float = 0.2
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        self._check()
        layer = _layers(self.norm, self.dtype, train, tap)
        width = make_divisible(32 * self.width_multiplier, self.divisor)
        x = relu6(layer(x, "features.0.0", width, 3, stride=self.stem_stride))
        index = 0
        for expansion, channels, blocks, first_stride in self.stages:
            features = make_divisible(channels * self.width_multiplier, self.divisor)
            for block in range(blocks):
                index += 1
                stride = first_stride if block == 0 else 1
                name = f"features_{index}"
                module = InvertedResidual(features, stride, expansion, self.norm, self.dtype, name=name)
                x = module(x, train, scoped(tap, f"features.{index}"))
        width = make_divisible(1280 * max(1.0, self.width_multiplier), self.divisor)
        x = global_avg_pool(relu6(layer(x, f"features.{index + 1}.0", width, 1)))
        if self.num_classes:
            x = Dropout(self.dropout, name="classifier_0")(x, train)
            classifier = Dense(
                self.num_classes, kernel_init=nn.initializers.normal(0.01), bias_init=nn.initializers.zeros,
                dtype=self.dtype, name="classifier_1",
            )  # fmt: skip
            x = classifier(tap("classifier.1", x))
        return x.astype(jnp.float32)

    def _check(self) -> None:
        if not self.width_multiplier > 0:
            raise ConfigError(f"width_multiplier={self.width_multiplier} must be positive")
        for stage in self.stages:
            if len(stage) != 4 or min(stage) < 1:
                raise ConfigError(
                    f"stages: {stage} must be four numbers of at least 1: expansion, channels, blocks, stride"
                )
