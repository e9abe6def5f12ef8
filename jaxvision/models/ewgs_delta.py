"""EWGS's deltas of a whole network from the curvature of its loss (Lee et al., CVPR 2021, section 3.3).

They are data, the collection ``delta``: float32 [2] a layer (weight, input), so that new ones compile nothing anew.

    variables = {**variables, DELTA: start(network, variables, 1e-3)}
    ratios = measure(network, variables, loss, images, key)      # a batch's; delta = max(0, mean over batches)

The official code estimates one tensor after the other; here one random vector serves all tensors at once, whose cross
terms have mean 0: two tensors a layer cost what one costs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxvision.core import trees
from jaxvision.models.quantized import Bits, LayerQuant, QuantizedNetwork
from jaxvision.models.quantized_layer import DELTA, Interceptor
from jaxvision.quant.ewgs import MAX_DRAWS, TOLERANCE, curvature_ratio, hessian_traces

ROLES = {"kernel": 2.0, "input": 1.0}
"""Role -> derivative of the quantized operand by the rounded value in [0, 1], which delta is defined for."""


def start(network: QuantizedNetwork, params: Any, delta: float) -> Any:
    """The collection with one value for all tensors of the layers that have EWGS's quantizers; {} where none has."""
    return _tree({name: jnp.full(2, delta, jnp.float32) for name in _kernels(network, params)})


def measure(
    network: QuantizedNetwork,
    variables: Any,
    loss: Callable[[Any], jax.Array],
    images: jax.Array,
    key: jax.Array,
    *,
    max_draws: int = MAX_DRAWS,
    tolerance: float = TOLERANCE,
) -> Any:
    """``tr(H) / (n 3 std(g))`` of every tensor on one batch, a tree like the collection; may be negative.

    Args:
      network, variables: batch statistics are used in training mode and not moved.
      loss: maps the network's outputs to a float32 ().
      images: float32 [B, H, W, C].
      key: typed key.
      max_draws, tolerance: of :func:`jaxvision.quant.ewgs.hessian_traces`.
    """
    kernels = _kernels(network, variables["params"])
    mutable = [name for name in variables if name not in ("params", DELTA)]

    def fake(name: str) -> LayerQuant | None:
        """Float operands on the grid, whatever trains the network: only they can be moved off it."""
        layer = network.find(name)
        bits = None if layer is None else Bits(layer.bits.weight, layer.bits.input)
        return None if layer is None else dataclasses.replace(layer, bits=bits, execution="fake")

    def run(probes: Any) -> tuple[jax.Array, Interceptor]:
        seen = Interceptor(fake, operands=probes)
        with network.intercepting(seen):
            rngs = {"dropout": jax.random.fold_in(key, 1)}
            outputs, _ = network.module.apply(variables, images, train=True, mutable=mutable, rngs=rngs)
        return loss(outputs), seen

    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    jax.eval_shape(lambda: shapes.update(run({})[1].operands))
    wanted = {f"{name}:{role}" for name in kernels for role in ROLES} & shapes.keys()
    zeros = {name: jnp.zeros(shapes[name].shape, shapes[name].dtype) for name in sorted(wanted)}
    gradient = jax.grad(lambda probes: run(probes)[0])
    traces = hessian_traces(gradient, zeros, jax.random.fold_in(key, 0), max_draws=max_draws, tolerance=tolerance)
    ratios = jax.tree.map(curvature_ratio, traces, gradient(zeros))
    # With d the derivative the trace grows by d^2 and the gradient by d.
    none = jnp.zeros((), jnp.float32)
    return _tree(
        {name: jnp.stack([ROLES[role] * ratios.get(f"{name}:{role}", none) for role in ROLES]) for name in kernels}
    )


def _kernels(network: QuantizedNetwork, params: Any) -> list[str]:
    found = []
    for name in network.layers(params):
        layer = network.find(name)
        kinds = [recipe.kind for recipe in (layer.weight, layer.input) if recipe is not None]
        if any(hasattr(kind, "delta") for kind in kinds):
            found.append(name)
    return found


def _tree(values: dict[str, Any]) -> Any:
    return trees.nested({f"{name.removesuffix('kernel')}delta": value for name, value in values.items()})
