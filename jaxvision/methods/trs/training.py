"""The arms of a run: how each begins, what its step is, what it leaves for the report."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core.errors import ConfigError
from jaxvision.engine import arms, quantization, supervised
from jaxvision.engine.task import Batch, Metrics, State
from jaxvision.losses.classification import softmax_cross_entropy
from jaxvision.methods.trs import diagnostics, optimizers
from jaxvision.methods.trs.variants import Variant
from jaxvision.metrics import Mean, classification
from jaxvision.models import ewgs_delta
from jaxvision.models.quantized import QuantizedNetwork
from jaxvision.models.quantized_layer import DELTA
from jaxvision.quant.ewgs import DELTA as DELTA_START
from jaxvision.quant.lsq import LSQ
from jaxvision.quant.trs import TRSWeight

METRIC = "accuracy"


def loss_fn(smoothing: float) -> supervised.LossFn:
    """Cross-entropy, mean over the batch."""

    def loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
        losses = softmax_cross_entropy(logits, batch["label"], label_smoothing=smoothing, reduction="none")
        accuracy = classification.accuracy(logits, batch["label"])
        return jnp.mean(losses), {"loss": Mean.of(losses), METRIC: accuracy}

    return loss


def evaluation(network: Any) -> Callable[[State, Batch], Metrics]:
    """Accuracy (and top-5 beyond 20 classes) of a member."""

    def evaluate(state: State, batch: Batch) -> Metrics:
        logits = supervised.predict(network, state, batch["image"])
        return supervised.classification_metrics(logits, batch, top5=logits.shape[-1] > 20)

    return evaluate


def check_remedy(variant: Variant, network: QuantizedNetwork, image: Any) -> None:
    """Raises ConfigError where dampening or freezing meets quantizers whose levels it can't place on the weights."""
    if not variant.remedy:
        return
    for name, layer in network.check(image).items():
        if layer.bits.weight is not None and layer.weight.kind not in (TRSWeight, LSQ):
            raise ConfigError(
                f"config.arms has {variant.name!r}, but {variant.remedy} needs quantizers with one scale (trs, or lsq "
                f"from 2 bits on), and {name} has {layer.weight.kind.__name__}"
            )


def merge(fresh: Any, given: Mapping[str, Any]) -> Any:
    """``fresh`` variables with those that ``given`` has in their place; nested dicts."""
    return {
        name: merge(value, given.get(name, {})) if isinstance(value, dict) else given.get(name, value)
        for name, value in fresh.items()
    }


@dataclass(frozen=True)
class Curvature:
    """When EWGS's deltas are estimated from the curvature of the loss.

    Attributes:
      every: steps between two estimates; before the first the deltas are what they are without.
      batches: training batches of an estimate, those of its first steps.
      draws: random vectors a batch, at most.
    """

    every: int
    batches: int
    draws: int


@dataclass(frozen=True, eq=False)
class Trainer:
    """One arm.

    Attributes:
      variant: what its name says.
      network: the quantized network.
      image: an example, for ``init``.
      recipe: of the optimizer.
      images: () -> float32 [B, H, W, C], what scales are fitted to; None: the start has scales already.
      smoothing: of labels.
      accumulate: micro-batches a step.
      dampening: t -> weight of the dampening loss.
      offset: steps of the run before this arm.
      keep_variables: whether the report needs the network itself.
      family_of_run: the family of ``config.quantization``, which arms that name none have.
      curvature: of arms with EWGS's quantizers; None: their deltas stay what they are.
    """

    variant: Variant
    network: QuantizedNetwork
    image: np.ndarray
    recipe: optimizers.Recipe
    images: Callable[[], np.ndarray] | None
    smoothing: float
    accumulate: int
    dampening: Callable[[jax.Array], jax.Array]
    offset: int
    keep_variables: bool
    family_of_run: str
    curvature: Curvature | None = None

    @functools.cached_property
    def latent(self) -> tuple[str, ...]:
        """Names of the latent weights: kernels whose weights, not only inputs, are quantized."""
        layers = self.network.check(self.image)
        return tuple(name for name, layer in layers.items() if layer.bits.weight is not None)

    def fresh(self, key: jax.Array) -> Any:
        """A quantized network's variables before anything is trained or fitted."""
        return self.network.init(key, self.image)

    def quantized(self, variables: Mapping[str, Any], key: jax.Array) -> Any:
        """The quantized network's variables from a float (or quantized) network's, its scales fitted."""
        ready = merge(self.fresh(key), variables)
        return ready if self.images is None else self.network.calibrate(ready, self.images())

    def check(self, state: State) -> None:
        """Raises ConfigError where a quantizer can't start from what the first batch or the start's file gave it."""
        quantization.check_start(self.network, state.params)

    def begin(self, variables: Any, setting: Mapping[str, jax.Array], key: jax.Array) -> State:
        """See :class:`arms.Arm`."""
        transform = optimizers.build(self.variant, self.recipe, self.latent, setting["lr"])
        ready = self.quantized(variables, key)
        if self.curvature is None:
            return supervised.new_state(ready, transform, average=False)
        deltas = ewgs_delta.start(self.network, ready["params"], DELTA_START)
        state = supervised.new_state({**ready, DELTA: deltas}, transform, average=False)
        return state.replace(extra={**state.extra, DELTA: jax.tree.map(jnp.zeros_like, deltas)})

    def _with_deltas(self, state: State, batch: Batch, key: jax.Array) -> State:
        """The state with one more batch in the estimate of the deltas, where one is due."""
        chosen, count = self.curvature, state.step - self.offset
        position = count % chosen.every

        def estimate(state: State) -> State:
            found = ewgs_delta.measure(
                self.network,
                supervised.variables(state),
                lambda logits: loss_fn(self.smoothing)(logits, batch)[0],
                batch["image"],
                key,
                max_draws=chosen.draws,
            )
            add = lambda total, one: jnp.where(position == 0, 0, total) + one  # noqa: E731
            total = jax.tree.map(add, state.extra[DELTA], found)
            last = position == chosen.batches - 1
            renew = lambda old, total: jnp.where(last, jnp.maximum(total / chosen.batches, 0), old)  # noqa: E731
            deltas = jax.tree.map(renew, state.model_state[DELTA], total)
            return state.replace(
                model_state={**state.model_state, DELTA: deltas}, extra={**state.extra, DELTA: total}
            )  # fmt: skip

        # Of the run's step, which members share: it stays a branch when they are mapped over at once.
        due = (count >= chosen.every) & (position < chosen.batches)
        return jax.lax.cond(due, estimate, lambda state: state, state)

    def step(self, state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        """One step of supervised training, and what it did to the weights."""
        if self.curvature is not None:
            state = self._with_deltas(state, batch, jax.random.fold_in(key, 2))
        quantizers, before = self.network.quantizers, self.network.quantizers(state.params)
        weight = self.dampening(state.step - self.offset)
        train = supervised.train_step(
            self.network,
            optimizers.build(self.variant, self.recipe, self.latent, state.extra[arms.SETTING]["lr"]),
            loss_fn(self.smoothing),
            accumulate=self.accumulate,
            penalty=(lambda params, _: weight * diagnostics.dampening(params, quantizers(params)))
            if self.variant.remedy == "dampening"
            else None,
            extra_args=lambda *_: {"quantizers": before},
        )
        new, metrics = train(state, batch, key)
        after = quantizers(new.params)
        metrics |= diagnostics.transitions(state.params, before, new.params, after)
        metrics |= diagnostics.distance(new.params, after)
        if self.curvature is not None:
            metrics["weights/delta"] = Mean.of(jnp.stack(jax.tree.leaves(new.model_state[DELTA])))
        return new, metrics | diagnostics.controller(
            new.opt_state,
            scheduled=self.variant.scheduled,
            oscillation=self.recipe.measures_oscillation(self.variant),
        )

    def keep(self, state: State) -> dict[str, Any]:
        """Histograms of the latent weights, and the network where it is asked for."""
        left = {"histogram": diagnostics.histogram(state.params, self.network.quantizers(state.params))}
        kept = {name: tree for name, tree in supervised.variables(state).items() if name != DELTA}
        return {**left, "variables": kept} if self.keep_variables else left

    def arm(self, steps: int, rates: tuple[float, ...]) -> arms.Arm:
        """The arm of ``steps`` steps for each of ``rates``."""
        return arms.Arm(
            self.variant.name,
            self.begin,
            self.step,
            steps,
            evaluation(self.network),
            grid={"lr": rates},
            schedules={"target": self._target} if self.variant.scheduled else {},
            separate=diagnostics.METRICS,
            keep=self.keep,
            check=self.check,
        )

    def _target(self, count: int) -> jax.Array:
        return self.variant.target * self.recipe.shape(count)
