"""Bins of every class's probability, accumulated on the host.

Most probabilities of a row lie in the lowest bin. They are summed down the columns; only the few above the first edge
are looked at one by one, so that K classes cost little more than the softmax.
"""

from dataclasses import dataclass

import numpy as np

from jaxvision.metrics.calibration import Bins

GROUPS = 32
"""Rows are dealt out to so many groups whose sums are kept apart; resampling the groups gives intervals."""


@dataclass(frozen=True)
class Entries:
    """What a part of the rows adds. ``cell`` is ``class * n + bin``.

    Attributes:
      rows: b.
      bulk: [GROUPS, K], sums of the probabilities in the lowest bin.
      bulk_square: [K], of their squares.
      bulk_count: int [K], how many they are, zeros not counted.
      cell, group, value: of each probability above the first edge.
      label_cell, label_group: of the probability of each row's own label, where it is in a bin.
    """

    rows: int
    bulk: np.ndarray
    bulk_square: np.ndarray
    bulk_count: np.ndarray
    cell: np.ndarray
    group: np.ndarray
    value: np.ndarray
    label_cell: np.ndarray
    label_group: np.ndarray


def class_entries(
    p: np.ndarray,
    square: np.ndarray,
    labels: np.ndarray,
    own: np.ndarray,
    edges: np.ndarray,
    include_lowest: bool = False,
) -> Entries:
    """The entries of some rows' probabilities.

    Args:
      p, square: [b, K], probabilities and their squares; both are used up.
      labels: int [b].
      own: [b], the probability of each label.
      edges: [n + 1].
      include_lowest: a probability of exactly 0 is in the lowest bin; officially it is in none.
    """
    classes, num_bins = p.shape[-1], len(edges) - 1
    positive = np.full(classes, len(p)) if include_lowest or p.min() > 0 else np.count_nonzero(p > 0, axis=0)
    index = np.flatnonzero(p > edges[1])
    value = p.reshape(-1)[index]
    p.reshape(-1)[index] = 0
    square.reshape(-1)[index] = 0
    row, column = np.divmod(index, classes)
    # Right-closed bins.
    cell = column * num_bins + np.searchsorted(edges, value, side="left") - 1
    seen = np.arange(len(own)) if include_lowest else np.flatnonzero(own > 0)
    label_cell = labels[seen] * num_bins + np.maximum(np.searchsorted(edges, own[seen], side="left") - 1, 0)
    if missing := -len(p) % GROUPS:
        p = np.concatenate([p, np.zeros((missing, classes), p.dtype)])
    return Entries(
        len(labels),
        p.reshape(-1, GROUPS * classes).sum(0).reshape(GROUPS, classes),
        square.sum(0),
        positive - np.bincount(column, minlength=classes),
        cell,
        row % GROUPS,
        value.astype(np.float64),
        label_cell,
        seen % GROUPS,
    )


class ClassSums:
    """Sums over the rows for each class and bin, float64.

    Attributes:
      count, confidence, square, correct: [K, n]: rows, sums of p and of p^2, rows with this label.
      difference: [GROUPS, K, n], sums of ``1[y = k] - p_k`` of each group of rows.
      rows: [GROUPS], rows of each group.
    """

    def __init__(self, classes: int, num_bins: int):
        self.count, self.confidence, self.square, self.correct = (np.zeros((classes, num_bins)) for _ in range(4))
        self.difference = np.zeros((GROUPS, classes, num_bins))
        self.rows = np.zeros(GROUPS)

    def add(self, parts: list[Entries]) -> None:
        """Adds what :func:`class_entries` found."""
        size = self.count.size
        flat = self.difference.reshape(-1)
        for part in parts:
            self.rows += np.bincount(np.arange(part.rows) % GROUPS, minlength=GROUPS)
            self.difference[:, :, 0] -= part.bulk
            self.confidence[:, 0] += part.bulk.sum(0, dtype=np.float64)
            self.square[:, 0] += part.bulk_square
            self.count[:, 0] += part.bulk_count
            for sums, values in ((self.count, 1.0), (self.confidence, part.value), (self.square, part.value**2)):
                np.add.at(sums.reshape(-1), part.cell, values)
            np.add.at(self.correct.reshape(-1), part.label_cell, 1.0)
            np.add.at(flat, part.group * size + part.cell, -part.value)
            np.add.at(flat, part.label_group * size + part.label_cell, 1.0)

    def bins(self) -> Bins:
        """The bins [K, n] of all rows."""
        total = np.full(len(self.count), self.rows.sum())
        return Bins(self.count, self.confidence, self.correct, total)
