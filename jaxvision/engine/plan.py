"""The shapes of a run, worked out before anything runs, and the step that the loop compiles."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import devices, rng, trees
from jaxvision.engine.options import Options
from jaxvision.engine.parallel import Parallel, check_batch_size
from jaxvision.engine.task import Stage, State, Task


class Plan:
    """The task's shapes, worked out without running anything: the state after each stage, the metrics of a step.

    Attributes:
      offsets: the steps of the run before each stage, and of all.
      states: abstract, at the start and after each stage.
      metrics: of a step of each stage, abstract; {} where it has no steps or can't be traced.
      sums: what is accumulated between two rows of each stage (:func:`sums_template`); Python stages have none.
    """

    def __init__(self, task: Task, options: Options, parallel: Parallel):
        self.task = task
        self.offsets = np.cumsum([0, *(stage.steps for stage in task.stages)]).tolist()
        key = jax.eval_shape(lambda: rng.key(0, ""))
        state = jax.eval_shape(task.init, key)
        self.states, self.metrics = [state], []
        for stage in task.stages:
            if stage.begin is not None:
                state = jax.eval_shape(stage.begin, state, key)
            metrics: dict[str, Any] = {}
            if stage.compiled and stage.steps:
                check_batch_size(stage.data.batch_size, parallel, f"stage '{stage.name}'")
            if (stage.compiled or stage.traceable) and stage.steps:
                state, metrics = jax.eval_shape(stage.step, state, stage.data.batch_at(0), key)
            self.states.append(state)
            self.metrics.append(metrics)
        self.sums = [sums_template(m if s.compiled else {}) for s, m in zip(task.stages, self.metrics)]

    def stage_of(self, step: int) -> int:
        """The stage whose structure a checkpoint at ``step`` has: the one that took that step."""
        for index, (start, end) in enumerate(zip(self.offsets, self.offsets[1:])):
            if start < step <= end:
                return index
        return 0

    def payload(self, step: int, sharding: Any) -> Any:
        """The abstract content of a checkpoint at ``step``."""
        index = self.stage_of(step)
        tree = {"state": self.states[index + 1], "sums": self.sums[index]}
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def describe(task: Task, options: Options, parallel: Parallel) -> str:
    """A dry run: builds all shapes, lowers one step of each stage and each evaluation, and says what they are."""
    plan = Plan(task, options, parallel)
    sharding = parallel.restore_sharding()
    lines = [f"task {task.name}: {task.steps} steps on {parallel.num_devices} device(s), {options.parallel}"]
    for index, stage in enumerate(task.stages):
        state = plan.states[index + 1]
        count = trees.count_parameters(state.params)
        kind = "one jitted program a step" if stage.compiled else "a Python function a step"
        lines.append(f"  stage {stage.name}: {stage.steps} steps, {kind}, {count:,} parameters")
        if stage.steps:
            lines += [f"    batch {_shapes(stage.data.batch_at(0))}"]
        if stage.compiled and stage.steps:
            template = plan.payload(plan.offsets[index + 1], sharding)
            step = jax.jit(training_step(stage, options.seed, plan.offsets[index]))
            step.lower(template["state"], template["sums"], stage.data.batch_at(0))
        elif stage.steps:
            if stage.label:
                lines += [f"    from '{stage.label(0)}' to '{stage.label(stage.steps - 1)}'"]
            if not stage.traceable:
                lines += ["    its shapes are known once it runs"]
        if plan.metrics[index]:
            lines += [f"    metrics {', '.join(plan.metrics[index])}"]
        for name, evaluation in stage.evals.items():
            batch = evaluation.data.batch_at(0)
            metrics = ", ".join(jax.eval_shape(evaluation.update, state, batch))
            lines.append(f"    eval {name}: {evaluation.data.num_batches} batches {_shapes(batch)} -> {metrics}")
    return "\n".join(lines)


def _shapes(batch: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {leaf.dtype}{list(leaf.shape)}" for name, leaf in batch.items())


def sums_template(metrics: dict[str, Any]) -> dict[str, Any]:
    """What is accumulated between two rows: the merged metrics and the first step at which one wasn't finite."""
    return {"metrics": metrics, "bad_step": jax.ShapeDtypeStruct((), jnp.int32)}


def zero_sums(template: dict[str, Any]) -> dict[str, Any]:
    """The sums of no steps, with the shapes of :func:`sums_template`; ``bad_step`` is -1."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), template["metrics"])
    return {"metrics": zeros, "bad_step": np.asarray(-1, np.int32)}


def training_step(stage: Stage, seed: int, first: int) -> Callable[[State, Any, Any], tuple[State, Any]]:
    """``(state, sums, batch) -> (state, sums)``: the method's step, its key, the step count and the sums.

    Args:
      stage: a compiled one.
      seed: of the run.
      first: the steps of the stages before; keys count from there.
    """

    def step(state: State, sums: dict[str, Any], batch: Any):
        key = stage.key(seed, "step", state.step - first)
        new, metrics = stage.step(state, batch, key)
        metrics = devices.sum_over_devices(metrics)
        finite = jnp.array(True)
        for leaf in jax.tree.leaves(metrics):
            finite &= jnp.all(jnp.isfinite(leaf))
        bad = jnp.where((sums["bad_step"] < 0) & ~finite, state.step + 1, sums["bad_step"])
        added = jax.tree.map(jnp.add, sums["metrics"], metrics)
        return new.replace(step=state.step + 1), {"metrics": added, "bad_step": bad.astype(jnp.int32)}

    return step
