"""Accuracies really trained: a sample of NAS-Bench-201 architectures under one budget, in one compiled program.

Architectures are data, members one axis of the state. All members see the same batches. Normalisation takes running
statistics at evaluation, as in the benchmark.

What this sample can tell is bounded by its own noise: two trainings of one architecture differ, and 500 test images
have a standard error of 2 points. Digits without noise are learned by nearly every architecture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxvision.core.errors import ConfigError
from jaxvision.engine import seeds
from jaxvision.engine.task import Batch, Metrics, State
from jaxvision.methods.az_nas import supernet, supernet_init
from jaxvision.methods.az_nas.supernet_init import Skeleton
from jaxvision.metrics import Mean, classification
from jaxvision.optim import optimizers, schedules

ARCHITECTURES = "architectures"
"""``State.extra`` of the members' architectures, int32 [M, 6]."""


@dataclass(frozen=True)
class Training:
    """The budget that all members have, and their network's skeleton.

    SGD with Nesterov momentum and weight decay on every parameter, learning rate from ``lr`` to 0 by half a cosine:
    the benchmark's recipe.

    Attributes:
      skeleton: of the networks.
      steps: of training.
      lr: at the start.
      momentum, weight_decay: of SGD.
      how: members one after the other ("map", best on CPU) or at once ("vmap").
    """

    skeleton: Skeleton
    steps: int
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    how: str = "map"

    def init_members(self, key: jax.Array, architectures: jax.Array) -> State:
        """Fresh members: leaves [M, ...] of parameters, running statistics and momenta; ``step`` 0.

        Member m draws its weights from ``fold_in(key, m)``. Traceable.

        Args:
          key: of the draws.
          architectures: int32 [M, 6]; one may be there several times, as several seeds.
        """
        architectures = jnp.asarray(architectures, jnp.int32)
        if architectures.ndim != 2 or architectures.shape[1] != 6:
            raise ConfigError(f"architectures have the shape {architectures.shape}, but must be [members, 6]")

        def one(member: tuple[jax.Array, jax.Array]) -> tuple[Any, Any, Any]:
            index, architecture = member
            params = supernet_init.init(jax.random.fold_in(key, index), architecture, self.skeleton)
            return params, supernet.initial_statistics(params), self._optimizer().init(params)

        params, statistics, opt_state = jax.lax.map(one, (jnp.arange(len(architectures)), architectures))
        extra = {ARCHITECTURES: architectures}
        return State(jnp.zeros((), jnp.int32), params, {"running": statistics}, opt_state, extra)

    def train_step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One step of every member on one batch.

        Args:
          state: of :meth:`init_members`.
          batch: ``image`` float32 [B, H, W, C], ``label`` int32 [B].

        Returns:
          the new state, and ``loss`` and ``accuracy`` as means over members and batch.
        """
        optimizer = self._optimizer()

        def one(member: tuple[Any, ...]) -> tuple[Any, Metrics]:
            params, running, opt_state, architecture = member

            def loss(params: Any) -> tuple[jax.Array, Any]:
                out = supernet.apply(params, architecture, batch["image"])
                losses = optax.softmax_cross_entropy_with_integer_labels(out.logits, batch["label"])
                return jnp.mean(losses), (out, losses)

            gradients, (out, losses) = jax.grad(loss, has_aux=True)(params)
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            running = supernet.updated(running, out.statistics, batch["image"].shape)
            metrics = {"loss": Mean.of(losses), "accuracy": classification.accuracy(out.logits, batch["label"])}
            return (optax.apply_updates(params, updates), running, opt_state), metrics

        (params, running, opt_state), metrics = seeds.over(one, _members(state), self.how)
        metrics = jax.tree.map(lambda leaf: jnp.sum(leaf, 0), metrics)
        return state.replace(params=params, model_state={"running": running}, opt_state=opt_state), metrics

    def evaluate(self, state: State, batch: Batch) -> Metrics:
        """``accuracy_0``, ``accuracy_1``, ...: each member's accuracy, with running statistics.

        Args:
          state: of :meth:`init_members` or :meth:`train_step`.
          batch: as there; and ``mask`` float32 [B], 0 for rows that don't count, where it has one.
        """

        def one(member: tuple[Any, ...]) -> Mean:
            params, running, _, architecture = member
            logits = supernet.apply(params, architecture, batch["image"], running=running).logits
            return classification.accuracy(logits, batch["label"], batch.get("mask"))

        found = seeds.over(one, _members(state), self.how)
        return {f"accuracy_{member}": seeds.member(found, member) for member in range(len(found.total))}

    def learning_rate(self) -> Callable[[Any], jax.Array]:
        """As a function of the step."""
        return schedules.cosine(self.lr, self.steps)

    def _optimizer(self) -> optax.GradientTransformation:
        return optimizers.sgd(self.learning_rate(), self.momentum, nesterov=True, weight_decay=self.weight_decay)


def _members(state: State) -> tuple[Any, ...]:
    return state.params, state.model_state["running"], state.opt_state, state.extra[ARCHITECTURES]
