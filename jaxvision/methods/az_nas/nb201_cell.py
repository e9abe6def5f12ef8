"""A NAS-Bench-201 cell whose operations are data, its VJP by hand, and the reduction block.

Scales are 1 and biases 0 in a fresh network, so that a normalisation's output is its own x-hat. Two ways of computing
an edge, equal numerically: ``switched`` runs the one operation that the edge has (one architecture at a time);
``merged`` runs all of them and masks, which vmaps into batched kernels.

The VJP is written out because automatic differentiation inside a conditional makes XLA:CPU run the convolution for
the input's gradient 17 times slower, and keeps the residuals of every branch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxvision.models.layers import avg_pool
from jaxvision.models.nas_bench_201 import AVG_POOL, CONV_1X1, CONV_3X3, EDGES, SKIP

EPS = 1e-5


class Residual(NamedTuple):
    """What an edge's backward pass needs beside its input: the normalised output and 1 / its deviation, [C]."""

    output: jax.Array
    rate: jax.Array


Forward = Callable[[jax.Array, jax.Array, jax.Array], Residual]
Backward = Callable[[jax.Array, jax.Array, jax.Array, Residual, jax.Array], jax.Array]


# --- operations ----------------------------------------------------------------------------------------------------


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """[B, H, W, C] with [k, k, C, C'], PyTorch's padding ``k // 2``."""
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def normalise(x: jax.Array, eps: float = EPS) -> Residual:
    """Batch normalisation with the batch's mean and biased variance, the variance about the mean."""
    centred = x - jnp.mean(x, (0, 1, 2))
    rate = lax.rsqrt(jnp.mean(jnp.square(centred), (0, 1, 2)) + eps)
    return Residual(centred * rate, rate)


def normalise_vjp(g: jax.Array, normalised: Residual) -> jax.Array:
    """``r (g - mean g - y mean(g y))``: the statistics are part of what is differentiated."""
    output, rate = normalised
    return rate * (g - jnp.mean(g, (0, 1, 2)) - output * jnp.mean(g * output, (0, 1, 2)))


def box_sum(x: jax.Array) -> jax.Array:
    """The sum over 3x3 pixels with zeros outside; shifted sums, 14 times as fast on CPU as ``reduce_window``."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    return x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]


def pool(x: jax.Array) -> jax.Array:
    """3x3 average that doesn't count padding."""
    return box_sum(x) / _pixels(x)


def pool_vjp(g: jax.Array) -> jax.Array:
    """The transpose of :func:`pool`."""
    return box_sum(g / _pixels(g))


def _pixels(x: jax.Array) -> jax.Array:
    """How many pixels a 3x3 window has: 4 in corners, 6 at borders, 9 inside; [1, H, W, 1]."""
    return box_sum(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


def transposed_kernel(kernel: jax.Array) -> jax.Array:
    """The kernel that a stride-1 convolution's VJP convolves with; explicit, so that XLA takes its fast path."""
    return jnp.flip(kernel, (0, 1)).swapaxes(2, 3)


def _relu_vjp(g: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, g, 0)


def _centre(kernel: jax.Array) -> jax.Array:
    """A 1x1 convolution's kernel: the centre of the edge's 3x3 numbers."""
    return kernel[1:2, 1:2]


# --- an edge -------------------------------------------------------------------------------------------------------


def switched(operation: jax.Array, x: jax.Array, kernel: jax.Array) -> Residual:
    """An edge's output: ``operation`` int32 [], ``x`` [B, H, W, C], ``kernel`` [3, 3, C, C]."""
    no_rate = jnp.zeros(x.shape[-1], x.dtype)
    branches = (
        lambda: Residual(jnp.zeros_like(x), no_rate),
        lambda: Residual(x, no_rate),
        lambda: normalise(convolve(jax.nn.relu(x), _centre(kernel))),
        lambda: normalise(convolve(jax.nn.relu(x), kernel)),
        lambda: Residual(pool(x), no_rate),
    )
    return lax.switch(operation, branches)


def switched_vjp(operation: jax.Array, g: jax.Array, x: jax.Array, saved: Residual, kernel: jax.Array) -> jax.Array:
    """The gradient of an edge's input for ``g`` of its output."""

    def convolution(kernel: jax.Array) -> jax.Array:
        return _relu_vjp(convolve(normalise_vjp(g, saved), transposed_kernel(kernel)), x)

    branches = (
        lambda: jnp.zeros_like(x),
        lambda: g,
        lambda: convolution(_centre(kernel)),
        lambda: convolution(kernel),
        lambda: pool_vjp(g),
    )
    return lax.switch(operation, branches)


class MergedResidual(NamedTuple):
    """Of a merged edge: its output, and its convolution's."""

    output: jax.Array
    convolution: Residual


def merged(operation: jax.Array, x: jax.Array, kernel: jax.Array) -> MergedResidual:
    """:func:`switched` without a conditional: one 3x3 convolution, one pooling, masks."""
    convolution = normalise(convolve(jax.nn.relu(x), _merged_kernel(operation, kernel)))
    convolves, skips, pools = _masks(operation, x.dtype)
    return MergedResidual(convolves * convolution.output + skips * x + pools * pool(x), convolution)


def merged_vjp(operation: jax.Array, g: jax.Array, x: jax.Array, saved: MergedResidual, kernel: jax.Array) -> jax.Array:
    """:func:`switched_vjp` without a conditional."""
    transposed = transposed_kernel(_merged_kernel(operation, kernel))
    convolution = _relu_vjp(convolve(normalise_vjp(g, saved.convolution), transposed), x)
    convolves, skips, pools = _masks(operation, g.dtype)
    # Exact for an edge that skips: 1 g + 0 h with a finite h.
    return convolves * convolution + skips * g + pools * pool_vjp(g)


def _merged_kernel(operation: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 1x1 kernel as a 3x3 with zeros around it; no convolution, no kernel."""
    centre = jnp.zeros((3, 3, 1, 1), kernel.dtype).at[1, 1].set(1)
    mask = jnp.where(operation == CONV_3X3, 1, jnp.where(operation == CONV_1X1, centre, 0))
    return kernel * mask


def _masks(operation: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    convolves = (operation == CONV_1X1) | (operation == CONV_3X3)
    return convolves.astype(dtype), (operation == SKIP).astype(dtype), (operation == AVG_POOL).astype(dtype)


# --- blocks --------------------------------------------------------------------------------------------------------


def cell(
    operations: jax.Array, x: jax.Array, kernels: jax.Array, probe: jax.Array, *, merge: bool = False
) -> tuple[jax.Array, jax.Array]:
    """A cell's output, and its VJP of ``probe``.

    Args:
      operations: int32 [6].
      x: [B, H, W, C].
      kernels: [6, 3, 3, C, C]; of a 1x1 convolution the centre, of other operations nothing is used.
      probe: [B, H, W, C].
      merge: ``merged`` edges instead of ``switched`` ones.
    """
    forward, backward = (merged, merged_vjp) if merge else (switched, switched_vjp)
    nodes, saved = [x, None, None, None], []
    for edge, (node, source) in enumerate(EDGES):
        saved.append(forward(operations[edge], nodes[source], kernels[edge]))
        output = saved[-1].output
        nodes[node] = output if nodes[node] is None else nodes[node] + output
    gradients = [None, None, None, probe]
    for edge, (node, source) in reversed(list(enumerate(EDGES))):
        g = backward(operations[edge], gradients[node], nodes[source], saved[edge], kernels[edge])
        gradients[source] = g if gradients[source] is None else gradients[source] + g
    return nodes[-1], gradients[0]


def reduction(x: jax.Array, conv_a: jax.Array, conv_b: jax.Array, shortcut: jax.Array) -> jax.Array:
    """The residual block between two stages, stride 2: [B, H, W, C] -> [B, H / 2, W / 2, 2 C]."""
    y = normalise(convolve(jax.nn.relu(x), conv_a, 2)).output
    y = normalise(convolve(jax.nn.relu(y), conv_b)).output
    return y + convolve(avg_pool(x, 2), shortcut)
