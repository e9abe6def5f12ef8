"""What a search found: scores without NaN, the rankings made of them, what is true, and how well the two agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxvision.core import rng
from jaxvision.methods.az_nas import aggregation
from jaxvision.metrics import ranking

AZ_NAS = "az_nas"
SHORT = {"expressivity": "E", "progressivity": "P", "trainability": "T", "complexity": "C"}
ADDED = ("synflow", "zico")
"""Baselines that the paper adds to the aggregate (its table 5)."""
PAIRS = {"te_nas": ("te_nas_ntk", "te_nas_regions")}
"""Baselines of two scores, whose ranks are summed (Chen et al. 2021, TE-NAS)."""

Scores = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Ranking:
    """A way to order architectures.

    Attributes:
      name: in the tables.
      columns: the proxies that it ranks by; one is taken as it is.
      how: "log" or "linear", of ``aggregation.aggregate``.
    """

    name: str
    columns: tuple[str, ...]
    how: str = "log"

    def of(self, scores: Scores, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """float64 [m], larger is better; ranks are those within ``rows``."""
        if len(self.columns) == 1:
            return scores[self.columns[0]][rows]
        return aggregation.aggregate({name: scores[name][rows] for name in self.columns}, self.how)


@dataclass(frozen=True)
class Truth:
    """Accuracies to compare with.

    Attributes:
      name: of the data set.
      rows: int [n], the candidates whose accuracy is known.
      accuracy: float64 [n], percent.
      optimum: the best accuracy of the space, or of those that were trained.
      what: the optimum is the best of, for the table.
      picked: ranking -> accuracy of what it picks from all candidates; only those that are known.
    """

    name: str
    rows: np.ndarray
    accuracy: np.ndarray
    optimum: float
    what: str
    picked: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The scores of a finished search.

    Attributes:
      architectures: int32 [N, *shape].
      scores: column -> float64 [N], -inf where a proxy had no value, or no finite one.
      missing: column -> how many had none.
      rankings: all that the tables compare, the search's own first.
      ablation: subsets of its proxies.
    """

    architectures: np.ndarray
    scores: dict[str, np.ndarray]
    missing: dict[str, int]
    rankings: tuple[Ranking, ...]
    ablation: tuple[Ranking, ...]

    @property
    def main(self) -> Ranking:
        """The search's own ranking."""
        return self.rankings[0]

    @property
    def found(self) -> int:
        """The candidate with the largest aggregate; the first of equals."""
        return int(np.argmax(self.main.of(self.scores)))


def rankings(columns: Sequence[str], ranked: Sequence[str]) -> tuple[Ranking, ...]:
    """What the tables compare: the search's own ranking first, then its variants, then the proxies one by one.

    Args:
      columns: all proxies that were measured.
      ranked: those that the search ranks by.
    """
    main = Ranking(AZ_NAS if len(ranked) > 1 else ranked[0], tuple(ranked))
    made = [main]
    if len(ranked) > 1:
        made.append(Ranking(f"{AZ_NAS}_linear", main.columns, "linear"))
        made += [Ranking(f"{AZ_NAS}+{name}", (*ranked, name)) for name in ADDED if name in columns]
    parts = {part for pair in PAIRS.values() for part in pair}
    made += [Ranking(name, (name,)) for name in columns if name not in parts and name != main.name]
    made += [Ranking(name, pair, "linear") for name, pair in PAIRS.items() if set(pair) <= set(columns)]
    return tuple(made)


def read(architectures: np.ndarray, scores: np.ndarray, columns: Sequence[str], ranked: Sequence[str]) -> Outcome:
    """The outcome of a population.

    Args:
      architectures: int32 [N, *shape].
      scores: float64 [N, columns], not finite where a proxy had no value.
      columns: names.
      ranked: those that the search ranked by.
    """
    by_name = dict(zip(columns, np.where(np.isfinite(scores), scores, -np.inf).T))
    missing = {name: int(np.isneginf(values).sum()) for name, values in by_name.items()}
    return Outcome(architectures, by_name, missing, rankings(columns, ranked), _ablation(ranked))


def _ablation(ranked: Sequence[str]) -> tuple[Ranking, ...]:
    """Subsets of the proxies in the paper's order: each with complexity, then without one of the others."""
    subsets = [("expressivity", "complexity")]
    subsets += [tuple(name for name in ranked if name != left) for left in ("trainability", "progressivity")]
    subsets.append(tuple(ranked))
    proper = [subset for subset in dict.fromkeys(subsets) if len(subset) > 1 and set(subset) <= set(ranked)]
    return tuple(Ranking("+".join(SHORT.get(name, name) for name in subset), subset) for subset in proper)


def correlations(
    outcome: Outcome, rankings: Sequence[Ranking], truth: Truth, resamples: int
) -> dict[str, ranking.Correlation]:
    """Kendall's tau and Spearman's rho of each ranking, ranked among all candidates, against the known accuracies."""
    scores = {each.name: each.of(outcome.scores)[truth.rows] for each in rankings}
    return ranking.correlations(scores, truth.accuracy, resamples=resamples)


@dataclass(frozen=True)
class Picks:
    """Accuracies [runs] of what each ranking picks from the same small random pools, by name of the ranking.

    ``random`` is a random member of the pool, ``best`` the best one.
    """

    pool: int
    accuracy: dict[str, np.ndarray]
    random: np.ndarray
    best: np.ndarray


def picks(outcome: Outcome, truth: Truth, *, pool: int, runs: int, seed: int) -> Picks:
    """Many small searches in the scores that are there already: pick one of ``pool`` candidates, ``runs`` times.

    The pool is at most half of the known candidates, without replacement; ranks are those within it.
    """
    pool = max(min(pool, len(truth.rows) // 2), 1)
    accuracy = {each.name: np.empty(runs) for each in outcome.rankings}
    random, best = np.empty(runs), np.empty(runs)
    for run in range(runs):
        drawn = rng.generator(seed, "az_nas/pick", run).choice(len(truth.rows), pool, replace=False)
        rows, values = truth.rows[drawn], truth.accuracy[drawn]
        random[run], best[run] = values[0], values.max()
        for each in outcome.rankings:
            accuracy[each.name][run] = values[np.argmax(each.of(outcome.scores, rows))]
    return Picks(pool, accuracy, random, best)
