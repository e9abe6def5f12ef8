"""NAS-Bench-201's 15,625 cells: int32 [6], an operation number for each edge."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxvision.core.errors import ConfigError
from jaxvision.methods.az_nas import nb201_program
from jaxvision.methods.az_nas.nb201_draws import Sizes
from jaxvision.methods.az_nas.spaces.space import Architecture, Cost, Scores
from jaxvision.models import nas_bench_201, nas_bench_201_graph


@dataclass(frozen=True)
class NasBench201Space:
    """See :class:`~jaxvision.methods.az_nas.spaces.space.Space`.

    Attributes:
      resolution: of the images that the costs are counted for.
      num_classes: likewise.
      width: channels of the first stage.
      num_cells: in each stage.
      init: how weights are drawn for a score, of ``nb201_draws.INITS``.
    """

    resolution: int = 32
    num_classes: int = 10
    width: int = 16
    num_cells: int = 5
    init: str = "kaiming_normal_in"
    name: str = field(default="nas_bench_201", init=False)
    shape: tuple[int, ...] = field(default=(len(nas_bench_201.EDGES),), init=False)
    proxies: tuple[str, ...] = field(
        default=("expressivity", "progressivity", "trainability", "complexity"), init=False
    )

    def sample(self, generator: np.random.Generator) -> Architecture:
        """Each edge's operation uniform of five, in the order of the edges."""
        return generator.integers(len(nas_bench_201.OPERATIONS), size=self.shape, dtype=np.int32)

    def mutate(self, architecture: Architecture, generator: np.random.Generator, replacements: int) -> Architecture:
        """A copy in which ``replacements`` edges, drawn without replacement, have another operation.

        Raises:
          ConfigError: not between 1 and 6 replacements.
        """
        if not 1 <= replacements <= self.shape[0]:
            raise ConfigError(f"replacements={replacements} must be between 1 and {self.shape[0]}, the cell's edges")
        changed = np.array(architecture, np.int32)
        edges = generator.choice(self.shape[0], replacements, replace=False)
        # 1 to 4 further, modulo 5: any operation but the old one.
        shift = generator.integers(1, len(nas_bench_201.OPERATIONS), size=replacements)
        changed[edges] = (changed[edges] + shift) % len(nas_bench_201.OPERATIONS)
        return changed

    def to_string(self, architecture: Architecture) -> str:
        """``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``."""
        return nas_bench_201.to_string(architecture)

    def from_string(self, text: str) -> Architecture:
        """Inverts :meth:`to_string`.

        Raises:
          ConfigError: a malformed string; says which node or edge.
        """
        return nas_bench_201.from_string(text)

    def cost(self, architecture: Architecture) -> Cost:
        """Exact multiply-adds and parameters; edges without effect count."""
        sizes = self.num_classes, self.width, self.num_cells
        flops = nas_bench_201.flops(architecture, self.resolution, *sizes)
        return Cost(int(flops), int(nas_bench_201.parameters(architecture, *sizes)))

    def function(self, architecture: Architecture) -> Architecture:
        """The architecture that computes the same function with the fewest operations to run: its scores, all but
        complexity, have the same distribution."""
        index = nas_bench_201.to_index(architecture)
        return nas_bench_201.from_index(int(nas_bench_201_graph.representatives()[index]))

    def scorer(self, resolution: int, batch_size: int) -> Callable[[Architecture, Any], Scores]:
        """Expressivity, progressivity and trainability on noise images of ``resolution``; one program for all cells."""
        score = nb201_program.make_score(Sizes(resolution, batch_size, self.width, self.num_cells), self.init)

        def run(architecture: Architecture, key: Any) -> Scores:
            found = jax.device_get(score(np.asarray(architecture, np.int32), key))
            return {name: float(value) for name, value in found.items()}

        return run

    def batched_scorer(
        self, resolution: int, batch_size: int, together: int
    ) -> Callable[[np.ndarray, jax.Array], Mapping[str, np.ndarray]]:
        """``(architectures int32 [n, 6], keys [n]) -> {proxy: float32 [n]}``: the same numbers as :meth:`scorer`'s,
        ``together`` architectures in one batched program, for accelerators."""
        sizes = Sizes(resolution, batch_size, self.width, self.num_cells)
        score = nb201_program.make_batched_score(sizes, self.init, together=together)

        def run(architectures: np.ndarray, keys: jax.Array) -> dict[str, np.ndarray]:
            count, found = len(architectures), []
            for begin in range(0, count, together):
                # The last ones again fill up, so that one program does for every n.
                rows = np.minimum(np.arange(begin, begin + together), count - 1)
                found.append(score(np.asarray(architectures[rows], np.int32), keys[rows]))
            found = jax.device_get(found)
            return {name: np.concatenate([part[name] for part in found])[:count] for name in found[0]}

        return run

    def model(self, architecture: Architecture) -> tuple[str, dict[str, Any]]:
        """The network of the cell in this space's skeleton."""
        settings = {"architecture": self.to_string(architecture), "width": self.width, "cells": self.num_cells}
        return "nas_bench_201", settings
