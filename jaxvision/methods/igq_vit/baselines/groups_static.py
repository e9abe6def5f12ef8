"""Grouped quantization without instance-awareness, and the bounds that groups approach.

The channels of an FC input share G quantizers. Attention takes the caller's ``softmax_quantizers`` (the row
quantizers of IGQ-ViT), so that these methods differ from IGQ-ViT in the FC inputs alone; only the two upper bounds
have their own. Image, q, k, v, head and kernels follow the shared policy.

- consecutive: G equal slices of neighbouring channels, ranges from calibration.
- peg: channels sorted by calibrated range, cut into G equal groups (Bondarenko et al. 2021).
- kmeans: calibrated (min, max) of the channels clustered as IGQ-ViT clusters them, the assignment frozen.
- vsquant: consecutive channels, the ranges found anew for each image (VS-Quant); dynamic_tensor: one such group.
- upper: own dynamic quantizer for each channel and each row; upper_static: the same from calibration.
"""

from functools import partial
from typing import Any

from jaxvision.methods.igq_vit.calibration import (
    Bits,
    Calibration,
    QuantizedNetwork,
    Quantizers,
    common_quantizers,
    common_variables,
    given_softmax,
)
from jaxvision.methods.igq_vit.channel_groups import BOUNDS
from jaxvision.quant.activation import AffineQuantizer, DynamicGroupQuantizer


def _network(context: Calibration, bits: Bits, own: Quantizers) -> QuantizedNetwork:
    return QuantizedNetwork(common_variables(context, bits), common_quantizers(context, bits) | own)


def static_groups(
    context: Calibration,
    bits: Bits,
    *,
    softmax_quantizers: dict[str, Any] | None = None,
    grouping: str,
    num_groups: int = 8,
) -> QuantizedNetwork:
    """G static quantizers for the channels of each FC input, grouped as :data:`channel_groups.BOUNDS` names it."""
    own = given_softmax(context, softmax_quantizers, f"{grouping}{num_groups}")
    for site in context.of_kind("channels"):
        interval = BOUNDS[grouping](context.channel_extremes(site.name), num_groups)
        own[site.name] = AffineQuantizer.from_interval(*interval.T, bits.activation)
    return _network(context, bits, own)


def dynamic_groups(
    context: Calibration, bits: Bits, *, softmax_quantizers: dict[str, Any] | None = None, num_groups: int
) -> QuantizedNetwork:
    """Consecutive groups of channels with each image's own range: VS-Quant, or (one group) dynamic per tensor."""
    own = given_softmax(context, softmax_quantizers, f"dynamic groups ({num_groups})")
    for site in context.of_kind("channels"):
        own[site.name] = DynamicGroupQuantizer.create(bits.activation, num_groups)
    return _network(context, bits, own)


def upper(context: Calibration, bits: Bits, *, softmax_quantizers: dict[str, Any] | None = None) -> QuantizedNetwork:
    """Own quantizer for each channel and each row of each image; ``softmax_quantizers`` is not used."""
    del softmax_quantizers
    dynamic = [site for site in context.sites if site.grouped]
    return _network(
        context, bits, {site.name: DynamicGroupQuantizer.create(bits.activation, axis=site.kind) for site in dynamic}
    )


def upper_static(
    context: Calibration, bits: Bits, *, softmax_quantizers: dict[str, Any] | None = None
) -> QuantizedNetwork:
    """Own quantizer, from calibration, for each channel and for each (head, query token) of the attention.

    Windows are pooled: token i of every window shares a quantizer. ``softmax_quantizers`` is not used.
    """
    del softmax_quantizers
    own: Quantizers = {}
    for site in context.of_kind("channels"):
        own[site.name] = AffineQuantizer.from_interval(*context.channel_extremes(site.name).T, bits.activation)
    for site in context.of_kind("rows"):
        x = context.activations[site.name]
        lower, upper_end = (end((0, 3))[..., None] for end in (x.min, x.max))
        own[site.name] = AffineQuantizer.from_interval(lower, upper_end, bits.activation)
    return _network(context, bits, own)


consecutive8 = partial(static_groups, grouping="consecutive", num_groups=8)
peg8 = partial(static_groups, grouping="peg", num_groups=8)
kmeans8 = partial(static_groups, grouping="kmeans", num_groups=8)
vsquant8 = partial(dynamic_groups, num_groups=8)
dynamic_tensor = partial(dynamic_groups, num_groups=1)
