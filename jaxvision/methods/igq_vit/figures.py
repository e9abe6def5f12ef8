"""The pictures of the report. Each function draws one PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from jaxvision.methods.igq_vit import diagnostics, groups
from jaxvision.methods.igq_vit.comparison import ROW_GROUPS, Bench

SHOWN = ("qkv", "proj", "fc2")
"""Sites of the deepest block whose ranges are drawn: after LayerNorm, attention and GELU."""


def ranges(bench: Bench, path: Path) -> None:
    """Channel ranges over instances in the (min, max) plane, coloured by their group of 8."""
    sites = [site for site in bench.context.sites if site.kind == "channels"]
    last = {diagnostics.family(site.name): site.name for site in sites}
    names = [last[family] for family in SHOWN if family in last]
    bounds, _ = bench.bounds({site.name: ROW_GROUPS for site in bench.context.sites if site.grouped})
    canvas = Figure(figsize=(4.6 * len(names), 4.4), layout="constrained")
    for axes, name in zip(np.atleast_1d(canvas.subplots(1, len(names))), names):
        found = np.asarray(bench.ranges[name])
        centre = np.asarray(bounds[name])[0]
        group = np.asarray(groups.assign(found, centre))
        axes.scatter(found[..., 0], found[..., 1], c=group, cmap="tab10", vmin=0, vmax=9, s=3, alpha=0.35, linewidths=0)
        variation = found[..., 1].std(0) + found[..., 0].std(0)
        for channel in np.argsort(variation)[-2:]:
            axes.plot(found[:8, channel, 0], found[:8, channel, 1], "-o", color="black", lw=0.6, ms=2.5, alpha=0.7)
        axes.scatter(centre[:, 0], centre[:, 1], marker="X", s=70, color="red", edgecolors="white", label="bounds")
        axes.set(title=f"input of {name}", xlabel="minimum over tokens", ylabel="maximum over tokens")
        axes.legend(loc="lower left", fontsize=8)
    canvas.savefig(path, dpi=120)


def bars(
    values: Sequence[Sequence[Sequence[float]]], methods: Sequence[str], settings: Sequence[str], path: Path
) -> None:
    """One panel a bit setting, one bar a method: ``values[setting][method]`` over seeds; logarithmic."""
    canvas = Figure(figsize=(4.2 * len(settings), 0.6 + 0.3 * len(methods)), layout="constrained")
    for index, axes in enumerate(np.atleast_1d(canvas.subplots(1, len(settings), sharey=True))):
        means = [np.mean(each) if each else np.nan for each in values[index]]
        spread = [np.std(each, ddof=1) if len(each) > 1 else 0 for each in values[index]]
        colour = ["tab:red" if method.startswith("igq") else "0.6" for method in methods]
        axes.barh(range(len(methods)), means, xerr=spread, color=colour, error_kw={"lw": 0.8})
        axes.set_yticks(range(len(methods)), methods)
        axes.invert_yaxis()
        axes.set(xscale="log", title=settings[index], xlabel="KL to float (nats)")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="x", alpha=0.3)
    # The y axis is shared: inverting it for every panel would turn it back for an even number of them.
    first = canvas.axes[0]
    first.set_ylim(len(methods) - 0.4, -0.6)
    canvas.savefig(path, dpi=120)


def groups_by_site(counts: Mapping[str, Mapping[str, int]], method: str, path: Path) -> None:
    """Group counts: ``counts[setting][site]``; one row a setting, one cell a site."""
    names = list(next(iter(counts.values())))
    table = np.asarray([[counts[bits][name] for name in names] for bits in counts])
    canvas = Figure(figsize=(2 + 0.42 * len(names), 2.6 + 0.4 * len(counts)), layout="constrained")
    axes = canvas.subplots()
    axes.imshow(table, cmap="viridis", aspect="auto")
    for (i, j), count in np.ndenumerate(table):
        axes.text(j, i, str(count), ha="center", va="center", color="white", fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(counts)), list(counts))
    axes.set_title(f"groups chosen by {method}, first seed")
    canvas.savefig(path, dpi=120)


def heatmap(values: Mapping[str, Mapping[str, float]], families: Sequence[str], path: Path) -> None:
    """SQNR: ``values[method][family]`` in dB, greener is better within a column."""
    columns = [name for name in families if any(name in row for row in values.values())]
    table = np.asarray([[row.get(name, np.nan) for name in columns] for row in values.values()])
    low, high = np.nanmin(table, 0), np.nanmax(table, 0)
    canvas = Figure(figsize=(2.5 + 0.75 * len(columns), 1 + 0.3 * len(values)), layout="constrained")
    axes = canvas.subplots()
    axes.imshow((table - low) / np.maximum(high - low, 1e-9), cmap="RdYlGn", aspect="auto", vmin=0, vmax=1)
    for (i, j), value in np.ndenumerate(table):
        axes.text(j, i, f"{value:.1f}" if np.isfinite(value) else "-", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(values)), list(values))
    canvas.savefig(path, dpi=120)


def objective(bench: Bench, path: Path) -> None:
    """The calibration's objective over its iterations, one line a site, relative to its start."""
    _, history = bench.bounds({site.name: ROW_GROUPS for site in bench.context.sites if site.grouped})
    canvas = Figure(figsize=(6, 4), layout="constrained")
    axes = canvas.subplots()
    colours = {}
    for name, values in history.items():
        family = diagnostics.family(name)
        colour = colours.setdefault(family, f"C{len(colours)}")
        line = np.asarray(values).sum(0)
        axes.plot(line / max(line[0], 1e-30), color=colour, alpha=0.7, label=family if colours[family] else None)
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels())}
    axes.legend(handles.values(), handles.keys())
    axes.set(xlabel="iteration", ylabel="objective / its start", title=f"{ROW_GROUPS} groups")
    axes.grid(alpha=0.3)
    canvas.savefig(path, dpi=120)
