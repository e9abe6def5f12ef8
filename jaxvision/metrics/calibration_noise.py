"""How much of a calibration error is noise: what a perfectly calibrated model would score, and intervals.

Every binned error is biased upwards: with N rows in n bins even a perfectly calibrated model scores about
``sqrt(2 / (pi N)) sum_b sqrt(w_b a_b (1 - a_b))``: 2.8 % on 2,000 rows of ten classes, 1 % on 10,000. A difference
below that floor means nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxvision.core.errors import ConfigError
from jaxvision.metrics import calibration
from jaxvision.metrics.calibration import Bins, Ranked
from jaxvision.metrics.calibration_classes import ClassSums
from jaxvision.metrics.calibration_rows import in_threads
from jaxvision.metrics.calibration_scan import Measured

SIMULATIONS = 200
_ENTRIES = 1 << 16
"""Sets of more rows are simulated with neighbours in confidence taken together."""
ADAPTIVE = "adaptive_ece"
CLASSWISE = "classwise_ece"
_NO_BOOTSTRAP = ("mce", "ace")


@dataclass(frozen=True)
class Floor:
    """An error's distribution over draws in which every confidence is true.

    Attributes:
      mean: the noise floor.
      upper: its 95 % quantile; a score below it is no evidence of miscalibration.
      p_value: ``(1 + draws that score at least as much as was measured) / (1 + draws)``.
    """

    mean: float
    upper: float
    p_value: float


@dataclass(frozen=True)
class Interval:
    """A 95 % interval of an error."""

    low: float
    high: float


def noise_floor(measured: Measured, *, simulations: int = SIMULATIONS, seed: int = 0) -> dict[str, Floor]:
    """What a perfectly calibrated model with these very confidences scores on so many rows.

    The top label: a row is right with probability r, drawn anew for each simulation, in the same bins. Classwise:
    the number of rows with label k in a bin is drawn from the binomial distribution of the same mean ``sum p`` and
    variance ``sum p (1 - p)``.

    Args:
      measured: of :func:`~jaxvision.metrics.calibration_scan.measure`.
      simulations: how many draws.
      seed: of the draws.

    Returns:
      name -> floor, for the errors of ``calibration.ERRORS``, ``adaptive_ece`` and ``classwise_ece``.
    """
    _check(simulations, "simulations")
    ranked, (fixed, adaptive) = _entries(measured)
    single = ranked is measured.ranked

    def draw(generator: np.random.Generator) -> dict[str, float]:
        if single:
            correct = (generator.random(len(ranked.count)) < ranked.confidence).astype(np.float64)
        else:
            # Rounding may leave a mean just above 1.
            chance = np.minimum(ranked.confidence, 1.0)
            correct = generator.binomial(ranked.count.astype(np.int64), chance).astype(np.float64)
        drawn = Ranked(ranked.confidence, ranked.count, correct)
        return _errors(drawn.between(fixed), drawn.between(adaptive))

    scores = _repeat(draw, simulations, seed)
    if measured.classes is not None:
        scores |= _repeat(_classwise_draw(measured.classes, measured.counted), simulations, seed + 1)
    found = {}
    for name, drawn in scores.items():
        p_value = (1 + np.count_nonzero(drawn >= measured.values[name])) / (1 + simulations)
        found[name] = Floor(float(drawn.mean()), float(np.quantile(drawn, 0.95)), float(p_value))
    return found


def _classwise_draw(classes: ClassSums, counted: np.ndarray) -> Callable[[np.random.Generator], dict[str, float]]:
    mean, square = classes.confidence[counted], classes.square[counted]
    cells = np.flatnonzero(mean > 0)
    mean, square = mean.reshape(-1)[cells], square.reshape(-1)[cells]
    # No fewer trials than the mean: their chance is mean / trials.
    trials = np.maximum(np.round(mean**2 / np.maximum(square, np.finfo(np.float64).tiny)), np.ceil(mean))
    trials = np.clip(trials, 1, 2.0**62).astype(np.int64)
    rows = classes.rows.sum() * np.count_nonzero(counted)

    def draw(generator: np.random.Generator) -> dict[str, float]:
        return {CLASSWISE: float(np.abs(generator.binomial(trials, mean / trials) - mean).sum() / rows)}

    return draw


def intervals(
    measured: Measured, floors: dict[str, Floor], *, resamples: int = SIMULATIONS, seed: int = 0
) -> dict[str, Interval]:
    """95 % intervals of the true errors, from resampling the rows with replacement.

    The plain bootstrap (percentile) interval is useless here: resampling adds to an error the same upward bias that
    sampling did, and near the floor it misses the truth almost always. Instead:

    - top label: the basic bootstrap ``[2 E - q_97.5, 2 E - q_2.5]``, which takes the bias off, cut at 0, and with
      ``low = 0`` where the floor's test doesn't reject perfect calibration at 5 %;
    - classwise: ``[E - floor - 1.96 se, E + 1.96 se]`` with the standard error of resampling 32 groups of rows. A sum
      of absolute values is biased upwards, by at most the floor's mean: with K n cells, most of them nearly empty, no
      finer correction holds.

    So a measured value can lie above its interval: the error itself is smaller than what it measures as.

    Args:
      measured: of :func:`~jaxvision.metrics.calibration_scan.measure`.
      floors: of :func:`noise_floor`.
      resamples: how many.
      seed: of the draws.

    Returns:
      name -> interval, for the names of ``floors`` but ``mce`` and ``ace``: a maximum, and a mean over whichever bins
      are not empty, have no bootstrap.
    """
    _check(resamples, "resamples")
    ranked, (fixed, _) = _entries(measured)
    single = ranked is measured.ranked
    num_bins, lowest = measured.options["num_bins"], measured.options["include_lowest"]
    size = len(ranked.count)

    def draw(generator: np.random.Generator) -> dict[str, float]:
        if single:
            count = np.bincount(generator.integers(size, size=size), minlength=size).astype(np.float64)
            drawn = Ranked(ranked.confidence, count, count * ranked.correct)
        else:
            right = generator.poisson(ranked.correct).astype(np.float64)
            wrong = generator.poisson(ranked.count - ranked.correct)
            drawn = Ranked(ranked.confidence, right + wrong, right)
        # The edges of adaptive bins belong to the sample: each resample has its own.
        adaptive = drawn.bins(drawn.adaptive_edges(num_bins), include_lowest=lowest)
        return _errors(drawn.between(fixed), adaptive)

    found = {}
    for name, drawn in _repeat(draw, resamples, seed).items():
        if name in _NO_BOOTSTRAP:
            continue
        low, high = (max(float(2 * measured.values[name] - end), 0.0) for end in np.quantile(drawn, [0.975, 0.025]))
        found[name] = Interval(0.0 if floors[name].p_value > 0.05 else low, high)
    if measured.classes is not None:
        drawn = _repeat(_classwise_resample(measured.classes, measured.counted), resamples, seed + 1)[CLASSWISE]
        value, margin = measured.values[CLASSWISE], 1.96 * float(drawn.std())
        found[CLASSWISE] = Interval(max(value - floors[CLASSWISE].mean - margin, 0.0), value + margin)
    return found


def _classwise_resample(classes: ClassSums, counted: np.ndarray) -> Callable[[np.random.Generator], dict[str, float]]:
    full = np.flatnonzero(classes.rows)
    difference = classes.difference[full][:, counted].reshape(len(full), -1)
    rows = classes.rows[full]
    number = np.count_nonzero(counted)

    def draw(generator: np.random.Generator) -> dict[str, float]:
        weights = np.bincount(generator.integers(len(full), size=len(full)), minlength=len(full)).astype(np.float64)
        return {CLASSWISE: float(np.abs(weights @ difference).sum() / (weights @ rows) / number)}

    return draw


def _check(number: int, name: str) -> None:
    if number < 1:
        raise ConfigError(f"{name}={number}, but at least 1 is needed")


def _errors(top: Bins, adaptive: Bins) -> dict[str, float]:
    return {
        **{name: float(error(top)) for name, error in calibration.ERRORS.items()},
        ADAPTIVE: float(calibration.ece(adaptive)),
    }


def _entries(measured: Measured) -> tuple[Ranked, tuple[np.ndarray, np.ndarray]]:
    """The sorted rows, of large sets grouped, and where the fixed and the adaptive bins end among the entries."""
    rows, num_bins = measured.ranked, measured.options["num_bins"]
    fixed = rows.positions(calibration.fixed_edges(num_bins))
    adaptive = rows.positions(rows.adaptive_edges(num_bins))
    if measured.options["include_lowest"]:
        adaptive[0] = 0
    grouped = rows.grouped(_ENTRIES, fixed, adaptive)
    ends = np.concatenate([[0], np.cumsum(grouped.count)])
    return grouped, (np.searchsorted(ends, fixed), np.searchsorted(ends, adaptive))


def _repeat(draw: Callable[[np.random.Generator], dict[str, float]], times: int, seed: int) -> dict[str, np.ndarray]:
    """``draw`` with ``times`` independent generators, in threads; the result depends on the seed alone."""
    generators = (np.random.default_rng(each) for each in np.random.SeedSequence(seed).spawn(times))
    found = list(in_threads(draw, generators))
    return {name: np.asarray([each[name] for each in found]) for name in found[0]}
