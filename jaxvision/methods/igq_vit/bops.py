"""Bit operations of a quantized network, with the overhead of instance-aware groups.

The paper's own table isn't readable; this accounting is this project's. With p-bit high-precision arithmetic a
multiplication costs p * p, an addition or comparison p. For an (N x C)(C x D) product with G groups::

    base        N C D b_w b_a
    range       2 N C p                       minimum and maximum of each channel
    distance    C G (2 p^2 + 3 p)             two subtractions, two squares, one sum
    combine     (G - 1) N D (p^2 + p)         rescale and add G partial sums instead of one
    zero point  C D p + G D (p^2 + p)         the correction depends on the image

Finding the groups (range, distance) is cheap; combining is not, unless partial sums are rescaled in few bits (p = 16).
Groups of attention rows scale output rows, so they combine nothing.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxvision.core.errors import ConfigError
from jaxvision.methods.igq_vit.sites import Site

PARTS = ("base", "range", "distance", "combine", "zero_point")
Bops = dict[str, int]


def fc_bops(
    tokens: int, fan_in: int, fan_out: int, weight_bits: int, act_bits: int, groups: int | None, fp_bits: int = 32
) -> Bops:
    """BOPs of a fully connected layer on one image by part (:data:`PARTS`).

    Args:
      tokens, fan_in, fan_out: N, C, D.
      groups: G of IGQ; None: one fixed quantizer, whose zero-point correction is folded into the bias.
      fp_bits: p.
    """
    p = fp_bits
    cost = dict.fromkeys(PARTS, 0) | {"base": tokens * fan_in * fan_out * weight_bits * act_bits}
    if groups is not None:
        cost["range"] = 2 * tokens * fan_in * p
        cost["distance"] = fan_in * groups * (2 * p * p + 3 * p)
        cost["combine"] = _combine(groups, tokens, fan_out, p)
        cost["zero_point"] = fan_in * fan_out * p + groups * fan_out * (p * p + p)
    return cost


def _combine(groups: int, tokens: int, fan_out: int, p: int) -> int:
    return (groups - 1) * tokens * fan_out * (p * p + p)


def attention_bops(
    heads: int, tokens: int, head_dim: int, act_bits: int, groups: int | None, fp_bits: int = 32
) -> Bops:
    """BOPs of attention times values (one window) by part; the product q k^T costs ``base`` once more, not included."""
    p = fp_bits
    cost = dict.fromkeys(PARTS, 0) | {"base": heads * tokens * tokens * head_dim * act_bits * act_bits}
    if groups is not None:
        cost["range"] = 2 * heads * tokens * tokens * p
        cost["distance"] = heads * tokens * groups * (2 * p * p + 3 * p)
    return cost


def _site_bops(
    site: Site,
    by_name: Mapping[str, Site],
    groups: int | None,
    weight_bits: int,
    act_bits: int,
    fp_bits: int,
    image_bits: int,
    head_groups: int,
) -> Bops:
    if site.kind == "rows":
        values = by_name.get(site.name.removesuffix("softmax") + "v")
        if values is None:
            raise ConfigError(f"BOPs of {site.name} need the head width, but the network has no tap for its values")
        windows, heads, tokens, _ = site.shape
        cost = attention_bops(heads, tokens, values.shape[-1], act_bits, groups, fp_bits)
        # q k^T is charged to this site: it has no grouped operand and the cost of the product below.
        return {part: windows * value * (2 if part == "base" else 1) for part, value in cost.items()}
    if site.weight is None:
        return dict.fromkeys(PARTS, 0)
    if site.kind == "image":
        # Patches don't overlap, so tokens * fan_in is the number of pixels times channels.
        return fc_bops(1, int(np.prod(site.shape)), site.fan_out, weight_bits, image_bits, None, fp_bits)
    cost = fc_bops(site.tokens, site.shape[-1], site.fan_out, weight_bits, act_bits, groups, fp_bits)
    if site.one_token and head_groups:
        cost["combine"] = _combine(min(head_groups, site.shape[-1]), site.tokens, site.fan_out, fp_bits)
    return cost


def network_bops(
    sites: Iterable[Site],
    groups: int | Mapping[str, int] | None,
    weight_bits: int,
    act_bits: int,
    fp_bits: int = 32,
    *,
    image_bits: int = 8,
    head_groups: int = 0,
) -> dict[str, Bops]:
    """BOPs of one image by site and part; the products q k^T and A v both count at the softmax site.

    Args:
      sites: of :func:`sites.list_sites`, all of them.
      groups: of the grouped sites: one number, one by site, or None for fixed per-tensor quantizers.
      weight_bits, act_bits, fp_bits, image_bits: widths.
      head_groups: fixed groups of an FC input of one token, which combine as many partial sums; 0: one quantizer.
    """
    by_name = {site.name: site for site in sites}
    count = {n: groups[n] if isinstance(groups, Mapping) else groups for n, site in by_name.items() if site.grouped}
    return {
        name: _site_bops(site, by_name, count.get(name), weight_bits, act_bits, fp_bits, image_bits, head_groups)
        for name, site in by_name.items()
    }


def summary(by_site: Mapping[str, Bops]) -> dict[str, int]:
    """Sums over sites: ``bops/base``, ``bops/index`` (range and distance), ``combine``, ``zero_point``, ``total``."""
    total = {part: sum(cost[part] for cost in by_site.values()) for part in PARTS}
    index = total.pop("range") + total.pop("distance")
    return {"bops/base": total["base"], "bops/index": index, "bops/combine": total["combine"]} | {
        "bops/zero_point": total["zero_point"],
        "bops/total": index + sum(total.values()),
    }


def cost_table(
    sites: Iterable[Site], candidates: Sequence[int], weight_bits: int, act_bits: int, fp_bits: int = 32
) -> np.ndarray:
    """All BOPs of each grouped site at each candidate count: int64 (grouped sites in order, candidates)."""
    sites = tuple(sites)
    grouped = [site.name for site in sites if site.grouped]
    tables = [network_bops(sites, count, weight_bits, act_bits, fp_bits) for count in candidates]
    return np.asarray([[sum(table[name].values()) for table in tables] for name in grouped], np.int64)
