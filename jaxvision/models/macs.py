"""Multiply-accumulates and weights of a network, layer by layer, read off one trace; nothing is computed."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core.errors import ConfigError
from jaxvision.models import autoformer
from jaxvision.models.attention import Attention
from jaxvision.models.layers import Conv, Dense
from jaxvision.models.patches import PatchEmbed


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """The product of one layer, for one image: ``macs = prod(output_size) kh kw in_channels / groups out_channels``.

    Attributes:
      name: path of the parameter (``layer1_0/conv1/kernel``); a product of two activations has no parameter and is
        named ``blocks_0/attn/q_k`` or ``blocks_0/attn/softmax_v``; those with AutoFormer's relative positions
        ``q_position`` and ``softmax_position``.
      macs: multiply-accumulates, biases not counted.
      weights: entries of the kernel; 0 for a product of activations.
      in_channels, out_channels: of the whole layer, over all groups.
      kernel: (kh, kw); (1, 1) for matrices.
      groups: of a convolution.
      output_size: shape of the output without channels and image: (H', W') of a convolution, () of a vector, (N,) of
        tokens, (windows, N) of tokens in several windows, (windows, heads, N) of attention.
    """

    name: str
    macs: int
    weights: int
    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    groups: int = 1
    output_size: tuple[int, ...] = ()

    @property
    def fan_in(self) -> int:
        """Products that are summed into one output: ``kh kw in_channels / groups``."""
        return math.prod(self.kernel) * self.in_channels // self.groups


def count(module: nn.Module, image_shape: tuple[int, int, int]) -> tuple[LayerCost, ...]:
    """The cost of every product in ``module(images)`` for one image, in the order of the forward pass.

    Counted: :class:`Conv`, :class:`Dense`, :class:`PatchEmbed`, both products of :class:`Attention` and all four of
    AutoFormer's; the convolutions and matrices of somebody else's layers are not seen. A layer that is applied twice
    has one entry with the MACs of both.

    Args:
      module: a linen module, called with images [1, H, W, C].
      image_shape: (H, W, C).

    Raises:
      ConfigError: an ``image_shape`` that isn't three sizes, or a network without any of these layers.
    """
    if len(image_shape) != 3:
        raise ConfigError(f"image_shape={image_shape!r} must be (height, width, channels)")
    found: dict[str, LayerCost] = {}

    def watch(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output = call(*args, **kwargs)
        for cost in _costs(context.module, context.method_name, args, output):
            before = found.get(cost.name)
            found[cost.name] = cost if before is None else dataclasses.replace(before, macs=before.macs + cost.macs)
        return output

    with nn.intercept_methods(watch):
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        jax.eval_shape(lambda image: module.init(jax.random.key(0), image), image)
    if not found:
        raise ConfigError(f"{type(module).__name__} has no layer whose multiply-accumulates can be counted")
    return tuple(found.values())


def _costs(module: nn.Module, method: str, args: tuple[Any, ...], output: Any) -> Iterator[LayerCost]:
    def name(leaf: str) -> str:
        return "/".join((*module.path, leaf))

    if isinstance(module, Conv | Dense | PatchEmbed) and method == "product":
        yield _layer(name("kernel"), args[1].shape, output.shape, getattr(module, "groups", 1))
    elif isinstance(module, Attention | autoformer.Attention) and method == "__call__":
        windows, tokens, width = args[0].shape
        relative = isinstance(module, autoformer.Attention)
        depth = autoformer.HEAD_WIDTH if relative else width // module.num_heads
        size = (windows, module.num_heads, tokens)
        macs = math.prod(size) * tokens * depth
        for first, second in (("q_k", "softmax_v"), ("q_position", "softmax_position"))[: 1 + relative]:
            yield LayerCost(name(first), macs, 0, depth, tokens, output_size=size)
            yield LayerCost(name(second), macs, 0, tokens, depth, output_size=size)


def _layer(name: str, kernel: tuple[int, ...], output: tuple[int, ...], groups: int) -> LayerCost:
    # The image's own axis is 1 and comes first, except where an image's windows lie on it.
    size = output[1:-1] if output[0] == 1 else output[:-1]
    kernel = (1, 1, *kernel)[-4:]
    weights = math.prod(kernel)
    return LayerCost(
        name, math.prod(size) * weights, weights, kernel[2] * groups, kernel[3], kernel[:2], groups, tuple(size)
    )
