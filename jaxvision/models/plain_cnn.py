"""A plain convolutional network for small images, as classifier or with an output for every pixel."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core.errors import ConfigError
from jaxvision.core.types import Tap, no_tap
from jaxvision.models.layers import BatchNorm, Conv, Dense, global_avg_pool

PRESETS: dict[str, dict[str, Any]] = {
    "plain_cnn": {},
    # The last layer sees 31 pixels across, at full resolution.
    "plain_cnn_dense": {"features": (16, 32, 32, 32), "strides": (1,) * 4, "dilations": (1, 2, 4, 8), "dense": True},
}


class PlainCNN(nn.Module):
    """3x3 convolution, BN, ReLU, several times; then the mean over all pixels and a matrix.

    [B, H, W, C] float32 -> logits [B, num_classes] float32, or with ``dense`` [B, H', W', num_classes], H' and W' those
    of the last convolution (H and W for strides of 1).

    Attributes:
      features, strides, dilations: of the convolutions, one number each.
      dense: classifies each pixel by the matrix instead of the mean over them.

    Raises:
      ConfigError: tuples of different lengths.
    """

    num_classes: int
    features: tuple[int, ...] = (16, 16, 32, 32)
    strides: tuple[int, ...] = (1, 2, 1, 2)
    dilations: tuple[int, ...] = (1, 1, 1, 1)
    dense: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        lengths = {len(self.features), len(self.strides), len(self.dilations)}
        if len(lengths) > 1:
            raise ConfigError(
                f"features={self.features}, strides={self.strides} and dilations={self.dilations} must have one number "
                "for each convolution"
            )
        layers = zip(self.features, self.strides, self.dilations)
        for index, (features, stride, dilation) in enumerate(layers, start=1):
            name = f"conv{index}"
            conv = Conv(
                features, 3, stride=stride, padding=dilation, dilation=dilation, use_bias=False, dtype=self.dtype,
                kernel_init="kaiming_in", name=name,
            )  # fmt: skip
            x = nn.relu(BatchNorm(dtype=self.dtype, name=f"bn{index}")(conv(tap(name, x)), train=train))
        if not self.dense:
            x = global_avg_pool(x)
        return Dense(self.num_classes, dtype=self.dtype, name="fc")(tap("fc", x)).astype(jnp.float32)
