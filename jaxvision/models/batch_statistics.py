"""The batch statistics of a network's normalisations on one batch, apart from the running values.

Where weights move between few values (quantized training) the running values of training lag behind the weights or
follow their oscillation. Averages of :func:`of_batch` over some batches, with the weights as they are, replace them
(Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, section 3.3).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.models.layers import BatchNorm

COLLECTION = "batch_stats"


def of_batch(network: Any, variables: Any, images: jax.Array, *, rngs: Any = None) -> Any:
    """The statistics that a training-mode forward pass normalises ``images`` with.

    Args:
      network: a module or ``QuantizedNetwork`` whose normalisations are :class:`jaxvision.models.layers.BatchNorm`.
      variables: of the network; its running values play no part.
      images: float32 [B, H, W, C].
      rngs: of ``apply``, such as ``{"dropout": key}``.

    Returns:
      A tree like ``variables["batch_stats"]``: mean and unbiased variance over the global batch, float32 [C].

    Raises:
      ConfigError: a network without batch normalisation, or one that applies a normalisation twice in a pass.
    """
    if not variables.get(COLLECTION):
        raise ConfigError("this network has no batch normalisation, so there are no batch statistics to estimate")
    momentum: dict[str, float] = {}

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, BatchNorm) and context.method_name == "__call__":
            name = "/".join(module.path)
            if name in momentum:
                raise ConfigError(f"{name} normalises twice in a pass, so that it has no statistics of one batch")
            momentum[name] = module.momentum
        return call(*args, **kwargs)

    # running <- (1 - m) running + m batch: from 0 the new running values are m times the batch's.
    empty = {**variables, COLLECTION: jax.tree.map(jnp.zeros_like, variables[COLLECTION])}
    with nn.intercept_methods(watch):
        _, moved = network.apply(empty, images, train=True, rngs=rngs, mutable=[COLLECTION])
    return trees.map_named(lambda name, value: value / momentum[name.rpartition("/")[0]], moved[COLLECTION])


def average(before: Any, batch: Any, count: jax.Array) -> Any:
    """The mean over ``count + 1`` batches from that over ``count`` (int32 ()) and the next one's statistics."""
    weight = 1 / (count.astype(jnp.float32) + 1)
    return jax.tree.map(lambda mean, value: (1 - weight) * mean + weight * value, before, batch)
