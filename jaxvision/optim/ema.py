"""Exponential moving averages of parameters (and batch statistics), as a pure transformation of a tree."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxvision.core.errors import ConfigError


def init(tree: Any) -> Any:
    """The average before the first update: a copy of ``tree`` (own buffers, so that both may be donated)."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def update(average: Any, tree: Any, decay: float | jax.Array) -> Any:
    """``average <- decay average + (1 - decay) tree`` for floating-point leaves; other leaves take the new value.

    Source: timm ``ModelEmaV2``/``V3``, which average buffers such as batch statistics too.

    Args:
      average: tree of arrays, from :func:`init` or the last update.
      tree: same structure, the values after the optimizer's step.
      decay: float or float32 (), in [0, 1).

    Returns:
      The new average, with the dtypes of ``average``.
    """

    def mix(old, new):
        if not jnp.issubdtype(jnp.result_type(old), jnp.inexact):
            return new
        # The lerp form: exact where both are equal, and no rounding of decay against 1 - decay.
        return (old + (1.0 - decay) * (new - old)).astype(old.dtype)

    return jax.tree.map(mix, average, tree)


def decay_schedule(decay: float, *, warmup: bool = False, gamma: float = 1.0, power: float = 2 / 3) -> optax.Schedule:
    """The decay after ``t`` completed updates: constant, or growing as ``min(decay, 1 - (1 + t / gamma)^-power)``.

    With warm-up the first update (t = 0) has decay 0: the average starts as a copy of the trained values.
    Source: timm ``ModelEmaV3`` (``use_warmup``; its defaults gamma 1, power 2/3).

    Raises:
      ConfigError: decay outside [0, 1), or gamma or power not positive.
    """
    if not 0 <= decay < 1:
        raise ConfigError(f"the EMA's decay is {decay}, but must be at least 0 and below 1")
    if gamma <= 0 or power <= 0:
        raise ConfigError(f"the EMA's gamma and power are {gamma} and {power}, but must be above 0")

    def schedule(step):
        if not warmup:
            return jnp.float32(decay)
        growing = 1.0 - (1.0 + jnp.asarray(step).astype(jnp.float32) / gamma) ** -power
        return jnp.minimum(growing, decay)

    return schedule
