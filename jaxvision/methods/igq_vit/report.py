"""What a comparison ends in: a table for each bit setting, the per-site SQNR, the phenomenon, and the figures."""

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxvision.engine.report import Figure, Report, Results, Table
from jaxvision.methods.igq_vit import comparison, diagnostics, export
from jaxvision.methods.igq_vit.comparison import Row
from jaxvision.quant import weights

if TYPE_CHECKING:
    from jaxvision.methods.igq_vit.task import Comparer

FAMILIES = ("qkv", "proj", "fc1", "fc2", "reduction", "softmax", "q", "k", "v")
"""Columns of the SQNR table, where the network has them."""
GROUPED = FAMILIES[:6]
"""Those that the methods treat differently."""


def make(comparer: "Comparer", trained: bool, results: Results) -> Report:
    """The report of a finished run."""
    found = collect(comparer.rows, results)
    methods = list(dict.fromkeys(row.method for row in comparer.rows))
    settings = list(dict.fromkeys(row.bits for row in comparer.rows))
    tables = [_accuracy(found, methods, bits) for bits in settings]
    if comparer.sqnr_images:
        tables += [_sqnr(found, methods, bits) for bits in settings]
    tables.append(_variation(comparer, results))
    notes = _notes(comparer, trained, results)
    summary = {
        f"{bits}/{method}/{name}": _mean(found, method, bits, name)
        for bits in settings
        for method in methods
        for name in ("accuracy", "kl")
    }
    files: dict[str, Any] = {"groups.json": json.dumps(_groups(found, methods, settings), indent=2) + "\n"}
    if comparer.export[0]:
        files["quantized.safetensors"] = functools.partial(_export, comparer, results.state)
    title = f"IGQ-ViT: {comparer.model.name}, {len(comparer.members)} seed(s)"
    return Report(title, tuple(tables), _figures(comparer, results, found, methods, settings), summary, notes, files)


def collect(rows: Sequence[Row], results: Results) -> dict[Row, dict[str, float]]:
    """The logged numbers of each row, seconds included."""
    logged = [row for row in results.rows if row["stage"] == "quantize"]
    times = [row for row in results.timings if row["stage"] == "quantize"]
    return {row: {**numbers, **seconds} for row, numbers, seconds in zip(rows, logged, times)}


def _values(found: dict[Row, dict[str, float]], method: str, bits: str, name: str) -> list[float]:
    return [
        numbers[name]
        for row, numbers in found.items()
        if (row.method, row.bits) == (method, bits) and numbers.get(name) is not None
    ]


def _mean(found: dict[Row, dict[str, float]], method: str, bits: str, name: str) -> float:
    values = _values(found, method, bits, name)
    return statistics.fmean(values) if values else float("nan")


def _spread(values: Sequence[float], form: str, factor: float = 1.0) -> str:
    """Mean and sample standard deviation over seeds."""
    if not values:
        return "-"
    mean = format(factor * statistics.fmean(values), form)
    return f"{mean} ± {format(factor * statistics.stdev(values), form)}" if len(values) > 1 else mean


def _accuracy(found: dict[Row, dict[str, float]], methods: Iterable[str], bits: str) -> Table:
    columns = (
        "method",
        "accuracy %",
        "KL to float",
        "agreement %",
        "GBOPs",
        "index %",
        "combine %",
        "calib. s",
        "eval s",
    )
    lines = []
    for method in methods:
        values = functools.partial(_values, found, method, bits)
        base = statistics.fmean(values("bops/base"))
        share = [100 * statistics.fmean(values(f"bops/{part}")) / base for part in ("index", "combine")]
        lines.append(
            (
                method,
                _spread(values("accuracy"), ".1f", 100),
                _spread(values("kl"), ".3f"),
                _spread(values("agreement"), ".1f", 100),
                f"{base / 1e9:.3g}",
                *(f"{part:.1f}" if part else "-" for part in share),
                f"{statistics.fmean(values('seconds/calibrate')):.2f}",
                f"{statistics.fmean(values('seconds/evaluate')):.2f}",
            )
        )
    caption = (
        "Mean ± standard deviation over seeds. KL(softmax float || softmax quantized) in nats; agreement of the argmax "
        "with the float network. GBOPs: base bit operations an image; index and combine: what run-time grouping adds "
        "(finding groups; rescaling partial sums in 32 bits). Seconds: calibration beyond collecting activations, "
        "compiling included, while the row before is evaluated; what methods share is paid by the first."
    )
    return Table(bits, columns, lines, caption)


def _sqnr(found: dict[Row, dict[str, float]], methods: Iterable[str], bits: str) -> Table:
    by_method = {method: _families(found, method, bits) for method in methods}
    families = [name for name in FAMILIES if any(name in values for values in by_method.values())]
    lines = [
        (method, *(f"{values[name]:.1f}" if name in values else "-" for name in families))
        for method, values in by_method.items()
    ]
    caption = "Mean over blocks and seeds; noise of quantizing each site alone, weights quantized."
    return Table(f"SQNR in dB, {bits}", ("method", *families), lines, caption)


def _families(found: dict[Row, dict[str, float]], method: str, bits: str) -> dict[str, float]:
    sites: dict[str, list[float]] = {}
    for row, numbers in found.items():
        if (row.method, row.bits) == (method, bits):
            for name, value in numbers.items():
                if name.startswith("sqnr/") and value is not None:
                    sites.setdefault(name.removeprefix("sqnr/"), []).append(value)
    return diagnostics.by_family({name: statistics.fmean(values) for name, values in sites.items()})


def _variation(comparer: "Comparer", results: Results) -> Table:
    """The phenomenon (section 10.1): how much a channel's range varies over images, and over channels."""
    bench = comparer.bench(results.state, 0)
    channels = [site for site in bench.context.sites if site.kind == "channels"]
    table = diagnostics.variation_table(channels, bench.ranges)
    lines = []
    for name in dict.fromkeys(diagnostics.family(site.name) for site in channels):
        pairs = [pair for site, pair in table.items() if diagnostics.family(site) == name]
        variation, spread = np.asarray(pairs).T
        lines.append(
            (name, f"{variation.min():.2f} - {variation.max():.2f}", f"{spread.min():.1f} - {spread.max():.1f}")
        )
    caption = (
        "Over the calibration images of the first seed, least and greatest block. Variation: standard deviation over "
        "images of a channel's range, over its mean, mean over channels. Spread: widest channel over the median one."
    )
    return Table("Inter-instance variation", ("input of", "variation", "static spread"), lines, caption)


def _notes(comparer: "Comparer", trained: bool, results: Results) -> tuple[str, ...]:
    notes = []
    if trained and comparer.stacked:
        curves = [results.curve("train", f"accuracy_{i}", "test")[1] for i in range(len(comparer.members))]
        last = [100 * curve[-1] for curve in curves if curve]
        notes.append(
            f"Float accuracy of the seeds {comparer.members}: {', '.join(f'{value:.1f}' for value in last)} %."
        )
    notes.append(
        f"{comparer.calibration_images} calibration images a seed, all sites calibrated on the float network; "
        f"{comparer.data.eval.num_examples} test images; weights: {comparer.policy.method} per output channel."
    )
    if comparer.policy.method == "percentile":
        settings = dict.fromkeys(row.bits for row in comparer.rows)
        benches = {bits: comparer.prepared(results.state, Row(0, bits, ""))[0] for bits in settings}
        chosen = ", ".join(f"{b.context.weight_policy.epsilon} % at {bits}" for bits, b in benches.items())
        how = "chosen on the calibration images of the first seed" if comparer.epsilon is None else "given"
        notes.append(f"Percentage cut off at each end of a weight's interval ({how}): {chosen}.")
    return tuple(notes)


def _groups(found: dict[Row, dict[str, float]], methods: Iterable[str], settings: Iterable[str]) -> dict[str, Any]:
    """The group counts by method, bits, seed and site."""
    chosen: dict[str, Any] = {}
    for row, numbers in found.items():
        counts = {k.removeprefix("groups/"): int(v) for k, v in numbers.items() if k.startswith("groups/")}
        if counts:
            chosen.setdefault(row.method, {}).setdefault(row.bits, {})[f"seed {row.member}"] = counts
    return chosen


def _export(comparer: "Comparer", state: Any, path: Path) -> None:
    """Writes the first seed's network of ``config.export`` as integers (see ``export``)."""
    method, bits = comparer.export
    row = Row(0, bits, method)
    bench, widths = comparer.prepared(state, row)
    built = bench.build(method, widths)
    policy = dataclasses.replace(bench.context.weight_policy, bits=widths.weight)
    _, codes = weights.quantize_params(bench.context.variables["params"], policy)
    facts = {"name": comparer.model.name, "method": method, "bits": bits, "seed": comparer.members[0]}
    model = export.QuantizedModel(built.network.variables, codes, built.network.quantizers, facts)
    export.save(path.with_suffix(""), model)


def _figures(
    comparer: "Comparer",
    results: Results,
    found: dict[Row, dict[str, float]],
    methods: Sequence[str],
    settings: Sequence[str],
) -> tuple[Figure, ...]:
    from jaxvision.methods.igq_vit import figures

    bench = comparer.bench(results.state, 0)
    made: list[tuple[str, Callable[[Path], None], str]] = [
        (
            "ranges",
            functools.partial(figures.ranges, bench),
            "Each dot is one channel in one calibration image; its colour is the group that quantizes it. Lines join "
            "the same channel over images: one channel, several groups.",
        ),
        (
            "kl",
            functools.partial(figures.bars, _matrix(found, methods, settings, "kl"), methods, settings),
            "KL divergence to the float network, mean and standard deviation over seeds; less is better.",
        ),
    ]
    igq = [method for method in methods if comparison.IGQ.fullmatch(method)]
    allocated = next((method for method in igq if "alloc" in method), None)
    if allocated:
        counts = _groups(found, methods, settings)[allocated]
        made.append(
            (
                "groups",
                functools.partial(figures.groups_by_site, {bits: counts[bits]["seed 0"] for bits in counts}, allocated),
                "Groups a site under the budget; attention pays no combining and takes many.",
            )
        )
    if comparer.sqnr_images:
        values = {method: _families(found, method, settings[0]) for method in methods}
        caption = f"SQNR of each kind of site at {settings[0]}, dB, mean over blocks and seeds."
        made.append(("sqnr", functools.partial(figures.heatmap, values, GROUPED), caption))
    if igq:
        made.append(
            ("objective", functools.partial(figures.objective, bench), "Objective of the calibration, over its start.")
        )
    return tuple(Figure(*each) for each in made)


def _matrix(
    found: dict[Row, dict[str, float]], methods: Sequence[str], settings: Sequence[str], name: str
) -> list[list[list[float]]]:
    return [[_values(found, method, bits, name) for method in methods] for bits in settings]
