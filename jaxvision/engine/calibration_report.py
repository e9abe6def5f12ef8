"""Calibration numbers for people: each beside its interval and what a perfectly calibrated model would score."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxvision.engine import report
from jaxvision.metrics import calibration
from jaxvision.metrics.calibration_noise import SIMULATIONS, Floor, Interval, intervals, noise_floor
from jaxvision.metrics.calibration_rows import Rows
from jaxvision.metrics.calibration_scan import UNSCALED, Measured, Scaling, measure

TITLES = {
    "accuracy": "accuracy (%)",
    "top5_accuracy": "top-5 accuracy (%)",
    "mean_class_accuracy": "mean accuracy of the classes (%)",
    "mean_confidence": "mean confidence (%)",
    "nll": "NLL (nats)",
    "brier": "Brier score",
    "ece": "ECE (%)",
    "adaptive_ece": "adaptive ECE (%)",
    "classwise_ece": "classwise ECE (%)",
    "mce": "MCE (%)",
    "ace": "ACE (%)",
    "rmsce": "RMSCE (%)",
    "overconfidence": "over-confidence OE (%)",
    "underconfidence": "under-confidence UE (%)",
}
"""In the order of the table."""
MOST_KEPT = 1 << 16
"""Entries in which an assessment keeps the confidences: those of all pixels of a data set would be gigabytes each."""


@dataclass(frozen=True)
class Assessment:
    """A measured set with what its errors are worth.

    Attributes:
      measured: the numbers; of large sets ``ranked`` takes neighbours in confidence together.
      floors: what a perfectly calibrated model would score; empty without simulations.
      intervals: 95 % of the errors.
    """

    measured: Measured
    floors: dict[str, Floor]
    intervals: dict[str, Interval]


def assess(
    rows: Rows,
    scaling: Scaling = UNSCALED,
    *,
    simulations: int = SIMULATIONS,
    seed: int = 0,
    **options: Any,
) -> Assessment:
    """Measures a set (options of :func:`~jaxvision.metrics.calibration_scan.measure`) and simulates its noise.

    ``simulations`` is the number of draws of the floor and of resamples of the intervals; 0: neither.
    """
    measured = measure(rows, scaling, **options)
    kept = replace(measured, ranked=measured.ranked.grouped(MOST_KEPT))
    if not simulations:
        return Assessment(kept, {}, {})
    floors = noise_floor(measured, simulations=simulations, seed=seed)
    return Assessment(kept, floors, intervals(measured, floors, resamples=simulations, seed=seed))


def _cell(name: str, value: float) -> str:
    return f"{100 * value:.2f}" if TITLES[name].endswith("(%)") and name != "classwise_ece" else _fine(name, value)


def _fine(name: str, value: float) -> str:
    # Classwise errors are small by construction: most of a class's probabilities are near 0.
    return f"{100 * value:.4f}" if name == "classwise_ece" else f"{value:.4f}"


def table(sets: Mapping[str, Assessment], title: str = "Calibration") -> report.Table:
    """One row a metric; for each set its value with the interval, and the noise floor (mean; 95 % quantile)."""
    columns, rows = ["metric"], []
    for name, assessment in sets.items():
        columns += [name, "calibrated would score"] if assessment.floors else [name]
    first = next(iter(sets.values())).measured
    for metric, heading in TITLES.items():
        if metric not in first.values:
            continue
        cells = [heading]
        for assessment in sets.values():
            value = _cell(metric, assessment.measured.values[metric])
            if interval := assessment.intervals.get(metric):
                value += f" [{_cell(metric, interval.low)}, {_cell(metric, interval.high)}]"
            cells.append(value)
            if assessment.floors:
                floor = assessment.floors.get(metric)
                cells.append(f"{_cell(metric, floor.mean)} (< {_cell(metric, floor.upper)})" if floor else "")
        rows.append(cells)
    caption = ""
    if any(assessment.floors for assessment in sets.values()):
        caption = (
            "In brackets: 95 % interval of the true error, with the upward bias that all binned errors have taken off; "
            "a measured value may lie above it. Calibrated would score: the mean (and the 95 % quantile) of a "
            "perfectly calibrated model with these confidences on this many rows."
        )
    return report.Table(title, tuple(columns), rows, caption)


def averages(values: Mapping[str, float], title: str, caption: str) -> report.Table:
    """Numbers alone, one row a metric."""
    rows = [(heading, _cell(metric, values[metric])) for metric, heading in TITLES.items() if metric in values]
    return report.Table(title, ("metric", "value"), rows, caption)


def as_json(assessment: Assessment) -> dict[str, Any]:
    """The full numbers of :func:`table`, and the reliability diagram's arrays."""
    measured, metrics = assessment.measured, {}
    for name, value in measured.values.items():
        metrics[name] = {"value": value}
        if interval := assessment.intervals.get(name):
            metrics[name] |= {"low": interval.low, "high": interval.high}
        if floor := assessment.floors.get(name):
            metrics[name] |= {"floor_mean": floor.mean, "floor_95": floor.upper, "p_value": floor.p_value}
    bins = measured.top
    diagram = {
        "edges": calibration.fixed_edges(len(bins.count)).tolist(),
        "count": bins.count.tolist(),
        "mean_confidence": _finite(bins.mean_confidence()),
        "accuracy": _finite(bins.accuracy()),
    }
    return {"rows": int(bins.total), "metrics": metrics, "reliability": diagram}


def _finite(values: np.ndarray) -> list[float | None]:
    """JSON knows no NaN: null in an empty bin."""
    return [value if np.isfinite(value) else None for value in values.tolist()]
