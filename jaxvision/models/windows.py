"""The geometry of Swin's windows: cutting a map, relative positions, shifts and masks. Source: Liu et al. 2021."""

import jax
import jax.numpy as jnp
import numpy as np


def pad_to_multiple(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """[B, H, W, C] with zeros below and right, so that H and W are multiples of ``size``."""
    below, right = -x.shape[1] % size[0], -x.shape[2] % size[1]
    return jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0))) if below or right else x


def split_windows(x: jax.Array, window: tuple[int, int]) -> jax.Array:
    """[B, H, W, C] -> [B (H/h) (W/w), h w, C]: windows row by row, pixels row by row, an image's windows together."""
    batch, height, width, channels = x.shape
    h, w = window
    x = x.reshape(batch, height // h, h, width // w, w, channels).swapaxes(2, 3)
    return x.reshape(-1, h * w, channels)


def merge_windows(x: jax.Array, window: tuple[int, int], size: tuple[int, int]) -> jax.Array:
    """The inverse of :func:`split_windows` for a map of ``size`` (H, W): -> [B, H, W, C]."""
    (h, w), (height, width), channels = window, size, x.shape[-1]
    x = x.reshape(-1, height // h, width // w, h, w, channels).swapaxes(2, 3)
    return x.reshape(-1, height, width, channels)


def window_and_shift(
    size: tuple[int, int], window: tuple[int, int], shifted: bool, *, shrink: bool = True
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The window (h, w) and the shift (rows, columns) that a block uses on a map of ``size`` (H, W).

    The shift is half a window, rounded down, in shifted blocks. With ``shrink`` a side of the map that is no longer
    than the window's becomes the window's, and nothing shifts along it.
    """
    fits = tuple(shrink and side <= full for side, full in zip(size, window))
    used = tuple(side if fit else full for side, full, fit in zip(size, window, fits))
    return used, tuple(full // 2 if shifted and not fit else 0 for full, fit in zip(window, fits))


def relative_position_index(window: tuple[int, int]) -> np.ndarray:
    """Row of the bias table for each pair of pixels of a window (h, w): int32 [h w, h w].

    ``(y_i - y_j + h - 1) (2 w - 1) + (x_i - x_j + w - 1)``, pixels row by row.
    """
    height, width = window
    y, x = (axis.reshape(-1) for axis in np.indices(window, dtype=np.int32))
    rows, columns = y[:, None] - y[None] + height - 1, x[:, None] - x[None] + width - 1
    return rows * (2 * width - 1) + columns


def shift_mask(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> jax.Array:
    """What is added to the logits of a shifted block: float32 [W, h w, h w], 0 or -100.

    After the roll a window at the end of a side holds pixels of both ends of the image. Each side is cut into
    [0, -window), [-window, -shift), [-shift, end) (one region where nothing shifts), and pixels of different regions
    don't see each other. -100, not -inf, is what the published weights were trained with.

    Args:
      size: (H, W) of the rolled and padded map, multiples of the window.
      window: (h, w).
      shift: (rows, columns).
    """
    y, x = (_regions(*axis) for axis in zip(size, window, shift))
    regions = split_windows((3 * y[:, None] + x[None])[None, :, :, None], window)[:, :, 0]
    # The comparison is left to the device: as a constant the mask of a large image would be megabytes a block.
    regions = jnp.asarray(regions)
    return jnp.where(regions[:, :, None] == regions[:, None, :], 0.0, -100.0).astype(jnp.float32)


def _regions(size: int, window: int, shift: int) -> np.ndarray:
    position = np.arange(size, dtype=np.int32)
    return (position >= size - window).astype(np.int32) + (position >= size - shift) if shift else 0 * position
