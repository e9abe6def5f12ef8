"""Numbers that show what the method rests on and what it does: variation, SQNR, use of the groups."""

from collections.abc import Iterable, Mapping

import numpy as np

from jaxvision.core.errors import ConfigError
from jaxvision.methods.igq_vit.sites import Site


def instance_variation(ranges: np.ndarray) -> tuple[float, float]:
    """How much channel ranges vary between images, and how much between channels.

    With width ``w_ic`` of image i and channel c, m_c and s_c its mean and (biased) standard deviation over images::

        variation = mean_c s_c / m_c        spread = max_c m_c / median_c m_c

    Args:
      ranges: (B, C, 2) float, minimum and maximum.

    Returns:
      variation (a channel that is constant in every image counts 0), and spread (infinite for a median of 0).
    """
    width = np.asarray(ranges[..., 1], np.float64) - np.asarray(ranges[..., 0], np.float64)
    mean, deviation = width.mean(0), width.std(0)
    variation = np.divide(deviation, mean, out=np.zeros_like(mean), where=mean > 0).mean()
    median = np.median(mean)
    return float(variation), float(mean.max() / median) if median > 0 else float("inf")


def variation_table(sites: Iterable[Site], ranges: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """:func:`instance_variation` of each FC input by site name."""
    return {site.name: instance_variation(ranges[site.name]) for site in sites if site.kind == "channels"}


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio, 10 log10(sum x^2 / sum (x - x_hat)^2) dB; infinite without noise."""
    if signal < 0 or noise < 0:
        raise ConfigError(f"signal {signal} and noise {noise} are powers and can't be negative")
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal > 0 else float("-inf")


def group_histogram(group: np.ndarray, count: int) -> np.ndarray:
    """Units (channels or rows) in each group, mean over the first axis: group (B, ...) int -> float64 (count,)."""
    group = np.asarray(group)
    return np.bincount(group.ravel(), minlength=count)[:count] / len(group)


def reassigned_fraction(group: np.ndarray) -> float:
    """The share of (image, channel) pairs whose group isn't that channel's most frequent one: group (B, C) int.

    Zero means that a static assignment would do; the phenomenon of the paper makes it large.
    """
    group = np.asarray(group)
    most = np.stack([np.bincount(channel).max() for channel in group.T])
    return float(1 - most.sum() / group.size)


def family(name: str) -> str:
    """What a site is in its block, "qkv" for "blocks.3.attn.qkv": the rows of the report's tables."""
    return name.rsplit(".", 1)[-1] if name not in ("patch_embed.proj", "head.fc") else name


def by_family(values: Mapping[str, float]) -> dict[str, float]:
    """The mean over blocks: values by site name -> means by :func:`family`, in order of appearance."""
    found: dict[str, list[float]] = {}
    for name, value in values.items():
        found.setdefault(family(name), []).append(value)
    return {name: float(np.mean(members)) for name, members in found.items()}
