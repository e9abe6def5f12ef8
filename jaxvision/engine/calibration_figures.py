"""Pictures of calibration: reliability diagrams, histograms of confidences, sweeps over a margin. One PNG each."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxvision.metrics import calibration
from jaxvision.metrics.calibration import Bins

_COLUMNS = 4


def _panels(number: int, height: float) -> tuple[Figure, np.ndarray]:
    columns = min(number, _COLUMNS)
    rows = -(-number // columns)
    canvas = Figure(figsize=(3.7 * columns, height * rows), layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False, sharey=True).reshape(-1)
    for unused in axes[number:]:
        unused.set_visible(False)
    return canvas, axes


def _host(bins: Bins) -> Bins:
    return Bins(*(np.asarray(each, np.float64) for each in (bins.count, bins.confidence, bins.correct, bins.total)))


def reliability(sets: Mapping[str, Bins], path: Path, *, edges: np.ndarray | None = None) -> None:
    """Accuracy against confidence, one panel a set.

    Bars: the accuracy of each bin; red: the gap to its mean confidence (dots). Grey band: where the accuracy of a
    perfectly calibrated model lies in 95 % of draws of so many rows, so that a gap inside it means nothing.

    Args:
      sets: title -> bins of the predicted class [n].
      path: of the PNG.
      edges: [n + 1]; absent: fixed bins.
    """
    canvas, axes = _panels(len(sets), 4.0)
    for panel, (title, bins) in zip(axes, sets.items()):
        _reliability(panel, _host(bins), calibration.fixed_edges(len(bins.count)) if edges is None else edges)
        panel.set_title(f"{title}\nECE {100 * float(calibration.ece(_host(bins))):.2f} %", fontsize=10)
    axes[0].set_ylabel("accuracy")
    axes[0].legend(loc="upper left", fontsize=7, framealpha=0.9)
    canvas.savefig(path, dpi=120)


def _reliability(axes: Axes, bins: Bins, edges: np.ndarray) -> None:
    full = bins.count > 0
    left, width = edges[:-1][full], np.diff(edges)[full]
    confidence, accuracy = bins.mean_confidence()[full], bins.accuracy()[full]
    axes.plot([0, 1], [0, 1], "--", color="0.4", lw=1)
    axes.bar(left, accuracy, width, align="edge", color="tab:blue", alpha=0.75, edgecolor="white", label="accuracy")
    low, high = np.minimum(accuracy, confidence), np.maximum(accuracy, confidence)
    axes.bar(left, high - low, width, low, align="edge", color="tab:red", alpha=0.35, lw=0, label="gap")
    spread = 1.96 * np.sqrt(confidence * (1 - confidence) / bins.count[full])
    band = np.clip([confidence - spread, confidence + spread], 0, 1)
    axes.vlines(left + width / 2, *band, color="0.25", lw=5, alpha=0.35, label="calibrated, 95 %")
    axes.plot(left + width / 2, confidence, "o", color="black", ms=2.5, label="mean confidence")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence")


def histogram(sets: Mapping[str, Bins], path: Path) -> None:
    """How the confidences are spread, with mean confidence (dashed) and accuracy (solid); one panel a set.

    Where the dashed line is to the right of the solid one the model is over-confident.

    Args:
      sets: title -> fixed bins of the predicted class [n].
      path: of the PNG.
    """
    canvas, axes = _panels(len(sets), 2.9)
    for panel, (title, bins) in zip(axes, sets.items()):
        bins = _host(bins)
        edges, total = calibration.fixed_edges(len(bins.count)), float(bins.total)
        panel.bar(edges[:-1], bins.count / total, np.diff(edges), align="edge", color="0.6", edgecolor="white")
        accuracy, confidence = bins.correct.sum() / total, bins.confidence.sum() / total
        panel.axvline(accuracy, color="tab:blue", lw=1.5, label=f"accuracy {100 * accuracy:.1f} %")
        panel.axvline(confidence, color="tab:red", lw=1.5, ls="--", label=f"mean confidence {100 * confidence:.1f} %")
        panel.set(xlim=(0, 1), xlabel="confidence")
        panel.set_title(title, fontsize=10)
        panel.legend(loc="upper left", fontsize=7)
    axes[0].set_ylabel("share of rows")
    # Room for the legend; the panels share their axis.
    axes[0].set_ylim(0, 1.25 * axes[0].get_ylim()[1])
    canvas.savefig(path, dpi=120)


def margin_sweep(
    series: Mapping[str, Mapping[float, Sequence[float]]],
    path: Path,
    *,
    name: str = "ECE (%)",
    references: Mapping[str, Sequence[float]] | None = None,
    floor: float | None = None,
    xlabel: str = "margin",
) -> None:
    """A metric over a margin (or another hyper-parameter): mean and standard deviation over the seeds.

    Args:
      series: line -> {margin: the metric of each seed}.
      path: of the PNG.
      name: of the metric.
      references: methods without a margin: label -> the metric of each seed, drawn as horizontal lines.
      floor: the noise floor; what lies in the grey below it can't be told from perfect calibration.
      xlabel: what is swept.
    """
    canvas = Figure(figsize=(7.4, 3.8), layout="constrained")
    axes = canvas.subplots()
    for index, (label, points) in enumerate(series.items()):
        margins = sorted(points)
        means = [np.mean(points[margin]) for margin in margins]
        spread = [np.std(points[margin], ddof=1) if len(points[margin]) > 1 else 0 for margin in margins]
        axes.errorbar(margins, means, spread, fmt="-o", ms=4, capsize=2, color=f"C{index}", label=label)
    for index, (label, values) in enumerate((references or {}).items(), start=len(series)):
        axes.axhline(float(np.mean(values)), ls=":", color=f"C{index}", label=label)
    if floor is not None:
        axes.axhspan(0, floor, color="0.85", zorder=0, label="noise floor")
    axes.set(xlabel=xlabel, ylabel=name, ylim=(0, None))
    axes.grid(alpha=0.3)
    canvas.legend(fontsize=8, loc="outside right upper")
    canvas.savefig(path, dpi=120)
