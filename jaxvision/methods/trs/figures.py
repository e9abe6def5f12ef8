"""The pictures of the report. Each function draws one PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from jaxvision.engine.report import Results
from jaxvision.engine.seeds import member
from jaxvision.methods.trs import diagnostics
from jaxvision.methods.trs.outcome import Chosen, Run, layers

MOST_LAYERS = 6
"""Panels of a deep network: so many of its layers, evenly spaced."""


def rates(run: Run, results: Results, chosen: Sequence[Chosen], path: Path) -> None:
    """Transition rate against its target, one panel a layer."""
    scheduled, plain = _pair(run)
    index = scheduled if scheduled is not None else plain
    names = _some(layers(run, index))
    canvas, panels = _grid(len(names))
    for axes, name in zip(panels, names):
        if plain is not None:
            series = _series(run, results, chosen, plain, f"rate/{name}")
            axes.plot(*series, color="0.6", lw=1, label=f"k, {run.ways[plain].name}")
        if scheduled is not None:
            way = run.ways[scheduled].name
            axes.plot(*_series(run, results, chosen, scheduled, f"rate/{name}"), color="C0", lw=1, alpha=0.5, label="k")
            axes.plot(*_series(run, results, chosen, scheduled, f"running_rate/{name}"), color="C0", label=f"K, {way}")
            axes.plot(*_local(run, results, scheduled, "target"), color="black", ls="--", lw=1, label="target R")
        axes.set(title=name, xlabel="step", ylim=(0, None))
    panels[0].set_ylabel("fraction of codes that change")
    panels[0].legend(fontsize=7)
    canvas.savefig(path, dpi=120)


def step_size(run: Run, results: Results, chosen: Sequence[Chosen], path: Path) -> None:
    """The step size of each layer, one panel a scheduled arm; without one, the learning rates."""
    scheduled = [index for index, trainer in enumerate(run.trainers) if trainer.variant.scheduled][:MOST_LAYERS]
    canvas, panels = _grid(max(len(scheduled), 1))
    for axes, index in zip(panels, scheduled or [0]):
        trainer, way = run.trainers[index], run.ways[index]
        initial = way.grid["lr"][chosen[index].index]
        for name in _some(layers(run, index)) if trainer.variant.scheduled else ():
            axes.plot(*_series(run, results, chosen, index, f"step_size/{name}"), lw=1, label=name)
        steps = range(0, way.steps, max(way.steps // 200, 1))
        plain = [initial * float(trainer.recipe.shape(step)) for step in steps]
        axes.plot(steps, plain, color="black", ls="--", lw=1, label="plain LR")
        for limit in ("min_step_size", "max_step_size"):
            if trainer.variant.scheduled and (value := trainer.recipe.control.get(limit)):
                axes.axhline(value, color="0.5", ls=":", lw=1, label=limit)
        axes.set(title=f"{way.name}, initial {initial:g}", xlabel="step", ylabel="step size U", yscale="log")
        axes.set_ylim(initial * 1e-3, None)
        axes.legend(fontsize=7)
    canvas.savefig(path, dpi=120)


def movement(run: Run, results: Results, chosen: Sequence[Chosen], path: Path) -> None:
    """Mean distance to the transition points and mean change of the quantized weights, over time."""
    canvas = Figure(figsize=(11, 4), layout="constrained")
    left, right = canvas.subplots(1, 2)
    for index in _shown(run):
        name = run.ways[index].name
        for axes, quantity in ((left, "weights/distance"), (right, "weights/effective_step")):
            steps, values = _series(run, results, chosen, index, quantity)
            if steps:
                axes.plot(steps, values, lw=1.2, label=name)
    left.set(xlabel="step", ylabel="steps of the code", title="distance to the transition point")
    right.set(xlabel="step", yscale="log", title="change of the quantized weights in a step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    canvas.savefig(path, dpi=120)


def histogram(run: Run, kept: Mapping[str, Any], chosen: Sequence[Chosen], path: Path) -> None:
    """Latent weights around their transition points, one panel a layer, one line an arm."""
    shown = [index for index in _few(run) if kept[run.ways[index].name]["histogram"]]
    names = _some(layers(run, shown[0])) if shown else ()
    canvas, panels = _grid(max(len(names), 1))
    centres = diagnostics.bin_centres()
    for axes, name in zip(panels, names):
        for index in shown:
            counts = np.asarray(member(kept[run.ways[index].name]["histogram"][name], chosen[index].member))
            share = counts / max(counts.sum(), 1) / (centres[1] - centres[0])
            axes.step(centres, share, where="mid", lw=1.2, label=run.ways[index].name)
        axes.axvline(0, color="black", lw=0.8, ls=":")
        axes.set(title=name, xlabel="from the transition point, steps of the code")
    panels[0].set_ylabel("density of latent weights")
    if names:
        panels[0].legend(fontsize=7)
    canvas.savefig(path, dpi=120)


def learning_rates(run: Run, chosen: Sequence[Chosen], path: Path) -> None:
    """Accuracy over the grid of learning rates, one panel an optimizer."""
    groups = run.by_optimizer()
    canvas = Figure(figsize=(5.5 * len(groups), 4.4), layout="constrained")
    for axes, (optimizer, members) in zip(np.atleast_1d(canvas.subplots(1, len(groups))), groups.items()):
        for index in members:
            variant, settings = run.trainers[index].variant, chosen[index].settings
            means = [100 * outcome.judged.mean() for outcome in settings]
            errors = [100 * outcome.judged.std(ddof=1) if len(run.seeds) > 1 else 0 for outcome in settings]
            style = {"lw": 2} if variant.scheduled else {"lw": 1, "ls": "--"}
            axes.errorbar(
                run.ways[index].grid["lr"], means, errors, capsize=2, marker="o", ms=3, label=variant.name, **style
            )
        grid = run.ways[members[0]].grid["lr"]
        axes.set(xscale="log", xlabel="learning rate, or initial step size", title=optimizer)
        axes.set_xticks(grid, [f"{rate:g}" for rate in grid])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    canvas.axes[0].set_ylabel("test accuracy %")
    canvas.savefig(path, dpi=120)


def _pair(run: Run) -> tuple[int | None, int | None]:
    """The first scheduled arm and the plain one of its optimizer, where there are such."""
    scheduled = next((i for i, trainer in enumerate(run.trainers) if trainer.variant.scheduled), None)
    optimizer = None if scheduled is None else run.trainers[scheduled].variant.optimizer
    plain = [i for i, t in enumerate(run.trainers) if not t.variant.scheduled and not t.variant.remedy]
    same = [i for i in plain if run.trainers[i].variant.optimizer == optimizer]
    return scheduled, (same or plain or [None])[0]


def _shown(run: Run) -> list[int]:
    """The arms with the run's own quantizers: others' scales of movement can't be compared."""
    return [i for i, trainer in enumerate(run.trainers) if trainer.variant.family == trainer.family_of_run]


def _few(run: Run) -> list[int]:
    """Of those the first plain and the first scheduled one of each optimizer, and the remedies."""
    first = {}
    for index in _shown(run):
        variant = run.trainers[index].variant
        first.setdefault((variant.optimizer, variant.scheduled, variant.remedy), index)
    return list(first.values())


def _series(
    run: Run, results: Results, chosen: Sequence[Chosen], index: int, quantity: str
) -> tuple[list[int], list[float]]:
    """A logged quantity of an arm's chosen member, over the steps of its stage."""
    return _local(run, results, index, f"{quantity}_{chosen[index].member}")


def _local(run: Run, results: Results, index: int, metric: str) -> tuple[list[int], list[float]]:
    steps, values = results.curve(run.ways[index].name, metric)
    return [step - run.trainers[index].offset for step in steps], values


def _some(names: Sequence[str]) -> tuple[str, ...]:
    where = np.unique(np.linspace(0, len(names) - 1, MOST_LAYERS).round().astype(int))
    return tuple(names[index] for index in where)


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels, three a row; the first is always there."""
    columns = min(count, 3)
    rows = -(-count // columns)
    canvas = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    panels = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return canvas, panels[:count]
