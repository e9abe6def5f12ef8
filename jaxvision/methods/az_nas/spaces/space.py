"""What a search space is: how to draw, change, write and score its architectures.

An architecture is an int32 array of one fixed shape a space, so that a population is an array in the state of a run.
A new space is one module with a class of these members; ``spaces/catalog.py`` names it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Architecture = np.ndarray
Scores = Mapping[str, float]
"""Proxy name -> value; larger is better. NaN where a proxy has no value: the search ranks it last and counts it, like
anything that isn't finite."""


@dataclass(frozen=True)
class Cost:
    """What an architecture costs, by exact integer counters.

    Attributes:
      flops: multiply-adds of one image; the complexity proxy.
      params: trainable parameters.
      layers: as the budget of the space counts them; 0 where it counts none.
    """

    flops: int
    params: int
    layers: int = 0


class Space(Protocol):
    """One search space.

    Attributes:
      name: in configurations.
      shape: of an encoded architecture, int32.
      proxies: the names of what AZ-NAS ranks by in this space, in the order E, P, T, C (ViTs have no P).
    """

    name: str
    shape: tuple[int, ...]
    proxies: tuple[str, ...]

    def sample(self, generator: np.random.Generator) -> Architecture | None:
        """A random architecture, int32 ``shape``, or None as of :meth:`mutate`; budgets are the search's affair."""
        ...

    def mutate(
        self, architecture: Architecture, generator: np.random.Generator, replacements: int
    ) -> Architecture | None:
        """A changed copy; None where the change leads out of the space, for the search to draw again."""
        ...

    def to_string(self, architecture: Architecture) -> str:
        """The field's notation; :meth:`from_string` inverts it."""
        ...

    def from_string(self, text: str) -> Architecture:
        """Raises ConfigError that says where a malformed string is wrong."""
        ...

    def cost(self, architecture: Architecture) -> Cost:
        """By the official counters."""
        ...

    def scorer(self, resolution: int, batch_size: int) -> Callable[[Architecture, Any], Scores]:
        """``(architecture, key) -> scores``, compiled; weights, input and probes come from the key."""
        ...

    def model(self, architecture: Architecture) -> tuple[str, dict[str, Any]]:
        """(name in ``models.zoo``, settings) of the network that a classification run trains."""
        ...
