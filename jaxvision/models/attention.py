"""Multi-head self-attention, over all tokens of an image (ViT) or inside windows (Swin), with its taps."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core.errors import ConfigError
from jaxvision.core.types import Tap, no_tap
from jaxvision.models.layers import Dense, Dropout
from jaxvision.models.mlp import matrix_init, truncated_normal
from jaxvision.models.windows import relative_position_index


def split_heads(qkv: jax.Array, num_heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k and v, each [B, H, N, d], of the fused projection [B, N, 3 H d]: all of q (head-major), then k, then v."""
    batch, tokens, width = qkv.shape
    # One copy into head-major order. Contracting in the order of qkv makes XLA's CPU backend copy around each of the
    # two products instead: a whole DeiT-S takes 1.5 times as long.
    q, k, v = qkv.reshape(batch, tokens, 3, num_heads, width // (3 * num_heads)).transpose(2, 0, 3, 1, 4)
    return q, k, v


def merge_heads(x: jax.Array) -> jax.Array:
    """[B, N, H d], the heads one after the other, of [B, H, N, d]."""
    batch, heads, tokens, depth = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, tokens, heads * depth)


class Attention(nn.Module):
    """``proj(softmax(q k^T d^-0.5 + bias + mask) v)``, softmax over the keys: [B, N, D] -> [B, N, D].

    The products run in ``dtype`` and sum in float32; the softmax is float32.

    Taps: ``qkv`` (input, [B, N, D]), ``q``, ``k``, ``v`` (operands of the two products, [B, H, N, d]; q before the
    factor d^-0.5 without ``window``, after it with one, as the originals compute it), ``softmax`` (probabilities
    before dropout, [B, H, N, N] float32), ``proj`` (input, [B, N, D]); ``qkv.out`` ([B, N, 3 D]) and ``out``.

    Attributes:
      window: None, or the window (h, w) of N = h w pixels; its relative positions then add a learned bias from the
        parameter ``relative_position_bias_table``, float32 [(2h-1)(2w-1), H].
    """

    num_heads: int
    window: tuple[int, int] | None = None
    qkv_bias: bool = True
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    weight_init: str = "timm"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, *, train: bool = False, tap: Tap = no_tap
    ) -> jax.Array:
        """``mask`` float32 [W, N, N] is added to the logits; row b of the batch takes ``mask[b % W]``."""
        width = x.shape[-1]
        dense = partial(
            Dense, kernel_init=matrix_init(self.weight_init), bias_init=nn.initializers.zeros, dtype=self.dtype
        )
        qkv = tap("qkv.out", dense(3 * width, use_bias=self.qkv_bias, name="qkv")(tap("qkv", x)))
        q, k, v = split_heads(qkv, self.num_heads)
        scale = (width // self.num_heads) ** -0.5
        # The factor on q and not on the logits: a whole pass over [B, H, N, N] less.
        q = tap("q", q) * scale if self.window is None else tap("q", q * scale)
        k, v = tap("k", k), tap("v", v)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        logits = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=wide)
        if self.window is not None:
            logits = logits + self._position_bias().astype(wide)
        if mask is not None:
            windows = logits.reshape(-1, len(mask), *logits.shape[1:])
            logits = (windows + mask[:, None].astype(wide)).reshape(logits.shape)
        attention = tap("softmax", jax.nn.softmax(logits, axis=-1))
        attention = Dropout(self.attention_dropout_rate)(attention, train).astype(self.dtype)
        x = tap("proj", merge_heads(jnp.einsum("bhnm,bhmd->bhnd", attention, v.astype(self.dtype))))
        return tap("out", Dropout(self.dropout_rate)(dense(width, name="proj")(x), train))

    def _position_bias(self) -> jax.Array:
        """[H, N, N]; the name of the parameter is the checkpoints'."""
        name, shape = (
            "relative_position_bias_table",
            ((2 * self.window[0] - 1) * (2 * self.window[1] - 1), self.num_heads),
        )
        if self.has_variable("params", name) and self.get_variable("params", name).shape != shape:
            raise ConfigError(
                f"{name} has shape {self.get_variable('params', name).shape} but this image needs windows of "
                f"{self.window[0]}x{self.window[1]} and a table of shape {shape}; feed images of the size that the "
                "weights were made for, or build the network with shrink_windows=False before making the weights"
            )
        table = self.param(name, truncated_normal(0.02), shape, jnp.float32)
        return table[relative_position_index(self.window)].transpose(2, 0, 1)
