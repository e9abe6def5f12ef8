"""Runs a configuration over seeds and settings, one after the other, and puts the results in one table.

    python launch/sweep.py --config=configs/classification.py:smoke --workdir=runs/sweep --seeds=0,1,2 \\
        --vary model.name=resnet20,resnet32 --vary optimizer.lr=0.1,0.05 -- --config.log_every=10

Every combination is one run in its own directory below --workdir. The same command continues a sweep that was
stopped: finished runs are left alone, a half-done one goes on from its checkpoint. The table (mean and spread over
seeds) is printed and written to WORKDIR/sweep.md. A run that fails (a learning rate at which it diverges) doesn't stop
the others: it has a row that says so, and its exit code is the sweep's. Only exit code 75, a signal, ends a sweep.
"""

import argparse
import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxvision.core.errors import ConfigError, Preempted
from jaxvision.engine import report
from jaxvision.tools import command_line, compare_runs


def combinations(vary: list[str]) -> list[dict[str, str]]:
    """``["a=1,2", "b=x,y"]`` -> the four settings; values that hold commas are separated by ``;`` instead."""
    axes = []
    for text in vary:
        name, _, values = text.partition("=")
        if not values:
            raise ConfigError(f"--vary={text} must read NAME=VALUE,VALUE,...")
        axes.append([(name, value) for value in values.split(";" if ";" in values else ",")])
    return [dict(choice) for choice in itertools.product(*axes)]


def directory_name(settings: dict[str, str], seed: int) -> str:
    """A folder name that reads like the setting."""
    parts = [f"{name}={value}" for name, value in settings.items()] + [f"seed={seed}"]
    return ",".join(parts).replace("/", "_").replace(" ", "")


def seeds(text: str) -> list[int]:
    """``"0,1,2"`` -> the numbers."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ConfigError(f"--seeds={text} must be whole numbers from 0 on with commas between them, such as 0,1,2")
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all combinations; returns the first exit code that isn't 0, or 0."""
    codes: list[int] = []
    answered = command_line.answer("sweep", lambda: codes.extend(_run(_parser().parse_args(arguments))))
    return answered or next((code for code in codes if code), 0)


def _parser() -> command_line.Parser:
    parser = command_line.Parser(prog="launch/sweep.py", description=__doc__)
    parser.add_argument("--config", required=True, help="configuration file, with a preset after a colon")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--vary", action="append", default=[], metavar="NAME=VALUE,VALUE")
    parser.add_argument("rest", nargs="*", help="after --: further flags of jaxvision.main")
    return parser


def _run(options: argparse.Namespace) -> list[int]:
    """The exit codes of the runs; prints and writes the table, unless a signal ended one of them or all failed."""
    codes: dict[Path, int] = {}
    for settings, seed in list(itertools.product(combinations(options.vary), seeds(options.seeds))):
        directory = options.workdir / directory_name(settings, seed)
        overrides = [f"--config.{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "jaxvision.main", f"--config={options.config}", f"--workdir={directory}"]
        print(f"== {directory.name}", file=sys.stderr, flush=True)
        done = subprocess.run([*command, f"--config.seed={seed}", *overrides, *options.rest], stdout=subprocess.DEVNULL)
        codes[directory] = done.returncode
        if done.returncode:
            print(f"sweep: {directory.name} ended with exit code {done.returncode}", file=sys.stderr)
        if done.returncode == Preempted.exit_code:
            return [done.returncode]
    if not all(codes.values()):
        made = _with_failures(compare_runs.compare([run for run, code in codes.items() if not code]), codes)
        (options.workdir / "sweep.md").write_text(report.markdown(made))
        print(report.markdown(made))
    return list(codes.values())


def _with_failures(made: report.Report, codes: dict[Path, int]) -> report.Report:
    """The table of the finished runs with a row for each of the others."""
    (table,) = made.tables
    empty = ("-",) * (len(table.columns) - 2)
    failed = [(run.name, f"failed: exit code {code}", *empty) for run, code in codes.items() if code]
    return dataclasses.replace(made, tables=(dataclasses.replace(table, rows=[*table.rows, *failed]),))


if __name__ == "__main__":
    sys.exit(main())
