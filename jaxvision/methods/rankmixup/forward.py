"""The two forward passes of RankMixup's step: raw images, then views, mixed at the input or of the features."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core.errors import ConfigError
from jaxvision.core.types import Tap, no_tap
from jaxvision.methods.rankmixup.views import mix_rows

LAYERS = ("input", "features")


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
    raw, variables = _forward(module, variables, images, rngs)
    mixed, variables = _forward(module, variables, mixed_images, _again(rngs))
    return raw, mixed, _without_params(variables)


def forward_mixed_features(
    module: Any,
    variables: Any,
    images: jax.Array,
    lam: jax.Array,
    perm: jax.Array,
    rngs: dict[str, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, Any]:
    """Raw images, then raw images again, whose features are mixed M times: manifold mixup, in training mode.

    Mixed is the input of the network's last named place, the vectors [B, D] that its classifier takes. Pooling is a
    mean, so that this is to mix the maps of the last stage in front of it, as the official networks do (and behind the
    last normalisation and dropout of those networks that have one there). Both passes are over the raw batch: batch
    statistics move twice, .81 old + .19 raw.

    Args:
      module: as for :func:`forward_twice`, with taps (:data:`jaxvision.core.types.Tap`).
      variables, images, rngs: as there.
      lam: float32 [M] or [M, B].
      perm: int32 [M, B], row numbers of the global batch.

    Returns:
      As :func:`forward_twice`.

    Raises:
      ConfigError: a network without taps, or whose last named place doesn't hold a vector of each image.

    Source: ``forward_multimixup`` of the official code's networks (``layer_mix: 4``; 3 for wide ResNets).
    """
    problem = (
        f"layer='features' mixes the vectors [B, D] that a network's classifier takes, but {type(module).__name__} "
        "{}; use layer='input'"
    )
    if isinstance(module, nn.Module) and "tap" not in inspect.signature(type(module).__call__).parameters:
        raise ConfigError(problem.format("names no places (it takes no tap)"))
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, value: jax.Array) -> jax.Array:
        shapes[name] = jnp.shape(value)
        return value

    raw, variables = _forward(module, variables, images, rngs, record)
    last = next(reversed(shapes), "")
    if len(shapes.get(last, ())) != 2:
        found = f"of shape {shapes[last]} at {last!r}" if shapes else "at no named place"
        raise ConfigError(problem.format(f"has its last values {found}"))

    def mix(name: str, value: jax.Array) -> jax.Array:
        return mix_rows(value, lam, perm) if name == last else value

    mixed, variables = _forward(module, variables, images, _again(rngs), mix)
    return raw, mixed, _without_params(variables)


def _forward(
    module: Any, variables: Any, images: jax.Array, rngs: dict[str, jax.Array] | None, tap: Tap = no_tap
) -> tuple[jax.Array, Any]:
    """Outputs, and the variables after the pass."""
    taps = {} if tap is no_tap else {"tap": tap}
    mutable = list(_without_params(variables))
    outputs, updated = module.apply(variables, images, train=True, mutable=mutable, rngs=rngs, **taps)
    return outputs, {**variables, **updated}


def _again(rngs: dict[str, jax.Array] | None) -> dict[str, jax.Array] | None:
    """The keys of the second pass."""
    return None if rngs is None else {name: jax.random.fold_in(key, 1) for name, key in rngs.items()}


def _without_params(variables: Any) -> Any:
    return {name: tree for name, tree in variables.items() if name != "params"}
