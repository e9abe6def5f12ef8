"""What the trainable quantizers share.

A trainable quantizer is a pytree that is called, ``x_hat = q(x)``: the learned arrays that ``LEARNED`` names, the
width ``bits``, then settings that are static. Post-training quantizers (``activation.py``) are called the same way,
with the number of images as well, which is accepted here and plays no part.

    Q.fit(x, bits, **settings)   the quantizer with the start values for x
    q(x)                         x_hat, of the shape and type of x, with straight-through gradients to x and to LEARNED
    q.codes(x)                   int32, exactly the codes of the forward pass
    q.step(x), q.zero()          x_hat = step * (codes - zero), to float rounding

``bits`` is a Python int or an int32 array, traced or not. Where one bit needs a formula of its own a known width
selects it at once and a traced one by ``where``. All arithmetic is in float32 at least. What can be checked is checked
when the quantizer is called: a width out of range, a scale of 0. Under ``jit`` a scale of 0 counts as ``FLOOR``.

Kernels have their output channels last, and so are the arrays of per-channel quantizers: ``(out,)``.
"""

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxvision.core.errors import ConfigError
from jaxvision.quant import uniform

FLOOR = 1e-8
"""The smallest scale."""
HALF_NORMAL = 1 / math.sqrt(1 - 2 / math.pi)
"""A normal variable's standard deviation over that of its absolute value."""


def widened(x: ArrayLike) -> jax.Array:
    """``x`` in float32, or in its own type where that is wider."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def known(value: Any) -> np.ndarray | None:
    """The value where it is known now; None while it is traced or lies on another host."""
    if isinstance(value, jax.core.Tracer) or (isinstance(value, jax.Array) and not value.is_fully_addressable):
        return None
    return np.asarray(value)


def by_bits(bits: ArrayLike, one: Callable[[], jax.Array], more: Callable[[], jax.Array]) -> jax.Array:
    """``one()`` for 1 bit, ``more()`` for others; both must be finite where ``bits`` is traced."""
    width = known(bits)
    if width is None:
        return jnp.where(bits == 1, one(), more())
    return one() if width == 1 else more()


def largest(bits: ArrayLike, dtype: Any) -> jax.Array:
    """2^bits - 1 in a float type."""
    return jnp.asarray(uniform.max_code(bits), dtype)


def half(bits: ArrayLike, dtype: Any) -> jax.Array:
    """2^(bits - 1) in a float type."""
    return jnp.asarray(1 << (bits - 1), dtype)


def magnitude(scale: jax.Array) -> jax.Array:
    """|scale|, at least ``FLOOR``, in float32 or wider: a scale trained to below 0 doesn't mirror the levels."""
    return jnp.maximum(jnp.abs(widened(scale)), FLOOR)


def three_deviations(x: jax.Array, *, half_normal: bool = False) -> jax.Array:
    """3 std(x), unbiased, over all elements: the start value of TRS, LBT and EWGS; float32 ().

    Args:
      x: float of any shape.
      half_normal: for the output of a ReLU, taken as the positive half of a normal: 3 std(x) / sqrt(1 - 2 / pi).
    """
    return 3 * jnp.std(widened(x), ddof=1) * (HALF_NORMAL if half_normal else 1)


def check_positive(kind: str, **values: Any) -> None:
    """Raises ConfigError where one of the named values is known and holds a 0 or something that isn't finite."""
    for name, value in values.items():
        found = known(value)
        if found is not None and not (np.isfinite(found) & (found != 0)).all():
            bad = found[~np.isfinite(found) | (found == 0)].flat[0]
            raise ConfigError(
                f"{kind}.{name}={bad:g} must be finite and not 0; fit it to data that is finite and not all the same"
            )


class Trainable(abc.ABC):
    """The common methods; a subclass writes ``fit``, ``float_codes`` and ``step``.

    Attributes:
      LEARNED: names of the learned fields.
      MIN_BITS, MAX_BITS: the widths that it has codes for.
    """

    LEARNED: ClassVar[tuple[str, ...]] = ()
    MIN_BITS: ClassVar[int] = 1
    MAX_BITS: ClassVar[int] = 8
    bits: ArrayLike

    def __call__(self, x: jax.Array, batch_size: int | None = None) -> jax.Array:
        """x_hat of the shape and type of ``x``; raises ConfigError for a width or scale known to be impossible."""
        del batch_size
        self.check()
        return self.forward(widened(x)).astype(x.dtype)

    def codes(self, x: jax.Array) -> jax.Array:
        """The integer codes of the forward pass, int32 of the shape of ``x``."""
        self.check()
        return self.float_codes(widened(x)).astype(jnp.int32)

    def zero(self) -> ArrayLike:
        """The code that stands for 0."""
        return 0

    @abc.abstractmethod
    def step(self, x: jax.Array | None = None) -> jax.Array:
        """The distance of neighbouring codes, float () or (out,); ``x`` where the step follows the tensor itself."""

    @abc.abstractmethod
    def float_codes(self, x: jax.Array) -> jax.Array:
        """The codes in the float type of ``x``, with straight-through gradients."""

    def forward(self, x: jax.Array) -> jax.Array:
        """x_hat in the float type of ``x``."""
        return self.step(x) * self.float_codes(x)

    def width_range(self) -> tuple[int, int]:
        """The smallest and the largest width."""
        return self.MIN_BITS, self.MAX_BITS

    def check_width(self) -> Self:
        """Itself; raises ConfigError for a width that is known to be out of range."""
        width, (low, high) = known(self.bits), self.width_range()
        if width is not None and not (width.dtype.kind in "iu" and ((width >= low) & (width <= high)).all()):
            allowed = f"{low}" if low == high else f"a whole number from {low} to {high}"
            raise ConfigError(f"{type(self).__name__}: bits={width} must be {allowed}")
        return self

    def check(self) -> None:
        """Raises ConfigError for a width out of range or a scale of 0, where they are known."""
        self.check_width()
        if "scale" in self.LEARNED:
            check_positive(type(self).__name__, scale=self.scale)
