"""PTQ4ViT (Yuan et al. 2022) and its Base PTQ: symmetric intervals searched by their effect on each layer's output.

Kernels are symmetric with one scale a layer (qkv: one each for q, k and v rows; PTQ4ViT's patch embedding: one an
output channel), inputs symmetric per tensor, q, k, v (and Base PTQ's attention) one scale a head. PTQ4ViT adds twin
uniform quantizers for attention and for the inputs of fc2, and weighs errors with ``g = dL/dy``.
Three departures from the official code, all for the better of the baseline, the first two with a flag back:

- The official ``L`` is KL(p || p) of the float network with itself, whose gradient is rounding noise. Default here:
  cross-entropy with the network's own argmax; ``gradient="kl"`` is the literal one.
- The official twin softmax adds its two ranges, so that values above the split come out too large. Default here: one
  range or the other; ``official_sum=True`` is the literal one.
- The image, which the official code leaves in float, has the shared 8-bit quantizer.

Bias correction is set in the official configuration but never applied. Source: official code.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.methods.igq_vit.baselines import ptq4vit_search as ps
from jaxvision.methods.igq_vit.calibration import (
    Bits,
    Calibration,
    QuantizedNetwork,
    Quantizers,
    common_quantizers,
)
from jaxvision.methods.igq_vit.sites import ApplyFn, Site
from jaxvision.quant import log
from jaxvision.quant.activation import AffineQuantizer, integer

GRADIENTS = ("argmax", "kl")
OUTPUTS = (
    (r"^patch_embed\.proj$", ("patch_embed.norm", "patch_embed.out")),
    (r"^(.*\.attn)\.proj$", (r"\1.out",)),
    (r"^(.*\.mlp)\.fc2$", (r"\1.out",)),
    (r"^(.*\.downsample)\.reduction$", (r"\1.out",)),
    (r"^(.*)$", (r"\1.out",)),
)
"""(a layer's input tap, taps that may hold its output, the first found); in order of precedence."""


def _tap_shapes(apply_fn: ApplyFn, variables: Any, images: jax.Array) -> dict[str, jax.ShapeDtypeStruct]:
    seen: dict[str, jax.ShapeDtypeStruct] = {}

    def tap(name: str, x: jax.Array) -> jax.Array:
        seen[name] = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return x

    jax.eval_shape(lambda images: apply_fn(variables, images, tap=tap), images)
    return seen


def output_tap(name: str, taps: Sequence[str]) -> str:
    """The tap with the output of the layer whose input is tapped as ``name``; ConfigError where there is none."""
    for pattern, replacements in OUTPUTS:
        if match := re.match(pattern, name):
            for candidate in (match.expand(replacement) for replacement in replacements):
                if candidate in taps:
                    return candidate
    raise ConfigError(f"PTQ4ViT needs the output of layer {name!r}, but the network has no tap for it")


@partial(jax.jit, static_argnames=("apply_fn", "names"))
def tap_gradients(
    apply_fn: ApplyFn, variables: Any, images: jax.Array, target: jax.Array, names: tuple[str, ...]
) -> dict[str, jax.Array]:
    """Gradient of ``-sum(target * log softmax(logits))``, target [B, K], with respect to the named taps' values."""
    shapes = _tap_shapes(apply_fn, variables, images)

    def loss(offsets: dict[str, jax.Array]) -> jax.Array:
        logits = apply_fn(variables, images, tap=lambda name, x: x + offsets[name] if name in offsets else x)
        return -jnp.sum(target * jax.nn.log_softmax(logits))

    return jax.grad(loss)({name: jnp.zeros(shapes[name].shape, shapes[name].dtype) for name in names})


@partial(jax.jit, static_argnames=("apply_fn", "gradient"))
def _target(apply_fn: ApplyFn, variables: Any, images: jax.Array, gradient: str) -> jax.Array:
    logits = apply_fn(variables, images)
    return jax.nn.softmax(logits) if gradient == "kl" else jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1])


def output_gradients(context: Calibration, gradient: str = "argmax", chunk: int = 8) -> dict[str, np.ndarray]:
    """dL/dy of the float network for every linear layer and both attention products, by a backward pass.

    ``L`` is the cross-entropy with the network's own prediction: its argmax, or with ``gradient="kl"`` its whole
    distribution, which is KL(p || p) up to a constant and has gradient 0 but for rounding.

    Args:
      context: the float network; the taps ending in ``.out`` are differentiated.
      gradient: one of :data:`GRADIENTS`.
      chunk: images at a time; L is a sum over images, so nothing depends on it.

    Returns:
      by site: for a layer's input the gradient of its output [T, D]; for ".attn.softmax" that of attention times v,
      [B, H, N, d]; for ".attn.q" that of q k^T up to the factor in front of it, [B, H, N, N].
    """
    if gradient not in GRADIENTS:
        raise ConfigError(f"gradient={gradient!r} is not one of {', '.join(GRADIENTS)}")
    images = context.images
    taps = _tap_shapes(context.apply_fn, context.variables, jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32))
    attention = [site.name.removesuffix("softmax") for site in context.of_kind("rows")]
    layers = {site.name: output_tap(site.name, list(taps)) for site in context.sites if site.weight}
    names = tuple({*layers.values(), *(p + part for p in attention for part in ("softmax", "proj"))})
    parts = []
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk]
        target = _target(context.apply_fn, context.variables, part, gradient)
        parts.append(jax.device_get(tap_gradients(context.apply_fn, context.variables, part, target, names)))
    whole = {name: np.concatenate([part[name] for part in parts]) for name in names}
    found = {site: whole[tap].reshape(-1, whole[tap].shape[-1]) for site, tap in layers.items()}
    for prefix in attention:
        a, g = context.activations[prefix + "softmax"], whole[prefix + "softmax"]
        found[prefix + "q"] = np.asarray(a * (g - (a * g).sum(-1, keepdims=True)))
        merged = whole[prefix + "proj"]
        heads = merged.reshape(*merged.shape[:2], a.shape[1], -1)
        found[prefix + "softmax"] = np.ascontiguousarray(np.swapaxes(heads, 1, 2))
    return found


def symmetric_quantizer(scale: jax.Array, width: int) -> AffineQuantizer:
    """Signed codes without a zero point, in the package's unsigned form; a scale for each head: [H] -> [H, 1, 1]."""
    scale = scale[:, None, None] if scale.ndim else scale
    return AffineQuantizer(scale, jnp.asarray(2.0 ** (width - 1), scale.dtype), integer(width))


def patches(images: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Images [B, H, W, C] cut into patches, [B * patches, rows * columns * C] in the order of a kernel HWIO."""
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // rows, rows, width // columns, columns * channels)
    return np.ascontiguousarray(x.swapaxes(2, 3)).reshape(-1, rows * columns * channels)


def _blocks(site: Site, fan_out: int, own: bool) -> int:
    if site.kind == "image":
        return fan_out if own else 1
    return 3 if site.name.endswith(".attn.qkv") else 1


def _layer(
    context: Calibration, site: Site, g: np.ndarray | None, bits: Bits, own: bool
) -> tuple[jax.Array, Any | None]:
    """w_hat of a layer, and the quantizer of its input (None for the image)."""
    leaves = trees.named_leaves(context.variables["params"])
    kernel = leaves[site.weight]
    flat = kernel.reshape(-1, kernel.shape[-1])
    bias = leaves.get(site.weight.removesuffix("kernel") + "bias", jnp.zeros(kernel.shape[-1], kernel.dtype))
    image = site.kind == "image"
    x = patches(context.activations[site.name], *kernel.shape[:2]) if image else context.rows(site.name)
    form = "float" if image else "twin_gelu" if own and site.name.endswith(".mlp.fc2") else "symmetric"
    g = np.ones((len(x), kernel.shape[-1]), np.float32) if g is None else g
    widths = integer(bits.weight), integer(bits.activation)
    search = ps.PTQ4VIT if own else ps.BASE_PTQ
    blocks = _blocks(site, kernel.shape[-1], own)
    scales, scale = ps.search_linear(x, flat, bias, g, *widths, search=search, blocks=blocks, form=form)
    w_hat = ps.blockwise_quantize(flat, scales, bits.weight).reshape(kernel.shape)
    if image:
        return w_hat, None
    if form == "symmetric":
        return w_hat, symmetric_quantizer(scale, bits.activation)
    negative = np.float32(ps.GELU_MINIMUM / 2 ** (bits.activation - 1))
    return w_hat, log.TwinGeluQuantizer(scale, negative, widths[1])


def _attention(
    context: Calibration, prefix: str, gradients: dict[str, np.ndarray] | None, width: int, official_sum: bool
) -> Quantizers:
    """Quantizers of q, k, v and softmax of one attention layer; Base PTQ where there are no gradients."""
    q, k, v, a = (context.activations[prefix + part] for part in ("q", "k", "v", "softmax"))
    own = gradients is not None
    search, bits = ps.PTQ4VIT if own else ps.BASE_PTQ, integer(width)
    g_logits, g_out = (gradients[prefix + part] for part in ("q", "softmax")) if own else (np.ones_like(a), v)
    found = dict(zip("qk", ps.search_product(q, np.swapaxes(k, -1, -2), g_logits, bits, search=search)))
    if own:
        split, found["v"] = ps.search_attention(a, v, g_out, bits, search=search, official_sum=official_sum)
        softmax: Any = log.TwinSoftmaxQuantizer(split, bits, official_sum)
    else:
        scale, found["v"] = ps.search_product(a, v, g_out, bits, search=search)
        softmax = symmetric_quantizer(scale, width)
    made = {prefix + part: symmetric_quantizer(scale, width) for part, scale in found.items()}
    return made | {prefix + "softmax": softmax}


def _build(
    context: Calibration, bits: Bits, gradients: dict[str, np.ndarray] | None, official_sum: bool
) -> QuantizedNetwork:
    quantizers = common_quantizers(context, bits, ("image",))
    kernels = {}
    for site in context.sites:
        if site.weight:
            g = None if gradients is None else gradients[site.name]
            kernels[site.weight], quantizer = _layer(context, site, g, bits, gradients is not None)
            quantizers |= {} if quantizer is None else {site.name: quantizer}
        elif site.kind == "rows":
            prefix = site.name.removesuffix("softmax")
            quantizers |= _attention(context, prefix, gradients, bits.activation, official_sum)
    params = trees.map_named(lambda name, leaf: kernels.get(name, leaf), context.variables["params"])
    return QuantizedNetwork({**context.variables, "params": params}, quantizers)


def base_ptq(context: Calibration, bits: Bits, *, softmax_quantizers: Quantizers | None = None) -> QuantizedNetwork:
    """PTQ4ViT's Base PTQ: cosine similarity of layer outputs, one round; ``softmax_quantizers`` is not used."""
    del softmax_quantizers
    return _build(context, bits, None, False)


def ptq4vit(
    context: Calibration,
    bits: Bits,
    *,
    softmax_quantizers: Quantizers | None = None,
    gradient: str = "argmax",
    official_sum: bool = False,
) -> QuantizedNetwork:
    """PTQ4ViT; ``softmax_quantizers`` is not used.

    Args:
      context, bits: see ``calibration``.
      gradient: "argmax", or "kl" for the official code's.
      official_sum: the official code's twin softmax.
    """
    del softmax_quantizers
    gradients = context.once(("gradients", gradient), lambda: output_gradients(context, gradient))
    return _build(context, bits, gradients, official_sum)
