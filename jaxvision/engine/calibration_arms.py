"""Arms of a comparison of calibration losses: what an arm's name says, and how it is trained.

acls                                        the loss of that name with the numbers of the configuration
acls(margin=8, reference=min)               other numbers
acls(margin=(4, 6, 8))                      several trainings in one program, a row of the table each
my_package.my_module:my_loss(strength=2)    a function of one's own
"""

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.data.transforms import IGNORE
from jaxvision.engine import arms, calibration_passes, supervised
from jaxvision.engine.calibration_passes import HISTORY, INDEX, WHERE, Passes
from jaxvision.engine.task import Batch, Metrics, State
from jaxvision.losses import registry
from jaxvision.losses.correctness_ranking import CorrectnessHistory, count_correct, with_epoch
from jaxvision.losses.registry import LossSpec
from jaxvision.metrics import Mean, classification
from jaxvision.metrics.calibration_sums import TopError

MONITOR = "monitor"
"""Prefix of the training metrics that are logged for each member."""
_ARM = re.compile(r"([\w.:]+)\s*(?:\((.*)\))?", re.DOTALL)
_LOGITS = "logits"

Monitor = Callable[[Any, Batch], Metrics]
"""``(outputs of the passes, batch) -> metrics``: what a method wants to see of its loss in training."""


@dataclass(frozen=True)
class Recipe:
    """What an arm's name says.

    Attributes:
      text: the name, without spaces.
      loss: the loss's own name.
      spec: its entry.
      hyper: keyword arguments of the loss.
      mixing: settings of the mixing of images.
      grid: hyper-parameter -> the values that are tried.
    """

    text: str
    loss: str
    spec: LossSpec
    hyper: Mapping[str, Any] = field(default_factory=dict)
    mixing: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def label(self, member: arms.Member) -> str:
        """The row of a member's setting in the table: ``acls(margin=6)``."""
        if not self.grid:
            return self.text
        fixed = {key: value for key, value in _written(self.text)[1].items() if key not in self.grid}
        values = [f"{key}={value:g}" for key, value in member.setting.items()]
        return f"{self.loss}({','.join([*values, *(f'{key}={value}' for key, value in fixed.items())])})"


def parse(text: str, configured: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """The recipe of an arm's name.

    Args:
      text: see the module's text.
      configured: loss -> hyper-parameters, ``config.losses``; a loss that isn't there has its general defaults.

    Raises:
      ConfigError: a name that can't be read, an unknown loss or hyper-parameter, a value of another kind.
    """
    name, given = _written(text)
    spec = registry.resolve(name)
    short = "".join(text.split())
    known = {**_defaults(spec.function), **spec.hyper, **spec.mixing}
    hyper, mixing = spec.settings(None, **{**configured.get(name, {}), **given})
    grid = {key: value for key, value in hyper.items() if isinstance(value, tuple)}
    for key, value in {**hyper, **mixing}.items():
        for each in value if isinstance(value, tuple) else (value,):
            if _is_number(known.get(key)) and not _is_number(each):
                raise ConfigError(f"config.arms has {text!r}: {key}={each!r} must be a number")
        if isinstance(value, tuple):
            _check_sweep(text, key, value, swept=key in grid and not isinstance(known.get(key), str | bool))
    return Recipe(short, name, spec, {k: v for k, v in hyper.items() if k not in grid}, mixing, grid)


def _written(text: str) -> tuple[str, dict[str, Any]]:
    """The loss's name, and the keyword arguments behind it; words needn't be quoted."""
    match = _ARM.fullmatch(text.strip())
    problem = f"config.arms has {text!r}, which must be written as name or name(key=value, ...)"
    if match is None:
        raise ConfigError(problem)
    try:
        call = ast.parse(f"f({match[2] or ''})", mode="eval").body
    except SyntaxError as error:
        raise ConfigError(problem) from error
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ConfigError(problem)
    values = {}
    for keyword in call.keywords:
        value = keyword.value
        try:
            values[keyword.arg] = value.id if isinstance(value, ast.Name) else ast.literal_eval(value)
        except ValueError as error:
            raise ConfigError(problem) from error
    return match[1], values


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_sweep(text: str, key: str, values: tuple[Any, ...], *, swept: bool) -> None:
    if not swept:
        raise ConfigError(
            f"config.arms has {text!r}, but {key} can't have several values in one arm; name one arm for each"
        )
    if not values or len(set(values)) != len(values):
        raise ConfigError(f"config.arms has {text!r}: {key}={values} must be at least one number, each once")


class _NoNetwork:
    """In the place of a network where only the loss is tried: logits of zeros."""

    def __init__(self, outputs: tuple[int, ...]):
        self._outputs = outputs

    def apply(self, variables: Any, images: jax.Array, **_: Any) -> tuple[jax.Array, Any]:
        return jnp.zeros((len(images), *self._outputs)), {}


@dataclass(frozen=True, eq=False)
class Trainer:
    """One arm.

    Attributes:
      recipe: what its name says.
      module: the network.
      outputs: shape of an image's logits, (K,) or (H, W, K).
      transform: the optimizer.
      schedule: the learning rate.
      steps, per_epoch: how many.
      offset: steps of the run before this arm.
      train_size: training examples, for CRL.
      num_bins: of the logged ECE.
      monitor: what is logged besides, from (hyper-parameters) -> :data:`Monitor`; None: nothing.
    """

    recipe: Recipe
    module: Any
    outputs: tuple[int, ...]
    transform: optax.GradientTransformation
    schedule: optax.Schedule
    steps: int
    per_epoch: int
    offset: int
    train_size: int
    num_bins: int
    monitor: Callable[[Mapping[str, Any]], Monitor] | None = None

    @property
    def dense(self) -> bool:
        """Does every pixel have logits?"""
        return len(self.outputs) > 1

    @cached_property
    def passes(self) -> Passes:
        """The forward passes of a step."""
        return calibration_passes.of(self.recipe.spec, self.recipe.mixing, self.outputs[-1])

    def targets(self, batch: Batch) -> Batch:
        """The batch with the labels that belong to the logits."""
        if not self.dense:
            return batch
        labels = batch["label_map"].astype(jnp.int32)
        return {**batch, "label": labels, WHERE: labels != IGNORE}

    def loss(self, setting: Mapping[str, Any]) -> supervised.LossFn:
        """The loss of a member with this setting, and what is logged."""
        call = self.recipe.spec.bind(None, **self.recipe.hyper, **setting)

        def loss(outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
            found = self.passes.loss(call, outputs, batch)
            metrics = {name: Mean.of(getattr(found, part)) for name, part in _LOGGED}
            if self.monitor is not None:
                watched = self.monitor({**self.recipe.hyper, **setting})(outputs, batch)
                metrics |= {f"{MONITOR}/{name}": value for name, value in watched.items()}
            if self.recipe.spec.needs == "history":
                metrics[_LOGITS] = outputs
            return found.total, metrics

        return loss

    def begin(self, variables: Any, setting: Mapping[str, jax.Array], key: jax.Array) -> State:
        """See :class:`arms.Arm`."""
        del setting, key
        state = supervised.new_state(variables, self.transform, average=False)
        if self.recipe.spec.needs != "history":
            return state
        return state.replace(extra={HISTORY: CorrectnessHistory.create(self.train_size)})

    def step(self, state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        """One step of supervised training."""
        batch = self.targets(batch)
        remembers = self.recipe.spec.needs == "history"
        if remembers:
            history = with_epoch(state.extra[HISTORY], (state.step - self.offset) // self.per_epoch)
            batch = {**batch, HISTORY: history}
        loss = self.loss(state.extra[arms.SETTING])
        network = self.passes.network(self.module)
        train = supervised.train_step(network, self.transform, loss, prepare=self.passes.prepare)
        new, metrics = train(state, batch, key)
        if remembers:
            logits = metrics.pop(_LOGITS)
            counted = count_correct(history, logits, batch["label"], sample_index=batch[INDEX])
            new = new.replace(extra={**new.extra, HISTORY: counted})
        return new, metrics

    def evaluate(self, state: State, batch: Batch) -> Metrics:
        """Accuracy, NLL, mean confidence and ECE of a member."""
        batch = self.targets(batch)
        logits, labels, mask = supervised.predict(self.module, state, batch["image"]), batch["label"], batch["mask"]
        if self.dense:
            mask = mask[:, None, None] * batch[WHERE]
            logits, labels, mask = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), mask.reshape(-1)
            labels = jnp.where(mask > 0, labels, 0)
        metrics = supervised.classification_metrics(logits, {"label": labels, "mask": mask}, top5=False)
        metrics["confidence"] = Mean.of(jnp.max(jax.nn.softmax(logits, -1), -1), mask)
        return {**metrics, "ece": TopError.of(logits, labels, mask, num_bins=self.num_bins)}

    def try_loss(self, batch: Batch) -> None:
        """Traces the loss on a batch for every setting, without the network.

        Raises:
          ConfigError: what the loss says against its numbers, or this batch.
        """
        if self.recipe.spec.needs == "history" and INDEX not in batch:
            raise ConfigError(
                f"config.arms has {self.recipe.text!r}, which needs the number of each training example, but the "
                f"batches have no '{INDEX}'; leave the arm out"
            )
        if self.dense and self.recipe.spec.needs not in ("logits", "mixup", "raw_and_mixup"):
            raise ConfigError(
                f"config.arms has {self.recipe.text!r}, which is for images, but these are pixels' labels"
            )

        def trial(batch: Batch, key: jax.Array, setting: Mapping[str, Any]) -> jax.Array:
            batch = self.targets(batch)
            if self.recipe.spec.needs == "history":
                batch = {**batch, HISTORY: CorrectnessHistory.create(self.train_size)}
            if self.passes.prepare is not None:
                batch = self.passes.prepare(batch, key)
            network = self.passes.network(_NoNetwork(self.outputs))
            outputs, _ = network.apply({"params": {}}, batch["image"], train=True, rngs=None, mutable=[])
            return self.loss(setting)(outputs, batch)[0]

        key = jax.eval_shape(lambda: jax.random.key(0))
        for member in self.arm().members((0,)):
            jax.eval_shape(lambda batch, key, setting=member.setting: trial(batch, key, setting), batch, key)
        if self.recipe.grid:
            setting = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in self.recipe.grid}
            try:
                jax.eval_shape(trial, batch, key, setting)
            except jax.errors.ConcretizationTypeError as error:
                raise ConfigError(
                    f"config.arms has {self.recipe.text!r}, but {' and '.join(self.recipe.grid)} decide what the loss "
                    "computes, so that one program can't hold several values; name one arm for each"
                ) from error

    def arm(self) -> arms.Arm:
        """The arm of all settings."""
        return arms.Arm(
            self.recipe.text,
            self.begin,
            self.step,
            self.steps,
            self.evaluate,
            grid=self.recipe.grid,
            schedules={"lr": self.schedule},
            separate=(MONITOR,),
            keep=supervised.variables,
        )


_LOGGED = (("loss", "total"), ("ce", "ce"), ("penalty", "extra"))


def trained(
    recipes: tuple[Recipe, ...],
    monitors: Callable[[Recipe], Callable[[Mapping[str, Any]], Monitor] | None],
    **common: Any,
) -> tuple[Trainer, ...]:
    """The trainers of arms that run one after the other; ``common``: fields of :class:`Trainer` that all share."""
    return tuple(
        Trainer(recipe, offset=index * common["steps"], monitor=monitors(recipe), **common)
        for index, recipe in enumerate(recipes)
    )


def read_losses(block: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """``config.losses``, checked: loss -> hyper-parameters.

    Raises:
      ConfigError: a loss or a hyper-parameter that isn't there.
    """
    for name, values in block.items():
        if name not in registry.LOSSES:
            raise unknown("the loss of config.losses", name, registry.LOSSES)
        registry.resolve(name).settings(None, **values)
    return {name: dict(values) for name, values in block.items()}
