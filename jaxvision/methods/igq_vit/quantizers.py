"""The quantizers of a whole network: from a few images to a quantizer for every site.

Parallel (the default protocol): all sites see the float network; ranges are collected once and every layer of one
shape is calibrated in one program. Sequential: each site sees the network whose earlier sites are quantized.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.methods.igq_vit import groups
from jaxvision.methods.igq_vit.sites import ApplyFn, Site, collect
from jaxvision.quant import activation, weights


def tensor_intervals(
    apply_fn: ApplyFn,
    variables: Any,
    images: Any,
    sites: Iterable[Site],
    bits: int,
    *,
    image_bits: int = 8,
    chunk: int = 32,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Lower and upper end of each per-tensor site by the percentile search of RepQ-ViT, on the float network."""
    chosen = tuple(site for site in sites if not site.grouped)
    values = collect(apply_fn, variables, images, chosen, chunk)
    return {
        site.name: weights.tensor_interval(values.pop(site.name), image_bits if site.kind == "image" else bits)
        for site in chosen
    }


def calibrate_groups(
    ranges: Mapping[str, np.ndarray],
    sites: Iterable[Site],
    num_groups: int | Mapping[str, int],
    *,
    iters: int = 20,
    m_step: str = "mean",
    per_head: bool = False,
) -> tuple[dict[str, jax.Array], dict[str, np.ndarray]]:
    """Bounds of every grouped site from its ranges; all sites of one shape and count in one program.

    Args:
      ranges: of :func:`collect_ranges`.
      sites: the grouped ones among them are calibrated.
      num_groups: G, or G by site.
      iters, m_step: of :func:`groups.calibrate_bounds`.
      per_head: quantizers of its own for each attention head.

    Returns:
      bounds by site, (Hq, G, 2), and the objective, (Hq, iters + 1).
    """
    batches: dict[tuple, list[tuple[str, np.ndarray]]] = {}
    for site in sites:
        if site.grouped:
            count = num_groups if isinstance(num_groups, int) else num_groups[site.name]
            found = ranges[site.name]
            heads = found.shape[1] if per_head and site.kind == "rows" else 1
            samples = np.moveaxis(found, 1, 0) if heads > 1 else found
            batches.setdefault((count, samples.size, heads), []).append((site.name, samples.reshape(heads, -1, 2)))
    bounds, objective = {}, {}
    for (count, _, heads), members in batches.items():
        stacked = np.concatenate([samples for _, samples in members])
        b, o = groups.calibrate_layers(stacked, count, iters, m_step)
        for i, (name, _) in enumerate(members):
            bounds[name], objective[name] = b[i * heads : (i + 1) * heads], np.asarray(o[i * heads : (i + 1) * heads])
    return bounds, objective


def igq_quantizers(
    sites: Iterable[Site],
    bounds: Mapping[str, Any],
    intervals: Mapping[str, tuple[Any, Any]],
    bits: int,
    *,
    image_bits: int = 8,
    max_groups: int = 16,
    instance: str = "image",
    clip_zero_point: bool = False,
) -> dict[str, Any]:
    """The quantizer of every site by name: IGQ where there are groups, one fixed interval elsewhere."""
    made: dict[str, Any] = {}
    for site in sites:
        if site.grouped:
            made[site.name] = groups.InstanceGroupQuantizer.create(
                bounds[site.name], bits, max_groups, axis=site.kind, instance=instance, clip_zero_point=clip_zero_point
            )
        else:
            width = image_bits if site.kind == "image" else bits
            made[site.name] = activation.AffineQuantizer.from_interval(
                *intervals[site.name], width, clip_zero_point=clip_zero_point
            )
    return made


def calibrate_sequentially(
    apply_fn: ApplyFn, variables: Any, images: Any, make: Callable[[str, jax.Array], Any | None]
) -> dict[str, Any]:
    """Calibrates in the order of the forward pass, each site seeing the already quantized network (as RepQ-ViT does).

    Args:
      apply_fn, variables: the network; quantized weights give the fully sequential protocol.
      images: (B, H, W, C), one batch; the pass runs uncompiled, one activation at a time.
      make: ``(site name, value) -> quantizer``, or None for a tap that stays float.

    Returns:
      the quantizers by site.
    """
    made: dict[str, Any] = {}

    def tap(name: str, x: jax.Array) -> jax.Array:
        quantizer = make(name, x)
        if quantizer is None:
            return x
        made[name] = quantizer
        return quantizer(x, images.shape[0])

    apply_fn(variables, jnp.asarray(images), tap=tap)
    return made


@partial(jax.jit, static_argnames="apply_fn")
def _layer_scale_errors(apply_fn: ApplyFn, variables: Any, quantizers: Any, images: jax.Array) -> dict[str, jax.Array]:
    errors = {}

    def tap(name: str, x: jax.Array) -> jax.Array:
        if name in quantizers:
            q = quantizers[name]
            channels = q.axis == "channels"
            value = activation.per_instance(x, images.shape[0], q.instance) if channels else x
            bounds = q.bounds[0] if channels else q.bounds
            errors[name] = groups.layer_scale_errors(
                value, bounds, q.bits, q.count, axis=q.axis, clip_zero_point=q.clip_zero_point
            )
        return x

    apply_fn(variables, images, tap=tap)
    return errors


def refine_layer_scale(
    apply_fn: ApplyFn, variables: Any, quantizers: Mapping[str, Any], images: Any, batch_size: int = 32
) -> tuple[dict[str, Any], dict[str, float]]:
    """Widens (or narrows) all bounds of a site by the one factor of least squared error. Ours, not the paper's.

    Mean bounds are narrower than half of their members' ranges and clip them, which hurts where tokens are few. The
    error is that of the float network's values, and no activation is stored.

    Args:
      apply_fn, variables: the float network.
      quantizers: by site; those that aren't IGQ's stay.
      images: calibration images (n, H, W, C), ``batch_size`` at a time.

    Returns:
      all quantizers, those of IGQ sites with scaled bounds, and the factors by site.
    """
    chosen = {n: q for n, q in quantizers.items() if isinstance(q, groups.InstanceGroupQuantizer)}
    total: dict[str, np.ndarray] = {}
    images = np.asarray(images)
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        for name, errors in jax.device_get(_layer_scale_errors(apply_fn, variables, chosen, part)).items():
            total[name] = total.get(name, 0.0) + errors.astype(np.float64) * len(part)
    factors = {name: groups.MULTIPLIERS[int(np.argmin(errors))] for name, errors in total.items()}
    scaled = {name: q.replace(bounds=q.bounds * factors[name]) for name, q in chosen.items()}
    return dict(quantizers) | scaled, factors
