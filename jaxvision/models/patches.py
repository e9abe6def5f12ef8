"""Patches of an image as tokens."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core.errors import ConfigError
from jaxvision.core.types import Tap, no_tap
from jaxvision.models.layers import Pair, pair, uniform_fan_in
from jaxvision.models.mlp import layer_norm, matrix_init


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, as one matrix product: [B, H, W, C] -> [B, H/p, W/p, D].

    Parameters: ``kernel`` float32 [p, p, C, D], ``bias`` float32 [D]; with ``norm_eps`` a LayerNorm ``norm`` follows.
    Taps: ``proj`` (the image), ``norm`` (input of the LayerNorm).

    Raises:
      ConfigError: the image is no whole number of patches, or has another number of channels than the weights.
    """

    width: int
    patch_size: Pair
    norm_eps: float | None = None
    weight_init: str = "timm"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, tap: Tap = no_tap) -> jax.Array:
        _, height, width, channels = images.shape
        rows, columns = pair(self.patch_size)
        if height % rows or width % columns:
            raise ConfigError(f"an image of {height}x{width} pixels is no whole number of {rows}x{columns} patches")
        kernel, bias = self._parameters((rows, columns, channels, self.width))
        x = self.product(tap("proj", images), kernel) + bias.astype(self.dtype)
        return x if self.norm_eps is None else layer_norm(self.norm_eps, self.dtype, "norm")(tap("norm", x))

    def product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The convolution without its bias; a method so that ``models.quantized`` can intercept it."""
        batch, height, width, channels = x.shape
        rows, columns = self.stride
        # XLA's CPU backend runs it faster as a matrix product.
        x = x.astype(self.dtype).reshape(batch, height // rows, rows, width // columns, columns * channels)
        x = x.swapaxes(2, 3).reshape(batch, height // rows, width // columns, rows * columns * channels)
        return x @ kernel.astype(self.dtype).reshape(-1, self.width)

    @property
    def stride(self) -> tuple[int, int]:
        """With ``padding``, ``dilation`` and ``groups``: the product as a convolution, read as a ``Conv``'s."""
        return pair(self.patch_size)

    padding, dilation, groups = 0, 1, 1

    def _parameters(self, shape: tuple[int, int, int, int]) -> tuple[jax.Array, jax.Array]:
        rows, columns, channels, _ = shape
        if self.has_variable("params", "kernel"):
            expected = self.get_variable("params", "kernel").shape[2]
            if expected != channels:
                raise ConfigError(f"the images have {channels} channels but the weights are for {expected}")
        # timm re-initialises the linear layers only and leaves the convolution as PyTorch made it.
        kernel_init, bias_init = matrix_init(self.weight_init), nn.initializers.zeros
        if self.weight_init == "timm":
            kernel_init, bias_init = uniform_fan_in, partial(_uniform, bound=(rows * columns * channels) ** -0.5)
        kernel = self.param("kernel", kernel_init, shape, jnp.float32)
        return kernel, self.param("bias", bias_init, shape[-1:], jnp.float32)


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, *, bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)
