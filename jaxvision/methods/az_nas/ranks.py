"""The logarithmic aggregate (``aggregation``) of a growing set of architectures, ranked anew with each one."""

import numpy as np
from scipy.stats import rankdata


class Ranks:
    """Average ranks of a growing set, exact, in O(m) for a new member.

    A new value moves those above it up by 1 and its equals by 1/2, so nothing is sorted again: with 100,000 members
    of four proxies an addition costs about a millisecond.

    Args:
      scores: float64 [m, proxies] of the members so far; what isn't finite ranks last.
      capacity: the most members there will be.
    """

    def __init__(self, scores: np.ndarray, capacity: int):
        members, proxies = scores.shape
        self._values = np.empty((proxies, capacity))
        self._ranks = np.empty((proxies, capacity))
        self._values[:, :members] = _ranked(scores).T
        self._ranks[:, :members] = rankdata(self._values[:, :members], axis=1)
        self.count = members

    def add(self, scores: np.ndarray) -> None:
        """One more member with the scores [proxies]."""
        new = _ranked(scores)[:, None]
        old = self._values[:, : self.count]
        above, equal = old > new, old == new
        self._ranks[:, : self.count] += above + 0.5 * equal
        self._ranks[:, self.count] = self.count + 1 - above.sum(1) - 0.5 * equal.sum(1)
        self._values[:, self.count] = new[:, 0]
        self.count += 1

    def aggregate(self) -> np.ndarray:
        """``sum over proxies of ln(rank / m)`` of each member, float64 [m]."""
        return np.log(self._ranks[:, : self.count] / self.count).sum(0)


def _ranked(scores: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(scores), scores, -np.inf)
