"""ReActNet on ResNet's plan (Liu et al., ECCV 2020, arXiv:2003.03488), the network whose quantized form is binary.

Each 3x3 convolution has its own shortcut, as in Bi-Real Net, and learned shifts around its nonlinearities:

    y = bn1(binary_conv(sign(x + move0))) + shortcut(x)        RSign: a learned threshold
    out = prelu(y + move1) + move2                             RPReLU: a learned shift of both axes

The sign isn't in this file: it is what quantizing the convolution's input to one bit does (the family "reactnet" of
``quant.families``), as it is everywhere else. Without a rule the network is float.

Source: official code (liuzechun/ReActNet, ``resnet/2_step2/birealnet.py``), names of parameters included. It is for
ImageNet; the stem for small images is ours.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.core.types import Tap, no_tap, scoped
from jaxvision.models.heads import pooled_vector, scaled_logits
from jaxvision.models.layers import BatchNorm, Conv, Dense, avg_pool, max_pool
from jaxvision.quant.binary import rprelu

PRESETS: dict[str, dict[str, Any]] = {
    "reactnet18": {"stage_sizes": (4, 4, 4, 4)},
    "reactnet34": {"stage_sizes": (6, 8, 12, 6)},
}
STEMS = ("imagenet", "cifar")


class Shift(nn.Module):
    """``x + bias``, a learned number for each channel, 0 at the start. Parameter ``bias`` float32 [C]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32).astype(x.dtype)


class PReLU(nn.Module):
    """``x if x > 0 else slope x``. Parameter ``slope`` float32 [C], 0.25 at the start."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        slope = self.param("slope", nn.initializers.constant(0.25), (x.shape[-1],), jnp.float32)
        return rprelu(x, 0, slope.astype(x.dtype), 0)


class Block(nn.Module):
    """One convolution with its shortcut: [B, H, W, C] -> [B, H / stride, W / stride, features].

    Where the shape changes the shortcut is a mean over 2x2 pixels, a 1x1 convolution (``downsample_1``) and BN
    (``downsample_2``). Taps see the inputs of the convolutions, that of ``binary_conv`` before its sign.
    """

    features: int
    stride: int = 1
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        def conv(x: jax.Array, name: str, size: int, stride: int) -> jax.Array:
            layer = Conv(
                self.features, size, stride=stride, padding=size // 2, use_bias=False, dtype=self.dtype,
                name=name.replace(".", "_"),
            )  # fmt: skip
            return layer(tap(name, x))

        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = conv(avg_pool(x, 2, self.stride), "downsample.1", 1, 1)
            shortcut = self.norm(dtype=self.dtype, name="downsample_2")(shortcut, train=train)
        y = conv(Shift(name="move0")(x), "binary_conv", 3, self.stride)
        y = self.norm(dtype=self.dtype, name="bn1")(y, train=train) + shortcut
        return Shift(name="move2")(PReLU(name="prelu")(Shift(name="move1")(y)))


class ReActNet(nn.Module):
    """[B, H, W, C] float32 -> logits [B, num_classes] float32.

    Attributes:
      stage_sizes: convolutions with shortcuts in the four stages, at width, 2, 4 and 8 times width.
      width: channels of the stem and of the first stage.
      stem: "imagenet" (7x7 stride 2, BN, max-pool) or "cifar" (3x3, BN); neither has a nonlinearity.
      temp: divides the logits.
      norm: makes the normalisation layers: ``norm(dtype=, name=)`` and call with ``train=``.

    Raises:
      ConfigError: an unknown stem, another number of stages than four, or a ``temp`` that is not positive.
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (4, 4, 4, 4)
    width: int = 64
    stem: str = "imagenet"
    temp: float = 1.0
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        if self.stem not in STEMS:
            raise unknown("stem", self.stem, STEMS)
        if len(self.stage_sizes) != 4:
            raise ConfigError(f"stage_sizes={self.stage_sizes!r} must have 4 entries")
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        stem = Conv(
            self.width, size, stride=stride, padding=size // 2, use_bias=False, dtype=self.dtype, name="conv1"
        )  # fmt: skip
        x = self.norm(dtype=self.dtype, name="bn1")(stem(tap("conv1", x)), train=train)
        if self.stem == "imagenet":
            x = max_pool(x, 3, 2, 1)
        for stage, blocks in enumerate(self.stage_sizes):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"layer{stage + 1}_{index}"
                block = Block(self.width * 2**stage, stride, self.norm, self.dtype, name=name)
                x = block(x, train, scoped(tap, f"layer{stage + 1}.{index}"))
        x = pooled_vector(x)
        return scaled_logits(Dense(self.num_classes, dtype=self.dtype, name="fc")(tap("fc", x)), self.temp)
