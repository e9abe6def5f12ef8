"""One-bit weights and inputs (XNOR-Net, Bi-Real Net), and ReActNet's learned shifts."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxvision.core import struct
from jaxvision.core.errors import ConfigError
from jaxvision.quant.ste import clip, straight_through
from jaxvision.quant.trainable import Trainable, widened


def sign(x: jax.Array) -> jax.Array:
    """-1 where x < 0, else +1 (also at 0), of the type of ``x``; without a gradient. NaN stays."""
    one = jnp.ones((), x.dtype)
    return jax.lax.stop_gradient(jnp.where(jnp.isnan(x), x, jnp.where(x < 0, -one, one)))


def clipped_sign(x: jax.Array) -> jax.Array:
    """sign(x) whose derivative is 1 for |x| <= 1 and 0 beyond."""
    return straight_through(sign(x), clip(x, -1, 1))


def approx_sign(x: jax.Array) -> jax.Array:
    """sign(x) whose derivative is 2 - 2|x| for |x| < 1 and 0 beyond (Bi-Real Net, section 3.3)."""
    inside = jnp.clip(jax.lax.stop_gradient(jnp.abs(x)), 0, 1)
    return straight_through(sign(x), x * (2 - 2 * inside))


@struct.dataclass
class BinaryWeight(Trainable):
    """``w_hat = mean|w| sign(w)``, the mean over each output channel (last axis) and a constant for the gradient.

    ``dw = g mean|w| [|w| <= 1]``. The step follows the weights: call ``step(w)``. Source: XNOR-Net, equation 6.
    ReActNet's official code leaves the mean out of the gradient: ``dw = g [|w| <= 1]``.

    Attributes:
      bits: 1.
      scaled_gradient: whether the mean is a factor of the gradient.
    """

    bits: ArrayLike = 1
    scaled_gradient: bool = struct.field(default=True, pytree_node=False)

    LEARNED: ClassVar[tuple[str, ...]] = ()
    MAX_BITS: ClassVar[int] = 1

    @classmethod
    def fit(cls, x: jax.Array, bits: ArrayLike = 1, *, scaled_gradient: bool = True) -> "BinaryWeight":
        """The quantizer; nothing depends on ``x``."""
        del x
        return cls(bits, scaled_gradient).check_width()

    def forward(self, x: jax.Array) -> jax.Array:
        """See :class:`Trainable`."""
        value = super().forward(x)
        return value if self.scaled_gradient else straight_through(value, clip(x, -1, 1))

    def float_codes(self, x: jax.Array) -> jax.Array:
        """-1 and +1."""
        return clipped_sign(x)

    def step(self, x: jax.Array | None = None) -> jax.Array:
        """mean|x| over all axes but the last, (out,); raises ConfigError without ``x``."""
        if x is None:
            raise ConfigError("the step of BinaryWeight is mean|x| of each channel: call step(x)")
        wide = widened(x)
        return jax.lax.stop_gradient(jnp.mean(jnp.abs(wide), tuple(range(x.ndim - 1))))


@struct.dataclass
class BinaryActivation(Trainable):
    """``x_hat = sign(x)`` with :func:`approx_sign`'s gradient.

    Attributes:
      bits: 1.
    """

    bits: ArrayLike = 1

    LEARNED: ClassVar[tuple[str, ...]] = ()
    MAX_BITS: ClassVar[int] = 1

    @classmethod
    def fit(cls, x: jax.Array, bits: ArrayLike = 1) -> "BinaryActivation":
        """The quantizer; nothing depends on ``x``."""
        del x
        return cls(bits).check_width()

    def float_codes(self, x: jax.Array) -> jax.Array:
        """-1 and +1."""
        return approx_sign(x)

    def step(self, x: jax.Array | None = None) -> jax.Array:
        """1."""
        return jnp.float32(1)


@struct.dataclass
class RSign(Trainable):
    """ReActNet's sign with a learned threshold for each channel: ``x_hat = sign(x - shift)`` (section 4.2, equation 1).

    Attributes:
      shift: float32 (C,), 0 at the start.
      bits: 1.
    """

    shift: jax.Array
    bits: ArrayLike = 1

    LEARNED: ClassVar[tuple[str, ...]] = ("shift",)
    MAX_BITS: ClassVar[int] = 1

    @classmethod
    def fit(cls, x: jax.Array, bits: ArrayLike = 1) -> "RSign":
        """The quantizer with shift 0 for each index of the last axis of ``x``."""
        return cls(jnp.zeros(x.shape[-1:], widened(x).dtype), bits).check_width()

    def float_codes(self, x: jax.Array) -> jax.Array:
        """-1 and +1."""
        return approx_sign(x - self.shift)

    def step(self, x: jax.Array | None = None) -> jax.Array:
        """1."""
        return jnp.float32(1)


def rprelu(x: jax.Array, shift: ArrayLike, slope: ArrayLike, offset: ArrayLike) -> jax.Array:
    """ReActNet's PReLU with learned shifts: ``y = d if d > 0 else slope d``, plus ``offset``, where d = x - shift.

    Args:
      x: [..., C] float.
      shift, slope, offset: float (C,) or (), learned; ReActNet starts at 0, 0.25, 0.

    Returns:
      Of the shape of ``x``. Source: ReActNet (Liu et al., ECCV 2020), section 4.2, equation 2.
    """
    difference = x - shift
    return jnp.where(difference > 0, difference, slope * difference) + offset
