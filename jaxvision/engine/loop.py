"""The one loop: folds the stages of a task, logging, evaluating and saving as functions of the step alone.

At each step boundary, in this order: a row for metrics.jsonl if it is time, evaluations if it is time (and what they
leave in the state, ``Eval.remember``), a checkpoint if it is time. A checkpoint holds the state, the metric sums since
the last row, and how many rows had been written, so a run that is killed anywhere and started again writes the same
rows and ends in the same state.

A signal is answered at step boundaries, and between the batches of an evaluation: its step is then saved without the
evaluation's rows, and the next start begins by evaluating.
"""

import contextlib
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import rng, trees
from jaxvision.core.errors import NonFiniteError, Preempted
from jaxvision.engine import evaluate
from jaxvision.engine.checkpoint import Checkpoints
from jaxvision.engine.interrupt import Interrupt
from jaxvision.engine.metric_log import RowLog
from jaxvision.engine.options import Options
from jaxvision.engine.parallel import Parallel
from jaxvision.engine.plan import Plan, training_step, zero_sums
from jaxvision.engine.prefetch import prefetch
from jaxvision.engine.progress import Progress, brief
from jaxvision.engine.report import Results
from jaxvision.engine.runinfo import CHECKPOINTS
from jaxvision.engine.task import Eval, Metrics, Stage, Task
from jaxvision.engine.tensorboard import Events


def run(
    task: Task,
    options: Options,
    directory: Path,
    parallel: Parallel,
    progress: Progress,
    *,
    plan: Plan | None = None,
    interrupt: Interrupt | None = None,
) -> Results:
    """Runs the task in a prepared, locked directory, from its newest good checkpoint or from the start.

    Args:
      task, options, directory, parallel, progress: what is run, how, where and on what.
      plan: of this task, where it has been made already.
      interrupt: that watches for signals already.

    Raises:
      Preempted: a signal came; the state was saved.
      NonFiniteError: a metric or the state became NaN or infinite; nothing bad was saved.
      StorageError: the directory can't be written, or none of its checkpoints verifies.
    """
    plan = Plan(task, options, parallel) if plan is None else plan
    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt()) if interrupt is None else interrupt
        return stack.enter_context(_Run(plan, options, directory, parallel, progress, interrupt)).everything()


class _Run:
    """One process's work on a run; see :func:`run`."""

    def __init__(self, plan, options, directory, parallel, progress, interrupt):
        self.plan: Plan = plan
        self.task: Task = plan.task
        self.options, self.directory = options, directory
        self.parallel: Parallel = parallel
        self.progress: Progress = progress
        self.interrupt: Interrupt = interrupt
        self.first_host = parallel.shard_index == 0
        self.rows = RowLog(directory / "metrics.jsonl", write=self.first_host)
        self.timings = RowLog(directory / "timing.jsonl", write=self.first_host)
        self.events = Events(directory, enabled=options.tensorboard and self.first_host)
        self.score: float | None = None
        self.saved_step = -1
        self.owes_evaluation = False
        self._evaluators: dict[Any, evaluate.Evaluator] = {}
        self._memories: dict[Any, Any] = {}
        self._flags = jax.jit(trees.nonfinite_flags)

    def __enter__(self) -> "_Run":
        self.checkpoints = Checkpoints(
            self.directory / CHECKPOINTS,
            keep_last=self.options.keep_last,
            keep_best=self.options.keep_best if self.task.best else 0,
            best_mode=self.task.best_mode,
        )
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        self.rows.close()
        self.timings.close()
        self.events.close()
        self.checkpoints.__exit__(kind, *exception)

    def everything(self) -> Results:
        state, sums, step = self._restore_or_init()
        for index, stage in enumerate(self.task.stages):
            first, last = self.plan.offsets[index], self.plan.offsets[index + 1]
            if step > last or (step == last and stage.steps and not self.owes_evaluation):
                continue
            if self.owes_evaluation:
                state, _ = self._evaluate(stage, step, step - first, state, sums)
                self.owes_evaluation = False
                if step == last:
                    continue
            if step == first:
                if stage.begin is not None:
                    key = stage.key(self.options.seed, "begin")
                    state = self.parallel.initialize(stage.begin, self.parallel.single(state), key)
                if stage.check is not None:
                    stage.check(self.parallel.single(state))
                sums = self.parallel.replicate(zero_sums(self.plan.sums[index]))
            self.progress.stage(stage.name, step - first, stage.steps)
            fold = self._fold_compiled if stage.compiled else self._fold_python
            state = fold(index, stage, state, sums, step)
            step = last
        self.checkpoints.wait()
        final = jax.device_get(self.parallel.single(state))
        return Results(final, self.rows.rows(), self.timings.rows(), self.directory)

    def _restore_or_init(self):
        sharding = self.parallel.restore_sharding()
        restored = self.checkpoints.restore(lambda step: self.plan.payload(step, sharding))
        if restored is None:
            self.rows.resume(0)
            self.timings.resume(0)
            state = self.parallel.initialize(self.task.init, rng.key(self.options.seed, "init"))
            if self.task.load is not None:
                state = self.parallel.replicate(self.task.load(self.parallel.single(state)))
            return state, None, 0
        self.rows.resume(restored.meta["rows"])
        self.timings.resume(restored.meta["timings"])
        self.saved_step, self.owes_evaluation = restored.step, restored.meta["owes_evaluation"]
        self.progress.message(f"continuing from step {restored.step} of {self.task.steps}")
        payload = restored.payload
        return self.parallel.replicate(payload["state"]), self.parallel.replicate(payload["sums"]), restored.step

    def _fold_compiled(self, index: int, stage: Stage, state: Any, sums: Any, step: int) -> Any:
        """Folds one jitted program over the batches of a stage."""
        first = self.plan.offsets[index]
        step_fn = training_step(stage, self.options.seed, first)
        compiled = self.parallel.compile(step_fn, donate=(0, 1), quickly=stage.quickly)
        batches = prefetch(
            lambda local: stage.data.batch_at(local, self.parallel.shard_index, self.parallel.shard_count),
            step - first,
            stage.steps,
        )
        clock, since = time.monotonic(), step
        for local, batch in enumerate(batches, step - first + 1):
            state, sums = compiled(state, sums, self.parallel.place(batch))
            metrics = None
            if local % self.options.log_every == 0 or local == stage.steps:
                metrics = self._log(stage, first + local, local, state, sums)
                sums = self.parallel.replicate(zero_sums(self.plan.sums[index]))
                seconds = time.monotonic() - clock
                self._time(stage, first + local, {"steps_per_second": (first + local - since) / seconds})
                clock, since = time.monotonic(), first + local
            self.progress.advance(local, stage.label(local) if stage.label else "", metrics)
            state = self._boundary(stage, first + local, local, state, sums)
        if not stage.steps:
            state, _ = self._evaluate(stage, first, 0, state, sums)
        return state

    def _fold_python(self, index: int, stage: Stage, state: Any, sums: Any, step: int) -> Any:
        """Folds a Python function over the batches of a stage; each step logs its own row."""
        first = self.plan.offsets[index]
        for local in range(step - first, stage.steps):
            key = stage.key(self.options.seed, "step", local)
            if stage.label:
                self.progress.advance(local, stage.label(local))
            begin = time.monotonic()
            single, metrics = stage.step(self.parallel.single(state), stage.data.batch_at(local), key)
            single = single.replace(step=jnp.asarray(first + local + 1, jnp.int32))
            state = self.parallel.replicate(single)
            if bad := _nonfinite(metrics):
                self._refuse(stage, first + local + 1, f"the metric {bad}", state)
            numbers = evaluate.compute(metrics)
            times = {name: numbers.pop(name) for name in list(numbers) if name.startswith("seconds")}
            numbers.update(_scheduled(stage, local))
            self._append(stage, first + local + 1, "train", numbers)
            self._time(stage, first + local + 1, {"seconds": time.monotonic() - begin, **times})
            self.progress.advance(local + 1, metrics=numbers)
            state = self._boundary(stage, first + local + 1, local + 1, state, sums)
        return state

    def _log(self, stage: Stage, step: int, local: int, state: Any, sums: Any) -> dict[str, float]:
        sums = jax.device_get(self.parallel.single(sums))
        if (bad := int(sums["bad_step"])) >= 0:
            self._refuse(stage, bad, f"the metric {_nonfinite(sums['metrics'])}", state)
        numbers = evaluate.compute(sums["metrics"])
        numbers.update(_scheduled(stage, local - 1))
        self._append(stage, step, "train", numbers)
        return numbers

    def _append(self, stage: Stage, step: int, kind: str, numbers: dict[str, float], name: str | None = None) -> None:
        head = {"step": step, "stage": stage.name, "kind": kind, **({"eval": name} if name else {})}
        self.rows.append({**head, **numbers})
        self.events.scalars(step, "/".join(part for part in (stage.name, name or kind) if part), numbers)

    def _time(self, stage: Stage, step: int, numbers: dict[str, float]) -> None:
        self.timings.append({"step": step, "stage": stage.name, **numbers})

    def _boundary(self, stage: Stage, step: int, local: int, state: Any, sums: Any) -> Any:
        """Evaluates, saves and stops, each when it is due; the state with what evaluations left in it."""
        state, scored = self._evaluate(stage, step, local, state, sums)
        stop = self.interrupt.requested(local % self.options.log_every == 0 or not stage.compiled)
        if stop or scored or local % self.options.save_every == 0 or local == stage.steps:
            self._save(stage, step, state, sums, self._meta(), self.score if scored else None)
        if stop:
            self._stop(step)
        return state

    def _stop(self, step: int) -> None:
        self.checkpoints.wait()
        raise Preempted(
            f"stopped by {self.interrupt.name} at step {step} of {self.task.steps}, state saved in "
            f"{self.directory}; the same command continues"
        )

    def _evaluate(self, stage: Stage, step: int, local: int, state: Any, sums: Any) -> tuple[Any, bool]:
        """Runs the evaluations that are due.

        Returns:
          The state with what they left in it, and whether one of them gave the score of the best checkpoint.
        """
        due = {
            name: evaluation
            for name, evaluation in stage.evals.items()
            if local == stage.steps or (evaluation.every and local % evaluation.every == 0)
        }
        before = {**self._meta(), "owes_evaluation": True}
        try:
            scored, found = self._evaluate_all(stage, step, local, state, due)
        except evaluate.Interrupted:
            if step != self.saved_step and step > 0:
                self._save(stage, step, state, sums, before)
            self._stop(step)
        # After all of them: what is saved above has to be the state before any.
        for name, evaluation in due.items():
            if evaluation.remember is not None:
                state = self._remember(evaluation.remember)(state, self.parallel.replicate(found[name]))
        return state, scored

    def _remember(self, function: Any) -> Any:
        """An evaluation's ``remember``, compiled."""
        if function not in self._memories:
            self._memories[function] = self.parallel.compile(function, donate=(0,), quickly=True)
        return self._memories[function]

    def _evaluate_all(
        self, stage: Stage, step: int, local: int, state: Any, due: dict[str, Eval]
    ) -> tuple[bool, dict[str, Metrics]]:
        scored, found = False, {}
        # A step is saved once, with its score: the evaluation that gives it isn't cut short.
        scoring = any(self.task.best.startswith(f"{stage.name}/{name}/") for name in due)
        for name, evaluation in due.items():
            evaluator = self._evaluators.get(evaluation.update)
            if evaluator is None:
                evaluator = evaluate.Evaluator(evaluation.update, self.parallel)
                self._evaluators[evaluation.update] = evaluator
            data = evaluation.data if scoring else evaluate.Interruptible(evaluation.data, self.interrupt)
            metrics = evaluator(state, data)
            if bad := _nonfinite(metrics):
                self._refuse(stage, step, f"the metric {bad} of the evaluation '{name}'", state)
            numbers, found[name] = evaluate.compute(metrics), metrics
            self._append(stage, step, "eval", numbers, name)
            self.progress.message(f"{stage.name} {local}/{stage.steps}  {name}: {brief(numbers)}")
            prefix = f"{stage.name}/{name}/"
            if self.task.best.startswith(prefix):
                self.score, scored = numbers[self.task.best.removeprefix(prefix)], True
        return scored, found

    def _meta(self) -> dict[str, Any]:
        """What a checkpoint knows besides the arrays."""
        return {"rows": self.rows.count, "timings": self.timings.count, "owes_evaluation": False}

    def _save(
        self, stage: Stage, step: int, state: Any, sums: Any, meta: dict[str, Any], score: float | None = None
    ) -> None:
        single = self.parallel.single(state)
        if any(jax.device_get(self._flags(single)).values()):
            self._refuse(stage, step, "the state", state)
        self.rows.sync()
        self.timings.sync()
        self.checkpoints.save(
            step,
            {"state": single, "sums": self.parallel.single(sums)},
            score=score,
            meta=meta,
        )
        self.saved_step = step

    def _refuse(self, stage: Stage, step: int, what: str, state: Any) -> None:
        single = self.parallel.single(state)
        flags = jax.device_get(self._flags(single))
        leaf = next((name for name in trees.named_leaves(single) if flags.get(name)), None)
        where = f"first bad leaf of the state: {leaf}" if leaf else "the state itself is still finite"
        kept = f"step {self.saved_step}" if self.saved_step >= 0 else "none yet"
        raise NonFiniteError(
            f"step {step} (stage '{stage.name}'): {what} is not finite; {where}. "
            f"The last good checkpoint is kept ({kept}). Lower the learning rate or look at the data of that step"
        )


def _nonfinite(metrics: Metrics) -> str | None:
    """The first metric whose sums aren't finite; None if all are."""
    for name, metric in jax.device_get(metrics).items():
        if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(metric)):
            return name
    return None


def _scheduled(stage: Stage, local: int) -> dict[str, float]:
    """The schedules' values for a step, counted from 0 within the stage."""
    return {name: float(value(local)) for name, value in stage.schedules.items()}
