"""DoReFa-Net (Zhou et al. 2016): quantizers of weights, inputs and gradients without learned parameters."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxvision.core import struct
from jaxvision.core.errors import ConfigError
from jaxvision.quant import uniform
from jaxvision.quant.ste import clip, ste_round, straight_through
from jaxvision.quant.trainable import FLOOR, Trainable, by_bits, known, largest, widened


@struct.dataclass
class DoReFaWeight(Trainable):
    """``w_hat = 2 round(n t) / n - 1``, ``t = tanh(w) / (2 max|tanh w|) + 1/2``, ``n = 2^b - 1``.

    One bit: ``w_hat = mean|w| sign(w)``, sign(0) = 1, with the identity as gradient. Codes are the odd ones,
    ``2 round(n t) - n`` in -n..n (8 bits don't fit int8), so that the zero is 0 and the step 1 / n.

    Attributes:
      bits: width, 1 to 8.
      max_gradient: let the gradient pass through max|tanh w| as autodiff does; otherwise the maximum is a constant.
    """

    bits: ArrayLike
    max_gradient: bool = struct.field(pytree_node=False, default=True)

    LEARNED: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def fit(cls, x: jax.Array, bits: ArrayLike, **settings: bool) -> "DoReFaWeight":
        """The quantizer; nothing depends on ``x``."""
        del x
        return cls(bits, **settings).check_width()

    def float_codes(self, x: jax.Array) -> jax.Array:
        """See :class:`Trainable`."""
        n, squashed = largest(self.bits, x.dtype), jnp.tanh(x)
        most = jnp.max(jnp.abs(squashed))
        most = jnp.maximum(most if self.max_gradient else jax.lax.stop_gradient(most), FLOOR)
        return by_bits(
            self.bits,
            lambda: jnp.where(x < 0, jnp.asarray(-1, x.dtype), 1),
            lambda: 2 * ste_round(n * (uniform.divide(squashed, 2 * most) + 0.5)) - n,
        )

    def step(self, x: jax.Array | None = None) -> jax.Array:
        """1 / n, or mean|x| for one bit, which is why a width of 1 or a traced one needs ``x``; else ConfigError."""
        if x is None and ((width := known(self.bits)) is None or width == 1):
            raise ConfigError("the step of DoReFaWeight at one bit is mean|x|: call step(x)")
        dtype = jnp.float32 if x is None else widened(x).dtype
        return by_bits(
            self.bits,
            lambda: jax.lax.stop_gradient(jnp.mean(jnp.abs(widened(x)))),
            lambda: 1 / largest(self.bits, dtype),
        )

    def forward(self, x: jax.Array) -> jax.Array:
        """See :class:`Trainable`."""
        value = self.step(x) * self.float_codes(x)
        return by_bits(self.bits, lambda: straight_through(value, x), lambda: value)


@struct.dataclass
class DoReFaActivation(Trainable):
    """``k = round(n clip(x, 0, 1))``, ``x_hat = k / n``, ``n = 2^b - 1``; ``dx = g`` for 0 <= x <= 1.

    Attributes:
      bits: width, 1 to 8.
    """

    bits: ArrayLike

    LEARNED: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def fit(cls, x: jax.Array, bits: ArrayLike) -> "DoReFaActivation":
        """The quantizer; nothing depends on ``x``."""
        del x
        return cls(bits).check_width()

    def float_codes(self, x: jax.Array) -> jax.Array:
        """See :class:`Trainable`."""
        return ste_round(largest(self.bits, x.dtype) * clip(x, 0, 1))

    def step(self, x: jax.Array | None = None) -> jax.Array:
        """1 / n."""
        return 1 / largest(self.bits, jnp.float32 if x is None else widened(x).dtype)
