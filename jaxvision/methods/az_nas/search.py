"""Searches as folds: each step proposes a few architectures, scores them and adds them to the population.

The population is two int32 arrays in the state of the run, so a search that is killed goes on where it was. Everything
random about candidate ``number`` follows from (seed, number) and from the candidates before it: the result does not
depend on how many candidates a step takes.
"""

import concurrent.futures
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import rng
from jaxvision.engine.task import Batch, Metrics, State
from jaxvision.methods.az_nas.history import History, from_bits, to_bits
from jaxvision.methods.az_nas.proposals import Proposer
from jaxvision.methods.az_nas.spaces.space import Architecture
from jaxvision.metrics import Mean

POPULATION, SCORES = "population", "scores"
"""``State.extra`` of a search: int32 [N, *shape], and float64 [N, columns] as int32 [N, columns, 2]."""

Scorer = Callable[[np.ndarray, jax.Array], Mapping[str, np.ndarray]]
"""``(architectures int32 [n, *shape], keys [n]) -> {proxy: [n]}``; larger is better, NaN where there is no value."""


def one_by_one(score: Callable[[Architecture, jax.Array], Mapping[str, float]]) -> Scorer:
    """A scorer of one architecture as one of several, one after the other."""

    def each(architectures: np.ndarray, keys: jax.Array) -> dict[str, np.ndarray]:
        found = [score(architecture, key) for architecture, key in zip(architectures, keys)]
        return {name: np.asarray([float(one[name]) for one in found]) for name in found[0]}

    return each


@dataclass(frozen=True)
class Scoring:
    """One way to score.

    Attributes:
      columns: the proxies that it gives.
      score: the function.
      canonical: the architecture that stands for all that compute the same function; it is scored once for them, in
        their place. None: every architecture is scored.
    """

    columns: tuple[str, ...]
    score: Scorer
    canonical: Callable[[Architecture], Architecture] | None = None


@dataclass(frozen=True)
class Numbers:
    """The "batches" of a search: which candidates a step takes."""

    count: int
    chunk: int
    batch_size: int = 1

    @property
    def steps(self) -> int:
        """Steps until all candidates are there."""
        return -(-self.count // self.chunk)

    def batch_at(self, step: int, shard_index: int = 0, shard_count: int = 1) -> Batch:
        del shard_index, shard_count
        return {"candidates": np.arange(step * self.chunk, min((step + 1) * self.chunk, self.count))}


@dataclass(frozen=True, eq=False)
class Search:
    """A search as the steps of a stage; the state's ``extra`` holds the population.

    Attributes:
      shape: of an architecture.
      proposer: where candidates come from.
      scorings: by name; each gives the values of some of the columns.
      columns: the proxies, in the order of the stored scores.
      ranked: those that the search ranks by.
      count: N, how many candidates.
      repeats: scores are means over as many draws of weights, inputs and probes.
      workers: how many of the scorings run side by side, on threads; the result doesn't depend on it.
      counted: gives the columns that are counted rather than measured, from the architecture alone.
    """

    shape: tuple[int, ...]
    proposer: Proposer
    scorings: Mapping[str, Scoring]
    columns: tuple[str, ...]
    ranked: tuple[str, ...]
    count: int
    seed: int
    counted: Callable[[Architecture], Mapping[str, float]]
    repeats: int = 1
    workers: int = 1

    def empty(self) -> dict[str, jax.Array]:
        """No candidates."""
        return {
            POPULATION: jnp.zeros((self.count, *self.shape), jnp.int32),
            SCORES: jnp.zeros((self.count, len(self.columns), 2), jnp.int32),
        }

    def step(self, state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        """Proposes, scores and adds the candidates of ``batch``."""
        del key  # a candidate's key is its number's, whatever a step takes
        numbers = [int(number) for number in batch["candidates"]]
        history, rejected = self.history(state, numbers[0]), 0
        seconds = dict.fromkeys(self.scorings, 0.0)
        for group in [numbers] if self.proposer.independent else [[number] for number in numbers]:
            proposed = [self.proposer.propose(number, history) for number in group]
            rejected += sum(thrown for _, thrown in proposed)
            architectures = np.stack([architecture for architecture, _ in proposed])
            values = np.full((len(group), len(self.columns)), np.nan)
            for name, (found, spent) in self._scored(architectures, history).items():
                values[:, self._places(self.scorings[name].columns)] = found
                seconds[name] += spent
            for architecture, row in zip(architectures, values):
                counted = self.counted(architecture)
                row[self._places(counted)] = list(counted.values())
                history.add(architecture, row)
        extra = {
            **state.extra,
            POPULATION: jnp.asarray(history.architectures),
            SCORES: jnp.asarray(to_bits(history.scores)),
        }
        metrics = self._metrics(history, len(numbers), rejected)
        metrics |= {f"seconds/{name}": Mean.of(value / len(numbers)) for name, value in seconds.items()}
        return state.replace(extra=extra), metrics

    def history(self, state: Any, count: int) -> History:
        """The first ``count`` candidates of a state."""
        architectures, scores = np.array(state.extra[POPULATION]), from_bits(np.asarray(state.extra[SCORES]))
        return History(architectures, scores, count, [self.columns.index(name) for name in self.ranked])

    def _places(self, names: Iterable[str]) -> list[int]:
        return [self.columns.index(name) for name in names]

    def _scored(self, architectures: np.ndarray, history: History) -> dict[str, tuple[np.ndarray, float]]:
        """By scoring, the values of the next n candidates and the seconds that they took."""

        def timed(scoring: Scoring) -> tuple[np.ndarray, float]:
            begin = time.monotonic()
            return self._score(scoring, architectures, history), time.monotonic() - begin

        # Programs of small images leave cores idle; XLA computes without the interpreter's lock.
        with concurrent.futures.ThreadPoolExecutor(self.workers) as pool:
            return dict(zip(self.scorings, pool.map(timed, self.scorings.values()), strict=True))

    def _score(self, scoring: Scoring, architectures: np.ndarray, history: History) -> np.ndarray:
        """The values [n, scoring.columns] of the next n candidates."""
        numbers = history.count + np.arange(len(architectures))
        scored, first = architectures, numbers
        if scoring.canonical is not None:
            scored = np.stack([scoring.canonical(architecture) for architecture in architectures])
            seen = self._seen(scoring, history)
            first = np.asarray([seen.setdefault(a.tobytes(), int(n)) for a, n in zip(scored, numbers)])
        values = np.full((len(numbers), len(scoring.columns)), np.nan)
        new = np.flatnonzero(first == numbers)
        if len(new):
            draws = [scoring.score(scored[new], self._keys(numbers[new], repeat)) for repeat in range(self.repeats)]
            for column, proxy in enumerate(scoring.columns):
                values[new, column] = np.mean([draw[proxy] for draw in draws], 0)
        known = np.concatenate([history.scores[: history.count, self._places(scoring.columns)], values])
        return known[first]

    def _seen(self, scoring: Scoring, history: History) -> dict[bytes, int]:
        """The first candidate of each function."""
        seen: dict[bytes, int] = {}
        for index in range(history.count):
            seen.setdefault(scoring.canonical(history.architectures[index]).tobytes(), index)
        return seen

    def _keys(self, numbers: np.ndarray, repeat: int) -> jax.Array:
        """The keys [n] of candidates; each is its number's alone."""

        def one(number: jax.Array) -> jax.Array:
            key = rng.key(self.seed, "az_nas/score", number)
            return jax.random.fold_in(key, repeat) if repeat else key

        return jax.vmap(one)(jnp.asarray(numbers))

    def _metrics(self, history: History, added: int, rejected: int) -> Metrics:
        new = history.scores[history.count - added : history.count]
        best = int(history.best(1)[0])
        numbers = {"evaluated": history.count, "rejected": rejected, "best": best}
        # NaN, or what isn't finite: ranked last, and the report counts them.
        numbers |= {f"no_value/{name}": (~np.isfinite(new[:, i])).sum() for i, name in enumerate(self.columns)}
        return {name: Mean.of(float(value)) for name, value in numbers.items()}
