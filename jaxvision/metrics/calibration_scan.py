"""Measures a whole set of logits on the host: block by block, in bounded memory, float64 sums, several threads.

    rows = Rows.of(logits, labels)
    measured = measure(rows)
    measured.values["ece"], measured.values["nll"], ...

Memory: a few blocks, 60 bytes a row while the confidences are sorted, 48 in the result; of a million rows of a thousand
classes that is an eightieth of the file. NumPy alone: nothing is compiled and no accelerator is touched.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxvision.core.errors import ConfigError, DataError
from jaxvision.metrics import calibration
from jaxvision.metrics.calibration import NUM_BINS, Bins, Ranked
from jaxvision.metrics.calibration_classes import ClassSums, Entries, class_entries
from jaxvision.metrics.calibration_rows import Rows, in_threads, part_rows


@dataclass(frozen=True)
class Scaling:
    """What is done to logits before the softmax: ``z scale + bias``; temperature scaling is ``scale = 1/T``.

    Attributes:
      scale: number or [K].
      bias: number or [K].
    """

    scale: np.ndarray | float = 1.0
    bias: np.ndarray | float = 0.0

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """In the logits' own precision."""
        if np.all(np.asarray(self.bias) == 0):
            return logits if np.all(np.asarray(self.scale) == 1) else logits * np.asarray(self.scale, logits.dtype)
        return logits * np.asarray(self.scale, logits.dtype) + np.asarray(self.bias, logits.dtype)


UNSCALED = Scaling()


@dataclass(frozen=True)
class Measured:
    """The calibration of a set.

    Attributes:
      values: name -> number: ``accuracy``, ``top5_accuracy`` (K > 5), ``mean_class_accuracy``, ``mean_confidence``,
        ``nll``, ``brier``, the errors of ``calibration.ERRORS``, ``adaptive_ece``, ``classwise_ece``.
      ranked: all confidences in order.
      top: fixed bins of the predicted class.
      adaptive: adaptive bins of it.
      classes: sums over the classes; None without ``classwise``.
      counted: bool [K], the classes that the classwise ECE is the mean of.
      options: ``num_bins`` and ``include_lowest``.
    """

    values: dict[str, float]
    ranked: Ranked
    top: Bins
    adaptive: Bins
    classes: ClassSums | None
    counted: np.ndarray
    options: dict[str, Any]


def measure(
    rows: Rows,
    scaling: Scaling = UNSCALED,
    *,
    num_bins: int = NUM_BINS,
    classwise: bool = True,
    all_classes: bool = False,
    include_lowest: bool = False,
    probabilities: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
) -> Measured:
    """All calibration numbers of a set in one pass.

    Args:
      rows: logits and labels.
      scaling: applied before the softmax. Softmax in float32 (float64 of float64 logits).
      num_bins: n.
      classwise: also the errors class by class; needs n K numbers 36 times.
      all_classes: classwise ECE over all K classes; officially over 0 ... max(label).
      include_lowest: what lies on the lowest edge counts: in the adaptive ECE the least confident row, classwise a
        probability that is exactly 0 (underflow of saturated logits). Officially it is in no bin.
      probabilities: the rows hold probabilities, taken as they are. Without ``scaling``.
      advance: called with the number of rows done.

    Raises:
      DataError: see :meth:`Rows.of`; fewer than two rows; probabilities outside [0, 1] or whose sum isn't 1.
      ConfigError: a scaling of probabilities.
    """
    edges = calibration.fixed_edges(num_bins)
    if probabilities and scaling is not UNSCALED:
        raise ConfigError("probabilities are measured as they are; scale their logarithms instead")
    classes = ClassSums(rows.num_classes, num_bins) if classwise else None
    label_rows = np.zeros((2, rows.num_classes))
    parts: list[np.ndarray] = []
    sums, done = np.zeros(3), 0
    look = _Look(edges, scaling, classwise, probabilities, include_lowest)
    for found in in_threads(look, _parts(rows)):
        parts.append(found.rows)
        sums += found.sums
        label_rows += found.label_rows
        if classes is not None:
            classes.add(found.entries)
        done += len(found.rows)
        advance(done)
    if done < 2:
        raise DataError(f"{rows.name} hold {done} rows that count, but calibration needs at least 2")
    table = np.concatenate(parts)
    parts.clear()
    ranked = Ranked.of(table["confidence"], table["correct"])
    del table
    top = ranked.bins(edges)
    adaptive = ranked.bins(ranked.adaptive_edges(num_bins), include_lowest=include_lowest)
    seen = label_rows[0] > 0
    values = {
        "accuracy": float(ranked.correct.sum() / done),
        **({"top5_accuracy": float(sums[2] / done)} if rows.num_classes > 5 else {}),
        "mean_class_accuracy": float(np.mean(label_rows[1][seen] / label_rows[0][seen])),
        "mean_confidence": float(ranked.confidence.sum() / done),
        "nll": float(sums[0] / done),
        "brier": float(sums[1] / done),
        **{name: float(error(top)) for name, error in calibration.ERRORS.items()},
        "adaptive_ece": float(calibration.ece(adaptive)),
    }
    counted = np.ones(rows.num_classes, bool)
    if not all_classes:
        counted = np.arange(rows.num_classes) <= np.flatnonzero(seen)[-1]
    if classes is not None:
        observed = None if all_classes else label_rows[0]
        values["classwise_ece"] = float(calibration.classwise_ece(classes.bins(), observed))
    options = {"num_bins": num_bins, "include_lowest": include_lowest}
    return Measured(values, ranked, top, adaptive, classes, counted, options)


def batch_averages(batches: Iterable[Rows], **options: Any) -> dict[str, float]:
    """The values of each batch, averaged with its rows as weights: how the official code reports segmentation.

    For parity alone: the errors of a batch are biased by its size, so the result depends on the batch size. Report
    :func:`measure` of all rows. Batches with fewer than two rows that count are left out.
    """
    totals: dict[str, float] = {}
    count = 0
    for batch in batches:
        number = sum(len(labels) for _, labels in batch.blocks())
        if number < 2:
            continue
        for name, value in measure(batch, **options).values.items():
            totals[name] = totals.get(name, 0.0) + number * value
        count += number
    return {name: total / count for name, total in totals.items()}


def _parts(rows: Rows) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    for logits, labels in rows.blocks():
        if len(labels):
            yield logits, labels, rows.name


@dataclass(frozen=True)
class _Found:
    rows: np.ndarray
    sums: np.ndarray
    label_rows: np.ndarray
    entries: list[Entries]


_ROW = np.dtype([("confidence", np.float32), ("correct", np.bool_)])
_ROW64 = np.dtype([("confidence", np.float64), ("correct", np.bool_)])


@dataclass(frozen=True)
class _Look:
    """One block's numbers; runs in a thread."""

    edges: np.ndarray
    scaling: Scaling
    classwise: bool
    probabilities: bool
    include_lowest: bool

    def __call__(self, block: tuple[np.ndarray, np.ndarray, str]) -> _Found:
        logits, labels, name = block
        classes = logits.shape[-1]
        out = np.empty(len(labels), _ROW64 if logits.dtype == np.float64 else _ROW)
        sums, entries, right = np.zeros(3), [], np.zeros(len(labels), bool)
        step = part_rows(classes)
        for start in range(0, len(labels), step):
            part = slice(start, start + step)
            z, y = logits[part], labels[part]
            own = z[np.arange(len(y)), y]
            if self.probabilities:
                p, nll = _given(z, own, name)
                rank = label_rank(z, y, own)
            else:
                z = self.scaling(z)
                own = z[np.arange(len(y)), y]
                rank = label_rank(z, y, own)
                p, nll = softmax(z, own)
            out["confidence"][part], right[part] = p.max(-1), rank == 0
            own_p = p[np.arange(len(y)), y]
            square = p * p
            brier = square.sum(-1) - 2 * own_p + 1
            sums += nll.sum(dtype=np.float64), brier.sum(dtype=np.float64), np.count_nonzero(rank < 5)
            if self.classwise:
                entries.append(class_entries(p, square, y, own_p, self.edges, self.include_lowest))
        out["correct"] = right
        label_rows = np.stack([np.bincount(each, minlength=classes) for each in (labels, labels[right])])
        return _Found(out, sums, label_rows, entries)


def label_rank(z: np.ndarray, labels: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How many classes come before the label; among equals the lower number does. z [b, K] -> int [b]."""
    rank = np.count_nonzero(z > own[:, None], axis=-1)
    tied = np.flatnonzero(np.count_nonzero(z == own[:, None], axis=-1) > 1)
    for row in tied:
        rank[row] += np.count_nonzero(z[row, : labels[row]] == own[row])
    return rank


def softmax(z: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [b, K] and the NLL [b] of the label's logits ``own`` [b]."""
    peak = z.max(-1)
    p = z - peak[:, None]
    np.exp(p, out=p)
    total = p.sum(-1)
    p *= (1 / total)[:, None]
    return p, np.log(total) + (peak - own)


def _given(p: np.ndarray, own: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    wrong = (p < 0).any(-1) | (p > 1.001).any(-1) | (abs(p.sum(-1) - 1) > 1e-2)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"a row of {name} holds no probabilities: its numbers go from {p[row].min():.4g} to {p[row].max():.4g} "
            f"and sum to {p[row].sum():.4g}"
        )
    return np.minimum(p, 1), -np.log(np.maximum(own, np.finfo(p.dtype).tiny))
