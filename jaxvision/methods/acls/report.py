"""What ACLS adds to the report: how far logits lie apart, how much of the penalty is at work, and pictures of both."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxvision.engine.arms import spread
from jaxvision.engine.calibration_outcome import Added, Row, Run
from jaxvision.engine.report import Figure, Results, Table
from jaxvision.methods.acls.acls import acls_metrics
from jaxvision.metrics.calibration_rows import Rows

LOSS = "acls"
MOST_LINES = 10
PIECE = 1 << 20
"""Logits that are looked at in one call."""
COLUMNS = ("loss", "M", "top logit", "mean logit", "range", "tops beyond M %", "others beyond M %")


def added(run: Run, results: Results, rows: Sequence[Row]) -> Added:
    """The table of logits, and figures; without an ACLS arm the margin is that of the first arm that has one."""
    from jaxvision.methods.acls import figures

    fallback = next((margin for row in rows if (margin := margin_of(row)) is not None), None)
    if fallback is None:
        return Added()
    lines, summary = [], {}
    for row in rows:
        margin = fallback if margin_of(row) is None else margin_of(row)
        numbers = _logits(row, margin)
        lines.append(_line(row, margin, numbers))
        summary |= {f"{row.label}/{name}": float(numbers[name].mean()) for name in ("top_logit", "mean_logit")}
    caption = (
        f"Test rows. M: the loss's margin, or {fallback:g} for losses without one. Tops beyond M: rows whose largest "
        "logit (for reference=min: the range) exceeds M; others beyond M: other logits that are more than M below."
    )
    draw, shown = functools.partial, rows[:MOST_LINES]
    made = [
        Figure("smoothing", draw(figures.smoothing, rows, run.trainers[0].outputs[-1]), SMOOTHING),
        Figure("logits", draw(figures.logits, shown), "Test rows of the first seed; dotted: the margins."),
    ]
    watched = [row for row in rows if row.trainer.recipe.loss == LOSS]
    if watched and results.curve(watched[0].trainer.recipe.text, figures.curve_name("top_active", watched[0]))[0]:
        made.append(Figure("activity", draw(figures.activity, results, watched), "First seed, in training."))
    return Added((Table("Logits", COLUMNS, lines, caption),), tuple(made), summary)


SMOOTHING = (
    "The losses as label smoothing: how much the target of the predicted class (left) is lowered, and those of the "
    "others (right) raised, for a row whose other logits are 0."
)


def hyper_of(row: Row) -> Mapping[str, Any]:
    """The numbers that a row's networks were trained with."""
    return {**row.trainer.recipe.hyper, **row.setting}


def margin_of(row: Row) -> float | None:
    """The margin of a loss on logits (ACLS, MbLS); None where there is none."""
    return float(hyper_of(row)["margin"]) if row.trainer.recipe.loss in (LOSS, "mbls") else None


def _logits(row: Row, margin: float) -> dict[str, np.ndarray]:
    """The means of :func:`acls_metrics` over each network's test rows."""
    reference = hyper_of(row).get("reference", "zero")
    each = [logit_means(network.test, margin, reference) for network in row.seeds]
    return {name: np.asarray([values[name] for values in each]) for name in each[0]}


piece_sums = jax.jit(acls_metrics, static_argnames="reference")


def logit_means(rows: Rows, margin: float, reference: str) -> dict[str, float]:
    """The means of :func:`acls_metrics` over rows that come block by block.

    Pieces of one size, the last of a block filled up: one program, though blocks of pixels are of any size.
    """
    size = max(1, PIECE // rows.num_classes)
    sums: dict[str, np.ndarray] = {}
    for logits, _ in rows.blocks():
        for start in range(0, len(logits), size):
            piece = logits[start : start + size]
            real = np.arange(size) < len(piece)
            piece = np.pad(piece, ((0, size - len(piece)), (0, 0)))
            found = jax.device_get(piece_sums(piece, margin=margin, reference=reference, where=real))
            for name, mean in found.items():
                # float64: a data set has more pixels than float32 can count.
                sums[name] = sums.get(name, np.zeros(2)) + np.asarray([mean.total, mean.count], np.float64)
    return {name: float(total / count) for name, (total, count) in sums.items()}


def _line(row: Row, margin: float, numbers: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    return (
        row.label,
        "-" if margin_of(row) is None else f"{margin:g}",
        spread(numbers["top_logit"], digits=2),
        spread(numbers["mean_logit"], digits=2),
        spread(numbers["logit_range"], digits=2),
        spread(numbers["top_active"], scale=100),
        spread(numbers["rest_active"], scale=100),
    )
