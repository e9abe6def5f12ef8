"""Normalisation by the statistics of the batch, with its derivative written by hand."""

import functools
import math

import jax
import jax.numpy as jnp

from jaxvision.core import devices
from jaxvision.core.errors import ConfigError


def batch_count(x: jax.Array) -> int:
    """How many values a channel of [..., C] has, over all devices.

    Raises:
      ConfigError: a single one, whose variance is undefined.
    """
    count = devices.sum_over_devices(math.prod(x.shape[:-1]))
    if count < 2:
        raise ConfigError(
            f"batch normalisation got {count} value per channel (input shape {x.shape}), whose variance is undefined; "
            "train with a larger batch or larger images"
        )
    return count


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def normalise_by_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """:func:`normalise` of float32 [..., C] by its own statistics; also its mean [C] and biased variance [C].

    The statistics are those of all devices' values, in two passes (``E[x^2] - E[x]^2`` cancels). Differentiable in
    either mode and to any order. With ``a = scale / sqrt(var + eps)`` the derivative is
      dy = a dx + (x - mean) p + q
    for vectors p and q [C]: its transpose needs two sums over x and the gradient and then one pass over both.
    """
    mean = _batch_mean(x)
    var = _batch_mean(jnp.square(x - mean))
    return normalise(x, mean, var, scale, bias, eps), mean, var


@normalise_by_batch.defjvp
def _normalise_by_batch_jvp(
    eps: float, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    (x, scale, bias), (dx, dscale, dbias) = primals, tangents
    y, mean, var = normalise_by_batch(x, scale, bias, eps)
    # Not (x - mean) / std, which XLA's CPU backend would store beside x; the difference it computes anew.
    centred, inverse = x - mean, jax.lax.rsqrt(var + eps)
    dmean, half_dvar = _batch_mean(dx), _batch_mean(centred * dx)
    a = inverse * scale
    dy = a * dx + centred * (inverse * (dscale - a * inverse * half_dvar)) + (dbias - a * dmean)
    return (y, mean, var), (dy, dmean, 2 * half_dvar)


def normalise(
    x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> jax.Array:
    """``(x - mean) / sqrt(var + eps) * scale + bias`` of float32 [..., C] and vectors [C]."""
    return (x - mean) * (jax.lax.rsqrt(var + eps) * scale) + bias


def _batch_mean(x: jax.Array) -> jax.Array:
    return devices.mean_over_devices(jnp.mean(x, tuple(range(x.ndim - 1))))
