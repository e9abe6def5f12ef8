"""All calibration metrics of 50,000 x 1,000 logits: this package beside PyTorch code like that of the papers.

    python -m jaxvision.benchmarks.calibration_metrics [--rows 50000] [--classes 1000] [--rounds 3]

The peer does what the official metric code does: one softmax, a loop over bins, and for the classwise error a loop over
classes and bins, here over the first 50 classes because all of them take minutes. It computes ECE, adaptive ECE,
classwise ECE, NLL, Brier and accuracy. Ours computes these, all classes, and MCE, ACE, RMSCE, over- and
under-confidence and top-5 accuracy; the noise floors, the intervals and the exact temperature are timed apart: the
peer has nothing like them.
"""

import argparse
import itertools
import platform
import resource
from collections.abc import Callable

import numpy as np

from jaxvision.benchmarks import timing
from jaxvision.metrics import calibration, calibration_noise
from jaxvision.metrics.calibration import NUM_BINS
from jaxvision.metrics.calibration_rows import Rows
from jaxvision.metrics.calibration_scaling import fit_temperature
from jaxvision.metrics.calibration_scan import measure

PEER_CLASSES = 50


def example(rows: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Over-confident logits like those of a classifier, float32 [rows, classes], and labels."""
    generator = np.random.default_rng(0)
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


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logits, labels = example(options.rows, options.classes)
    rows = Rows.of(logits, labels)
    print(f"{options.rows:,} x {options.classes:,} float32, {platform.processor() or 'CPU'}")
    measured = measure(rows)
    floors = calibration_noise.noise_floor(measured)
    candidates: dict[str, Callable[[], object]] = {
        "metrics": lambda: measure(rows),
        "metrics, top label only": lambda: measure(rows, classwise=False),
        "noise floors, 200 draws": lambda: calibration_noise.noise_floor(measured),
        "intervals, 200 draws": lambda: calibration_noise.intervals(measured, floors),
        "exact temperature": lambda: fit_temperature(rows),
    }
    some = min(PEER_CLASSES, options.classes)
    with_classes, without = peer(logits, labels, some), peer(logits, labels, 0)
    if with_classes is not None and without is not None:
        found = with_classes()
        ours = measured.values | {"classwise_ece": calibration.ece(measured.classes.bins())[:some].mean()}
        worst = max(abs(found[name] / ours[name] - 1) for name in found)
        print(f"largest relative difference to PyTorch over {len(found)} metrics: {worst:.1e}")
        candidates["PyTorch, top label only"] = without
        candidates[f"PyTorch, {some} classes"] = with_classes
    seconds = timing.interleaved(candidates, options.rounds)
    for name, value in seconds.items():
        print(f"  {name:30s} {value:8.2f} s")
    if with_classes is not None:
        top = seconds["PyTorch, top label only"]
        whole = top + (seconds[f"PyTorch, {some} classes"] - top) * options.classes / some
        print(f"  PyTorch, all classes: about {whole:.0f} s (scaled up), {whole / seconds['metrics']:.0f} x ours")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
