"""Batches addressed by their number: training batches as f(seed, step), evaluation batches as f(i).

Two paths give them. A source in memory without an example-level transform is indexed at once (``take``). Any other
source is read example by example through a Grain ``MapDataset`` on threads. A batch-level transform follows either.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxvision.core import rng
from jaxvision.core.errors import ConfigError, DataError
from jaxvision.data.class_aware import ClassAwareSampler
from jaxvision.data.decode import NUM_THREADS, map_threaded
from jaxvision.data.draws import NO_RANDOMNESS, Draws
from jaxvision.data.sampler import Sampler, check_batch_size, shard_rows
from jaxvision.data.sources import Source, Subset, labels_of, stack

Batch = dict[str, np.ndarray]
Transform = Callable[[Batch, Draws], Batch]
ExampleTransform = Callable[[dict[str, Any], np.random.Generator], dict[str, Any]]


class TrainBatches:
    """Shuffled, augmented training batches; a pure function of (seed, step), so resuming needs the step alone.

    Args:
      source: the examples.
      batch_size: ``B``, the global batch over all hosts.
      seed, stream: name the order and the augmentation.
      shuffle: a new permutation every epoch, or the source's order.
      transform: batch-level, ``(batch, draws) -> batch``; see :mod:`jaxvision.data.transforms`.
      example_transform: example-level, ``(example, generator) -> example``, run on the reading threads; the generator
        is keyed by (seed, stream, step, global row). See :mod:`jaxvision.data.augment`.
      drop_remainder: see :class:`jaxvision.data.sampler.Sampler`.
      class_aware: examples that a class gives in its turn, see :class:`jaxvision.data.class_aware.ClassAwareSampler`;
        0: no turns, every example once in an epoch.
      index: adds ``index`` int32 ``[B]``, the example's number in ``source``.
      num_threads: reading threads of this process for sources that decode; 0 or 1 means none.

    Raises:
      ConfigError: for a batch size below 1 or above the number of examples, a negative seed, or ``class_aware`` with
        an empty class, without shuffling, or with a source that doesn't know its labels.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        seed: int,
        stream: str = "train",
        shuffle: bool = True,
        transform: Transform | None = None,
        example_transform: ExampleTransform | None = None,
        drop_remainder: bool = True,
        class_aware: int = 0,
        index: bool = False,
        num_threads: int = NUM_THREADS,
    ):
        self.source = source
        self.batch_size = batch_size
        order = {"seed": seed, "stream": stream, "drop_remainder": drop_remainder}
        if class_aware:
            if not shuffle:
                raise ConfigError(f"class_aware={class_aware} is a random order; leave out shuffle=False")
            labels, classes = labels_of(source), source.num_classes
            self.sampler = ClassAwareSampler(labels, classes, batch_size, per_class=class_aware, **order)
        else:
            self.sampler = Sampler(len(source), batch_size, shuffle=shuffle, **order)
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self._seed, self._stream = seed, stream
        self._transform, self._example_transform = transform, example_transform
        self._num_threads = num_threads
        self._index = index
        self._options = {
            "stream": stream,
            "shuffle": shuffle,
            "drop_remainder": drop_remainder,
            "class_aware": class_aware,
            "index": index,
        }
        # The stream has no end; Grain wants a length.
        self._examples = _map_dataset(source, example_transform, self._example, 2**62)

    def batch_at(self, step: int, shard_index: int = 0, shard_count: int = 1) -> Batch:
        """This shard's rows ``[B / shard_count, ...]`` of the global batch at ``step``.

        The shards, concatenated, are exactly the batch of ``shard_count=1``, augmentation included.
        """
        rows = shard_rows(self.batch_size, shard_index, shard_count)
        indices = self.sampler.indices(step)[rows]
        if self._examples is None:
            batch = self.source.take(indices)
        else:
            start = step * self.batch_size
            positions = range(start + rows.start, start + rows.stop)
            batch = stack(map_threaded(self._examples.__getitem__, positions, self._num_threads))
        if self._index:
            batch = _with_index(batch, indices)
        if self._transform is not None:
            batch = self._transform(batch, Draws(self._seed, self._stream, step, self.batch_size, rows))
        return batch

    def with_seed(self, seed: int) -> "TrainBatches":
        """The same examples in another order, under other augmentation."""
        return TrainBatches(
            self.source,
            self.batch_size,
            seed=seed,
            transform=self._transform,
            example_transform=self._example_transform,
            num_threads=self._num_threads,
            **self._options,
        )

    def _example(self, position: int) -> dict[str, Any]:
        _, index = self.sampler.locate(position)
        example = self.source[index]
        if self._example_transform is not None:
            step, row = divmod(position, self.batch_size)
            generator = rng.generator(self._seed, f"{self._stream}/example", step, row)
            example = self._example_transform(example, generator)
        return example


class EvalBatches:
    """All examples once, in order, in batches of one size; the padding of the last batch has ``mask`` 0.

    Args:
      source: the examples.
      batch_size: ``B``, the global batch over all hosts.
      transform: batch-level and deterministic, ``(batch, _) -> batch``.
      example_transform: example-level and deterministic, ``(example, _) -> example``.
      index: adds ``index`` int32 ``[B]``, the example's number in ``source``; the padding has row 0's.
      num_threads: reading threads of this process for sources that decode; 0 or 1 means none.

    Raises:
      ConfigError: for a batch size below 1; from ``batch_at`` if a transform asks for random numbers.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        transform: Transform | None = None,
        example_transform: ExampleTransform | None = None,
        index: bool = False,
        num_threads: int = NUM_THREADS,
    ):
        check_batch_size(batch_size)
        self.source = source
        self.batch_size = batch_size
        self.num_examples = len(source)
        if not self.num_examples:
            raise DataError("the evaluation data set holds no examples; give at least one")
        self.num_batches = -(-self.num_examples // batch_size)
        self._transform, self._example_transform = transform, example_transform
        self._num_threads = num_threads
        self._index = index
        self._examples = _map_dataset(source, example_transform, self._example, self.num_examples)

    def batch_at(self, i: int, shard_index: int = 0, shard_count: int = 1) -> Batch:
        """This shard's rows of batch ``i``, with ``mask`` float32: 1 for an example, 0 for padding.

        Padding repeats the global batch's row 0.
        """
        if not 0 <= i < self.num_batches:
            raise IndexError(f"evaluation batch {i} is outside 0..{self.num_batches - 1}")
        first = i * self.batch_size
        indices = np.arange(first, first + self.batch_size)[shard_rows(self.batch_size, shard_index, shard_count)]
        real = indices < self.num_examples
        indices = np.where(real, indices, first)
        if self._examples is None:
            batch = dict(self.source.take(indices))
        else:
            once, inverse = np.unique(indices, return_inverse=True)  # decode the padding's example once
            batch = stack(map_threaded(self._examples.__getitem__, once.tolist(), self._num_threads))
            batch = {name: leaf[inverse] for name, leaf in batch.items()}
        if "mask" in batch:
            raise DataError("the source has a leaf 'mask', the name of the padding mask; rename it (label_map)")
        if self._index:
            batch = _with_index(batch, indices)
        if self._transform is not None:
            batch = self._transform(batch, NO_RANDOMNESS)
        batch["mask"] = real.astype(np.float32)
        return batch

    def subset(self, indices: np.ndarray, batch_size: int) -> "EvalBatches":
        """Some of the examples, in the order of ``indices``, under the same transforms."""
        return EvalBatches(
            Subset(self.source, indices),
            batch_size,
            transform=self._transform,
            example_transform=self._example_transform,
            index=self._index,
            num_threads=self._num_threads,
        )

    def _example(self, index: int) -> dict[str, Any]:
        example = self.source[index]
        return example if self._example_transform is None else self._example_transform(example, NO_RANDOMNESS)


def _with_index(batch: Batch, indices: np.ndarray) -> Batch:
    if "index" in batch:
        raise DataError("the source has a leaf 'index', the name of the example's number; rename it")
    return {**batch, "index": indices.astype(np.int32)}


def _map_dataset(source: Source, example_transform: ExampleTransform | None, read: Callable, length: int):
    """A ``grain.MapDataset`` of ``read(position)``, or None where the source can be indexed at once.

    Grain's random access is single-threaded (its threads belong to iterators, which can't start at any step for
    free), so the callers spread ``dataset[i]`` over threads of their own.
    """
    if example_transform is None and getattr(source, "in_memory", False):
        return None
    import grain  # here, because the import takes a second that in-memory runs needn't pay

    return grain.MapDataset.range(length).map(read)
