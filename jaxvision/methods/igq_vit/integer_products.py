"""The integer products of grouped inputs: int8 operands, int32 sums, float only to scale them.

One output of a layer is ``s_w sum_m s_m [sum_{c: pi(c) = m} (q_c - z_m)(w_c - z_w)] + bias``: a product for each
group, rescaled and added. As a kernel would, channels are gathered group by group and each group is padded to whole
tiles, so the work is that of one product plus at most G tiles. With scales that are powers of two of one, a single
product serves all groups.

Codes are shifted by half their range to fit int8. Zero points stay out of the products (an unclipped one may not fit
int8) and enter through the sums of codes and weights, in float.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxvision.core.errors import ConfigError
from jaxvision.quant import uniform
from jaxvision.quant.weights import QuantizedTensor

TILE = 32
"""Channels that an int8 matrix unit takes at once; groups are padded to it."""


def signed(codes: jax.Array, bits: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Codes 0..2^b - 1 as int8 about 0, and the offset 2^(b-1) that was taken off (an int32 ())."""
    offset = jnp.left_shift(jnp.int32(1), jnp.asarray(bits, jnp.int32) - 1)
    return (codes.astype(jnp.int32) - offset).astype(jnp.int8), offset


@partial(jax.jit, static_argnames=("num_groups", "tile"))
def tile_channels(group: jax.Array, num_groups: int, tile: int = TILE) -> tuple[jax.Array, jax.Array]:
    """Orders channels by group, each group padded to whole tiles.

    Args:
      group: int32 (C,).
      num_groups: G, static.
      tile: channels a tile, static.

    Returns:
      channels int32 (T, tile), C where there is padding, and the group of each tile int32 (T,), with
      T = (C + G (tile - 1)) // tile tiles, enough for any assignment; unused ones are all padding.
    """
    size = group.shape[0]
    num_tiles = (size + num_groups * (tile - 1)) // tile
    members = jnp.sum(group[:, None] == jnp.arange(num_groups), 0)
    tiles = -(-members // tile)
    order = jnp.argsort(group, stable=True)
    sorted_group = group[order]
    rank = jnp.arange(size) - (jnp.cumsum(members) - members)[sorted_group]
    place = (jnp.cumsum(tiles) - tiles)[sorted_group] * tile + rank
    channels = jnp.full(num_tiles * tile, size, jnp.int32).at[place].set(order.astype(jnp.int32))
    owner = jnp.searchsorted(jnp.cumsum(tiles), jnp.arange(num_tiles), side="right")
    return channels.reshape(num_tiles, tile), jnp.minimum(owner, num_groups - 1).astype(jnp.int32)


def _product(x: jax.Array, w: jax.Array, x_zero: jax.Array, w_zero: jax.Array, size: ArrayLike) -> jax.Array:
    """``sum_c (x_nc - x_zero)(w_cd - w_zero_d)`` from int8 x (N, C), w (C, D); ``size`` counts the real channels.

    ``x_zero`` () or (N, 1) and ``w_zero`` (D,) or () are float; padding channels are 0 in x and w.
    """
    float_type = w_zero.dtype
    dot = jnp.matmul(x, w, preferred_element_type=jnp.int32).astype(float_type)
    x_sum = x.sum(1, dtype=jnp.int32).astype(float_type)[:, None]
    w_sum = w.sum(0, dtype=jnp.int32).astype(float_type)
    return dot - w_zero * x_sum - x_zero * (w_sum - w_zero * jnp.asarray(size, float_type))


@partial(jax.jit, static_argnames="tile")
def igq_linear_int(
    codes: jax.Array,
    group: jax.Array,
    scale: jax.Array,
    zero: jax.Array,
    weight: QuantizedTensor,
    bias: jax.Array | None,
    bits: ArrayLike,
    *,
    tile: int = TILE,
) -> jax.Array:
    """A linear layer on grouped integer inputs; equals :func:`groups.igq_linear`.

    Args:
      codes: integer (B, N, C), 0..2^bits - 1.
      group: int32 (B, C), the group of each channel.
      scale, zero: float (G,), of the groups.
      weight: codes (C, D), quantized per output channel or per tensor.
      bias: (D,) or None.
      bits: at most 8.

    Returns:
      y (B, N, D), the type of ``scale``.
    """
    x, x_offset = signed(codes, bits)
    w, w_offset = signed(weight.codes, weight.bits)
    w_zero = weight.zero - w_offset
    num_channels, num_groups = w.shape[0], scale.shape[0]
    w = jnp.concatenate([w, jnp.zeros((1, w.shape[1]), jnp.int8)])

    def image(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        image_x, image_group = inputs
        channels, owner = tile_channels(image_group, num_groups, tile)
        image_x = jnp.concatenate([image_x, jnp.zeros((image_x.shape[0], 1), jnp.int8)], 1)

        def add(y: jax.Array, one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            index, m = one
            size = jnp.sum(index < num_channels)
            part = _product(image_x[:, index], w[index], zero[m] - x_offset, w_zero, size)
            # An unused tile belongs to no group; its scale may be anything.
            return y + jnp.where(size > 0, scale[m] * part, 0), None

        start = jnp.zeros((image_x.shape[0], w.shape[1]), scale.dtype)
        return jax.lax.scan(add, start, (channels, owner))[0]

    y = weight.scale * jax.lax.map(image, (x, group))
    return y if bias is None else y + bias


def igq_attention_int(
    codes: jax.Array,
    scale: jax.Array,
    zero: jax.Array,
    bits: ArrayLike,
    v_codes: jax.Array,
    v_scale: ArrayLike,
    v_zero: ArrayLike,
    v_bits: ArrayLike,
) -> jax.Array:
    """Quantized attention times quantized values: one integer product, as the scale of a row leaves its sum.

    Args:
      codes: (B, H, N, M) integer; scale, zero: float (B, H, N), of each row's group.
      v_codes: (B, H, M, d) integer; v_scale, v_zero: float (), per tensor.

    Returns:
      (B, H, N, d), the type of ``scale``.
    """
    a, a_offset = signed(codes, bits)
    v, v_offset = signed(v_codes, v_bits)
    v_zero = jnp.asarray(v_zero - v_offset, scale.dtype)
    product = jax.vmap(jax.vmap(_product, (0, 0, 0, None, None)), (0, 0, 0, None, None))
    return v_scale * scale[..., None] * product(a, v, (zero - a_offset)[..., None], v_zero, codes.shape[-1])


# --- one product for all groups --------------------------------------------------------------------------------------


MAX_SHIFTED_BITS = 7
"""The widest codes whose differences fit int8."""


def largest_shift(bits: int) -> int:
    """The largest k for which a difference of two ``bits``-bit codes, shifted left by k, fits int8; at most 3."""
    if not 1 <= bits <= MAX_SHIFTED_BITS:
        raise ConfigError(
            f"bits={bits}: shifted codes fit int8 for 1 to {MAX_SHIFTED_BITS} bits; use the grouped product"
        )
    return min(3, (127 // uniform.max_code(bits)).bit_length() - 1)


@partial(jax.jit, static_argnames="bits")
def snap_power_of_two(bounds: jax.Array, bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bounds whose scales are ``s_0 2^k``, k = 0..3, and contain 0, so that one int8 product serves all groups. Ours.

    ``s_0`` is that of 16 candidates a factor 2^(1/16) apart which fits the logarithms of the scales best in the
    squared sense. ``(q - z) << k`` then fits int8 (|.| <= 120 at 4 bits).

    Args:
      bounds: (G, 2) float, all in use (cut off padding first).
      bits: width, static.

    Returns:
      snapped bounds (G, 2), s_0 (), and k int32 (G,).
    """
    top = largest_shift(bits)
    levels = uniform.max_code(bits)
    lower, upper = jnp.minimum(bounds[:, 0], 0), jnp.maximum(bounds[:, 1], 0)
    scale, _ = uniform.affine_params(lower, upper, bits)
    bases = scale.max() / 2**top * 2 ** (np.arange(16)[:, None] / 16)
    shifts = jnp.clip(jnp.round(jnp.log2(scale / bases)), 0, top)
    best = jnp.argmin(jnp.sum(jnp.square(jnp.log2(scale / bases) - shifts), 1))
    base, shift = bases[best, 0].astype(scale.dtype), shifts[best].astype(jnp.int32)
    snapped = base * jnp.left_shift(1, shift).astype(scale.dtype)
    zero = jnp.clip(jnp.round(-lower / snapped), 0, levels)
    return jnp.stack([-zero * snapped, (levels - zero) * snapped], -1), base, shift


@jax.jit
def power_of_two_linear_int(
    codes: jax.Array,
    group: jax.Array,
    base: jax.Array,
    shift: jax.Array,
    zero: jax.Array,
    weight: QuantizedTensor,
    bias: jax.Array | None,
) -> jax.Array:
    """A linear layer with snapped groups: one int8 product of ``(q - z) << k``, whatever G is.

    Args:
      codes: integer (B, N, C); group: int32 (B, C).
      base: float (), s_0; shift: int32 (G,), k; zero: float (G,), within the codes.
      weight, bias: as :func:`igq_linear_int`.

    Returns:
      y (B, N, D), the type of ``base``.
    """
    zero = zero.astype(jnp.int32)[group][:, None]
    x = jnp.left_shift(codes.astype(jnp.int32) - zero, shift[group][:, None]).astype(jnp.int8)
    w, w_offset = signed(weight.codes, weight.bits)
    y = jax.vmap(lambda image: _product(image, w, jnp.zeros((), base.dtype), weight.zero - w_offset, w.shape[0]))(x)
    y = base * weight.scale * y
    return y if bias is None else y + bias
