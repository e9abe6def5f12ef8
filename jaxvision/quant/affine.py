"""Uniform affine quantization with a calibrated interval, for kernels and activations, trained straight through."""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxvision.core import struct
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.quant import observers, uniform, weights
from jaxvision.quant.ste import straight_through
from jaxvision.quant.trainable import Trainable, half, largest, widened

METHODS = ("minmax", "percentile", "mse")


@struct.dataclass
class Affine(Trainable):
    """``k = clip(round(x / s) + z, low, high)``, ``x_hat = s (k - z)``; ``dx = g`` where nothing was clipped.

    Asymmetric: codes 0..2^b - 1 and ``s = (u - l) / (2^b - 1)``, ``z = round(-l / s)``. Symmetric: codes
    -(2^(b-1) - 1)..2^(b-1) - 1, ``s = max(-l, u) / (2^(b-1) - 1)``, z = 0. The interval [l, u] is calibrated, not
    learned: scale and zero point are constants for the gradient.

    Attributes:
      scale, zero_point: float, broadcast against ``x``: () per tensor, (C,) per channel of the last axis.
      bits: width, 1 to 16; symmetric from 2.
      symmetric, per_channel: see above.
      method: how ``fit`` finds the interval: "minmax", "percentile", "mse" (the shrinkage 1 - 0.01 i, i < 90, of the
        min-max interval that has the least squared error).
      clip: a factor on the interval that "minmax" and "percentile" find.
      epsilon: percent cut off at each end by "percentile".
    """

    scale: jax.Array
    zero_point: jax.Array
    bits: ArrayLike
    symmetric: bool = struct.field(pytree_node=False, default=False)
    per_channel: bool = struct.field(pytree_node=False, default=False)
    method: str = struct.field(pytree_node=False, default="minmax")
    clip: float = struct.field(pytree_node=False, default=1.0)
    epsilon: float = struct.field(pytree_node=False, default=0.01)

    LEARNED: ClassVar[tuple[str, ...]] = ("scale", "zero_point")
    MAX_BITS: ClassVar[int] = 16

    @classmethod
    def fit(cls, x: jax.Array, bits: ArrayLike, **settings: Any) -> "Affine":
        """The quantizer of the interval that ``method`` finds in ``x`` [..., C]; traceable. Raises ConfigError."""
        quantizer = cls(jnp.ones(()), jnp.zeros(()), bits, **settings).check_width()
        if quantizer.method not in METHODS:
            raise unknown("method", quantizer.method, METHODS)
        if not quantizer.clip > 0 or not 0 <= quantizer.epsilon < 50:
            raise ConfigError(f"Affine: clip={quantizer.clip} must be positive, epsilon={quantizer.epsilon} below 50")
        wide = widened(x)
        flat = wide.reshape(-1, wide.shape[-1] if quantizer.per_channel else 1)
        lower, upper = _interval(flat, bits, quantizer)
        shape = wide.shape[-1:] if quantizer.per_channel else ()
        scale, zero = _params(lower.reshape(shape), upper.reshape(shape), bits, quantizer.symmetric)
        return quantizer.replace(scale=scale, zero_point=zero)

    def width_range(self) -> tuple[int, int]:
        """1 or, symmetric, 2 to 16."""
        return 1 + self.symmetric, self.MAX_BITS

    def __call__(self, x: jax.Array, batch_size: int | None = None) -> jax.Array:
        """x_hat of the shape and type of ``x``; every element by itself."""
        del batch_size
        self.check()
        hard, soft = _fake_quant(x, self.scale, self.zero_point, self.bits, self.symmetric)
        return straight_through(jax.lax.stop_gradient(hard), soft)

    def float_codes(self, x: jax.Array) -> jax.Array:
        """See :class:`Trainable`; without a gradient."""
        return _float_codes(x, self.scale, self.zero_point, self.bits, self.symmetric)[0]

    def step(self, x: jax.Array | None = None) -> jax.Array:
        """The scale."""
        return self.scale

    def zero(self) -> ArrayLike:
        """The zero point; 0 where symmetric."""
        return 0 if self.symmetric else self.zero_point


def _bounds(bits: ArrayLike, symmetric: bool, dtype: Any) -> tuple[ArrayLike, jax.Array]:
    if not symmetric:
        return 0, largest(bits, dtype)
    top = half(bits, dtype) - 1
    return -top, top


def _float_codes(
    x: jax.Array, scale: ArrayLike, zero: ArrayLike, bits: ArrayLike, symmetric: bool
) -> tuple[jax.Array, jax.Array]:
    """The codes, and where they weren't clipped."""
    free = jnp.round(uniform.divide(x, scale)) + zero
    codes = jnp.clip(free, *_bounds(bits, symmetric, free.dtype))
    return codes, codes == free


@partial(jax.jit, static_argnames="symmetric")
def _fake_quant(
    x: jax.Array, scale: ArrayLike, zero: ArrayLike, bits: ArrayLike, symmetric: bool
) -> tuple[jax.Array, jax.Array]:
    """x_hat, and x where it passes its gradient (0 elsewhere)."""
    codes, free = _float_codes(x, scale, zero, bits, symmetric)
    return uniform.dequantize(codes, scale, zero).astype(x.dtype), jnp.where(free, x, 0)


def _params(lower: jax.Array, upper: jax.Array, bits: ArrayLike, symmetric: bool) -> tuple[jax.Array, jax.Array]:
    if not symmetric:
        return uniform.affine_params(lower, upper, bits)
    top = jnp.maximum(half(bits, lower.dtype) - 1, 1)
    scale = jnp.maximum(uniform.divide(jnp.maximum(-lower, upper), top), uniform.SCALE_FLOOR)
    return scale, jnp.zeros_like(scale)


def _interval(flat: jax.Array, bits: ArrayLike, settings: Affine) -> tuple[jax.Array, jax.Array]:
    """The interval of each column of ``flat`` [n, channels], 2 x [channels]."""
    if settings.method == "percentile":
        cut = settings.epsilon / 100
        lower, upper = observers.quantile(flat, (cut, 1 - cut), axis=0)
    else:
        lower, upper = flat.min(0), flat.max(0)
    if settings.method != "mse":
        return settings.clip * lower, settings.clip * upper

    def error(factor: jax.Array) -> jax.Array:
        params = _params(factor * lower, factor * upper, bits, settings.symmetric)
        return jnp.sum(jnp.square(flat - _fake_quant(flat, *params, bits, settings.symmetric)[0]), axis=0)

    factors = jnp.asarray(1 - 0.01 * np.arange(weights.SHRINKS), flat.dtype)
    best = factors[jnp.argmin(jax.lax.map(error, factors), axis=0)]
    return best * lower, best * upper
