"""Cross-entropy plus a penalty on probabilities or logits: entropy, L1, MbLS, MDCA and DCA.

Signature, masks and dtypes: see :mod:`jaxvision.losses.calibration`. ``extra`` is the penalty before its weight.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxvision.core.errors import unknown
from jaxvision.losses.calibration import (
    CalibrationLoss,
    Rows,
    check_number,
    confidence,
    masked_mean,
    mean_cross_entropy,
    one_hot,
    row_cross_entropy,
    rows,
    top,
)
from jaxvision.losses.focal import focal_rows


def entropy_penalty(
    logits: jax.Array, labels: jax.Array, *, alpha: float = 0.1, where: jax.Array | None = None
) -> CalibrationLoss:
    """``CE - alpha mean_ik(-q log q)``, q = clip(p, 1e-10, 1 - 1e-10): rewards entropy (ECP).

    The mean is over classes too, so it is the entropy divided by K. The bounds let the gradient through, as
    ``torch.clamp`` does (in float32 the upper one is 1).

    Args:
      logits, labels, where: see :mod:`jaxvision.losses.calibration`.
      alpha: weight, at least 0.

    Raises:
      ConfigError: a negative ``alpha``; and the errors of :mod:`jaxvision.losses.calibration`.

    Source: Pereyra et al. 2017; ``losses/penalty_entropy`` of the official code of RankMixup.
    """
    check_number("alpha", alpha)
    given = rows(logits, labels, where)
    p = jax.nn.softmax(given.logits, axis=-1)
    low, high = (jnp.asarray(bound, p.dtype) for bound in (1e-10, 1 - 1e-10))
    q = jnp.where(p < low, low, jnp.where(p > high, high, p))
    entropy = masked_mean(-jnp.mean(q * jnp.log(q), axis=-1), given.where)
    ce = mean_cross_entropy(given)
    return given.loss(ce - alpha * entropy, ce, entropy)


def l1_penalty(
    logits: jax.Array, labels: jax.Array, *, alpha: float = 0.1, where: jax.Array | None = None
) -> CalibrationLoss:
    """``CE + alpha mean_i sum_k |p_ik - 1/K|``.

    Args:
      logits, labels, where: see :mod:`jaxvision.losses.calibration`.
      alpha: weight, at least 0.

    Raises:
      ConfigError: a negative ``alpha``; and the errors of :mod:`jaxvision.losses.calibration`.

    Source: ``losses/penalty_l1`` of the official code of RankMixup.
    """
    check_number("alpha", alpha)
    given = rows(logits, labels, where)
    distance = jnp.abs(jax.nn.softmax(given.logits, axis=-1) - 1.0 / given.num_classes)
    extra, ce = masked_mean(jnp.sum(distance, axis=-1), given.where), mean_cross_entropy(given)
    return given.loss(ce + alpha * extra, ce, extra)


def mbls(
    logits: jax.Array,
    labels: jax.Array,
    *,
    margin: float = 10.0,
    alpha: float = 0.1,
    where: jax.Array | None = None,
) -> CalibrationLoss:
    """``CE + alpha / (N K) sum_ik [max_j z_ij - z_ik - margin]_+``; the gradient flows through the maximum.

    Args:
      logits, labels, where: see :mod:`jaxvision.losses.calibration`.
      margin: at least 0; 6 on CIFAR, 10 on Tiny-ImageNet, ImageNet, VOC and CUB.
      alpha: weight, at least 0.

    Raises:
      ConfigError: a negative ``margin`` or ``alpha``; and the errors of :mod:`jaxvision.losses.calibration`.

    Source: Liu et al., CVPR 2022; ``losses/logit_margin_l1`` of its official code.
    """
    check_number("margin", margin)
    check_number("alpha", alpha)
    given = rows(logits, labels, where)
    highest, _ = top(given.logits)
    excess = jax.nn.relu(highest[:, None] - given.logits - margin)
    extra, ce = masked_mean(jnp.mean(excess, axis=-1), given.where), mean_cross_entropy(given)
    return given.loss(ce + alpha * extra, ce, extra)


Base = Literal["ce", "focal"]


def _base(given: Rows, base: Base, gamma: float) -> tuple[jax.Array, jax.Array]:
    """(the loss that the penalty is added to, the cross-entropy)."""
    if base not in ("ce", "focal"):
        raise unknown("base", base, ("ce", "focal"))
    check_number("gamma", gamma)
    ce = row_cross_entropy(given)
    mean = masked_mean(ce, given.where)
    return (mean if base == "ce" else masked_mean(focal_rows(ce, gamma), given.where)), mean


def mdca(
    logits: jax.Array,
    labels: jax.Array,
    *,
    beta: float = 1.0,
    base: Base = "ce",
    gamma: float = 3.0,
    where: jax.Array | None = None,
) -> CalibrationLoss:
    """``base + beta / K sum_k |mean_i p_ik - mean_i 1[y_i = k]|``.

    Args:
      logits, labels, where: see :mod:`jaxvision.losses.calibration`.
      beta: weight, at least 0.
      base: cross-entropy, or focal loss with ``gamma``.

    Raises:
      ConfigError: a negative ``beta`` or ``gamma``, an unknown ``base``; and the errors of
        :mod:`jaxvision.losses.calibration`.

    Source: Hebbalaguppe et al., CVPR 2022; ``solvers/loss`` of its official code. (The official code of RankMixup
    applies the softmax twice here, which isn't followed.)
    """
    check_number("beta", beta)
    given = rows(logits, labels, where)
    difference = jax.nn.softmax(given.logits, axis=-1) - one_hot(given)
    by_class = jax.vmap(masked_mean, (1, None))(difference, given.where)
    loss, ce = _base(given, base, gamma)
    extra = jnp.mean(jnp.abs(by_class))
    return given.loss(loss + beta * extra, ce, extra)


def dca(
    logits: jax.Array,
    labels: jax.Array,
    *,
    beta: float = 1.0,
    base: Base = "ce",
    gamma: float = 3.0,
    where: jax.Array | None = None,
) -> CalibrationLoss:
    """``base + beta |mean r - mean c|``: mean confidence against accuracy, which is constant.

    Args:
      logits, labels, where: see :mod:`jaxvision.losses.calibration`.
      beta: weight, at least 0.
      base: cross-entropy, or focal loss with ``gamma``.

    Raises:
      ConfigError: a negative ``beta`` or ``gamma``, an unknown ``base``; and the errors of
        :mod:`jaxvision.losses.calibration`.

    Source: Liang et al. 2020; ``solvers/loss`` of the official code of MDCA.
    """
    check_number("beta", beta)
    given = rows(logits, labels, where)
    r, predicted = confidence(given.logits)
    loss, ce = _base(given, base, gamma)
    extra = jnp.abs(masked_mean(r - (predicted == given.labels), given.where))
    return given.loss(loss + beta * extra, ce, extra)
