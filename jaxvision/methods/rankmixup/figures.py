"""RankMixup's picture."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def confidence_by_lambda(lambdas: np.ndarray, curves: Mapping[str, np.ndarray], path: Path) -> None:
    """Confidence over the mixing coefficient, beside what M-NDCG asks of it.

    Args:
      lambdas: [n].
      curves: label -> mean confidences [seeds, n].
      path: of the PNG.
    """
    canvas = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = canvas.subplots()
    axes.plot(lambdas, np.maximum(lambdas, 1 - lambdas), "--", color="black", lw=1, label="max(λ, 1 - λ)")
    for index, (label, each) in enumerate(curves.items()):
        mean = each.mean(0)
        axes.plot(lambdas, mean, lw=1.4, color=f"C{index}", label=label)
        if len(each) > 1:
            deviation = each.std(0, ddof=1)
            axes.fill_between(lambdas, mean - deviation, mean + deviation, color=f"C{index}", alpha=0.12, lw=0)
    axes.set(xlabel="mixing coefficient λ", ylabel="mean confidence", xlim=(0, 1))
    axes.grid(alpha=0.3)
    canvas.legend(fontsize=8, loc="outside right upper")
    canvas.savefig(path, dpi=120)
