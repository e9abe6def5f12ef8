"""Cross-entropy on mixed images: mixup and RegMixup. The mixing itself is in :mod:`jaxvision.models.mixing`.

Masks and dtypes: see :mod:`jaxvision.losses.calibration`.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.losses.calibration import CalibrationLoss, check_number, mean_cross_entropy, rows


def mixup(
    mixed_logits: jax.Array,
    labels: jax.Array,
    *,
    partner_labels: jax.Array,
    lam: jax.Array | float,
    where: jax.Array | None = None,
) -> CalibrationLoss:
    """``lam CE(f(x~), y) + (1 - lam) CE(f(x~), y_partner)``; ``extra`` is 0.

    Args:
      mixed_logits: float [..., K], of the mixed images ``lam x + (1 - lam) x_partner``.
      labels, partner_labels: int32 [...].
      lam: in [0, 1], one number for the batch.
      where: bool [...], rows that count: both images of the pair are valid.

    Raises:
      ConfigError: ``lam`` outside [0, 1]; and the errors of :mod:`jaxvision.losses.calibration`.

    Source: Zhang et al., ICLR 2018.
    """
    check_number("lam", lam, 0, 1)
    own, partner = rows(mixed_logits, labels, where), rows(mixed_logits, partner_labels, where)
    ce = lam * mean_cross_entropy(own) + (1.0 - lam) * mean_cross_entropy(partner)
    return partner.loss(*own.loss(ce, ce, jnp.zeros_like(ce)))


def regmixup(
    logits: jax.Array,
    labels: jax.Array,
    *,
    mixed_logits: jax.Array,
    partner_labels: jax.Array,
    lam: jax.Array | float,
    eta: float = 1.0,
    reduction: Literal["mean2n", "sum"] = "mean2n",
    where: jax.Array | None = None,
    mixed_where: jax.Array | None = None,
) -> CalibrationLoss:
    """``CE(f(x), y) + eta mixup(f(x~))``, or half of it; ``extra`` is the mixup cross-entropy.

    Officially raw and mixed images pass through the network in one forward of 2 N images.

    Args:
      logits, mixed_logits: float [..., K], the two halves of the network's output.
      labels, partner_labels, lam: as for :func:`mixup`.
      eta: weight, at least 0.
      reduction: "mean2n" divides the sum by 2, which is the mean over the 2 N rows for eta = 1 (official); "sum"
        doesn't.
      where: bool [...], rows of raw images that count.
      mixed_where: bool [...], rows of mixed ones: both images of the pair are valid; absent: ``where``.

    Raises:
      ConfigError: an unknown reduction, numbers out of range, halves of different shapes; and the errors of
        :mod:`jaxvision.losses.calibration`.

    Source: Pinto et al., NeurIPS 2022; its official code.
    """
    check_number("eta", eta)
    if reduction not in ("mean2n", "sum"):
        raise unknown("reduction", reduction, ("mean2n", "sum"))
    if jnp.shape(logits) != jnp.shape(mixed_logits):
        raise ConfigError(
            f"logits of raw images have shape {jnp.shape(logits)}, of mixed images {jnp.shape(mixed_logits)}; "
            "both halves of the batch need the same"
        )
    mixed_where = where if mixed_where is None else mixed_where
    given = rows(logits, labels, where)
    raw = mean_cross_entropy(given)
    mixed = mixup(mixed_logits, labels, partner_labels=partner_labels, lam=lam, where=mixed_where).total
    total = raw + eta * mixed
    return given.loss(total / 2 if reduction == "mean2n" else total, raw, mixed)
