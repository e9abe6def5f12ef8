"""Mixup and CutMix on the device: one draw for the whole batch.

:func:`mix` has timm's semantics: partners are the global batch in reverse order. :func:`draw_pairs`,
:func:`permute_rows` and :func:`blend` are mixup as published, with partners by a random permutation. Both mix the same
pairs on 8 devices as on one.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxvision.core import devices
from jaxvision.core.errors import ConfigError


def soft_targets(labels: jax.Array, num_classes: int, label_smoothing: float = 0.0) -> jax.Array:
    """``(1 - e) one_hot(label) + e / K``: int32 [B] -> float32 [B, K]."""
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return (1.0 - label_smoothing) * one_hot + label_smoothing / num_classes


def mix(
    key: jax.Array,
    images: jax.Array,
    targets: jax.Array,
    *,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    prob: float = 1.0,
    switch_prob: float = 0.5,
) -> tuple[jax.Array, jax.Array]:
    """Mixes every image and its target with those of the row's partner in the reversed global batch.

    With probability ``prob`` a batch is mixed; by CutMix with probability ``switch_prob`` if both alphas are positive.
      mixup:  lam ~ Beta(mixup_alpha, mixup_alpha), x <- lam x + (1 - lam) partner
      CutMix: lam ~ Beta(cutmix_alpha, cutmix_alpha), a box of :func:`cut_box` is copied from the partner and
              lam <- 1 - (the box's true area) / (H W)
      targets <- lam targets + (1 - lam) partner targets
    Source: timm ``Mixup`` with ``mode="batch"`` (which builds smoothed targets by ``mixup_target``, here
    :func:`soft_targets`); mixup of arXiv:1710.09412, CutMix of arXiv:1905.04899.

    Args:
      key: typed key, the same on every device.
      images: float [B, H, W, C], after normalisation.
      targets: float32 [B, K], from :func:`soft_targets`.
      mixup_alpha, cutmix_alpha: concentration; 0 switches that kind off.
      prob, switch_prob: probabilities in [0, 1].

    Returns:
      Mixed images (same shape and dtype) and targets.

    Raises:
      ValueError: a negative alpha, or a probability outside [0, 1].
    """
    for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
        if alpha < 0:
            raise ValueError(f"{name} is {alpha}, but must be at least 0")
    for name, probability in (("prob", prob), ("switch_prob", switch_prob)):
        if not 0 <= probability <= 1:
            raise ValueError(f"{name} is {probability}, but must be between 0 and 1")
    if (mixup_alpha == 0 and cutmix_alpha == 0) or prob == 0:
        return images, targets
    key_on, key_switch, key_lam, key_box = jax.random.split(key, 4)
    cut = switch_prob if mixup_alpha > 0 and cutmix_alpha > 0 else float(cutmix_alpha > 0)
    use_cutmix = jax.random.uniform(key_switch) < cut
    # An alpha that is off is never chosen; 1 keeps its Beta defined.
    alpha = jnp.where(use_cutmix, cutmix_alpha or 1.0, mixup_alpha or 1.0)
    lam = jax.random.beta(key_lam, alpha, alpha)
    lam = jnp.where(jax.random.uniform(key_on) < prob, lam, 1.0)

    inside = cut_box(key_box, lam, images.shape[1:3])
    share = jnp.where(use_cutmix, jnp.where(inside, 0.0, 1.0), lam)  # of the own pixel, [H, W]
    lam = jnp.where(use_cutmix, jnp.mean(share), lam)
    partner_images, partner_targets = devices.reverse_rows((images, targets))
    weight = share[None, :, :, None].astype(images.dtype)
    # Selecting keeps CutMix exact (and lam = 1 the identity) where 0 * partner + own would round or spread NaN.
    blended = jnp.where(weight == 1, images, images * weight + partner_images * (1 - weight))
    return blended, targets * lam + partner_targets * (1.0 - lam)


def cut_box(key: jax.Array, lam: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The box of CutMix, bool [H, W]: True inside.

    Sides ``2 floor(floor(H sqrt(1 - lam)) / 2)`` and likewise W around a uniformly drawn pixel, clipped to the image.
    Source: timm ``rand_bbox`` with margin 0 (odd sides lose one pixel there too).

    Args:
      key: typed key.
      lam: float32 (), the share that is to stay.
      size: (H, W).
    """
    key_y, key_x = jax.random.split(key)
    ratio = jnp.sqrt(1.0 - lam)

    def span(key, length):
        half = jnp.floor(length * ratio).astype(jnp.int32) // 2
        centre = jax.random.randint(key, (), 0, length)
        pixel = jnp.arange(length)
        return (pixel >= centre - half) & (pixel < centre + half)

    height, width = size
    return span(key_y, height)[:, None] & span(key_x, width)[None, :]


class Pairs(NamedTuple):
    """How a batch is mixed with itself.

    Attributes:
      lam: float32 (), the weight of the own image.
      permutation: int32 [B], the number of every row's partner; B counts the rows of the global batch.
    """

    lam: jax.Array
    permutation: jax.Array


def draw_pairs(key: jax.Array, local_rows: int, alpha: float) -> Pairs:
    """``lam ~ Beta(alpha, alpha)``, not folded to [1/2, 1], and a uniform permutation (fixed points allowed).

    Source: mixup of arXiv:1710.09412 and its official code; ``mixup_process`` of the official code of RankMixup.

    Args:
      key: typed key, the same on every device.
      local_rows: rows of the batch on this device (all of them under ``jit``).
      alpha: concentration; lam is 1 for alpha <= 0, as in both codes.

    Raises:
      ConfigError: an alpha that is no finite number.
    """
    if not math.isfinite(alpha):
        raise ConfigError(f"alpha={alpha} must be a finite number; 0 switches mixing off")
    key_lam, key_rows = jax.random.split(key)
    lam = jax.random.beta(key_lam, alpha, alpha) if alpha > 0 else jnp.ones(())
    return Pairs(lam, jax.random.permutation(key_rows, local_rows * devices.sum_over_devices(1)))


def permute_rows(tree: Any, permutation: jax.Array) -> Any:
    """Row i of every leaf ``[B, ...]`` becomes row ``permutation[i]`` of the *global* batch; leaves of numbers only."""
    local_rows = jax.tree.leaves(tree)[0].shape[0]
    count = devices.sum_over_devices(1)
    if count == 1:
        return jax.tree.map(lambda leaf: leaf[permutation], tree)
    offset = devices.row_offset(local_rows)
    own = jax.lax.dynamic_slice_in_dim(permutation, offset, local_rows)

    def permute(leaf):
        everywhere = jnp.zeros((count * local_rows, *leaf.shape[1:]), leaf.dtype)
        everywhere = jax.lax.dynamic_update_slice_in_dim(everywhere, leaf, offset, 0)
        return devices.sum_over_devices(everywhere)[own]

    return jax.tree.map(permute, tree)


def blend(x: jax.Array, partner: jax.Array, lam: jax.Array) -> jax.Array:
    """``lam x + (1 - lam) partner`` in x's dtype: [B, ...], [B, ...] and float32 of a shape that broadcasts to them."""
    lam = jnp.asarray(lam)
    return (lam * x + (1.0 - lam) * partner).astype(x.dtype)
