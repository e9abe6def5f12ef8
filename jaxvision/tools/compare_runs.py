"""Puts finished runs side by side: one row a configuration, mean and spread over its seeds.

    python -m jaxvision.tools.compare_runs runs/sweep/* [--to table.md]

Runs whose configurations differ in ``seed`` alone are one row; the row is named by the fields in which the rows
differ. The spread is the sample standard deviation.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxvision.core.config import flatten
from jaxvision.core.errors import DataError
from jaxvision.engine import report
from jaxvision.tools import command_line


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command_line.answer("compare_runs", lambda: _run(_parser().parse_args(arguments)))


def _parser() -> command_line.Parser:
    parser = command_line.Parser(prog="python -m jaxvision.tools.compare_runs", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--to", type=Path, help="write the table there as Markdown too")
    return parser


def _run(options: argparse.Namespace) -> None:
    made = compare(options.runs)
    if options.to:
        options.to.parent.mkdir(parents=True, exist_ok=True)
        options.to.write_text(report.markdown(made))
    print(report.markdown(made))


def compare(directories: Sequence[Path]) -> report.Report:
    """The table of finished runs.

    Raises:
      DataError: a directory holds no finished run.
    """
    groups: dict[str, list[tuple[dict[str, Any], dict[str, float]]]] = {}
    for directory in directories:
        config, summary = _read(directory)
        same = json.dumps({key: value for key, value in config.items() if key != "seed"}, sort_keys=True)
        groups.setdefault(same, []).append((config, summary))
    differing = _differing([runs[0][0] for runs in groups.values()])
    metrics = list(dict.fromkeys(name for runs in groups.values() for _, summary in runs for name in summary))
    rows = []
    for runs in groups.values():
        label = ", ".join(f"{name}={runs[0][0].get(name, '(absent)')}" for name in differing)
        cells = [_spread([summary[name] for _, summary in runs if name in summary]) for name in metrics]
        rows.append((label or "all runs", str(len(runs)), *cells))
    table = report.Table("Mean and spread over seeds", ("configuration", "seeds", *metrics), rows)
    return report.Report("Comparison of runs", (table,))


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, float]]:
    try:
        config = json.loads((directory / "config.json").read_text())
        results = json.loads((directory / "results.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{directory} holds no finished run: {error}; start its command again to finish it") from error
    return flatten(config), results["summary"]


def _differing(configs: list[dict[str, Any]]) -> list[str]:
    names = sorted({name for config in configs for name in config} - {"seed"})
    return [name for name in names if len({json.dumps(config.get(name)) for config in configs}) > 1]


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = statistics.fmean(values)
    return f"{mean:.4g} ± {statistics.stdev(values):.2g}" if len(values) > 1 else f"{mean:.4g}"


if __name__ == "__main__":
    sys.exit(main())
