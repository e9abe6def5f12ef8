"""The perturbation of a detector, summed over regions of interest.

The paper modifies equation 9 "for each RoI"; its formula isn't readable. Ours: the KL divergence of the class
distribution, the squared error of the box deltas, and the binary KL divergence of the mask, for the regions that the
float detector proposes, which both networks are given.
"""

import jax
import jax.numpy as jnp

from jaxvision.methods.igq_vit.allocation import kl_divergence


def binary_kl(logits: jax.Array, other: jax.Array) -> jax.Array:
    """KL(Bernoulli(sigmoid(logits)) || Bernoulli(sigmoid(other))), elementwise."""
    on = jax.nn.log_sigmoid(logits) - jax.nn.log_sigmoid(other)
    off = jax.nn.log_sigmoid(-logits) - jax.nn.log_sigmoid(-other)
    p = jax.nn.sigmoid(logits)
    return p * on + (1 - p) * off


def roi_perturbation(
    classes: tuple[jax.Array, jax.Array],
    boxes: tuple[jax.Array, jax.Array],
    masks: tuple[jax.Array, jax.Array] | None = None,
    valid: jax.Array | None = None,
) -> jax.Array:
    """Perturbation of a detector's predictions; every pair is (float run, quantized run).

    ``sum_r KL(p_r || p'_r) + sum_j (t_rj - t'_rj)^2 + mean_xy KL_binary(m_rxy || m'_rxy)``

    Args:
      classes: (R, K + 1) class logits of R regions.
      boxes: (R, 4) deltas of the predicted class (or (R, 4 K): all classes' summed).
      masks: (R, h, w) mask logits, or None for a detector without masks.
      valid: bool (R,), false for padding regions, which count nothing whatever they hold.

    Returns:
      float (), the sum over regions.
    """
    value = kl_divergence(*classes) + jnp.square(boxes[0] - boxes[1]).sum(-1)
    if masks is not None:
        value = value + binary_kl(*masks).reshape(value.shape[0], -1).mean(-1)
    return jnp.sum(value if valid is None else jnp.where(valid, value, 0.0))
