"""Batch normalisations folded into the integer layers before them: one multiplication and one sum a channel.

    integers = fold(network, convert(network, variables), image)
    logits = network.apply(integers, images)                        # the same, to float rounding

With f = scale / sqrt(var + eps) a layer's ``kernel_step`` (and bias) is multiplied by f, and of its normalisation only
``bias``, now ``bias - mean f``, is left: ``y = f step s_in sum (c_in - zero) codes + bias``. This is what a network
whose quantizers drop the scale of the weights (TRS: codes / 2^(b-1)) was trained for.

A layer is folded where its output goes into a batch normalisation and nowhere else, which one trace of the network
tells.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxprs_in_params

from jaxvision.core import trees
from jaxvision.models.layers import BatchNorm, Conv, Dense
from jaxvision.models.patches import PatchEmbed
from jaxvision.models.quantized import QuantizedNetwork

MARK = "output of "


def fold(network: QuantizedNetwork, integers: Any, image: Any) -> Any:
    """``integers`` (of ``integer_network.convert``) with every normalisation folded that can be.

    Args:
      network, integers: the network and its converted variables.
      image: an example or its shape, [1, H, W, C].
    """
    leaves = dict(trees.named_leaves(integers))
    for layer, (norm, eps) in followers(network.module, image).items():
        kernel = leaves.get(f"params/{layer}/kernel")
        if kernel is None or not jnp.issubdtype(kernel.dtype, jnp.integer) or f"params/{norm}/scale" not in leaves:
            continue
        mean, var = (leaves.pop(f"batch_stats/{norm}/{name}") for name in ("mean", "var"))
        factor = leaves.pop(f"params/{norm}/scale") * jax.lax.rsqrt(jnp.asarray(var) + eps)
        for name in (f"params/{layer}/kernel_step", f"params/{layer}/bias"):
            if name in leaves:
                leaves[name] = leaves[name] * factor
        leaves[f"params/{norm}/bias"] = leaves[f"params/{norm}/bias"] - mean * factor
    return trees.nested(leaves)


def followers(module: nn.Module, image: Any) -> dict[str, tuple[str, float]]:
    """Layer -> name and eps of the batch normalisation that is the only one to read its output."""
    outputs: dict[str, jax.Array] = {}
    found: dict[str, tuple[str, float]] = {}

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer, name = context.module, "/".join(context.module.path)
        if context.method_name == "__call__" and isinstance(layer, BatchNorm):
            before = next((other for other, output in outputs.items() if output is args[0]), None)
            if before is not None:
                found[before] = name, layer.eps
        y = call(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(layer, Conv | Dense | PatchEmbed):
            y = outputs[name] = checkpoint_name(y, MARK + name)
        return y

    shapes = jax.eval_shape(module.init, jax.eval_shape(lambda: jax.random.key(0)), image)
    with nn.intercept_methods(watch):
        traced = jax.make_jaxpr(module.apply)(shapes, image).jaxpr
    uses = dict(_uses(traced))
    return {layer: norm for layer, norm in found.items() if uses.get(layer) == 1}


def _uses(jaxpr: Any) -> Iterator[tuple[str, int]]:
    """How often each marked output is read."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name" and equation.params["name"].startswith(MARK):
            (output,) = equation.outvars
            readers = [variable for other in jaxpr.eqns for variable in other.invars] + list(jaxpr.outvars)
            yield equation.params["name"].removeprefix(MARK), sum(variable is output for variable in readers)
        for inner in jaxprs_in_params(equation.params):
            yield from _uses(inner)
