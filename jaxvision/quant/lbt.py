"""The weight and input quantizers of low-bit training: symmetric or unsigned codes, one learned interval a tensor.

Source: LBT (arXiv 2407.12637), official code ``models/modules.py``. The quantizer of gradients is in ``gradient.py``.
"""

from typing import ClassVar

import jax
from jax.typing import ArrayLike

from jaxvision.core import struct
from jaxvision.quant import uniform
from jaxvision.quant.ste import clip, ste_round
from jaxvision.quant.trainable import Trainable, half, largest, magnitude, three_deviations


@struct.dataclass
class LBTWeight(Trainable):
    """``k = round((2^b - 2) clip((w / |s| + 1) / 2, 0, 1)) - L``, ``w_hat = |s| k / L``, with ``L = 2^(b-1) - 1``.

    ``dw = g I`` and ``ds = sign(s) sum(g (k / L - I w / |s|))``, I: not clipped, the edges included. The official code
    writes s for |s| in the product, so its weights change their sign with s; here they don't.

    Attributes:
      scale: s, float32 ().
      bits: width, 2 to 8: codes -L..L, of which one bit would have only 0.
    """

    scale: jax.Array
    bits: ArrayLike

    LEARNED: ClassVar[tuple[str, ...]] = ("scale",)
    MIN_BITS: ClassVar[int] = 2

    @classmethod
    def fit(cls, x: jax.Array, bits: ArrayLike) -> "LBTWeight":
        """The quantizer with s = 3 std(x) (unbiased, over all elements)."""
        return cls(three_deviations(x), bits).check_width()

    def float_codes(self, x: jax.Array) -> jax.Array:
        """See :class:`Trainable`."""
        top = half(self.bits, x.dtype) - 1
        return ste_round(2 * top * clip((uniform.divide(x, magnitude(self.scale)) + 1) / 2, 0, 1)) - top

    def step(self, x: jax.Array | None = None) -> jax.Array:
        """|s| / L."""
        scale = magnitude(self.scale)
        return uniform.divide(scale, half(self.bits, scale.dtype) - 1)


@struct.dataclass
class LBTActivation(Trainable):
    """``k = round(n clip(x / |u|, 0, 1))``, ``x_hat = |u| k / n``, ``n = 2^b - 1``, for inputs after a ReLU.

    Signed (inputs that can be negative, as linear bottlenecks' outputs): ``k = round(2 L clip((x + |u|) / (2 |u|), 0,
    1)) - L``, ``x_hat = |u| k / L``, ``L = 2^(b-1) - 1``. Gradients as in :class:`LBTWeight`. The official code
    takes the signed form where the first batch has a negative value; here it is a setting.

    Attributes:
      scale: u, float32 ().
      bits: width, 1 to 8; signed from 2.
      signed: see above.
    """

    scale: jax.Array
    bits: ArrayLike
    signed: bool = struct.field(pytree_node=False, default=False)

    LEARNED: ClassVar[tuple[str, ...]] = ("scale",)

    @classmethod
    def fit(cls, x: jax.Array, bits: ArrayLike, *, signed: bool = False) -> "LBTActivation":
        """The quantizer with u = 3 std(x) / sqrt(1 - 2 / pi), or 3 std(x) where signed."""
        return cls(three_deviations(x, half_normal=not signed), bits, signed).check_width()

    def width_range(self) -> tuple[int, int]:
        """1 or, signed, 2 to 8."""
        return 1 + self.signed, self.MAX_BITS

    def float_codes(self, x: jax.Array) -> jax.Array:
        """See :class:`Trainable`."""
        scale = magnitude(self.scale)
        if self.signed:
            top = half(self.bits, x.dtype) - 1
            return ste_round(2 * top * clip(uniform.divide(x + scale, 2 * scale), 0, 1)) - top
        return ste_round(largest(self.bits, x.dtype) * clip(uniform.divide(x, scale), 0, 1))

    def step(self, x: jax.Array | None = None) -> jax.Array:
        """|u| / n, or |u| / L where signed."""
        scale = magnitude(self.scale)
        top = half(self.bits, scale.dtype) - 1 if self.signed else largest(self.bits, scale.dtype)
        return uniform.divide(scale, top)
