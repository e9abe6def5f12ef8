"""What a comparison ends in: accuracy and loss of each arm and width, what happened to the gradients, figures."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxvision.engine import arms, quantized_files, reestimation
from jaxvision.engine.recipes import Model
from jaxvision.engine.report import Figure, Report, Results, Table
from jaxvision.engine.seeds import member
from jaxvision.methods.lbt import figures
from jaxvision.quant import interval

PROBE = "probe"
"""The evaluation that measures gradients on one training batch at the end of an arm."""
NAMES = {
    "float": "float",
    "wa": "W, A only",
    "fixed": "gamma",
    "dsgc": "DSGC",
    "whole_error": "whole error",
    "piecewise": "piecewise",
    "lbt": "LBT",
}


@dataclass(frozen=True)
class Comparison:
    """What the report knows of the run besides its rows.

    Attributes:
      title: network and data.
      arms: in the order of their stages.
      seeds: of the run.
      bits: widths of gradients.
      alpha: the fraction of gradients whose error is E(G_L).
      steps: of each arm.
      reestimated: batches that the statistics are averaged over before an arm is judged; 0: the running ones are kept.
      choose: the evaluation on which a learning rate is chosen; "test" is the one that is reported.
      images: images of each evaluation.
      warning: of too few elements, or "".
      export: the arm whose network is written, "": none.
      model, family: of the run.
      network: of the arm that is written.
    """

    title: str
    arms: tuple[arms.Arm, ...]
    seeds: tuple[int, ...]
    bits: tuple[int, ...]
    alpha: float
    steps: int
    reestimated: int
    choose: str
    images: Mapping[str, int]
    warning: str
    export: str = ""
    model: Model | None = None
    family: str = ""
    network: Any = None


@dataclass(frozen=True, eq=False)
class Cell:
    """One way to train at one width, with its chosen learning rate.

    Attributes:
      arm, label: name of the stage; the row of the table.
      bits: of the gradients; None: float.
      rate: learning rate.
      alpha: of the target clip ratio.
      members: positions in the arm, one a seed.
      accuracy, loss: float64 [S]: test accuracy; training loss, mean over the last tenth of the steps.
      layers: diagnostic -> layer -> float64 [S]; empty where gradients are float.
    """

    arm: str
    label: str
    bits: int | None
    rate: float
    alpha: float
    members: tuple[int, ...]
    accuracy: np.ndarray
    loss: np.ndarray
    layers: Mapping[str, Mapping[str, np.ndarray]]

    def mean(self, diagnostic: str) -> float:
        """Over layers and seeds."""
        return float(np.mean(list(self.layers[diagnostic].values())))


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


def collect(comparison: Comparison, results: Results) -> list[Cell]:
    """One cell for each arm, setting and width, at the learning rate of the best mean accuracy for choosing."""
    cells = []
    for arm in comparison.arms:
        groups: dict[tuple, dict[float, list[int]]] = {}
        for index, one in enumerate(arm.members(comparison.seeds)):
            setting = dict(one.setting)
            rate = setting.pop("lr")
            groups.setdefault(tuple(setting.items()), {}).setdefault(rate, []).append(index)
        for setting, rates in groups.items():
            judged = reestimation.judged(arm, comparison.reestimated).name
            means = {rate: _last(results, judged, comparison.choose, m).mean() for rate, m in rates.items()}
            cells.append(_cell(comparison, results, arm, dict(setting), rates, max(means, key=means.get)))
    return cells


def _cell(
    comparison: Comparison,
    results: Results,
    way: arms.Arm,
    setting: dict[str, float],
    rates: Mapping[float, list[int]],
    rate: float,
) -> Cell:
    arm, members = way.name, rates[rate]
    curves = [results.curve(arm, f"loss_{index}")[1] for index in members]
    layers: dict[str, dict[str, np.ndarray]] = {}
    row = next((row for row in reversed(results.rows) if (row["stage"], row.get("eval")) == (arm, PROBE)), {})
    for name in row:
        diagnostic, _, rest = name.partition("/")
        if rest and rest.endswith(f"_{members[0]}"):
            layer = rest.removesuffix(f"_{members[0]}")
            layers.setdefault(diagnostic, {})[layer] = np.asarray([row[f"{diagnostic}/{layer}_{i}"] for i in members])
    bits = setting.get("gradient_bits")
    return Cell(
        arm,
        _label(arm, setting),
        None if bits is None else int(bits),
        rate,
        setting.get("alpha", comparison.alpha),
        tuple(members),
        _last(results, reestimation.judged(way, comparison.reestimated).name, "test", members),
        np.asarray([np.mean(curve[-max(1, len(curve) // 10) :]) for curve in curves]),
        layers,
    )


def _label(arm: str, setting: Mapping[str, float]) -> str:
    extra = [f"{value:g}" if name == "gamma" else f"{name} {value:g}"
             for name, value in setting.items() if name in ("gamma", "alpha")]  # fmt: skip
    extra += ["with rate factor"] if setting.get("rate_factor") else []
    return " ".join([NAMES[arm], *extra])


def _last(results: Results, arm: str, evaluation: str, members: Sequence[int]) -> np.ndarray:
    return np.asarray([results.last(arm, evaluation, f"accuracy_{index}") for index in members])


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
        ways = {arm.name: arm for arm in comparison.arms}
        named = {cell: cell.label if cell.bits is None else f"{cell.label} at {cell.bits} bits" for cell in cells}
        rows = {name: (ways[cell.arm], cell.members) for cell, name in named.items()}
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
