"""Older proxies that look at activations alone, as functions of the supernet's parameters and the architecture."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import trees
from jaxvision.methods.az_nas import supernet
from jaxvision.methods.az_nas.supernet_init import Params
from jaxvision.models.nas_bench_201 import CONV_1X1, CONV_3X3

ZEN_STEP = 0.01


def agreement(params: Params, architecture: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    """How many units of all ReLUs are positive in both images or in neither, float32 [B, B].

    ``K = sum_ReLUs A A^T + (1 - A)(1 - A)^T`` with A = 1 where the ReLU's input is positive (Mellor et al. 2021). Every
    convolution's own ReLU counts, on edges without effect as well.

    Args:
      params: as ``supernet_init.init`` makes them.
      architecture: int32 [6].
      images: float32 [>= 1, B, H, W, C], the first is used.
      labels: ignored.
    """
    return supernet.apply(params, architecture, images[0], agreement=True).agreement


def log_determinant(kernel: np.ndarray) -> float:
    """NASWOT's score ``ln |det K|`` of float [B, B], in float64; -inf of a singular kernel."""
    return float(np.linalg.slogdet(np.asarray(kernel, np.float64))[1])


def linear_regions(kernel: np.ndarray) -> float:
    """TE-NAS's number of linear regions that the images lie in, from :func:`agreement`'s [B, B].

    ``sum_i 1 / #{j: the same pattern as i}``; two images have the same pattern where all units agree.
    """
    same = np.asarray(kernel) == np.diagonal(kernel)[:, None]
    return float(np.sum(1 / same.sum(1)))


def condition(kernel: np.ndarray) -> float:
    """TE-NAS's ``-lambda_max / lambda_min`` of float [B, B], in float64.

    -1e5 of a kernel of zeros or with NaN in it, as the official code's; -inf where rounding left no positive
    lambda_min, which the official code lets through with the wrong sign.
    """
    kernel = np.asarray(kernel, np.float64)
    if not np.isfinite(kernel).all() or not kernel.any():
        return -1e5
    low, *_, high = np.linalg.eigvalsh(kernel)
    return float(-high / low) if low > 0 else -math.inf


def zen(params: Params, architecture: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    """``ln mean_B sum |F(x) - F(x + 0.01 x')| + sum_norms ln sqrt(mean_C var)`` (Lin et al. 2021).

    F are the features before pooling, ``var`` the running variances after both passes in training mode,
    ``0.81 + 0.09 v(x) + 0.1 v(x + 0.01 x')`` with the unbiased variances v; edges without convolution have none.

    Args:
      params: drawn N(0, 1).
      architecture: int32 [6].
      images: float32 [>= 2, B, H, W, C], x and x'.
      labels: ignored.

    Returns:
      float32 []; -inf where the features don't depend on the input.
    """
    inputs = jnp.stack([images[0], images[0] + ZEN_STEP * images[1]])
    # A loop, so that the network is compiled once.
    features, statistics = jax.lax.map(lambda x: supernet.apply(params, architecture, x)[1:3], inputs)
    distance = jnp.mean(jnp.sum(jnp.abs(features[0] - features[1]), (1, 2, 3)))
    running = supernet.initial_statistics(params)
    for each in range(2):
        found = jax.tree.map(lambda leaf: leaf[each], statistics)  # noqa: B023
        running = supernet.updated(running, found, images.shape[1:])
    convolution = (architecture == CONV_1X1) | (architecture == CONV_3X3)
    scaling = jnp.zeros((), features.dtype)
    for name, variance in trees.named_leaves(running).items():
        if name.endswith("/var"):
            terms = jnp.log(jnp.mean(variance, -1)) / 2
            scaling += jnp.sum(jnp.where(convolution, terms, 0)) if name.startswith("stage") else terms
    return jnp.log(distance) + scaling
