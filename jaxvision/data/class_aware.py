"""The order of training examples in which every class comes equally often, whatever its size."""

import threading

import numpy as np

from jaxvision.core import rng
from jaxvision.core.errors import ConfigError
from jaxvision.data.sampler import check_batch_size


class ClassAwareSampler:
    """Maps a position in the infinite stream of training examples to an example's index.

    The classes come in a random cycle; each turn takes the next ``per_class`` examples of the class's own random cycle.
    Both cycles are reshuffled every time they wrap:

      turn, place = divmod(position, per_class);  cycle, slot = divmod(turn, K)
      c = permutation(cycle)[slot];  own, offset = divmod(cycle * per_class + place, n_c)
      index = permutation(c, own)[offset]

    A class has one turn in each cycle, so its examples are counted by the cycles: any position is found without those
    before it. An epoch is ``K max n_c`` examples (so few examples of a tail class come many times); the cycles run over
    the border of epochs and nothing is skipped.

    Args:
      labels: int ``[N]`` in ``0 .. K - 1``.
      num_classes: ``K``.
      batch_size: ``B``, global.
      seed, stream: name the order.
      per_class: examples of a turn.
      drop_remainder: whether the last, incomplete batch of an epoch counts as one of its steps (False) or not.

    Raises:
      ConfigError: for an empty class, a batch size or ``per_class`` below 1, a batch larger than an epoch, or a
        negative seed.

    Source: ``ClassAwareSampler`` of RankMixup (``num_samples_cls=4``), whose shuffles are Python's and not reproduced.
    """

    def __init__(
        self,
        labels: np.ndarray,
        num_classes: int,
        batch_size: int,
        *,
        seed: int,
        stream: str,
        per_class: int = 4,
        drop_remainder: bool = True,
    ):
        check_batch_size(batch_size)
        if seed < 0 or per_class < 1:
            raise ConfigError(
                f"seed={seed}, class_aware={per_class}: use a seed of 0 or more, and 1 example or more a turn"
            )
        self._members = [np.flatnonzero(labels == label) for label in range(num_classes)]
        counts = [len(members) for members in self._members]
        if not min(counts):
            raise ConfigError(
                f"class-aware sampling needs examples of every class, but class {counts.index(0)} has none; "
                "hold out fewer for validation, or sample uniformly (class_aware=0)"
            )
        self.batch_size = batch_size
        self.epoch_size = num_classes * max(counts)
        if batch_size > self.epoch_size:
            raise ConfigError(
                f"batch_size={batch_size} is larger than an epoch of {self.epoch_size} examples; "
                f"use at most {self.epoch_size}"
            )
        self.steps_per_epoch = self.epoch_size // batch_size if drop_remainder else -(-self.epoch_size // batch_size)
        self._per_class = per_class
        self._name = (seed, f"{stream}/class order")
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # class (or -1: the classes) -> its latest cycle
        self._lock = threading.Lock()

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, index) of one position, ``position >= 0``."""
        turn, place = divmod(position, self._per_class)
        cycle, slot = divmod(turn, len(self._members))
        label = int(self._order(-1, cycle)[slot])
        own, offset = divmod(cycle * self._per_class + place, len(self._members[label]))
        return position // self.epoch_size, int(self._order(label, own)[offset])

    def indices(self, step: int) -> np.ndarray:
        """int64 ``[B]``: the examples of the global batch at ``step >= 0``."""
        if step < 0:
            raise IndexError(f"step {step} is negative")
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return np.array([self.locate(position)[1] for position in positions])

    def _order(self, label: int, cycle: int) -> np.ndarray:
        """The permutation of a class's examples, or of the classes, in one of its cycles; the latest is kept."""
        with self._lock:
            kept, order = self._orders.get(label, (-1, np.empty(0, int)))
        if kept != cycle:
            members = self._members[label] if label >= 0 else np.arange(len(self._members))
            order = rng.generator(*self._name, label + 1, cycle).permutation(members)
            with self._lock:
                self._orders[label] = (cycle, order)
        return order
