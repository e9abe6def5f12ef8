"""What the blocks of all vision transformers share beside attention: perceptron, normalisation, initial values."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core.errors import unknown
from jaxvision.core.types import Tap, no_tap
from jaxvision.models.layers import Dense, Dropout, Initializer, fans

INITS = ("timm", "fan_in")


def truncated_normal(std: float) -> Initializer:
    """``N(0, std^2)`` cut off at +-2 in absolute value, as PyTorch's ``trunc_normal_`` does (not at 2 std).

    Beyond 5 std the cut is moved in: float32 can't tell the tail's probability from 0.
    """
    cut = min(2.0 / std, 5.0)
    return lambda key, shape, dtype=jnp.float32: std * jax.random.truncated_normal(key, -cut, cut, shape, dtype)


def matrix_init(init: str) -> Initializer:
    """The initial kernel [..., in, out] of a linear layer.

    Args:
      init: ``"timm"``: truncated normal of std 0.02. ``"fan_in"``: truncated normal of std ``1 / sqrt(fan_in)``, which
        suits small networks trained from scratch.

    Raises:
      ConfigError: another ``init``.
    """
    if init == "timm":
        return truncated_normal(0.02)
    if init == "fan_in":
        return lambda key, shape, dtype=jnp.float32: truncated_normal(1 / math.sqrt(fans(shape)[0]))(key, shape, dtype)
    raise unknown("weight_init", init, INITS)


def layer_norm(eps: float, dtype: Any, name: str) -> nn.LayerNorm:
    """PyTorch's LayerNorm: two passes in float32, or in the input's dtype where that is wider; output of ``dtype``."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


def normalise(x: jax.Array, name: str, eps: float, dtype: Any, tap: Tap) -> jax.Array:
    """:func:`layer_norm` of [..., D] as the submodule ``name`` of the calling module. Taps: ``name``, ``name.out``."""
    return tap(f"{name}.out", layer_norm(eps, dtype, name)(tap(name, x)))


def classify(x: jax.Array, name: str, num_classes: int, weight_init: str, dtype: Any, tap: Tap) -> jax.Array:
    """Logits [B, num_classes], float32 or wider, of [B, D]: the submodule ``name``. Taps: ``name``, ``name.out``."""
    zeros = nn.initializers.zeros
    head = Dense(num_classes, kernel_init=matrix_init(weight_init), bias_init=zeros, dtype=dtype, name=name)
    logits = head(tap(name, x))
    return tap(f"{name}.out", logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, ``x / 2 (1 + erf(x / sqrt(2)))``, inside in float32 or wider: any shape, dtype of ``x``.

    PyTorch's formula. ``jax.nn.gelu(approximate=False)`` writes ``erfc`` instead, which takes XLA's CPU backend
    2.5 times as long (3.8 ms against 1.6 ms on one core for the hidden layer of a DeiT-S with 8 images).
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


class Mlp(nn.Module):
    """``fc2(gelu(fc1 x))`` with the exact (erf) GELU: [B, ..., D] -> [B, ..., D], dtype ``dtype``.

    Taps: ``fc1``, ``fc2`` (inputs of the two layers, [B, ..., D] and [B, ..., hidden]), ``fc1.out``, ``gelu.out``,
    ``out``. Dropout after GELU and after fc2, as in timm.
    """

    hidden: int
    dropout_rate: float = 0.0
    weight_init: str = "timm"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        kernel_init, zeros = matrix_init(self.weight_init), nn.initializers.zeros
        width = x.shape[-1]
        x = Dense(self.hidden, kernel_init=kernel_init, bias_init=zeros, dtype=self.dtype, name="fc1")(tap("fc1", x))
        x = tap("gelu.out", gelu(tap("fc1.out", x)))
        x = tap("fc2", Dropout(self.dropout_rate)(x, train))
        x = Dense(width, kernel_init=kernel_init, bias_init=zeros, dtype=self.dtype, name="fc2")(x)
        return tap("out", Dropout(self.dropout_rate)(x, train))
