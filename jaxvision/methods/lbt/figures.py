"""The pictures of the report. Each function draws one PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from jaxvision.methods.lbt.outcome import Cell


def colours(labels: Sequence[str]) -> dict[str, str]:
    """The same colour for the same arm in every figure; LBT in reds, baselines in cool colours."""
    found, reds, others = {}, ["tab:red", "salmon", "darkred"], ["tab:blue", "tab:cyan", "tab:green", "tab:olive"]
    others += ["tab:purple", "tab:brown", "tab:pink"]
    for label in dict.fromkeys(labels):
        if label in ("float", "W, A only"):
            found[label] = "black" if label == "float" else "0.55"
            continue
        palette = reds if label.startswith("LBT") else others
        found[label] = palette[sum(colour in palette for colour in found.values()) % len(palette)]
    return found


def gammas(steps: np.ndarray, lines: Mapping["Cell", Mapping[str, np.ndarray]], path: Path) -> None:
    """gamma over the steps of the arm: one panel a width, one line a layer."""
    canvas = Figure(figsize=(2.4 + 3.2 * len(lines), 3.6), layout="constrained")
    panels = np.atleast_1d(canvas.subplots(1, len(lines), sharey=True))
    for axes, (cell, layers) in zip(panels, lines.items()):
        for index, (layer, values) in enumerate(layers.items()):
            axes.plot(steps, values, label=layer, lw=1.2, color=_viridis(index, len(layers)))
        axes.set(title=f"{cell.bits}-bit gradients", xlabel="step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("gamma")
    if len(next(iter(lines.values()))) <= 20:
        canvas.legend(*panels[-1].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    canvas.savefig(path, dpi=120)


def _viridis(index: int, count: int) -> tuple[float, ...]:
    from matplotlib import colormaps

    return colormaps["viridis"](index / max(count - 1, 1) * 0.9)


def errors(cells: Sequence["Cell"], path: Path) -> None:
    """E(G) and E(G_L) of each layer, one line an arm."""
    layers = list(cells[0].layers["error"])
    colour = colours([cell.label for cell in cells])
    canvas = Figure(figsize=(12.5, 4.2), layout="constrained")
    panels = canvas.subplots(1, 2)
    for axes, name, title in zip(panels, ("error", "large_error"), ("E(G): all gradients", "E(G_L): large gradients")):
        for cell in cells:
            values = [cell.layers[name][layer].mean() for layer in layers]
            axes.plot(range(len(layers)), values, "o-", ms=4, lw=1, label=cell.label, color=colour[cell.label])
        axes.set(title=title, yscale="log", ylabel="mean |Q(g) - g| / gmax")
        axes.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=7)
        axes.grid(alpha=0.3)
    canvas.legend(*panels[-1].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    canvas.savefig(path, dpi=120)


def accuracies(cells: Sequence["Cell"], path: Path) -> None:
    """Accuracy against the gradient's width; arms with float gradients are horizontal lines."""
    colour = colours([cell.label for cell in cells])
    canvas = Figure(figsize=(7, 4.4), layout="constrained")
    axes = canvas.subplots()
    labels = list(colour)
    widths = sorted({cell.bits for cell in cells if cell.bits is not None})
    for index, label in enumerate(labels):
        found = [cell for cell in cells if cell.label == label]
        means = [100 * cell.accuracy.mean() for cell in found]
        if found[0].bits is None:
            axes.axhline(means[0], color=colour[label], ls="--", lw=1, label=label)
            continue
        spread = [100 * cell.accuracy.std(ddof=1) if len(cell.accuracy) > 1 else 0 for cell in found]
        # A little aside, so that the bars of the arms don't hide each other.
        where = [cell.bits + 0.03 * (index - len(labels) / 2) for cell in found]
        axes.errorbar(where, means, spread, fmt="o-", ms=4, lw=1, capsize=2, color=colour[label], label=label)
    axes.set_xticks(widths)
    axes.set(xlabel="gradient bits", ylabel="test accuracy %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    canvas.savefig(path, dpi=120)


def losses(steps: Sequence[int], curves: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """Training loss over the steps of an arm: ``curves[label][seed]``."""
    colour = colours(list(curves))
    canvas = Figure(figsize=(7, 4.2), layout="constrained")
    axes = canvas.subplots()
    for label, lines in curves.items():
        axes.plot(steps, np.mean(lines, 0), label=label, lw=1.3, color=colour[label])
    axes.set(xlabel="step", ylabel="training loss (nats)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    canvas.savefig(path, dpi=120)
