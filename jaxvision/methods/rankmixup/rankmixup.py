"""RankMixup (Noh, Park, Lee, Ham; ICCV 2023): mixed images rank confidences; they carry no cross-entropy.

A raw image should be more confident than its mixture (MRL), mixtures with a larger coefficient more confident than
those with a smaller one (M-NDCG). One step, as in the official code: raw forward, mixed views drawn
(:mod:`jaxvision.methods.rankmixup.views`), one forward of all M B mixed images, which moves the batch statistics a
second time (:mod:`jaxvision.methods.rankmixup.forward`), loss, backward through both.

Where paper and official code differ, the code is followed (logits in MRL, max(lam, 1 - lam) and the reciprocal in
M-NDCG) except for MRL's mask, see :func:`mrl_loss`. Masks and dtypes: see :mod:`jaxvision.losses.calibration`.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.losses.calibration import (
    CalibrationLoss,
    Rows,
    check_number,
    confidence,
    masked_mean,
    mean_cross_entropy,
    rows,
    to_float32,
    top,
)
from jaxvision.metrics.mean import Mean


def mrl_loss(
    raw: jax.Array,
    mixed: jax.Array,
    labels: jax.Array,
    keep: jax.Array,
    *,
    margin: float = 2.0,
    weight: float = 0.1,
    space: Literal["logit", "prob"] = "logit",
    official_broadcast: bool = False,
    average_views: bool = False,
    where: jax.Array | None = None,
) -> CalibrationLoss:
    """``CE(raw) + weight mean_i keep_i [max_k mixed_ik - max_k raw_ik + margin]_+``, nothing stopped.

    Args:
      raw: float [B, K], logits of the images.
      mixed: float [B, K], logits of one mixture each; [M, B, K] with ``average_views``.
      labels: int32 [B].
      keep: bool, shape of ``mixed`` without K, from :class:`Views`.
      margin: 2 on CIFAR, 1 on Tiny-ImageNet; about 0.05 for "prob".
      weight: at least 0.
      space: "logit" as in the official code, or "prob": of softmax, as the paper writes it.
      official_broadcast: mean(keep) mean(hinge), the released behaviour, whose shapes (B,) and (B, 1) broadcast, so
        that pairs of the same class aren't excluded. Under ``pmap`` both means are those of one device's rows, and
        the mean over devices of their products isn't the whole batch's product.
      average_views: the mean over M views, which isn't part of the published method.
      where: bool [B].

    Returns:
      ``extra`` is the ranking term.

    Raises:
      ConfigError: several views without ``average_views``, shapes that don't fit, an unknown space, a negative number;
        and the errors of :mod:`jaxvision.losses.calibration`.

    Source: equation 10 of the paper; ``losses/rankmixup`` of the official code.
    """
    check_number("margin", margin)
    check_number("weight", weight)
    if space not in ("logit", "prob"):
        raise unknown("space", space, ("logit", "prob"))
    given = rows(raw, labels, where)
    mixed = _stacked(mixed, given)
    if len(mixed) > 1 and not average_views:
        raise ConfigError(
            f"MRL compares an image with one mixture, but there are {len(mixed)} views; "
            "set num_views to 1, use M-NDCG, or set average_views"
        )
    keep = _by_view(keep, mixed, "keep")
    score = confidence if space == "prob" else top
    raw_top, mixed_top = score(given.logits)[0], jax.vmap(score)(mixed)[0]
    hinge = jax.nn.relu(mixed_top - raw_top + margin)
    keep = keep.astype(hinge.dtype)
    if official_broadcast:
        rank = masked_mean(jnp.mean(keep, 0), given.where) * masked_mean(jnp.mean(hinge, 0), given.where)
    else:
        rank = masked_mean(jnp.mean(keep * hinge, 0), given.where)
    ce = mean_cross_entropy(given)
    return given.loss(ce + weight * rank, ce, rank)


class Ranking(NamedTuple):
    """What M-NDCG compares, by image. ``ndcg`` is after the reciprocal rule.

    Attributes:
      ndcg, dcg, idcg: float32 [B].
      order: int32 [B, M], the views by relevance, largest first, ties in view order.
    """

    ndcg: jax.Array
    dcg: jax.Array
    idcg: jax.Array
    order: jax.Array


class MNDCGLoss(NamedTuple):
    """``total``, ``ce``, ``extra`` as in CalibrationLoss; ``aux`` has the ranking of every image."""

    total: jax.Array
    ce: jax.Array
    extra: jax.Array
    aux: Ranking


def mndcg_loss(
    raw: jax.Array,
    mixed: jax.Array,
    labels: jax.Array,
    relevance: jax.Array,
    *,
    weight: float = 0.1,
    where: jax.Array | None = None,
) -> MNDCGLoss:
    """``CE(raw) + weight mean_i (1 - NDCG_i)`` over each image and its M mixtures.

      DCG = sum_r D_r conf_(r),  IDCG = sum_r D_r rel_(r),  D_r = 1 / log2(r + 1),  r = 1..M+1
      NDCG = DCG / IDCG if IDCG > DCG else IDCG / DCG

    Confidences conf (max softmax) and relevances in the order of relevance, the raw image (relevance 1) first.
    Relevance, order and D are constants; nothing else is stopped. All confidences of an image get a gradient of one
    sign, towards equality of the two sums: it raises them while they are too small and lowers them where too large,
    and value 0 doesn't imply the right order.

    Args:
      raw: float [B, K].
      mixed: float [M, B, K], or [M B, K] view-major.
      labels: int32 [B].
      relevance: float32 [M, B], ``Views.relevance``.
      weight: at least 0; 0.1 published.
      where: bool [B].

    Returns:
      ``extra`` is the ranking term.

    Raises:
      ConfigError: shapes that don't fit, a negative weight; and the errors of :mod:`jaxvision.losses.calibration`.

    Source: equations 11 to 14 of the paper; ``losses/rankmixup`` of the official code (reciprocal, linear gains).
    """
    check_number("weight", weight)
    given = rows(raw, labels, where)
    mixed = _stacked(mixed, given)
    ranking = _rank(_confidences(given, mixed), _by_view(relevance, mixed, "relevance"))
    rank, ce = masked_mean(1.0 - ranking.ndcg, given.where), mean_cross_entropy(given)
    return MNDCGLoss(*given.loss(ce + weight * rank, ce, rank), ranking)


def _confidences(given: Rows, mixed: jax.Array) -> jax.Array:
    """max softmax [M + 1, B], raw first."""
    return jnp.concatenate([confidence(given.logits)[0][None], jax.vmap(confidence)(mixed)[0]])


def _rank(conf: jax.Array, relevance: jax.Array) -> Ranking:
    relevance = jax.lax.stop_gradient(relevance).astype(conf.dtype)
    order = jnp.argsort(relevance, axis=0, descending=True, stable=True)
    discount = jnp.asarray(1.0 / np.log2(np.arange(2, len(conf) + 2)), conf.dtype)
    dcg = discount[0] * conf[0] + discount[1:] @ jnp.take_along_axis(conf[1:], order, axis=0)
    idcg = discount[0] + discount[1:] @ jnp.take_along_axis(relevance, order, axis=0)
    # Both branches are finite: conf is at least 1 / K.
    return Ranking(jnp.where(idcg > dcg, dcg / idcg, idcg / dcg), dcg, idcg, order.T.astype(jnp.int32))


def _stacked(mixed: jax.Array, given: Rows) -> jax.Array:
    """Mixed logits as float32 [M, B, K], 0 in rows that don't count."""
    shape = jnp.shape(mixed)
    count, classes = given.logits.shape
    fits = shape[-1:] == (classes,) and len(shape) in (2, 3) and (len(shape) == 2 or shape[1] == count)
    if not fits or int(np.prod(shape)) % (count * classes):
        raise ConfigError(
            f"mixed logits have shape {shape}, but raw ones of shape {(count, classes)} need "
            f"(M, {count}, {classes}) or (M x {count}, {classes}) for M views"
        )
    mixed = to_float32(jnp.asarray(mixed)).reshape(-1, count, classes)
    return mixed if given.where is None else jnp.where(given.where[:, None], mixed, 0.0)


def _by_view(values: jax.Array, mixed: jax.Array, name: str) -> jax.Array:
    """[M, B], from that or (for one view) from [B]."""
    if jnp.shape(values) not in (mixed.shape[:2], mixed.shape[1:2] if len(mixed) == 1 else None):
        raise ConfigError(f"{name} has shape {jnp.shape(values)}, but the mixed logits need {mixed.shape[:2]}")
    return jnp.reshape(values, mixed.shape[:2])


def ranking_metrics(
    raw: jax.Array, mixed: jax.Array, relevance: jax.Array, *, where: jax.Array | None = None
) -> dict[str, Mean]:
    """Does the network rank as asked? Means over images and views that merge.

    ``raw_above_mixed``: share of mixtures that are less confident than their image; ``pair_order``: share of pairs of
    an image's views, of different relevance, whose confidences are ordered like it (absent for one view);
    ``mixed_confidence``: of the mixtures; ``confidence_gap``: their confidence minus relevance; ``reciprocal``: share
    of images with DCG >= IDCG, whose confidences M-NDCG lowers.

    Args:
      raw, mixed, relevance, where: as for :func:`mndcg_loss`.

    Raises:
      ConfigError: shapes that don't fit.
    """
    given = rows(raw, jnp.zeros(jnp.shape(raw)[:-1], jnp.int32), where)
    mixed = _stacked(mixed, given)
    relevance = _by_view(relevance, mixed, "relevance")
    conf = _confidences(given, mixed)
    ranking = _rank(conf, relevance)
    valid = jnp.ones(relevance.shape[1]) if given.where is None else given.where.astype(jnp.float32)
    each = jnp.broadcast_to(valid, relevance.shape)
    metrics = {
        "raw_above_mixed": Mean.of(conf[0] > conf[1:], each),
        "mixed_confidence": Mean.of(conf[1:], each),
        "confidence_gap": Mean.of(conf[1:] - relevance, each),
        "reciprocal": Mean.of(ranking.dcg >= ranking.idcg, valid),
    }
    first, second = np.triu_indices(len(relevance), 1)
    if len(first):
        wanted = jnp.sign(relevance[first] - relevance[second])
        found = jnp.sign(conf[1 + first] - conf[1 + second])
        metrics["pair_order"] = Mean.of(wanted == found, valid * (wanted != 0))
    return metrics
