"""Several seeds as one run: seeds are a free axis of a pure function.

The leaves of the state (but for ``step``) get a leading seed axis ``[S, ...]``, those of a batch a second one
``[B, S, ...]`` (the first stays the one that is split over devices).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.engine.task import Batch, Metrics, State, TrainData

HOW = ("map", "vmap", "unroll", "call")
"""How members train: see :func:`over`; "call" is :func:`call_seeds`."""


class SeedBatches:
    """The batches of several seeds, stacked as ``[B, S, ...]``."""

    def __init__(self, members: Sequence[TrainData]):
        self._members = tuple(members)
        self.batch_size = members[0].batch_size

    def batch_at(self, step: int, shard_index: int = 0, shard_count: int = 1) -> Batch:
        batches = [member.batch_at(step, shard_index, shard_count) for member in self._members]
        return {name: np.stack([batch[name] for batch in batches], 1) for name in batches[0]}


def init_seeds(init: Callable[[jax.Array], State], seeds: Sequence[int]) -> Callable[[jax.Array], State]:
    """``init`` for every seed: the same state, ``step`` apart, with a leading seed axis."""

    def mapped(key: jax.Array) -> State:
        states = jax.vmap(lambda seed: init(jax.random.fold_in(key, seed)))(jnp.asarray(seeds))
        return states.replace(step=jnp.zeros((), jnp.int32))

    return mapped


def over(function: Callable[[Any], Any], tree: Any, how: str = "map") -> Any:
    """``function`` of each seed's part of a tree with a leading seed axis, the results stacked.

    Args:
      function: traceable.
      tree: leaves [S, ...].
      how: "map" runs them one after the other, "vmap" at once (best on accelerators), "unroll" writes each out in the
        program, which compiles S times as long. Measured on CPU: matrices are fastest under "map", but convolutions run
        five times slower within any loop (XLA gives only those outside of loops to its fast kernels); "vmap" is best
        for small ones, "unroll" for large ones. A single seed never needs a loop.
    """
    count = jax.tree.leaves(tree)[0].shape[0]
    if how == "vmap":
        return jax.vmap(function)(tree)
    if how == "unroll" or count == 1:
        each = [function(member(tree, index)) for index in range(count)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    return jax.lax.map(function, tree)


def step_seeds(
    step: Callable[[State, Batch, jax.Array], tuple[State, Metrics]],
    seeds: Sequence[int],
    *,
    how: str = "map",
    separate: tuple[str, ...] = (),
) -> Callable[[State, Batch, jax.Array], tuple[State, Metrics]]:
    """``step`` for every seed in one program; the metrics are those of all seeds merged.

    Args:
      step: the step of one seed.
      seeds: each one's keys are ``fold_in(key, seed)``.
      how: see :func:`over`.
      separate: metrics whose name starts with one of these are given for each seed, as ``name_0``, ``name_1``, ...
    """

    def mapped(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        def one(arguments: tuple[State, Batch, jax.Array]) -> tuple[State, Metrics]:
            member, rows, seed = arguments
            new, metrics = step(member.replace(step=state.step), rows, jax.random.fold_in(key, seed))
            return new.replace(step=None), metrics

        rows = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), batch)
        members = (state.replace(step=None), rows, jnp.asarray(seeds))
        new, metrics = over(one, members, how)
        return new.replace(step=state.step), _merged(metrics, len(seeds), separate)

    return mapped


def call_seeds(
    step: Callable[[State, Batch, jax.Array], tuple[State, Metrics]],
    seeds: Sequence[int],
    *,
    separate: tuple[str, ...] = (),
) -> Callable[[State, Batch, jax.Array], tuple[State, Metrics]]:
    """As :func:`step_seeds`, to rounding, but one program of one seed is called for each: not to be compiled again.

    For networks whose step fills a CPU: it compiles once, and its convolutions aren't in a loop (see :func:`over`).
    """

    @jax.jit
    def one(tree: tuple[State, Batch], index: jax.Array, step_count: jax.Array, seed: jax.Array, key: jax.Array):
        state, rows = member(tree, index)
        new, metrics = step(state.replace(step=step_count), rows, jax.random.fold_in(key, seed))
        return new.replace(step=None), metrics

    stack = jax.jit(lambda results: jax.tree.map(lambda *leaves: jnp.stack(leaves), *results))

    def called(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        tree = (state.replace(step=None), {name: np.moveaxis(leaf, 1, 0) for name, leaf in batch.items()})
        results = [one(tree, np.int32(index), state.step, np.int32(seed), key) for index, seed in enumerate(seeds)]
        new, metrics = stack(results)
        return new.replace(step=state.step), _merged(metrics, len(seeds), separate)

    return called


def _merged(metrics: Metrics, count: int, separate: tuple[str, ...]) -> Metrics:
    """Sums over the seeds, but for the metrics that are kept apart."""
    merged = {name: jax.tree.map(lambda leaf: leaf.sum(0), each) for name, each in metrics.items()}
    for name in [name for name in metrics if name.startswith(separate)]:
        del merged[name]
        merged.update({f"{name}_{index}": member(metrics[name], index) for index in range(count)})
    return merged


def member(tree: Any, index: int | jax.Array) -> Any:
    """One seed's part of a tree with a leading seed axis."""
    return jax.tree.map(lambda leaf: leaf[index], tree)
