"""ACLS's pictures. Each function draws one PNG."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxvision.engine.calibration_arms import MONITOR
from jaxvision.engine.calibration_outcome import Row
from jaxvision.engine.report import Results
from jaxvision.losses.calibration import implied_smoothing
from jaxvision.methods.acls import report
from jaxvision.metrics.calibration_rows import Rows

SMOOTHING = ("label_smoothing", "focal", "mbls", "acls")
"""Losses whose rows don't look at each other, as the paper draws them."""
MOST_NUMBERS = 1 << 22
"""Logits of a network whose densities are drawn."""


def smoothing(rows: Sequence[Row], num_classes: int, path: Path) -> None:
    """The implied smoothing of the predicted class and of the others, over the predicted logit."""
    canvas = Figure(figsize=(9.5, 3.8), layout="constrained")
    panels = canvas.subplots(1, 2)
    top = jnp.linspace(0.02, 16.0, 400)
    logits = jnp.zeros((len(top), num_classes)).at[:, 0].set(top)
    labels = jnp.zeros(len(top), jnp.int32)
    for row in [row for row in rows if row.trainer.recipe.loss in SMOOTHING]:
        loss = row.trainer.recipe.spec.bind(None, **report.hyper_of(row))
        f = np.asarray(jax.jit(lambda z, loss=loss: implied_smoothing(loss, z, labels))(logits))
        for axes, values in zip(panels, (f[:, 0], -f[:, 1:].mean(-1))):
            dashed = report.hyper_of(row).get("reference", "zero") == "min"
            axes.plot(top, values, "--" if dashed else "-", lw=1.4, label=row.label)
    for axes, title in zip(panels, ("predicted class: target lowered by", "other classes: targets raised by (mean)")):
        axes.set(xlabel="predicted logit, the others 0", title=title)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    canvas.savefig(path, dpi=120)


def logits(rows: Sequence[Row], path: Path) -> None:
    """Densities of the largest logit, and of how far the others lie below it."""
    canvas = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = canvas.subplots(1, 2)
    networks = [row.seeds[0] for row in rows]
    samples = (sampled(each.test, int(each.before.measured.top.total)) for each in networks)
    sorted_logits = [np.sort(sample, -1) for sample in samples]
    for axes, name, bins in ((left, "top", 24), (right, "gap", 32)):
        values = [z[:, -1] if name == "top" else (z[:, -1:] - z[:, :-1]).reshape(-1) for z in sorted_logits]
        edges = np.linspace(min(map(np.min, values)), max(map(np.max, values)), bins + 1)
        for row, each in zip(rows, values):
            density, _ = np.histogram(each, edges, density=True)
            axes.plot((edges[1:] + edges[:-1]) / 2, density, lw=1.3, label=row.label)
        for margin in {report.margin_of(row) for row in rows} - {None}:
            axes.axvline(margin, color="0.3", ls=":", lw=1)
    left.set(xlabel="largest logit", ylabel="density")
    right.set(xlabel="largest logit - each other logit")
    left.legend(fontsize=7)
    canvas.savefig(path, dpi=120)


def sampled(rows: Rows, count: int) -> np.ndarray:
    """Of ``count`` rows each so manieth, from all blocks: float [n, K], at most ``MOST_NUMBERS`` numbers."""
    step = -(-count * rows.num_classes // MOST_NUMBERS)
    found, first = [], 0
    for logits, _ in rows.blocks():
        found.append(logits[-first % step :: step].copy())  # a view would keep the block
        first += len(logits)
    return np.concatenate(found)


def curve_name(quantity: str, row: Row) -> str:
    """The name in the log of a row's quantity, first seed."""
    return f"{MONITOR}/{quantity}_{row.places[0]}"


def activity(results: Results, rows: Sequence[Row], path: Path) -> None:
    """How much of the penalty is at work over the steps of the training."""
    canvas = Figure(figsize=(10.5, 3.4), layout="constrained")
    left, right = canvas.subplots(1, 2)
    for row in rows:
        for axes, quantity in ((left, "top_active"), (right, "rest_active")):
            steps, values = results.curve(row.trainer.recipe.text, curve_name(quantity, row))
            axes.plot([step - row.trainer.offset for step in steps], 100 * np.asarray(values), label=row.label)
    left.set(xlabel="step", ylabel="%", title="rows whose largest logit is beyond the margin")
    right.set(xlabel="step", title="other logits beyond the margin")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    canvas.legend(*left.get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    canvas.savefig(path, dpi=120)
