"""A convolution that XLA's CPU backend differentiates without detours; on accelerators the convolution as it is.

The forms for CPUs are sums of the same products, so they agree with the plain one to rounding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

_NHWC = ("NHWC", "HWIO", "NHWC")


class Geometry(NamedTuple):
    """Strides, symmetric zero padding and dilations as (rows, columns), and the number of groups."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """``torch.nn.functional.conv2d``: [B, H, W, C] and [kh, kw, C / groups, O] -> [B, H', W', O], one dtype.

    ``H' = floor((H + 2p - d(kh-1) - 1) / s) + 1``. Differentiable in either mode and to any order.
    """
    if jax.default_backend() != "cpu":
        return _direct(x, kernel, geometry)
    strided = geometry.stride != (1, 1) and geometry.dilation == (1, 1) and geometry.groups == 1
    form = _strided if strided and min(kernel.shape[:2]) > 1 else _direct
    return form(kept(x), kernel, geometry)


@jax.custom_jvp
def kept(x: jax.Array) -> jax.Array:
    """``x`` bit for bit (a NaN as the standard NaN), in a form that XLA stores once; its derivative is the identity.

    For the gradient of a kernel XLA's CPU backend transposes the layer's input, one number at a time. It fuses into
    that loop whatever made the input, as long as each operation reads one array: normalisation, rectifier, quantizer,
    and across shortcuts those of the layers before, all computed again in the slowest order of memory. An
    operation that reads two arrays isn't computed twice, hence a choice between NaN and x that always gives x;
    ``optimization_barrier`` is gone before XLA (jaxlib 0.10.2) fuses.

    Args:
      x: floats of any shape.
    """
    return jnp.where(jnp.isnan(x), jnp.asarray(jnp.nan, x.dtype), x)


@kept.defjvp
def _kept_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return kept(*primals), *tangents


def _direct(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=geometry.stride,
        padding=[(p, p) for p in geometry.padding],
        rhs_dilation=geometry.dilation,
        dimension_numbers=_NHWC,
        feature_group_count=geometry.groups,
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _strided(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """The convolution, with another map from the input's tangent: reverse mode computes that map's transpose.

    The plain one's is a convolution over the gradient with zeros between its pixels: at stride 2 three of four
    products are with such a zero. That of :func:`_by_cells` has none of them, but the plain form is the faster one for
    the result itself.
    """
    return _direct(x, kernel, geometry)


@_strided.defjvp
def _strided_jvp(
    geometry: Geometry, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    return _direct(x, kernel, geometry), _by_cells(dx, kernel, geometry) + _direct(x, dkernel, geometry)


def _by_cells(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """A convolution of strides (s, t) as one of stride 1 over cells of s x t pixels, whose pixels become channels.

    The kernel gets zeros in front so that its first row starts a cell, and behind so that its last one ends a cell.
    """
    shape, zeros, pads = [], [], []
    for size, field, stride, padding in zip(x.shape[1:3], kernel.shape, geometry.stride, geometry.padding):
        outputs = (size + 2 * padding - field) // stride + 1
        front = -padding % stride
        before, cells, taps = (padding + front) // stride, -(-size // stride), -(-(front + field) // stride)
        shape.append((cells, taps, stride, cells * stride - size))
        zeros.append((front, taps * stride - front - field))
        pads.append((before, outputs - 1 + taps - cells - before))
    (rows, row_taps, s, rows_more), (columns, column_taps, t, columns_more) = shape
    x = jnp.pad(x, ((0, 0), (0, rows_more), (0, columns_more), (0, 0)))
    x = x.reshape(-1, rows, s, columns, t, x.shape[3]).swapaxes(2, 3).reshape(-1, rows, columns, s * t * x.shape[3])
    kernel = jnp.pad(kernel, (*zeros, (0, 0), (0, 0)))
    kernel = kernel.reshape(row_taps, s, column_taps, t, *kernel.shape[2:]).swapaxes(1, 2)
    kernel = kernel.reshape(row_taps, column_taps, -1, kernel.shape[-1])
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=_NHWC)
