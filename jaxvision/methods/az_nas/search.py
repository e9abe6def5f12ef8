"""Searches as folds: each step proposes a few architectures, scores them and adds them to the population.

The population is two int32 arrays in the state of the run, so a search that is killed goes on where it was. Everything
random about candidate ``number`` follows from (seed, number) and from the candidates before it: the result does not
depend on how many candidates a step takes.
"""

import time
from collections.abc import Callable, Mapping
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

Scorer = Callable[[Architecture, jax.Array], Mapping[str, float]]
"""``(architecture int32, key) -> {proxy: value}``; larger is better, NaN where there is none."""


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
      scorers: name -> function; each gives the values of some of the columns.
      columns: the proxies, in the order of the stored scores.
      ranked: those that the search ranks by.
      count: N, how many candidates.
      repeats: scores are means over as many draws of weights, inputs and probes.
      counted: gives the columns that are counted rather than measured, from the architecture alone.
      canonical: ``architecture -> bytes``, equal for architectures that compute the same function: the scorers run once
        for them all; None runs them for every one.
    """

    shape: tuple[int, ...]
    proposer: Proposer
    scorers: Mapping[str, Scorer]
    columns: tuple[str, ...]
    ranked: tuple[str, ...]
    count: int
    seed: int
    counted: Callable[[Architecture], Mapping[str, float]]
    repeats: int = 1
    canonical: Callable[[Architecture], bytes] | None = None

    def empty(self) -> dict[str, jax.Array]:
        """No candidates: ``architectures`` int32 [N, *shape], ``scores`` int32 [N, columns, 2]."""
        return {
            "architectures": jnp.zeros((self.count, *self.shape), jnp.int32),
            "scores": jnp.zeros((self.count, len(self.columns), 2), jnp.int32),
        }

    def step(self, state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        """Proposes, scores and adds the candidates of ``batch``."""
        del key  # a candidate's key is its number's, whatever a step takes
        numbers = [int(number) for number in batch["candidates"]]
        history, rejected = self.history(state, numbers[0]), 0
        seen, seconds = self._seen(history), dict.fromkeys(self.scorers, 0.0)
        for number in numbers:
            architecture, thrown = self.proposer.propose(number, history)
            rejected += thrown
            history.add(architecture, self._scores(architecture, history, seen, seconds))
        extra = {
            **state.extra,
            "architectures": jnp.asarray(history.architectures),
            "scores": jnp.asarray(to_bits(history.scores)),
        }
        metrics = self._metrics(history, len(numbers), rejected)
        metrics |= {f"seconds/{name}": Mean.of(value / len(numbers)) for name, value in seconds.items()}
        return state.replace(extra=extra), metrics

    def history(self, state: Any, count: int) -> History:
        """The first ``count`` candidates of a state."""
        architectures, scores = np.array(state.extra["architectures"]), from_bits(np.asarray(state.extra["scores"]))
        return History(architectures, scores, count, [self.columns.index(name) for name in self.ranked])

    def _seen(self, history: History) -> dict[bytes, int]:
        """The first candidate of each function."""
        if self.canonical is None:
            return {}
        seen: dict[bytes, int] = {}
        for index in range(history.count):
            seen.setdefault(self.canonical(history.architectures[index]), index)
        return seen

    def _scores(
        self, architecture: Architecture, history: History, seen: dict[bytes, int], seconds: dict[str, float]
    ) -> np.ndarray:
        """The values [columns] of the next candidate; ``seconds`` grows by what each scorer took."""
        number = history.count
        found: dict[str, float] = {}
        first = number if self.canonical is None else seen.setdefault(self.canonical(architecture), number)
        if first != number:
            found = dict(zip(self.columns, history.scores[first]))
        else:
            for name, scorer in self.scorers.items():
                begin = time.monotonic()
                draws = [scorer(architecture, self._key(number, repeat)) for repeat in range(self.repeats)]
                found |= {proxy: np.mean([draw[proxy] for draw in draws]) for proxy in draws[0]}
                seconds[name] += time.monotonic() - begin
        found |= self.counted(architecture)
        return np.asarray([found[name] for name in self.columns], np.float64)

    def _key(self, number: int, repeat: int) -> jax.Array:
        key = rng.key(self.seed, "az_nas/score", number)
        return jax.random.fold_in(key, repeat) if repeat else key

    def _metrics(self, history: History, added: int, rejected: int) -> Metrics:
        new = history.scores[history.count - added : history.count]
        best = int(history.best(1)[0])
        numbers = {"evaluated": history.count, "rejected": rejected, "best": best}
        # NaN, or -inf where a scorer said so itself: ranked last, and the report counts them.
        numbers |= {f"no_value/{name}": (~np.isfinite(new[:, i])).sum() for i, name in enumerate(self.columns)}
        return {name: Mean.of(float(value)) for name, value in numbers.items()}
