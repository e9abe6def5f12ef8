"""Focal losses: cross-entropy that counts a row less the surer the network is of its label.

Signature, masks and dtypes: see :mod:`jaxvision.losses.calibration`.
"""

import jax
import jax.numpy as jnp

from jaxvision.losses.calibration import CalibrationLoss, Rows, check_number, masked_mean, row_cross_entropy, rows


def focal_rows(ce: jax.Array, gamma: float) -> jax.Array:
    """``-(1 - p_y)^gamma log p_y`` from ``ce = -log p_y``, float32 [N]."""
    return _power(ce, gamma) * ce


def _power(ce: jax.Array, gamma: float) -> jax.Array:
    rest = -jnp.expm1(-ce)  # 1 - p, without cancellation where p is near 1
    if isinstance(gamma, int | float) and gamma == int(gamma):
        return rest ** int(gamma)
    # For gamma < 1 the slope at p = 1 is infinite, times the 0 of log p.
    return jnp.where(rest > 0, rest, jnp.finfo(rest.dtype).tiny) ** gamma


def _loss(given: Rows, ce: jax.Array, losses: jax.Array) -> CalibrationLoss:
    total = masked_mean(losses, given.where)
    return given.loss(total, masked_mean(ce, given.where), total)


def focal(
    logits: jax.Array, labels: jax.Array, *, gamma: float = 3.0, where: jax.Array | None = None
) -> CalibrationLoss:
    """``-mean (1 - p_y)^gamma log p_y``, in the place of cross-entropy; the gradient flows through both factors.

    Args:
      logits, labels, where: see :mod:`jaxvision.losses.calibration`.
      gamma: at least 0; 0 is cross-entropy.

    Raises:
      ConfigError: a negative ``gamma``; and the errors of :mod:`jaxvision.losses.calibration`.

    Source: Lin et al. 2017; ``losses/focal_loss`` of the official code of RankMixup, which takes the mean over the
    batch (the focal calibration code of Mukhoti et al. 2020 takes the sum).
    """
    check_number("gamma", gamma)
    given = rows(logits, labels, where)
    ce = row_cross_entropy(given)
    return _loss(given, ce, focal_rows(ce, gamma))


def flsd(
    logits: jax.Array, labels: jax.Array, *, gamma: float = 3.0, where: jax.Array | None = None
) -> CalibrationLoss:
    """Focal loss with a gamma a row: 5 where p_y < 0.2, 3 where 0.2 <= p_y < 0.5, ``gamma`` above.

    ``gamma=3`` is FLSD-53, ``gamma=2`` FLSD-52. The row's gamma carries no gradient.

    Args:
      logits, labels, where: see :mod:`jaxvision.losses.calibration`.
      gamma: at least 0.

    Raises:
      ConfigError: a negative ``gamma``; and the errors of :mod:`jaxvision.losses.calibration`.

    Source: Mukhoti et al. 2020; ``losses/focal_loss_adaptive_gamma`` of the official code of RankMixup.
    """
    check_number("gamma", gamma)
    given = rows(logits, labels, where)
    ce = row_cross_entropy(given)
    p = jnp.exp(-ce)
    factor = jnp.where(p < 0.2, _power(ce, 5), jnp.where(p < 0.5, _power(ce, 3), _power(ce, gamma)))
    return _loss(given, ce, factor * ce)
