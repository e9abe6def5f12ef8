"""What a run ends in: accuracy by learning rate, what was chosen, what the weights did, and the figures."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxvision.engine import arms, quantized_files, reestimation
from jaxvision.engine.arms import spread
from jaxvision.engine.report import Figure, Report, Results, Table
from jaxvision.engine.seeds import member
from jaxvision.methods.trs.outcome import JUDGED, Chosen, Run, choose
from jaxvision.methods.trs.training import METRIC, Trainer


def make(run: Run, results: Results) -> Report:
    """The report of a finished run."""
    chosen = choose(run, results)
    tables = [_rates_table(run, chosen, name, members) for name, members in run.by_optimizer().items()]
    tables.append(_weights_table(run, results, chosen))
    summary = {}
    for way, each in zip(run.ways, chosen):
        summary[f"{way.name}/{METRIC}"] = float(each.best.judged.mean())
        summary[f"{way.name}/lr"] = way.grid["lr"][each.index]
        for rate, outcome in zip(way.grid["lr"], each.settings):
            summary[f"{way.name}/{METRIC}@{rate:g}"] = float(outcome.judged.mean())
    files = {}
    if run.export:
        trainer, variables = _exported(run, results, chosen)
        left = (run.model, trainer.variant.family, trainer.network, variables)
        files[quantized_files.WEIGHTS] = functools.partial(quantized_files.save_quantized, *left)
        if trainer.latent:
            files[quantized_files.INTEGERS] = functools.partial(quantized_files.save_integers, *left)
    notes = _notes(run, results, chosen)
    return Report(f"TRS: {run.title}", tuple(tables), _figures(run, results, chosen), summary, notes, files)


def _rates_table(run: Run, chosen: Sequence[Chosen], optimizer: str, members: Sequence[int]) -> Table:
    rates = run.ways[members[0]].grid["lr"]
    rows = []
    for index in members:
        each = chosen[index]
        cells = [spread(outcome.judged, scale=100) for outcome in each.settings]
        rows.append((run.ways[index].name, *cells, f"{rates[each.index]:g}", spread(each.best.judged, scale=100)))
    columns = ("arm", *(f"LR {rate:g}" for rate in rates), "chosen LR", "at the chosen LR")
    caption = (
        f"Test accuracy of the last step in %, {run.data.eval.num_examples} images, mean ± standard deviation over "
        f"{len(run.seeds)} seed(s). With transition rates scheduled LR is the initial step size."
    )
    if run.data.validation is not None:
        caption += f" Each arm's own rate is chosen on {run.data.validation.num_examples} other images."
    return Table(f"{optimizer}, {_bits(run)}", columns, rows, caption)


def _bits(run: Run) -> str:
    """``W1A1``, or ``mixed bits``."""
    found = {
        (layer.bits.weight or 32, layer.bits.input or 32)
        for layer in run.trainers[0].network.check(run.model.image).values()
    }
    return "W{}A{}".format(*found.pop()) if len(found) == 1 else "mixed bits"


WEIGHT_COLUMNS = ("arm", "rate, middle", "rate, end", "target, middle", "moves, middle", "moves, end", "distance, end",
                  "oscillating %", "frozen %")  # fmt: skip


def _weights_table(run: Run, results: Results, chosen: Sequence[Chosen]) -> Table:
    """What the weights did in the first seed at the chosen rate."""
    rows = []
    for trainer, way, each in zip(run.trainers, run.ways, chosen):
        rate, moves = (_curve(results, way, each, name) for name in ("rate", "weights/effective_step"))
        target = results.curve(way.name, "target")[1]
        distance, oscillating, frozen = (
            _curve(results, way, each, name) for name in ("weights/distance", "weights/oscillating", "weights/frozen")
        )
        rows.append(
            (
                way.name,
                *(_small(value) for value in (_middle(rate), _end(rate), _middle(target))),
                *(_small(value) for value in (_middle(moves), _end(moves))),
                "-" if not distance else f"{_end(distance):.3f}",
                f"{100 * _end(oscillating):.1f}" if oscillating else "-",
                f"{100 * _end(frozen):.1f}" if trainer.variant.remedy == "freezing" and frozen else "-",
            )
        )
    caption = (
        "First seed, chosen LR; means over layers of the middle and the last tenth of the training. Rate: fraction of "
        "codes that change in a step. Moves: mean change of the quantized weights in a step. Distance: of latent "
        "weights to their next transition point, in steps of the code. Oscillating: weights whose code turned back in "
        "more than 0.5 % of the steps (running average)."
    )
    return Table("What the weights did", WEIGHT_COLUMNS, rows, caption)


def _curve(results: Results, way: arms.Arm, each: Chosen, quantity: str) -> list[float]:
    """A quantity of the chosen member over time; mean over layers where it is logged for each."""
    prefix, suffix = f"{quantity}/", f"_{each.member}"
    values = []
    for row in results.rows:
        if row["stage"] == way.name and row["kind"] == "train":
            found = [
                v for k, v in row.items() if k == quantity + suffix or (k.startswith(prefix) and k.endswith(suffix))
            ]
            if found:
                values.append(float(np.mean(found)))
    return values


def _middle(values: Sequence[float]) -> float:
    tenth = max(len(values) // 10, 1)
    centre = len(values) // 2
    return float(np.mean(values[centre - tenth // 2 : centre - tenth // 2 + tenth])) if values else float("nan")


def _end(values: Sequence[float]) -> float:
    return float(np.mean(values[-max(len(values) // 10, 1) :])) if values else float("nan")


def _small(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2g}"


def _notes(run: Run, results: Results, chosen: Sequence[Chosen]) -> tuple[str, ...]:
    notes = []
    if run.pretrained_here:
        values = [results.last("float", JUDGED, f"{METRIC}_{index}") for index in range(len(run.seeds))]
        notes.append(f"Float networks: {spread(np.asarray(values), scale=100)} % of the test images.")
    for members in run.by_optimizer().values():
        plain = next((i for i in members if _is_plain(run.trainers[i])), None)
        for index in members:
            if plain is not None and run.trainers[index].variant.scheduled:
                notes.append(_against(run, chosen, plain, index))
    if run.reestimated:
        rows = {way.name: (way.name, each.members(run)) for way, each in zip(run.ways, chosen)}
        notes.append(reestimation.note(results, rows, METRIC, JUDGED, run.reestimated))
    families = {trainer.variant.family for trainer in run.trainers}
    if "W1" in _bits(run) and "lsq" in families:
        notes.append("LSQ has no two codes at one bit; its weights are mean|w| sign(w) of each channel there.")
    if "A1" in _bits(run) and "pact" in families:
        notes.append(
            "PACT's bound starts at 3 std(x) / sqrt(1 - 2 / pi) at one bit, where max(x) passes next to nothing."
        )
    return tuple(notes)


def _is_plain(trainer: Trainer) -> bool:
    variant = trainer.variant
    return not variant.scheduled and not variant.remedy and variant.family == trainer.family_of_run


def _against(run: Run, chosen: Sequence[Chosen], plain: int, index: int) -> str:
    """A sentence on a scheduled arm beside the plain one of its optimizer."""
    gain = 100 * (chosen[index].best.judged.mean() - chosen[plain].best.judged.mean())
    text = f"{run.ways[index].name} against {run.ways[plain].name}, each at its own chosen LR: {gain:+.1f} points"
    if len(run.seeds) > 1:
        deviations = [100 * chosen[i].best.judged.std(ddof=1) for i in (plain, index)]
        text += f" (standard deviations over seeds {deviations[0]:.1f} and {deviations[1]:.1f})"
    if len(chosen[index].settings) > 1:
        lows = [100 * min(outcome.judged.mean() for outcome in chosen[i].settings) for i in (index, plain)]
        text += f"; at the worst LR of the grid {lows[0]:.1f} against {lows[1]:.1f} %"
    return f"{text}."


def _exported(run: Run, results: Results, chosen: Sequence[Chosen]) -> tuple[Trainer, Any]:
    """The exported arm and its variables: the first seed at the chosen rate."""
    index = [way.name for way in run.ways].index(run.export)
    left = arms.kept(results.state, run.ways[-1])[run.export]["variables"]
    return run.trainers[index], member(left, chosen[index].member)


def _figures(run: Run, results: Results, chosen: Sequence[Chosen]) -> tuple[Figure, ...]:
    from jaxvision.methods.trs import figures

    kept: dict[str, Any] = arms.kept(results.state, run.ways[-1])
    draw = functools.partial
    return tuple(
        Figure(name, drawn, caption)
        for name, drawn, caption in (
            (
                "rates",
                draw(figures.rates, run, results, chosen),
                "Fraction of codes that change in a step: k (faint), its running mean K, its target R, and k of the "
                "plain optimizer. First seed, chosen LR.",
            ),
            (
                "step_size",
                draw(figures.step_size, run, results, chosen),
                "Step size U of each layer; dashed: plain LR; dotted: the limits of U, where there are any.",
            ),
            (
                "movement",
                draw(figures.movement, run, results, chosen),
                "Distance of latent weights to their transition points; mean change of quantized weights in a step.",
            ),
            (
                "histogram",
                draw(figures.histogram, run, kept, chosen),
                "Latent weights around their transition points at the end; the outer bins hold what lies beyond.",
            ),
            ("learning_rates", draw(figures.learning_rates, run, chosen), "Test accuracy over the grid of rates."),
        )
    )
