"""Parameterized clipping activation (Choi et al. 2018); its weights are quantized as in DoReFa."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxvision.core import struct
from jaxvision.quant import uniform
from jaxvision.quant.ste import straight_through
from jaxvision.quant.trainable import Trainable, check_positive, largest, magnitude, widened


@struct.dataclass
class PACT(Trainable):
    """``y = clip(x, 0, a)``, ``k = round(y n / a)``, ``x_hat = a k / n``, with ``n = 2^b - 1``.

    ``dx = g [0 <= x < a]``, ``da = sum(g [x >= a])``: the rounding error has no part in it. PACT adds L2 decay on a
    to the loss; give the optimizer's group of this parameter a weight decay.

    Attributes:
      alpha: a, float32 (); a negative one counts as -a.
      bits: width, 1 to 8.
    """

    alpha: jax.Array
    bits: ArrayLike

    LEARNED: ClassVar[tuple[str, ...]] = ("alpha",)

    @classmethod
    def fit(cls, x: jax.Array, bits: ArrayLike) -> "PACT":
        """The quantizer with a = max(x): nothing is clipped at the start (the paper starts at a constant, 10)."""
        return cls(jnp.max(widened(x)), bits).check_width()

    def check(self) -> None:
        """See :class:`Trainable`."""
        super().check()
        check_positive("PACT", alpha=self.alpha)

    def _clipped(self, x: jax.Array) -> jax.Array:
        alpha = magnitude(self.alpha)
        return jnp.where(x < 0, 0, jnp.where(x < alpha, x, alpha))

    def float_codes(self, x: jax.Array) -> jax.Array:
        """See :class:`Trainable`; without a gradient."""
        scaled = self._clipped(x) * largest(self.bits, x.dtype)
        return jax.lax.stop_gradient(jnp.round(uniform.divide(scaled, magnitude(self.alpha))))

    def step(self, x: jax.Array | None = None) -> jax.Array:
        """|a| / n."""
        alpha = magnitude(self.alpha)
        return uniform.divide(alpha, largest(self.bits, alpha.dtype))

    def forward(self, x: jax.Array) -> jax.Array:
        """See :class:`Trainable`."""
        hard = self.step() * self.float_codes(x)
        return straight_through(hard, self._clipped(x).astype(hard.dtype))
