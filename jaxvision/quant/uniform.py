"""The asymmetric uniform quantizer with unsigned codes, as pure functions.

For ``b`` bits and an interval ``[l, u]`` (IGQ-ViT section 3.1; RepQ-ViT's official code)::

    s = (u - l) / (2^b - 1)        z = round(-l / s)
    q = clip(round(x / s) + z, 0, 2^b - 1)        x_hat = s * (q - z)

``round`` is half to even. ``x / s`` is rounded before ``z`` is added, and it is a division (:func:`divide`):
``x * (1 / s)`` lands in another bucket for some values. ``bits`` is a Python int or a traced integer, so networks that
differ only in their bit-widths share one compiled program. Nothing here defines a gradient of its own: ``round`` has
gradient zero.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxvision.core.errors import ConfigError

SCALE_FLOOR = 1e-8
"""Constant channels have an empty interval; their scale is this instead of 0."""


def check_bits(bits: int, name: str = "bits") -> int:
    """``bits`` where it is a whole number from 1 to 16; otherwise raises ConfigError that names ``name``."""
    if isinstance(bits, bool) or int(bits) != bits or not 1 <= bits <= 16:
        raise ConfigError(f"{name}={bits!r} must be a whole number from 1 to 16")
    return int(bits)


def max_code(bits: ArrayLike) -> ArrayLike:
    """2^bits - 1, the largest code. Integer arithmetic: ``exp2`` of a traced float isn't exact on every backend."""
    return (1 << bits) - 1


def divide(x: jax.Array, y: ArrayLike) -> jax.Array:
    """x / y correctly rounded, ``y`` broadcast against ``x``.

    XLA rewrites the plain division by a broadcast or constant value, eager or compiled, into a multiplication with
    its reciprocal, which differs in the last bit for a third of all values. The selection hides the broadcast; a
    NaN in ``x`` gives NaN as it would anyway.
    """
    return x / jnp.where(jnp.isnan(x), jnp.nan, y)


@partial(jax.jit, static_argnames="clip_zero_point")
def affine_params(
    lower: ArrayLike, upper: ArrayLike, bits: ArrayLike, *, clip_zero_point: bool = False, eps: float = SCALE_FLOOR
) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point of an interval: s = max((u - l) / (2^b - 1), eps), z = round(-l / s).

    Args:
      lower, upper: float arrays of one shape, the ends of the interval(s).
      bits: int, or an integer array that broadcasts.
      clip_zero_point: clip z to [0, 2^b - 1] as the paper's formula does. An interval that misses 0 is then useless
        (everything far from 0 saturates), hence off by default, as in RepQ-ViT.
      eps: the smallest scale.

    Returns:
      scale and zero point, float of the interval's shape; the zero point is integral.
    """
    lower, upper = jnp.asarray(lower), jnp.asarray(upper)
    top = jnp.asarray(max_code(bits), lower.dtype)
    scale = jnp.maximum(divide(upper - lower, top), eps)
    zero = jnp.round(divide(-lower, scale))
    return scale, jnp.clip(zero, 0, top) if clip_zero_point else zero


def _float_codes(x: jax.Array, scale: ArrayLike, zero: ArrayLike, bits: ArrayLike) -> jax.Array:
    codes = jnp.round(divide(x, scale)) + zero
    return jnp.clip(codes, 0, jnp.asarray(max_code(bits), codes.dtype))


@jax.jit
def quantize(x: jax.Array, scale: ArrayLike, zero: ArrayLike, bits: ArrayLike) -> jax.Array:
    """The codes q = clip(round(x / s) + z, 0, 2^b - 1), int32 of the shape of ``x``.

    Args:
      x: float array of any shape.
      scale, zero: broadcast against ``x``: () per tensor, (C,) per channel of the last axis.
      bits: int or integer array that broadcasts.
    """
    return _float_codes(x, scale, zero, bits).astype(jnp.int32)


@jax.jit
def dequantize(codes: jax.Array, scale: ArrayLike, zero: ArrayLike) -> jax.Array:
    """x_hat = s * (q - z), of the scale's float type and the shape of ``codes`` (any integer or float type)."""
    scale = jnp.asarray(scale)
    return scale * (codes.astype(scale.dtype) - zero)


@jax.jit
def fake_quant(x: jax.Array, scale: ArrayLike, zero: ArrayLike, bits: ArrayLike) -> jax.Array:
    """``dequantize(quantize(x))`` without leaving floating point; shape and type of ``x``.

    The arithmetic runs in the wider type of ``x`` and ``scale``: float32 for bfloat16 activations.
    """
    return dequantize(_float_codes(x, scale, zero, bits), scale, zero).astype(x.dtype)


@jax.jit
def fake_quant_interval(x: jax.Array, lower: ArrayLike, upper: ArrayLike, bits: ArrayLike) -> jax.Array:
    """:func:`fake_quant` with the parameters of the interval ``[lower, upper]``, which broadcasts against ``x``."""
    scale, zero = affine_params(lower, upper, bits)
    return fake_quant(x, scale, zero, bits)
