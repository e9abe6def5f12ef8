"""How networks end, with PyTorch's arithmetic: pooled vectors, logits over a temperature, maps at another size."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core.errors import ConfigError
from jaxvision.models.layers import adaptive_avg_pool, global_avg_pool


def pooled_vector(x: jax.Array, cells: int = 1) -> jax.Array:
    """The means of ``cells x cells`` parts of a map, as one vector: [B, H, W, C] -> [B, C cells^2], dtype of ``x``.

    Several cells are flattened channel first (C, row, column), as ``torch.flatten`` does it: PyTorch's matrices behind
    it fit without reordering.
    """
    if cells == 1:
        return global_avg_pool(x)
    return adaptive_avg_pool(x, cells).transpose(0, 3, 1, 2).reshape(x.shape[0], -1)


def scaled_logits(logits: jax.Array, temp: float = 1.0) -> jax.Array:
    """``logits / temp`` in float32.

    Source: the constructor argument ``temp`` of the networks of FLSD, MbLS, ACLS and RankMixup (official codes).

    Raises:
      ConfigError: ``temp`` is not positive.
    """
    if not temp > 0:
        raise ConfigError(f"temp={temp!r} divides the logits and must be positive")
    logits = logits.astype(jnp.float32)
    return logits if temp == 1 else logits / temp


def corner_matrix(size_in: int, size_out: int) -> np.ndarray:
    """The matrix of a bilinear resize along one axis, float32 [size_out, size_in], corner on corner.

    Sample ``i`` sits at ``i (size_in - 1) / (size_out - 1)`` of the input: ``align_corners=True`` of PyTorch's
    ``interpolate`` and ``UpsamplingBilinear2d``. (``data.resize.resize_matrix`` is the other convention.)
    """
    place = np.arange(size_out) * ((size_in - 1) / max(size_out - 1, 1))
    low = np.minimum(place.astype(int), max(size_in - 2, 0))
    high = np.minimum(low + 1, size_in - 1)
    matrix = np.zeros((size_out, size_in))
    rows = np.arange(size_out)
    np.add.at(matrix, (rows, low), 1 - (place - low))
    np.add.at(matrix, (rows, high), place - low)
    return matrix.astype(np.float32)


def resize_corners(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bilinear resize with aligned corners, float32 inside: [B, H, W, C] -> [B, *size, C], dtype of ``x``.

    Two products with constant matrices. Gathering four neighbours would need a scatter for the gradient, which is
    slow, and on a GPU adds in no fixed order.
    """
    if x.shape[1:3] == tuple(size):
        return x
    down, across = (corner_matrix(have, want) for have, want in zip(x.shape[1:3], size, strict=True))
    # Highest precision: accelerators would round float32 operands to bfloat16 or TF32.
    y = jnp.einsum("yh,bhwc->bywc", down, x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("xw,bywc->byxc", across, y, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)
