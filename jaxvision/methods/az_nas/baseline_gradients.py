"""Older proxies that need gradients, as functions of the supernet's parameters, the architecture and a batch.

Notation: L is the mean cross-entropy of the first batch, W the weights of convolutions and of the linear layer (no
biases, no normalisations). Normalisations take the batch's statistics. Slots without a weight have weight and gradient
zero, so sums over W may run over all slots. All functions can be traced, with the architecture traced as well.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxvision.core import trees
from jaxvision.methods.az_nas import supernet
from jaxvision.methods.az_nas.supernet_init import Params

Leaves = dict[str, jax.Array]


def grad_norm(params: Params, architecture: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    """``sqrt(sum |dL/dp|^2)`` over all parameters, those of normalisations and biases included (Abdelfattah et al.).

    Args:
      params: as ``supernet_init.init`` makes them.
      architecture: int32 [6].
      images: float32 [>= 1, B, H, W, C], the first is used.
      labels: int32 [>= 1, B].

    Returns:
      float32 [].
    """
    gradients = jax.grad(_loss)(trees.named_leaves(params), architecture, images[0], labels[0])
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in gradients.values()))


def snip(params: Params, architecture: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    """``sum_W |w dL/dw|`` (Lee et al. 2019); shapes as :func:`grad_norm`."""
    weights, gradient = _of_weights(params, architecture)
    gradients = gradient(weights, images[0], labels[0])
    return sum(jnp.sum(jnp.abs(weights[name] * gradients[name])) for name in weights)


def grasp(params: Params, architecture: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    """``-sum_W w (H g)`` with ``g = dL/dW`` and the Hessian H over W (Wang et al. 2020); shapes as :func:`grad_norm`.

    Temperature 1. H g is the derivative of the gradient along g, forward over reverse.
    """
    weights, gradient = _of_weights(params, architecture)
    along = lambda w: gradient(w, images[0], labels[0])  # noqa: E731
    _, products = jax.jvp(along, (weights,), (along(weights),))
    return -sum(jnp.vdot(weights[name], products[name]) for name in weights)


def synflow(
    params: Params, architecture: jax.Array, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``R = sum_W |w dR/dw|`` with R the sum of the logits of one image of ones, all parameters replaced by their
    absolute values and no normalisations (Tanaka et al. 2020).

    R reaches 1e60 and more. Activations are divided by their largest value after each cell, by constants to the
    gradient, and the logarithm of their product is kept: float32 suffices.

    Args:
      params, architecture: as in :func:`grad_norm`.
      images: float32 [>= 1, B, H, W, C], for the shape alone.
      labels: ignored.

    Returns:
      float32 [] m and l of the score ``m exp(l)``.
    """
    ones = jnp.ones_like(images[0, :1])
    leaves = jax.tree.map(jnp.abs, trees.named_leaves(params))

    def flow(weights: Leaves) -> tuple[jax.Array, jax.Array]:
        out = supernet.apply(trees.nested(leaves | weights), architecture, ones, normalised=False)
        return jnp.sum(out.logits), out.log_scale

    weights = _kernels(leaves)
    gradients, log_scale = jax.grad(flow, has_aux=True)(weights)
    return sum(jnp.vdot(weights[name], jnp.abs(gradients[name])) for name in weights), log_scale


def gradsign(params: Params, architecture: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    """``sum_W |sum_i sign(dL_i/dw)|``, samples i one at a time, normalised over the pixels of one image (Zhang and Jia
    2022); shapes as :func:`grad_norm`.

    To be divided by ``supernet_init.weights_of_supernet``, as behind the paper's table, or by ``weights_of``.
    """
    weights, gradient = _of_weights(params, architecture)

    def add(total: Leaves, sample: tuple[jax.Array, jax.Array]) -> tuple[Leaves, None]:
        image, label = sample
        gradients = gradient(weights, image[None], label[None])
        return {name: total[name] + jnp.sign(gradients[name]) for name in total}, None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, weights), (images[0], labels[0]))
    return sum(jnp.sum(jnp.abs(leaf)) for leaf in total.values())


def zico(params: Params, architecture: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    """``sum_layers ln( sum_j mean_b |g_bj| / std_b(g_bj) )`` over two batches b (Li et al. 2023).

    j runs over the weights of a layer; the deviation divides by 2. Weights whose gradient doesn't vary are left out,
    and layers of which nothing is left.

    Args:
      params, architecture: as in :func:`grad_norm`.
      images: float32 [>= 2, B, H, W, C].
      labels: int32 [>= 2, B].

    Returns:
      float32 [].
    """
    weights, gradient = _of_weights(params, architecture)
    # A loop, so that the network is compiled once.
    both = jax.lax.map(lambda batch: gradient(weights, *batch), (images[:2], labels[:2]))

    def layers(name: str, g: jax.Array) -> jax.Array:
        deviation = jnp.abs(g[0] - g[1]) / 2
        varies = deviation > 0
        ratio = jnp.where(varies, jnp.mean(jnp.abs(g), 0) / jnp.where(varies, deviation, 1), 0)
        total = jnp.sum(ratio, axis=(2, 3, 4, 5) if name.startswith("stage") else None)
        return jnp.sum(jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)), 0))

    return sum(layers(name, g) for name, g in both.items())


def ntk(params: Params, architecture: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    """TE-NAS's kernel ``J J^T``, float32 [B, B]: row i of J is the gradient of the sum of image i's logits with respect
    to W and the scales of the normalisations (Chen et al. 2021); shapes as :func:`grad_norm`, labels ignored.
    """
    leaves = trees.named_leaves(params)
    wanted = {name: leaf for name, leaf in leaves.items() if not name.endswith("bias")}

    def sums(wanted: Leaves) -> jax.Array:
        return jnp.sum(supernet.apply(trees.nested(leaves | wanted), architecture, images[0]).logits, -1)

    out, pull = jax.vjp(sums, wanted)
    rows = jax.lax.map(lambda one: pull(one)[0], jnp.eye(len(out), dtype=out.dtype))
    flat = (leaf.reshape(len(out), -1) for leaf in rows.values())
    return sum(jnp.matmul(leaf, leaf.T, precision="highest") for leaf in flat)


def _loss(leaves: Leaves, architecture: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    logits = supernet.apply(trees.nested(leaves), architecture, images).logits
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _of_weights(params: Params, architecture: jax.Array) -> tuple[Leaves, Callable[..., Leaves]]:
    """W by name, and ``(W, images, labels) -> dL/dW``."""
    leaves = trees.named_leaves(params)

    def loss(weights: Leaves, images: jax.Array, labels: jax.Array) -> jax.Array:
        return _loss(leaves | weights, architecture, images, labels)

    return _kernels(leaves), jax.grad(loss)


def _kernels(leaves: Leaves) -> Leaves:
    return {name: leaf for name, leaf in leaves.items() if name.endswith("kernel")}
