"""FQ-ViT (Lin et al. 2022): min-max everywhere, power-of-two factors before LayerNorm, log2 attention.

At this project's sites: kernels per output channel, symmetric min-max; activations per tensor, min-max, except the
inputs of the layer normalisations, which are quantized per channel with power-of-two factors of one scale (more tensors
than the other methods quantize; the residual sum itself stays float here); attention log2. The original also quantizes
attention logits and residual sums, and runs LayerNorm and softmax in integers: the last two are functions here
(:func:`integer_layer_norm`, :func:`integer_softmax`), not part of the simulated network.
Source: official code, ``models/ptq``.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxvision.core import trees
from jaxvision.methods.igq_vit import sites as sites_lib
from jaxvision.methods.igq_vit.baselines.static import observed_quantizer
from jaxvision.methods.igq_vit.calibration import Bits, Calibration, QuantizedNetwork, Quantizers
from jaxvision.quant import log, observers, uniform
from jaxvision.quant.activation import integer

NORM_INPUTS = ((r"(^|\.)norm[0-9]?$", "channels"),)
LN2 = 0.6931
EXP_SHIFT = 30
EXP_POLYNOMIAL = (0.35815147, 0.96963238, 1.0)
"""exp(x) on (-ln 2, 0] is about a x^2 + b x + c = .3585 (x + 1.353)^2 + .344 (I-BERT)."""


def integer_layer_norm(
    x: jax.Array, in_scale: jax.Array, weight: jax.Array, bias: jax.Array, out_scale: jax.Array
) -> jax.Array:
    """FQ-ViT's LayerNorm with integer statistics and 8-bit multipliers with a shift.

    ``x_q = round(x / s)``, ``s = min(in_scale)``; mean and deviation from sums of ``x_q`` and ``x_q^2``;
    ``A = s weight / (deviation out_scale)`` as ``M 2^-N`` with ``N = clip(7 - floor(log2 |A|), 0, 31)``,
    ``M = floor(|A| 2^N) <= 255``; ``B = round((bias - mean weight / deviation) / out_scale * 2^N)``;
    ``y = out_scale round((sign(A) M x_q + B) 2^-N)``.

    Args:
      x: [..., C], already quantized with ``in_scale`` [C] (power-of-two multiples of its minimum).
      weight, bias: [C]; out_scale: () or [C].

    Returns:
      y like x, multiples of ``out_scale``. Source: official code, ``QIntLayerNorm``.
    """
    step, channels = in_scale.min(), x.shape[-1]
    codes = jnp.round(x / step)
    mean = codes.mean(-1, keepdims=True) * step
    spread = channels * jnp.square(codes).sum(-1, keepdims=True) - jnp.square(codes.sum(-1, keepdims=True))
    # A constant token has deviation 0; the official code divides by it.
    deviation = step / channels * jnp.sqrt(jnp.maximum(spread, 1))
    factor = step / deviation * weight / out_scale
    size = jnp.abs(factor)
    shift = jnp.where(size > 0, jnp.clip(7 - jnp.floor(jnp.log2(jnp.where(size > 0, size, 1))), 0, 31), 31)
    power = jnp.ldexp(jnp.float32(1), shift.astype(jnp.int32))
    multiplier = jnp.clip(jnp.floor(size * power), 0, 255)
    offset = jnp.round((bias - mean / deviation * weight) / out_scale * power)
    return jnp.round((jnp.sign(factor) * multiplier * codes + offset) / power) * out_scale


def integer_exp(codes: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """I-BERT's i-exp: ``exp(codes * scale)`` as integers times a scale, for ``codes <= 0``.

    ``x = -q ln 2 + r``, a second-order polynomial in r, shifted right by q; 30 bits.

    Args:
      codes: any shape, integral float; scale: () float.

    Returns:
      integral float like codes, and its scale ().
    """
    a, b, c = EXP_POLYNOMIAL
    ln2 = jnp.floor(-LN2 / scale)
    codes = jnp.maximum(codes, EXP_SHIFT * ln2)
    halvings = jnp.floor(codes / ln2)
    rest = codes - ln2 * halvings
    value = rest * (rest + jnp.floor(b / a / scale)) + jnp.floor(c / a / scale**2)
    power = jnp.ldexp(jnp.float32(1), (EXP_SHIFT - halvings).astype(jnp.int32))
    return jnp.maximum(jnp.floor(value * power), 0), a * scale**2 / 2**EXP_SHIFT


def integer_softmax(logits: jax.Array, scale: jax.Array, bits: int | jax.Array) -> jax.Array:
    """FQ-ViT's log-int-softmax: the log2-quantized softmax of quantized logits from integers only.

    ``q = log2 of round(sum(exp) / exp)``, rounded up from 1.5 * 2^n on; ``2^-clip(q, 0, 2^b - 1)``, and 0 where
    ``q >= 2^b``.

    Args:
      logits: [..., N], multiples of ``scale`` (); softmax over the last axis.
      bits: int or int32 scalar.

    Returns:
      attention like logits, powers of two that sum to about 1. Source: official code, ``QIntSoftmax``.
    """
    codes = logits / scale
    exp, _ = integer_exp(codes - codes.max(-1, keepdims=True), scale)
    inverse = jnp.round(exp.sum(-1, keepdims=True) / jnp.where(exp > 0, exp, 1))
    _, exponent = jnp.frexp(inverse)  # inverse = m 2^exponent, m in [0.5, 1)
    floor = exponent - 1
    code = floor + (inverse >= 1.5 * jnp.ldexp(jnp.float32(1), floor))
    levels = jnp.left_shift(1, jnp.asarray(bits, jnp.int32))
    kept = jnp.ldexp(jnp.float32(1), -jnp.clip(code, 0, levels - 1))
    return jnp.where((exp > 0) & (code < levels), kept, 0)


def norm_context(context: Calibration) -> Calibration:
    """The context of the layer normalisations' inputs: sites of kind "channels" named as the taps, "blocks.0.norm1"."""

    def make() -> Calibration:
        images = context.images
        found = sites_lib.list_sites(context.apply_fn, context.variables, images.shape[1:], NORM_INPUTS)
        return Calibration.create(
            context.apply_fn, context.variables, images, sites=found, observer_batch=context.observer_batch
        )

    return context.once("norm_context", make)


def _minmax_kernel(kernel: jax.Array, bits: int) -> jax.Array:
    flat = kernel.reshape(-1, kernel.shape[-1])
    scale, zero = observers.affine_symmetric(flat.min(0), flat.max(0), bits)
    return uniform.fake_quant(kernel, scale, zero, bits)


def minmax_variables(variables: Any, bits: int) -> Any:
    """``variables`` with every kernel rounded symmetrically per output channel, ``s = max|w| / ((2^b - 1) / 2)``."""
    rounded = trees.map_named(
        lambda name, leaf: _minmax_kernel(leaf, bits) if name.endswith("kernel") else leaf, variables["params"]
    )
    return {**variables, "params": rounded}


def fqvit(
    context: Calibration, bits: Bits, *, softmax_quantizers: Quantizers | None = None, power_of_two: bool = True
) -> QuantizedNetwork:
    """The FQ-ViT network; ``softmax_quantizers`` is not used.

    Args:
      context, bits: see ``calibration``. Attention too has ``bits.activation`` (4 in the original's 8/8/4).
      power_of_two: also quantize the inputs of the layer normalisations.
    """
    del softmax_quantizers
    quantizers: Quantizers = {
        site.name: log.Log2Quantizer(integer(bits.activation))
        if site.kind == "rows"
        else observed_quantizer(context, site.name, observers.MINMAX, bits.of(site))
        for site in context.sites
    }
    if power_of_two:
        norms = norm_context(context)
        for site in norms.sites:
            quantizers[site.name] = observed_quantizer(norms, site.name, observers.PTF, bits.activation, site.shape[-1])
    variables = context.once(
        ("minmax_variables", bits.weight), lambda: minmax_variables(context.variables, bits.weight)
    )
    return QuantizedNetwork(variables, quantizers)
