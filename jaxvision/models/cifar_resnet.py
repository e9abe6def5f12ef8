"""The CIFAR ResNets of He et al. 2015 (arXiv:1512.03385), section 4.2: depth 6n + 2, widths 16, 32, 64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.core.types import Tap, no_tap, scoped
from jaxvision.models.heads import scaled_logits
from jaxvision.models.layers import BatchNorm, Conv, Dense, global_avg_pool

SHORTCUTS = ("A", "B")

PRESETS: dict[str, dict[str, Any]] = {f"resnet{depth}": {"depth": depth} for depth in (20, 32, 44, 56, 110)}


def shortcut_a(x: jax.Array, features: int, stride: int) -> jax.Array:
    """Option A, without parameters: every ``stride``-th pixel, and zero channels in front and behind, half each.

    [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features]. He et al. pad behind only; this is the padding
    of the code whose weights are in use (github.com/akamaster/pytorch_resnet_cifar10): a quarter of the new channels
    on each side.
    """
    extra = features - x.shape[-1]
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))


class CifarBlock(nn.Module):
    """``relu(bn2(conv2(relu(bn1(conv1 x)))) + shortcut(x))``, 3x3 convolutions, the stride in the first."""

    features: int
    stride: int = 1
    shortcut: str = "A"
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        def conv(x, name, size, stride, module_name=None):
            layer = Conv(
                self.features, size, stride=stride, padding=size // 2, use_bias=False, kernel_init="kaiming_in",
                dtype=self.dtype, name=module_name or name,
            )  # fmt: skip
            return layer(tap(name, x))

        y = self.norm(dtype=self.dtype, name="bn1")(conv(x, "conv1", 3, self.stride), train=train)
        y = self.norm(dtype=self.dtype, name="bn2")(conv(nn.relu(y), "conv2", 3, 1), train=train)
        if self.stride != 1 or x.shape[-1] != self.features:
            if self.shortcut == "A":
                x = shortcut_a(x, self.features, self.stride)
            else:
                x = conv(x, "shortcut.0", 1, self.stride, "shortcut_0")
                x = self.norm(dtype=self.dtype, name="shortcut_1")(x, train=train)
        return nn.relu(y + x)


class CifarResNet(nn.Module):
    """[B, H, W, C] float32 -> logits [B, num_classes] float32, for images of about 32x32 pixels.

    conv1 3x3, then three stages of ``(depth - 2) / 6`` blocks at width 16, 32, 64 (times ``width_multiplier``), stride
    2 at the start of the second and third, global average, linear. Kernels and the linear matrix start Kaiming normal.
    Taps see the input of every convolution and of ``linear`` under its PyTorch name (``layer1.0.conv1``).

    Attributes:
      shortcut: "A" (parameter-free) or "B" (1x1 convolution and BN where the shape changes).
      final_norm: a batch normalisation ``bn2`` before ``linear``, as the networks of LBT and TRS have.
      temp: divides the logits.
      norm: makes the normalisation layers: ``norm(dtype=, name=)`` and call with ``train=``.

    Raises:
      ConfigError: a depth that is not 6n + 2, an unknown shortcut, a width below one channel, a ``temp`` that is not
        positive.
    """

    num_classes: int
    depth: int = 20
    width_multiplier: float = 1.0
    shortcut: str = "A"
    final_norm: bool = False
    temp: float = 1.0
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        width = self._check()
        x = Conv(width, 3, padding=1, use_bias=False, kernel_init="kaiming_in", dtype=self.dtype, name="conv1")(
            tap("conv1", x)
        )
        x = nn.relu(self.norm(dtype=self.dtype, name="bn1")(x, train=train))
        for stage in range(3):
            for index in range((self.depth - 2) // 6):
                stride = 2 if stage > 0 and index == 0 else 1
                block = CifarBlock(
                    width * 2**stage, stride, self.shortcut, self.norm, self.dtype, name=f"layer{stage + 1}_{index}"
                )
                x = block(x, train, scoped(tap, f"layer{stage + 1}.{index}"))
        x = global_avg_pool(x)
        if self.final_norm:
            x = self.norm(dtype=self.dtype, name="bn2")(x, train=train)
        x = Dense(self.num_classes, kernel_init="kaiming_in", dtype=self.dtype, name="linear")(tap("linear", x))
        return scaled_logits(x, self.temp)

    def _check(self) -> int:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ConfigError(f"depth={self.depth} is not 6n + 2 (8, 14, 20, 32, 44, 56, 110, ...)")
        if self.shortcut not in SHORTCUTS:
            raise unknown("shortcut", self.shortcut, SHORTCUTS)
        width = round(16 * self.width_multiplier)
        if width < 1:
            raise ConfigError(f"width_multiplier={self.width_multiplier} leaves no channel; it must be at least 1/16")
        return width
