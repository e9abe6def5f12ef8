"""How the members of an arm train and are measured: what ``engine/arms.py`` takes an arm for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxvision.core import trees
from jaxvision.engine import arms, quantization, supervised
from jaxvision.engine.task import Batch, Metrics, State
from jaxvision.losses.classification import softmax_cross_entropy
from jaxvision.methods.lbt import control as control_lib
from jaxvision.methods.lbt.control import Control
from jaxvision.metrics import Mean
from jaxvision.models.quantized import BITS, GRADIENT_STREAM, INTERVAL, QuantizedNetwork
from jaxvision.models.quantized_attention import parameter_names
from jaxvision.optim import optimizers
from jaxvision.quant import interval

MEMBER = "member"
"""In the variables that arms start from: the position of their seed, int32 ()."""
DISTANCE = "distance"
"""``State.extra``: DSGC's distance of each kernel at the last search."""


@dataclass(frozen=True)
class Optimizers:
    """The two optimizers.

    Attributes:
      weights: schedule -> update rule of everything but the intervals.
      scale_lr: rate of Adam for the intervals s and u.
      shape: the schedule of both, with peak 1.
      accumulate: micro-batches a step.
    """

    weights: Callable[[optax.Schedule], optax.GradientTransformation]
    scale_lr: float
    shape: optax.Schedule
    accumulate: int = 1

    def transform(self, rate: optax.Schedule, scales: frozenset[str]) -> optax.GradientTransformation:
        """Both, split by the last part of the parameter's name: ``scales`` are those of the intervals."""
        parts = {
            "weights": self.weights(rate),
            "scales": optimizers.adam(lambda count: self.scale_lr * self.shape(count)),
        }

        def labels(params: Any) -> Any:
            return trees.map_named(lambda name, _: "scales" if name.rsplit("/", 1)[-1] in scales else "weights", params)

        return optax.partition(parts, labels)


@dataclass(frozen=True, eq=False)
class Trainer:
    """The training of one arm's members.

    Attributes:
      network: the module itself (float) or its quantized form.
      image: [1, H, W, C], an example.
      first: the first batch of every seed, leaves [S, B, ...], on the host.
      optimizers: see there.
      control: how gamma is chosen; None: gradients stay in float.
      follows: the kernels whose gradients have the member's width; others keep that of their rule.
      large: the fraction of gradients that count as large in reported errors.
      offset: steps of the run before the arm's first.
    """

    network: Any
    image: np.ndarray
    first: Callable[[], Batch]
    optimizers: Optimizers
    control: Control | None
    follows: frozenset[str]
    large: float
    offset: int = 0

    def begin(self, variables: Any, setting: Mapping[str, jax.Array], key: jax.Array) -> State:
        """Intervals and gamma from the seed's first batch, without an optimizer step (:class:`arms.Arm`)."""
        batch = {name: jnp.asarray(leaf)[variables[MEMBER]] for name, leaf in self.first().items()}
        variables = {name: tree for name, tree in variables.items() if name != MEMBER}
        extra: dict[str, Any] = {arms.SETTING: dict(setting)}
        if isinstance(self.network, QuantizedNetwork):
            variables = self.network.calibrate(self._filled(variables, setting), batch["image"])
        if self.control is not None:
            gradients = self.gradients(variables, batch, key)
            values, distance = control_lib.choose(self.control, gradients, variables, setting)
            variables = {**variables, INTERVAL: values}
            extra |= {DISTANCE: distance}
        state = State(
            jnp.zeros((), jnp.int32),
            variables["params"],
            {name: tree for name, tree in variables.items() if name != "params"},
            extra=extra,
        )
        return state.replace(opt_state=self.transform(state).init(state.params))

    def check(self, state: State) -> None:
        """Raises ConfigError where a quantizer of a member can't start from what the first batch gave it."""
        if isinstance(self.network, QuantizedNetwork):
            quantization.check_start(self.network, state.params, "config.interval.start_images")

    def keep(self, state: State) -> dict[str, Any]:
        """The quantized network's variables without the state of its gradients' quantizers."""
        variables = supervised.variables(state)
        return {name: tree for name, tree in variables.items() if name not in (INTERVAL, BITS)}

    def _filled(self, variables: Any, setting: Mapping[str, jax.Array]) -> Any:
        """The quantized network's variables with the float one's values; gamma 1, widths of rules and setting."""
        shapes = jax.eval_shape(self.network.init, jax.eval_shape(lambda: jax.random.key(0)), self.image)
        known = trees.named_leaves(variables)
        full = trees.map_named(lambda name, s: known.get(name, jnp.ones(s.shape, s.dtype)), shapes)
        if INTERVAL not in full:
            return full
        full[INTERVAL] = control_lib.with_gammas(
            full[INTERVAL], dict.fromkeys(control_lib.gammas(full[INTERVAL]), jnp.ones(()))
        )
        names = self.network.layers(full["params"])
        full = self.network.with_bits(full, {name: self.network.find(name).bits for name in names})
        bits = setting["gradient_bits"].astype(jnp.int32)
        return {**full, BITS: control_lib.with_gradient_bits(full[BITS], bits, self.follows)}

    def gradients(self, variables: Any, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """G of each quantized layer in training mode on a batch; rows whose ``mask`` is 0 don't count."""

        def loss(logits: jax.Array) -> jax.Array:
            losses = softmax_cross_entropy(logits, batch["label"], reduction="none")
            weights = batch.get("mask", jnp.ones_like(losses))
            return jnp.sum(losses * weights) / jnp.sum(weights)

        rngs = {"dropout": key, GRADIENT_STREAM: jax.random.fold_in(key, 1)}
        return self.network.output_gradients(variables, loss, batch["image"], train=True, rngs=rngs)

    def transform(self, state: State) -> optax.GradientTransformation:
        """The optimizer with the member's learning rate, and DSGC's factor on it where its setting says so."""
        rate = arms.learning_rate(self.optimizers.shape)(state)
        transform = self.optimizers.transform(rate, self._scales())
        if self.control is None or "rate_factor" not in self.control.grid:
            return transform
        used, distances = state.extra[arms.SETTING]["rate_factor"], state.extra[DISTANCE]

        def scale(updates: Any, params: Any = None) -> Any:
            del params
            factors = {name: jnp.where(used > 0, interval.dsgc_rate_factor(d), 1.0) for name, d in distances.items()}
            return trees.map_named(lambda name, update: update * factors.get(name, 1.0), updates)

        return optax.chain(transform, optax.stateless(scale))

    def _scales(self) -> frozenset[str]:
        if not isinstance(self.network, QuantizedNetwork):
            return frozenset()
        layers = [rule.layer for rule in self.network.rules if rule.layer is not None]
        fields = {
            f"{role}_{field}"
            for layer in layers
            for role, recipe in (("kernel", layer.weight), ("input", layer.input))
            for field in (recipe.kind.LEARNED if recipe is not None else ())
        }
        fields |= parameter_names(rule.layer for rule in self.network.products)
        return frozenset(fields | {"output_scale" for layer in layers if layer.output_scale})

    def step(self, state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        """One training step of a member; a search, where one is due, comes first."""
        # Of the run's step, which members share: a search then stays a branch when they are mapped over at once.
        count, controllers = state.step - self.offset, {}
        if self.control is not None:
            state = self._search(state, batch, jax.random.fold_in(key, 2), count)
            setting = state.extra[arms.SETTING]
            controllers = {INTERVAL: control_lib.controller(self.control, state.model_state[BITS], setting, count)}
        step = supervised.train_step(
            self.network,
            self.transform,
            _loss,
            accumulate=self.optimizers.accumulate,
            controllers=controllers,
            watch=self._watch if self.control is not None and self.control.moves else None,
        )
        return step(state, batch, key)

    def _search(self, state: State, batch: Batch, key: jax.Array, count: jax.Array) -> State:
        if not self.control.every:
            return state

        def search(state: State) -> State:
            gradients = self.gradients(supervised.variables(state), batch, key)
            setting = state.extra[arms.SETTING]
            values, distance = control_lib.choose(self.control, gradients, state.model_state, setting)
            return state.replace(
                model_state={**state.model_state, INTERVAL: values}, extra={**state.extra, DISTANCE: distance}
            )

        # Step 0 has what begin chose.
        due = (count > 0) & (count % self.control.every == 0)
        return jax.lax.cond(due, search, lambda state: state, state)

    def _watch(self, state: State) -> Metrics:
        values = control_lib.gammas(state.model_state[INTERVAL])
        return {f"gamma/{layer_of(name)}": Mean.of(gamma) for name, gamma in values.items()}

    def evaluate(self, state: State, batch: Batch) -> Metrics:
        """Accuracy and NLL with quantized weights and inputs and the running statistics."""
        logits = supervised.predict(self.network, state, batch["image"])
        return supervised.classification_metrics(logits, batch, top5=False)

    def probe(self, state: State, batch: Batch) -> Metrics:
        """What the gradient quantizers do to the gradients of a batch, by layer.

        ``gamma``; ``ratio``: R = mean[|G| > gamma gmax]; ``error``: E(G) and ``large_error``: E(G_L), nearest rounding.
        """
        found: Metrics = {}
        gradients = self.gradients(supervised.variables(state), batch, jax.random.key(0))
        widths = control_lib.gradient_widths(state.model_state[BITS])
        for name, gamma in control_lib.gammas(state.model_state[INTERVAL]).items():
            options = {"kind": self.control.kind, "exponent": self.network.find(name).exponent}
            errors = interval.gradient_errors(gradients[name], gamma, widths[name], self.large, **options)
            values = {"gamma": gamma, "ratio": errors.clip_ratio, "error": errors.all_mean}
            for key, value in {**values, "large_error": errors.large_mean}.items():
                found[f"{key}/{layer_of(name)}"] = Mean.of(value)
        return found


def layer_of(kernel: str) -> str:
    """``layer1_0/conv1`` for ``layer1_0/conv1/kernel``."""
    return kernel.removesuffix("/kernel")


def _loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
    losses = softmax_cross_entropy(logits, batch["label"], reduction="none")
    return jnp.mean(losses), {"loss": Mean.of(losses)}
