"""What a comparison ends in: accuracy and loss of each arm and width, what happened to the gradients, figures."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxvision.engine import arms, quantized_files, reestimation
from jaxvision.engine.report import Figure, Report, Results, Table
from jaxvision.engine.seeds import member
from jaxvision.methods.lbt import figures
from jaxvision.methods.lbt.outcome import PROBE, Cell, Comparison, collect
from jaxvision.quant import interval


def make(comparison: Comparison, results: Results) -> Report:
    """The report of a finished run."""
    cells = collect(comparison, results)
    tables = [_outcome(comparison, cells)]
    if any(cell.layers for cell in cells):
        tables.append(_gradients(comparison, cells))
    summary = {}
    for cell in cells:
        key = f"{cell.label}/{'float' if cell.bits is None else f'G{cell.bits}'}"
        summary |= {f"{key}/accuracy": float(cell.accuracy.mean()), f"{key}/loss": float(cell.loss.mean())}
    return Report(
        f"LBT: {comparison.title}, {len(comparison.seeds)} seed(s), {comparison.steps} steps an arm",
        tuple(tables),
        _figures(comparison, results, cells),
        summary,
        _notes(comparison, results, cells),
        _files(comparison, results, cells),
    )


def _files(comparison: Comparison, results: Results, cells: Sequence[Cell]) -> dict[str, Callable[[Path], None]]:
    """The network of the first seed of the exported arm, of its first width and setting at their chosen rate."""
    if not comparison.export:
        return {}
    left = arms.kept(results.state, comparison.arms[-1])[comparison.export]
    index = next(cell for cell in cells if cell.arm == comparison.export).members[0]
    kept = (comparison.model, comparison.family, comparison.network, member(left, index))
    return {
        quantized_files.WEIGHTS: functools.partial(quantized_files.save_quantized, *kept),
        quantized_files.INTEGERS: functools.partial(quantized_files.save_integers, *kept),
    }


def _outcome(comparison: Comparison, cells: Sequence[Cell]) -> Table:
    widths = list(dict.fromkeys(cell.bits for cell in cells))
    widths = [width for width in (None, *comparison.bits) if width in widths]
    several = len({cell.rate for cell in cells}) > 1
    columns = ["arm"]
    for width in widths:
        name = "float G" if width is None else f"{width}-bit G"
        columns += [f"{name}: accuracy %", "loss", *(["rate"] if several else [])]
    rows = []
    for label in dict.fromkeys(cell.label for cell in cells):
        row = [label]
        for width in widths:
            cell = next((cell for cell in cells if (cell.label, cell.bits) == (label, width)), None)
            if cell is None:
                row += ["-"] * (3 if several else 2)
                continue
            row += [arms.spread(cell.accuracy, scale=100), arms.spread(cell.loss, digits=3)]
            row += [f"{cell.rate:g}"] if several else []
        rows.append(row)
    caption = (
        f"Mean ± standard deviation over {len(comparison.seeds)} seed(s): accuracy on {comparison.images['test']} test "
        "images after the last step; training loss (nats), mean over the last tenth of the steps."
    )
    if several:
        caption += f" Each entry at its own best rate on {comparison.images[comparison.choose]} held-out images."
    return Table("Accuracy and training loss", tuple(columns), rows, caption)


def _gradients(comparison: Comparison, cells: Sequence[Cell]) -> Table:
    rows = []
    for width in comparison.bits:
        for cell in cells:
            if cell.bits != width or not cell.layers:
                continue
            by_layer = [values.mean() for values in cell.layers["gamma"].values()]
            target = float(interval.target_ratio(cell.alpha, width))
            piecewise = cell.arm == "piecewise"
            rows.append(
                (
                    f"{width}-bit, {cell.label}",
                    "-" if piecewise else f"{np.mean(by_layer):.2f}",
                    "-" if piecewise else f"{min(by_layer):.2f} - {max(by_layer):.2f}",
                    "-" if piecewise else f"{1e6 * cell.mean('ratio'):.0f}",
                    f"{1e6 * target:.0f}" if cell.arm == "lbt" else "-",
                    f"{cell.mean('error'):.4f}",
                    f"{cell.mean('large_error'):.3f}",
                )
            )
    caption = (
        f"After the last step, on one training batch of {comparison.images[PROBE]} images, mean over layers and seeds. "
        "R: gradients beyond gamma gmax, in a million; target alpha / (2^b - 1). E: mean |Q(g) - g| / gmax, rounded to "
        f"nearest, over all gradients and over the {comparison.alpha:g} of them that are largest."
    )
    columns = ("gradients", "gamma", "least - most in a layer", "R", "target R", "E(G)", "E(G_L)")
    return Table("Gradients", columns, rows, caption)


def _notes(comparison: Comparison, results: Results, cells: Sequence[Cell]) -> tuple[str, ...]:
    notes = ["An arm's first batch only starts its intervals and gamma; no optimizer step is taken on that pass."]
    if comparison.reestimated:
        bits = {cell: "" if cell.bits is None else f" at {cell.bits} bits" for cell in cells}
        rows = {f"{cell.label}{bits[cell]}": (cell.arm, cell.members) for cell in cells}
        notes.append(reestimation.note(results, rows, "accuracy", "test", comparison.reestimated))
    return (*notes, f"Too few elements: {comparison.warning}.") if comparison.warning else tuple(notes)


def _figures(comparison: Comparison, results: Results, cells: Sequence[Cell]) -> tuple[Figure, ...]:
    curves = {
        cell: [results.curve(cell.arm, f"loss_{index}")[1] for index in cell.members]
        for cell in cells
        if cell.bits in (None, min(comparison.bits))
    }
    steps = results.curve(comparison.arms[0].name, f"loss_{cells[0].members[0]}")[0]
    made = [
        Figure(
            "loss",
            functools.partial(figures.losses, steps, {cell.label: lines for cell, lines in curves.items()}),
            f"Training loss, mean over seeds; gradients of {min(comparison.bits)} bits.",
        )
    ]
    controlled = [cell for cell in cells if cell.layers]
    if not controlled:
        return tuple(made)
    made.append(
        Figure(
            "errors",
            functools.partial(figures.errors, [cell for cell in controlled if cell.bits == min(comparison.bits)]),
            f"Errors of {min(comparison.bits)}-bit gradients of each layer after the last step, mean over seeds.",
        )
    )
    if len(comparison.bits) > 1:
        made.append(
            Figure(
                "accuracy",
                functools.partial(figures.accuracies, cells),
                "Test accuracy against the width of gradients, mean and standard deviation over seeds.",
            )
        )
    moving = [cell for cell in controlled if results.curve(cell.arm, _gamma(cell, 0))[0]]
    arm = next((cell.label for cell in moving if cell.arm == "lbt"), moving[0].label if moving else None)
    if arm:
        shown = [cell for cell in moving if cell.label == arm]
        lines = {
            cell: {
                layer: np.mean([results.curve(cell.arm, f"gamma/{layer}_{i}")[1] for i in cell.members], 0)
                for layer in cell.layers["gamma"]
            }
            for cell in shown
        }
        where = np.asarray(results.curve(shown[0].arm, _gamma(shown[0], 0))[0])
        offset = [a.name for a in comparison.arms].index(shown[0].arm) * (comparison.steps + comparison.reestimated)
        caption = f"gamma of each layer, {arm}, mean over seeds."
        made.append(Figure("gamma", functools.partial(figures.gammas, where - offset, lines), caption))
    return tuple(made)


def _gamma(cell: Cell, layer: int) -> str:
    return f"gamma/{list(cell.layers['gamma'])[layer]}_{cell.members[0]}"
