"""What a comparison reports beside calibration: long-tail groups, mIoU, how well unknown inputs are told apart."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxvision.engine.arms import spread
from jaxvision.engine.report import Table
from jaxvision.metrics import calibration_ood, segmentation
from jaxvision.metrics.calibration_rows import Rows
from jaxvision.metrics.calibration_scan import Scaling
from jaxvision.metrics.long_tail import Groups, group_means

AT_T = "_scaled"
_TITLES = {
    "mean_iou": "mIoU %",
    "mean_dice": "mean Dice %",
    "mean_accuracy": "mean accuracy %",
    "auroc_entropy": "AUROC, entropy %",
    "auroc_confidence": "AUROC, confidence %",
    f"auroc_entropy{AT_T}": "AUROC, entropy at T %",
    f"auroc_confidence{AT_T}": "AUROC, confidence at T %",
}


def confusion(rows: Rows) -> np.ndarray:
    """int64 [K, K], rows true, of rows block by block.

    On the host: where pixels are ignored each block has another length, for which ``segmentation.Confusion`` would be
    compiled anew.
    """
    classes = rows.num_classes
    matrix = np.zeros(classes**2, np.int64)
    for logits, labels in rows.blocks():
        matrix += np.bincount(labels * classes + logits.argmax(-1), minlength=classes**2)
    return matrix.reshape(classes, classes)


def of_groups(rows: Rows, groups: Groups) -> dict[str, float]:
    """The mean accuracy of each group's classes, those without rows left out."""
    return group_means(segmentation.class_scores(confusion(rows))["accuracy"], groups) if groups else {}


def of_pixels(rows: Rows) -> dict[str, float]:
    """``mean_iou``, ``mean_dice``, ``mean_accuracy`` over the classes 1 ... K - 1, as on VOC."""
    return {name: float(value) for name, value in segmentation.foreground_means(confusion(rows)).items()}


def of_unknown(known: Rows, unknown: Rows, scaling: Scaling) -> dict[str, float]:
    """Both AUROCs, before and at the temperature."""
    plain = calibration_ood.ood_auroc(*(calibration_ood.scores(rows) for rows in (known, unknown)))
    scaled = calibration_ood.ood_auroc(*(calibration_ood.scores(rows, scaling) for rows in (known, unknown)))
    return {**plain, **{f"{name}{AT_T}": value for name, value in scaled.items()}}


def table(rows: Mapping[str, Sequence[Mapping[str, float]]], unknown: str) -> Table | None:
    """One line a row of the comparison, from its networks' values; None where there are none.

    Args:
      rows: label -> the values of each seed.
      unknown: the name of the unknown inputs, "" without.
    """
    names = list(next(iter(rows.values()))[0])
    if not names:
        return None
    lines = []
    for label, networks in rows.items():
        values = (np.asarray([network[name] for network in networks]) for name in names)
        lines.append((label, *(spread(each, scale=100) for each in values)))
    columns = ("loss", *(_TITLES.get(name, f"{name} %") for name in names))
    caption = f"AUROC: telling {unknown} from the test images." if unknown else ""
    return Table("Beside calibration", columns, lines, caption)
