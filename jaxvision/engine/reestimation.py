"""A stage after an arm that estimates the batch statistics anew, weights frozen, before the arm is judged.

The stage is a fold like any other: its step averages the statistics of one training batch into the state, so that it
resumes, logs and runs on many devices as training does. The arm's own stage is judged too, with the running values of
training: the log shows both accuracies.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.engine import arms, supervised
from jaxvision.engine.report import Results
from jaxvision.engine.task import Batch, EvalData, Metrics, Stage, State, TrainData
from jaxvision.metrics import Mean
from jaxvision.models import batch_statistics

FIELD = "reestimate_batches"
SUFFIX = "_statistics"


def count(config: Config, variables: Any) -> int:
    """The field ``reestimate_batches``, 0: keep the running statistics of training.

    Raises:
      ConfigError: no whole number of at least 0, or above 0 for a network without batch statistics.
    """
    batches = config.positive(FIELD, zero=True)
    if type(batches) is not int:
        raise ConfigError(f"{config.where(FIELD)}={batches!r} must be a whole number of batches (0: none)")
    if batches and not variables.get(batch_statistics.COLLECTION):
        raise ConfigError(
            f"{config.where(FIELD)}={batches}, but the network has no batch normalisation, so there are no statistics "
            "to estimate; leave it at 0"
        )
    return batches


def judged(arm: str, batches: int) -> str:
    """The name of the stage whose evaluations of an arm count: its own, or that of the estimation."""
    return arm + SUFFIX if batches else arm


def stages(
    arm_stage: Stage,
    arm: arms.Arm,
    network: Any,
    seeds: Sequence[int],
    data: Sequence[TrainData],
    evals: Mapping[str, EvalData],
    *,
    batches: int,
    first: int,
    how: str,
) -> tuple[Stage, ...]:
    """The arm's stage, and where ``batches`` isn't 0 the one that estimates the statistics of its networks.

    Args:
      arm_stage: of ``arms.stage``.
      arm: the arm.
      network: of its members.
      seeds, data, evals, how: as the arm's stage has them; the first training batches of each seed are used.
      batches: how many are averaged.
      first: steps of the run before the estimation begins.
    """
    if not batches:
        return (arm_stage,)

    def step(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        found = batch_statistics.of_batch(
            network, supervised.variables(state), batch["image"], rngs={"dropout": key}
        )  # fmt: skip
        before = state.model_state[batch_statistics.COLLECTION]
        after = batch_statistics.average(before, found, state.step - first)
        moves = [jnp.mean(jnp.abs(a - b)) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)]
        state = state.replace(model_state={**state.model_state, batch_statistics.COLLECTION: after})
        return state, {"statistics_change": Mean.of(jnp.stack(moves))}

    estimating = dataclasses.replace(
        arm, name=arm.name + SUFFIX, step=step, steps=batches, schedules={}, separate=(), check=None, pretrains=False
    )
    made = arms.stage(estimating, seeds, data, evals, how=how)
    return arm_stage, dataclasses.replace(made, begin=None)


def note(
    results: Results, rows: Mapping[str, tuple[str, Sequence[int]]], metric: str, evaluation: str, batches: int
) -> str:
    """A sentence for the report: what the arms came to with the running statistics of training.

    Args:
      results: of the run.
      rows: label -> name of the arm and its members (one a seed).
      metric: a fraction, shown in %.
      evaluation: the one that is reported.
      batches: that were averaged.
    """
    parts = []
    for label, (arm, members) in rows.items():
        running = np.asarray([results.last(arm, evaluation, f"{metric}_{index}") for index in members])
        parts.append(f"{label} {arms.spread(running, scale=100)}")
    return (
        f"Judged with batch statistics that were averaged over {batches} training batches after each arm; with the "
        f"running ones of training ({metric} in %): {', '.join(parts)}."
    )
