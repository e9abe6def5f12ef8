"""What a search ends in: correlations with the truth, what was found, what it cost, and the found network's config."""

import functools
import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxvision.engine.report import Figure, Report, Results, Table
from jaxvision.methods.az_nas import exports, figures
from jaxvision.methods.az_nas import outcome as outcomes
from jaxvision.methods.az_nas.outcome import Outcome, Ranking, Truth
from jaxvision.methods.az_nas.spaces.catalog import Entry
from jaxvision.methods.az_nas.spaces.space import Space
from jaxvision.metrics import ranking


@dataclass(frozen=True)
class Settings:
    """How the report compares.

    Attributes:
      resamples: of the bootstrap.
      pool, runs: of the small searches in the scores (``outcome.picks``).
      seed: of those.
      scorers: the names under which the search timed its scorers.
      chunk: candidates of a step.
      notes: what was run, a sentence each.
    """

    resamples: int
    pool: int
    runs: int
    seed: int
    scorers: tuple[str, ...]
    chunk: int
    notes: tuple[str, ...] = ()


def make(
    title: str,
    entry: Entry,
    outcome: Outcome,
    truths: Sequence[Truth],
    settings: Settings,
    results: Results,
    notes: tuple[str, ...] = (),
) -> Report:
    """The report of a finished search; without truths it has no correlations.

    Args:
      title: of the report.
      entry: the space that was searched.
      outcome: the scores.
      truths: by data set.
      settings: see :class:`Settings`.
      results: of the engine.
      notes: more sentences on what was run.
    """
    space = entry.space
    correlations = {
        truth.name: outcomes.correlations(outcome, (*outcome.rankings, *outcome.ablation), truth, settings.resamples)
        for truth in truths
    }
    tables, summary = [], {}
    if truths:
        tables.append(_correlation_table("Rank correlation", outcome.rankings, outcome, truths, correlations))
        tables.append(_difference_table(outcome, truths, correlations))
        if outcome.ablation:
            tables.append(_correlation_table("Subsets", outcome.ablation, outcome, truths, correlations))
        tables.append(_search_table(outcome, truths, settings))
        for truth in truths:
            for each in outcome.rankings:
                found = correlations[truth.name][each.name]
                summary[f"{truth.name}/{each.name}/tau"] = found.kendall
                summary[f"{truth.name}/{each.name}/rho"] = found.spearman
            summary |= {f"{truth.name}/{name}/accuracy": value for name, value in truth.picked.items()}
    tables.append(_found_table(space, outcome))
    tables.append(_cost_table(settings, results))
    cost = space.cost(outcome.architectures[outcome.found])
    summary |= {"found/flops": float(cost.flops), "found/params": float(cost.params)}
    files = {
        "found.py": exports.config_file(space, outcome.architectures[outcome.found], title, entry.preset),
        "candidates.csv": exports.candidates_file(space, outcome),
    }
    notes = (*settings.notes, *notes, *_notes(outcome, entry.preset, results))
    drawn = _figures(outcome, truths, correlations)
    return Report(title, tuple(tables), drawn, summary, notes, files)


def _interval(value: float, interval: ranking.Interval) -> str:
    if not np.isfinite(interval.low):
        return f"{value:.3f}"  # some resample of few candidates has one accuracy only
    return f"{value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _correlation_table(
    title: str,
    rankings: Sequence[Ranking],
    outcome: Outcome,
    truths: Sequence[Truth],
    correlations: Mapping[str, Mapping[str, ranking.Correlation]],
) -> Table:
    rows = []
    for each in rankings:
        cells = []
        for truth in truths:
            found = correlations[truth.name][each.name]
            cells.append(_interval(found.kendall, found.interval("kendall")))
            cells.append(_interval(found.spearman, found.interval("spearman")))
        missing = max(outcome.missing[name] for name in each.columns)
        rows.append((each.name, *cells, str(missing or "-")))
    columns = [f"{truth.name} {name}" for truth in truths for name in ("τ", "ρ")]
    known = ", ".join(f"{len(truth.rows):,} ({truth.name})" for truth in truths)
    caption = (
        f"Kendall's τ-b and Spearman's ρ with test accuracy, 95 % bootstrap intervals; candidates whose accuracy is "
        f"known: {known}; ranked among {len(outcome.architectures):,}. No value: candidates for which a proxy had none "
        "(they rank last)."
    )
    return Table(title, ("ranking", *columns, "no value"), rows, caption)


def _difference_table(
    outcome: Outcome, truths: Sequence[Truth], correlations: Mapping[str, Mapping[str, ranking.Correlation]]
) -> Table:
    """Paired intervals of the main ranking's τ minus the others'."""
    rows = []
    for each in outcome.rankings[1:]:
        cells = []
        for truth in truths:
            one, other = (correlations[truth.name][name] for name in (outcome.main.name, each.name))
            cells.append(_interval(one.kendall - other.kendall, ranking.difference(one, other)))
        rows.append((each.name, *cells))
    caption = "On the same resamples; an interval above 0: better than chance explains."
    columns = ("minus", *(truth.name for truth in truths))
    return Table(f"τ of {outcome.main.name} minus τ of others", columns, rows, caption)


def _search_table(outcome: Outcome, truths: Sequence[Truth], settings: Settings) -> Table:
    pools = [
        outcomes.picks(outcome, truth, pool=settings.pool, runs=settings.runs, seed=settings.seed) for truth in truths
    ]
    rows = []
    for each in outcome.rankings:
        cells = []
        for truth, pool in zip(truths, pools):
            picked = truth.picked.get(each.name)
            cells += ["-" if picked is None else f"{picked:.2f}", _spread(pool.accuracy[each.name])]
        rows.append((each.name, *cells))
    for name, attribute in (("random architecture", "random"), ("best of the pool", "best")):
        cells = [cell for pool in pools for cell in ("-", _spread(getattr(pool, attribute)))]
        rows.append((name, *cells))
    what = truths[0].what
    rows.append((f"best of {what}", *(cell for truth in truths for cell in (f"{truth.optimum:.2f}", "-"))))
    columns = [name for truth, pool in zip(truths, pools) for name in (f"{truth.name} %", f"one of {pool.pool}, %")]
    caption = (
        f"Test accuracy of the pick from all {len(outcome.architectures):,} candidates; and of {settings.runs} picks "
        "from random pools of candidates whose accuracy is known, mean ± standard deviation."
    )
    return Table("Search", ("ranking", *columns), rows, caption)


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.2f} ± {values.std(ddof=1) if len(values) > 1 else 0:.2f}"


def _found_table(space: Space, outcome: Outcome) -> Table:
    index = outcome.found
    architecture = outcome.architectures[index]
    cost = space.cost(architecture)
    rows = [("architecture", space.to_string(architecture)), ("candidate", f"{index + 1:,}")]
    rows += [("FLOPs", f"{cost.flops:,}"), ("parameters", f"{cost.params:,}")]
    rows += [("layers", str(cost.layers))] if cost.layers else []
    rows += [(name, f"{outcome.scores[name][index]:.6g}") for name in outcome.main.columns]
    return Table("Found", ("", "value"), rows, "FLOPs are multiply-adds of one image, by the official counter.")


def _cost_table(settings: Settings, results: Results) -> Table:
    """Times from the log."""
    rows = []
    for name in settings.scorers:
        values = [row[f"seconds/{name}"] for row in results.timings if f"seconds/{name}" in row]
        median = statistics.median(values[1:] or values)
        rows.append((name, f"{1000 * median:.1f}", f"{settings.chunk * values[0]:.1f}"))
    caption = (
        "Median of the steps after the first, by the clock, on whatever else the machine does; on CPU scorers run side "
        "by side on its cores. The first step compiles."
    )
    return Table("Cost", ("scorer", "ms/architecture", f"first {settings.chunk}, s"), rows, caption)


def _notes(outcome: Outcome, preset: str, results: Results) -> tuple[str, ...]:
    bytes_each = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_each
    missing = ", ".join(f"{name} {count}" for name, count in outcome.missing.items() if count) or "none"
    notes = [f"Peak memory of the process: {peak / 2**30:.2f} GiB.", f"Candidates without a value: {missing}."]
    rejected = sum(row.get("rejected", 0) for row in results.rows)
    if rejected:
        notes.append(f"{rejected:,.0f} candidates beyond the budget were thrown away unscored.")
    command = f"python -m jaxvision.main --config={results.directory}/found.py"
    notes.append(f"Train what was found: {command}{f':{preset}' if preset else ''}")
    return tuple(notes)


def _figures(
    outcome: Outcome, truths: Sequence[Truth], correlations: Mapping[str, Mapping[str, ranking.Correlation]]
) -> tuple[Figure, ...]:
    made = []
    for truth in truths:
        taus = {name: found.kendall for name, found in correlations[truth.name].items()}
        shown = [each for each in outcome.rankings if not each.name.startswith(f"{outcomes.AZ_NAS}_")]
        draw = functools.partial(figures.rank_scatter, outcome, truth, shown, taus)
        name = "ranks" if len(truths) == 1 else f"ranks_{truth.name.lower()}"
        made.append(Figure(name, draw, "Every dot is an architecture; right is better by the score, up by accuracy."))
    if len(outcome.rankings) > 1:
        draw = functools.partial(figures.proxy_matrix, outcome, outcome.rankings)
        made.append(Figure("proxies", draw, "How alike the rankings are."))
    draw = functools.partial(figures.progress, outcome, truths[0] if truths else None)
    made.append(Figure("search", draw, "The search over its candidates."))
    return tuple(made)
