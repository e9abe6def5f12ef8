"""Quantizers for softmax and GELU outputs: log2, log-sqrt2, and the two twin uniform quantizers.

Each function of arrays has a class that a network site calls: ``quantizer(x, batch_size) -> x_hat``. The classes are
pytrees whose bit count is an array, so that changing the bits compiles nothing anew. ``x_hat`` has no useful gradient.
"""

import jax
import jax.numpy as jnp

from jaxvision.core import struct
from jaxvision.quant.uniform import divide


def _power(exponent: jax.Array | int) -> jax.Array:
    """Exact ``2^exponent`` in float32 (``exp2`` is not exact on every backend)."""
    return jnp.ldexp(jnp.float32(1), jnp.asarray(exponent, jnp.int32))


def _negative_log2(x: jax.Array) -> jax.Array:
    """``-log2(x)``, +inf for x <= 0 without ever evaluating ``log2(0)``."""
    return jnp.where(x > 0, -jnp.log2(jnp.where(x > 0, x, 1)), jnp.inf)


def log2_quantize(x: jax.Array, bits: int | jax.Array) -> jax.Array:
    """FQ-ViT's log2 quantizer of attention.

    ``q = round(-log2 x)``; ``x_hat = 2^-clip(q, 0, 2^b - 1)``, and 0 where the unclipped ``q >= 2^b`` (or x = 0).
    With that zero there are 2^b + 1 output values, one more than b bits can name: the official simulation does so.

    Args:
      x: any shape, float in [0, 1].
      bits: int or int32 scalar.

    Returns:
      ``x_hat`` like x. Source: FQ-ViT official code, ``models/ptq/quantizer/log2.py``.
    """
    code = jnp.round(_negative_log2(x))
    levels = _power(bits)
    kept = jnp.clip(code, 0, levels - 1)
    return jnp.where(code >= levels, 0, _power(-kept)).astype(x.dtype)


def log_sqrt2_quantize(x: jax.Array, delta: jax.Array, bits: int | jax.Array) -> jax.Array:
    """RepQ-ViT's log-sqrt2 quantizer of attention.

    ``q = round(-2 log2(x / d))``, clipped to ``0..2^b - 1``;
    ``x_hat = d * 2^-ceil(q / 2) * (1 + (q odd) * (sqrt 2 - 1))``, and 0 where the unclipped ``q >= 2^b`` (or x = 0):
    2^b + 1 output values, as in the official simulation.

    Args:
      x: any shape, float >= 0.
      delta: () float, the value of code 0.
      bits: int or int32 scalar.

    Returns:
      ``x_hat`` like x. Source: RepQ-ViT official code, ``quant/quantizer.py``.
    """
    code = jnp.round(2 * _negative_log2(divide(x, delta)))
    levels = _power(bits)
    kept = jnp.clip(code, 0, levels - 1)
    odd = 1 + (kept % 2) * (2**0.5 - 1)
    return jnp.where(code >= levels, 0, _power(-jnp.ceil(kept / 2)) * odd * delta).astype(x.dtype)


def twin_softmax_quantize(
    x: jax.Array, split: jax.Array, bits: int | jax.Array, official_sum: bool = False
) -> jax.Array:
    """PTQ4ViT's twin uniform quantizer of attention: one range [0, split], one [0, 1], ``m = 2^(b-1) - 1`` steps each.

    ``low = round(clip(x, 0, split) * m / split) * split / m``, ``high = round(clip(x, split, 1) * m) / m``;
    ``x_hat = high where x > split, else low``. The official simulation returns ``low + high``, so that every value
    above the split comes out ``split`` too large: ``official_sum=True`` gives that.

    Args:
      x: any shape, float in [0, 1].
      split: () float.
      bits: int or int32 scalar, at least 2.
      official_sum: literal official code instead of the method.

    Returns:
      ``x_hat`` like x. Source: PTQ4ViT section 3.1 and official code, ``SoSPTQSLQuantMatMul``.
    """
    steps = _power(jnp.asarray(bits, jnp.int32) - 1) - 1
    step = split / steps
    high = divide(jnp.round(jnp.clip(x, split, 1) * steps), steps)
    low = jnp.clip(jnp.round(divide(jnp.clip(x, 0, split), step)), 0, steps) * step
    return (high + low if official_sum else jnp.where(x > split, high, low)).astype(x.dtype)


def twin_gelu_quantize(x: jax.Array, positive: jax.Array, negative: jax.Array, bits: int | jax.Array) -> jax.Array:
    """PTQ4ViT's twin uniform quantizer of GELU outputs: scale ``positive`` above 0 and ``negative`` below.

    ``x_hat = p * clip(round(x / p), 0, 2^(b-1) - 1) + n * clip(round(x / n), -2^(b-1), 0)``; one term is always 0.

    Args:
      x: any shape, float.
      positive, negative: () float scales.
      bits: int or int32 scalar.

    Returns:
      ``x_hat`` like x. Source: PTQ4ViT section 3.1 and official code, ``PostGeluPTQSLQuantLinear``.
    """
    half = _power(jnp.asarray(bits, jnp.int32) - 1)
    above = jnp.clip(jnp.round(divide(x, positive)), 0, half - 1) * positive
    below = jnp.clip(jnp.round(divide(x, negative)), -half, 0) * negative
    return (above + below).astype(x.dtype)


@struct.dataclass
class Log2Quantizer:
    """:func:`log2_quantize` with ``bits`` () int32."""

    bits: jax.Array

    def __call__(self, x: jax.Array, batch_size: int) -> jax.Array:
        """Quantizes ``x``; the batch size plays no part."""
        del batch_size
        return log2_quantize(x, self.bits)


@struct.dataclass
class LogSqrt2Quantizer:
    """:func:`log_sqrt2_quantize` with ``delta`` () float32 and ``bits`` () int32."""

    delta: jax.Array
    bits: jax.Array

    def __call__(self, x: jax.Array, batch_size: int) -> jax.Array:
        """Quantizes ``x``; the batch size plays no part."""
        del batch_size
        return log_sqrt2_quantize(x, self.delta, self.bits)


@struct.dataclass
class TwinSoftmaxQuantizer:
    """:func:`twin_softmax_quantize` with ``split`` () float32 and ``bits`` () int32."""

    split: jax.Array
    bits: jax.Array
    official_sum: bool = struct.field(pytree_node=False, default=False)

    def __call__(self, x: jax.Array, batch_size: int) -> jax.Array:
        """Quantizes ``x``; the batch size plays no part."""
        del batch_size
        return twin_softmax_quantize(x, self.split, self.bits, self.official_sum)


@struct.dataclass
class TwinGeluQuantizer:
    """:func:`twin_gelu_quantize` with ``positive``, ``negative`` () float32 and ``bits`` () int32."""

    positive: jax.Array
    negative: jax.Array
    bits: jax.Array

    def __call__(self, x: jax.Array, batch_size: int) -> jax.Array:
        """Quantizes ``x``; the batch size plays no part."""
        del batch_size
        return twin_gelu_quantize(x, self.positive, self.negative, self.bits)
