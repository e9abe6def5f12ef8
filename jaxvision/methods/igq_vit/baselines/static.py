"""One static quantizer a tensor: min-max, EMA, percentile and OMSE, with the observers of FQ-ViT's code.

All FC inputs and the attention are quantized per tensor with the observer's interval; image, q, k, v, head and the
kernels follow the shared policy (``calibration``). With all calibration images in one batch EMA equals min-max: set
``Calibration.observer_batch`` to see a difference. Percentile and OMSE are FQ-ViT's: the percentile is 0.99999 of a
batch, and OMSE searches on the last batch only.
"""

from functools import partial
from typing import Any

from jaxvision.methods.igq_vit.calibration import (
    Bits,
    Calibration,
    QuantizedNetwork,
    common_quantizers,
    common_variables,
)
from jaxvision.quant import observers
from jaxvision.quant.activation import AffineQuantizer, integer

OBSERVERS = {
    "minmax": observers.MINMAX,
    "ema": observers.EMA,
    "percentile": observers.PERCENTILES,
    "omse": observers.OMSE,
}


def observed_quantizer(
    context: Calibration, name: str, observer: observers.Observer, width: int, channels: int | None = None
) -> AffineQuantizer:
    """The quantizer of one site from a batch observer, per tensor or per channel."""
    bits = integer(width)
    return AffineQuantizer(*observers.observe(observer, context.batches(name), bits, channels), bits)


def build(
    context: Calibration, bits: Bits, *, softmax_quantizers: dict[str, Any] | None = None, observer: str
) -> QuantizedNetwork:
    """The network with one observer's interval at every FC input and attention; ``softmax_quantizers`` is not used.

    Args:
      context, bits: see ``calibration``.
      observer: a key of :data:`OBSERVERS`.
    """
    del softmax_quantizers
    quantizers = common_quantizers(context, bits)
    for site in context.sites:
        if site.grouped:
            quantizers[site.name] = observed_quantizer(context, site.name, OBSERVERS[observer], bits.of(site))
    return QuantizedNetwork(common_variables(context, bits), quantizers)


minmax = partial(build, observer="minmax")
ema = partial(build, observer="ema")
percentile = partial(build, observer="percentile")
omse = partial(build, observer="omse")
