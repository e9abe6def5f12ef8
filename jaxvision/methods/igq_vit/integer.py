"""A network executed with integer products (``integer_products.py``); equals the simulation up to float rounding."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.methods.igq_vit import groups, integer_products
from jaxvision.methods.igq_vit.sites import ApplyFn, Site
from jaxvision.quant import activation, uniform
from jaxvision.quant.weights import QuantizedTensor

OUTPUTS = {
    "attn.qkv": "attn.qkv.out",
    "attn.proj": "attn.out",
    "mlp.fc1": "mlp.fc1.out",
    "mlp.fc2": "mlp.out",
    "downsample.reduction": "downsample.out",
}
"""Which tap sees the output of the layer whose input is tapped under the first name."""


class IntegerTap:
    """Runs every grouped FC layer and every product A v of a network in integers; other sites are simulated.

    The tap of a layer's input keeps the input, the tap of its output puts the integer result in the place of the
    float one (whose computation XLA then drops).

    Args:
      quantizers: by site, as for the simulation; grouped sites need :class:`groups.InstanceGroupQuantizer`.
      layers: site -> (weight, bias), of :func:`integer_layers`.
      batch_size: images in the batch.
      one_product: all groups of a layer in one product; the quantizers are then of :func:`snapped`.
    """

    def __init__(
        self, quantizers: Mapping[str, Any], layers: Mapping[str, Any], batch_size: int, one_product: bool = False
    ):
        self._quantizers, self._layers, self._batch_size = quantizers, layers, batch_size
        self._linear = partial(linear_int, one_product=one_product)
        self._inputs: dict[str, tuple[str, jax.Array]] = {}
        self._attention: tuple[jax.Array, Any] | None = None
        self._values: tuple[jax.Array, Any] | None = None

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        """The value that the network goes on with."""
        if name in self._inputs:
            site, value = self._inputs.pop(name)
            return self._linear(value, self._quantizers[site], *self._layers[site], self._batch_size).reshape(x.shape)
        quantizer = self._quantizers.get(name)
        if quantizer is None:
            return x
        if name.endswith(".attn.proj") and self._attention is not None and self._values is not None:
            heads = attention_int(*self._attention, *self._values)  # (B, H, N, d)
            x = heads.transpose(0, 2, 1, 3).reshape(x.shape).astype(x.dtype)
            self._attention = self._values = None
        if name in self._layers:
            layer = next(key for key in OUTPUTS if name.endswith(key))
            self._inputs[name.removesuffix(layer) + OUTPUTS[layer]] = name, x
            return x
        if name.endswith(".attn.v") and isinstance(quantizer, activation.AffineQuantizer):
            self._values = x, quantizer
        if name.endswith(".attn.softmax") and isinstance(quantizer, groups.InstanceGroupQuantizer):
            self._attention = x, quantizer
        return quantizer(x, self._batch_size)

    def check_all_used(self) -> None:
        """Raises ConfigError where a layer's output has no tap, so that its integer result went nowhere."""
        for site, _ in self._inputs.values():
            raise ConfigError(f"the output of {site} has no tap; run this network in simulation")


@partial(jax.jit, static_argnames=("batch_size", "one_product"))
def linear_int(
    x: jax.Array,
    quantizer: groups.InstanceGroupQuantizer,
    weight: QuantizedTensor,
    bias: jax.Array | None,
    batch_size: int,
    one_product: bool = False,
) -> jax.Array:
    """The integer layer (B, N, D) of a site's float input (B * windows, ..., C), quantized here.

    ``igq_linear_int``, or with ``one_product`` ``power_of_two_linear_int``, whose quantizer is :func:`snapped`.
    """
    codes, group, scale, zero = _grouped_codes(x, quantizer, batch_size)
    if not one_product:
        return integer_products.igq_linear_int(codes, group, scale, zero, weight, bias, quantizer.bits)
    used = jnp.arange(scale.shape[0]) < quantizer.count
    base = jnp.min(jnp.where(used, scale, jnp.inf))
    shift = jnp.where(used, jnp.round(jnp.log2(scale / base)), 0).astype(jnp.int32)
    return integer_products.power_of_two_linear_int(codes, group, base, shift, zero, weight, bias)


def _grouped_codes(
    x: jax.Array, quantizer: groups.InstanceGroupQuantizer, batch_size: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Codes (B, N, C), groups (B, C), and scale and zero point (G,) of a site's float input."""
    flat = activation.per_instance(x, batch_size, quantizer.instance)
    bounds = quantizer.bounds[0]
    scale, zero = uniform.affine_params(
        bounds[:, 0], bounds[:, 1], quantizer.bits, clip_zero_point=quantizer.clip_zero_point
    )
    group = quantizer.groups(x, batch_size)
    return uniform.quantize(flat, scale[group][:, None], zero[group][:, None], quantizer.bits), group, scale, zero


@jax.jit
def attention_int(
    attention: jax.Array,
    quantizer: groups.InstanceGroupQuantizer,
    values: jax.Array,
    value_quantizer: activation.AffineQuantizer,
) -> jax.Array:
    """``igq_attention_int`` of float attention (B, H, N, M) and values (B, H, M, d), quantized here."""
    group = quantizer.groups(attention, attention.shape[0])
    scale, zero = uniform.affine_params(
        quantizer.bounds[..., 0],
        quantizer.bounds[..., 1],
        quantizer.bits,
        clip_zero_point=quantizer.clip_zero_point,
    )
    head = np.arange(scale.shape[0])[:, None]
    scale, zero = scale[head, group], zero[head, group]
    codes = uniform.quantize(attention, scale[..., None], zero[..., None], quantizer.bits)
    v = value_quantizer
    v_codes = uniform.quantize(values, v.scale, v.zero_point, v.bits)
    return integer_products.igq_attention_int(
        codes, scale, zero, quantizer.bits, v_codes, v.scale, v.zero_point, v.bits
    )


def integer_layers(
    sites: tuple[Site, ...], variables: Any, codes: Mapping[str, QuantizedTensor]
) -> dict[str, tuple[QuantizedTensor, Any]]:
    """Integer weight and float bias of each grouped FC site."""
    params = trees.named_leaves(variables["params"])
    return {
        site.name: (codes[site.weight], params.get(site.weight.removesuffix("kernel") + "bias"))
        for site in sites
        if site.kind == "channels" and site.weight in codes
    }


@partial(jax.jit, static_argnames=("apply_fn", "one_product"))
def forward_int(
    apply_fn: ApplyFn, variables: Any, quantizers: Any, layers: Any, images: jax.Array, *, one_product: bool = False
) -> jax.Array:
    """Logits (B, K) with the grouped FC layers and A v in integers; equals ``simulate.forward`` with all sites on.

    Args:
      apply_fn, variables: the network with w_hat.
      quantizers: by site.
      layers: of :func:`integer_layers`.
      images: (B, H, W, C) float32.
      one_product: see :class:`IntegerTap`; static.
    """
    tap = IntegerTap(quantizers, layers, images.shape[0], one_product)
    logits = apply_fn(variables, images, tap=tap)
    tap.check_all_used()
    return logits


def snapped(quantizer: Any, bits: int) -> Any:
    """An IGQ quantizer of channels with the bounds of ``snap_power_of_two``; any other quantizer as it is.

    The scale of a row leaves its sum, so rows need no powers of two.
    """
    if not isinstance(quantizer, groups.InstanceGroupQuantizer) or quantizer.axis != "channels":
        return quantizer
    bounds, _, _ = integer_products.snap_power_of_two(quantizer.bounds[0, : int(quantizer.count)], bits)
    return quantizer.replace(bounds=groups.pad_bounds(bounds[None], quantizer.bounds.shape[1]))
