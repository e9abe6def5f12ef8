"""Static quantization ranges observed batch by batch: min-max, EMA, percentile, OMSE, power-of-two factors.

An observer is a fold: ``state = init()``, ``state = update(state, x)`` for every batch, ``params(state, x_last, bits)``
gives scale and zero point. These are the observers of FQ-ViT (official code, ``models/ptq/observer``), with their
conventions: unsigned codes ``0..2^b-1``, zero point clipped to the codes, scale at least the float32 epsilon, and
``round(x / s + z)`` in one rounding (``x_hat`` equals the two-step rounding of ``quant.uniform`` but at ties).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import struct
from jaxvision.core.errors import ConfigError
from jaxvision.quant import uniform

EPSILON = float(np.finfo(np.float32).eps)
EMA_RATE = 0.01
PERCENTILE = 0.99999
OMSE_SHRINKS = 90


@struct.dataclass
class RangeState:
    """What was seen: ``lower``, ``upper`` (float32, () per tensor or [C] per channel), and ``batches`` () int32."""

    lower: jax.Array
    upper: jax.Array
    batches: jax.Array


def init(channels: int | None = None) -> RangeState:
    """The state before the first batch, per tensor or (with ``channels``) for each index of the last axis."""
    shape = () if channels is None else (channels,)
    return RangeState(jnp.full(shape, jnp.inf), jnp.full(shape, -jnp.inf), jnp.zeros((), jnp.int32))


def quantile(x: jax.Array | np.ndarray, levels: Sequence[float], axis: int | None = None) -> jax.Array | np.ndarray:
    """Quantiles with linear interpolation, exactly as ``torch.quantile`` computes them.

    The rank ``q * (n - 1)`` is rounded to the type of x as PyTorch does. A NumPy array is handled on the host by
    partial sorting (several times faster than a full sort) and gives a NumPy array; a JAX array is sorted, traceable.

    Args:
      x: any shape, float.
      levels: Q numbers in [0, 1].
      axis: the axis to reduce; None for all elements.

    Returns:
      [Q, ...] with ``axis`` removed.
    """
    host = isinstance(x, np.ndarray)
    x = x.reshape(-1) if axis is None else (np if host else jnp).moveaxis(x, axis, 0)
    ranks = np.asarray(levels, x.dtype) * np.asarray(x.shape[0] - 1, x.dtype)
    below = np.floor(ranks).astype(np.int64)
    above = np.minimum(below + 1, x.shape[0] - 1)
    ordered = np.partition(x, sorted({*below.tolist(), *above.tolist()}), axis=0) if host else jnp.sort(x, axis=0)
    weight = (ranks - below).astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1))
    low, high = ordered[below], ordered[above]
    gap = high - low
    # PyTorch's lerp keeps both ends exact by starting from the nearer one.
    return (np if host else jnp).where(weight < 0.5, low + weight * gap, high - gap * (1 - weight))


def _reduced_axes(state: RangeState, x: jax.Array) -> tuple[int, ...]:
    if state.lower.ndim == 1 and state.lower.shape[0] != x.shape[-1]:
        raise ConfigError(f"the observer was made for {state.lower.shape[0]} channels and got {x.shape[-1]}")
    return tuple(range(x.ndim - state.lower.ndim))


@jax.jit
def minmax_update(state: RangeState, x: jax.Array) -> RangeState:
    """Running minimum and maximum. ``x``: [..., C]."""
    axes = _reduced_axes(state, x)
    lower, upper = jnp.minimum(state.lower, x.min(axes)), jnp.maximum(state.upper, x.max(axes))
    return RangeState(lower, upper, state.batches + 1)


def _averaged(state: RangeState, lower: jax.Array, upper: jax.Array) -> RangeState:
    first = state.batches == 0
    moved = [
        jnp.where(first, new, old + EMA_RATE * (new - old)) for old, new in ((state.lower, lower), (state.upper, upper))
    ]
    return RangeState(*moved, state.batches + 1)


@jax.jit
def ema_update(state: RangeState, x: jax.Array) -> RangeState:
    """The first batch sets the range, every later one moves it by 1 % of the difference. ``x``: [..., C]."""
    axes = _reduced_axes(state, x)
    return _averaged(state, x.min(axes), x.max(axes))


def percentile_update(state: RangeState, x: jax.Array | np.ndarray) -> RangeState:
    """The 0.99999 and 1 - 0.99999 quantiles of each batch, averaged as in :func:`ema_update`; per tensor only."""
    if state.lower.ndim:
        raise ConfigError("the percentile observer works per tensor only, as in FQ-ViT: call init() without channels")
    upper, lower = quantile(x, (PERCENTILE, 1.0 - PERCENTILE))
    return _averaged(state, lower, upper)


def affine_clipped(lower: jax.Array, upper: jax.Array, bits: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """FQ-ViT's ``s = max((u - l) / (2^b - 1), eps)``, ``z = clip(-round(l / s), 0, 2^b - 1)``."""
    top = jnp.asarray(uniform.max_code(bits), lower.dtype)
    scale = jnp.maximum(uniform.divide(upper - lower, top), EPSILON)
    return scale, jnp.clip(-jnp.round(uniform.divide(lower, scale)), 0, top)


def affine_symmetric(lower: jax.Array, upper: jax.Array, bits: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """FQ-ViT's signed form (weights): ``s = max(|l|, u) / ((2^b - 1) / 2)``, codes ``-2^(b-1)..2^(b-1)-1``.

    Returned in the unsigned form of this package: the zero point is ``2^(b-1)`` for signed code 0.
    """
    top = jnp.asarray(uniform.max_code(bits), lower.dtype)
    scale = jnp.maximum(uniform.divide(jnp.maximum(-lower, upper), top / 2), EPSILON)
    return scale, jnp.broadcast_to((top + 1) / 2, scale.shape)


def fake_quant_clipped(x: jax.Array, scale: jax.Array, zero: jax.Array, bits: int | jax.Array) -> jax.Array:
    """``s * (clip(round(x / s + z), 0, 2^b - 1) - z)``, one rounding as in FQ-ViT."""
    return (jnp.clip(jnp.round(uniform.divide(x, scale) + zero), 0, uniform.max_code(bits)) - zero) * scale


def range_params(state: RangeState, x: jax.Array, bits: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point of the observed range as it is; ``x`` is not looked at."""
    del x
    return affine_clipped(state.lower, state.upper, bits)


@jax.jit
def omse_params(state: RangeState, x: jax.Array, bits: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Shrinks the min-max range by 1 - 0.01 i, i = 0..89, to the least mean squared error on ``x``, the last batch.

    Per channel the shrink is common to all channels (as in the official code). Ties: the widest range.
    """
    shrinks = np.asarray([1.0 - i * 0.01 for i in range(OMSE_SHRINKS)], np.float32)

    def error(shrink: jax.Array) -> jax.Array:
        scale, zero = affine_clipped(state.lower * shrink, state.upper * shrink, bits)
        return jnp.mean(jnp.square(x - fake_quant_clipped(x, scale, zero, bits)))

    best = jnp.asarray(shrinks)[jnp.argmin(jax.lax.map(error, shrinks))]
    return affine_clipped(state.lower * best, state.upper * best, bits)


@jax.jit
def ptf_params(state: RangeState, x: jax.Array, bits: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """FQ-ViT's power-of-two factor: ``s_c = (s8 / 8) * f_c``, ``f_c`` in {1, 2, 4, 8} of least squared error on ``x``.

    ``s8`` and the zero point come from the range of the whole tensor.

    Args:
      state: per-channel min-max state.
      x: [..., C], the last batch.
      bits: int or int32 scalar.

    Returns:
      scale [C], zero point ().
    """
    if state.lower.ndim != 1:
        raise ConfigError("the power-of-two factor needs a per-channel state: call init(channels)")
    scale8, zero = affine_clipped(state.lower.min(), state.upper.max(), bits)
    scales = scale8 * jnp.asarray([0.125, 0.25, 0.5, 1.0], jnp.float32)

    def error(scale: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(x - fake_quant_clipped(x, scale, zero, bits)), tuple(range(x.ndim - 1)))

    return scales[jnp.argmin(jax.lax.map(error, scales), axis=0)], zero


@dataclass(frozen=True)
class Observer:
    """``update(state, x) -> state`` and ``params(state, x_last, bits) -> (scale, zero)``."""

    update: Callable[..., RangeState]
    params: Callable[..., tuple[jax.Array, jax.Array]]


MINMAX = Observer(minmax_update, range_params)
EMA = Observer(ema_update, range_params)
PERCENTILES = Observer(percentile_update, range_params)
OMSE = Observer(minmax_update, omse_params)
PTF = Observer(minmax_update, ptf_params)


def observe(
    observer: Observer, batches: Iterable[jax.Array], bits: int | jax.Array, channels: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Runs an observer over ``batches`` and returns its scale and zero point (search observers use the last batch)."""
    state, x = init(channels), None
    for x in batches:
        state = observer.update(state, x)
    if x is None:
        raise ConfigError("an observer got no batch to look at; give at least one calibration image")
    return observer.params(state, x, bits)
