"""FQ-ViT (Lin et al. 2022): min-max everywhere, power-of-two factors before LayerNorm, log2 attention.

At this project's sites: kernels per output channel, symmetric min-max; activations per tensor, min-max, except the
inputs of the layer normalisations, which are quantized per channel with power-of-two factors of one scale (more tensors
than the other methods quantize; the residual sum itself stays float here); attention log2. The original also quantizes
attention logits and residual sums, and runs LayerNorm and softmax in integers; here both stay in float.
Source: official code, ``models/ptq``.
"""

from typing import Any

import jax

from jaxvision.core import trees
from jaxvision.methods.igq_vit import sites as sites_lib
from jaxvision.methods.igq_vit.baselines.static import observed_quantizer
from jaxvision.methods.igq_vit.calibration import Bits, Calibration, QuantizedNetwork, Quantizers
from jaxvision.quant import log, observers, uniform
from jaxvision.quant.activation import integer

NORM_INPUTS = ((r"(^|\.)norm[0-9]?$", "channels"),)


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
