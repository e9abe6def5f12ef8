"""Quantizers of activation gradients, and the gate that puts one into a network's backward pass.

For ``b`` bits, the clipping factor ``gamma`` and the gradient G of one layer's output (LBT, ECCV 2024, official code)::

    gmax = max |G|     c = gamma gmax (1e-8 if 0)     L = 2^(b-1) - 1     s = c / L
    k = round(clip((G + c) / s + r, 0, 2L)) - L       r ~ U(-1/2, 1/2)    Gq = s k

The noise is added before the clip, so rounding is unbiased inside and an element beyond the edge always gives +-c.
``gamma = 1`` is min-max quantization, a constant below 1 the fixed interval; :mod:`jaxvision.quant.interval` moves it.
Nothing is stored for it: the statistics leave the backward pass as the cotangent of a small input of the layer.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxvision.core import devices, struct
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.quant.uniform import divide

KINDS = ("uniform", "piecewise", "per_channel", "dorefa")
OFF = 32
"""A number of bits that leaves the gradient as it is (any above 16 does)."""
SMALLEST_CLIP = 1e-8
NARROW_EXPONENT = 4
"""The narrow interval of "piecewise" is 2^-(exponent + 4) of the wide one."""


@struct.dataclass
class GradientCodes:
    """The integer form of a gradient, ``Gq = step * codes``.

    Attributes:
      codes: int8 of the gradient's shape (int32 above 8 bits, and for "dorefa", whose codes are odd up to 2^b - 1).
      step: float, broadcasts against ``codes``: () for "uniform", (C,) for "per_channel", (B, 1, ...) for "dorefa",
        the gradient's shape for "piecewise". 0 where the gradient is 0, not finite where it is not.
      n_clipped, n_total: float32 (), elements with |g| > gamma gmax, and all, as :func:`clip_counts` counts them.
    """

    codes: jax.Array
    step: jax.Array
    n_clipped: jax.Array
    n_total: jax.Array

    def dequantize(self) -> jax.Array:
        """Gq, of the step's type."""
        return self.step * self.codes.astype(self.step.dtype)


def clip_counts(g: jax.Array, gamma: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """How many |g| exceed ``gamma max|g|``, and how many elements there are, over all devices: 2 x float32 ().

    Both are 0 where the gradient is all zero or not finite: such a step tells nothing about the interval.
    """
    magnitude = jnp.abs(working(g))
    largest = devices.max_over_devices(jnp.max(magnitude))
    counts = jnp.sum(magnitude > gamma * largest), g.size
    clipped, total = (jnp.asarray(devices.sum_over_devices(jnp.asarray(c, jnp.float32))) for c in counts)
    usable = (largest > 0) & jnp.isfinite(largest)
    return jnp.where(usable, clipped, 0), jnp.where(usable, total, 0)


@dataclass(frozen=True)
class GradientOptions:
    """How a gradient is quantized; static.

    Attributes:
      kind: "uniform"; "piecewise": two (b - 1)-bit quantizers, wide and narrow, the stand-in of the authors' toolbox
        for IQB (needs 3 bits); "per_channel": gmax of each channel of the last axis (depthwise layers); "dorefa":
        gmax of each row of the batch.
      noise_bits: 32 or 8, as hardware would draw them (rounding is then unbiased to 1/256 of a step).
      exponent: of "piecewise": the narrow interval is gmax 2^-(exponent + 4).
    """

    kind: str = "uniform"
    noise_bits: int = 32
    exponent: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("gradient kind", self.kind, KINDS)
        if self.noise_bits not in (8, 32):
            raise ConfigError(f"noise_bits={self.noise_bits!r} must be 8 or 32")


def is_off(bits: ArrayLike) -> bool:
    """Whether ``bits`` leaves gradients as they are: a Python int above 16 (a traced value never does)."""
    return isinstance(bits, int) and bits > 16


def check_bits(bits: ArrayLike, kind: str = "uniform") -> None:
    """Raises ConfigError where a Python int is no width for gradients (traced values, 2 to 8, are trusted)."""
    lowest = {"piecewise": 3, "dorefa": 1}.get(kind, 2)
    if isinstance(bits, int) and (isinstance(bits, bool) or not lowest <= bits <= 16):
        raise ConfigError(f"gradient bits={bits!r} must be a whole number from {lowest} to 16 for {kind!r}")


def working(g: jax.Array) -> jax.Array:
    """``g`` in at least float32: bfloat16 has too few digits for unbiased rounding."""
    return g.astype(jnp.promote_types(g.dtype, jnp.float32))


def rounding_noise(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, noise_bits: int = 32) -> jax.Array:
    """Noise U(-1/2, 1/2) for a gradient [B, ...]: a function of key, row of the global batch and place in the row.

    So any device count draws the same. Values are centred: (r + 1/2) / n - 1/2 with n = 2^23, or 2^8 for
    ``noise_bits=8``. The generator is the hash pcg3d (Jarzynski and Olano, JCGT 2020), a dozen integer operations:
    Threefry, JAX's own, costs ten times the rounding, and two seconds of compilation in each layer.
    """
    words = jax.random.key_data(key).reshape(-1)
    rows = jnp.asarray(devices.row_offset(shape[0]) + jnp.arange(shape[0]), jnp.uint32)[:, None]
    places = jax.lax.iota(jnp.uint32, math.prod(shape[1:]))[None]
    hashed = _pcg3d(places + words[0], rows, words[-1]).reshape(shape)
    kept = 8 if noise_bits == 8 else 23  # the most that float32 centres exactly
    return ((hashed >> (32 - kept)).astype(dtype) + 0.5) * 2.0**-kept - 0.5


def _pcg3d(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """32 pseudo-random bits, uint32, for three numbers uint32 that broadcast."""
    x, y, z = (v * jnp.uint32(1664525) + jnp.uint32(1013904223) for v in (x, y, z))
    x = x + y * z
    y = y + z * x
    z = z + x * y
    x, y, z = (v ^ (v >> 16) for v in (x, y, z))
    x = x + y * z
    y = y + z * x
    return z + x * y


def _noises(noise: Any, x: jax.Array, count: int, noise_bits: int) -> list[Any]:
    """``count`` arrays of noise (0 for nearest rounding) from None, a typed key, an array or a tuple of arrays."""
    if noise is None:
        return [0.0] * count
    if isinstance(noise, tuple):
        return list(noise)
    if jnp.issubdtype(noise.dtype, jax.dtypes.prng_key):
        keys = [noise] if count == 1 else jax.random.split(noise, count)
        return [rounding_noise(key, x.shape, x.dtype, noise_bits) for key in keys]
    return [noise]


def _symmetric(x: jax.Array, clip: jax.Array, bits: ArrayLike, noise: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Float codes -L..L and the step of the interval +-clip, which broadcasts against ``x``."""
    top = jnp.asarray((1 << (bits - 1)) - 1, x.dtype)
    safe = jnp.where(clip == 0, SMALLEST_CLIP, clip)
    # Twice both, as in the official code: (G + c) / s must round the same way.
    step = divide(2 * safe, 2 * top)
    return jnp.round(jnp.clip(divide(x + safe, step) + noise, 0, 2 * top)) - top, step


def nearest(g: jax.Array, gamma: ArrayLike, largest: ArrayLike, bits: ArrayLike) -> jax.Array:
    """Gq with nearest rounding for a known ``largest`` = gmax; float32 or wider, shape of ``g``."""
    codes, step = _symmetric(working(g), gamma * largest, bits, 0.0)
    return codes * step


def quantize_gradient(
    g: jax.Array,
    gamma: ArrayLike,
    bits: ArrayLike,
    noise: Any = None,
    *,
    kind: str = "uniform",
    noise_bits: int = 32,
    exponent: int = 0,
) -> GradientCodes:
    """The codes of a gradient (formula above); ``gamma`` and everything else is a constant for autodiff.

    Args:
      g: float [B, ...], of one layer's output; its maximum is taken over all devices.
      gamma: float (), in (0, 1]; "piecewise" and "dorefa" ignore it for the interval.
      bits: int 2..16 (3..16 for "piecewise", 1..16 for "dorefa"), or a traced int32 (), 2..8.
      noise: None for nearest rounding; a typed key for stochastic rounding; or the noise itself, like ``g``
        ("piecewise": a pair, wide and narrow).
      kind, noise_bits, exponent: see :class:`GradientOptions`.

    Raises:
      ConfigError: ``bits`` or ``kind`` is none of the allowed ones.

    Source: LBT official code ``grad_quant.backward``; "piecewise", "per_channel": YonseiAutoML ``fxp/engines``.
    """
    GradientOptions(kind, noise_bits, exponent)
    check_bits(bits, kind)
    x = working(g)
    noises = _noises(noise, x, 2 if kind == "piecewise" else 1, noise_bits)
    axes = {"per_channel": tuple(range(x.ndim - 1)), "dorefa": tuple(range(1, x.ndim))}.get(kind)
    largest = jnp.max(jnp.abs(x), axes, keepdims=kind == "dorefa")
    if kind != "dorefa":  # whose rows are on one device each
        largest = devices.max_over_devices(largest)
    if kind == "piecewise":
        codes, step = _piecewise(x, largest, bits, noises, exponent)
    elif kind == "dorefa":
        codes, step = _dorefa(x, largest, bits, noises[0])
    else:
        codes, step = _symmetric(x, gamma * largest, bits, noises[0])
    step = jnp.where(largest == 0, jnp.zeros_like(step), step)  # exact zeros, whatever the noise was
    wide = kind == "dorefa" or (isinstance(bits, int) and bits > 8)
    integers = codes.astype(jnp.int32 if wide else jnp.int8)
    return GradientCodes(integers, step, *clip_counts(g, gamma))


def _piecewise(
    x: jax.Array, largest: jax.Array, bits: ArrayLike, noises: list[Any], exponent: int
) -> tuple[jax.Array, jax.Array]:
    edge = largest * 2.0 ** -(exponent + NARROW_EXPONENT)
    wide, wide_step = _symmetric(x, largest, bits - 1, noises[0])
    narrow, narrow_step = _symmetric(x, edge, bits - 1, noises[1])
    outside = jnp.abs(x) > edge
    return jnp.where(outside, wide, narrow), jnp.where(outside, wide_step, narrow_step)


def _dorefa(x: jax.Array, largest: jax.Array, bits: ArrayLike, noise: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """DoReFa-Net equation 12: ``2 m (quantize_b(x / 2m + 1/2 + noise / (2^b - 1)) - 1/2)``, m = max |x| of the row."""
    levels = jnp.asarray((1 << bits) - 1, x.dtype)
    safe = jnp.where(largest == 0, SMALLEST_CLIP, largest)
    unit = jnp.clip(divide(x, 2 * safe) + 0.5 + divide(jnp.asarray(noise, x.dtype), levels), 0, 1)
    return 2 * jnp.round(unit * levels) - levels, divide(safe, levels)


def gradient_gate(
    y: jax.Array,
    gstate: jax.Array,
    key: Any,
    bits: ArrayLike,
    *,
    kind: str = "uniform",
    noise_bits: int = 32,
    exponent: int = 0,
) -> jax.Array:
    """The identity on ``y`` whose backward pass quantizes the gradient: put it on the output of a layer's product.

    The cotangent of ``y`` is Gq, that of ``gstate`` is (0, n_clipped, n_total), over all devices; cotangents of a layer
    that is used twice add up. G itself is kept nowhere.

    Args:
      y: float [B, ...].
      gstate: float32 (3,), (gamma, 0, 0).
      key: None for nearest rounding, a typed key, or noise like ``y`` (see :func:`quantize_gradient`).
      bits: int 2..16 or a traced int32 () 2..8; a Python int above 16 switches the gate off.
      kind, noise_bits, exponent: see :class:`GradientOptions`.
    """
    if is_off(bits):
        return y
    check_bits(bits, kind)
    options = GradientOptions(kind, noise_bits, exponent)
    static, traced = (bits, None) if isinstance(bits, int) else (None, bits)
    return _gate(options, static, y, gstate, key, traced)


def backward(
    options: GradientOptions, bits: ArrayLike, g: jax.Array, gstate: jax.Array, noise: Any
) -> tuple[GradientCodes, jax.Array]:
    """What a layer's backward pass does with its gradient: the codes, and the cotangent of ``gstate``."""
    codes = quantize_gradient(
        g, gstate[0], bits, noise, kind=options.kind, noise_bits=options.noise_bits, exponent=options.exponent
    )
    counts = jnp.stack([jnp.zeros(()), codes.n_clipped, codes.n_total])
    return codes, counts.astype(gstate.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gate(options: Any, static_bits: int | None, y: jax.Array, gstate: jax.Array, noise: Any, bits: Any) -> jax.Array:
    del options, static_bits, gstate, noise, bits
    return y


def _gate_forward(options: Any, static_bits: int | None, y: jax.Array, gstate: jax.Array, noise: Any, bits: Any) -> Any:
    del options, static_bits
    return y, (gstate, noise, bits)


def _gate_backward(options: GradientOptions, static_bits: int | None, saved: Any, g: jax.Array) -> tuple[Any, ...]:
    gstate, noise, bits = saved
    codes, cotangent = backward(options, bits if static_bits is None else static_bits, g, gstate, noise)
    return codes.dequantize().astype(g.dtype), cotangent, None, None


_gate.defvjp(_gate_forward, _gate_backward)
