"""Scaling logits after training: one temperature (exact or by the papers' grid), or a factor and offset a class.

Fitted on a validation split, never on what is reported: :func:`fit_temperature` takes both and refuses when half of the
one is in the other. Temperature scaling changes no prediction.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from jaxvision.core.errors import ConfigError, DataError
from jaxvision.metrics import calibration
from jaxvision.metrics.calibration import NUM_BINS, Bins
from jaxvision.metrics.calibration_overlap import refuse_overlap
from jaxvision.metrics.calibration_rows import Rows, in_threads, part_rows
from jaxvision.metrics.calibration_scan import Scaling, softmax

LOWEST, HIGHEST = 0.02, 100.0
"""The temperatures that the exact fit considers."""
METHODS = ("exact", "grid_nll", "grid_ece")


@dataclass(frozen=True)
class Temperature:
    """A fitted temperature.

    Attributes:
      value: T; logits are divided by it.
      method: one of ``METHODS``.
      nll_before: on the validation rows at T = 1.
      nll_after: at T.
      rows: how many validation rows.
      at_bound: the best T lies beyond what was searched: the rows are separable or no better than chance.
    """

    value: float
    method: str
    nll_before: float
    nll_after: float
    rows: int
    at_bound: bool

    @property
    def scaling(self) -> Scaling:
        """``z / T``."""
        return Scaling(1 / self.value)


def grid() -> np.ndarray:
    """0.1, 0.2, ... 10.0, float64 [100], by repeated addition as in the official code."""
    return np.cumsum(np.full(100, 0.1))


def fit_temperature(
    validation: Rows, test: Rows | None = None, *, method: str = "exact", num_bins: int = NUM_BINS
) -> Temperature:
    """The temperature that fits the validation rows.

    Args:
      validation: rows that nothing is reported on.
      test: the rows that will be reported on; see :func:`~jaxvision.metrics.calibration_overlap.refuse_overlap`.
      method: "exact": the minimum of the NLL, by Newton's method in 1/T in float64 (it is convex there), within
        [0.02, 100]; "grid_nll", "grid_ece": the first minimum over :func:`grid` in float32, as the papers do
        (classification tables use the ECE, segmentation the NLL).
      num_bins: of the ECE.

    Raises:
      ConfigError: an unknown method.
      DataError: half of ``validation`` is in ``test``, or it has fewer than two rows.
    """
    if method not in METHODS:
        raise ConfigError(f"temperature method {method!r} is unknown; there are: {', '.join(METHODS)}")
    if test is not None:
        refuse_overlap(validation, test)
    nll_before, *_, count = _derivatives(validation, 1.0, np.float64)
    if count < 2:
        raise DataError(f"{validation.name} hold {count:g} rows that count, but fitting needs at least 2")
    if method == "exact":
        beta = newton(lambda beta: _derivatives(validation, beta, np.float32)[1:3], 1.0, tolerance=1e-3)
        beta = newton(lambda beta: _derivatives(validation, beta, np.float64)[1:3], beta, tolerance=1e-12)
        bound = beta in (1 / LOWEST, 1 / HIGHEST)
        value = 1 / beta
    else:
        eces, nlls = grid_scores(validation, num_bins)
        best = int(np.argmin(eces if method == "grid_ece" else nlls))
        value, bound = float(grid()[best]), best in (0, 99)
    nll_after = _derivatives(validation, 1 / value, np.float64)[0]
    return Temperature(value, method, nll_before, nll_after, int(count), bound)


def newton(
    slopes: Callable[[float], tuple[float, float]], start: float, *, tolerance: float, steps: int = 100
) -> float:
    """The minimum of a convex function on [1/HIGHEST, 1/LOWEST] from its first and second derivatives.

    Newton's steps inside a bracket that every slope tightens; a step that leaves it is replaced by the geometric
    middle. A function that is flat everywhere keeps ``start``.
    """
    low, high = 1 / HIGHEST, 1 / LOWEST
    ends = {low: False, high: False}
    beta = min(max(start, low), high)
    for _ in range(steps):
        slope, curvature = slopes(beta)
        if slope == 0 or (beta == high and slope < 0) or (beta == low and slope > 0):
            return beta
        low, high = (beta, high) if slope < 0 else (low, beta)
        new = beta - slope / curvature if curvature > 0 else np.inf if slope < 0 else 0.0
        if not low < new < high:
            end = high if slope < 0 else low
            # The ends are tried once; then the bracket is halved.
            new = np.sqrt(low * high) if ends.get(end, True) else end
            ends[end] = True
        if abs(new - beta) <= tolerance * beta:
            return float(new)
        beta = float(new)
    return beta


def _derivatives(rows: Rows, beta: float, dtype: type) -> tuple[float, float, float, float]:
    """NLL of ``beta z``, its first and second derivative in beta (``E_p[z] - z_y``, ``Var_p[z]``), means; and N."""

    def look(block: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        sums = np.zeros(4)
        for z, y in _split(*block):
            z = z.astype(dtype)
            z -= z.max(-1, keepdims=True)
            own = z[np.arange(len(y)), y]
            p, nll = softmax(z * dtype(beta), own * dtype(beta))
            p *= z
            mean = p.sum(-1)
            square = np.einsum("ij,ij->i", p, z)
            parts = (nll, mean - own, square - mean * mean, np.ones_like(nll))
            sums += [each.sum(dtype=np.float64) for each in parts]
        return sums

    total = sum(in_threads(look, rows.blocks()), np.zeros(4))
    return *(total[:3] / max(total[3], 1)).tolist(), float(total[3])


def _split(logits: np.ndarray, labels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    step = part_rows(logits.shape[-1])
    for start in range(0, len(labels), step):
        yield logits[start : start + step], labels[start : start + step]


def _count(rows: Rows) -> int:
    return sum(len(labels) for _, labels in rows.blocks())


def grid_scores(rows: Rows, num_bins: int = NUM_BINS) -> tuple[np.ndarray, np.ndarray]:
    """ECE and NLL at every temperature of :func:`grid`, float64 [100] each, softmax in the logits' precision."""
    edges, temperatures = calibration.fixed_edges(num_bins), grid()

    def look(block: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, int]:
        sums, nll, count = np.zeros((len(temperatures), 3, num_bins)), np.zeros(len(temperatures)), 0
        for z, y in _split(*block):
            count += len(y)
            right = z.argmax(-1) == y
            for index, temperature in enumerate(temperatures):
                scaled = z / z.dtype.type(temperature)
                own = scaled[np.arange(len(y)), y]
                peak = scaled.max(-1)
                total = np.exp(scaled - peak[:, None]).sum(-1)
                confidence = 1 / total
                nll[index] += (np.log(total) + (peak - own)).sum(dtype=np.float64)
                bin_of = np.searchsorted(edges, confidence, side="left") - 1
                for sums_of, weights in zip(sums[index], (None, confidence, right)):
                    sums_of += np.bincount(bin_of, weights, num_bins)
        return sums, nll, count

    sums, nll, count = np.zeros((len(temperatures), 3, num_bins)), np.zeros(len(temperatures)), 0
    for part_sums, part_nll, part_count in in_threads(look, rows.blocks()):
        sums, nll, count = sums + part_sums, nll + part_nll, count + part_count
    bins = Bins(sums[:, 0], sums[:, 1], sums[:, 2], np.full(len(temperatures), float(count)))
    return calibration.ece(bins), nll / max(count, 1)


# --- a factor and an offset a class ----------------------------------------------------------------------------------


def fit_vector(validation: Rows, test: Rows | None = None) -> Scaling:
    """Vector scaling ``softmax(w z + b)``, w and b [K], by the NLL (convex): L-BFGS in float64 from w = 1, b = 0.

    It can change predictions, and with K in the hundreds it fits the noise of a small validation split.

    Raises:
      DataError: as in :func:`fit_temperature`.
    """
    from scipy.optimize import minimize  # a quarter of a second to import

    if test is not None:
        refuse_overlap(validation, test)
    classes, count = validation.num_classes, _count(validation)
    if count < 2:
        raise DataError(f"{validation.name} hold {count} rows that count, but fitting needs at least 2")

    def look_at(scaling: Scaling) -> Callable[[tuple[np.ndarray, np.ndarray]], np.ndarray]:
        def look(block: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
            sums = np.zeros(2 * classes + 1)
            for z, y in _split(*block):
                z = z.astype(np.float64)
                scaled = scaling(z)
                p, nll = softmax(scaled, scaled[np.arange(len(y)), y])
                p[np.arange(len(y)), y] -= 1
                sums += np.concatenate([np.einsum("ij,ij->j", p, z), p.sum(0), [nll.sum()]])
            return sums

        return look

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        look = look_at(Scaling(theta[:classes], theta[classes:]))
        sums = sum(in_threads(look, validation.blocks()), np.zeros(2 * classes + 1)) / count
        return float(sums[-1]), sums[:-1]

    start = np.concatenate([np.ones(classes), np.zeros(classes)])
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 200})
    return Scaling(found.x[:classes], found.x[classes:])
