"""The pictures of the report. Each function draws one PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata

from jaxvision.methods.az_nas.outcome import Outcome, Ranking, Truth
from jaxvision.metrics import ranking

_COLUMNS = 4


def rank_scatter(
    outcome: Outcome, truth: Truth, rankings: Sequence[Ranking], taus: Mapping[str, float], path: Path
) -> None:
    """Rank by each score against rank by accuracy; the colour is the accuracy, the circle the pick."""
    rows = -(-len(rankings) // _COLUMNS)
    columns = min(len(rankings), _COLUMNS)
    canvas = Figure(figsize=(3.1 * columns + 0.8, 3.1 * rows + 0.3), layout="constrained")
    grid = canvas.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    true = rankdata(truth.accuracy)
    size = float(np.clip(3000 / len(true), 3, 24))
    # Failed networks would take all colours for themselves.
    low = float(np.quantile(truth.accuracy, 0.1))
    for axes, each in zip(grid.flat, rankings):
        score = each.of(outcome.scores)[truth.rows]
        ranks = rankdata(score)
        dots = axes.scatter(ranks, true, c=truth.accuracy, s=size, cmap="viridis", vmin=low, linewidths=0)
        pick = int(np.argmax(score))
        axes.scatter(ranks[pick], true[pick], s=110, facecolors="none", edgecolors="tab:red", linewidths=1.6)
        axes.set_title(f"{each.name}: τ = {taus[each.name]:.3f}", fontsize=10)
    for axes in list(grid.flat)[len(rankings) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("rank by the score")
    for axes in grid[:, 0]:
        axes.set_ylabel("rank by accuracy")
    canvas.colorbar(dots, ax=grid, label=f"{truth.name} accuracy, %", extend="min")
    canvas.savefig(path, dpi=120)


def proxy_matrix(outcome: Outcome, rankings: Sequence[Ranking], path: Path) -> None:
    """Kendall's tau of every two rankings over all candidates."""
    values = [each.of(outcome.scores) for each in rankings]
    table = np.eye(len(values))
    for i, one in enumerate(values):
        for j, other in enumerate(values[:i]):
            table[i, j] = table[j, i] = ranking.kendall_tau(one, other)
    names = [each.name for each in rankings]
    canvas = Figure(figsize=(2.2 + 0.62 * len(names), 1.6 + 0.52 * len(names)), layout="constrained")
    axes = canvas.subplots()
    drawn = axes.imshow(table, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        text = f"{value:.2f}" if np.isfinite(value) else "-"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if abs(value) > 0.6 else "black")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    canvas.colorbar(drawn, ax=axes, label="Kendall's τ")
    canvas.savefig(path, dpi=120)


def progress(outcome: Outcome, truth: Truth | None, path: Path) -> None:
    """Each candidate's aggregate among all, and the best so far; beside it the accuracy of the pick so far."""
    value = outcome.main.of(outcome.scores)
    panels = 1 if truth is None else 2
    canvas = Figure(figsize=(5.2 * panels, 3.8), layout="constrained")
    grid = np.atleast_1d(canvas.subplots(1, panels))
    number = np.arange(1, len(value) + 1)
    finite = np.where(np.isfinite(value), value, np.nan)
    grid[0].scatter(number, finite, s=5, alpha=0.5, linewidths=0, label="candidate")
    grid[0].step(number, np.fmax.accumulate(finite), color="tab:red", where="post", label="best so far")
    grid[0].set(xlabel="candidates scored", ylabel=f"{outcome.main.name}, ranked among all")
    grid[0].legend(loc="lower right")
    if truth is not None:
        _picked_so_far(grid[1], outcome, truth)
    for axes in grid:
        axes.grid(alpha=0.3)
    canvas.savefig(path, dpi=120)


def _picked_so_far(axes, outcome: Outcome, truth: Truth) -> None:
    """The pick re-ranked among the first candidates of which the accuracy is known, and what was there to find."""
    counts = np.unique(np.geomspace(1, len(truth.rows), 60).astype(int))
    picked = [truth.accuracy[int(np.argmax(outcome.main.of(outcome.scores, truth.rows[:count])))] for count in counts]
    axes.step(counts, [truth.accuracy[:count].max() for count in counts], color="0.5", where="post", label="best there")
    axes.step(counts, picked, color="tab:red", where="post", label=f"picked by {outcome.main.name}")
    axes.set(xscale="log", xlabel="candidates scored", ylabel=f"{truth.name} accuracy, %")
    axes.set_ylim(bottom=float(np.quantile(truth.accuracy, 0.3)))
    axes.legend(loc="lower right")
