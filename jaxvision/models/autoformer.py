"""AutoFormer's vision transformers: heads and MLP ratio of each block are chosen, positions are relative.

Sources: Chen et al. 2021 (arXiv:2107.00651) and its official code; relative positions on keys and values after Shaw et
al. 2018. :mod:`jaxvision.models.autoformer_architecture` has the strings.

Taps: those of :mod:`jaxvision.models.vit`, and ``blocks.{i}.attn_sum.out``, the tokens between the halves of a block.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxvision.core.errors import ConfigError
from jaxvision.core.types import Tap, no_tap, scoped
from jaxvision.models import autoformer_architecture
from jaxvision.models.attention import merge_heads, split_heads
from jaxvision.models.autoformer_architecture import HEAD_WIDTH, MAX_DISTANCE, TINY
from jaxvision.models.layers import Dense, DropPath
from jaxvision.models.mlp import Mlp, classify, matrix_init, normalise, truncated_normal
from jaxvision.models.patches import PatchEmbed

PRESETS: dict[str, dict[str, Any]] = {"autoformer": {}}

TABLES = ("rel_k_v", "rel_k_h", "rel_v_v", "rel_v_h")
"""Of keys and values, vertical and horizontal, each float32 [30, 64]."""

TABLE_SIZE = 2 * MAX_DISTANCE + 2
EPS = 1e-5


def relative_positions(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Vertical and horizontal table entries of all pairs (query, key), int32 [N, N] each, N = rows columns + 1.

    ``clip(key - query, -14, 14) + 15`` on the grid of patches; 0 where one of the two is the class token.
    """
    index = np.zeros((2, rows * columns + 1, rows * columns + 1), np.int32)
    places = np.indices((rows, columns)).reshape(2, -1)
    distance = places[:, None, :] - places[:, :, None]
    index[:, 1:, 1:] = np.clip(distance, -MAX_DISTANCE, MAX_DISTANCE) + MAX_DISTANCE + 1
    return index[0], index[1]


def relative_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, positions_k: jax.Array, positions_v: jax.Array, tap: Tap = no_tap
) -> jax.Array:
    """Attention with relative positions on keys and values, per head:

      a_ij = softmax_j(q_i (k_j + R^k_ij) / 8),  o_i = sum_j a_ij (v_j + R^v_ij)

    Args:
      q, k, v: [B, H, N, 64].
      positions_k, positions_v: R^k, R^v [N, N, 64].
      tap: sees ``softmax``, [B, H, N, N] float32.

    Returns:
      [B, H, N, 64] in the dtype of ``v``.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q = q * HEAD_WIDTH**-0.5
    logits = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=wide)
    logits = logits + jnp.einsum("bhnd,nmd->bhnm", q, positions_k, preferred_element_type=wide)
    weights = tap("softmax", jax.nn.softmax(logits, axis=-1)).astype(v.dtype)
    return jnp.einsum("bhnm,bhmd->bhnd", weights, v) + jnp.einsum("bhnm,nmd->bhnd", weights, positions_v)


class Attention(nn.Module):
    """``proj(attention(qkv x))`` with heads of 64 channels: [B, N, D] -> [B, N, D]; see :func:`relative_attention`.

    Parameters: ``qkv`` (all of q, then k, then v, head by head), ``proj`` and the tables of ``TABLES``.
    """

    num_heads: int
    grid: tuple[int, int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, tap: Tap = no_tap) -> jax.Array:
        dense = partial(Dense, kernel_init=matrix_init("timm"), bias_init=nn.initializers.zeros, dtype=self.dtype)
        qkv = dense(3 * HEAD_WIDTH * self.num_heads, name="qkv")(tap("qkv", x))
        q, k, v = (tap(name, part) for name, part in zip("qkv", split_heads(qkv, self.num_heads), strict=True))
        vertical, horizontal = relative_positions(*self.grid)
        k_v, k_h, v_v, v_h = (
            self.param(name, truncated_normal(0.02), (TABLE_SIZE, HEAD_WIDTH), jnp.float32).astype(self.dtype)
            for name in TABLES
        )
        positions = k_v[vertical] + k_h[horizontal], v_v[vertical] + v_h[horizontal]
        y = merge_heads(relative_attention(q, k, v, *positions, tap=tap))
        return tap("out", dense(x.shape[-1], name="proj")(tap("proj", y)))


class Block(nn.Module):
    """``x += attn(norm1 x); x += mlp(norm2 x)``: [B, N, D] -> [B, N, D]."""

    num_heads: int
    hidden: int
    grid: tuple[int, int]
    drop_path_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        y = normalise(x, "norm1", EPS, self.dtype, tap)
        y = Attention(self.num_heads, self.grid, self.dtype, name="attn")(y, scoped(tap, "attn"))
        x = tap("attn_sum.out", x + DropPath(self.drop_path_rate)(y, train))
        y = normalise(x, "norm2", EPS, self.dtype, tap)
        y = Mlp(self.hidden, dtype=self.dtype, name="mlp")(y, train=train, tap=scoped(tap, "mlp"))
        return tap("out", x + DropPath(self.drop_path_rate)(y, train))


class AutoFormer(nn.Module):
    """[B, H, W, C] float32 -> logits [B, num_classes] float32: the mean of the patch tokens behind the last ``norm``.

    The grid comes from the images that ``init`` sees. Parameters are named as those of
    :class:`jaxvision.models.vit.ViT`, with the tables of ``TABLES`` in ``blocks_{i}/attn``.

    Attributes:
      num_classes: K.
      architecture: string of :mod:`jaxvision.models.autoformer_architecture`.
      patch_size: pixels a side.
      drop_path_rate: of the last block; it grows linearly from 0 in the first.
      dtype: compute dtype; layer normalisations, softmax and logits stay float32.

    Raises:
      ConfigError: a malformed architecture, or images that don't fit the patches or the weights.
    """

    num_classes: int
    architecture: str = TINY
    patch_size: int = 16
    drop_path_rate: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        autoformer_architecture.from_string(self.architecture)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        chosen = autoformer_architecture.from_string(self.architecture)
        x, grid = self._embed(images, chosen.embed_dim, tap)
        rates = np.linspace(0.0, self.drop_path_rate, chosen.depth)
        for i, (heads, hidden) in enumerate(zip(chosen.num_heads, chosen.hidden, strict=True)):
            block = Block(heads, hidden, grid, float(rates[i]), self.dtype, name=f"blocks_{i}")
            x = block(x, train=train, tap=scoped(tap, f"blocks.{i}"))
        x = normalise(x, "norm", EPS, self.dtype, tap)
        return classify(jnp.mean(x[:, 1:], axis=1), "head", self.num_classes, "timm", self.dtype, tap)

    def _embed(self, images: jax.Array, width: int, tap: Tap) -> tuple[jax.Array, tuple[int, int]]:
        """Tokens [B, N, D] of images [B, H, W, C], the class token first, and the (rows, columns) of the patches."""
        embed = PatchEmbed(width, self.patch_size, dtype=self.dtype, name="patch_embed")
        x = embed(images, tap=scoped(tap, "patch_embed"))
        batch, rows, columns, _ = x.shape
        token = self.param("cls_token", truncated_normal(0.02), (1, 1, width), jnp.float32)
        shape = (1, rows * columns + 1, width)
        if self.has_variable("params", "pos_embed") and self.get_variable("params", "pos_embed").shape != shape:
            raise ConfigError(
                f"an image of {images.shape[1]}x{images.shape[2]} pixels has {rows}x{columns} patches but pos_embed is "
                f"of shape {self.get_variable('params', 'pos_embed').shape}, wanted {shape}; resize the images, or "
                "pos_embed with torch_import.resize_pos_embed"
            )
        position = self.param("pos_embed", truncated_normal(0.02), shape, jnp.float32)
        x = jnp.concatenate(
            [jnp.broadcast_to(token.astype(x.dtype), (batch, 1, width)), x.reshape(batch, -1, width)], 1
        )
        return tap("pos_embed.out", x + position.astype(x.dtype)), (rows, columns)
