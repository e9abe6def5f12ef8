"""The task ``az_nas``: [search: propose, score, rank] -> [train a sample: the truth] -> correlations, what was found.

The only place where the configuration is read (its fields are explained in ``configs/az_nas.py``).
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.engine.report import Report, Results
from jaxvision.engine.task import Stage, State, Task
from jaxvision.methods.az_nas import outcome as outcomes
from jaxvision.methods.az_nas import proposals, report, table
from jaxvision.methods.az_nas.outcome import Outcome, Truth
from jaxvision.methods.az_nas.proposals import Budget, Evolution, Given, Proposer, Sampling
from jaxvision.methods.az_nas.search import Numbers, Scoring, Search, one_by_one
from jaxvision.methods.az_nas.spaces import catalog
from jaxvision.methods.az_nas.spaces.catalog import Entry

METHODS = ("random", "evolution", "sample", "all")
COMPLEXITY = "complexity"


def make(config: Config) -> Task:
    """The task of a configuration.

    Raises:
      ConfigError, DataError: anything in it that can't work, a budget that nothing meets among it.
    """
    entry = catalog.build(config.space)
    search, numbers = _search(config, entry)
    path = config.benchmark_table
    if path and not entry.in_benchmark:
        raise ConfigError(
            f"config.benchmark_table={path!r} is NAS-Bench-201's; config.space.name={entry.name!r} has no such table"
        )
    accuracies = table.read(path) if path else None
    settings = _report_settings(config, entry, search)

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


def _search(config: Config, entry: Entry) -> tuple[Search, Numbers]:
    """Fields: search, budget, scoring, baselines."""
    block, scoring, space = config.search, config.scoring, entry.space
    resolution, batch_size = scoring.positive("resolution"), scoring.positive("batch_size")
    repeats, together = scoring.positive("repeats"), scoring.positive("together", zero=True)
    proposer, count = _proposer(config, entry)
    score = one_by_one(space.scorer(resolution, batch_size))
    if together:
        if entry.batched is None:
            raise ConfigError(
                f"config.scoring.together={together}: the space {entry.name!r} scores one architecture at a time; use 0"
            )
        score = entry.batched(resolution, batch_size, together)
    canonical = entry.canonical if block.one_of("once_per_function", (True, False)) else None
    if block.once_per_function and canonical is None:
        raise ConfigError(f"config.search.once_per_function=True: the space {entry.name!r} can't tell equal functions")
    measured = tuple(name for name in space.proxies if name != COMPLEXITY)
    scorings = {outcomes.AZ_NAS: Scoring(measured, score, canonical)}
    columns = tuple(space.proxies)
    ranked = tuple(block.rank_by) or tuple(space.proxies)
    for name in ranked:
        if name not in columns:
            raise unknown(block.where("rank_by"), name, columns)

    def counted(architecture: np.ndarray) -> dict[str, float]:
        return {COMPLEXITY: float(space.cost(architecture).flops)}

    chunk = min(block.positive("chunk"), count)
    search = Search(
        shape=space.shape,
        proposer=proposer,
        scorings=scorings,
        columns=columns,
        ranked=ranked,
        count=count,
        seed=config.seed,
        counted=counted,
        repeats=repeats,
    )
    # A budget that nothing meets shows before anything is compiled.
    proposer.propose(0, search.history(State(jnp.zeros((), jnp.int32), extra=search.empty()), 0))
    return search, Numbers(count, chunk)


def _proposer(config: Config, entry: Entry) -> tuple[Proposer, int]:
    """Where candidates come from and how many; fields: search, budget."""
    block = config.search
    method, count = block.one_of("method", METHODS), block.positive("count", zero=True)
    tries, population = block.positive("tries"), block.positive("population")
    sample = (block.positive("sample_of"), block.positive("sample_seed", zero=True))
    names = ("max_flops", "min_params", "max_params", "max_layers")
    budget = Budget(**{name: config.budget.positive(name, zero=True) for name in names})
    single = len(tuple(block.rank_by)) == 1
    if method in ("sample", "all"):
        architectures = _listed(entry, method, count, *sample)
        if budget != Budget():
            raise ConfigError(f"config.search.method={method!r} takes its architectures as they are; unset {budget}")
        return Given(architectures), len(architectures)
    if not count:
        raise ConfigError(f"config.search.count must be above 0 where config.search.method={method!r}")
    if method == "random":
        return Sampling(entry.space, budget, config.seed, tries), count
    if entry.initial is None:
        raise ConfigError(
            f"the space {entry.name!r} has no initial architecture to mutate; use --config.search.method=random"
        )
    if population <= proposals.WARM_UP:
        raise ConfigError(
            f"config.search.population={population} must be at least {proposals.WARM_UP + 1}: the first "
            f"{proposals.WARM_UP} candidates change the initial architecture, and parents are the best population - 1"
        )
    if population > count:
        raise ConfigError(
            f"config.search.population={population} is more than config.search.count={count}: no parents would ever be "
            "chosen; lower the one or raise the other"
        )
    parents = population if single else population - 1
    return Evolution(entry.space, budget, config.seed, tries, entry.initial, parents), count


def _listed(entry: Entry, method: str, count: int, of: int, seed: int) -> np.ndarray:
    """Every architecture, or a sample without repetition: int32 [N, *shape]."""
    if not entry.size:
        raise ConfigError(
            f"config.search.method={method!r}: the architectures of {entry.name!r} can't be listed; use random"
        )
    if method == "all":
        if count not in (0, entry.size):
            raise ConfigError(f"config.search.count={count}, but all architectures are {entry.size:,}; use 0")
        return np.stack([entry.at(index) for index in range(entry.size)])
    if not count <= of <= entry.size:
        raise ConfigError(
            f"config.search.count={count} of config.search.sample_of={of}: need count <= sample_of <= {entry.size:,}"
        )
    drawn = np.random.default_rng(seed).choice(entry.size, of, replace=False)[: count or of]
    return np.stack([entry.at(int(index)) for index in drawn])


def _report_settings(config: Config, entry: Entry, search: Search) -> report.Settings:
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
