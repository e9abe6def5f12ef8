"""Cross-entropy and Kullback-Leibler divergence of logits, in float32 whatever the logits' dtype."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp


def softmax_cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    *,
    label_smoothing: float = 0.0,
    mask: jax.Array | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> jax.Array:
    """``-sum_k t_k log softmax(logits)_k`` with ``t = (1 - e) target + e / K``, as ``torch.nn.CrossEntropyLoss``.

    Args:
      logits: float [..., K].
      targets: int [...] of class numbers in 0..K-1, or float [..., K] of probabilities. A class whose probability is 0
        contributes 0 even where its logit is -inf. Nothing is stopped: soft targets get gradients too.
      label_smoothing: e, the weight of the uniform distribution.
      mask: float or bool [...], the weight of each example (0: ignored, whatever it holds).
      reduction: "mean" divides the weighted sum by the sum of the weights (by the number of examples without a mask;
        NaN if all are 0), "sum" doesn't divide, "none" returns float32 [...] with the weights applied.

    Returns:
      float32 () or [...].

    Raises:
      ValueError: shapes that don't fit, smoothing outside [0, 1], or an unknown reduction.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, but must be between 0 and 1")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}, but must be 'mean', 'sum' or 'none'")
    hard = jnp.issubdtype(targets.dtype, jnp.integer)
    expected = logits.shape[:-1] if hard else logits.shape
    if targets.shape != expected:
        raise ValueError(f"targets have shape {targets.shape}, but logits of shape {logits.shape} need {expected}")
    if mask is not None:
        chex.assert_shape(mask, logits.shape[:-1])
        # Select before the arithmetic: 0 times the NaN of an ignored row would be NaN, in the gradient as well.
        logits = jnp.where(mask[..., None] > 0, logits, 0.0)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    if hard:
        losses = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        if label_smoothing:
            losses = (1.0 - label_smoothing) * losses - label_smoothing * jnp.mean(log_p, axis=-1)
    else:
        targets = targets.astype(jnp.float32)
        if label_smoothing:
            targets = (1.0 - label_smoothing) * targets + label_smoothing / logits.shape[-1]
        losses = -jnp.sum(targets * _zero_where(targets == 0, log_p), axis=-1)
    if mask is None:
        return {"none": lambda: losses, "sum": lambda: jnp.sum(losses), "mean": lambda: jnp.mean(losses)}[reduction]()
    weights = mask.astype(jnp.float32)
    losses = jnp.where(weights > 0, losses * weights, 0.0)
    if reduction == "none":
        return losses
    return jnp.sum(losses) if reduction == "sum" else jnp.sum(losses) / jnp.sum(weights)


def kl_divergence(logits_p: jax.Array, logits_q: jax.Array) -> jax.Array:
    """``KL(p || q) = sum_k p_k (log p_k - log q_k)`` per example, p and q the softmax of the logits.

    A class with p_k = 0 (logit -inf) contributes 0. Nothing is stopped: both sides get gradients.

    Args:
      logits_p: float [..., K], the reference (teacher).
      logits_q: float [..., K].

    Returns:
      float32 [...], one number per example, in nats.
    """
    chex.assert_equal_shape([logits_p, logits_q])
    log_p = jax.nn.log_softmax(logits_p.astype(jnp.float32), axis=-1)
    log_q = jax.nn.log_softmax(logits_q.astype(jnp.float32), axis=-1)
    p = jnp.exp(log_p)
    absent = p == 0
    return jnp.sum(p * (_zero_where(absent, log_p) - _zero_where(absent, log_q)), axis=-1)


def _zero_where(absent, log_p):
    """``log_p`` with -inf replaced by 0 where the class has no weight (0 times -inf is NaN)."""
    return jnp.where(absent & jnp.isneginf(log_p), 0.0, log_p)
