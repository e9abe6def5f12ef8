"""DenseNet-121 (Huang et al. 2017, arXiv:1608.06993) for small images, as the calibration literature builds it.

Official code of FLSD, which MbLS, CALS and RankMixup took over: no pooling in the stem, and new features go in front of
the old ones (torchvision appends them), which weights depend on.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core.errors import ConfigError
from jaxvision.core.types import Tap, no_tap, scoped
from jaxvision.models.heads import scaled_logits
from jaxvision.models.layers import BatchNorm, Conv, Dense, avg_pool, global_avg_pool

PRESETS: dict[str, dict[str, Any]] = {"densenet121": {"stage_sizes": (6, 12, 24, 16), "growth_rate": 32}}


class DenseLayer(nn.Module):
    """``[conv2(relu(bn2(conv1(relu(bn1 x))))), x]``: 1x1 to ``4 growth_rate``, 3x3 to ``growth_rate`` channels.

    [B, H, W, C] -> [B, H, W, growth_rate + C], the new features first.
    """

    growth_rate: int
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        y = x
        for number, (features, size) in enumerate(((4 * self.growth_rate, 1), (self.growth_rate, 3)), 1):
            y = nn.relu(self.norm(dtype=self.dtype, name=f"bn{number}")(y, train=train))
            conv = Conv(features, size, padding=size // 2, use_bias=False, dtype=self.dtype, name=f"conv{number}")
            y = conv(tap(f"conv{number}", y))
        return jnp.concatenate([y, x], -1)


class Transition(nn.Module):
    """``mean_2x2(conv(relu(bn x)))``, conv 1x1: [B, H, W, C] -> [B, floor(H / 2), floor(W / 2), features]."""

    features: int
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        x = nn.relu(self.norm(dtype=self.dtype, name="bn")(x, train=train))
        conv = Conv(self.features, 1, use_bias=False, dtype=self.dtype, name="conv")
        return avg_pool(conv(tap("conv", x)), 2)


class DenseNet(nn.Module):
    """[B, H, W, C] float32 -> logits [B, num_classes] float32, for images of 32x32 or 64x64 pixels.

    conv1 3x3 to ``2 growth_rate`` channels; stages of dense layers with a transition between two; ``bn``, ReLU, mean
    of all pixels, ``linear``. Kernels start as PyTorch's default. Taps see the input of every convolution and of
    ``linear`` under its PyTorch name (``dense1.0.conv1``, ``trans1.conv``).

    Attributes:
      num_classes: 0 returns the pooled features [B, D] float32 instead.
      stage_sizes: dense layers of each stage; (6, 12, 32, 32) is DenseNet-169, (6, 12, 48, 32) DenseNet-201.
      growth_rate: channels that each layer adds.
      reduction: a transition keeps ``floor(reduction C)`` channels.
      temp: divides the logits.
      norm: makes the normalisation layers: ``norm(dtype=, name=)`` and call with ``train=``.

    Raises:
      ConfigError: an empty stage or none, a growth rate below 1, a reduction outside (0, 1], images that the
        transitions would halve away, a ``temp`` that is not positive.
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (6, 12, 24, 16)
    growth_rate: int = 32
    reduction: float = 0.5
    temp: float = 1.0
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        self._check(x.shape)
        conv = Conv(2 * self.growth_rate, 3, padding=1, use_bias=False, dtype=self.dtype, name="conv1")
        x = conv(tap("conv1", x))
        for stage, layers in enumerate(self.stage_sizes, 1):
            for index in range(layers):
                layer = DenseLayer(self.growth_rate, self.norm, self.dtype, name=f"dense{stage}_{index}")
                x = layer(x, train, scoped(tap, f"dense{stage}.{index}"))
            if stage < len(self.stage_sizes):
                features = int(self.reduction * x.shape[-1])
                transition = Transition(features, self.norm, self.dtype, name=f"trans{stage}")
                x = transition(x, train, scoped(tap, f"trans{stage}"))
        x = global_avg_pool(nn.relu(self.norm(dtype=self.dtype, name="bn")(x, train=train)))
        if not self.num_classes:
            return x.astype(jnp.float32)
        return scaled_logits(Dense(self.num_classes, dtype=self.dtype, name="linear")(tap("linear", x)), self.temp)

    def _check(self, shape: tuple[int, ...]) -> None:
        if not self.stage_sizes or min(self.stage_sizes) < 1:
            raise ConfigError(f"stage_sizes={self.stage_sizes!r} must be numbers of at least 1, one or more")
        if self.growth_rate < 1:
            raise ConfigError(f"growth_rate={self.growth_rate} must be at least 1")
        if not 0 < self.reduction <= 1 or int(2 * self.growth_rate * self.reduction) < 1:
            raise ConfigError(f"reduction={self.reduction} must be above 0 and at most 1, and leave a channel")
        smallest = 2 ** (len(self.stage_sizes) - 1)
        if min(shape[1:3]) < smallest:
            raise ConfigError(
                f"images of {shape[1]}x{shape[2]} pixels are too small for {len(self.stage_sizes)} stages, which need "
                f"at least {smallest}x{smallest}"
            )
