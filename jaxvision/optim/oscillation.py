"""Oscillating weights and what Nagel et al. do about them: measuring, freezing, dampening. Baselines of TRS.

A weight oscillates at step t if its code changes in the direction opposite to its last change. With o^t in {0, 1} that
event, f^t = m o^t + (1 - m) f^(t-1) is its frequency.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022 (sections 3.1, 4.2, 4.3), and
its official code, whose order of operations is kept: a weight freezes at the average of its codes before this step.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.optim import latent

OSCILLATING = 0.005
"""The frequency from which the paper's tables call a weight oscillating."""


class Oscillation(NamedTuple):
    """What is remembered of one tensor of weights; all arrays have its shape.

    Attributes:
      codes: int8, the last codes; those it is held at where a weight is frozen.
      direction: int8, -1 or 1: of the last change of the code; 0 before the first.
      frequency: float32, f.
      average: float32, exponential average of the codes.
      frozen: bool.
    """

    codes: jax.Array
    direction: jax.Array
    frequency: jax.Array
    average: jax.Array
    frozen: jax.Array


def start(codes: jax.Array) -> Oscillation:
    """Nothing has moved yet; the average is ``codes`` (integers of any shape)."""
    return Oscillation(
        codes=codes.astype(jnp.int8),
        direction=jnp.zeros_like(codes, jnp.int8),
        frequency=jnp.zeros_like(codes, jnp.float32),
        average=codes.astype(jnp.float32),
        frozen=jnp.zeros_like(codes, bool),
    )


def track(
    last: Oscillation,
    codes: jax.Array,
    momentum: float = 0.01,
    threshold: float | jax.Array = math.inf,
    *,
    in_place: bool = False,
) -> Oscillation:
    """One step: f <- m o + (1 - m) f; freeze at round(average) where f > threshold; average the codes with the same m.

    Args:
      last: the step before.
      codes: int8, the codes now; those of frozen weights are ignored.
      momentum: m, the weight of the present.
      threshold: frequency above which a weight freezes, for good. The paper: at least 2 to 3 m.
      in_place: freeze only while the code is the rounded average, so that nothing has to be moved.
    """
    codes = jnp.where(last.frozen, last.codes, codes)
    # int8 - int8 may wrap.
    move = jnp.sign(codes.astype(jnp.int32) - last.codes.astype(jnp.int32)).astype(jnp.int8)
    frequency = momentum * (move * last.direction == -1) + (1 - momentum) * last.frequency
    settled = jnp.round(last.average).astype(jnp.int8)
    newly = (frequency > threshold) & ~last.frozen
    if in_place:
        newly &= codes == settled
    return Oscillation(
        codes=jnp.where(newly, settled, codes),
        direction=jnp.where(move == 0, last.direction, move),
        frequency=frequency.astype(jnp.float32),
        average=(momentum * codes + (1 - momentum) * last.average).astype(jnp.float32),
        frozen=last.frozen | newly,
    )


class FreezeState(NamedTuple):
    """State of :func:`freeze_oscillating`: 11 bytes a latent weight.

    Attributes:
      count: int32 (), completed updates.
      weights: tree with the structure of the parameters, an :class:`Oscillation` for each latent tensor.
    """

    count: jax.Array
    weights: Any


def freeze_oscillating(
    code_fn: latent.CodeFn | None = None,
    *,
    threshold: float | optax.Schedule | None,
    momentum: float = 0.01,
    latent_fn: Callable[[jax.Array, Any], jax.Array] | None = None,
    quantizers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Iterative weight freezing: the last of any chain, it overrides the updates of weights that oscillate.

    ``optax.chain(optax.sgd(0.1, 0.9), freeze_oscillating(threshold=0.02))``; behind ``sgdt`` too.

    Args:
      code_fn: as for ``scale_by_transition_rate``; the same ``quantizers`` extra argument feeds both. Codes are
        averaged, so they must lie in -128..127.
      threshold: see :func:`track`; a schedule of the step (the paper anneals it by a cosine), a number, or None:
        only measure.
      momentum: m.
      latent_fn: ``latent_fn(codes, quantizer)`` -> the latent weight in the middle of a code, where frozen weights are
        put at every step, as in the paper; ``lambda codes, q: q.step() * codes`` for LSQ. Needed where scales are
        trained. None: a weight is held where it lies, once its code is the rounded average.
      quantizers: default of the extra argument, as for ``scale_by_transition_rate``.

    Raises:
      ConfigError: momentum or threshold out of range, at once; what ``scale_by_transition_rate`` says of parameters and
        quantizers, when first traced.
    """
    for name, value in (("momentum", momentum), ("threshold", threshold)):
        if isinstance(value, int | float) and not 0 < value < 1:
            raise ConfigError(f"the freezing's {name} is {value}, but must be above 0 and below 1")

    def limit(count):
        return math.inf if threshold is None else threshold(count) if callable(threshold) else threshold

    def init(params):
        latent.latent_weights(params)
        fresh = jax.tree.map(lambda weight: start(jnp.zeros_like(weight, jnp.int8)), params)
        return FreezeState(jnp.zeros((), jnp.int32), fresh)

    def update(updates, state, params=None, *, quantizers=quantizers, **extra):
        del extra
        codes = latent.codes(code_fn, params, quantizers)
        given = [None] * len(codes) if quantizers is None else latent.aligned("quantizers", quantizers, params)
        deltas, treedef = jax.tree.flatten(updates)
        held, after = [], []
        for delta, weight, code, last, quantizer in zip(
            deltas, jax.tree.leaves(params), codes, _tensors(state.weights), given, strict=True
        ):
            last = optax.tree.where(state.count > 0, last, start(code))
            now = track(last, code, momentum, limit(state.count), in_place=latent_fn is None)
            back = 0.0 if latent_fn is None else latent_fn(now.codes.astype(jnp.int32), quantizer) - weight
            held.append(jnp.where(now.frozen, jnp.asarray(back, delta.dtype), delta))
            after.append(now)
        weights = jax.tree.structure(params).unflatten(after)
        return treedef.unflatten(held), FreezeState(optax.safe_increment(state.count), weights)

    return optax.GradientTransformationExtraArgs(init, update)


def oscillation_metrics(opt_state: Any) -> dict[str, jax.Array]:
    """``oscillating/<name>`` and ``frozen/<name>``: fractions of each latent tensor, from any optimizer state.

    Oscillating: a frequency above :data:`OSCILLATING`. Raises ConfigError if there is no :class:`FreezeState`.
    """
    is_state = lambda node: isinstance(node, FreezeState)  # noqa: E731
    states = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    if not states:
        raise ConfigError("this optimizer state has no FreezeState in it; was freeze_oscillating used?")
    metrics = {}
    for state in states:
        for path, weights in jax.tree_util.tree_leaves_with_path(state.weights, is_leaf=_is_tensor):
            name = trees.path_name(path)
            metrics[f"oscillating/{name}"] = jnp.mean(weights.frequency > OSCILLATING, dtype=jnp.float32)
            metrics[f"frozen/{name}"] = jnp.mean(weights.frozen, dtype=jnp.float32)
    return metrics


def dampening_loss(w: jax.Array, w_hat: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """|| sg(w_hat) - clip(w, low, high) ||^2: pulls latent weights to the middle of their bins (section 4.2).

    The gradient goes to ``w`` alone, 2 (clip(w) - w_hat) inside the grid and 0 outside, and never to the scale: its
    range is learned from the task. The paper adds it to the loss with a weight that grows by a cosine.

    Args:
      w: float, latent weights.
      w_hat: the same shape, quantized weights on the scale of ``w``.
      low, high: broadcastable, the ends of the grid.

    Returns:
      float32 () (float64 of float64): summed over all weights.
    """
    dtype = jnp.promote_types(w.dtype, jnp.float32)
    inside = jnp.clip(w.astype(dtype), jax.lax.stop_gradient(low), jax.lax.stop_gradient(high))
    return jnp.sum(jnp.square(jax.lax.stop_gradient(w_hat).astype(dtype) - inside))


def _is_tensor(node: Any) -> bool:
    return isinstance(node, Oscillation)


def _tensors(weights: Any) -> list[Oscillation]:
    return jax.tree.leaves(weights, is_leaf=_is_tensor)
