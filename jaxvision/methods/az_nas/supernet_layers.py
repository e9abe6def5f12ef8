"""The layers of :mod:`supernet`: an edge whose operation is data, with a backward pass written by hand, and the
reduction block.

XLA on CPU runs the convolution for an input's gradient many times slower where autodiff makes it inside a conditional,
as the flip of the kernel stays inside the convolution. So each operation brings its own backward pass, in which the
kernel is flipped outside. Forward-mode differentiation of that backward pass (Hessian-vector products) is JAX's own.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxvision.methods.az_nas import nb201_cell

BATCH, GIVEN, OFF = "batch", "given", "off"
"""Whose statistics normalise: the batch's, those handed in, or nobody's (SynFlow)."""

Moments = tuple[jax.Array, jax.Array]
"""Mean and biased variance, float32 [C]."""


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """3x3 convolution, padding 1, [B, H, W, C] with [3, 3, C, D].

    As a product of matrices where that is faster on CPU: twice at 8 channels, ten times at 2 x 2 pixels.
    """
    if stride == 1 and (x.shape[1] <= 2 or x.shape[-1] <= 8):
        return _patches(x) @ kernel.reshape(-1, kernel.shape[-1])
    return nb201_cell.convolve(x, kernel, stride)


def _patches(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H, W, 9 C], each pixel's 3x3 surroundings in the order of a kernel [3, 3, C, ...]."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=-1)


def _kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """The gradient of a 3x3 kernel, [3, 3, C, D], from the input [B, H, W, C] and the output's gradient [..., D]."""
    gradient = jnp.einsum("bhwc,bhwd->cd", _patches(x), g)
    return gradient.reshape(3, 3, x.shape[-1], g.shape[-1])


def moments(x: jax.Array) -> Moments:
    """Of all axes but the last; the variance about the mean (``E[x^2] - E[x]^2`` cancels)."""
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    return mean, jnp.mean(jnp.square(x - mean), axes)


def normalise(x: jax.Array, given: Moments, statistics: str) -> tuple[jax.Array, Moments]:
    """``(x - mean) / sqrt(var + eps)`` and the moments, by whose statistics it says."""
    if statistics == OFF:
        return x, given
    mean, var = moments(x) if statistics == BATCH else given
    return (x - mean) * jax.lax.rsqrt(var + nb201_cell.EPS), (mean, var)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def edge(
    x: jax.Array, kernel: jax.Array, operation: jax.Array, given: Moments, statistics: str
) -> tuple[jax.Array, Moments]:
    """What an operation makes of a node, convolutions normalised but not yet scaled and shifted.

    ``none``: zeros; ``skip_connect``: x; convolution: ``norm(conv(relu(x)))``; ``avg_pool_3x3``: means over the pixels
    there are. Backward with y the normalised output and r = 1 / sqrt(var + eps):
    ``r (g - mean(g) - y mean(g y))`` through the normalisation, ``relu'(0) = 0``.

    Args:
      x: float32 [B, H, W, C].
      kernel: float32 [3, 3, C, C]; ``conv_1x1`` uses its middle alone, and the gradient elsewhere is zero.
      operation: int32 [], may be traced: one program for all.
      given: moments for ``statistics="given"``; handed through where nothing is normalised.
      statistics: "batch", "given" (without gradients) or "off".

    Returns:
      float32 [B, H, W, C], and the moments that normalised; constants to a gradient.
    """
    return _edge(x, kernel, operation, given, statistics)


def _edge(x, kernel, operation, given, statistics):
    def none():
        return jnp.zeros_like(x), given

    def skip():
        return x, given

    def conv_1x1():
        return normalise(jax.nn.relu(x) @ kernel[1, 1], given, statistics)

    def conv_3x3():
        return normalise(convolve(jax.nn.relu(x), kernel), given, statistics)

    def pool():
        return nb201_cell.pool(x), given

    return jax.lax.switch(operation, (none, skip, conv_1x1, conv_3x3, pool))


def _edge_forward(x, kernel, operation, given, statistics):
    out, (mean, var) = _edge(x, kernel, operation, given, statistics)
    return (out, (mean, var)), (x, kernel, operation, given, out, var)


def _edge_backward(statistics: str, residuals: Any, cotangents: Any):
    x, kernel, operation, given, out, var = residuals
    g = cotangents[0]

    def through_norm():
        if statistics == OFF:
            return g
        return nb201_cell.normalise_vjp(g, nb201_cell.Residual(out, jax.lax.rsqrt(var + nb201_cell.EPS)))

    def none():
        return jnp.zeros_like(x), jnp.zeros_like(kernel)

    def skip():
        return g, jnp.zeros_like(kernel)

    def conv_1x1():
        inner = through_norm()
        middle = jnp.einsum("bhwc,bhwd->cd", jax.nn.relu(x), inner)
        return (inner @ kernel[1, 1].T) * (x > 0), jnp.zeros_like(kernel).at[1, 1].set(middle)

    def conv_3x3():
        inner = through_norm()
        return convolve(inner, nb201_cell.transposed_kernel(kernel)) * (x > 0), _kernel_gradient(jax.nn.relu(x), inner)

    def pool():
        return nb201_cell.pool_vjp(g), jnp.zeros_like(kernel)

    to_x, to_kernel = jax.lax.switch(operation, (none, skip, conv_1x1, conv_3x3, pool))
    return to_x, to_kernel, None, jax.tree.map(jnp.zeros_like, given)


edge.defvjp(_edge_forward, _edge_backward)
