"""What a method hands to the engine: a :class:`Task` of pure functions, cut into :class:`Stage` s.

Everything is a fold. A stage folds ``step`` over the batches of ``data``; training is one, post-training
calibration (a site or a table row a step) is one, a search (a population a step) is one. The step number is the
only clock: the engine makes the key of a step from (seed, stream, step) and the batch from (seed, step), so
state and step number are all that a resumed run needs. Both count the steps of the stage, so that what a stage does
is no function of how many steps others took before it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from jaxvision.core import rng, struct
from jaxvision.engine.report import Report, Results

Batch = dict[str, np.ndarray]
Metrics = dict[str, Any]
"""Name -> a pytree of sums with ``merge(other)`` and ``compute()``, such as :class:`jaxvision.metrics.Mean`.

The sums must be finite: NaN or infinity ends the run. What they compute to need not be, such as the mean of nothing.
"""


@struct.dataclass
class State:
    """All that a run remembers. Arrays only: no functions, no PRNG keys.

    Attributes:
      step: int32 (), how many steps of the whole run are done. The engine counts; steps leave it alone.
      params: what the optimizer trains.
      model_state: the network's other collections, such as ``{"batch_stats": ...}``.
      opt_state: the optax state.
      extra: what only this method needs (teacher, memory bank, calibration ranges, population).
    """

    step: jax.Array
    params: Any = struct.field(default_factory=dict)
    model_state: Any = struct.field(default_factory=dict)
    opt_state: Any = struct.field(default_factory=dict)
    extra: Any = struct.field(default_factory=dict)


class TrainData(Protocol):
    """Batches as a function of the step; ``jaxvision.data.TrainBatches`` is one."""

    batch_size: int

    def batch_at(self, step: int, shard_index: int = 0, shard_count: int = 1) -> Batch:
        """The rows of global batch ``step`` that belong to one host: a contiguous slice, leaves ``[B/shards, ...]``."""
        ...


class EvalData(Protocol):
    """A data set cut into padded batches, each example once; ``jaxvision.data.EvalBatches`` is one."""

    num_batches: int
    batch_size: int

    def batch_at(self, index: int, shard_index: int = 0, shard_count: int = 1) -> Batch:
        """As for training, with ``mask`` float32 ``[B]``: 1 for an example, 0 for padding."""
        ...


@dataclass(frozen=True)
class Eval:
    """One evaluation of the state over one data set.

    Attributes:
      data: the batches.
      update: ``(state, batch) -> metrics``, traceable; sums over the rows with ``mask`` 1. Must not change state.
      every: evaluate each so many steps of the stage; 0: only at its end, where every evaluation runs.
      remember: ``(state, metrics) -> state``, traceable: what the state keeps of the merged metrics (the best so far),
        once all evaluations of a step are done and before it is saved. None: nothing.
    """

    data: EvalData
    update: Callable[[State, Batch], Metrics]
    every: int = 0
    remember: Callable[[State, Metrics], State] | None = None


@dataclass(frozen=True)
class Stage:
    """One fold.

    Attributes:
      name: unique in the task; names the progress bar and the rows of metrics.jsonl.
      steps: how many steps; 0 evaluates only.
      data: the training batches; ``batch_at`` gets the step within the stage.
      step: ``(state, batch, key) -> (state, metrics)``. Traceable when ``compiled``.
      begin: ``(state, key) -> state`` applied when the stage starts (a fresh optimizer, a head with more classes);
        traceable, may change the structure of the state.
      check: host function of the state that ``begin`` made; raises where its values can't work.
      evals: by name.
      compiled: True: one jitted program a step. False: a Python function on host batches that may call jitted
        functions itself (a search, a solver, one row of a table); each of its steps logs its own row, and metrics
        named ``seconds...`` go to timing.jsonl, as times are no function of the step.
      traceable: of a Python function: it calls jitted functions alone, so that ``jax.eval_shape`` finds its mistakes
        before anything runs. Those that are compiled are traceable anyway.
      schedules: values to log that are functions of the step within the stage, such as the learning rate.
      label: ``step -> text`` for the progress bar of stages whose steps differ in kind.
      quickly: compile in half the time, for stages of so few steps that they don't repay more (on CPU; see
        ``parallel.compiler_options``).
      stream: of random numbers: the key of ``begin`` is ``rng.key(seed, stream + "/begin")``, that of step i of the
        stage (from 0) ``rng.key(seed, stream + "/step", i)``. Stages that are compared share one and so draw the same
        numbers. [the stage's name]
    """

    name: str
    steps: int
    data: TrainData
    step: Callable[[State, Batch, jax.Array], tuple[State, Metrics]]
    begin: Callable[[State, jax.Array], State] | None = None
    check: Callable[[State], None] | None = None
    evals: Mapping[str, Eval] = field(default_factory=dict)
    compiled: bool = True
    traceable: bool = False
    schedules: Mapping[str, Callable[[int], Any]] = field(default_factory=dict)
    label: Callable[[int], str] | None = None
    quickly: bool = False
    stream: str = ""

    def key(self, seed: int, what: str, step: int | jax.Array = 0) -> jax.Array:
        """The key of "begin", or of "step" ``step`` of the stage; see ``stream``."""
        return rng.key(seed, f"{self.stream or self.name}/{what}", step)


@dataclass(frozen=True)
class Task:
    """A method, ready to run.

    Attributes:
      name: the method.
      init: ``key -> State`` with step 0; traceable, so that a restore allocates nothing twice.
      stages: in order.
      report: what the person sees at the end, from the results alone.
      load: host function applied to a fresh initial state, never to a restored one; puts pretrained weights in
        (as constants of ``init`` they would be compiled into the program).
      best: ``"stage/eval/metric"`` whose best checkpoint is kept besides the last ones, or ''.
      best_mode: "max" or "min".
    """

    name: str
    init: Callable[[jax.Array], State]
    stages: tuple[Stage, ...]
    report: Callable[[Results], Report]
    load: Callable[[State], State] | None = None
    best: str = ""
    best_mode: str = "max"

    @property
    def steps(self) -> int:
        """The steps of all stages together."""
        return sum(stage.steps for stage in self.stages)
