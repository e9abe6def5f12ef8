"""The task ``az_nas``: [search: propose, score, rank] -> [train a sample: the truth] -> correlations, what was found.

The only place where the configuration is read (its fields are explained in ``configs/az_nas.py``).
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.engine.report import Report, Results
from jaxvision.engine.task import Stage, State, Task
from jaxvision.methods.az_nas import outcome as outcomes
from jaxvision.methods.az_nas import report, table
from jaxvision.methods.az_nas.building import build_search
from jaxvision.methods.az_nas.outcome import Outcome, Truth
from jaxvision.methods.az_nas.search import Search
from jaxvision.methods.az_nas.spaces import catalog
from jaxvision.methods.az_nas.spaces.catalog import Entry


def make(config: Config) -> Task:
    """The task of a configuration.

    Raises:
      ConfigError, DataError: anything in it that can't work, a budget that nothing meets among it.
    """
    entry = catalog.build(config.space)
    search, numbers = build_search(config, entry)
    path = config.benchmark_table
    if path and not entry.in_benchmark:
        raise ConfigError(
            f"config.benchmark_table={path!r} is NAS-Bench-201's; config.space.name={entry.name!r} has no such table"
        )
    accuracies = table.read(path) if path else None
    settings = _report_settings(config, entry, search, numbers.chunk)

    def init(key: jax.Array) -> State:
        del key
        return State(jnp.zeros((), jnp.int32), extra=search.empty())

    def describe(step: int) -> str:
        last = min((step + 1) * numbers.chunk, numbers.count)
        return f"candidates {step * numbers.chunk + 1:,} to {last:,}"

    stage = Stage("search", numbers.steps, numbers, search.step, compiled=False, label=describe)
    run = Run(entry, search, settings, accuracies)
    return Task("az_nas", init, (stage,), functools.partial(_report, run))


@dataclass(frozen=True)
class Run:
    """What the report needs to know of a run."""

    entry: Entry
    search: Search
    settings: report.Settings
    accuracies: table.AccuracyTable | None


def _report_settings(config: Config, entry: Entry, search: Search, chunk: int) -> report.Settings:
    block, scoring = config.report, config.scoring
    what = "drawn with replacement" if config.search.method == "random" else f"method {config.search.method}"
    draws = "one draw" if scoring.repeats == 1 else f"mean over {scoring.repeats} draws"
    notes = [
        f"{search.count:,} candidates of the space {entry.name} ({what}), scored on {scoring.batch_size} noise images "
        f"of {scoring.resolution} x {scoring.resolution}, {draws} of weights, images and probes each."
    ]
    return report.Settings(
        resamples=block.positive("resamples"),
        pool=block.positive("pool"),
        runs=block.positive("runs"),
        seed=config.seed,
        scorers=tuple(search.scorings),
        chunk=chunk,
        preset=entry.preset,
        notes=tuple(notes),
    )


def _report(run: Run, results: Results) -> Report:
    history = run.search.history(results.state, run.search.count)
    outcome = outcomes.read(history.architectures, history.scores, run.search.columns, run.search.ranked)
    truths = [] if run.accuracies is None else _benchmark_truths(run, outcome)
    title = f"AZ-NAS: {run.search.count:,} candidates of {run.entry.name}"
    return report.make(title, run.entry.space, outcome, truths, run.settings, results)


def _benchmark_truths(run: Run, outcome: Outcome) -> list[Truth]:
    """The benchmark's accuracies of the candidates."""
    index = np.asarray([run.entry.number(architecture) for architecture in outcome.architectures])
    truths = []
    for name, accuracy in run.accuracies.test.items():
        picked = {each.name: float(accuracy[index[np.argmax(each.of(outcome.scores))]]) for each in outcome.rankings}
        rows = np.arange(len(index))
        truths.append(Truth(table.DATASETS[name], rows, accuracy[index], float(accuracy.max()), "the space", picked))
    return truths
