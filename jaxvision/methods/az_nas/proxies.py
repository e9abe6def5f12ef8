"""AZ-NAS's three measured proxies as pure functions (Lee and Ham 2024, section 3; the official code where it differs).

A candidate is a chain of primary blocks with outputs ``f_0, f_1, ..., f_L``: [B, H, W, C], or [B, L, D] of tokens. The
fourth proxy, complexity, is the number of multiply-adds by each space's exact counter.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxvision.core.errors import ConfigError

HIGHEST = jax.lax.Precision.HIGHEST


class BlockStatistics(NamedTuple):
    """What one block gives to the proxies; nothing else of the block needs to be kept.

    Attributes:
      features: ``f_l``, the input of the next block.
      entropy: of the spectrum of ``f_l``, float32 [].
      sigma: the largest singular value of the block's averaged Jacobian, float32 [].
      identical: whether the block hands gradients through unchanged, bool [].
    """

    features: jax.Array
    entropy: jax.Array
    sigma: jax.Array
    identical: jax.Array


def spectrum_entropy(features: jax.Array, eps: float = 1e-8, clamp: bool = True) -> jax.Array:
    """Entropy of the principal components' shares of the variance:

      s = -sum_i p_i ln(p_i + eps),  p_i = lambda_i / sum_j lambda_j,  lambda = eig(X^T X / N), X centred

    Args:
      features: [..., C]; all axes but the last are N samples. Stop-gradient.
      eps: inside the logarithm.
      clamp: negative eigenvalues count as 0. In float32 a nearly singular covariance has some by rounding, and the
        official code (``clamp=False``) then ends in NaN: 4 % of the connected NAS-Bench-201 cells at 32x32.

    Returns:
      [] in the dtype of ``features``, at most ln C; NaN where nothing varies.

    Source: official code, ``compute_az_nas_score``; the paper's equation has no ``eps``.
    """
    x = jax.lax.stop_gradient(features).reshape(-1, features.shape[-1])
    # The mean first: E[x x^T] - m m^T loses everything in cells whose channels hardly vary.
    x = x - jnp.mean(x, 0)
    eigenvalues = jnp.linalg.eigvalsh(jnp.matmul(x.T, x, precision=HIGHEST) / x.shape[0])
    if clamp:
        eigenvalues = jnp.maximum(eigenvalues, 0)
    share = eigenvalues / jnp.sum(eigenvalues)
    return -jnp.sum(share * jnp.log(share + eps))


def expressivity(entropies: jax.Array) -> jax.Array:
    """``E = sum_l s_l`` over [L + 1] entropies, the first feature's included; NaN if one is (:func:`lowest_if_nan`)."""
    return jnp.sum(entropies)


def progressivity(entropies: jax.Array) -> jax.Array:
    """``P = min_l (s_l - s_{l-1})`` over all L consecutive pairs of [L + 1] entropies; NaN if one is."""
    return jnp.min(jnp.diff(entropies))


def space_to_depth(x: jax.Array, stride: int) -> jax.Array:
    """[B, H, W, C] -> [B, H / stride, W / stride, stride^2 C].

    Raises:
      ConfigError: a stride that doesn't divide both sides.
    """
    batch, height, width, channels = x.shape
    if height % stride or width % stride:
        raise ConfigError(f"a block of stride {stride} on {height}x{width} pixels: the stride must divide both sides")
    x = x.reshape(batch, height // stride, stride, width // stride, stride, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // stride, width // stride, -1)


def block_singular_value(g_in: jax.Array, g_out: jax.Array) -> jax.Array:
    """The largest singular value of ``A = G_in^T G_out / N``, an estimate of the block's mean transposed Jacobian.

    Args:
      g_in: the block's VJP of ``g_out``, [B, H, W, C] or [B, L, D]. Where a strided block has fewer pixels behind it
        (stride ``int(H / H')``), :func:`space_to_depth` puts the pixels of a window into channels.
      g_out: Rademacher (+-1), [B, H', W', C'] or [B, L, D'].

    Returns:
      [] in the dtype of ``g_in``.
    """
    if g_in.shape[1:-1] != g_out.shape[1:-1]:
        g_in = space_to_depth(g_in, g_in.shape[1] // g_out.shape[1])
    g_in, g_out = (g.reshape(-1, g.shape[-1]) for g in (g_in, g_out))
    if g_in.shape[1] < g_out.shape[1]:
        # sigma(A) = sigma(A^T): the smaller side gives the Gram matrix.
        g_in, g_out = g_out, g_in
    a = jnp.matmul(g_in.T, g_out, precision=HIGHEST) / g_in.shape[0]
    return jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(jnp.matmul(a.T, a, precision=HIGHEST))[-1], 0))


def is_identity(g_in: jax.Array, g_out: jax.Array) -> jax.Array:
    """Whether a block hands ``g_out`` through exactly, bool []; of other shapes, never."""
    if g_in.shape != g_out.shape:
        return jnp.zeros((), bool)
    return jnp.all(g_in == g_out)


def trainability(sigma: jax.Array, identical: jax.Array, *, leave_out: bool = False) -> jax.Array:
    """``T = mean_l t_l``, ``t_l = 2 - sigma_l - 1 / (sigma_l + 1e-6)``: near 0 where blocks keep the size of gradients.

    Args:
      sigma: [L]. A zero gives ``2 - 1e6``: cells without a path are far below all others, but above the next.
      identical: bool [L]: such a block (a cell that is one skip connection) has ``t_l = -inf`` and so has T.
      leave_out: leave such blocks out of the mean instead, as the official code does for vision transformers.

    Returns:
      [] in the dtype of ``sigma``.

    Source: official code; the paper's equation has neither the 1e-6 nor the guard.
    """
    values = 2 - sigma - 1 / (sigma + 1e-6)
    if leave_out:
        return jnp.mean(values, where=~identical)
    return jnp.mean(jnp.where(identical, -jnp.inf, values))


def lowest_if_nan(score: jax.Array) -> jax.Array:
    """-inf for NaN: a proxy without a value ranks last."""
    return jnp.where(jnp.isnan(score), -jnp.inf, score)


def block_statistics(
    block: Callable[[jax.Array], jax.Array], features: jax.Array, probe: jax.Array, *, clamp: bool = True
) -> BlockStatistics:
    """Runs one block and takes what the proxies need from it: its own VJP, never a chain through the network.

    Args:
      block: ``f_{l-1} -> f_l``, differentiable; batch statistics are part of it, so samples of a batch couple.
      features: ``f_{l-1}``.
      probe: Rademacher (+-1), the shape of ``f_l``.
      clamp: of :func:`spectrum_entropy`.
    """
    output, pull_back = jax.vjp(block, features)
    probe = probe.astype(output.dtype)
    (g_in,) = pull_back(probe)
    return BlockStatistics(
        output, spectrum_entropy(output, clamp=clamp), block_singular_value(g_in, probe), is_identity(g_in, probe)
    )


def summarise(entropies: jax.Array, sigma: jax.Array, identical: jax.Array) -> dict[str, jax.Array]:
    """The proxies of one candidate by name, each float32 [], -inf instead of NaN.

    Args:
      entropies: [L + 1].
      sigma: [L].
      identical: bool [L].
    """
    scores = {
        "expressivity": expressivity(entropies),
        "progressivity": progressivity(entropies),
        "trainability": trainability(sigma, identical),
    }
    return {name: lowest_if_nan(score) for name, score in scores.items()}
