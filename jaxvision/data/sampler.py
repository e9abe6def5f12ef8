"""The order of training examples: a pure function of (seed, stream, step) with nothing to save."""

import threading

import numpy as np

from jaxvision.core import rng
from jaxvision.core.errors import ConfigError


class Sampler:
    """Maps a position in the infinite stream of training examples to an example's index.

    ``position = step * batch_size + row``; ``epoch, offset = divmod(position, epoch_size)``;
    ``index = permutation(epoch)[offset]``, where each epoch has its own permutation of all ``N`` examples.

    Args:
      num_examples: ``N``.
      batch_size: ``B``, global.
      seed, stream: name the order.
      shuffle: False means the identity as permutation.
      drop_remainder: True: an epoch is ``N // B`` whole batches and the rest of its permutation is skipped.
        False: batches run over the border of epochs, so each example comes exactly once in every ``N`` positions
        (and ``B > N`` is allowed).

    Raises:
      ConfigError: for a batch size below 1 or above ``N`` (with ``drop_remainder``), or a negative seed.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        *,
        seed: int,
        stream: str,
        shuffle: bool = True,
        drop_remainder: bool = True,
    ):
        check_batch_size(batch_size)
        if seed < 0:
            raise ConfigError(f"seed={seed} is negative; use 0 or more")
        if drop_remainder and batch_size > num_examples:
            raise ConfigError(
                f"batch_size={batch_size} is larger than the data set with its {num_examples} examples; "
                f"use a batch_size of at most {num_examples}"
            )
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.steps_per_epoch = num_examples // batch_size if drop_remainder else -(-num_examples // batch_size)
        self.epoch_size = self.steps_per_epoch * batch_size if drop_remainder else num_examples
        self._name = (seed, f"{stream}/order")
        self._shuffle = shuffle
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, index) of one position, ``position >= 0``."""
        epoch, offset = divmod(position, self.epoch_size)
        return epoch, int(self._order(epoch)[offset])

    def indices(self, step: int) -> np.ndarray:
        """int64 ``[B]``: the examples of the global batch at ``step >= 0``."""
        if step < 0:
            raise IndexError(f"step {step} is negative")
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, self.epoch_size)
        parts = [self._order(int(epoch))[offsets[epochs == epoch]] for epoch in range(epochs[0], epochs[-1] + 1)]
        return np.concatenate(parts)

    def _order(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch; the two latest ones are kept, as read-ahead works across the border."""
        with self._lock:
            if epoch not in self._orders:
                if len(self._orders) > 1:
                    del self._orders[next(iter(self._orders))]
                examples = np.arange(self.num_examples)
                order = rng.generator(*self._name, epoch).permutation(examples) if self._shuffle else examples
                self._orders[epoch] = order
            return self._orders[epoch]


def check_batch_size(batch_size: int) -> None:
    """Raises ConfigError unless ``batch_size`` is an integer of at least 1."""
    if not isinstance(batch_size, int | np.integer) or isinstance(batch_size, bool) or batch_size < 1:
        raise ConfigError(f"batch_size={batch_size!r} is not an integer of at least 1; use one")


def shard_rows(batch_size: int, shard_index: int, shard_count: int) -> slice:
    """The rows of a global batch that belong to one shard (host): a contiguous block of ``B / shard_count``.

    Raises:
      ConfigError: if ``shard_count`` doesn't divide ``B``.
      IndexError: if ``shard_index`` isn't in ``0 .. shard_count - 1``.
    """
    if shard_count < 1 or batch_size % shard_count:
        raise ConfigError(
            f"batch_size={batch_size} can't be split evenly over {shard_count} hosts; use a multiple of {shard_count}"
        )
    if not 0 <= shard_index < shard_count:
        raise IndexError(f"shard_index {shard_index} is outside 0..{shard_count - 1}")
    rows = batch_size // shard_count
    return slice(shard_index * rows, (shard_index + 1) * rows)
