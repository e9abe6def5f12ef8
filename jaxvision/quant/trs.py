"""The quantizers that transition-rate scheduling is trained with: fixed-point output, one scale a tensor.

The scale only normalises the input: the output lies in [-1, 1) (weights) or [0, 1) (inputs), multiples of 2^(1-b) or
2^-b. So a normalisation must follow the layer, or a learned scale of its output.

Source: TRS (arXiv 2404.19248) equation 13, and the official code's ``QConv``.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxvision.core import struct
from jaxvision.quant import uniform
from jaxvision.quant.ste import clip, ste_round
from jaxvision.quant.trainable import Trainable, by_bits, half, largest, magnitude, three_deviations

EPSILON = 1e-6


def _normalised(x: jax.Array, scale: jax.Array) -> jax.Array:
    return uniform.divide(x, magnitude(scale) + EPSILON)


def _signed_codes(unit: jax.Array, bits: ArrayLike, symmetric: bool) -> jax.Array:
    levels = half(bits, unit.dtype)
    return by_bits(
        bits,
        lambda: 2 * ste_round((clip(unit, -1, 1) + 1) / 2) - 1,
        lambda: ste_round(clip(levels * unit, symmetric - levels, levels - 1)),
    )


@struct.dataclass
class TRSWeight(Trainable):
    """``k = round(clip(2^(b-1) w / (|s| + 1e-6), -2^(b-1), 2^(b-1) - 1))``, ``w_hat = k / 2^(b-1)``.

    One bit: ``k = 2 round((clip(w / (|s| + 1e-6), -1, 1) + 1) / 2) - 1``, so a weight of 0 gives -1. The gradients are
    those of the clipped quotient; what is clipped adds nothing to the gradient of s (there is no post-scale).
    With TRS s stays at its start value 3 std(w); the plain optimizers learn it.

    Attributes:
      scale: s, float32 ().
      bits: width, 1 to 8.
      symmetric: leave out the code -2^(b-1), from 2 bits on.
    """

    scale: jax.Array
    bits: ArrayLike
    symmetric: bool = struct.field(pytree_node=False, default=False)

    LEARNED: ClassVar[tuple[str, ...]] = ("scale",)

    @classmethod
    def fit(cls, x: jax.Array, bits: ArrayLike, **settings: bool) -> "TRSWeight":
        """The quantizer with s = 3 std(x) (unbiased, over all elements)."""
        return cls(three_deviations(x), bits, **settings).check_width()

    def float_codes(self, x: jax.Array) -> jax.Array:
        """See :class:`Trainable`."""
        return _signed_codes(_normalised(x, self.scale), self.bits, self.symmetric)

    def step(self, x: jax.Array | None = None) -> jax.Array:
        """2^(1-b), whatever the scale is."""
        return 1 / half(self.bits, jnp.float32)

    def mean_distance_to_transition(self, x: jax.Array) -> jax.Array:
        """The mean distance of the clipped weights to the next point where their code changes, in steps; float32 ().

        ``mean(0.5 - |v - k|)`` from 2 bits on, ``mean(1 - |t - k'|)`` with t and k' in [0, 1] for one bit (official
        code's diagnostic). ``x``: the latent weights, float of any shape.
        """
        unit, levels = _normalised(x, self.scale), half(self.bits, jnp.float32)

        def distance(value: jax.Array, most: float) -> jax.Array:
            return jnp.mean(most - jnp.abs(value - jnp.round(value)))

        return by_bits(
            self.bits,
            lambda: distance((clip(unit, -1, 1) + 1) / 2, 1.0),
            lambda: distance(clip(levels * unit, self.symmetric - levels, levels - 1), 0.5),
        )


@struct.dataclass
class TRSActivation(Trainable):
    """``k = round(clip(2^b x / (|a| + 1e-6), 0, 2^b - 1))``, ``x_hat = k / 2^b``, for inputs after a ReLU.

    One bit: ``x_hat = k = round(clip(x / (|a| + 1e-6), 0, 1))``. Gradients as in :class:`TRSWeight`.

    Attributes:
      scale: a, float32 ().
      bits: width, 1 to 8.
      signed: inputs that can be negative: the codes of :class:`TRSWeight`.
    """

    scale: jax.Array
    bits: ArrayLike
    signed: bool = struct.field(pytree_node=False, default=False)

    LEARNED: ClassVar[tuple[str, ...]] = ("scale",)

    @classmethod
    def fit(cls, x: jax.Array, bits: ArrayLike, *, signed: bool = False) -> "TRSActivation":
        """The quantizer with a = 3 std(x) / sqrt(1 - 2 / pi), or 3 std(x) where signed."""
        return cls(three_deviations(x, half_normal=not signed), bits, signed).check_width()

    def float_codes(self, x: jax.Array) -> jax.Array:
        """See :class:`Trainable`."""
        unit = _normalised(x, self.scale)
        if self.signed:
            return _signed_codes(unit, self.bits, False)
        top = largest(self.bits, x.dtype)
        return by_bits(
            self.bits,
            lambda: ste_round(clip(unit, 0, 1)),
            lambda: ste_round(clip((top + 1) * unit, 0, top)),
        )

    def step(self, x: jax.Array | None = None) -> jax.Array:
        """2^-b, 1 for one bit; 2^(1-b) where signed."""
        if self.signed:
            return 1 / half(self.bits, jnp.float32)
        return by_bits(self.bits, lambda: jnp.float32(1), lambda: 1 / (largest(self.bits, jnp.float32) + 1))
