"""The interval searches of PTQ4ViT as functions of arrays: linear layers, q k^T, and attention times values.

All quantizers here are symmetric and signed, ``x_hat = s * clip(round(x / s), -2^(b-1), 2^(b-1) - 1)``. A scale is
searched among ``f_i * absmax / (2^(b-1) - 0.5)``, ``f_i = alpha + i (beta - alpha) / steps``. The official code
prepares ``steps + 1`` candidates and looks at the first ``steps``, so beta itself is never tried; so here.
The score of a candidate is

- ``hessian``: ``-mean((g * (y - y_hat))^2)`` with ``g = dL/dy``,
- ``cosine``: the mean over tokens of the cosine between ``y`` and ``y_hat`` along the features.

Operands are searched in turn, ``rounds`` times. When a round leaves the second scale as it was, all later rounds
would repeat it, so they are skipped: the result is the same. Source: official code, ``quant_layers``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.quant import log

GELU_MINIMUM = 0.16997124254703522
"""Minus the least value of GELU: the negative range of the twin quantizer ends there."""
SPLITS = tuple(2.0**-i for i in range(20))


@dataclass(frozen=True)
class Search:
    """``lowest`` and ``highest`` factor (alpha, beta), their number, the alternations, the metric."""

    lowest: float = 0.01
    highest: float = 1.2
    steps: int = 100
    rounds: int = 3
    metric: str = "hessian"

    def factors(self) -> np.ndarray:
        """float32 [steps]."""
        grid = [self.lowest + i * (self.highest - self.lowest) / self.steps for i in range(self.steps)]
        return np.asarray(grid, np.float32)


PTQ4VIT = Search()
BASE_PTQ = Search(lowest=0.5, rounds=1, metric="cosine")


# Accelerators round float32 operands by default, which is too coarse to tell candidates apart at 8 bits.
_matmul = partial(jnp.matmul, precision="highest")


def _half(bits: jax.Array | int) -> jax.Array:
    return jnp.ldexp(jnp.float32(1), jnp.asarray(bits, jnp.int32) - 1)


def symmetric_quantize(x: jax.Array, scale: jax.Array, bits: jax.Array | int) -> jax.Array:
    """``s * clip(round(x / s), -2^(b-1), 2^(b-1) - 1)``; ``scale`` broadcasts against x."""
    half = _half(bits)
    return jnp.clip(jnp.round(x / scale), -half, half - 1) * scale


def _largest_scale(magnitude: jax.Array, bits: jax.Array | int) -> jax.Array:
    return jnp.maximum(magnitude / (_half(bits) - 0.5), 1e-8)


def blockwise_quantize(kernel: jax.Array, scale: jax.Array, bits: jax.Array | int) -> jax.Array:
    """Quantizes a kernel [C, D] whose D outputs are cut into ``len(scale)`` equal consecutive blocks."""
    blocks = kernel.reshape(kernel.shape[0], scale.shape[0], -1)
    return symmetric_quantize(blocks, scale[:, None], bits).reshape(kernel.shape)


def _score(y: jax.Array, y_hat: jax.Array, g: jax.Array, metric: str) -> jax.Array:
    """Per token [..., features] -> [...]; the larger the better."""
    if metric == "hessian":
        return -jnp.mean(jnp.square(g * (y - y_hat)), -1)
    lengths = [jnp.maximum(jnp.linalg.norm(v, axis=-1), 1e-8) for v in (y, y_hat)]
    return jnp.sum(y * y_hat, -1) / (lengths[0] * lengths[1])


def _best(score: Callable[[jax.Array], jax.Array], candidates: jax.Array) -> jax.Array:
    """The candidate [S, ...] of the highest score; a score of several entries chooses for each of them.

    One candidate at a time: its output stays in the cache (faster on a CPU than any batch), and memory is that of one.
    """
    candidates = jnp.asarray(candidates)
    best = jnp.argmax(jax.lax.map(score, candidates), axis=0)
    return candidates[best] if candidates.ndim == 1 else jnp.take_along_axis(candidates, best[None], 0)[0]


def _alternate(
    first: Callable[[jax.Array], jax.Array],
    second: Callable[[jax.Array], jax.Array],
    scales: tuple[jax.Array, jax.Array],
    rounds: int,
) -> tuple[jax.Array, jax.Array]:
    """``a = first(b); b = second(a)``, at most ``rounds`` times, until b stays as it was."""

    def unfinished(carry: tuple[jax.Array, ...]) -> jax.Array:
        return (carry[0] < rounds) & carry[1]

    def step(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        count, _, _, old = carry
        left = first(old)
        right = second(left)
        return count + 1, jnp.any(right != old), left, right

    start = (jnp.zeros((), jnp.int32), jnp.ones((), bool), *scales)
    return jax.lax.while_loop(unfinished, step, start)[2:]


def input_quantize(x: jax.Array, scale: jax.Array, bits: jax.Array | int, form: str) -> jax.Array:
    """The input quantizer of a linear layer: ``form`` "symmetric", "twin_gelu", or "float" (none)."""
    if form == "float":
        return x
    if form == "symmetric":
        return symmetric_quantize(x, scale, bits)
    return log.twin_gelu_quantize(x, scale, GELU_MINIMUM / _half(bits), bits)


@partial(jax.jit, static_argnames=("search", "blocks", "form"))
def search_linear(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    g: jax.Array,
    weight_bits: jax.Array | int,
    input_bits: jax.Array | int,
    *,
    search: Search = PTQ4VIT,
    blocks: int = 1,
    form: str = "symmetric",
) -> tuple[jax.Array, jax.Array]:
    """Scales of one linear layer ``y = x kernel + bias``.

    Args:
      x: [T, C] float inputs, all tokens of all images.
      kernel: [C, D]; bias: [D] (zeros where the layer has none).
      g: [T, D], dL/dy; not looked at with the cosine metric.
      weight_bits, input_bits: int or int32 scalars.
      search: the grid, static.
      blocks: row blocks of the weight with a scale each: 3 for qkv, D for a patch embedding.
      form: input quantizer, see :func:`input_quantize`. A twin GELU scale is searched for the positive part only.

    Returns:
      weight scales [blocks], input scale () (1 where the input stays float).
    """
    y = _matmul(x, kernel) + bias
    weight_limit = _largest_scale(jnp.abs(kernel).reshape(kernel.shape[0], blocks, -1).max((0, 2)), weight_bits)
    input_limit = _largest_scale(x.max() if form == "twin_gelu" else jnp.abs(x).max(), input_bits)
    factors = search.factors()

    def block_scores(y_hat: jax.Array, count: int) -> jax.Array:
        cut = [v.reshape(v.shape[0], count, -1) for v in (y, y_hat, g)]
        return _score(*cut, search.metric).mean(0)

    def find_weights(input_scale: jax.Array) -> jax.Array:
        x_hat = input_quantize(x, input_scale, input_bits, form)

        def score(scales: jax.Array) -> jax.Array:
            return block_scores(_matmul(x_hat, blockwise_quantize(kernel, scales, weight_bits)) + bias, blocks)

        return _best(score, factors[:, None] * weight_limit)

    def find_input(scales: jax.Array) -> jax.Array:
        if form == "float":
            return jnp.ones_like(input_limit)
        w_hat = blockwise_quantize(kernel, scales, weight_bits)

        def score(scale: jax.Array) -> jax.Array:
            return block_scores(_matmul(input_quantize(x, scale, input_bits, form), w_hat) + bias, 1)[0]

        return _best(score, factors * input_limit)

    return _alternate(find_weights, find_input, (weight_limit, input_limit), search.rounds)


def _heads(scale: jax.Array) -> jax.Array:
    return scale[:, None, None]


def _head_limit(x: jax.Array, bits: jax.Array | int) -> jax.Array:
    return _largest_scale(jnp.abs(x).max((0, 2, 3)), bits)


@partial(jax.jit, static_argnames="search")
def search_product(
    a: jax.Array, b: jax.Array, g: jax.Array, bits: jax.Array | int, *, search: Search = PTQ4VIT
) -> tuple[jax.Array, jax.Array]:
    """Scales, one a head, of both operands of ``y = a b`` (q k^T; Base PTQ's attention times values).

    Args:
      a: [B, H, N, M]; b: [B, H, M, P]; g: [B, H, N, P] = dL/dy up to a factor.
      bits: int or int32 scalar.

    Returns:
      scales of a and of b, [H] each.
    """
    y = _matmul(a, b)
    limits = _head_limit(a, bits), _head_limit(b, bits)
    factors = search.factors()[:, None]

    def score(y_hat: jax.Array) -> jax.Array:
        return _score(y, y_hat, g, search.metric).mean((0, 2))

    def find_a(scale: jax.Array) -> jax.Array:
        b_hat = symmetric_quantize(b, _heads(scale), bits)
        trial = lambda s: score(_matmul(symmetric_quantize(a, _heads(s), bits), b_hat))  # noqa: E731
        return _best(trial, factors * limits[0])

    def find_b(scale: jax.Array) -> jax.Array:
        a_hat = symmetric_quantize(a, _heads(scale), bits)
        trial = lambda s: score(_matmul(a_hat, symmetric_quantize(b, _heads(s), bits)))  # noqa: E731
        return _best(trial, factors * limits[1])

    return _alternate(find_a, find_b, limits, search.rounds)


@partial(jax.jit, static_argnames=("search", "official_sum"))
def search_attention(
    attention: jax.Array,
    v: jax.Array,
    g: jax.Array,
    bits: jax.Array | int,
    *,
    search: Search = PTQ4VIT,
    official_sum: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The split of the twin softmax quantizer and the scales of v, for ``y = attention v``.

    The split is searched with v in float (as in the official code), the scales of v with attention quantized; the
    split does not depend on v, so one round is all rounds.

    Args:
      attention: [B, H, N, M]; v: [B, H, M, d]; g: [B, H, N, d] = dL/dy.
      bits: int or int32 scalar.
      official_sum: see :func:`jaxvision.quant.log.twin_softmax_quantize`.

    Returns:
      split (), scales of v [H].
    """
    y = _matmul(attention, v)

    def quantized(split: jax.Array) -> jax.Array:
        return log.twin_softmax_quantize(attention, split, bits, official_sum)

    def split_score(split: jax.Array) -> jax.Array:
        return _score(y, _matmul(quantized(split), v), g, search.metric).mean()

    split = _best(split_score, jnp.asarray(SPLITS, jnp.float32))
    a_hat = quantized(split)

    def v_score(scale: jax.Array) -> jax.Array:
        v_hat = symmetric_quantize(v, _heads(scale), bits)
        return _score(y, _matmul(a_hat, v_hat), g, search.metric).mean((0, 2))

    return split, _best(v_score, search.factors()[:, None] * _head_limit(v, bits))
