"""Numbers that show what the method rests on and what it does: variation of ranges, use of the groups."""

import numpy as np


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
