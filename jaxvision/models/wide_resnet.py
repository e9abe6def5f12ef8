"""The wide ResNets of the calibration literature: WRN-26-10 for CIFAR and Tiny-ImageNet.

Official code of FLSD, which MbLS, CALS and RankMixup took over. It is not the network of Zagoruyko and Komodakis 2016
(arXiv:1605.07146), whose blocks normalise first (and who count depth as 6n + 4): here the blocks are those of He et al.
2015, normalisation and ReLU behind the convolutions.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.core.types import Tap, no_tap, scoped
from jaxvision.models.heads import pooled_vector, scaled_logits
from jaxvision.models.layers import BatchNorm, Conv, Dense
from jaxvision.models.resnet import Block

PRESETS: dict[str, dict[str, Any]] = {"wrn26_10": {"depth": 26, "width": 10}}

STEMS = {"cifar": 1, "tiny_imagenet": 2}  # the head reads the means of so many rows and columns of cells
_INIT = "kaiming_out"


class WideResNet(nn.Module):
    """[B, H, W, C] float32 -> logits [B, num_classes] float32.

    conv1 3x3 to 16 channels, then three stages of ``(depth - 2) / 6`` basic blocks (:class:`resnet.Block`) of 16, 32
    and 64 channels times ``width``, stride 2 at the start of the second and third, means, ``fc``. Convolutions start
    Kaiming normal over the fan-out. Taps see the input of every convolution and of ``fc`` under its PyTorch name
    (``layer1.0.conv1``).

    Attributes:
      num_classes: 0 returns the pooled features [B, D] float32 instead.
      depth: 6n + 2, n blocks a stage.
      width: the widening factor.
      stem: as in ``ResNet``; the two differ in the head alone: "cifar" (the mean of all pixels) or "tiny_imagenet"
        (2x2 means, flattened channel first).
      temp: divides the logits.
      norm: makes the normalisation layers: ``norm(dtype=, scale_init=, name=)`` and call with ``train=``.

    Raises:
      ConfigError: a depth that is not 6n + 2, a width below 1, an unknown stem, a ``temp`` that is not positive.
    """

    num_classes: int
    depth: int = 26
    width: int = 10
    stem: str = "cifar"
    temp: float = 1.0
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        self._check()
        conv = Conv(16, 3, padding=1, use_bias=False, kernel_init=_INIT, dtype=self.dtype, name="conv1")
        x = nn.relu(self.norm(dtype=self.dtype, name="bn1")(conv(tap("conv1", x)), train=train))
        for stage in range(3):
            for index in range((self.depth - 2) // 6):
                block = Block(
                    "basic", 16 * self.width * 2**stage, stride=2 if stage and not index else 1, conv_init=_INIT,
                    norm=self.norm, dtype=self.dtype, name=f"layer{stage + 1}_{index}",
                )  # fmt: skip
                x = block(x, train, scoped(tap, f"layer{stage + 1}.{index}"))
        x = pooled_vector(x, STEMS[self.stem])
        if not self.num_classes:
            return x.astype(jnp.float32)
        return scaled_logits(Dense(self.num_classes, dtype=self.dtype, name="fc")(tap("fc", x)), self.temp)

    def _check(self) -> None:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ConfigError(f"depth={self.depth} is not 6n + 2 (8, 14, 20, 26, 32, ...)")
        if self.width < 1:
            raise ConfigError(f"width={self.width} must be at least 1")
        if self.stem not in STEMS:
            raise unknown("stem", self.stem, STEMS)
