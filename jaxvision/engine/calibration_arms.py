"""How an arm of a comparison of calibration losses is trained and evaluated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxvision.core.errors import ConfigError
from jaxvision.core.types import Tap, no_tap
from jaxvision.data.transforms import IGNORE
from jaxvision.engine import arms, calibration_passes, supervised
from jaxvision.engine.calibration_names import Recipe
from jaxvision.engine.calibration_passes import HISTORY, INDEX, WHERE, Passes
from jaxvision.engine.task import Batch, Metrics, State
from jaxvision.losses.correctness_ranking import CorrectnessHistory, count_correct, with_epoch
from jaxvision.metrics import Mean
from jaxvision.metrics.calibration_sums import TopError

MONITOR = "monitor"
"""Prefix of the training metrics that are logged for each member."""
_LOGITS = "logits"
_LOGGED = (("loss", "total"), ("ce", "ce"), ("penalty", "extra"))

Monitor = Callable[[Any, Batch], Metrics]
"""``(outputs of the passes, batch) -> metrics``: what a method wants to see of its loss in training."""


class _NoNetwork:
    """In the place of a network where only the loss is tried: logits of zeros, from vectors named ``classifier``."""

    def __init__(self, outputs: tuple[int, ...]):
        self._outputs = outputs

    def apply(self, variables: Any, images: jax.Array, *, tap: Tap = no_tap, **_: Any) -> tuple[jax.Array, Any]:
        vectors = tap("classifier", jnp.zeros((len(images), 1)))
        return jnp.zeros((len(vectors), *self._outputs)), {}


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
      best: ``"evaluation/metric"`` of :meth:`evaluate`, by whose largest value the network that is reported is chosen;
        '': that of the last step.
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
    best: str = ""

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
            best=self.best,
        )


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
