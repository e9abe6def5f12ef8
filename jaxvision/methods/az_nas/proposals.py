"""Where the candidates of a search come from: a list, random draws within a budget, or evolution."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from jaxvision.core import rng
from jaxvision.core.errors import ConfigError
from jaxvision.methods.az_nas.history import History
from jaxvision.methods.az_nas.spaces.space import Architecture, Cost, Space

WARM_UP = 11
"""Candidates that evolution makes from the initial architecture before it takes parents (official code: len <= 10)."""


@dataclass(frozen=True)
class Budget:
    """Limits of a search, 0 where there is none: multiply-adds, parameters (least, most), layers."""

    max_flops: float = 0
    min_params: float = 0
    max_params: float = 0
    max_layers: int = 0

    def __post_init__(self):
        if self.max_params and self.min_params > self.max_params:
            raise ConfigError(
                f"config.budget.min_params={self.min_params:,.0f} is above max_params={self.max_params:,.0f}; "
                "no architecture can meet both"
            )

    def met(self, cost: Cost) -> bool:
        """Whether an architecture of this cost is within all limits."""
        return (
            (not self.max_flops or cost.flops <= self.max_flops)
            and cost.params >= self.min_params
            and (not self.max_params or cost.params <= self.max_params)
            and (not self.max_layers or cost.layers <= self.max_layers)
        )

    def __str__(self) -> str:
        limits = [f"config.budget.{name}={value:,.0f}" for name, value in vars(self).items() if value]
        return " and ".join(limits) or "no limit"


class Proposer(Protocol):
    """How a search gets its next candidate.

    Attributes:
      independent: candidates don't depend on scores, so that several are scored at once.
    """

    independent: ClassVar[bool]

    def propose(self, number: int, history: History) -> tuple[Architecture, int]:
        """Candidate ``number`` (from 0), and how many were thrown away for the budget before it."""
        ...


@dataclass(frozen=True)
class Given:
    """A list of architectures, in order.

    Attributes:
      architectures: int32 [N, *shape].
    """

    architectures: np.ndarray

    independent: ClassVar[bool] = True

    def propose(self, number: int, history: History) -> tuple[Architecture, int]:
        del history
        return self.architectures[number], 0


@dataclass(frozen=True)
class Sampling:
    """Random search: draws until one is within the budget."""

    space: Space
    budget: Budget
    seed: int
    tries: int

    independent: ClassVar[bool] = True

    def propose(self, number: int, history: History) -> tuple[Architecture, int]:
        del history
        draw = rng.generator(self.seed, "az_nas/candidate", number)
        return within_budget(self.space, self.budget, self.tries, lambda: self.space.sample(draw))


@dataclass(frozen=True)
class Evolution:
    """Mutation without eviction.

    Candidates 0 ... 10 change the initial architecture once. Later ones change ``replacements`` places of a parent,
    drawn uniformly from the best ``parents`` of everything scored so far, ranked anew for each candidate; from
    everything while that is fewer. A child beyond the budget or the space is thrown away, with its parent drawn again.

    Ranked by one proxy, this is ZenNAS's loop (a pool from which the worst is dropped): the best ``parents`` of all are
    what its pool holds.

    Source: official code, ``ImageNet_MBV2/evolution_search_az.py``.

    Attributes:
      initial: int32 ``space.shape``.
      parents: the official code's population - 1.
    """

    space: Space
    budget: Budget
    seed: int
    tries: int
    initial: Architecture
    parents: int
    replacements: int = 2

    independent: ClassVar[bool] = False

    def propose(self, number: int, history: History) -> tuple[Architecture, int]:
        draw = rng.generator(self.seed, "az_nas/candidate", number)
        best = history.best(self.parents) if number >= max(WARM_UP, self.parents) else np.arange(number)

        def child() -> Architecture | None:
            if number < WARM_UP:
                return self.space.mutate(self.initial, draw, 1)
            return self.space.mutate(history.architectures[draw.choice(best)], draw, self.replacements)

        return within_budget(self.space, self.budget, self.tries, child)


def within_budget(
    space: Space, budget: Budget, tries: int, draw: Callable[[], Architecture | None]
) -> tuple[Architecture, int]:
    """The first draw within the space and the budget, and how many were not.

    Raises:
      ConfigError: none of ``tries`` was; says how near they came. A limit on what the space doesn't count.
    """
    costs = []
    for rejected in range(tries):
        architecture = draw()
        if architecture is None:
            continue
        costs.append(space.cost(architecture))
        if budget.max_layers and not costs[-1].layers:
            raise ConfigError(
                f"config.budget.max_layers={budget.max_layers}: the space {space.name!r} counts no layers; use 0"
            )
        if budget.met(costs[-1]):
            return architecture, rejected
    ranges = ", ".join(
        f"{name} from {min(values):,} to {max(values):,}"
        for name in ("flops", "params", "layers")
        if max(values := [getattr(cost, name) for cost in costs], default=0)
    )
    raise ConfigError(
        f"no architecture within {budget} in {tries:,} tries ({ranges or 'all left the space'}); widen the budget or "
        "raise config.search.tries"
    )
