"""All calibration metrics of 50,000 x 1,000 logits beside PyTorch code like the papers'; a file of a million rows.

Parts of ``python -m jaxvision.benchmarks.calibration``: "metrics" and "stored".

The peer does what the official metric code does: one softmax, a loop over bins, and for the classwise error a loop over
classes and bins, here over the first 50 classes because all of them take minutes. It computes ECE, adaptive ECE,
classwise ECE, NLL, Brier and accuracy. Ours computes these, all classes, and MCE, ACE, RMSCE, over- and
under-confidence and top-5 accuracy; the noise floors, the intervals and the exact temperature are timed apart: the
peer has nothing like them.
"""

import itertools
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxvision.benchmarks import timing, training
from jaxvision.metrics import calibration, calibration_noise
from jaxvision.metrics.calibration import NUM_BINS
from jaxvision.metrics.calibration_rows import Rows
from jaxvision.metrics.calibration_scaling import fit_temperature
from jaxvision.metrics.calibration_scan import measure

PEER_CLASSES = 50
SECONDS = 3.0
"""The limit for the metrics of 50,000 x 1,000 logits."""
_AT_ONCE = 1 << 22


def example(rows: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Over-confident logits like those of a classifier, float32 [rows, classes], and labels."""
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal((rows, classes), np.float32) * 2
    labels = generator.integers(0, classes, rows)
    logits[np.arange(rows), labels] += generator.normal(8, 3, rows)
    return logits, labels


def peer(logits: np.ndarray, labels: np.ndarray, classes: int) -> Callable[[], dict[str, float]] | None:
    """The same metrics in plain PyTorch, classwise over the first ``classes``; None where it isn't installed."""
    try:
        import torch
    except ImportError:
        return None
    z, y = torch.from_numpy(logits), torch.from_numpy(labels)

    def error(confidence: torch.Tensor, correct: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for low, high in itertools.pairwise(edges):
            inside = confidence.gt(low) & confidence.le(high)
            share = inside.float().mean()
            if share > 0:
                total += share * abs(correct[inside].float().mean() - confidence[inside].mean())
        return total

    def run() -> dict[str, float]:
        p = torch.softmax(z, 1)
        confidence, predicted = p.max(1)
        edges = torch.linspace(0, 1, NUM_BINS + 1)
        ordered, size = np.sort(confidence.numpy()), len(confidence)
        places = np.interp(np.linspace(0, size, NUM_BINS + 1), np.arange(size), ordered)
        each = [error(p[:, k], y == k, edges) for k in range(classes)]
        one_hot = torch.nn.functional.one_hot(y, p.shape[1])
        return {
            "accuracy": (predicted == y).float().mean().item(),
            "ece": error(confidence, predicted == y, edges).item(),
            "adaptive_ece": error(confidence, predicted == y, torch.from_numpy(places).float()).item(),
            "classwise_ece": torch.stack(each).mean().item() if each else 0.0,
            "nll": torch.nn.functional.cross_entropy(z, y).item(),
            "brier": ((p - one_hot) ** 2).sum(1).mean().item(),
        }

    return run


def metrics(rows: int, classes: int, rounds: int) -> None:
    """Prints the times of the metrics, of what goes with them, and of the peer."""
    logits, labels = example(rows, classes)
    given = Rows.of(logits, labels)
    print(f"metrics of {rows:,} x {classes:,} float32 logits:")
    measured = measure(given)
    floors = calibration_noise.noise_floor(measured)
    candidates: dict[str, Callable[[], object]] = {
        "metrics": lambda: measure(given),
        "metrics, top label only": lambda: measure(given, classwise=False),
        "noise floors, 200 draws": lambda: calibration_noise.noise_floor(measured),
        "intervals, 200 draws": lambda: calibration_noise.intervals(measured, floors),
        "exact temperature": lambda: fit_temperature(given),
    }
    some = min(PEER_CLASSES, classes)
    with_classes, without = peer(logits, labels, some), peer(logits, labels, 0)
    if with_classes is not None and without is not None:
        found = with_classes()
        ours = measured.values | {"classwise_ece": calibration.ece(measured.classes.bins())[:some].mean()}
        worst = max(abs(found[name] / ours[name] - 1) for name in found)
        print(f"  largest relative difference to PyTorch over {len(found)} metrics: {worst:.1e}")
        candidates["PyTorch, top label only"] = without
        candidates[f"PyTorch, {some} classes"] = with_classes
    seconds = timing.interleaved(candidates, rounds)
    for name, value in seconds.items():
        print(f"  {name:30s} {value:8.2f} s")
    if with_classes is not None:
        top = seconds["PyTorch, top label only"]
        whole = top + (seconds[f"PyTorch, {some} classes"] - top) * classes / some
        print(f"  PyTorch, all classes: about {whole:.0f} s (scaled up), {whole / seconds['metrics']:.0f} x ours")
    training.verdict(f"metrics of {rows:,} x {classes:,} logits, s", seconds["metrics"], SECONDS)


def write_example(folder: Path, rows: int, classes: int) -> tuple[Path, Path]:
    """Writes ``logits.npy`` and ``labels.npy`` like :func:`example`, a few rows at a time; returns their paths."""
    paths = folder / "logits.npy", folder / "labels.npy"
    step = max(1, _AT_ONCE // classes)
    with open(paths[0], "wb") as logits, open(paths[1], "wb") as labels:
        for file, shape, dtype in ((logits, (rows, classes), "<f4"), (labels, (rows,), "<i8")):
            header = {"descr": dtype, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, rows, step):
            for file, part in zip((logits, labels), example(min(step, rows - first), classes, seed=first)):
                part.tofile(file)
    return paths


def stored(rows: int, classes: int, folder: str | None) -> None:
    """Writes a file of so many logits, measures it with ``tools.calibration``, prints what that took.

    The command runs in a process of its own, with noise floors and intervals; its memory counts from its own beginning.

    Args:
      rows, classes: of the file; 4 bytes a logit.
      folder: where; None: the system's place for temporary files. Deleted in the end.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        logits, labels = write_example(Path(place), rows, classes)
        size = logits.stat().st_size / 2**20
        print(f"tools.calibration of a file of {rows:,} x {classes:,} float32 logits, {size:,.0f} MiB:")
        command = [sys.executable, "-m", "jaxvision.tools.calibration", logits, "--labels", labels, "--to", place]
        for name, more in (("metrics", ()), ("and a temperature, fitted on 5 %", ("--hold_out", "0.05"))):
            begin, used = time.perf_counter(), _children()
            done = subprocess.run([*map(str, command), *more], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"tools.calibration ended with {done.returncode}: {done.stderr}")
            seconds, processor = time.perf_counter() - begin, _children() - used
            peak = re.search(r"peak memory (\d+) MiB", done.stdout)[1]
            print(f"  {name:34s} {seconds:7.1f} s, {processor:7.1f} s of processor, peak memory {peak} MiB")


def _children() -> float:
    """Processor seconds of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
