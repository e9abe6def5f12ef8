"""CRL: confidences ranked by how often the network was right about a sample so far.

The loss needs a state, :class:`CorrectnessHistory`, and the number of every row's sample in the training set. In
a training step:

    history = with_epoch(history, epochs_done)                  # a function of the step number
    loss = crl(logits, labels, history=history, sample_index=index)
    history = count_correct(history, logits, labels, sample_index=index)      # after the loss

Signature, masks and dtypes: see :mod:`jaxvision.losses.calibration`.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxvision.core import devices, struct
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.losses.calibration import (
    CalibrationLoss,
    Rows,
    at,
    check_number,
    confidence,
    masked_mean,
    mean_cross_entropy,
    rows,
    top,
)

Confidence = Literal["max", "entropy", "margin"]


@struct.dataclass
class CorrectnessHistory:
    """How often each training sample was predicted right.

    Attributes:
      correct_count: int32 [n], n the size of the training set.
      max_correct: int32 (), the largest count that is possible before this epoch, at least 1.
    """

    correct_count: jax.Array
    max_correct: jax.Array

    @classmethod
    def create(cls, train_size: int) -> "CorrectnessHistory":
        """Before the first epoch: all counts 0, ``max_correct`` 1."""
        if train_size < 1:
            raise ConfigError(f"train_size={train_size} must be at least 1")
        return cls(jnp.zeros(train_size, jnp.int32), jnp.ones((), jnp.int32))


def with_epoch(history: CorrectnessHistory, epochs_done: jax.Array | int) -> CorrectnessHistory:
    """``max_correct`` after ``epochs_done`` epochs: it starts at 1 and grows after every epoch from the second on."""
    return history.replace(max_correct=jnp.maximum(jnp.asarray(epochs_done, jnp.int32), 1))


def count_correct(
    history: CorrectnessHistory,
    logits: jax.Array,
    labels: jax.Array,
    *,
    sample_index: jax.Array,
    where: jax.Array | None = None,
) -> CorrectnessHistory:
    """``correct_count[index] += 1[argmax z = y]`` for the valid rows, over all devices.

    Args:
      history: before.
      logits, labels, where: of the step.
      sample_index: int32, the labels' shape.
    """
    given = rows(logits, labels, where)
    correct = jnp.argmax(given.logits, axis=-1) == given.labels
    if given.where is not None:
        correct &= given.where
    counted = jnp.zeros_like(history.correct_count)
    counted = counted.at[_flat_index(given, sample_index)].add(correct.astype(jnp.int32))
    return history.replace(correct_count=history.correct_count + devices.sum_over_devices(counted))


def pair_targets(
    history: CorrectnessHistory, sample_index: jax.Array, partner_index: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sign and size, float32 [N] each, of kappa(sample) - kappa(partner).

      kappa = (correct_count - min) / (max_correct - min), the minimum over the whole training set

    Zero where the denominator is. A sample number outside the training set gives NaN.
    """
    count = history.correct_count
    lowest = jnp.min(count)
    span = history.max_correct - lowest
    kappa = jnp.where(span == 0, 0.0, (count - lowest) / jnp.where(span == 0, 1, span))

    def look_up(index):
        return kappa.at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    difference = look_up(sample_index) - look_up(partner_index)
    return jnp.sign(difference), jnp.abs(difference)


def crl(
    logits: jax.Array,
    labels: jax.Array,
    *,
    history: CorrectnessHistory,
    sample_index: jax.Array,
    weight: float = 1.0,
    confidence: Confidence = "max",
    where: jax.Array | None = None,
) -> CalibrationLoss:
    """``CE + weight RL``, the ranking loss over neighbours in the batch, the last row beside the first.

      RL = mean_i [-s (r_i - r_{i+1} - d / s)]_+,  s and d from :func:`pair_targets`; 0 where s = 0

    The gradient flows through both confidences r, not through s and d. Masked rows are skipped, as if they had been
    taken out of the batch.

    Args:
      logits, labels, where: see :mod:`jaxvision.losses.calibration`.
      history: state before this step's predictions are counted.
      sample_index: int32, the labels' shape: the row's number in the training set.
      weight: at least 0.
      confidence: "max" softmax, "entropy" (negative, divided by log K) or "margin" (largest two probabilities).

    Raises:
      ConfigError: an unknown confidence, a negative weight, or indices of another shape; and the errors of
        :mod:`jaxvision.losses.calibration`.

    Source: Moon et al., ICML 2020; ``crl_utils`` of its official code.
    """
    check_number("weight", weight)
    given = rows(logits, labels, where)
    index = _flat_index(given, sample_index)
    partner = _next_row(given.where, len(index))
    r = _confidence(given, confidence)
    sign, size = (each.astype(r.dtype) for each in pair_targets(history, index, index[partner]))
    shift = size / jnp.where(sign == 0, 1.0, sign)
    hinge = jax.nn.relu(-sign * (r - (r[partner] + shift)))
    extra, ce = masked_mean(hinge, given.where), mean_cross_entropy(given)
    return given.loss(ce + weight * extra, ce, extra)


def _flat_index(given: Rows, sample_index: jax.Array) -> jax.Array:
    index = jnp.asarray(sample_index).reshape(-1)
    if len(index) != len(given.labels):
        raise ConfigError(f"sample_index has {len(index)} entries, but there are {len(given.labels)} labels")
    return index if given.where is None else jnp.where(given.where, index, 0)


def _next_row(where: jax.Array | None, count: int) -> jax.Array:
    """The number of the next valid row, cyclically, int32 [N]."""
    position = jnp.arange(count)
    if where is None:
        return (position + 1) % count
    order = jnp.argsort(~where, stable=True)  # the valid rows first
    following = order[(position + 1) % jnp.maximum(jnp.sum(where), 1)]
    return jnp.zeros_like(position).at[order].set(following)


def _confidence(given: Rows, kind: Confidence) -> jax.Array:
    if kind not in ("max", "entropy", "margin"):
        raise unknown("confidence", kind, ("max", "entropy", "margin"))
    if kind == "max":
        return confidence(given.logits)[0]
    log_p = jax.nn.log_softmax(given.logits, axis=-1)
    p = jnp.exp(log_p)
    if kind == "entropy":
        return jnp.sum(p * log_p, axis=-1) / jnp.log(jnp.asarray(given.num_classes, p.dtype))
    first, index = top(p)
    rest = jnp.where(jnp.arange(given.num_classes) == index[:, None], -1.0, p)
    return first - at(p, jnp.argmax(rest, axis=-1))
