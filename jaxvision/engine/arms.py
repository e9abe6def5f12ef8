"""A comparison in one run: several ways to train (arms), each for several seeds and settings (members).

An arm is a stage. Its members are the product of the seeds and a small grid (of learning rates, say) and share one
compiled program: they are one axis of the state, as seeds alone are in ``engine/seeds.py``. All arms start from the
same variables of their seed, kept in ``State.extra["start"]``: random, loaded, or those that an earlier arm trained
for the others (``Arm.pretrains``). They also draw the same random numbers: step i of a seed has the same batch and
the same key in every arm, so that arms differ in the method alone, and none depends on which others there are. Only
the last arm's state is there at the end; what the report needs of the others they leave in ``State.extra["kept"]``
(``Arm.keep``).

Each evaluation logs a metric ``m`` as ``m_0``, ``m_1``, ... in the order of ``Arm.members``; :func:`table` makes
mean and spread of them, with the setting chosen on one evaluation and judged on another.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.engine import seeds as seed_axis
from jaxvision.engine.arm import Arm
from jaxvision.engine.best_so_far import BestSoFar
from jaxvision.engine.report import Results
from jaxvision.engine.task import Batch, Eval, EvalData, Metrics, Stage, State, TrainData

START = "start"
"""``State.extra`` of the variables all arms start from, leaves [S, ...]."""
SETTING = "setting"
"""``State.extra`` of a member's setting: name -> float32 ()."""
SHORT = 1000
"""An arm of fewer steps is compiled quickly: most of the time of a small comparison goes into compiling."""
STREAM = "arm"
"""The stream of random numbers (``Stage.stream``) of all arms but those that pretrain."""
KEPT = "kept"
"""``State.extra`` of what finished arms left: name of the arm -> a tree with leaves [members, ...]."""
BEST = "best"
"""``State.extra`` of an arm that keeps its members' best (``Arm.best``): a ``BestSoFar`` of them."""


def check_seeds(config: Config) -> tuple[int, ...]:
    """The field ``seeds``; ConfigError unless they are whole numbers of at least 0, one or more, each once."""
    seeds = config.numbers("seeds", whole=True)
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigError(f"{config.where('seeds')}={seeds} must be at least one seed, each once, none below 0")
    return seeds


def stages(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    data: Sequence[TrainData],
    evals: Mapping[str, EvalData],
    *,
    every: int = 0,
    how: str = "map",
) -> tuple[Stage, ...]:
    """The stages of arms that run one after the other; arguments as of :func:`stage`."""
    return tuple(
        stage(arm, seeds, data, evals, every=every, how=how, after=before) for before, arm in zip([None, *arms], arms)
    )


def stage(
    arm: Arm,
    seeds: Sequence[int],
    data: Sequence[TrainData],
    evals: Mapping[str, EvalData],
    *,
    every: int = 0,
    how: str = "map",
    after: Arm | None = None,
) -> Stage:
    """The stage of an arm.

    Args:
      arm: the arm.
      seeds: of the run; a member's key is ``fold_in(key, seed)``.
      data: the training batches of each seed.
      evals: name -> evaluation batches.
      every: evaluate each so many steps; 0: at the end.
      how: "map": members one after the other; "vmap": at once; "unroll" (see :func:`seeds.over`); "call": one after
        the other as calls of one program on one device (:func:`seeds.call_seeds`); every step logs a row.
      after: the arm that runs before, whose ``keep`` and ``pretrains`` are seen to when this one begins.
    """
    members = arm.members(seeds)
    owners = tuple(seeds[member.seed] for member in members)
    over = functools.partial(seed_axis.over, how="map" if how == "call" else how)
    chooses, _, score = arm.best.partition("/")
    if arm.best and chooses not in evals:
        raise unknown(f"arm {arm.name!r}: the evaluation in best", chooses, evals)

    def begin(state: State, key: jax.Array) -> State:
        index = np.asarray([member.seed for member in members])
        common = _handed_on(state, after)
        start = jax.tree.map(lambda leaf: leaf[index], common[START])
        names = list(arm.grid)
        settings = {name: jnp.asarray([m.setting[name] for m in members], jnp.float32) for name in names}
        keys = jax.vmap(lambda seed: jax.random.fold_in(key, seed))(jnp.asarray(owners))

        def one(arguments: tuple[Any, Any, jax.Array]) -> State:
            variables, setting, key = arguments
            fresh = arm.begin(variables, setting, key)
            return fresh.replace(step=None, extra={**fresh.extra, SETTING: setting})

        new = over(one, (start, settings, keys))
        best = {BEST: BestSoFar.of_none(jax.vmap(arm.keep)(new))} if arm.best else {}
        return new.replace(step=state.step, extra={**new.extra, **common, **best})

    if how == "call":
        run = seed_axis.call_seeds(arm.step, owners, separate=arm.separate)
    else:
        run = seed_axis.step_seeds(arm.step, owners, how=how, separate=arm.separate)

    def step(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        state, common = _split(state)
        index = np.asarray([member.seed for member in members])
        new, metrics = run(state, jax.tree.map(lambda leaf: leaf[:, index], batch), key)
        return new.replace(extra={**new.extra, **common}), metrics

    def evaluate(state: State, batch: Batch) -> Metrics:
        state, _ = _split(state)
        each = over(lambda member: arm.evaluate(member.replace(step=state.step), batch), state.replace(step=None))
        return {
            f"{name}_{index}": seed_axis.member(each[name], index) for name in each for index in range(len(members))
        }

    def remember(state: State, metrics: Metrics) -> State:
        scores = [metrics[f"{score}_{index}"].compute() for index in range(len(members))]
        now = jax.vmap(arm.keep)(_split(state)[0].replace(step=None))
        best = state.extra[BEST].after(jnp.stack(scores), state.step, now)
        return state.replace(extra={**state.extra, BEST: best})

    def check(state: State) -> None:
        state = jax.device_get(_split(state)[0].replace(step=None))
        for index in range(len(members)):
            arm.check(seed_axis.member(state, index))

    return Stage(
        arm.name,
        arm.steps,
        seed_axis.SeedBatches(data),
        step,
        begin=begin,
        check=None if arm.check is None else check,
        evals={
            name: Eval(batches, evaluate, every, remember if name == chooses else None)
            for name, batches in evals.items()
        },
        compiled=how != "call",
        traceable=True,
        schedules=arm.schedules,
        quickly=arm.steps < SHORT,
        stream=arm.name if arm.pretrains else STREAM,
    )


def _split(state: State) -> tuple[State, dict[str, Any]]:
    """The members' states as their steps see them, and the rest of ``extra``."""
    apart = {name: state.extra[name] for name in (START, KEPT, BEST) if name in state.extra}
    return state.replace(extra={name: tree for name, tree in state.extra.items() if name not in apart}), apart


def _handed_on(state: State, after: Arm | None) -> dict[str, Any]:
    """What is common to all of a run, once the arm ``after`` is done."""
    state, common = _split(state)
    best = common.pop(BEST, None)
    if after is not None and after.keep is not None:
        left = jax.vmap(after.keep)(state.replace(step=None)) if best is None else best
        common = {**common, KEPT: {**common.get(KEPT, {}), after.name: left}}
    if after is not None and after.pretrains:
        common = {**common, START: {"params": state.params, **state.model_state}}
    return common


def kept(state: State, last: Arm) -> dict[str, Any]:
    """What the arms of a finished run left, by name; ``last`` is the one that ran last, whose state this is."""
    left = _handed_on(state, last).get(KEPT, {})
    return {name: tree.tree if isinstance(tree, BestSoFar) else tree for name, tree in left.items()}


def best_steps(state: State, last: Arm) -> dict[str, Any]:
    """The steps of the run, int32 [members], at which arms kept their members' best, by name; arguments of `kept`."""
    left = _handed_on(state, last).get(KEPT, {})
    return {name: tree.step for name, tree in left.items() if isinstance(tree, BestSoFar)}


def start_state(init: Callable[[jax.Array], Any], seeds: Sequence[int], key: jax.Array) -> State:
    """The state before the first arm: ``extra["start"]`` holds ``init(fold_in(key, seed))`` of every seed."""
    variables = jax.vmap(lambda seed: init(jax.random.fold_in(key, seed)))(jnp.asarray(seeds))
    return State(jnp.zeros((), jnp.int32), extra={START: variables})


def load_start(load: Callable[[Any], Any], state: State) -> State:
    """The state before the first arm with ``load(variables)`` for each seed's variables: a ``Task.load``.

    Args:
      load: ``fresh variables of a seed -> variables`` with pretrained values in their place, on the host; what it
        keeps fresh stays each seed's own.
      state: of :func:`start_state`.
    """
    start = jax.device_get(state.extra[START])
    each = [load(seed_axis.member(start, index)) for index in range(len(jax.tree.leaves(start)[0]))]
    return state.replace(extra={**state.extra, START: jax.tree.map(lambda *leaves: np.stack(leaves), *each)})


def member_state(state: State, index: int) -> State:
    """The state of one member of the arm that ran last."""
    return seed_axis.member(_split(state)[0].replace(step=None), index).replace(step=state.step)


@dataclass(frozen=True)
class Outcome:
    """What one setting of an arm came to.

    Attributes:
      arm: its name.
      setting: the label.
      chosen: the metric of each seed on the evaluation that choices are made on.
      judged: the metric of each seed on the evaluation that is reported.
    """

    arm: str
    setting: str
    chosen: np.ndarray
    judged: np.ndarray


def outcomes(
    results: Results, arm: Arm, seeds: Sequence[int], metric: str, *, choose: str, judge: str
) -> tuple[Outcome, ...]:
    """The final metric of every setting of an arm on the evaluations ``choose`` and ``judge``."""
    members, found = arm.members(seeds), []
    for label in dict.fromkeys(member.label for member in members):
        where = [index for index, member in enumerate(members) if member.label == label]
        values = [
            np.asarray([results.last(arm.name, name, f"{metric}_{index}") for index in where])
            for name in (choose, judge)
        ]
        found.append(Outcome(arm.name, label, *values))
    return tuple(found)


def best(candidates: Sequence[Outcome], *, largest: bool = True) -> Outcome:
    """The setting of the best mean on the evaluation for choosing; ties: the first."""
    means = [outcome.chosen.mean() for outcome in candidates]
    return candidates[int(np.argmax(means) if largest else np.argmin(means))]


def spread(values: np.ndarray, *, scale: float = 1.0, digits: int = 1) -> str:
    """``95.2 ± 0.4``: mean and sample standard deviation over the seeds (one seed: the value alone)."""
    values = np.asarray(values) * scale
    text = f"{values.mean():.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {values.std(ddof=1):.{digits}f}"


def learning_rate(schedule: optax.Schedule, name: str = "lr") -> Callable[[State], Callable[[jax.Array], jax.Array]]:
    """``state -> schedule``: the shape of a schedule (peak 1) times the member's own rate."""

    def of(state: State) -> Callable[[jax.Array], jax.Array]:
        return lambda count: state.extra[SETTING][name] * schedule(count)

    return of
