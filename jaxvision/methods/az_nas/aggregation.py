"""AZ-NAS's non-linear rank aggregation (Lee and Ham 2024, section 3.3).

Ranks exist within one set of candidates only: the same architecture has another value in another set.
"""

from collections.abc import Mapping

import numpy as np
from scipy import stats

from jaxvision.core.errors import ConfigError, unknown

HOW = ("log", "linear")


def average_ranks(scores: np.ndarray) -> np.ndarray:
    """Ranks [..., m] float64 along the last axis, 1 the worst; equal scores, -inf among them, share their mean rank.

    Raises:
      ConfigError: a NaN, which has no rank; make it -inf first.
    """
    scores = np.asarray(scores, np.float64)
    if np.isnan(scores).any():
        raise ConfigError(f"{np.isnan(scores).sum()} of {scores.size} scores are NaN and have no rank; make them -inf")
    return stats.rankdata(scores, axis=-1)


def aggregate(scores: Mapping[str, np.ndarray], how: str = "log") -> np.ndarray:
    """One value for each of m candidates from their ranks r by several proxies, float64 [m]; the largest is the pick
    (``np.argmax``: the first of equals).

      log: ``sum_M ln(r_M / m)``: a candidate that is bad by one proxy can't make up for it by the others
      linear: ``sum_M r_M``, the ablation

    Args:
      scores: proxy name -> [m], larger is better, -inf ranks last.
      how: "log" or "linear".

    Raises:
      ConfigError: no proxies, a NaN, or another ``how``.
    """
    if how not in HOW:
        raise unknown("aggregation", how, HOW)
    if not scores:
        raise ConfigError("there are no proxies to aggregate; name at least one")
    ranks = average_ranks(np.stack([np.asarray(values, np.float64) for values in scores.values()]))
    return np.log(ranks / ranks.shape[-1]).sum(0) if how == "log" else ranks.sum(0)
