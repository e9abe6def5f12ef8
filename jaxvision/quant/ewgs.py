"""Element-wise gradient scaling (Lee et al., CVPR 2021): learned intervals, gradients that know the rounding error.

The outputs are normalised, [-1, 1] for weights and [0, 1] for inputs, and the layer's output gets a learned scale,
``y |c|``, which starts at :func:`output_scale`. Source: official code, ``custom_modules.py``.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxvision.core import struct
from jaxvision.core.errors import ConfigError
from jaxvision.quant import uniform
from jaxvision.quant.ste import clip, ewgs_round
from jaxvision.quant.trainable import FLOOR, Trainable, known, largest, three_deviations, widened

DELTA = 1e-3
MAX_DRAWS = 50
TOLERANCE = 1e-3


class _Interval(Trainable):
    """The common part: ``k = round(n clip((x - l) / (u - l), 0, 1))``."""

    LEARNED: ClassVar[tuple[str, ...]] = ("lower", "upper")

    def check(self) -> None:
        """See :class:`Trainable`; also an empty interval, and a negative delta."""
        super().check()
        kind, lower, upper, delta = type(self).__name__, known(self.lower), known(self.upper), known(self.delta)
        if lower is not None and upper is not None and not (lower < upper).all():
            raise ConfigError(f"{kind}: lower={lower:g} must lie below upper={upper:g}; fit it to data that varies")
        if delta is not None and not (delta >= 0).all():
            raise ConfigError(f"{kind}.delta={delta:g} must be at least 0 (0: the straight-through estimator)")

    def _index(self, x: jax.Array) -> jax.Array:
        lower, n = widened(self.lower), largest(self.bits, x.dtype)
        unit = clip(uniform.divide(x - lower, jnp.maximum(widened(self.upper) - lower, FLOOR)), 0, 1)
        # The error of the rounded code is n times that of the value in [0, 1], which delta is defined for.
        return ewgs_round(n * unit, jnp.asarray(self.delta, x.dtype) / n)

    def step(self, x: jax.Array | None = None) -> jax.Array:
        """1 / n."""
        return 1 / largest(self.bits, jnp.float32 if x is None else widened(x).dtype)


@struct.dataclass
class EWGSWeight(_Interval):
    """``w_hat = 2 k / n - 1``, ``k = round(n clip((w - l) / (u - l), 0, 1))``, ``n = 2^b - 1``.

    Codes are the odd ones, ``2 k - n`` in -n..n (8 bits don't fit int8), so that the zero is 0 and the step 1 / n.
    With g the gradient of k / n and e the rounding error in [0, 1]: ``g (1 + delta sign(g) e)`` goes on, then the clip.

    Attributes:
      lower, upper: l and u, float32 ().
      bits: width, 1 to 8.
      delta: float (), at least 0; a constant for the gradient. 0 is the straight-through estimator.
    """

    lower: jax.Array
    upper: jax.Array
    bits: ArrayLike
    delta: ArrayLike = DELTA

    @classmethod
    def fit(cls, x: jax.Array, bits: ArrayLike, *, delta: ArrayLike = DELTA) -> "EWGSWeight":
        """The quantizer with u = -l = 3 std(x) (unbiased, over all elements)."""
        upper = three_deviations(x)
        return cls(-upper, upper, bits, delta).check_width()

    def float_codes(self, x: jax.Array) -> jax.Array:
        """See :class:`Trainable`."""
        return 2 * self._index(x) - largest(self.bits, x.dtype)


@struct.dataclass
class EWGSActivation(_Interval):
    """``x_hat = k / n``, ``k = round(n clip((x - l) / (u - l), 0, 1))``, ``n = 2^b - 1``.

    Attributes:
      lower, upper: l and u, float32 ().
      bits: width, 1 to 8.
      delta: as in :class:`EWGSWeight`.
    """

    lower: jax.Array
    upper: jax.Array
    bits: ArrayLike
    delta: ArrayLike = DELTA

    @classmethod
    def fit(cls, x: jax.Array, bits: ArrayLike, *, delta: ArrayLike = DELTA) -> "EWGSActivation":
        """The quantizer with u = 3 std(x) / sqrt(1 - 2 / pi) and l = min(x)."""
        lower, upper = jnp.min(widened(x)), three_deviations(x, half_normal=True)
        return cls(lower, upper, bits, delta).check_width()

    def float_codes(self, x: jax.Array) -> jax.Array:
        """See :class:`Trainable`."""
        return self._index(x)


def output_scale(y: jax.Array, y_quantized: jax.Array) -> jax.Array:
    """The start value of a layer's output scale, ``mean|y| / mean|y_quantized|``, float32 ().

    Args:
      y: the output of the float layer, of any shape.
      y_quantized: that of the quantized one, before any scale.
    """
    return jnp.mean(jnp.abs(widened(y))) / jnp.maximum(jnp.mean(jnp.abs(widened(y_quantized))), FLOOR)


def hessian_trace(
    gradient: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    key: jax.Array,
    *,
    max_draws: int = MAX_DRAWS,
    tolerance: float = TOLERANCE,
) -> jax.Array:
    """Hutchinson's estimate of the trace of the Hessian: the mean of ``<v, H v>`` over random signs v; float32 ().

    Args:
      gradient: maps ``x`` to the gradient of the loss there; differentiated in reverse mode once more.
      x: float of any shape.
      key: typed key.
      max_draws: at most so many v.
      tolerance: stop when a draw changes the mean by less than this fraction.

    Returns:
      The estimate. Traceable. Source: PyHessian, as the official code uses it.
    """

    return hessian_traces(gradient, x, key, max_draws=max_draws, tolerance=tolerance)


def hessian_traces(
    gradient: Callable[[Any], Any],
    x: Any,
    key: jax.Array,
    *,
    max_draws: int = MAX_DRAWS,
    tolerance: float = TOLERANCE,
) -> Any:
    """:func:`hessian_trace` of the diagonal block of every leaf of a tree, from the same v: as cheap as one of them.

    The other blocks add noise of mean 0. It stops when a draw changes no leaf's mean by more than the fraction.
    """

    def product(v: Any) -> Any:
        return jax.tree.map(jnp.vdot, v, jax.grad(lambda at: optax.tree.vdot(gradient(at), v))(x))

    def signs(key: jax.Array) -> Any:
        leaves, treedef = jax.tree.flatten(x)
        keys = (jax.random.fold_in(key, index) for index in range(len(leaves)))
        drawn = [jax.random.rademacher(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves)]
        return jax.tree.unflatten(treedef, drawn)

    def draw(state: tuple[Any, ...]) -> tuple[Any, ...]:
        count, mean, _ = state
        sample = product(signs(jax.random.fold_in(key, count)))
        new = jax.tree.map(lambda mean, one: mean + (one - mean) / (count + 1), mean, sample)
        steady = jax.tree.map(lambda a, b: jnp.abs(a - b) / (jnp.abs(b) + 1e-6) < tolerance, new, mean)
        return count + 1, new, jnp.all(jnp.stack(jax.tree.leaves(steady)))

    start = jnp.int32(0), jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), x), jnp.bool_(False)
    return jax.lax.while_loop(lambda state: (state[0] < max_draws) & ~state[2], draw, start)[1]


def curvature_ratio(trace: jax.Array, g: jax.Array) -> jax.Array:
    """``tr(H) / (n 3 std(g))`` of a tensor of n elements with the gradient g; its mean over batches is delta."""
    return trace / np.prod(g.shape) / jnp.maximum(three_deviations(g), FLOOR)


def hutchinson_delta(
    gradient: Callable[[jax.Array, Any], jax.Array], x_hat: jax.Array, batches: Sequence[Any], key: jax.Array
) -> jax.Array:
    """EWGS's delta from the curvature of the loss: ``max(0, mean over batches of tr(H) / (n 3 std(g)))``, float32 ().

    Args:
      gradient: maps (x_hat, batch) to g, the gradient of the loss with respect to the rounded values in [0, 1].
      x_hat: those values of one layer, n elements.
      batches: of the training data; the official code takes 3.
      key: typed key.

    Returns:
      delta. Source: EWGS section 3.3; the official code renews it every 10 epochs (CIFAR) or each epoch (ImageNet).
    """
    if not batches:
        raise ConfigError("hutchinson_delta got no batch; give at least one")
    ratios = []
    for index, batch in enumerate(batches):
        g = gradient(x_hat, batch)
        trace = hessian_trace(lambda at, b=batch: gradient(at, b), x_hat, jax.random.fold_in(key, index))
        ratios.append(curvature_ratio(trace, g))
    return jnp.maximum(jnp.mean(jnp.stack(ratios)), 0.0)
