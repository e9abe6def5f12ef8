"""What quantized training does to the weights: transitions, their distance, how far quantized weights move.

All functions take the quantizers as ``QuantizedNetwork.quantizers`` gives them: a tree like the parameters, None where
a parameter isn't quantized.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import trees
from jaxvision.metrics import Mean
from jaxvision.optim import dampening_loss, oscillation_metrics, transition_metrics
from jaxvision.quant.lsq import LSQ
from jaxvision.quant.trainable import by_bits, half, magnitude, widened
from jaxvision.quant.trs import EPSILON, TRSWeight

BINS = 41
"""Of :func:`histogram`; odd, so that one lies on the transition point."""
CONTROLLED = ("running_rate", "step_size")
METRICS = ("rate/", *(f"{name}/" for name in CONTROLLED), "weights/")
"""What the names of all metrics here start with."""


def pairs(params: Any, quantizers: Any) -> dict[str, tuple[jax.Array, Any]]:
    """The quantized kernels by name, each with its quantizer."""
    weights, treedef = jax.tree.flatten(params)
    found = zip(trees.named_leaves(params), weights, treedef.flatten_up_to(quantizers), strict=True)
    return {name: (weight, quantizer) for name, weight, quantizer in found if quantizer is not None}


def transitions(params: Any, quantizers: Any, new_params: Any, new_quantizers: Any) -> dict[str, Mean]:
    """What one step changed, as metrics.

    ``rate/<layer>``: fraction of codes that changed; ``weights/effective_step``: mean |change| of quantized weights;
    ``weights/latent_step``: mean |change| of the latent ones. The last two over all quantized weights together.

    Args:
      params, quantizers: before the step.
      new_params, new_quantizers: after it.
    """
    metrics, effective, moved = {}, [], []
    after = pairs(new_params, new_quantizers)
    for name, (weight, quantizer) in pairs(params, quantizers).items():
        new_weight, new_quantizer = after[name]
        changed = jnp.sum(quantizer.codes(weight) != new_quantizer.codes(new_weight), dtype=jnp.int32)
        metrics[f"rate/{layer_name(name)}"] = Mean.of(changed / weight.size)
        effective.append(jnp.abs(new_quantizer(new_weight) - quantizer(weight)))
        moved.append(jnp.abs(new_weight - weight))
    return {**metrics, "weights/effective_step": _mean(effective), "weights/latent_step": _mean(moved)}


def distance(params: Any, quantizers: Any) -> dict[str, Mean]:
    """``weights/distance``: mean distance of the latent weights to their next transition point, in steps of the code.

    Of TRS's quantizers alone (``TRSWeight.mean_distance_to_transition``); empty where there are none.
    """
    found = [
        (quantizer.mean_distance_to_transition(weight), weight.size)
        for weight, quantizer in pairs(params, quantizers).values()
        if isinstance(quantizer, TRSWeight)
    ]
    return {"weights/distance": Mean(sum(value * size for value, size in found), _count(found))} if found else {}


def controller(opt_state: Any, *, scheduled: bool, oscillation: bool) -> dict[str, Mean]:
    """What the detector of ``oscillation`` and (``scheduled``) the controller of transition rates hold.

    ``weights/oscillating``, ``weights/frozen``: fractions, mean over layers; ``running_rate/<layer>`` K,
    ``step_size/<layer>`` U; ``weights/limited``: fraction of layers whose U is held at a limit.
    """
    seen = oscillation_metrics(opt_state) if oscillation else {}
    if scheduled:
        seen |= transition_metrics(opt_state)
    metrics = {
        f"{quantity}/{layer_name(name)}": Mean.of(value)
        for quantity, name, value in _split(seen)
        if quantity in CONTROLLED
    }
    for quantity in ("oscillating", "frozen", "limited"):
        values = [value for found, _, value in _split(seen) if found == quantity]
        if values:
            metrics[f"weights/{quantity}"] = Mean.of(jnp.stack(values).astype(jnp.float32))
    return metrics


def _split(seen: Mapping[str, jax.Array]) -> list[tuple[str, str, jax.Array]]:
    return [(*name.split("/", 1), value) for name, value in seen.items()]


def layer_name(kernel: str) -> str:
    """``layer1_0.conv1`` for ``layer1_0/conv1/kernel``."""
    return kernel.removesuffix("kernel").strip("/").replace("/", ".")


def position(weight: jax.Array, quantizer: TRSWeight) -> jax.Array:
    """Latent weights relative to the next transition point, in steps of the code; float32 of the weight's shape.

    Within [-1/2, 1/2] between the outermost levels (one bit: within [-1, 1], the transition point is w = 0); beyond
    them a weight is as far as it lies.
    """
    levels = half(quantizer.bits, jnp.float32)
    unit = widened(weight) / (magnitude(quantizer.scale) + EPSILON)
    outermost = levels - 1.5

    def between() -> jax.Array:
        value = levels * unit
        return value - jnp.clip(jnp.floor(value) + 0.5, 0.5 - levels, outermost)

    return by_bits(quantizer.bits, lambda: unit, between)


def histogram(params: Any, quantizers: Any) -> dict[str, jax.Array]:
    """Counts int32 [BINS] of :func:`position` in [-1, 1] for each layer with a TRS quantizer; others are left out."""
    counts = {}
    for name, (weight, quantizer) in pairs(params, quantizers).items():
        if isinstance(quantizer, TRSWeight):
            where = jnp.floor((position(weight, quantizer) + 1) / 2 * BINS)
            inside = jnp.clip(where, 0, BINS - 1).astype(jnp.int32)
            counts[layer_name(name)] = jnp.bincount(inside.ravel(), length=BINS).astype(jnp.int32)
    return counts


def bin_centres() -> np.ndarray:
    """float [BINS], in steps of the code."""
    edges = np.linspace(-1, 1, BINS + 1)
    return (edges[1:] + edges[:-1]) / 2


def dampening(params: Any, quantizers: Any) -> jax.Array:
    """``|| sg(w_hat) - clip(w) ||^2`` on the scale of the weights, summed over all quantized kernels; float32 ()."""
    total = jnp.zeros((), jnp.float32)
    for weight, quantizer in pairs(params, quantizers).values():
        step = quantizer.step() * scale_of_output(quantizer)
        low, high = _code_range(quantizer)
        total += dampening_loss(weight, quantizer.codes(weight) * step, low * step, high * step)
    return total


def scale_of_output(quantizer: TRSWeight | LSQ) -> jax.Array | float:
    """What a quantized weight is multiplied by to lie on the scale of the latent ones; float32 () or 1."""
    return magnitude(quantizer.scale) if isinstance(quantizer, TRSWeight) else 1.0


def _code_range(quantizer: TRSWeight | LSQ) -> tuple[jax.Array, jax.Array]:
    if isinstance(quantizer, LSQ):
        return quantizer.code_range()
    levels = half(quantizer.bits, jnp.float32)
    return (
        by_bits(quantizer.bits, lambda: -levels, lambda: quantizer.symmetric - levels),
        by_bits(quantizer.bits, lambda: levels, lambda: levels - 1),
    )


def _mean(arrays: list[jax.Array]) -> Mean:
    return Mean(sum(jnp.sum(each) for each in arrays), jnp.float32(sum(each.size for each in arrays)))


def _count(found: list[tuple[jax.Array, int]]) -> jax.Array:
    return jnp.float32(sum(size for _, size in found))
