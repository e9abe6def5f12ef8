"""What a comparison ends in: a table for each bit setting, the per-site SQNR, the phenomenon, and the figures."""

import functools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxvision.engine.report import Figure, Report, Results, Table
from jaxvision.methods.igq_vit import comparison, diagnostics, export, groups
from jaxvision.methods.igq_vit.calibration import common_codes
from jaxvision.methods.igq_vit.comparison import Row

if TYPE_CHECKING:
    from jaxvision.methods.igq_vit.task import Comparer

FAMILIES = ("qkv", "proj", "fc1", "fc2", "reduction", "softmax", "q", "k", "v")
"""Columns of the SQNR table, where the network has them."""
GROUPED = FAMILIES[:6]
"""Those that the methods treat differently."""
Values = list[float | None]
"""Measurements, None where one wasn't finite."""
Found = dict[Row, dict[str, Any]]
"""What was logged of each row."""


def make(comparer: "Comparer", results: Results) -> Report:
    """The report of a finished run."""
    found = collect(comparer.rows, results)
    methods = list(dict.fromkeys(row.method for row in comparer.rows))
    settings = list(dict.fromkeys(row.bits for row in comparer.rows))
    tables = [accuracy_table(found, methods, bits) for bits in settings]
    if comparer.sqnr_images:
        tables += [_sqnr(found, methods, bits) for bits in settings]
    tables.append(_variation(comparer, results))
    notes = _notes(comparer, found, results)
    files: dict[str, Any] = {
        "groups.json": json.dumps(_groups(comparer, found), indent=2) + "\n",
        "calibration.json": json.dumps(_drawn(comparer), indent=2) + "\n",
    }
    if comparer.export[0]:
        files["quantized.safetensors"] = functools.partial(_export, comparer, results.state)
    title = f"IGQ-ViT: {comparer.model.name}, {len(comparer.members)} seed(s)"
    figures = _figures(comparer, results, found, methods, settings)
    return Report(title, tuple(tables), figures, summarize(found, methods, settings), notes, files)


def collect(rows: Sequence[Row], results: Results) -> Found:
    """The logged numbers of each row, seconds included."""
    logged = [row for row in results.rows if row["stage"] == "quantize"]
    times = [row for row in results.timings if row["stage"] == "quantize"]
    return {row: {**numbers, **seconds} for row, numbers, seconds in zip(rows, logged, times)}


def summarize(found: Found, methods: Iterable[str], settings: Sequence[str]) -> dict[str, float]:
    """Means over seeds for other programs: the finite ones, as JSON knows no others."""
    every = {
        f"{bits}/{method}/{name}": _values(found, method, bits, name)
        for bits in settings
        for method in methods
        for name in ("accuracy", "kl")
    }
    every["float/accuracy"] = _float_accuracies(found)
    return {name: statistics.fmean(known) for name, values in every.items() if (known := _known(values))}


def _values(found: Found, method: str, bits: str, name: str) -> Values:
    """One value a seed; None where it wasn't finite or doesn't exist."""
    return [numbers.get(name) for row, numbers in found.items() if (row.method, row.bits) == (method, bits)]


def _known(values: Values) -> list[float]:
    return [value for value in values if value is not None]


def _float_accuracies(found: Found) -> Values:
    """Of the float network, one value a seed."""
    return list({row.member: numbers.get("float_accuracy") for row, numbers in found.items()}.values())


def _spread(values: Values, form: str, factor: float = 1.0, what: str = "seeds", deviation: bool = True) -> str:
    """Mean and sample standard deviation of the finite values, which says so where some aren't."""
    known = [factor * value for value in _known(values)]
    left_out = f"{len(known)} of {len(values)} {what}"
    if not known:
        return left_out
    text = format(statistics.fmean(known), form)
    if deviation and len(known) > 1:
        text += f" ± {format(statistics.stdev(known), form)}"
    return text if len(known) == len(values) else f"{text} ({left_out})"


def accuracy_table(found: Found, methods: Iterable[str], bits: str) -> Table:
    """Accuracy, divergence, cost and time of the float network and of each method at one bit setting."""
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
    lines = [("float", _spread(_float_accuracies(found), ".1f", 100), *["-"] * 7)]
    for method in methods:
        values = functools.partial(_values, found, method, bits)
        base = statistics.fmean(values("bops/base"))
        lines.append(
            (
                method,
                _spread(values("accuracy"), ".1f", 100),
                _spread(values("kl"), ".3f"),
                _spread(values("agreement"), ".1f", 100),
                f"{base / 1e9:.3g}",
                *(_share(_known(values(f"bops/{part}")), base) for part in ("index", "combine")),
                f"{statistics.fmean(values('seconds/calibrate')):.2f}",
                f"{statistics.fmean(values('seconds/evaluate')):.2f}",
            )
        )
    caption = (
        "Mean ± standard deviation over seeds. KL(softmax float || softmax quantized) in nats; agreement of the argmax "
        "with the float network. GBOPs: base bit operations an image; index and combine: what run-time grouping adds "
        "(finding groups; rescaling partial sums in 32 bits; n/a: no kernel could do it). Seconds: calibration beyond "
        "collecting activations, compiling included, while the row before is evaluated; what methods share is paid by "
        "the first."
    )
    return Table(bits, columns, lines, caption)


def _share(cost: Sequence[float], base: float) -> str:
    """An overhead in per cent of the base cost: "-" for none, "n/a" for an unknown one."""
    if not cost:
        return "n/a"
    share = 100 * statistics.fmean(cost) / base
    return f"{share:.1f}" if share else "-"


def _sqnr(found: Found, methods: Iterable[str], bits: str) -> Table:
    by_method = {method: _families(found, method, bits) for method in methods}
    families = [name for name in FAMILIES if any(name in values for values in by_method.values())]
    lines = [
        (
            method,
            *(
                _spread(values[name], ".1f", what="sites", deviation=False) if name in values else "-"
                for name in families
            ),
        )
        for method, values in by_method.items()
    ]
    caption = "Mean over blocks and seeds; noise of quantizing each site alone, weights quantized."
    return Table(f"SQNR in dB, {bits}", ("method", *families), lines, caption)


def _families(found: Found, method: str, bits: str) -> dict[str, Values]:
    """The SQNR of each block and seed by kind of site."""
    families: dict[str, Values] = {}
    for row, numbers in found.items():
        if (row.method, row.bits) == (method, bits):
            for name, value in numbers.items():
                if name.startswith("sqnr/"):
                    families.setdefault(diagnostics.family(name.removeprefix("sqnr/")), []).append(value)
    return families


def _variation(comparer: "Comparer", results: Results) -> Table:
    """The phenomenon (section 10.1): how much a channel's range varies over images, and over channels."""
    bench = comparer.bench(results.state, 0)
    channels = [site for site in bench.context.sites if site.kind == "channels"]
    bounds, _ = bench.bounds({site.name: comparison.ROW_GROUPS for site in bench.context.sites if site.grouped})
    table: dict[str, list[tuple[float, ...]]] = {}
    for site in channels:
        ranges = bench.ranges[site.name]
        group = np.asarray(groups.assign(ranges, bounds[site.name][0]))
        members = diagnostics.group_histogram(group, comparison.ROW_GROUPS)
        numbers = (*diagnostics.instance_variation(ranges), 100 * diagnostics.reassigned_fraction(group))
        table.setdefault(diagnostics.family(site.name), []).append((*numbers, members.min(), members.max()))
    lines = []
    for name, blocks in table.items():
        low, high = np.min(blocks, 0), np.max(blocks, 0)
        forms = (".2f", ".1f", ".0f")
        spans = [f"{a:{form}} - {b:{form}}" for a, b, form in zip(low, high, forms)]
        lines.append((name, *spans, f"{low[3]:.0f} - {high[4]:.0f}"))
    caption = (
        "Over the calibration images of the first seed, least and greatest block. Variation: standard deviation over "
        "images of a channel's range, over its mean, mean over channels. Spread: widest channel over the median one. "
        f"Reassigned, of {comparison.ROW_GROUPS} groups: (image, channel) pairs outside the channel's most frequent "
        "group, where 0 would mean that a fixed assignment does. Channels: in the smallest and the largest group, mean "
        "over images."
    )
    columns = ("input of", "variation", "static spread", "reassigned %", "channels a group")
    return Table("Inter-instance variation", columns, lines, caption)


def _notes(comparer: "Comparer", found: Found, results: Results) -> tuple[str, ...]:
    each = ["not finite" if value is None else f"{100 * value:.1f}" for value in _float_accuracies(found)]
    per = "output channel" if comparer.policy.granularity == "channel" else "tensor"
    sequential = "IGQ's rows site after site on the quantized network, the others"
    how = sequential if comparer.settings.sequential else "all sites"
    notes = [
        f"Float accuracy of the seeds {comparer.members}: {', '.join(each)} %.",
        f"{comparer.calibration_images} calibration images a seed (which: calibration.json), {how} calibrated on the "
        f"float network; {comparer.data.eval.num_examples} test images; weights: {comparer.policy.method} per {per}.",
    ]
    if comparer.policy.method == "percentile":
        settings = dict.fromkeys(row.bits for row in comparer.rows)
        benches = {bits: comparer.prepared(results.state, Row(0, bits, ""))[0] for bits in settings}
        chosen = ", ".join(f"{b.context.weight_policy.epsilon} % at {bits}" for bits, b in benches.items())
        how = "chosen on the calibration images of the first seed" if comparer.epsilon is None else "given"
        notes.append(f"Percentage cut off at each end of a weight's interval ({how}): {chosen}.")
    return tuple(notes)


def _groups(comparer: "Comparer", found: Found) -> dict[str, Any]:
    """The group counts by method, bits, seed and site."""
    chosen: dict[str, Any] = {}
    for row, numbers in found.items():
        counts = {k.removeprefix("groups/"): int(v) for k, v in numbers.items() if k.startswith("groups/")}
        if counts:
            chosen.setdefault(row.method, {}).setdefault(row.bits, {})[_seed(comparer, row.member)] = counts
    return chosen


def _seed(comparer: "Comparer", member: int) -> str:
    return f"seed {comparer.members[member]}"


def _drawn(comparer: "Comparer") -> dict[str, list[int]]:
    """The calibration images of each seed, by their numbers in the training split."""
    return {_seed(comparer, member): comparer.drawn(member).tolist() for member in range(len(comparer.members))}


def _export(comparer: "Comparer", state: Any, path: Path) -> None:
    """Writes the first seed's network of ``config.export`` as integers (see ``export``)."""
    method, bits = comparer.export
    bench, widths = comparer.prepared(state, Row(0, bits, method))
    network = bench.build(method, widths).network
    facts = {
        "model": comparer.model.name,
        "num_classes": comparer.model.module.num_classes,
        "method": method,
        "bits": bits,
        "seed": comparer.members[0],
    }
    codes = common_codes(bench.context, widths)
    model = export.QuantizedModel(network.variables, codes, network.quantizers, facts)
    export.save(path.with_suffix(""), model)


def _figures(
    comparer: "Comparer",
    results: Results,
    found: Found,
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
        counts, first = _groups(comparer, found)[allocated], _seed(comparer, 0)
        made.append(
            (
                "groups",
                functools.partial(figures.groups_by_site, {bits: counts[bits][first] for bits in counts}, allocated),
                "Groups a site under the budget; attention pays no combining and takes many.",
            )
        )
    if comparer.sqnr_images:
        values = {
            method: {name: statistics.fmean(known) for name, each in families.items() if (known := _known(each))}
            for method in methods
            for families in [_families(found, method, settings[0])]
        }
        caption = f"SQNR of each kind of site at {settings[0]}, dB, mean over blocks and seeds."
        made.append(("sqnr", functools.partial(figures.heatmap, values, GROUPED), caption))
    if igq:
        made.append(
            ("objective", functools.partial(figures.objective, bench), "Objective of the calibration, over its start.")
        )
    return tuple(Figure(*each) for each in made)


def _matrix(found: Found, methods: Sequence[str], settings: Sequence[str], name: str) -> list[list[list[float]]]:
    return [[_known(_values(found, method, bits, name)) for method in methods] for bits in settings]
