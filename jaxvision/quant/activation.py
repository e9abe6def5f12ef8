"""Quantizers of activations: small pytrees that are called, ``x_hat = q(x, batch_size)``.

A quantizer stands for one site of a network. Its arrays (scales, bounds, counts, bits) are traced, so changing their
values compiles nothing; only another class, another static field or another shape does. A quantizer of your own is
any pytree with ``__call__(x, batch_size) -> x_hat`` that keeps the shape and type of ``x``.

``batch_size`` is the number of images: window attention calls its layers with ``(B * windows, L, C)``, and dynamic
quantizers need to know which rows belong to one image.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxvision.core import struct
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.quant import uniform
from jaxvision.quant.affine import Affine

INSTANCES = ("image", "window")
AXES = ("channels", "rows")


def per_instance(x: jax.Array, batch_size: int, instance: str = "image") -> jax.Array:
    """(B * windows, L..., C) as (B, windows * L..., C), or with ``instance="window"`` as (B * windows, L..., C)."""
    rows = batch_size if instance == "image" else x.shape[0]
    if x.shape[0] % batch_size:
        raise ConfigError(f"an activation of shape {x.shape} can't be cut into {batch_size} images")
    return x.reshape(rows, -1, x.shape[-1])


def integer(value: ArrayLike) -> np.ndarray | jax.Array:
    """``value`` as int32 (a Python int and an array would trace differently)."""
    return value.astype(jnp.int32) if isinstance(value, jax.Array) else np.asarray(value, np.int32)


@struct.dataclass
class AffineQuantizer(Affine):
    """One fixed uniform quantizer for the whole tensor, or one for each channel: :class:`Affine` at a site.

    Attributes:
      scale, zero_point: float, broadcast against the activation: () per tensor, (C,) per channel of the last axis.
      bits: int32 ().
    """

    @classmethod
    def from_interval(
        cls, lower: ArrayLike, upper: ArrayLike, bits: ArrayLike, *, clip_zero_point: bool = False
    ) -> "AffineQuantizer":
        """The quantizer of the interval ``[lower, upper]``, float () or (C,)."""
        scale, zero = uniform.affine_params(lower, upper, bits, clip_zero_point=clip_zero_point)
        return cls(scale, zero, integer(bits))


def group_of_unit(num_units: int, num_groups: int | None) -> np.ndarray:
    """int32 (units,): consecutive units cut into equal slices, floor(u G / units). ``None``: each its own group."""
    if num_groups is None:
        return np.arange(num_units, dtype=np.int32)
    return (np.arange(num_units) * min(num_groups, num_units) // num_units).astype(np.int32)


@struct.dataclass
class DynamicGroupQuantizer:
    """Consecutive groups whose interval is the minimum and maximum over the group, found anew for each image.

    With G groups of channels this is VS-Quant's grouping; with 1 it is dynamic per-tensor quantization, and with
    ``None`` every channel (or every row of attention) has a quantizer of its own: the limit that G instance-aware
    groups approach.

    Attributes:
      bits: int32 ().
      num_groups: groups an image, static; ``None``: one for each channel or row.
      axis: "channels" (last axis) or "rows" (each (..., L) row of attention, the window's and head's own).
      instance: "image", or "window" for statistics of each window by itself.
    """

    bits: jax.Array
    num_groups: int | None = struct.field(pytree_node=False, default=None)
    axis: str = struct.field(pytree_node=False, default="channels")
    instance: str = struct.field(pytree_node=False, default="image")

    @classmethod
    def create(cls, bits: ArrayLike, num_groups: int | None = None, **options: Any) -> "DynamicGroupQuantizer":
        """The quantizer, its arguments checked; raises ConfigError."""
        quantizer = cls(integer(bits), num_groups, **options)
        if num_groups is not None and num_groups < 1:
            raise ConfigError(f"num_groups={num_groups} must be at least 1 (or None: one group a channel)")
        check_choices(quantizer)
        return quantizer

    def __call__(self, x: jax.Array, batch_size: int) -> jax.Array:
        """x_hat of the shape and type of ``x``. An image's result depends on that image alone."""
        return _dynamic(self, x, batch_size)


@partial(jax.jit, static_argnames="batch_size")
def _dynamic(quantizer: DynamicGroupQuantizer, x: jax.Array, batch_size: int) -> jax.Array:
    if quantizer.axis == "channels":
        flat, reduced = per_instance(x, batch_size, quantizer.instance), 1
    else:
        images = batch_size if quantizer.instance == "image" else x.shape[0]
        flat, reduced = x.reshape(images, -1, x.shape[-1]), 2
    lower, upper = flat.min(reduced), flat.max(reduced)  # (images, units)
    if (count := quantizer.num_groups) is None:
        scale, zero = uniform.affine_params(lower, upper, quantizer.bits)
    else:
        group = group_of_unit(lower.shape[1], count)
        lower = jax.ops.segment_min(lower.T, group, num_segments=count)
        upper = jax.ops.segment_max(upper.T, group, num_segments=count)
        scale, zero = (p[group].T for p in uniform.affine_params(lower, upper, quantizer.bits))
    scale, zero = jnp.expand_dims(scale, reduced), jnp.expand_dims(zero, reduced)
    return uniform.fake_quant(flat, scale, zero, quantizer.bits).reshape(x.shape)


def check_choices(quantizer: Any) -> None:
    """Raises ConfigError where a quantizer's ``axis`` or ``instance`` is none of the allowed ones."""
    for name, allowed in (("axis", AXES), ("instance", INSTANCES)):
        if getattr(quantizer, name) not in allowed:
            raise unknown(name, getattr(quantizer, name), allowed)
