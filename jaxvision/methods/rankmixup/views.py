"""RankMixup's mixed views of a batch.

Published are mixup views of images. The paper's ablation has two others: boxes cut out of the partner (CutMix, here),
and mixtures of the features in front of the classifier (manifold mixup, in ``forward.py``).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxvision.core import devices
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.models import mixing

MIXES = ("mixup", "cutmix")


class Draws(NamedTuple):
    """What is mixed with what, for M views of a batch.

    Attributes:
      lam: float32 [M], or [M, B] if drawn for each image.
      perm: int32 [M, B], row numbers of the global batch.
      keep: bool [M, B], False where the partner has the same class (or is the image itself).
    """

    lam: jax.Array
    perm: jax.Array
    keep: jax.Array

    @property
    def relevance(self) -> jax.Array:
        """See :func:`relevance_of`."""
        return relevance_of(self.lam, self.keep)


class Views(NamedTuple):
    """M mixtures of a batch, view-major: row v B + i is view v of image i.

    Attributes:
      images: float [M B, H, W, C] (or values of any shape).
      targets: float32 [M B, K], ``lam one_hot(y) + (1 - lam) one_hot(y_partner)``.
      keep: bool [M, B], False where the partner has the same class (or is the image itself).
      lam: float32 [M], or [M, B] if drawn for each image: the own image's share, for CutMix that of its pixels.
    """

    images: jax.Array
    targets: jax.Array
    keep: jax.Array
    lam: jax.Array

    @property
    def relevance(self) -> jax.Array:
        """See :func:`relevance_of`."""
        return relevance_of(self.lam, self.keep)


def relevance_of(lam: jax.Array, keep: jax.Array) -> jax.Array:
    """The largest entry of a target, [M, B]: max(lam, 1 - lam) for different classes, exactly 1 for the same."""
    lam = lam if lam.ndim == 2 else lam[:, None]
    return jnp.where(keep, jnp.maximum(lam, 1.0 - lam), 1.0)


def mix_rows(value: jax.Array, lam: jax.Array, perm: jax.Array) -> jax.Array:
    """``lam_v x + (1 - lam_v) x[perm_v]`` for v = 1..M, concatenated view-major: [B, ...] -> [M B, ...], same dtype.

    Args:
      value: float [B, ...].
      lam: float32 [M] or [M, B].
      perm: int32 [M, B], row numbers of the global batch.
    """

    def mix(v):
        own = lam[v].reshape(lam.shape[1:] + (1,) * (value.ndim - lam.ndim + 1))
        return mixing.blend(value, mixing.permute_rows(value, perm[v]), own)

    return jnp.concatenate([mix(v) for v in range(len(perm))])


def mix_with(x: jax.Array, targets: jax.Array, lam: jax.Array, perm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """:func:`mix_rows` of images and of targets.

    Args:
      x: float [B, ...].
      targets: float32 [B, K].
      lam: float32 [M] or [M, B].
      perm: int32 [M, B], row numbers of the global batch.

    Returns:
      [M B, ...] in x's dtype, and float32 [M B, K].

    Source: section 3.2 of the paper; ``mixup_process`` of the official code's networks.
    """
    return mix_rows(x, lam, perm), mix_rows(targets, lam, perm)


def cut_with(
    x: jax.Array, targets: jax.Array, inside: jax.Array, perm: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """CutMix: ``x[perm_v]`` inside of a box, x outside, for v = 1..M, concatenated view-major.

    Args:
      x: float [B, H, W, C].
      targets: float32 [B, K].
      inside: bool [M, H, W] or [M, B, H, W], the boxes.
      perm: int32 [M, B], row numbers of the global batch.

    Returns:
      [M B, H, W, C] in x's dtype, float32 targets [M B, K], and lam, float32 [M] or [M, B]: the share of pixels
      outside of the box, by which targets are mixed.

    Source: CutMix of arXiv:1905.04899. The paper has it in an ablation; the official code has no such views.
    """
    lam = 1.0 - jnp.mean(inside.astype(jnp.float32), (-2, -1))
    images = [jnp.where(inside[v][..., None], mixing.permute_rows(x, perm[v]), x) for v in range(len(perm))]
    return jnp.concatenate(images), mix_rows(targets, lam, perm), lam


def draw_views(key: jax.Array, labels: jax.Array, *, num_views: int, alpha: float, per_sample: bool = False) -> Draws:
    """Draws for each view lam ~ Beta(alpha, alpha), not folded, and a permutation of the global batch.

    Args and errors: as for :func:`mixed_views`.
    """
    if isinstance(num_views, bool) or not isinstance(num_views, int) or num_views < 1:
        raise ConfigError(f"num_views={num_views!r} must be a whole number of at least 1")
    if not isinstance(per_sample, bool):
        raise ConfigError(f"per_sample={per_sample!r} must be True or False")
    keys = _view_keys(key, num_views)
    lam, perm = jax.vmap(lambda each: mixing.draw_pairs(each, len(labels), alpha))(keys)
    if per_sample:
        row_keys = jax.vmap(lambda each: devices.row_keys(each, len(labels)))(keys)
        lam = jax.vmap(jax.vmap(lambda each: mixing.draw_pairs(each, 1, alpha).lam))(row_keys)
    # From the labels: lam + (1 - lam) needn't round to exactly 1.
    keep = jnp.stack([labels != mixing.permute_rows(labels, each) for each in perm])
    return Draws(lam, perm, keep)


def mixed_views(
    key: jax.Array,
    x: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int,
    num_views: int,
    alpha: float,
    per_sample: bool = False,
    mix: Literal["mixup", "cutmix"] = "mixup",
) -> Views:
    """Mixes with what :func:`draw_views` draws.

    Args:
      key: typed key, the same on every device.
      x: float [B, H, W, C], augmented and normalised. Full batches only: a padded row would be mixed into valid ones.
      labels: int32 [B].
      num_classes: K.
      num_views: M, static; 1 for MRL, 3 for M-NDCG.
      alpha: 2 on CIFAR, 1 on Tiny-ImageNet; lam is 1 for alpha <= 0.
      per_sample: one lam (and box) for each image instead of one for the batch, which is another method than the
        published one.
      mix: "mixup", or "cutmix": a box (``mixing.cut_box``) of about the share 1 - lam of the image is the partner's,
        and lam becomes the exact share outside of it, as the edge of the image cuts boxes off.

    Raises:
      ConfigError: a number of views that isn't a whole number of at least 1, a ``per_sample`` that isn't a bool, an
        alpha that isn't finite, or an unknown ``mix``.
    """
    if mix not in MIXES:
        raise unknown("mix", mix, MIXES)
    drawn = draw_views(key, labels, num_views=num_views, alpha=alpha, per_sample=per_sample)
    targets = mixing.soft_targets(labels, num_classes)
    if mix == "mixup":
        return Views(*mix_with(x, targets, drawn.lam, drawn.perm), drawn.keep, drawn.lam)
    # 0 and 1 are the halves that ``draw_pairs`` splits a view's key into.
    keys = jax.vmap(lambda each: jax.random.fold_in(each, 2))(_view_keys(key, num_views))
    box = jax.vmap(lambda key, lam: mixing.cut_box(key, lam, x.shape[1:3]))
    if per_sample:
        keys, box = jax.vmap(lambda each: devices.row_keys(each, len(x)))(keys), jax.vmap(box)
    images, targets, lam = cut_with(x, targets, box(keys, drawn.lam), drawn.perm)
    return Views(images, targets, drawn.keep, lam)


def _view_keys(key: jax.Array, num_views: int) -> jax.Array:
    return jax.vmap(lambda view: jax.random.fold_in(key, view))(jnp.arange(num_views))
