"""The one loop: folds the stages of a task, logging, evaluating and saving as functions of the step alone.

At each step boundary, in this order: a row for metrics.jsonl if it is time, evaluations if it is time, a
checkpoint if it is time. A checkpoint holds the state, the metric sums since the last row, and how many rows had
been written, so a run that is killed anywhere and started again writes the same rows and ends in the same state.
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import rng, trees
from jaxvision.core.errors import NonFiniteError, Preempted, StorageError
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
from jaxvision.engine.task import Stage, Task
from jaxvision.engine.tensorboard import Events


def run(task: Task, options: Options, directory: Path, parallel: Parallel, progress: Progress) -> Results:
    """Runs the task in a prepared, locked directory, from its newest good checkpoint or from the start.

    Raises:
      Preempted: a signal came; the state was saved.
      NonFiniteError: a metric or the state became NaN or infinite; nothing bad was saved.
      StorageError: the directory can't be written, or none of its checkpoints verifies.
    """
    with Interrupt() as interrupt, _Run(task, options, directory, parallel, progress, interrupt) as loop:
        return loop.everything()


class _Run:
    """One process's work on a run; see :func:`run`."""

    def __init__(self, task, options, directory, parallel, progress, interrupt):
        self.task, self.options, self.directory = task, options, directory
        self.parallel: Parallel = parallel
        self.progress: Progress = progress
        self.interrupt: Interrupt = interrupt
        self.first_host = parallel.shard_index == 0
        self.plan = Plan(task, options, parallel)
        self.rows = RowLog(directory / "metrics.jsonl", write=self.first_host)
        self.timings = RowLog(directory / "timing.jsonl", write=self.first_host)
        self.events = Events(directory, enabled=options.tensorboard and self.first_host)
        self.score: float | None = None
        self.saved_step = -1
        self._evaluators: dict[Any, evaluate.Evaluator] = {}
        self._flags = jax.jit(trees.nonfinite_flags)

    def __enter__(self) -> "_Run":
        self.checkpoints = Checkpoints(
            self.directory / "checkpoints",
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
            if step > last or (step == last and stage.steps):
                continue
            if step == first:
                if stage.begin is not None:
                    key = rng.key(self.options.seed, f"{stage.name}/begin", 0)
                    state = self.parallel.initialize(stage.begin, self.parallel.single(state), key)
                if stage.check is not None:
                    stage.check(self.parallel.single(state))
                sums = self.parallel.replicate(zero_sums(self.plan.metrics[index]))
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
            self._check_fresh()
            self.rows.resume(0)
            self.timings.resume(0)
            state = self.parallel.initialize(self.task.init, rng.key(self.options.seed, "init"))
            if self.task.load is not None:
                state = self.parallel.replicate(self.task.load(self.parallel.single(state)))
            return state, None, 0
        self.rows.resume(restored.meta["rows"])
        self.timings.resume(restored.meta["timings"])
        self.saved_step = restored.step
        self.progress.message(f"continuing from step {restored.step} of {self.task.steps}")
        payload = restored.payload
        return self.parallel.replicate(payload["state"]), self.parallel.replicate(payload["sums"]), restored.step

    def _check_fresh(self) -> None:
        """Raises StorageError where rows show that checkpoints were written, but their folder has vanished whole."""
        rows = self.rows.rows()
        # One save may have been under way when a run was killed; the second begins only after the first is on disk.
        if rows and rows[-1]["step"] > 2 * self.options.save_every:
            raise StorageError(
                f"{self.directory} has rows up to step {rows[-1]['step']} but no checkpoints any more; put them back, "
                "or start in another --workdir"
            )

    def _fold_compiled(self, index: int, stage: Stage, state: Any, sums: Any, step: int) -> Any:
        """Folds one jitted program over the batches of a stage."""
        first = self.plan.offsets[index]
        step_fn = training_step(stage, self.options.seed)
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
                sums = self.parallel.replicate(zero_sums(self.plan.metrics[index]))
                seconds = time.monotonic() - clock
                self._time(stage, first + local, {"steps_per_second": (first + local - since) / seconds})
                clock, since = time.monotonic(), first + local
            self.progress.advance(local, stage.label(local) if stage.label else "", metrics)
            self._boundary(stage, first + local, local, state, sums)
        if not stage.steps:
            self._evaluate(stage, first, 0, state)
        return state

    def _fold_python(self, index: int, stage: Stage, state: Any, sums: Any, step: int) -> Any:
        """Folds a Python function over the batches of a stage; each step logs its own row."""
        first = self.plan.offsets[index]
        for local in range(step - first, stage.steps):
            key = rng.key(self.options.seed, f"{stage.name}/step", first + local)
            if stage.label:
                self.progress.advance(local, stage.label(local))
            begin = time.monotonic()
            single, metrics = stage.step(self.parallel.single(state), stage.data.batch_at(local), key)
            single = single.replace(step=jnp.asarray(first + local + 1, jnp.int32))
            state = self.parallel.replicate(single)
            numbers = evaluate.compute(metrics)
            times = {name: numbers.pop(name) for name in list(numbers) if name.startswith("seconds")}
            numbers.update(_scheduled(stage, local))
            self._append(stage, first + local + 1, "train", numbers)
            self._time(stage, first + local + 1, {"seconds": time.monotonic() - begin, **times})
            self.progress.advance(local + 1, metrics=numbers)
            self._boundary(stage, first + local + 1, local + 1, state, sums)
        return state

    def _log(self, stage: Stage, step: int, local: int, state: Any, sums: Any) -> dict[str, float]:
        sums = jax.device_get(self.parallel.single(sums))
        if (bad := int(sums["bad_step"])) >= 0:
            leaves = trees.named_leaves(sums["metrics"])
            names = [name for name, leaf in leaves.items() if not np.all(np.isfinite(leaf))]
            self._refuse(stage, bad, f"the metric {names[0].split('/')[0]}", state)
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

    def _boundary(self, stage: Stage, step: int, local: int, state: Any, sums: Any) -> None:
        """Evaluates, saves and stops, each when it is due."""
        scored = self._evaluate(stage, step, local, state)
        stop = self.interrupt.requested(local % self.options.log_every == 0 or not stage.compiled)
        if stop or scored or local % self.options.save_every == 0 or local == stage.steps:
            self._save(stage, step, state, sums, scored)
        if stop:
            self.checkpoints.wait()
            raise Preempted(
                f"stopped by {self.interrupt.name} at step {step} of {self.task.steps}, state saved in "
                f"{self.directory}; the same command continues"
            )

    def _evaluate(self, stage: Stage, step: int, local: int, state: Any) -> bool:
        """Runs the evaluations that are due; True when one of them gave the score of the best checkpoint."""
        scored = False
        for name, evaluation in stage.evals.items():
            if local != stage.steps and (not evaluation.every or local % evaluation.every):
                continue
            evaluator = self._evaluators.get(evaluation.update)
            if evaluator is None:
                evaluator = evaluate.Evaluator(evaluation.update, self.parallel)
                self._evaluators[evaluation.update] = evaluator
            numbers = evaluate.compute(evaluator(state, evaluation.data))
            self._append(stage, step, "eval", numbers, name)
            self.progress.message(f"{stage.name} {local}/{stage.steps}  {name}: {brief(numbers)}")
            prefix = f"{stage.name}/{name}/"
            if self.task.best.startswith(prefix):
                self.score, scored = numbers[self.task.best.removeprefix(prefix)], True
        return scored

    def _save(self, stage: Stage, step: int, state: Any, sums: Any, scored: bool) -> None:
        single = self.parallel.single(state)
        if any(jax.device_get(self._flags(single)).values()):
            self._refuse(stage, step, "the state", state)
        self.rows.sync()
        self.timings.sync()
        self.checkpoints.save(
            step,
            {"state": single, "sums": self.parallel.single(sums)},
            score=self.score if scored else None,
            meta={"rows": self.rows.count, "timings": self.timings.count},
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


def _scheduled(stage: Stage, local: int) -> dict[str, float]:
    """The schedules' values for a step, counted from 0 within the stage."""
    return {name: float(value(local)) for name, value in stage.schedules.items()}
