"""Instance-aware group quantization (IGQ-ViT, CVPR 2024, sections 3.2 and 3.3) as pure functions of arrays.

A layer has G quantizers, pairs of bounds ``(l_m, u_m)``. They are fixed after calibration; which of them quantizes a
channel is decided for each image at run time, by the channel's own minimum and maximum::

    r_c = (min_n x_nc, max_n x_nc)        pi_c = argmin_m (r_c[0] - l_m)^2 + (r_c[1] - u_m)^2

The softmax attention is treated alike, with its rows (query tokens) in the place of channels. No gradients anywhere.
Arrays of bounds may be padded to more groups than are in use; ``count`` masks the rest.
"""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxvision.core import struct
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.quant import activation, uniform

M_STEPS = ("mean", "envelope")
MULTIPLIERS = (0.8, 0.9, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5)
"""Factors of a layer's bounds that ``quantizers.refine_layer_scale`` tries; ours, not the paper's."""


@jax.jit
def channel_range(x: jax.Array) -> jax.Array:
    """Minimum and maximum over the tokens: x (B, N, C) float -> (B, C, 2)."""
    chex.assert_rank(x, 3)
    return jnp.stack([x.min(1), x.max(1)], -1)


@jax.jit
def row_range(attention: jax.Array) -> jax.Array:
    """Minimum and maximum of each row: attention (..., N, M) float -> (..., N, 2)."""
    return jnp.stack([attention.min(-1), attention.max(-1)], -1)


def distance(ranges: jax.Array, bounds: jax.Array) -> jax.Array:
    """Squared distance of ranges (..., 2) to each of bounds (..., G, 2), which broadcast -> (..., G). Equation 4."""
    gap = ranges[..., None, :] - bounds
    return jnp.square(gap[..., 0]) + jnp.square(gap[..., 1])


@jax.jit
def assign(ranges: jax.Array, bounds: jax.Array, count: ArrayLike | None = None) -> jax.Array:
    """The nearest group of each range, equation 5; ties go to the lowest index.

    Args:
      ranges: (..., 2) float.
      bounds: (..., G, 2) float, leading axes broadcast against those of ``ranges``.
      count: groups in use, () int; the others are infinitely far.

    Returns:
      int32 (...), 0..G-1.
    """
    far = distance(ranges, bounds)
    if count is not None:
        far = jnp.where(jnp.arange(bounds.shape[-2]) < count, far, jnp.inf)
    return jnp.argmin(far, -1).astype(jnp.int32)


def initial_bounds(samples: jax.Array, num_groups: int) -> jax.Array:
    """Means of equal-count bins of the samples sorted by width (stable): samples (S, 2) -> (G, 2).

    Bin g holds the sorted samples floor(g S / G) to floor((g + 1) S / G). With fewer samples than groups a bin
    without a sample takes the one at its edge.
    """
    size = samples.shape[0]
    edges = np.arange(num_groups + 1) * size // num_groups
    group = np.searchsorted(edges, np.arange(size), side="right").astype(np.int32) - 1
    ordered = samples[jnp.argsort(samples[:, 1] - samples[:, 0], stable=True)]
    return _m_step(ordered, jnp.asarray(group), ordered[edges[:-1]], "mean")


def _m_step(samples: jax.Array, group: jax.Array, bounds: jax.Array, m_step: str) -> jax.Array:
    member = group[:, None] == jnp.arange(bounds.shape[0])  # (S, G)
    count = member.sum(0)[:, None]
    if m_step == "mean":
        weight = member.astype(samples.dtype)
        total = jnp.einsum("sg,sk->gk", weight, samples, precision=jax.lax.Precision.HIGHEST)
        moved = total / jnp.maximum(count, 1)
    else:
        lower = jnp.where(member, samples[:, :1], jnp.inf).min(0)
        upper = jnp.where(member, samples[:, 1:], -jnp.inf).max(0)
        moved = jnp.stack([lower, upper], -1)
    return jnp.where(count > 0, moved, bounds)


@partial(jax.jit, static_argnames=("num_groups", "iters", "m_step"))
def calibrate_bounds(
    samples: jax.Array,
    num_groups: int,
    iters: int = 20,
    m_step: str = "mean",
    *,
    initial: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Finds the G bounds of a layer by alternating assignment and update; deterministic.

    E-step: each sample joins its nearest bounds. M-step: "mean" sets bounds to the mean of their members, the
    minimiser of the objective; "envelope" to the least lower and greatest upper end. Bounds without members stay.

    Args:
      samples: (S, 2) float, the (min, max) of S = images * channels (or rows).
      num_groups: G.
      iters: alternations.
      m_step: "mean" or "envelope".
      initial: (G, 2) bounds to start from; default :func:`initial_bounds`.

    Returns:
      bounds (G, 2), and the objective ``sum_s min_m distance`` (iters + 1,) before each update and after the last;
      it doesn't increase under "mean".
    """
    chex.assert_shape(samples, (None, 2))
    if m_step not in M_STEPS:
        raise unknown("m_step", m_step, M_STEPS)

    def step(bounds: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        far = distance(samples, bounds)
        return _m_step(samples, jnp.argmin(far, -1), bounds, m_step), far.min(-1).sum()

    start = initial_bounds(samples, num_groups) if initial is None else initial
    bounds, objective = jax.lax.scan(step, start, None, length=iters)
    return bounds, jnp.append(objective, distance(samples, bounds).min(-1).sum())


@partial(jax.jit, static_argnames=("num_groups", "iters", "m_step"))
def calibrate_layers(
    samples: jax.Array, num_groups: int, iters: int = 20, m_step: str = "mean"
) -> tuple[jax.Array, jax.Array]:
    """:func:`calibrate_bounds` for equal-shaped layers: samples (layers, S, 2) -> (layers, G, 2), (layers, iters + 1).

    One program, one layer at a time, so the memory stays that of one layer.
    """
    return jax.lax.map(lambda layer: calibrate_bounds(layer, num_groups, iters, m_step), samples)


def pad_bounds(bounds: ArrayLike, max_groups: int) -> jax.Array:
    """(..., G, 2) with zeros appended to (..., max_groups, 2); raises ConfigError where G is larger."""
    bounds = jnp.asarray(bounds)
    if bounds.shape[-2] > max_groups:
        raise ConfigError(f"num_groups={bounds.shape[-2]} is above max_groups={max_groups}")
    widths = [(0, 0)] * (bounds.ndim - 2) + [(0, max_groups - bounds.shape[-2]), (0, 0)]
    return jnp.pad(bounds, widths)


@partial(jax.jit, static_argnames="clip_zero_point")
def igq_fake_quant_channels(
    x: jax.Array,
    bounds: jax.Array,
    bits: ArrayLike,
    count: ArrayLike | None = None,
    *,
    clip_zero_point: bool = False,
) -> jax.Array:
    """Quantizes each channel of each image with its nearest quantizer.

    Args:
      x: (B, N, C) float; minima and maxima are over all N tokens.
      bounds: (G, 2) float.
      bits: width, int or int32 ().
      count: groups in use.
      clip_zero_point: see :func:`jaxvision.quant.uniform.affine_params`.

    Returns:
      x_hat (B, N, C), the type of x.
    """
    scale, zero = uniform.affine_params(bounds[:, 0], bounds[:, 1], bits, clip_zero_point=clip_zero_point)
    group = assign(channel_range(x), bounds, count)[:, None]  # (B, 1, C)
    return uniform.fake_quant(x, scale[group], zero[group], bits)


@partial(jax.jit, static_argnames="clip_zero_point")
def igq_fake_quant_rows(
    attention: jax.Array,
    bounds: jax.Array,
    bits: ArrayLike,
    count: ArrayLike | None = None,
    *,
    clip_zero_point: bool = False,
) -> jax.Array:
    """Quantizes each row of the attention with its nearest quantizer.

    Args:
      attention: (B, H, N, M) float.
      bounds: (G, 2), or (1 or H, G, 2): the quantizers shared by the heads or each head's own.
      bits, count, clip_zero_point: as for channels.

    Returns:
      the quantized attention, shape and type of the input.
    """
    chex.assert_rank(attention, 4)
    bounds = bounds.reshape(-1, 1, *bounds.shape[-2:])  # (Hq, 1, G, 2)
    group = assign(row_range(attention), bounds, count)[..., None]  # (B, H, N, 1)
    scale, zero = uniform.affine_params(bounds[:, 0, :, 0], bounds[:, 0, :, 1], bits, clip_zero_point=clip_zero_point)
    head = np.arange(bounds.shape[0])[:, None, None]
    return uniform.fake_quant(attention, scale[head, group], zero[head, group], bits)


def igq_linear(
    x: jax.Array,
    w_hat: jax.Array,
    bias: jax.Array | None,
    bounds: jax.Array,
    bits: ArrayLike,
    count: ArrayLike | None = None,
    *,
    clip_zero_point: bool = False,
) -> jax.Array:
    """A linear layer on instance-aware quantized inputs: y = x_hat w_hat + bias.

    Args:
      x: (B, N, C) float; w_hat: (C, D) dequantized kernel; bias: (D,) or None.
      bounds, bits, count: as :func:`igq_fake_quant_channels`.

    Returns:
      y (B, N, D).
    """
    y = igq_fake_quant_channels(x, bounds, bits, count, clip_zero_point=clip_zero_point) @ w_hat
    return y if bias is None else y + bias


def layer_scale_errors(
    x: jax.Array,
    bounds: jax.Array,
    bits: ArrayLike,
    count: ArrayLike | None = None,
    *,
    axis: str = "channels",
    clip_zero_point: bool = False,
    multipliers: tuple[float, ...] = MULTIPLIERS,
) -> jax.Array:
    """Mean squared quantization error of ``x`` for bounds times each multiplier.

    Assignment uses the scaled bounds, as it will at run time.

    Args:
      x: calibration activations, (B, N, C), or (B, H, N, M) with ``axis="rows"``.
      bounds: (G, 2), or for rows (Hq, G, 2); bits, count, clip_zero_point: as above.
      multipliers: the factors.

    Returns:
      (multipliers,) float.
    """
    quantizer = igq_fake_quant_channels if axis == "channels" else igq_fake_quant_rows
    factors = jnp.asarray(multipliers, bounds.dtype)

    def error(factor: jax.Array) -> jax.Array:
        x_hat = quantizer(x, bounds * factor, bits, count, clip_zero_point=clip_zero_point)
        return jnp.mean(jnp.square(x - x_hat))

    return jax.lax.map(error, factors)


@struct.dataclass
class InstanceGroupQuantizer:
    """IGQ for one site: ``x_hat = q(x, batch_size)``.

    Attributes:
      bounds: (Hq, G_max, 2) float; Hq = 1, or the number of heads where each has its own quantizers.
      count: int32 (), groups in use.
      bits: int32 ().
      axis: "channels" of (B * windows, ..., C), or "rows" of (B * windows, H, N, M); static.
      instance: "image": one assignment of channels an image; "window": one a window, an ablation; static.
      clip_zero_point: static.
    """

    bounds: jax.Array
    count: jax.Array
    bits: jax.Array
    axis: str = struct.field(pytree_node=False, default="channels")
    instance: str = struct.field(pytree_node=False, default="image")
    clip_zero_point: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def create(
        cls, bounds: ArrayLike, bits: ArrayLike, max_groups: int = 16, **options: Any
    ) -> "InstanceGroupQuantizer":
        """The quantizer of bounds (G, 2) or (Hq, G, 2), padded to ``max_groups``; raises ConfigError."""
        bounds = jnp.asarray(bounds)
        padded = pad_bounds(bounds.reshape(-1, *bounds.shape[-2:]), max_groups)
        quantizer = cls(padded, activation.integer(bounds.shape[-2]), activation.integer(bits), **options)
        activation.check_choices(quantizer)
        if quantizer.axis == "channels" and padded.shape[0] != 1:
            raise ConfigError(f"bounds of shape {bounds.shape} are per head, which axis='channels' can't use")
        return quantizer

    def groups(self, x: jax.Array, batch_size: int) -> jax.Array:
        """The group of each channel, int32 (B, C), or of each row (B * windows, H, N)."""
        if self.axis == "rows":
            return assign(row_range(x), self.bounds[:, None], self.count)
        return assign(channel_range(activation.per_instance(x, batch_size, self.instance)), self.bounds[0], self.count)

    def __call__(self, x: jax.Array, batch_size: int) -> jax.Array:
        """x_hat of the shape and type of ``x``. An image's result depends on that image alone."""
        options = {"clip_zero_point": self.clip_zero_point}
        if self.axis == "rows":
            return igq_fake_quant_rows(x, self.bounds, self.bits, self.count, **options)
        flat = activation.per_instance(x, batch_size, self.instance)
        return igq_fake_quant_channels(flat, self.bounds[0], self.bits, self.count, **options).reshape(x.shape)
