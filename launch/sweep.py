"""Runs a configuration over seeds and settings, one after the other, and puts the results in one table.

    python launch/sweep.py --config=configs/classification.py:smoke --workdir=runs/sweep --seeds=0,1,2 \\
        --vary model.name=resnet20,resnet32 --vary optimizer.lr=0.1,0.05 -- --config.log_every=10

Every combination is one run in its own directory below --workdir. The same command continues a sweep that was
stopped: finished runs are left alone, a half-done one goes on from its checkpoint. The table (mean and spread over
seeds) is printed and written to WORKDIR/sweep.md.
"""

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

from jaxvision.tools import compare_runs


def combinations(vary: list[str]) -> list[dict[str, str]]:
    """``["a=1,2", "b=x,y"]`` -> the four settings; values that hold commas are separated by ``;`` instead."""
    axes = []
    for text in vary:
        name, _, values = text.partition("=")
        if not values:
            raise SystemExit(f"sweep: --vary {text} must read NAME=VALUE,VALUE,...")
        axes.append([(name, value) for value in values.split(";" if ";" in values else ",")])
    return [dict(choice) for choice in itertools.product(*axes)]


def directory_name(settings: dict[str, str], seed: int) -> str:
    """A folder name that reads like the setting."""
    parts = [f"{name}={value}" for name, value in settings.items()] + [f"seed={seed}"]
    return ",".join(parts).replace("/", "_").replace(" ", "")


def main() -> int:
    """Runs all combinations; returns the first exit code that isn't 0, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configuration file, with a preset after a colon")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--vary", action="append", default=[], metavar="NAME=VALUE,VALUE")
    parser.add_argument("rest", nargs="*", help="after --: further flags of jaxvision.main")
    options = parser.parse_args()
    runs = []
    for settings, seed in itertools.product(combinations(options.vary), map(int, options.seeds.split(","))):
        directory = options.workdir / directory_name(settings, seed)
        overrides = [f"--config.{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "jaxvision.main", f"--config={options.config}", f"--workdir={directory}"]
        print(f"== {directory.name}", file=sys.stderr, flush=True)
        done = subprocess.run([*command, f"--config.seed={seed}", *overrides, *options.rest], stdout=subprocess.DEVNULL)
        if done.returncode:
            print(f"sweep: {directory.name} ended with exit code {done.returncode}", file=sys.stderr)
            return done.returncode
        runs.append(str(directory))
    return compare_runs.main([*runs, "--to", str(options.workdir / "sweep.md")])


if __name__ == "__main__":
    sys.exit(main())
