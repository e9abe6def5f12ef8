"""Segmentation metrics from one confusion matrix of the whole set, kept as integer sums.

metric = Confusion.of(jnp.argmax(logits, -1), batch["label_map"], num_classes, batch["mask"])
numbers = metric.merge(other).compute()
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import struct

_HALF = 16
_EPS = 1e-10


@struct.dataclass
class Confusion:
    """Pixels by true class (row) and predicted class (column).

    Counts are exact up to 2^47: each is kept as two halves, as an int32 would be full after a few thousand large
    images, and a float32 stops counting at 2^24.

    Attributes:
      low, high: int32 [K, K], the count is ``low + 65536 high``.
      wrong: int32 (), pixels whose label is neither a class nor ignored.
    """

    low: jax.Array
    high: jax.Array
    wrong: jax.Array

    @classmethod
    def of(
        cls,
        predictions: jax.Array,
        labels: jax.Array,
        num_classes: int,
        mask: jax.Array | None = None,
        *,
        ignore: int = 255,
    ) -> "Confusion":
        """The counts of one batch of fewer than 2^31 pixels.

        Args:
          predictions: int [B, H, W] in 0 ... K - 1, the argmax of the logits.
          labels: int [B, H, W]; 0 ... K - 1 or ``ignore``. Any other label makes all numbers NaN.
          num_classes: K.
          mask: [B] or the labels' shape; 1 for what counts. The rest may hold anything.
          ignore: the label of pixels that don't count.
        """
        chex.assert_equal_shape([predictions, labels])
        labels, predictions = labels.astype(jnp.int32), predictions.astype(jnp.int32)
        where = labels != ignore
        if mask is not None:
            mask = jnp.asarray(mask) > 0
            where &= mask.reshape(mask.shape + (1,) * (labels.ndim - mask.ndim))
        known = where & (labels >= 0) & (labels < num_classes)
        cell = jnp.where(known, labels * num_classes + predictions, num_classes**2)
        counts = jnp.zeros(num_classes**2, jnp.int32).at[cell.reshape(-1)].add(1, mode="drop")
        counts = counts.reshape(num_classes, num_classes)
        wrong = jnp.sum(where & ~known, dtype=jnp.int32)
        return cls(counts & (2**_HALF - 1), counts >> _HALF, wrong)

    def merge(self, other: "Confusion") -> "Confusion":
        """The counts of both sets of pixels."""
        return jax.tree.map(jnp.add, self, other)

    def matrix(self) -> np.ndarray:
        """int64 [K, K], on the host; not traceable."""
        return np.asarray(self.low, np.int64) + (np.asarray(self.high, np.int64) << _HALF)

    def compute(self) -> dict[str, np.float64]:
        """:func:`means` over all classes, float64; not traceable. NaN of no pixels and of labels beyond the classes."""
        if np.asarray(self.wrong):
            return dict.fromkeys(means(np.zeros((2, 2), np.int64)), np.float64(np.nan))
        return means(self.matrix())


def class_scores(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """``iou``, ``accuracy``, ``dice`` of each class, float64 [K]; NaN for a class that never is the true one.

      iou = n_cc / (true_c + predicted_c - n_cc),  accuracy = n_cc / true_c,  dice = 2 n_cc / (true_c + predicted_c)

    Args:
      matrix: int [K, K], rows true.
    """
    hits, true, predicted = _sums(matrix)
    seen = true > 0
    parts = {"iou": (hits, true + predicted - hits), "accuracy": (hits, true), "dice": (2 * hits, true + predicted)}
    return {
        name: np.divide(above, below, out=np.full(len(true), np.nan), where=seen)
        for name, (above, below) in parts.items()
    }


def means(matrix: np.ndarray) -> dict[str, np.float64]:
    """Numbers in 0 ... 1 of a confusion matrix.

    - ``pixel_accuracy``: the share of pixels that are right.
    - ``mean_accuracy``: mean of the classes' accuracies, over classes that occur in the truth.
    - ``mean_iou``: mean IoU over classes that occur in the truth or in the predictions; one that is only predicted
      counts as 0.
    - ``frequency_iou``: IoU weighted by the classes' true pixels.

    Source: ``sem_seg_evaluation`` of ALIFE (that of detectron2).
    """
    hits, true, predicted = _sums(matrix)
    scores, total = class_scores(matrix), true.sum()
    if not total:
        return dict.fromkeys(("pixel_accuracy", "mean_accuracy", "mean_iou", "frequency_iou"), np.float64(np.nan))
    return {
        "pixel_accuracy": hits.sum() / total,
        "mean_accuracy": np.nanmean(scores["accuracy"]),
        "mean_iou": np.nansum(scores["iou"]) / np.count_nonzero(true + predicted),
        "frequency_iou": np.nansum(scores["iou"] * true) / total,
    }


def foreground_means(matrix: np.ndarray) -> dict[str, np.float64]:
    """``mean_iou``, ``mean_dice``, ``mean_accuracy`` over the classes 1 ... K - 1, absent ones counting as 0.

    Background pixels count in the denominators. This is what the calibration papers report on VOC.

    Source: ``calibrate/evaluation/segment_evaluator.py`` of MbLS and RankMixup (1e-10 in the denominators).
    """
    hits, true, predicted = _sums(matrix)
    parts = {
        "mean_iou": hits / (true + predicted - hits + _EPS),
        "mean_dice": 2 * hits / (true + predicted + _EPS),
        "mean_accuracy": hits / (true + _EPS),
    }
    return {name: values[1:].mean() for name, values in parts.items()}


def _sums(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hits, true and predicted pixels of each class, float64 [K]."""
    matrix = np.asarray(matrix, np.float64)
    return np.diag(matrix), matrix.sum(1), matrix.sum(0)
