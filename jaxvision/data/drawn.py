"""Images that a function draws: lazily, once, and the same on every thread and host."""

import threading
from collections.abc import Callable, Sequence

import numpy as np

from jaxvision.data.sources import Example, stack

_CACHE_BYTES = 512 * 2**20


class DrawnSource:
    """``num_examples`` examples, each drawn when it is first read and kept as long as the cache has room.

    Args:
      num_examples: N.
      draw: ``index -> example``; a pure function of the index.
      class_names: K names.
    """

    in_memory = True  # drawing is Python work that threads don't speed up, and the cache serves all but the first look

    def __init__(self, num_examples: int, draw: Callable[[int], Example], class_names: Sequence[str]):
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names)
        self._num_examples, self._draw = num_examples, draw
        self._cache: dict[int, Example] = {}
        self._room = _CACHE_BYTES
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, index: int) -> Example:
        index = range(self._num_examples)[int(index)]
        example = self._cache.get(index)
        if example is None:
            example = self._draw(index)
            for leaf in example.values():
                if isinstance(leaf, np.ndarray):
                    leaf.flags.writeable = False  # it is shared through the cache
            with self._lock:
                size = sum(leaf.nbytes for leaf in example.values())
                if self._room >= size and index not in self._cache:
                    self._cache[index] = example
                    self._room -= size
        return dict(example)

    def take(self, indices: np.ndarray) -> Example:
        return stack([self[index] for index in np.asarray(indices).tolist()])
