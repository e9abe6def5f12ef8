"""What a search has scored so far, and how it is kept in the state of a run."""

from collections.abc import Sequence

import numpy as np

from jaxvision.methods.az_nas.ranks import Ranks
from jaxvision.methods.az_nas.spaces.space import Architecture


class History:
    """What was scored so far.

    Attributes:
      architectures: int32 [N, *shape], of which the first ``count`` are there.
      scores: float64 [N, columns]; NaN where a proxy had no value.
    """

    def __init__(self, architectures: np.ndarray, scores: np.ndarray, count: int, ranked: Sequence[int]):
        self.architectures, self.scores, self.count = architectures, scores, count
        self._ranked = list(ranked)
        self._ranks: Ranks | None = None

    def add(self, architecture: Architecture, scores: np.ndarray) -> None:
        """The next candidate and its scores [columns]."""
        self.architectures[self.count], self.scores[self.count] = architecture, scores
        if self._ranks is not None:
            self._ranks.add(scores[self._ranked])
        self.count += 1

    def best(self, count: int) -> np.ndarray:
        """The candidates of the largest aggregates, int [count], best first; the earlier where they tie."""
        if self._ranks is None:
            self._ranks = Ranks(self.scores[: self.count, self._ranked], capacity=len(self.scores))
        return np.argsort(-self._ranks.aggregate(), kind="stable")[:count]


def to_bits(scores: np.ndarray) -> np.ndarray:
    """float64 [..., columns] as int32 [..., columns, 2], bit for bit.

    A state holds finite float32 numbers only; scores are NaN and infinite at times, and FLOPs need float64.
    """
    return np.ascontiguousarray(scores, np.float64).view(np.int32).reshape(*scores.shape, 2)


def from_bits(bits: np.ndarray) -> np.ndarray:
    """The inverse of :func:`to_bits`."""
    return np.array(bits, np.int32).view(np.float64)[..., 0]
