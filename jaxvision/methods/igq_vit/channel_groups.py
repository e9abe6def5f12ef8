"""Fixed groups of channels: from each channel's calibrated range to the interval that its group shares."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from jaxvision.methods.igq_vit import groups
from jaxvision.quant.activation import group_of_unit


def _pooled(extremes: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Each channel's interval [C, 2] widened to that of its group [C]."""
    bounds = np.array([[np.inf, -np.inf]] * (group.max() + 1), extremes.dtype)
    np.minimum.at(bounds[:, 0], group, extremes[:, 0])
    np.maximum.at(bounds[:, 1], group, extremes[:, 1])
    return bounds[group]


def consecutive_bounds(extremes: np.ndarray, num_groups: int) -> np.ndarray:
    """Interval of each channel, [C, 2] of [C, 2]: that of its slice of ``C / num_groups`` neighbours."""
    return _pooled(extremes, group_of_unit(len(extremes), num_groups))


def peg_bounds(extremes: np.ndarray, num_groups: int) -> np.ndarray:
    """Interval of each channel, [C, 2] of [C, 2]: that of its group by rank in ``max - min``."""
    rank = np.argsort(np.argsort(extremes[:, 1] - extremes[:, 0], kind="stable"), kind="stable")
    return _pooled(extremes, group_of_unit(len(extremes), num_groups)[rank])


def kmeans_bounds(extremes: np.ndarray, num_groups: int, iters: int = 20) -> np.ndarray:
    """Interval of each channel, [C, 2] of [C, 2]: the centre of its cluster, found as IGQ-ViT calibrates its groups."""
    samples = jnp.asarray(extremes)
    bounds, _ = groups.calibrate_bounds(samples, min(num_groups, len(extremes)), iters)
    return np.asarray(bounds[groups.assign(samples, bounds)])


BOUNDS: Mapping[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "consecutive": consecutive_bounds,
    "peg": peg_bounds,
    "kmeans": kmeans_bounds,
}
