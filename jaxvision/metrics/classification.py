"""Classification metrics of logits as sums and counts (:class:`~jaxvision.metrics.mean.Mean`).

In all of them ``mask`` is float or bool [B], 1 for real rows and 0 for padding, whose content is ignored.
"""

import chex
import jax
import jax.numpy as jnp

from jaxvision.metrics.mean import Mean


def accuracy(logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None, *, k: int = 1) -> Mean:
    """Top-k accuracy: is the label's logit among the ``k`` largest?

    Among equal logits the lower class number comes first, as in argmax. A row that holds a NaN is wrong.

    Args:
      logits: float [B, K].
      labels: int [B].
      mask: [B].
      k: 1 <= k; with k >= K everything (but NaN) is right.
    """
    if k < 1:
        raise ValueError(f"k is {k}, but must be at least 1")
    chex.assert_rank([logits, labels], [2, 1])
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    earlier = jnp.arange(logits.shape[-1]) < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & earlier), axis=-1)
    return Mean.of((rank < k) & ~jnp.any(jnp.isnan(logits), axis=-1), mask)


def cross_entropy(logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> Mean:
    """The negative log-likelihood ``-log softmax(logits)[label]`` in nats; logits float [B, K], labels int [B]."""
    chex.assert_rank([logits, labels], [2, 1])
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return Mean.of(-jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0], mask)


def kl_divergence(logits_p: jax.Array, logits_q: jax.Array, mask: jax.Array | None = None) -> Mean:
    """``KL(softmax(logits_p) || softmax(logits_q))`` in nats; both float [B, K], p the reference."""
    chex.assert_equal_shape([logits_p, logits_q])
    log_p = jax.nn.log_softmax(logits_p.astype(jnp.float32), axis=-1)
    log_q = jax.nn.log_softmax(logits_q.astype(jnp.float32), axis=-1)
    p = jnp.exp(log_p)
    # 0 log 0 = 0: a class that the reference excludes with a logit of -inf adds nothing.
    return Mean.of(jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0), axis=-1), mask)


def agreement(logits_a: jax.Array, logits_b: jax.Array, mask: jax.Array | None = None) -> Mean:
    """How often both predict the same class (argmax; the lower number among equals); both float [B, K]."""
    chex.assert_equal_shape([logits_a, logits_b])
    return Mean.of(jnp.argmax(logits_a, -1) == jnp.argmax(logits_b, -1), mask)
