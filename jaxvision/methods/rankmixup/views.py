"""RankMixup's mixed views of a batch, and the two forward passes of its step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxvision.core import devices
from jaxvision.core.errors import ConfigError
from jaxvision.models import mixing


class Views(NamedTuple):
    """M mixtures of a batch, view-major: row v B + i is view v of image i.

    Attributes:
      images: float [M B, H, W, C] (or features of any shape).
      targets: float32 [M B, K], ``lam one_hot(y) + (1 - lam) one_hot(y_partner)``.
      keep: bool [M, B], False where the partner has the same class (or is the image itself).
      lam: float32 [M], or [M, B] if drawn for each image.
    """

    images: jax.Array
    targets: jax.Array
    keep: jax.Array
    lam: jax.Array

    @property
    def relevance(self) -> jax.Array:
        """The largest entry of a target, [M, B]: max(lam, 1 - lam) for different classes, exactly 1 for the same."""
        lam = self.lam if self.lam.ndim == 2 else self.lam[:, None]
        return jnp.where(self.keep, jnp.maximum(lam, 1.0 - lam), 1.0)


def mix_with(x: jax.Array, targets: jax.Array, lam: jax.Array, perm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``lam_v x + (1 - lam_v) x[perm_v]`` for v = 1..M, and the same of the targets, concatenated view-major.

    Args:
      x: float [B, ...].
      targets: float32 [B, K].
      lam: float32 [M] or [M, B].
      perm: int32 [M, B], row numbers of the global batch.

    Returns:
      [M B, ...] in x's dtype, and float32 [M B, K].

    Source: section 3.2 of the paper; ``mixup_process`` of the official code's networks.
    """

    def mix(value, v):
        own = lam[v].reshape(lam.shape[1:] + (1,) * (value.ndim - lam.ndim + 1))
        return mixing.blend(value, mixing.permute_rows(value, perm[v]), own)

    views = range(len(perm))
    return jnp.concatenate([mix(x, v) for v in views]), jnp.concatenate([mix(targets, v) for v in views])


def mixed_views(
    key: jax.Array,
    x: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int,
    num_views: int,
    alpha: float,
    per_sample: bool = False,
) -> Views:
    """Draws for each view lam ~ Beta(alpha, alpha), not folded, and a permutation of the global batch; mixes.

    Args:
      key: typed key, the same on every device.
      x: float [B, H, W, C], augmented and normalised, or features behind a layer (manifold mixup). Full batches only:
        a padded row would be mixed into valid ones.
      labels: int32 [B].
      num_classes: K.
      num_views: M, static; 1 for MRL, 3 for M-NDCG.
      alpha: 2 on CIFAR, 1 on Tiny-ImageNet; lam is 1 for alpha <= 0.
      per_sample: one lam for each image instead of one for the batch, which is another method than the published one.

    Raises:
      ConfigError: a number of views that isn't a whole number of at least 1, a ``per_sample`` that isn't a bool, or an
        alpha that isn't finite.
    """
    if isinstance(num_views, bool) or not isinstance(num_views, int) or num_views < 1:
        raise ConfigError(f"num_views={num_views!r} must be a whole number of at least 1")
    if not isinstance(per_sample, bool):
        raise ConfigError(f"per_sample={per_sample!r} must be True or False")
    keys = jax.vmap(lambda view: jax.random.fold_in(key, view))(jnp.arange(num_views))
    lam, perm = jax.vmap(lambda each: mixing.draw_pairs(each, len(x), alpha))(keys)
    if per_sample:
        row_keys = jax.vmap(lambda each: devices.row_keys(each, len(x)))(keys)
        lam = jax.vmap(jax.vmap(lambda each: mixing.draw_pairs(each, 1, alpha).lam))(row_keys)
    images, targets = mix_with(x, mixing.soft_targets(labels, num_classes), lam, perm)
    # From the labels: lam + (1 - lam) needn't round to exactly 1.
    keep = jnp.stack([labels != mixing.permute_rows(labels, each) for each in perm])
    return Views(images, targets, keep, lam)


def forward_twice(
    module: Any, variables: Any, images: jax.Array, mixed_images: jax.Array, rngs: dict[str, jax.Array] | None = None
) -> tuple[jax.Array, jax.Array, Any]:
    """Raw images, then mixed ones, in training mode: batch statistics move twice, .81 old + .09 raw + .1 mixed.

    Args:
      module: ``apply(variables, images, train=True, mutable=..., rngs=...)``.
      variables: ``{"params": ..., other collections}``.
      images, mixed_images: float [B, ...] and [M B, ...].
      rngs: for dropout and the like; the second pass folds in 1.

    Returns:
      (raw outputs [B, K], mixed outputs [M B, K], the other collections after both).
    """
    state = {name: tree for name, tree in variables.items() if name != "params"}

    def forward(state, images, rngs):
        outputs, updated = module.apply(
            {"params": variables["params"], **state}, images, train=True, mutable=list(state), rngs=rngs
        )
        return outputs, {**state, **updated}

    raw, state = forward(state, images, rngs)
    again = None if rngs is None else {name: jax.random.fold_in(key, 1) for name, key in rngs.items()}
    mixed, state = forward(state, mixed_images, again)
    return raw, mixed, state
