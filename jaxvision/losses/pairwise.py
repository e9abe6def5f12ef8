"""Losses over pairs: of rows (MMCE), and of classes within a row (CPC).

Signature, masks and dtypes: see :mod:`jaxvision.losses.calibration`. ``extra`` is the penalty before its weight.
"""

import jax
import jax.numpy as jnp

from jaxvision.core.errors import ConfigError
from jaxvision.losses.calibration import (
    CalibrationLoss,
    Rows,
    at,
    check_number,
    confidence,
    masked_mean,
    mean_cross_entropy,
    rows,
)

_MAX_ROWS = 1 << 15
"""Rows of which all pairs are compared at most: 4 GiB a matrix of pairs."""

_CHUNK_PAIRS = 1 << 22
"""Numbers that CPC holds at once."""


def _kernel(given: Rows, width: float) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Confidence r [N], correctness c [N], validity v [N] and exp(-|r_i - r_j| / width) [N, N]."""
    count = len(given.logits)
    if count > _MAX_ROWS:
        raise ConfigError(
            f"MMCE compares all pairs of {count} rows, more than the {_MAX_ROWS} that fit; "
            "draw a subset of the pixels, or use mdca or dca"
        )
    if not width > 0:
        raise ConfigError(f"width={width} must be above 0")
    r, predicted = confidence(given.logits)
    correct = (predicted == given.labels).astype(r.dtype)
    valid = jnp.ones_like(r) if given.where is None else given.where.astype(r.dtype)
    return r, correct, valid, jnp.exp(-jnp.abs(r[:, None] - r[None, :]) / width)


def mmce(
    logits: jax.Array,
    labels: jax.Array,
    *,
    weight: float = 1.0,
    width: float = 0.4,
    where: jax.Array | None = None,
) -> CalibrationLoss:
    """``CE + weight / N^2 sum_ij (c_i - r_i)(c_j - r_j) exp(-|r_i - r_j| / width)``, without a square root.

    c (is the prediction right?) is constant; the gradient flows through r (confidence) in factors and kernel.

    Args:
      logits, labels, where: see :mod:`jaxvision.losses.calibration`. Memory is that of N x N numbers.
      weight: at least 0.
      width: of the kernel, above 0.

    Raises:
      ConfigError: more than 32768 rows, a negative ``weight``, a ``width`` of 0 or less; and the errors of
        :mod:`jaxvision.losses.calibration`.

    Source: Kumar et al. 2018; ``losses/mmce`` of the official code of RankMixup.
    """
    check_number("weight", weight)
    given = rows(logits, labels, where)
    r, correct, valid, kernel = _kernel(given, width)
    gap = valid * (correct - r)
    extra = gap @ kernel @ gap / jnp.maximum(jnp.sum(valid), 1.0) ** 2
    ce = mean_cross_entropy(given)
    return given.loss(ce + weight * extra, ce, extra)


def mmce_weighted(
    logits: jax.Array,
    labels: jax.Array,
    *,
    weight: float = 2.0,
    width: float = 0.4,
    where: jax.Array | None = None,
) -> CalibrationLoss:
    """``CE + weight sqrt(E + 1e-10)`` if there are right and wrong rows, else ``CE``.

      E = S_CC / (m^2 + 1e-5) + S_WW / (n^2 + 1e-5) - 2 S_CW / (m n + 1e-5)

    with the m right rows C, the n wrong ones W, and means S over pairs of the kernel of :func:`mmce` times
    (1 - r_i)(1 - r_j), r_i r_j and (1 - r_i) r_j. The division comes on top of the mean, as in the official code.
    Where rounding makes the root's argument negative, the penalty and its gradient are 0 (NaN officially).

    Args:
      logits, labels, where, width: as for :func:`mmce`, and its errors.
      weight: at least 0.

    Source: Kumar et al. 2018; ``losses/mmce`` of the official code of RankMixup, weight of the scripts of FLSD.
    """
    check_number("weight", weight)
    given = rows(logits, labels, where)
    r, correct, valid, kernel = _kernel(given, width)
    right, wrong = valid * correct, valid * (1.0 - correct)
    m, n = jnp.sum(right), jnp.sum(wrong)
    under, over = right * (1.0 - r), wrong * r

    def term(left, right_, size):
        return left @ kernel @ right_ / jnp.maximum(size, 1.0) / (size + 1e-5)

    squared = term(under, under, m * m) + term(over, over, n * n) - 2.0 * term(under, over, m * n) + 1e-10
    positive = (m > 0) & (n > 0) & (squared > 0)
    # Twice: the root of a number that isn't used would still put NaN into the gradient.
    extra = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)
    ce = mean_cross_entropy(given)
    return given.loss(ce + weight * extra, ce, extra)


def cpc(
    logits: jax.Array,
    labels: jax.Array,
    *,
    lambda_bdc: float = 0.1,
    lambda_bec: float = 1.0,
    where: jax.Array | None = None,
) -> CalibrationLoss:
    """``CE + lambda_bdc BDC + lambda_bec BEC``, pairwise constraints; ``extra`` is their weighted sum.

    BDC: :func:`binary_discrimination`; BEC: :func:`binary_exclusion`.

    Args:
      logits, labels, where: see :mod:`jaxvision.losses.calibration`.
      lambda_bdc, lambda_bec: at least 0.

    Raises:
      ConfigError: two classes, for which BEC isn't defined, unless ``lambda_bec`` is 0; a negative weight; and the
        errors of :mod:`jaxvision.losses.calibration`.

    Source: Cheng and Vasconcelos, CVPR 2022, as in ``cpc_loss`` of the official code of CALS.
    """
    check_number("lambda_bdc", lambda_bdc)
    check_number("lambda_bec", lambda_bec)
    given = rows(logits, labels, where)
    extra = lambda_bdc * _discrimination(given)
    if isinstance(lambda_bec, jax.core.Tracer) or lambda_bec != 0:
        extra = extra + lambda_bec * _exclusion(given)
    ce = mean_cross_entropy(given)
    return given.loss(ce + extra, ce, extra)


def binary_discrimination(logits: jax.Array, labels: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """BDC = ``-1 / (N (K-1)) sum_i sum_{k != y} log sigmoid(z_iy - z_ik)``, float32 ()."""
    return _discrimination(rows(logits, labels, where))


def binary_exclusion(logits: jax.Array, labels: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """BEC = ``-1 / (2 N (K-1)(K-2)) sum_i sum_{j,k != y} log sigmoid(z_ij - z_ik + 1e-10)``, float32 ().

    Ordered pairs including j = k, which add a constant. Rows are worked through in chunks, so that memory stays
    at some 2^22 numbers in forward and backward pass instead of N K^2. Raises :class:`ConfigError` for K < 3.
    """
    return _exclusion(rows(logits, labels, where))


def _discrimination(given: Rows) -> jax.Array:
    z, y = given.logits, given.labels
    pairs = jax.nn.log_sigmoid(at(z, y)[:, None] - z)
    others = jnp.where(_others(given), pairs, 0.0)
    return masked_mean(-jnp.sum(others, axis=-1) / (given.num_classes - 1), given.where)


def _exclusion(given: Rows) -> jax.Array:
    num_classes = given.num_classes
    if num_classes < 3:
        raise ConfigError(
            f"CPC's exclusion term needs at least 3 classes, but logits have {num_classes}; set lambda_bec to 0"
        )

    def row(inputs):
        z, others = inputs
        pairs = jax.nn.log_sigmoid(z[:, None] - z[None, :] + 1e-10)
        return jnp.sum(jnp.where(others[:, None] & others[None, :], pairs, 0.0))

    chunk = max(1, _CHUNK_PAIRS // num_classes**2)
    inputs = (given.logits, _others(given))
    if len(given.logits) <= chunk:
        sums = jax.vmap(row)(inputs)
    else:  # the backward pass computes the pairs again
        sums = jax.lax.map(jax.checkpoint(row), inputs, batch_size=chunk)
    return masked_mean(-sums / (2 * (num_classes - 1) * (num_classes - 2)), given.where)


def _others(given: Rows) -> jax.Array:
    """``k != y`` as bool [N, K]."""
    return jnp.arange(given.num_classes) != given.labels[:, None]
