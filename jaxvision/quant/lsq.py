"""Learned step size quantization (Esser et al., ICLR 2020)."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxvision.core import struct
from jaxvision.core.errors import ConfigError
from jaxvision.quant import uniform
from jaxvision.quant.ste import clip, grad_scale, ste_round
from jaxvision.quant.trainable import Trainable, half, largest, magnitude, widened


@struct.dataclass
class LSQ(Trainable):
    """``k = round(clip(v / |s|, -Qn, Qp))``, ``v_hat = |s| k``.

    Signed: ``Qn = 2^(b-1)``, ``Qp = 2^(b-1) - 1``, and Qn = Qp = 1 for one bit (codes -1, 0, 1); unsigned: ``Qn = 0``,
    ``Qp = 2^b - 1``. ``dv = g I``, ``ds = gs sum(g (k - I v / s))`` with ``gs = 1 / sqrt(N Qp)``, N elements to a
    scale. A negative s counts as -s.

    Attributes:
      scale: s, float32 (), or (out,) per channel of the last axis.
      bits: width, 1 to 8.
      signed: see above.
      per_channel: one scale for each index of the last axis.
      scale_gradient: multiply the gradient of s by gs.
    """

    scale: jax.Array
    bits: ArrayLike
    signed: bool = struct.field(pytree_node=False, default=True)
    per_channel: bool = struct.field(pytree_node=False, default=False)
    scale_gradient: bool = struct.field(pytree_node=False, default=True)

    LEARNED: ClassVar[tuple[str, ...]] = ("scale",)

    @classmethod
    def fit(cls, x: jax.Array, bits: ArrayLike, **settings: bool) -> "LSQ":
        """The quantizer with s = 2 mean|x| / sqrt(Qp)."""
        x = widened(x)
        quantizer = cls(jnp.ones((), x.dtype), bits, **settings).check_width()
        axes = tuple(range(x.ndim - quantizer.per_channel))
        return quantizer.replace(scale=2 * jnp.mean(jnp.abs(x), axes) / jnp.sqrt(quantizer.code_range(x.dtype)[1]))

    def code_range(self, dtype: jnp.dtype = jnp.float32) -> tuple[jax.Array, jax.Array]:
        """-Qn and Qp, float ()."""
        if not self.signed:
            return jnp.zeros((), dtype), largest(self.bits, dtype)
        levels = half(self.bits, dtype)
        return -levels, jnp.maximum(levels - 1, 1)

    def _scale(self, x: jax.Array) -> jax.Array:
        """|s| as the forward pass takes it: with the gradient scaled by gs."""
        if self.per_channel and np.shape(self.scale) != x.shape[-1:]:
            raise ConfigError(f"LSQ.scale of shape {np.shape(self.scale)} doesn't fit the channels of {x.shape}")
        scale = magnitude(self.scale)
        if not self.scale_gradient:
            return scale
        elements = math.prod(x.shape) // max(1, scale.size)
        return grad_scale(scale, jax.lax.rsqrt(elements * self.code_range(scale.dtype)[1]))

    def float_codes(self, x: jax.Array) -> jax.Array:
        """See :class:`Trainable`."""
        return ste_round(clip(uniform.divide(x, self._scale(x)), *self.code_range(x.dtype)))

    def step(self, x: jax.Array | None = None) -> jax.Array:
        """|s|; with ``x`` the one whose gradient is scaled."""
        return magnitude(self.scale) if x is None else self._scale(widened(x))
