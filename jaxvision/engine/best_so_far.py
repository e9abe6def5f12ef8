"""What several trainings were when a score of each was best: an array in the state, so that resuming is exact."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxvision.core import struct


@struct.dataclass
class BestSoFar:
    """Each member's own best.

    Attributes:
      score: float32 [M], the largest so far; 0 before the first.
      step: int32 [M], of the run, at which it was; -1 before the first.
      tree: what the members were then, leaves [M, ...].
    """

    score: jax.Array
    step: jax.Array
    tree: Any

    @classmethod
    def of_none(cls, tree: Any) -> "BestSoFar":
        """Before the first score; ``tree`` gives shapes alone."""
        count = jax.tree.leaves(tree)[0].shape[0]
        # Finite numbers: a checkpoint refuses others.
        return cls(jnp.zeros(count, jnp.float32), jnp.full(count, -1, jnp.int32), jax.tree.map(jnp.zeros_like, tree))

    def after(self, score: jax.Array, step: jax.Array, tree: Any) -> "BestSoFar":
        """With what the members are now, where that is better than before; of equal scores the first stays.

        Args:
          score: float32 [M].
          step: int32 (), of the run.
          tree: leaves [M, ...].
        """
        better = (self.step < 0) | (score > self.score)

        def choose(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(better.reshape(better.shape + (1,) * (jnp.ndim(new) - 1)), new, old)

        return jax.tree.map(choose, BestSoFar(score, jnp.broadcast_to(step, self.step.shape), tree), self)
