"""Telling unknown inputs by their scores: out-of-distribution AUROC."""

import numpy as np

from jaxvision.core.errors import DataError
from jaxvision.metrics.calibration_rows import Rows, in_threads, part_rows
from jaxvision.metrics.calibration_scan import UNSCALED, Scaling, softmax


def auroc(negative: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive scores above a negative, ties counting half (the trapezoid rule).

    Args:
      negative: scores [N].
      positive: scores [M].

    Raises:
      DataError: one of them is empty or not finite.
    """
    negative, positive = np.sort(np.asarray(negative, np.float64)), np.asarray(positive, np.float64)
    for name, scores in (("negative", negative), ("positive", positive)):
        if not scores.size or not np.isfinite(scores).all():
            raise DataError(f"AUROC needs at least one finite {name} score and no other, but got {scores.size}")
    below, up_to = (np.searchsorted(negative, positive, side=side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(negative))


def entropy(p: np.ndarray) -> np.ndarray:
    """``-sum_k p log(p + 1e-10) / log K``; p float [N, K]. High for unknown inputs."""
    return -(p * np.log(p + p.dtype.type(1e-10))).sum(-1) / np.log(p.shape[-1])


def scores(rows: Rows, scaling: Scaling = UNSCALED, *, probabilities: bool = False) -> dict[str, np.ndarray]:
    """``entropy`` and ``confidence`` (largest probability) of every row, float [N]; labels are not looked at."""

    def look(block: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        logits, found = block[0], []
        step = part_rows(logits.shape[-1])
        for start in range(0, len(logits), step):
            z = logits[start : start + step]
            scaled = scaling(z)
            p = z if probabilities else softmax(scaled, scaled[:, 0])[0]
            found.append((entropy(p), p.max(-1)))
        return tuple(np.concatenate(each) for each in zip(*found))

    found = list(in_threads(look, (block for block in rows.blocks() if len(block[1]))))
    if not found:
        raise DataError(f"{rows.name} hold no row")
    return dict(zip(("entropy", "confidence"), (np.concatenate(each) for each in zip(*found))))


def ood_auroc(known: dict[str, np.ndarray], unknown: dict[str, np.ndarray]) -> dict[str, float]:
    """AUROC of telling unknown from known inputs, of :func:`scores` of both.

    Returns:
      ``auroc_entropy``: unknown inputs are the positives, with high entropy; ``auroc_confidence``: known ones are,
      with high confidence.
    """
    return {
        "auroc_entropy": auroc(known["entropy"], unknown["entropy"]),
        "auroc_confidence": auroc(unknown["confidence"], known["confidence"]),
    }
