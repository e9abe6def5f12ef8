"""One supervised training step and one evaluation, with the loss and the preparation of the batch as arguments.

The method-specific part of many methods is only a loss; the rest (gradient accumulation, batch statistics, the
optimizer, the moving average) is here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from jaxvision.core import devices
from jaxvision.core.errors import ConfigError
from jaxvision.engine.task import Batch, Metrics, State
from jaxvision.metrics import classification
from jaxvision.metrics.mean import Mean
from jaxvision.optim import ema

LossFn = Callable[[jax.Array, Batch], tuple[jax.Array, Metrics]]
"""``(outputs, batch) -> (loss, metrics)``: float32 (), the mean over the batch; and sums over its rows."""

Prepare = Callable[[Batch, jax.Array], Batch]
"""``(batch, key) -> batch`` on the device before the forward pass, such as mixup."""

Penalty = Callable[[Any, Any], jax.Array]
"""``(params, model_state) -> float32 ()``, added to the loss."""

Controller = Callable[[Any, Any], Any]
"""``(values, cotangent) -> values``: the new values of a collection whose cotangent carries statistics."""

EMA = "ema"
"""The key in ``State.extra`` under which the averages of params and model_state lie."""


def new_state(variables: Any, transform: optax.GradientTransformation, *, average: bool) -> State:
    """The state at step 0 with these variables and a fresh optimizer; with ``average`` also ``extra["ema"]``.

    Args:
      variables: ``{"params": ..., other collections}``, as ``module.init`` gives them.
      transform: the optimizer.
      average: keep a moving average of parameters and other collections.
    """
    params = variables["params"]
    model_state = {name: tree for name, tree in variables.items() if name != "params"}
    extra = {EMA: ema.init({"params": params, "model_state": model_state})} if average else {}
    return State(jnp.zeros((), jnp.int32), params, model_state, transform.init(params), extra)


def train_step(
    module: Any,
    transform: optax.GradientTransformation | Callable[[State], optax.GradientTransformation],
    loss: LossFn,
    *,
    prepare: Prepare | None = None,
    accumulate: int = 1,
    average_decay: optax.Schedule | None = None,
    penalty: Penalty | None = None,
    extra_args: Callable[[Any, Any], dict[str, Any]] | None = None,
    controllers: Mapping[str, Controller] | None = None,
    watch: Callable[[State], Metrics] | None = None,
) -> Callable[[State, Batch, jax.Array], tuple[State, Metrics]]:
    """The step ``(state, batch, key) -> (state, metrics)`` of plain supervised training.

    prepare -> forward (train mode) -> loss -> gradients, mean over micro-batches and devices -> optimizer -> average.

    Args:
      module: network, ``apply(variables, image, train=True, rngs=..., mutable=...)``; the rngs are ``dropout`` and
        ``gradient`` (stochastic rounding).
      transform: the optimizer, clipping included; or what makes it from the state, such as a learning rate in
        ``extra``.
      loss: the loss of the outputs.
      prepare: applied once to the whole batch.
      accumulate: micro-batches a step; see :func:`value_and_grad`.
      average_decay: decay of the moving average as a function of ``state.step``; None if there is none.
      penalty: of the parameters, added to the loss and logged as ``penalty``.
      extra_args: ``(params, model_state) -> `` the optimizer's extra arguments.
      controllers: by collection. Such a collection is not updated by the forward pass: the loss is differentiated
        with respect to it, and what arrives (statistics of the backward pass, mean over micro-batches and devices)
        decides its new values.
      watch: metrics of the new state.

    Returns:
      The step. Its metrics are the loss's own and ``grad_norm``, the norm before clipping.
    """
    controllers = controllers or {}

    def forward(trained, model_state, batch, key):
        outputs, updated = module.apply(
            {**trained, **model_state},
            batch["image"],
            train=True,
            rngs={"dropout": key, "gradient": jax.random.fold_in(key, 1)},
            mutable=list(model_state),
        )
        value, metrics = loss(outputs, batch)
        if penalty is not None:
            extra = penalty(trained["params"], model_state)
            value, metrics = value + extra, {**metrics, "penalty": Mean.of(extra)}
        return value, ({**model_state, **updated}, metrics)

    def step(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        key_prepare, key_forward = jax.random.split(key)
        if prepare is not None:
            batch = prepare(batch, key_prepare)
        trained = {"params": state.params, **{name: state.model_state[name] for name in controllers}}
        moving = {name: tree for name, tree in state.model_state.items() if name not in controllers}
        gradients, model_state, metrics = value_and_grad(forward, trained, moving, batch, key_forward, accumulate)
        optimizer = transform if isinstance(transform, optax.GradientTransformation) else transform(state)
        extra_arguments = {} if extra_args is None else extra_args(state.params, state.model_state)
        updates, opt_state = optimizer.update(gradients["params"], state.opt_state, state.params, **extra_arguments)
        params = optax.apply_updates(state.params, updates)
        for name, control in controllers.items():
            model_state = {**model_state, name: control(state.model_state[name], gradients[name])}
        extra = dict(state.extra)
        if average_decay is not None:
            new = {"params": params, "model_state": model_state}
            extra[EMA] = ema.update(extra[EMA], new, average_decay(state.step))
        metrics = {**metrics, "grad_norm": Mean.of(optax.tree.norm(gradients["params"]))}
        state = state.replace(params=params, model_state=model_state, opt_state=opt_state, extra=extra)
        return state, metrics if watch is None else {**metrics, **watch(state)}

    return step


def value_and_grad(
    forward: Callable[..., Any], params: Any, model_state: Any, batch: Batch, key: jax.Array, accumulate: int = 1
) -> tuple[Any, Any, Metrics]:
    """The gradient of a mean loss over the global batch, in ``accumulate`` passes of equal size.

    Micro-batch j holds the rows j, j + accumulate, ...: every device keeps its share of each, and the same rows
    belong together on any number of devices. Batch normalisation sees one micro-batch at a time, its running
    statistics move once a pass. The mean of the passes' gradients is the gradient of the whole batch for
    losses that are means over rows.

    Args:
      forward: ``(params, model_state, batch, key) -> (loss, (model_state, metrics))``.
      params, model_state: trees.
      batch: leaves [B, ...].
      key: folded with j for pass j.
      accumulate: the number of passes.

    Returns:
      (gradients, model_state after the last pass, metrics merged over the passes).

    Raises:
      ConfigError: ``accumulate`` doesn't divide the rows on a device.
    """
    differentiate = jax.value_and_grad(forward, has_aux=True)
    if accumulate == 1:
        (_, (model_state, metrics)), gradients = differentiate(params, model_state, batch, key)
        return devices.mean_over_devices(gradients), model_state, metrics
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % accumulate:
        raise ConfigError(f"accumulate={accumulate} doesn't divide the {rows} rows of a batch on a device")
    cut = jax.tree.map(lambda leaf: leaf.reshape(rows // accumulate, accumulate, *leaf.shape[1:]).swapaxes(0, 1), batch)

    def add(carry, inputs):
        model_state, total, sums = carry
        index, part = inputs
        (_, (model_state, metrics)), gradients = differentiate(
            params, model_state, part, jax.random.fold_in(key, index)
        )
        return (model_state, jax.tree.map(jnp.add, total, gradients), jax.tree.map(jnp.add, sums, metrics)), None

    part = jax.tree.map(lambda leaf: leaf[0], cut)
    (_, (_, metrics)), gradients = jax.eval_shape(differentiate, params, model_state, part, key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (gradients, metrics))
    (model_state, total, metrics), _ = jax.lax.scan(add, (model_state, *zeros), (jnp.arange(accumulate), cut))
    gradients = jax.tree.map(lambda leaf: leaf / accumulate, total)
    return devices.mean_over_devices(gradients), model_state, metrics


def variables(state: State, *, average: bool = False) -> Any:
    """The network's variables: the trained ones, or (``average``) their moving average."""
    params, model_state = state.params, state.model_state
    if average:
        params, model_state = state.extra[EMA]["params"], state.extra[EMA]["model_state"]
    return {"params": params, **model_state}


def predict(module: nn.Module, state: State, images: jax.Array, *, average: bool = False) -> jax.Array:
    """The network's outputs in evaluation mode, of :func:`variables`."""
    return module.apply(variables(state, average=average), images)


def classification_metrics(logits: jax.Array, batch: Batch, *, top5: bool) -> Metrics:
    """``accuracy`` and ``nll`` (and ``top5``) of logits float [B, K] over the rows of ``batch`` with mask 1."""
    label, mask = batch["label"], batch["mask"]
    metrics = {
        "accuracy": classification.accuracy(logits, label, mask),
        "nll": classification.cross_entropy(logits, label, mask),
    }
    return {**metrics, "top5": classification.accuracy(logits, label, mask, k=5)} if top5 else metrics
