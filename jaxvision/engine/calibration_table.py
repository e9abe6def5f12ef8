"""The report of a comparison of calibration losses: its tables and figures, every number as JSON, and the logits."""

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxvision.engine import calibration_extras, calibration_report
from jaxvision.engine.arms import spread
from jaxvision.engine.calibration_outcome import Addition, Row, Run, Trained, arrays, rows
from jaxvision.engine.report import Figure, Report, Results, Table

MOST_PANELS = 12


def make(run: Run, addition: Addition, results: Results) -> Report:
    """The report of a finished run."""
    found = rows(run, results)
    added = addition(run, results, found)
    summary = {}
    for row in found:
        for name in ("accuracy", "ece", "adaptive_ece", "nll"):
            summary[f"{row.label}/{name}"] = float(row.values(name).mean())
        summary[f"{row.label}/ece_scaled"] = float(row.values("ece", scaled=True).mean())
        summary[f"{row.label}/temperature"] = float(row.temperatures.mean())
        for name in row.seeds[0].extras:
            summary[f"{row.label}/{name}"] = float(np.mean([network.extras[name] for network in row.seeds]))
    numbers = {row.label: [_as_json(seed, network) for seed, network in zip(run.seeds, row.seeds)] for row in found}
    files: dict[str, Any] = {"calibration.json": json.dumps(numbers, indent=2, allow_nan=False) + "\n"}
    if run.measuring.save_logits:
        files |= {f"logits_{_file_name(row.label)}.npz": functools.partial(_save_logits, row) for row in found}
    extra = calibration_extras.table(
        {row.label: [network.extras for network in row.seeds] for row in found}, "".join(run.unknown)
    )
    tables = (_table(run, found), *([extra] if extra else []), *added.tables, others(found))
    figures = (*_figures(run, found), *added.figures)
    notes = (*_notes(run, found), *added.notes)
    return Report(run.title, tables, figures, {**summary, **added.summary}, notes, files)


def _as_json(seed: int, network: Trained) -> dict[str, Any]:
    fitted = network.temperature
    return {
        "seed": seed,
        **({} if network.step is None else {"step": network.step}),
        "temperature": {"value": fitted.value, "method": fitted.method, "at_bound": fitted.at_bound},
        "validation_nll": fitted.nll_before,
        **network.extras,
        "before": calibration_report.as_json(network.before),
        "after": calibration_report.as_json(network.after),
    }


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.-]+", "_", label).strip("_")


def _save_logits(row: Row, path: Path) -> None:
    """``logits``, ``labels``, ``val_logits``, ``val_labels`` of the first seed, as ``tools.calibration`` reads them."""
    logits, labels = arrays(row.seeds[0].test)
    val_logits, val_labels = arrays(row.seeds[0].validation)
    np.savez(path, logits=logits, labels=labels, val_logits=val_logits, val_labels=val_labels)


# --- the table -------------------------------------------------------------------------------------------------------

COLUMNS = ("loss", "accuracy %", "ECE %", "adaptive ECE %", "NLL", "T", "ECE at T %", "calibrated would score %")


def _table(run: Run, found: Sequence[Row]) -> Table:
    lines = [_line(row) for row in found]
    what = "pixels" if run.dense else "images"
    count = int(found[0].seeds[0].before.measured.top.total)
    caption = f"{count:,} test {what}, {run.measuring.num_bins} bins, {_networks(run, found)}"
    if len(run.seeds) > 1:
        caption += f"; mean ± standard deviation over {len(run.seeds)} seeds"
    caption += (
        f". T: temperature fitted on {int(found[0].seeds[0].temperature.rows):,} validation {what} "
        f"({run.measuring.temperature})."
    )
    if run.measuring.simulations:
        caption += (
            " In brackets: 95 % interval of the true error on resampled test rows, with the upward bias that all "
            "binned errors have taken off, ends averaged over the seeds. Calibrated would score: the mean ECE "
            "(and its 95 % quantile) of a perfectly calibrated model with the unscaled confidences."
        )
        if run.dense:
            caption += " Neighbouring pixels aren't independent, so that intervals and floors are too narrow here."
    columns = COLUMNS if run.measuring.simulations else COLUMNS[:-1]
    return Table("Calibration, with and without temperature scaling", columns, lines, caption)


def _networks(run: Run, found: Sequence[Row]) -> str:
    """Which networks of the trainings these are."""
    steps = [network.step for row in found for network in row.seeds]
    if None in steps:
        return "last step of the training"
    first, last = (f"{step / run.trainers[0].per_epoch:.3g}" for step in (min(steps), max(steps)))
    return f"networks of the best validation accuracy (epochs {first} to {last} of the training)"


def _line(row: Row) -> tuple[str, ...]:
    cells = [
        row.label,
        spread(row.values("accuracy"), scale=100),
        _error(row, "ece"),
        _error(row, "adaptive_ece"),
        spread(row.values("nll"), digits=3),
        spread(row.temperatures, digits=2),
        _error(row, "ece", scaled=True),
    ]
    floors = [network.before.floors["ece"] for network in row.seeds if network.before.floors]
    if floors:
        mean, upper = (100 * float(np.mean([getattr(f, part) for f in floors])) for part in ("mean", "upper"))
        cells.append(f"{mean:.1f} (< {upper:.1f})")
    return tuple(cells)


def _error(row: Row, name: str, *, scaled: bool = False) -> str:
    """``3.7 ± 0.1 [1.2, 4.4]``."""
    text = spread(row.values(name, scaled=scaled), scale=100)
    each = [(network.after if scaled else network.before).intervals.get(name) for network in row.seeds]
    if any(interval is None for interval in each):
        return text
    low, high = (100 * float(np.mean([getattr(interval, end) for interval in each])) for end in ("low", "high"))
    return f"{text} [{low:.1f}, {high:.1f}]"


OTHERS = (
    ("classwise ECE %", "classwise_ece", False, {"scale": 100, "digits": 3}),
    ("MCE %", "mce", False, {"scale": 100}),
    ("Brier", "brier", False, {"digits": 3}),
    ("adaptive ECE at T %", "adaptive_ece", True, {"scale": 100}),
    ("classwise ECE at T %", "classwise_ece", True, {"scale": 100, "digits": 3}),
    ("NLL at T", "nll", True, {"digits": 3}),
)
"""Title, value, whether at the temperature, and how it is written."""


def others(found: Sequence[Row]) -> Table:
    """What else the papers' tables hold."""
    lines = [
        (row.label, *(spread(row.values(name, scaled=at_t), **written) for _, name, at_t, written in OTHERS))
        for row in found
    ]
    return Table("Other errors", ("loss", *(title for title, *_ in OTHERS)), lines)


def _notes(run: Run, found: Sequence[Row]) -> tuple[str, ...]:
    notes = []
    best = min(found, key=lambda row: np.mean([network.temperature.nll_before for network in row.seeds]))
    if len(found) > 1:
        notes.append(f"Smallest NLL of the validation images before scaling: {best.label}.")
    if run.measuring.simulations:
        for after in (False, True):
            names = [row.label for row in found if _all_calibrated(row, after)]
            if names:
                when = "At their temperature" if after else "Unscaled"
                notes.append(f"{when}, no seed's ECE can be told from a calibrated model's: {', '.join(names)}.")
    bound = [row.label for row in found if any(network.temperature.at_bound for network in row.seeds)]
    if bound:
        notes.append(f"T lies at the end of what is searched: {', '.join(bound)}.")
    return tuple(notes)


def _all_calibrated(row: Row, after: bool) -> bool:
    each = [network.after if after else network.before for network in row.seeds]
    return all(assessment.floors["ece"].p_value > 0.05 for assessment in each)


# --- the figures -----------------------------------------------------------------------------------------------------


def _figures(run: Run, found: Sequence[Row]) -> tuple[Figure, ...]:
    from jaxvision.engine import calibration_figures as figures

    shown = found[:MOST_PANELS]
    before = {row.label: row.seeds[0].before.measured.top for row in shown}
    after = {f"{row.label}, T = {row.temperatures[0]:.2f}": row.seeds[0].after.measured.top for row in shown}
    draw = functools.partial
    made = [
        Figure("reliability", draw(figures.reliability, before), "First seed."),
        Figure("reliability_scaled", draw(figures.reliability, after), "First seed, temperature-scaled."),
        Figure("confidence", draw(figures.histogram, before), "First seed."),
    ]
    return (*made, *sweeps(run, found))


def sweeps(run: Run, found: Sequence[Row]) -> tuple[Figure, ...]:
    """ECE over the values of each hyper-parameter that an arm tries, beside the arms that try none."""
    from jaxvision.engine import calibration_figures as figures

    made = []
    plain = {row.label: 100 * row.values("ece") for row in found if not row.setting}
    floors = [network.before.floors["ece"].mean for row in found for network in row.seeds if network.before.floors]
    floor = 100 * float(np.mean(floors)) if floors else None
    for trainer in run.trainers:
        if len(trainer.recipe.grid) != 1:
            continue
        (name,) = trainer.recipe.grid
        mine = [row for row in found if row.trainer is trainer]
        series = {
            trainer.recipe.loss: {row.setting[name]: 100 * row.values("ece") for row in mine},
            f"{trainer.recipe.loss}, at T": {row.setting[name]: 100 * row.values("ece", scaled=True) for row in mine},
        }
        drawn = functools.partial(figures.margin_sweep, series, references=plain, floor=floor, xlabel=name)
        made.append(Figure(f"sweep_{_file_name(trainer.recipe.text)}", drawn, "Mean and deviation over the seeds."))
    return tuple(made)
