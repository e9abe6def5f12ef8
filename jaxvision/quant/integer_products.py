"""Products of 8-bit codes with int32 sums: matrices and convolutions, and both products of their backward passes.

Everything is patches times a matrix of int8, which XLA runs about as fast as the float convolution (its int8
convolution is many times slower on CPU) and accepts for every stride, dilation and grouping. Codes are int8 or uint8;
unsigned ones are shifted by 128 to int8 and corrected with the sums of the other operand, which is exact.

Images are [B, H, W, C], kernels [kh, kw, C / groups, out], padding is symmetric, as in ``models/layers.py``.
"""

import math

import jax
import jax.numpy as jnp

from jaxvision.core.errors import ConfigError

Pair = int | tuple[int, int]
INT32_MAX = 2**31 - 1


def pair(value: Pair) -> tuple[int, int]:
    """``(value, value)``, or the pair itself."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def bound(codes: jax.Array) -> int:
    """The largest |code| that the type allows."""
    if codes.dtype not in (jnp.int8, jnp.uint8):
        raise ConfigError(f"codes are {codes.dtype}; integer products take int8 or uint8")
    return 255 if codes.dtype == jnp.uint8 else 128


# --- matrices --------------------------------------------------------------------------------------------------------


def dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x w``: codes [..., in] and [in, out] to int32 [..., out]. ConfigError where int32 could overflow."""
    _check_length(w.shape[0], bound(x) * bound(w))
    return _matmul(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[1])


def dense_grad_input(d: jax.Array, w: jax.Array) -> jax.Array:
    """``d w^T``: codes [..., out] and [in, out] to int32 [..., in]."""
    return dense(d, w.T)


def dense_grad_kernel(x: jax.Array, d: jax.Array, *, bounds: tuple[int, int] | None = None) -> jax.Array:
    """``x^T d`` over all leading axes: codes [..., in], [..., out] to [in, out]; type as :func:`conv_grad_kernel`."""
    return _over_rows(x.reshape(-1, x.shape[-1]).T[None], d.reshape(-1, 1, d.shape[-1]), bounds)[0]


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Codes [..., n, k] times [..., k, m], int32."""
    shifted, other = _signed(a), _signed(b)
    product = jnp.matmul(shifted, other, preferred_element_type=jnp.int32)
    if a.dtype == jnp.uint8:
        product += 128 * jnp.sum(b, -2, dtype=jnp.int32)[..., None, :]
    if b.dtype == jnp.uint8:
        product += 128 * jnp.sum(shifted, -1, dtype=jnp.int32)[..., :, None]
    return product


def _signed(codes: jax.Array) -> jax.Array:
    """uint8 codes minus 128, int8; int8 codes as they are."""
    if codes.dtype == jnp.int8:
        return codes
    return jax.lax.bitcast_convert_type(codes ^ jnp.uint8(128), jnp.int8)


def _check_length(length: int, largest: int) -> None:
    if length * largest > INT32_MAX:
        raise ConfigError(f"a sum of {length} products of 8-bit codes may not fit int32; run this layer in fake mode")


def _over_rows(x: jax.Array, d: jax.Array, bounds: tuple[int, int] | None) -> jax.Array:
    """``sum_p x[g, i, p] d[p, g, o]``: codes [G, in, P], [P, G, out] to [G, in, out], int32 or (split) float."""
    rows, (most_x, most_d) = d.shape[0], bounds or (bound(x), bound(d))
    parts = -(-rows // (INT32_MAX // max(1, most_x * most_d)))
    if parts > 1:
        size = -(-rows // parts)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, parts * size - rows))).reshape(*x.shape[:2], parts, size)
        d = jnp.pad(d, ((0, parts * size - rows), (0, 0), (0, 0))).reshape(parts, size, *d.shape[1:])
        x = jnp.moveaxis(x, 2, 0)
    sums = _matmul(x, jnp.moveaxis(d, -3, -2))
    return sums if parts <= 1 else _add_exactly(sums)


def _add_exactly(sums: jax.Array) -> jax.Array:
    """The sum over the first axis of int32, too large for int32 perhaps: exact in two halves, rounded once to float."""
    dtype = jnp.result_type(float)
    high, low = jnp.sum(sums >> 16, 0).astype(dtype), jnp.sum(sums & 0xFFFF, 0).astype(dtype)
    return high * 65536 + low


# --- convolutions ----------------------------------------------------------------------------------------------------


def conv(
    x: jax.Array, w: jax.Array, *, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1, groups: int = 1
) -> jax.Array:
    """The convolution of codes [B, H, W, C] and [kh, kw, C / groups, out]: int32 [B, H', W', out].

    ``H' = floor((H + 2p - d(k - 1) - 1) / s) + 1``. ConfigError: shapes that don't fit, or a sum that int32 might not
    hold.
    """
    if w.shape[2] * groups != x.shape[3] or w.shape[3] % groups:
        raise ConfigError(f"codes of shapes {x.shape} and {w.shape} don't fit a convolution with groups={groups}")
    pads = tuple((p, p) for p in pair(padding))
    return _correlate(x, w, pair(stride), pads, pair(dilation), groups)


def conv_grad_input(
    d: jax.Array,
    w: jax.Array,
    size: tuple[int, int],
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> jax.Array:
    """The transposed convolution of d [B, H', W', out] with w: int32 [B, *size, C], ``size`` the input's (H, W).

    It is the convolution of d, with ``stride - 1`` zeros between its pixels, and the flipped kernel, channels swapped.
    """
    kh, kw, inputs, outputs = w.shape
    swapped = w[::-1, ::-1].reshape(kh, kw, inputs, groups, outputs // groups)
    swapped = swapped.transpose(0, 1, 4, 3, 2).reshape(kh, kw, outputs // groups, groups * inputs)
    pads = []
    for axis, (k, s, p, gap) in enumerate(zip((kh, kw), pair(stride), pair(padding), pair(dilation))):
        low = gap * (k - 1) - p
        pads.append((low, size[axis] - 1 + p - (d.shape[1 + axis] - 1) * s))
    d = jax.lax.pad(d, jnp.zeros((), d.dtype), [(0, 0, 0), *((0, 0, s - 1) for s in pair(stride)), (0, 0, 0)])
    return _correlate(d, swapped, (1, 1), tuple(pads), pair(dilation), groups)


def conv_grad_kernel(
    x: jax.Array,
    d: jax.Array,
    kernel_size: tuple[int, int],
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    bounds: tuple[int, int] | None = None,
) -> jax.Array:
    """The kernel's gradient from x [B, H, W, C] and d [B, H', W', out]: [kh, kw, C / groups, out].

    int32 where the B H' W' products of a sum fit it. Otherwise the sum is split, exact in two int32 words and rounded
    once to float32: at 8 bits that happens above 66 000 positions, 64 images of 32 x 32. ``bounds``: the largest |x|
    and |d|, where they are less than their types allow.
    """
    pads = tuple((p, p) for p in pair(padding))
    windows = _windows(x, kernel_size, pair(stride), pads, pair(dilation))
    inputs, outputs = x.shape[-1] // groups, d.shape[-1] // groups
    # Transposed before they are joined: XLA:CPU runs this product ten times faster than the one of plain rows.
    columns = [window.reshape(-1, groups, inputs).transpose(1, 2, 0) for window in windows]
    sums = _over_rows(jnp.concatenate(columns, 1), d.reshape(-1, groups, outputs), bounds)
    sums = sums.reshape(groups, *kernel_size, inputs, outputs)
    return jnp.moveaxis(sums, 0, 3).reshape(*kernel_size, inputs, d.shape[-1])


def _windows(
    x: jax.Array,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    pads: tuple[tuple[int, int], ...],
    dilation: tuple[int, int],
) -> list[jax.Array]:
    """For each kernel position the pixels that it meets, each [B, H', W', C]."""
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)])
    reach = [gap * (k - 1) for k, gap in zip(kernel_size, dilation)]
    spans = [(x.shape[1 + a] - reach[a] - 1) // stride[a] * stride[a] + 1 for a in (0, 1)]
    corners = [(i * dilation[0], j * dilation[1]) for i in range(kernel_size[0]) for j in range(kernel_size[1])]
    return [x[:, i : i + spans[0] : stride[0], j : j + spans[1] : stride[1]] for i, j in corners]


def _correlate(
    x: jax.Array,
    w: jax.Array,
    stride: tuple[int, int],
    pads: tuple[tuple[int, int], ...],
    dilation: tuple[int, int],
    groups: int,
) -> jax.Array:
    kh, kw, inputs, outputs = w.shape
    _check_length(kh * kw * inputs, bound(x) * bound(w))
    windows = _windows(x, (kh, kw), stride, pads, dilation)
    shape = (*windows[0].shape[:3], outputs)
    if inputs == 1:  # depthwise
        taps = w.astype(jnp.int32).reshape(kh * kw, groups, outputs // groups)
        products = (window[..., None].astype(jnp.int32) * tap for window, tap in zip(windows, taps))
        return sum(products, start=jnp.int32(0)).reshape(shape)
    if groups == 1:
        patches = windows[0] if len(windows) == 1 else jnp.concatenate(windows, -1)
        return _matmul(patches.reshape(-1, kh * kw * inputs), w.reshape(-1, outputs)).reshape(shape)
    rows = math.prod(shape[:3])
    patches = jnp.stack([window.reshape(rows, groups, inputs) for window in windows], 2)
    patches = jnp.moveaxis(patches.reshape(rows, groups, -1), 1, 0)
    taps = w.reshape(kh * kw * inputs, groups, outputs // groups).transpose(1, 0, 2)
    return jnp.moveaxis(_matmul(patches, taps), 0, 1).reshape(shape)
