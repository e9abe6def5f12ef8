"""The task ``acls``: the comparison of calibration losses, with what ACLS's penalty does to the logits."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxvision.core.config import Config
from jaxvision.engine import calibration_comparison
from jaxvision.engine.calibration_arms import Monitor
from jaxvision.engine.calibration_names import Recipe
from jaxvision.engine.task import Batch, Metrics, Task
from jaxvision.methods.acls import report
from jaxvision.methods.acls.acls import acls_metrics

LOSS = "acls"


def make(config: Config) -> Task:
    """The task of a configuration; see ``configs/calibration.py`` for its fields.

    Raises:
      ConfigError, DataError: anything in it that can't work.
    """
    return calibration_comparison.make(config, "acls", "ACLS", monitors=monitors, addition=report.added)


def monitors(recipe: Recipe) -> Callable[[Mapping[str, Any]], Monitor] | None:
    """Of arms that train with ACLS: how much of the penalty is at work (:func:`acls_metrics`)."""
    return watch if recipe.loss == LOSS else None


def watch(hyper: Mapping[str, Any]) -> Monitor:
    """The monitor of a member with these hyper-parameters."""

    def monitor(logits: jax.Array, batch: Batch) -> Metrics:
        known = {name: hyper[name] for name in ("margin", "reference") if name in hyper}
        return acls_metrics(logits, where=batch.get("where"), **known)

    return monitor
