"""What the calibration losses share, and those of them that only compare probabilities with a target.

Every loss of the family has the signature

    loss(logits float[..., K], labels int32[...], *, where=None, **hyper) -> CalibrationLoss(total, ce, extra)

Rows are images or pixels: dense logits [B, H, W, K] are flattened. ``where`` bool[...] is False for rows that are
padding or carry an ignored label; they leave every sum and every denominator, may hold anything, and get gradient 0;
without any valid row all values are 0. The arithmetic is float32 whatever the logits' dtype, float64 for float64.
A maximum is taken at its first index and hinges have slope 0 at their kink, as in PyTorch.

All raise ``ConfigError`` for shapes that don't fit, labels that aren't integers and fewer than two classes, and
``DataError`` for a label out of range (under ``jit`` the loss is NaN instead): see :func:`rows`. What else one raises
stands with it.

Under ``pmap`` means over rows have the global number of valid rows in their denominator, so that the mean over
devices of the gradients is the gradient of the whole batch. Losses that aren't means over rows (MMCE, MDCA, DCA, CRL)
look at one device's rows there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import devices
from jaxvision.core.errors import ConfigError, DataError


class CalibrationLoss(NamedTuple):
    """A loss and its parts, each float32 ().

    Attributes:
      total: what is minimised.
      ce: mean cross-entropy with the labels (with the mixed labels for mixup), also where the loss doesn't contain it.
      extra: the penalty before its weight; for losses that replace cross-entropy the loss itself.
    """

    total: jax.Array
    ce: jax.Array
    extra: jax.Array


class Rows(NamedTuple):
    """Logits as a list of rows.

    Attributes:
      logits: float32 [N, K]; 0 in rows that don't count.
      labels: int32 [N]; 0 in rows that don't count.
      where: bool [N], or None if all rows count.
      wrong: bool (), is a label of a valid row out of range?
    """

    logits: jax.Array
    labels: jax.Array
    where: jax.Array | None
    wrong: jax.Array

    @property
    def num_classes(self) -> int:
        """K."""
        return self.logits.shape[-1]

    def loss(self, total: jax.Array, ce: jax.Array, extra: jax.Array) -> CalibrationLoss:
        """These three, NaN if a label is out of range or ``ce`` is NaN."""
        # XLA's max and exp on CPU don't pass every NaN on (jaxlib 0.10.2): some losses of NaN logits would be finite.
        wrong = self.wrong | jnp.isnan(ce)
        return CalibrationLoss(*(jnp.where(wrong, jnp.nan, part) for part in (total, ce, extra)))


def rows(logits: jax.Array, labels: jax.Array, where: jax.Array | None = None, *, min_classes: int = 2) -> Rows:
    """The arguments of a loss, checked and flattened.

    A label outside 0..K-1 in a valid row is an error where labels have values, and makes the loss NaN under ``jit``.

    Raises:
      ConfigError: shapes that don't fit, labels that aren't integers, or fewer than ``min_classes`` classes.
      DataError: a label out of range.
    """
    logits, labels = jnp.asarray(logits), labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if logits.ndim < 1 or labels.shape != logits.shape[:-1]:
        raise ConfigError(f"labels have shape {labels.shape}, but logits of shape {logits.shape} need all axes but one")
    if where is not None and jnp.shape(where) != labels.shape:
        raise ConfigError(f"where has shape {jnp.shape(where)}, but must have the labels' shape {labels.shape}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ConfigError(f"labels are {labels.dtype}, but must be integers 0..K-1; these losses take no soft targets")
    num_classes = logits.shape[-1]
    if num_classes < min_classes:
        raise ConfigError(f"logits have {num_classes} classes (their last axis), but this loss needs {min_classes}")
    _check_range(labels, where, num_classes)
    logits, labels = to_float32(logits).reshape(-1, num_classes), jnp.asarray(labels).reshape(-1).astype(jnp.int32)
    where = None if where is None else jnp.asarray(where).reshape(-1).astype(bool)
    wrong = (labels < 0) | (labels >= num_classes)
    if where is not None:
        # Select before the arithmetic: 0 times the NaN of an ignored row would be NaN, in the gradient as well.
        logits = jnp.where(where[:, None], logits, 0.0)
        labels, wrong = jnp.where(where, labels, 0), wrong & where
    return Rows(logits, jnp.where(wrong, 0, labels), where, jnp.any(wrong))


def to_float32(x: jax.Array) -> jax.Array:
    """float32, or float64 if it was."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _check_range(labels: jax.Array | np.ndarray, where: jax.Array | None, num_classes: int) -> None:
    if isinstance(labels, jax.core.Tracer) or isinstance(where, jax.core.Tracer):
        return
    counted = np.asarray(labels) if where is None else np.asarray(labels)[np.asarray(where).astype(bool)]
    wrong = counted[(counted < 0) | (counted >= num_classes)]
    if wrong.size:
        raise DataError(
            f"label {wrong[0]} is outside 0..{num_classes - 1} ({wrong.size} of {counted.size} labels are); "
            "give the logits as many columns as there are classes, and take ignored labels out with where"
        )


def check_number(name: str, value: Any, low: float = 0.0, high: float = np.inf) -> None:
    """Raises :class:`ConfigError` for a hyper-parameter outside [low, high]; traced ones pass."""
    if isinstance(value, jax.core.Tracer):
        return
    if not low <= value <= high:
        bounds = f"at least {low:g}" if high == np.inf else f"between {low:g} and {high:g}"
        raise ConfigError(f"{name}={value} must be {bounds}")


def masked_mean(values: jax.Array, where: jax.Array | None) -> jax.Array:
    """The mean of [N] over the valid rows (of all devices, see the module's text); 0 if there is none."""
    if where is None:
        return jnp.mean(values)
    count = devices.mean_over_devices(jnp.sum(where, dtype=jnp.int32).astype(values.dtype))
    return jnp.sum(jnp.where(where, values, 0.0)) / jnp.where(count > 0, count, 1.0)


def top(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maximum [N] and its first index int32 [N] of [N, K].

    The whole gradient goes to that index; ``jnp.max`` would split it among ties.
    """
    # jnp.argmax takes 600 us for 256 x 1000 on a CPU (jaxlib 0.10.2), more than all the rest of a loss; this takes 130.
    fixed, last = jax.lax.stop_gradient(x), x.shape[-1] - 1
    places = jnp.arange(last + 1, dtype=jnp.float32)
    index = jnp.min(jnp.where(fixed == jnp.max(fixed, axis=-1, keepdims=True), places, last), axis=-1).astype(jnp.int32)
    return at(x, index), index


def at(x: jax.Array, index: jax.Array) -> jax.Array:
    """``x[i, index[i]]``: [N, K] and int32 [N] -> [N]."""
    return jnp.take_along_axis(x, index[:, None], axis=-1)[:, 0]


def confidence(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``max_k softmax(z)_k`` [N] of [N, K], and its class, int32 [N]; gradient r (1[k = class] - p_k).

    From the logits, so that softmax isn't written out: 1 / sum_k exp(z_k - max z).
    """
    highest, index = top(logits)
    shift = jax.lax.stop_gradient(highest)
    return jnp.exp(highest - shift) / jnp.sum(jnp.exp(logits - shift[:, None]), axis=-1), index


def row_cross_entropy(given: Rows) -> jax.Array:
    """``-log softmax(z)_y`` [N], as log sum_k exp(z_k - max z) + max z - z_y."""
    shift = jax.lax.stop_gradient(jnp.max(given.logits, axis=-1))
    return jnp.log(jnp.sum(jnp.exp(given.logits - shift[:, None]), axis=-1)) + (shift - at(given.logits, given.labels))


def mean_cross_entropy(given: Rows) -> jax.Array:
    """The mean of :func:`row_cross_entropy` over the valid rows, float32 ()."""
    return masked_mean(row_cross_entropy(given), given.where)


def one_hot(given: Rows) -> jax.Array:
    """``1[k = y]`` as float [N, K]."""
    return jax.nn.one_hot(given.labels, given.num_classes, dtype=given.logits.dtype)


def cross_entropy(logits: jax.Array, labels: jax.Array, *, where: jax.Array | None = None) -> CalibrationLoss:
    """``-mean log p_y``. Arguments and errors as described at the top of this module; extra is 0.

    Gradient with respect to a row's logits: (p - e_y) / N.
    """
    given = rows(logits, labels, where)
    ce = mean_cross_entropy(given)
    return given.loss(ce, ce, jnp.zeros_like(ce))


def label_smoothing(
    logits: jax.Array, labels: jax.Array, *, epsilon: float = 0.05, where: jax.Array | None = None
) -> CalibrationLoss:
    """``(1 - e) CE + e mean_i mean_k(-log p_ik)``: the target (1 - e) e_y + e / K, on all classes.

    Args:
      logits, labels, where: see the module's text.
      epsilon: e in [0, 1]; 0.05 in MbLS, ACLS and CALS.

    Returns:
      ``extra`` is the uniform term.

    Raises:
      ConfigError: ``epsilon`` outside [0, 1]; and the errors of the module's text.

    Source: Szegedy et al. 2016; ``losses/label_smoothing`` of the official codes of ACLS and RankMixup.
    """
    check_number("epsilon", epsilon, 0, 1)
    given = rows(logits, labels, where)
    log_p = jax.nn.log_softmax(given.logits, axis=-1)
    ce = masked_mean(-at(log_p, given.labels), given.where)
    uniform = masked_mean(-jnp.mean(log_p, axis=-1), given.where)
    return given.loss((1.0 - epsilon) * ce + epsilon * uniform, ce, uniform)


def brier(logits: jax.Array, labels: jax.Array, *, where: jax.Array | None = None) -> CalibrationLoss:
    """``mean_i sum_k (p_ik - 1[k = y_i])^2``, between 0 and 2; in the place of cross-entropy.

    Arguments and errors: see the module's text. Source: ``losses/brier_score`` of the official code of RankMixup.
    """
    given = rows(logits, labels, where)
    p = jax.nn.softmax(given.logits, axis=-1)
    total = masked_mean(jnp.sum(jnp.square(p - one_hot(given)), axis=-1), given.where)
    return given.loss(total, mean_cross_entropy(given), total)


def implied_smoothing(
    loss: Callable[..., CalibrationLoss], logits: jax.Array, labels: jax.Array, **hyper: Any
) -> jax.Array:
    """The f for which ``loss`` has cross-entropy's gradient with the target e_y - f: what the loss smooths.

    ``f = N dL/dz - (p - e_y)``, as the papers plot it against the logit, for any loss of this family.

    Args:
      loss: such as :func:`label_smoothing`.
      logits: float [N, K]. All rows count.
      labels: int32 [N].

    Returns:
      float32 [N, K].
    """
    given = rows(logits, labels)
    gradient = jax.grad(lambda z: loss(z, given.labels, **hyper).total)(given.logits)
    return len(given.logits) * gradient - (jax.nn.softmax(given.logits, axis=-1) - one_hot(given))
