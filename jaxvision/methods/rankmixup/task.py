"""The task ``rankmixup``: the comparison of calibration losses, with how networks rank mixed images."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxvision.core.config import Config
from jaxvision.engine import calibration_comparison
from jaxvision.engine.calibration_arms import Monitor
from jaxvision.engine.calibration_names import Recipe
from jaxvision.engine.task import Batch, Metrics, Task
from jaxvision.methods.rankmixup import report
from jaxvision.methods.rankmixup.rankmixup import ranking_metrics


def make(config: Config) -> Task:
    """The task of a configuration; see ``configs/calibration.py`` for its fields.

    Raises:
      ConfigError, DataError: anything in it that can't work.
    """
    return calibration_comparison.make(config, "rankmixup", "RankMixup", monitors=monitors, addition=report.added)


def monitors(recipe: Recipe) -> Callable[[Mapping[str, Any]], Monitor] | None:
    """Of arms that train on views: does the network rank as asked (:func:`ranking_metrics`)?"""
    return watch if recipe.spec.needs == "views" else None


def watch(hyper: Mapping[str, Any]) -> Monitor:
    """The monitor of a member, whatever its hyper-parameters."""
    del hyper

    def monitor(outputs: Any, batch: Batch) -> Metrics:
        return ranking_metrics(*outputs, batch["relevance"], where=batch.get("where"))

    return monitor
