"""How calibrated are these logits? Table and diagrams for anybody's logits and labels, from any framework.

    python -m jaxvision.tools.calibration LOGITS.npz
    python -m jaxvision.tools.calibration test.npz --validation val.npz --ood svhn.npz --to calibration

LOGITS is a .npz or .safetensors file with the arrays `logits` (rows, classes) and `labels` (rows); a PyTorch file with
these tensors; or a .npy with --labels FILE. Dense predictions have the classes on the last axis. With a validation
split (--validation FILE, the arrays `val_logits` and `val_labels`, or --hold_out FRACTION) the logits are measured
again after temperature scaling. Written to --to: report.md, calibration.json and figures/.

The file is read in blocks: a million rows of a thousand classes (4 GB) take 300 MiB and 16 s of processor time, 440 MiB
and 40 s with a temperature fitted on 50,000 of them (python -m jaxvision.benchmarks.calibration --parts stored). No
accelerator is used.
Exit codes: 0 done, 64 a file or an option that is wrong.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxvision.core.errors import ConfigError, DataError, StorageError
from jaxvision.engine import calibration_figures, calibration_report, report
from jaxvision.engine.calibration_report import Assessment
from jaxvision.engine.progress import Progress
from jaxvision.metrics import calibration_ood, calibration_scaling, calibration_scan
from jaxvision.metrics.calibration import NUM_BINS
from jaxvision.metrics.calibration_noise import SIMULATIONS
from jaxvision.metrics.calibration_rows import Rows
from jaxvision.metrics.calibration_scan import UNSCALED, Scaling
from jaxvision.tools import command_line
from jaxvision.tools.calibration_sets import StoredRows, held, open_sets

AS_GIVEN = "as given"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command_line.answer("calibration", lambda: run(_parser().parse_args(arguments)))


def _parser() -> command_line.Parser:
    parser = command_line.Parser(prog="python -m jaxvision.tools.calibration", description=__doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="LOGITS", help="the file with logits and labels")
    add("--labels", type=Path, metavar="FILE", help="labels from another file")
    add("--logits_key", default="logits", metavar="KEY", help="default: logits")
    add("--labels_key", default="labels", metavar="KEY", help="default: labels")
    add("--validation", type=Path, metavar="FILE", help="logits and labels that scaling is fitted on")
    add(
        "--hold_out",
        type=float,
        metavar="FRACTION",
        help="fit on this part of the rows, drawn by chance; report the rest",
    )
    add(
        "--temperature",
        choices=calibration_scaling.METHODS,
        help="how (default: exact, if there is a validation split)",
    )
    add("--vector", action="store_true", help="vector scaling too: a factor and an offset a class")
    add("--ood", type=Path, metavar="FILE", help="logits of inputs of unknown classes: AUROC of telling them")
    add("--to", type=Path, metavar="DIR", help="default: <name of LOGITS>_calibration")
    add("--bins", type=int, default=NUM_BINS, metavar="N", help="default: %(default)s")
    add("--probabilities", action="store_true", help="the arrays hold probabilities")
    add("--ignore", type=int, action="append", default=[], metavar="LABEL", help="rows that don't count, such as 255")
    add(
        "--all_classes",
        action="store_true",
        help="classwise ECE over all classes; the papers' code leaves out those after the largest label",
    )
    add(
        "--include_lowest",
        action="store_true",
        help="adaptive ECE with the least confident row, which the papers leave out",
    )
    add(
        "--batch_averages",
        type=int,
        metavar="N",
        help="also the averages over batches of N images, as the papers' segmentation code (N = 8) reports",
    )
    add("--simulations", type=int, default=SIMULATIONS, metavar="N", help="for floors and intervals; 0: none")
    add("--seed", type=int, default=0, help="of simulations and --hold_out")
    return parser


def run(options: argparse.Namespace) -> None:
    """Measures, fits, measures again; writes and shows the report.

    Raises:
      ConfigError, DataError: what is wrong with the options and the files.
      StorageError: the directory can't be written.
    """
    begin = time.monotonic()
    _check(options)
    with Progress() as progress:
        sets = open_sets(options, progress.message)
        test, validation = sets["test"], sets.get("validation")
        scalings = _fit(options, test, validation, progress)
        assessed = {}
        for name, scaling in scalings.items():
            rows, given = (test.rows, options.probabilities) if name == AS_GIVEN else (test.logits, False)
            assessed[name] = _assess(rows, scaling, given, name, options, progress, test.total)
        unknown = _ood(options, test, sets.get("ood"), scalings, progress)
        averages = None
        if options.batch_averages:
            batches = test.batches(options.batch_averages)
            averages = calibration_scan.batch_averages(batches, **_metric_options(options))
    cost = f"took {time.monotonic() - begin:.1f} s, peak memory {_peak_memory() / 2**20:.0f} MiB"
    made = _report(options, assessed, unknown, averages, cost)
    directory = options.to or Path(f"{options.source.stem}_calibration")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        report.write(made, directory)
    except OSError as error:
        raise StorageError(f"{directory} can't be written ({error.strerror or error})") from error
    report.show(made, directory)


def _check(options: argparse.Namespace) -> None:
    if options.bins < 1:
        raise ConfigError(f"--bins {options.bins} must be at least 1")
    if options.simulations < 0:
        raise ConfigError(f"--simulations {options.simulations} must be at least 0")
    if options.batch_averages is not None and options.batch_averages < 1:
        raise ConfigError(f"--batch_averages {options.batch_averages} must be at least 1")
    if options.batch_averages is not None and options.hold_out is not None:
        raise ConfigError("--batch_averages and --hold_out exclude each other: batches are those of the whole file")
    if options.hold_out is not None and not 0 < options.hold_out < 1:
        raise ConfigError(f"--hold_out {options.hold_out} must lie between 0 and 1")
    if options.hold_out is not None and options.validation:
        raise ConfigError("--hold_out and --validation exclude each other: there is one validation split")


# --- measuring -------------------------------------------------------------------------------------------------------


def _fit(
    options: argparse.Namespace, test: StoredRows, validation: StoredRows | None, progress: Progress
) -> dict[str, Scaling]:
    scalings = {AS_GIVEN: UNSCALED}
    if validation is None:
        if options.temperature or options.vector:
            raise ConfigError(
                "scaling needs a validation split: give --validation FILE, `val_logits` and `val_labels` in the file, "
                "or --hold_out FRACTION; fitted on the reported rows it would flatter them"
            )
        return scalings
    rows = held(validation.logits)
    fitted = calibration_scaling.fit_temperature(
        rows, test.logits, method=options.temperature or "exact", num_bins=options.bins
    )
    bound = ", the end of what was searched" if fitted.at_bound else ""
    progress.message(
        f"T = {fitted.value:.4f}{bound} ({fitted.method}, {fitted.rows:,} validation rows: "
        f"NLL {fitted.nll_before:.4f} -> {fitted.nll_after:.4f})"
    )
    scalings[f"T = {fitted.value:.3f}"] = fitted.scaling
    if options.vector:
        scalings["vector scaling"] = calibration_scaling.fit_vector(rows, test.logits)
    return scalings


def _metric_options(options: argparse.Namespace) -> dict[str, Any]:
    """Of :func:`calibration_scan.measure`, for the numbers as they are given."""
    return {
        "num_bins": options.bins,
        "all_classes": options.all_classes,
        "include_lowest": options.include_lowest,
        "probabilities": options.probabilities,
    }


def _assess(
    rows: Rows, scaling: Scaling, given: bool, name: str, options: argparse.Namespace, progress: Progress, total: int
) -> Assessment:
    progress.stage(f"measuring, {name}", 0, total)
    assessment = calibration_report.assess(
        rows,
        scaling,
        simulations=options.simulations,
        seed=options.seed,
        **_metric_options(options) | {"probabilities": given},
        advance=progress.advance,
    )
    count = int(assessment.measured.top.total)
    if count < options.bins:
        raise DataError(
            f"{rows.name} hold {count} rows that count, fewer than {options.bins} bins; give --bins {count} or less"
        )
    return assessment


def _ood(
    options: argparse.Namespace,
    test: StoredRows,
    unknown: StoredRows | None,
    scalings: dict[str, Scaling],
    progress: Progress,
) -> dict[str, dict[str, float]]:
    if unknown is None:
        return {}
    progress.message(f"{unknown.rows.name}: {unknown.size}")
    found = {}
    for name, scaling in scalings.items():
        scores = [calibration_ood.scores(each.logits, scaling) for each in (test, unknown)]
        found[name] = calibration_ood.ood_auroc(*scores)
    return found


# --- reporting -------------------------------------------------------------------------------------------------------


def _report(
    options: argparse.Namespace,
    assessed: dict[str, Assessment],
    unknown: dict[str, dict[str, float]],
    averages: dict[str, float] | None,
    cost: str,
) -> report.Report:
    first = assessed[AS_GIVEN].measured
    title = f"Calibration of {options.source.name}"
    count = f"{int(first.top.total):,} rows, {len(first.counted):,} classes, {options.bins} bins"
    tables = [calibration_report.table(assessed, count)]
    if unknown:
        rows = [(name, *(f"{100 * value:.2f}" for value in scores.values())) for name, scores in unknown.items()]
        tables.append(report.Table("Telling unknown inputs, AUROC (%)", ("logits", "entropy", "confidence"), rows))
    if averages is not None:
        caption = "As given. For comparison with published numbers alone: the errors of a batch are biased by its size."
        title_of = f"Averages over batches of {options.batch_averages}"
        tables.append(calibration_report.averages(averages, title_of, caption))
    bins = {name: each.measured.top for name, each in assessed.items()}
    figures = (
        report.Figure("reliability", lambda path: calibration_figures.reliability(bins, path)),
        report.Figure("confidence", lambda path: calibration_figures.histogram(bins, path)),
    )
    last = list(assessed.values())[-1].measured.values
    summary = dict(first.values) | (
        {f"{name}/scaled": value for name, value in last.items()} if len(assessed) > 1 else {}
    )
    numbers: dict[str, Any] = {name: calibration_report.as_json(each) for name, each in assessed.items()}
    for name, scores in unknown.items():
        numbers[name]["ood"] = scores
    if averages is not None:
        numbers[AS_GIVEN]["batch_averages"] = averages
    files = {"calibration.json": json.dumps(numbers, indent=2, allow_nan=False) + "\n"}
    return report.Report(title, tuple(tables), figures, summary, (_verdict(assessed), cost), files)


def _verdict(assessed: dict[str, Assessment]) -> str:
    """One sentence that says what the ECE means."""
    parts = []
    for name, each in assessed.items():
        values, floor = each.measured.values, each.floors.get("ece")
        direction = "over" if values["mean_confidence"] > values["accuracy"] else "under"
        if floor is None or floor.p_value <= 0.05:
            parts.append(f"{name}: {direction}-confident")
        else:
            parts.append(f"{name}: the ECE can't be told from that of a perfectly calibrated model")
    return "; ".join(parts)


def _peak_memory() -> int:
    """Bytes."""
    # Where Linux tells, this process alone: getrusage also counts what the one that started it held.
    status = Path("/proc/self/status")
    _, found, rest = (status.read_text() if status.exists() else "").partition("VmHWM:")
    if found:
        return 1024 * int(rest.split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main())
