"""The task ``az_nas``: [search: propose, score, rank] -> [truth: train a sample] -> correlations, what was found.

The fields of the configuration are explained in ``configs/az_nas.py``; ``building.py`` and ``truth.py`` read their own.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.engine.report import Report, Results
from jaxvision.engine.task import Batch, Metrics, Stage, State, Task
from jaxvision.methods.az_nas import outcome as outcomes
from jaxvision.methods.az_nas import report, table, truth
from jaxvision.methods.az_nas.building import build_search
from jaxvision.methods.az_nas.outcome import Outcome, Truth
from jaxvision.methods.az_nas.search import Numbers, Search
from jaxvision.methods.az_nas.spaces import catalog
from jaxvision.methods.az_nas.spaces.catalog import Entry


def make(config: Config) -> Task:
    """The task of a configuration.

    Raises:
      ConfigError, DataError: anything in it that can't work, a budget that nothing meets among it.
    """
    entry = catalog.build(config.space, config.seed)
    search, numbers = build_search(config, entry)
    path = config.benchmark_table
    if path and not entry.in_benchmark:
        raise ConfigError(
            f"config.benchmark_table={path!r} is NAS-Bench-201's; config.space.name={entry.name!r} has no such table"
        )
    trained = truth.build(config, entry, search.count, outcomes.rankings(search.columns, search.ranked))
    run = Run(
        entry=entry,
        search=search,
        trained=trained,
        accuracies=table.read(path) if path else None,
        settings=_report_settings(config, search, numbers),
    )

    def init(key: jax.Array) -> State:
        del key
        extra = search.empty()
        if run.trained is not None:
            extra[truth.PICKS] = jnp.zeros(len(run.trained.picks), jnp.int32)
        return State(jnp.zeros((), jnp.int32), extra=extra)

    def describe(local: int) -> str:
        last = min((local + 1) * numbers.chunk, numbers.count)
        return f"candidates {local * numbers.chunk + 1:,} to {last:,}"

    stages = [Stage("search", numbers.steps, numbers, run.step, compiled=False, label=describe)]
    if run.trained is not None:
        stages.append(run.trained.stage())
    return Task("az_nas", init, tuple(stages), functools.partial(_report, run))


@dataclass(frozen=True, eq=False)
class Run:
    """One run: its search, what it is judged by, and how its report looks."""

    entry: Entry
    search: Search
    trained: truth.GroundTruth | None
    accuracies: table.AccuracyTable | None
    settings: report.Settings

    def step(self, state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        """A step of the search; the last one also remembers what the rankings picked, to be trained."""
        state, metrics = self.search.step(state, batch, key)
        if self.trained is not None and batch["candidates"][-1] == self.search.count - 1:
            picks = jnp.asarray(self.trained.pick(self.outcome(state)))
            state = state.replace(extra={**state.extra, truth.PICKS: picks})
        return state, metrics

    def outcome(self, state: State) -> Outcome:
        """Of a search that is done."""
        history = self.search.history(state, self.search.count)
        return outcomes.read(history.architectures, history.scores, self.search.columns, self.search.ranked)


def _report_settings(config: Config, search: Search, numbers: Numbers) -> report.Settings:
    """Fields: report."""
    block, scoring = config.report, config.scoring
    draws = "one draw" if search.repeats == 1 else f"mean over {search.repeats} draws"
    size = f"{scoring.resolution} x {scoring.resolution}"
    note = (
        f"{search.count:,} candidates of the space {config.space.name} (config.search.method={config.search.method}); "
        f"AZ-NAS on {scoring.batch_size} noise images of {size}, {draws} of weights, images and probes each."
    )
    return report.Settings(
        resamples=block.positive("resamples"),
        pool=block.positive("pool"),
        runs=block.positive("runs"),
        seed=config.seed,
        scorers=tuple(search.scorings),
        chunk=numbers.chunk,
        notes=(note,),
    )


def _report(run: Run, results: Results) -> Report:
    outcome = run.outcome(results.state)
    truths = [] if run.accuracies is None else _benchmark(run.entry, run.accuracies, outcome)
    notes = ()
    if run.trained is not None:
        truths, notes = [run.trained.truth(results)], (str(run.trained),)
    title = f"AZ-NAS: {run.search.count:,} candidates of {run.entry.name}"
    return report.make(title, run.entry, outcome, truths, run.settings, results, notes)


def _benchmark(entry: Entry, accuracies: table.AccuracyTable, outcome: Outcome) -> list[Truth]:
    """The benchmark's accuracies of the candidates."""
    index = np.asarray([entry.number(architecture) for architecture in outcome.architectures])
    truths = []
    for name, accuracy in accuracies.test.items():
        picked = {each.name: float(accuracy[index[np.argmax(each.of(outcome.scores))]]) for each in outcome.rankings}
        rows = np.arange(len(index))
        truths.append(Truth(table.DATASETS[name], rows, accuracy[index], float(accuracy.max()), "the space", picked))
    return truths
