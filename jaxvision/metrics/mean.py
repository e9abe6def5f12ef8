"""The running mean from which most metrics are made: a sum and a count."""

import jax
import jax.numpy as jnp

from jaxvision.core import struct


@struct.dataclass
class Mean:
    """A weighted mean kept as its sum and its weight; two of them merge exactly.

    Attributes:
      total: float32 (), the weighted sum of the values.
      count: float32 (), the sum of the weights.
    """

    total: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array | None = None) -> "Mean":
        """The mean of ``values`` (any shape), each with the weight of ``weights`` (same shape; default 1)."""
        values = jnp.asarray(values, jnp.float32)
        weights = jnp.ones_like(values) if weights is None else jnp.asarray(weights, jnp.float32)
        # A padded row may hold anything, NaN included: select, don't multiply.
        return cls(jnp.sum(jnp.where(weights > 0, values * weights, 0.0)), jnp.sum(weights))

    def merge(self, other: "Mean") -> "Mean":
        """The mean over both sets of values."""
        return Mean(self.total + other.total, self.count + other.count)

    def compute(self) -> jax.Array:
        """total / count; NaN when nothing was counted."""
        # On the host too (pmap's sums are NumPy's) nothing counted is NaN without a warning.
        return jnp.divide(self.total, self.count)
