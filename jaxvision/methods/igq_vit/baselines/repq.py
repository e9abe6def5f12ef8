"""RepQ-ViT (Li et al. 2023): scale reparameterisation of LayerNorm outputs, and log-sqrt2 attention.

Inputs of qkv, fc1 and reduction are calibrated per channel; LayerNorm and the layer behind it are then rewritten,
without changing the float network, so that one scale serves all channels. Everything else is per tensor. Every interval
is the best of three percentile pairs by squared error, kernels (per output channel) included, which are calibrated
after the rewriting. The official code calibrates sequentially; here all see the float network, as every method here.
Source: official code, ``classification/test_quant.py`` and ``quant/quantizer.py``.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import struct, trees
from jaxvision.methods.igq_vit.calibration import (
    Bits,
    Calibration,
    QuantizedNetwork,
    Quantizers,
    common_quantizers,
    given_softmax,
    with_rounded,
)
from jaxvision.quant import log, observers, uniform, weights
from jaxvision.quant.activation import AffineQuantizer, integer

LAYERS = (
    (r"(.*)/norm1/scale", r"\1/norm1", r"\1/attn/qkv"),
    (r"(.*)/norm2/scale", r"\1/norm2", r"\1/mlp/fc1"),
    (r"(.*)/downsample/norm/scale", r"\1/downsample/norm", r"\1/downsample/reduction"),
)
"""(a LayerNorm's scale, the LayerNorm, the linear layer that reads it); the final norm has none."""
PERCENTILES = (0.999, 0.9999, 0.99999)


@struct.dataclass
class Reparameterized:
    """Rewritten parameters of a LayerNorm and a linear layer, and scale and zero point of what passes between them."""

    norm: dict[str, jax.Array]
    linear: dict[str, jax.Array]
    scale: jax.Array
    zero: jax.Array


def reparameterize(
    norm: dict[str, jax.Array], linear: dict[str, jax.Array], scale: jax.Array, zero: jax.Array, shift: bool = True
) -> Reparameterized:
    """Moves the differences between channels out of an input's quantizer and into the layers around it.

    With ``s~ = mean(s)``, ``z~ = mean(z)``, ``r = s / s~``, ``t = z~ s~ - z s / r``: LayerNorm weight ``/ r``, bias
    ``/ r - t``; kernel rows ``* r``, bias ``+ t kernel_new``. The float function stays the same, and the input
    quantizer with ``(s, z)`` per channel becomes one with ``(s~, z~)``. ``z~`` is not rounded (the official code does
    not): an integer kernel has to round it and to add the rest to the bias.

    Args:
      norm: ``scale`` and ``bias``, [C].
      linear: ``kernel`` [C, D] and ``bias`` [D].
      scale, zero: [C], the calibrated quantizer of each channel.
      shift: False leaves out t (then ``zero`` of the result stays [C]): for layers without a bias, or that also read
        zeros which did not come from the LayerNorm (padding). The official code gives such layers a bias, or errs.

    Returns:
      :class:`Reparameterized`, scale () and zero () or [C].
    """
    mean_scale, mean_zero = jnp.mean(scale), jnp.mean(zero)
    ratio = scale / mean_scale
    kernel = linear["kernel"] * ratio[:, None]
    new_norm = {**norm, "scale": norm["scale"] / ratio, "bias": norm["bias"] / ratio}
    if not shift:
        return Reparameterized(new_norm, {**linear, "kernel": kernel}, mean_scale, zero)
    moved = -zero * scale / ratio + mean_zero * mean_scale
    new_norm["bias"] = new_norm["bias"] - moved
    new_linear = {**linear, "kernel": kernel, "bias": linear["bias"] + jnp.matmul(moved, kernel, precision="highest")}
    return Reparameterized(new_norm, new_linear, mean_scale, mean_zero)


def _at(tree: Any, path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree


def _with(tree: Any, path: str, value: Any) -> Any:
    head, _, rest = path.partition("/")
    return {**tree, head: _with(tree[head], rest, value) if rest else value}


def site_name(path: str) -> str:
    """ "blocks.0.attn.qkv" for the parameters "blocks_0/attn/qkv"."""
    return re.sub(r"_(\d+)(?=/|$)", r".\1", path).replace("/", ".")


def layer_pairs(params: Any) -> list[tuple[str, str]]:
    """(LayerNorm, linear layer behind it) of a ViT or Swin parameter tree, as slash-joined paths."""
    found = []
    for name in trees.named_leaves(params):
        for pattern, norm, linear in LAYERS:
            if match := re.fullmatch(pattern, name):
                found.append((match.expand(norm), match.expand(linear)))
                break
    return found


def reparameterize_network(context: Calibration, bits: int) -> tuple[Any, dict[str, AffineQuantizer]]:
    """:func:`reparameterize` at every qkv, fc1 and reduction of a ViT or Swin.

    Args:
      context: the float network, calibrated.
      bits: width of these inputs.

    Returns:
      the rewritten variables (float; the same function), and the quantizer of each rewritten input by site name.
    """
    params, quantizers = context.variables["params"], {}
    tokens = {site.name: site.tokens for site in context.sites}
    for norm, linear in layer_pairs(params):
        name = site_name(linear)
        interval = weights.percentile_search(context.rows(name), bits)
        layer = _at(params, linear)
        # Windows are padded where they don't tile the map: then qkv reads more tokens than fc1 of the same block.
        padded = linear.endswith("/attn/qkv") and tokens[name] != tokens[name.replace("attn.qkv", "mlp.fc1")]
        shift = "bias" in layer and not padded
        new = reparameterize(_at(params, norm), layer, *uniform.affine_params(*interval, bits), shift)
        params = _with(_with(params, norm, new.norm), linear, new.linear)
        quantizers[name] = AffineQuantizer(new.scale, new.zero, integer(bits))
    return {**context.variables, "params": params}, quantizers


@jax.jit
def _least_error_delta(x: jax.Array, deltas: jax.Array, bits: jax.Array) -> jax.Array:
    errors = jax.lax.map(lambda d: jnp.mean(jnp.square(x - log.log_sqrt2_quantize(x, d, bits))), deltas)
    return deltas[jnp.argmin(errors)]


def log_sqrt2_delta(x: np.ndarray, bits: int) -> jax.Array:
    """Of the 99.9, 99.99 and 99.999 % quantiles of attention ``x`` the delta () of least squared error."""
    return _least_error_delta(x, observers.quantile(x, PERCENTILES), integer(bits))


def _softmax_quantizers(context: Calibration, bits: int) -> Quantizers:
    return {
        site.name: log.LogSqrt2Quantizer(log_sqrt2_delta(context.activations[site.name], bits), integer(bits))
        for site in context.of_kind("rows")
    }


def _build(context: Calibration, bits: Bits, softmax: Quantizers) -> QuantizedNetwork:
    variables, rewritten = context.once(
        ("repq", bits.activation), lambda: reparameterize_network(context, bits.activation)
    )
    quantizers = common_quantizers(context, bits, ("image", "tensor", "channels")) | rewritten | softmax
    return QuantizedNetwork(with_rounded(variables, weights.WeightPolicy(bits.weight, "repq")), quantizers)


def repq(context: Calibration, bits: Bits, *, softmax_quantizers: Quantizers | None = None) -> QuantizedNetwork:
    """RepQ-ViT with its own log-sqrt2 attention; ``softmax_quantizers`` is not used."""
    del softmax_quantizers
    return _build(context, bits, _softmax_quantizers(context, bits.activation))


def repq_rows(context: Calibration, bits: Bits, *, softmax_quantizers: Quantizers | None = None) -> QuantizedNetwork:
    """RepQ-ViT with the caller's attention quantizers: differs from the group methods in FC inputs and kernels only."""
    return _build(context, bits, given_softmax(context, softmax_quantizers, "repq_rows"))
