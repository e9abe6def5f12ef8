"""The parts of a search from its configuration: where candidates come from, what scores them."""

import os

import jax
import numpy as np

from jaxvision.core import rng
from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.engine import recipes
from jaxvision.engine.task import Batch
from jaxvision.methods.az_nas import baselines, proposals
from jaxvision.methods.az_nas import outcome as outcomes
from jaxvision.methods.az_nas.history import History
from jaxvision.methods.az_nas.proposals import Budget, Evolution, Given, Proposer, Sampling
from jaxvision.methods.az_nas.search import Numbers, Scoring, Search, one_by_one
from jaxvision.methods.az_nas.spaces.catalog import Entry
from jaxvision.methods.az_nas.supernet_init import Skeleton
from jaxvision.models import zoo

METHODS = ("random", "evolution", "sample", "all")
COMPLEXITY = "complexity"


def build_search(config: Config, entry: Entry) -> tuple[Search, Numbers]:
    """The search of a configuration and the candidates of its steps.

    Fields: search, budget, scoring; and baselines, where there is such a block.

    Raises:
      ConfigError, DataError: anything in it that can't work; a budget that nothing meets.
    """
    block, space = config.search, entry.space
    proposer, count = _proposer(config, entry)
    # A budget that nothing meets shows before anything is built.
    proposer.propose(0, History(np.empty((0, *space.shape), np.int32), np.empty((0, 0)), 0, ()))
    scorings = {outcomes.AZ_NAS: _az_nas(config, entry, proposer), **_baselines(config, entry)}
    columns = tuple(space.proxies)
    columns += tuple(name for key, each in scorings.items() if key != outcomes.AZ_NAS for name in each.columns)
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
        repeats=config.scoring.positive("repeats"),
        workers=os.cpu_count() or 1 if jax.default_backend() == "cpu" else 1,
    )
    return search, Numbers(count, chunk)


def _az_nas(config: Config, entry: Entry, proposer: Proposer) -> Scoring:
    """Fields: scoring, search.once_per_function."""
    scoring = config.scoring
    resolution, batch_size = scoring.positive("resolution"), scoring.positive("batch_size")
    together = scoring.positive("together", zero=True)
    if together and not proposer.independent:
        raise ConfigError(
            f"config.scoring.together={together}: with config.search.method={config.search.method!r} each candidate "
            f"depends on the scores before it, so that {together} would be computed for one; use 0"
        )
    if together and entry.batched is None:
        raise ConfigError(
            f"config.scoring.together={together}: the space {entry.name!r} scores one architecture at a time; use 0"
        )
    if together:
        score = entry.batched(resolution, batch_size, together)
    else:
        score = one_by_one(entry.space.scorer(resolution, batch_size))
    once = config.search.one_of("once_per_function", (True, False))
    if once and entry.canonical is None:
        raise ConfigError(f"config.search.once_per_function=True: the space {entry.name!r} can't tell equal functions")
    measured = tuple(name for name in entry.space.proxies if name != COMPLEXITY)
    return Scoring(measured, score, entry.canonical if once else None)


def _baselines(config: Config, entry: Entry) -> dict[str, Scoring]:
    """Fields: baselines: names, resolution, batch_size, gradsign_mean, data (of the proxies that need real images)."""
    block = config.get("baselines")
    if block is None:
        return {}
    if entry.network is None:
        raise ConfigError(f"config.baselines: the other proxies are NAS-Bench-201's, not those of {entry.name!r}")
    for name in block.names:
        if name not in (*baselines.BASELINES, *outcomes.PAIRS):
            raise unknown(block.where("names"), name, (*baselines.BASELINES, *outcomes.PAIRS))
    names = [part for name in block.names for part in outcomes.PAIRS.get(name, (name,))]
    data = recipes.build_data(block.data, config.seed, zoo.spec("nas_bench_201"))
    skeleton = Skeleton(num_classes=data.num_classes, channels=data.image_shape[-1], **entry.network)
    settings = baselines.Settings(
        skeleton, block.positive("resolution"), block.positive("batch_size"), gradsign_mean=block.gradsign_mean
    )
    batches = [data.train.batch_at(step) for step in range(2)]
    batch = {key: np.stack([each[key] for each in batches]) for key in ("image", "label")}
    return {name: _baseline(name, settings, batch) for name in names}


def _baseline(name: str, settings: baselines.Settings, batch: Batch) -> Scoring:
    measure = baselines.make_baseline(name, settings)
    return Scoring((name,), one_by_one(lambda architecture, key: {name: measure(architecture, key, batch)}))


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
    parents, initial = population if single else population - 1, entry.initial
    if initial is None:
        draw = rng.generator(config.seed, "az_nas/initial")
        initial, _ = proposals.within_budget(entry.space, budget, tries, lambda: entry.space.sample(draw))
    return Evolution(entry.space, budget, config.seed, tries, initial, parents), count


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
