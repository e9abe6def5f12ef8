"""Evaluation as a fold of sums: every example counted once, for every batch size and device count."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxvision.core import devices
from jaxvision.engine.interrupt import Interrupt
from jaxvision.engine.parallel import Parallel, pad_rows
from jaxvision.engine.task import Batch, EvalData


class Interrupted(Exception):
    """A signal came between the batches of an evaluation."""


@dataclass(frozen=True)
class Interruptible:
    """Evaluation batches that end with :class:`Interrupted` at a signal; several hosts ask at step boundaries only."""

    data: EvalData
    interrupt: Interrupt

    @property
    def num_batches(self) -> int:
        return self.data.num_batches

    @property
    def batch_size(self) -> int:
        return self.data.batch_size

    def batch_at(self, index: int, shard_index: int = 0, shard_count: int = 1) -> Batch:
        if self.interrupt.requested(False):
            raise Interrupted
        return self.data.batch_at(index, shard_index, shard_count)


class Evaluator:
    """Folds ``update(context, batch) -> metrics`` over a data set; compiled once for a structure of context.

    Args:
      update: traceable; returns a dict of pytrees of sums (``metrics.Mean`` and the like) over the rows whose
        ``mask`` is 1. Without side effects.
      parallel: the device mode.
    """

    def __init__(self, update: Callable[[Any, Any], dict[str, Any]], parallel: Parallel):
        self._parallel = parallel
        self._update = update

        def add(context, sums, batch):
            new = devices.sum_over_devices(update(context, batch))
            return jax.tree.map(jnp.add, sums, new)

        self._add = parallel.compile(add, donate=(1,), quickly=True)

    def shapes(self, context: Any, batch: Any) -> dict[str, Any]:
        """The abstract result of one update; runs nothing."""
        return jax.eval_shape(self._update, context, batch)

    def __call__(self, context: Any, data: Any) -> dict[str, Any]:
        """The merged metrics over all batches of ``data``; ``context`` is replicated (``Parallel.replicate``)."""
        parallel, sums = self._parallel, None
        for index in range(data.num_batches):
            batch = data.batch_at(index, parallel.shard_index, parallel.shard_count)
            batch = pad_rows(batch, parallel.num_devices // parallel.shard_count)
            if sums is None:
                shapes = self.shapes(parallel.single(context), batch)
                sums = parallel.replicate(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))
            sums = self._add(context, sums, parallel.place(batch))
        return parallel.single(sums)


def compute(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers of merged metrics: floats; a metric whose ``compute`` gives a dict is spread as ``name/key``."""
    numbers: dict[str, float] = {}
    for name, metric in metrics.items():
        value = jax.tree.map(lambda leaf: jax.device_get(leaf).item(), metric.compute())
        if isinstance(value, dict):
            numbers.update({f"{name}/{key}": number for key, number in value.items()})
        else:
            numbers[name] = value
    return numbers
