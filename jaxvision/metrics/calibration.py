"""Calibration errors: confidences against how often they were right, bin by bin.

Everything here is a function of :class:`Bins`, sums that merge by addition, so that a number never depends on how the
data was cut into batches. The functions take NumPy arrays (float64 on the host) and JAX arrays (traceable) alike and
keep leading axes: bins ``[..., n]`` give errors ``[...]``. Definitions follow the evaluation code that the published
tables were made with (of FLSD, MbLS, ACLS and RankMixup); the corrected variants are options.

Beside them: ``calibration_sums`` (the ECE in the engine's evaluation), ``calibration_rows`` and
``calibration_scan`` (a whole file of logits on the host), ``calibration_noise`` (what a calibrated model would score;
intervals), ``calibration_scaling`` (temperature), ``calibration_overlap``
(rows that are fitted on and reported), ``calibration_ood`` (out-of-distribution AUROC).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from jaxvision.core import struct
from jaxvision.core.errors import ConfigError

Array = jax.Array | np.ndarray

NUM_BINS = 15
"""What the published numbers use."""


def fixed_edges(num_bins: int = NUM_BINS) -> np.ndarray:
    """``0 = e_0 < ... < e_n = 1`` in equal steps, float32 [n + 1], bit for bit PyTorch's ``linspace``.

    Raises:
      ConfigError: fewer than one bin.
    """
    if num_bins < 1:
        raise ConfigError(f"num_bins={num_bins}, but there must be at least 1 bin")
    # PyTorch counts from both ends, with one rounding for product and sum.
    i = np.arange(num_bins + 1)
    step = float(np.float32(1) / np.float32(num_bins))
    return np.where(i < (num_bins + 1) // 2, step * i, 1 - step * (num_bins - i)).astype(np.float32)


@struct.dataclass
class Bins:
    """Sums over the rows whose confidence r lies in ``(e_b, e_{b+1}]``; arrays [..., n].

    Attributes:
      count: rows.
      confidence: sum of r.
      correct: rows whose prediction is right.
      total: [...], all rows, those outside every bin included.
    """

    count: Array
    confidence: Array
    correct: Array
    total: Array

    def merge(self, other: "Bins") -> "Bins":
        """The bins (of the same edges) of both sets of rows."""
        return jax.tree.map(lambda a, b: a + b, self, other)

    def mean_confidence(self) -> Array:
        """Mean r of each bin; NaN where it is empty."""
        return self._mean(self.confidence)

    def accuracy(self) -> Array:
        """Share of right predictions of each bin; NaN where it is empty."""
        return self._mean(self.correct)

    def gap(self) -> Array:
        """``accuracy - mean confidence`` of each bin; 0 where it is empty."""
        xp = _namespace(self.count)
        return (self.correct - self.confidence) / xp.where(self.count > 0, self.count, 1)

    def weight(self) -> Array:
        """``|B| / N``."""
        return self.count / self.rows()[..., None]

    def rows(self) -> Array:
        """N, or NaN for 0, so that the errors of nothing are NaN."""
        xp = _namespace(self.count)
        return xp.where(self.total > 0, self.total, xp.nan)

    def _mean(self, sums: Array) -> Array:
        xp = _namespace(self.count)
        return xp.where(self.count > 0, sums / xp.where(self.count > 0, self.count, 1), xp.nan)


def _namespace(array: Array) -> Any:
    """numpy or jax.numpy."""
    return array.__array_namespace__()


# --- errors of bins --------------------------------------------------------------------------------------------------


def ece(bins: Bins) -> Array:
    """Expected calibration error ``sum_b |B_b|/N |acc_b - conf_b|``; of adaptive bins the adaptive one (AECE)."""
    return (abs(bins.gap()) * bins.weight()).sum(-1)


def mce(bins: Bins) -> Array:
    """Maximum calibration error ``max_b |acc_b - conf_b|``."""
    return abs(bins.gap()).max(-1)


def ace(bins: Bins) -> Array:
    """Average calibration error: the mean of ``|acc_b - conf_b|`` over the bins that hold a row."""
    return abs(bins.gap()).sum(-1) / (bins.count > 0).sum(-1)


def rmsce(bins: Bins) -> Array:
    """Root mean square calibration error ``sqrt(sum_b |B_b|/N (acc_b - conf_b)^2)``."""
    return ((bins.gap() ** 2 * bins.weight()).sum(-1)) ** 0.5


def overconfidence(bins: Bins) -> Array:
    """``sum_b |B_b|/N conf_b max(conf_b - acc_b, 0)`` (OE)."""
    return _one_sided(bins, -bins.gap())


def underconfidence(bins: Bins) -> Array:
    """``sum_b |B_b|/N conf_b max(acc_b - conf_b, 0)`` (UE)."""
    return _one_sided(bins, bins.gap())


def _one_sided(bins: Bins, gap: Array) -> Array:
    xp = _namespace(gap)
    return (xp.maximum(gap, 0) * bins.confidence).sum(-1) / bins.rows()


def classwise_ece(classes: Bins, labels_seen: Array | None = None) -> Array:
    """Classwise ECE: the plain mean over classes k of the ECE of ``p_k`` against ``1[y = k]``.

    Args:
      classes: bins [..., K, n] of the probabilities of each class; ``correct`` counts ``y = k``.
      labels_seen: how often each label occurs, [..., K]. Given: the mean over the classes 0 ... max(label) alone, as
        the official code does; absent (the corrected one): over all K.
    """
    each = ece(classes)
    if labels_seen is None:
        return each.mean(-1)
    xp = _namespace(each)
    # A class counts if it or a later one occurs.
    counted = xp.flip(xp.cumsum(xp.flip(labels_seen, -1), -1), -1) > 0
    number = counted.sum(-1)
    return xp.where(counted, each, 0).sum(-1) / xp.where(number > 0, number, xp.nan)


ERRORS: dict[str, Callable[[Bins], Array]] = {
    "ece": ece,
    "mce": mce,
    "ace": ace,
    "rmsce": rmsce,
    "overconfidence": overconfidence,
    "underconfidence": underconfidence,
}
"""The errors that the bins of the top label give."""


# --- a whole set of confidences, in order ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranked:
    """All confidences of a set in ascending order, float64 on the host; adaptive bins need them all.

    Equal or neighbouring rows may be one entry (:meth:`grouped`).

    Attributes:
      confidence: [M], ascending, the mean of the entry's rows.
      count: [M], rows of the entry; any weights >= 0 for a resampled set.
      correct: [M], right ones among them.
    """

    confidence: np.ndarray
    count: np.ndarray
    correct: np.ndarray

    @classmethod
    def of(cls, confidence: np.ndarray, correct: np.ndarray) -> "Ranked":
        """From confidences [N] in any order and whether each prediction is right [N]."""
        order = np.argsort(confidence, kind="stable")
        ordered = np.asarray(confidence)[order].astype(np.float64)
        return cls(ordered, np.ones(len(order)), np.asarray(correct)[order].astype(np.float64))

    def grouped(self, entries: int, *boundaries: np.ndarray) -> "Ranked":
        """About ``entries`` entries of neighbours at most; none crosses one of the ``boundaries`` (positions)."""
        if len(self.count) <= entries:
            return self
        step = -(-len(self.count) // entries)
        starts = np.unique(np.concatenate([np.arange(0, len(self.count), step), *boundaries]).astype(np.int64))
        starts = starts[starts < len(self.count)]
        count, correct = np.add.reduceat(self.count, starts), np.add.reduceat(self.correct, starts)
        return Ranked(np.add.reduceat(self.confidence * self.count, starts) / count, count, correct)

    def positions(self, edges: np.ndarray) -> np.ndarray:
        """How many entries are <= each edge, int [n + 1]: bin b is the entries ``[positions[b], positions[b+1])``."""
        return np.searchsorted(self.confidence, np.asarray(edges, np.float64), side="right")

    def adaptive_edges(self, num_bins: int = NUM_BINS) -> np.ndarray:
        """Edges with equally many rows between them, [n + 1]: sorted confidences interpolated at ``b N / n``.

        As officially: positions beyond the last row give the largest confidence, so ``e_0 = min r, e_n = max r``.
        """
        cumulative = self._cumulative[0][1:]
        total = round(float(cumulative[-1]))
        place = np.minimum(np.linspace(0, total, num_bins + 1), total - 1)
        low = np.floor(place)
        below, above = (self._value(cumulative, i) for i in (low, np.minimum(low + 1, total - 1)))
        return below + (place - low) * (above - below)

    def _value(self, cumulative: np.ndarray, position: np.ndarray) -> np.ndarray:
        """The confidence of the row at these places of the sorted rows."""
        return self.confidence[np.searchsorted(cumulative, position, side="right")]

    def bins(self, edges: np.ndarray, *, include_lowest: bool = False) -> Bins:
        """The bins between ``edges`` [n + 1].

        Args:
          edges: :func:`fixed_edges` or :meth:`adaptive_edges`.
          include_lowest: False: rows equal to ``e_0`` are in no bin, as officially (of adaptive bins these are the
            least confident rows); True: they are in the first.
        """
        positions = self.positions(edges)
        if include_lowest:
            positions[0] = np.searchsorted(self.confidence, np.float64(edges[0]), side="left")
        return self.between(positions)

    def between(self, positions: np.ndarray) -> Bins:
        """The bins whose borders are the given positions, int [n + 1]."""
        sums = (np.diff(each[positions]) for each in self._cumulative)
        return Bins(*sums, total=np.float64(self._cumulative[0][-1]))

    @cached_property
    def _cumulative(self) -> np.ndarray:
        """[3, M + 1]: rows, sum of confidences and right ones before each entry."""
        out = np.zeros((3, len(self.count) + 1))
        for row, values in zip(out, (self.count, self.confidence * self.count, self.correct)):
            np.cumsum(values, out=row[1:])
        return out
