"""Group counts for each site under a budget of bit operations (IGQ-ViT section 3.3, equations 9 and 10).

The perturbation of site n with a groups is the KL divergence of predictions when only that site is quantized::

    Psi_n(a) = mean over images of KL(softmax(logits_float) || softmax(logits_n,a))
    minimise sum_n Psi_n(a_n)  subject to  sum_n cost_n(a_n) <= budget
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.sparse

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.methods.igq_vit import simulate
from jaxvision.methods.igq_vit.sites import ApplyFn

CANDIDATES = (4, 6, 8, 10, 12, 16)
"""Group counts to choose from; ours, the paper's aren't readable."""
CONTEXTS = ("float", "quantized")
SOLVERS = ("milp", "dp")
DP_BINS = 1_000_000


def kl_divergence(logits: jax.Array, other: jax.Array) -> jax.Array:
    """KL(softmax(logits) || softmax(other)) of each row: (..., K) twice -> (...)."""
    log_p = jax.nn.log_softmax(jnp.asarray(logits), axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - jax.nn.log_softmax(jnp.asarray(other), axis=-1)), -1)


def perturbation_row(
    apply_fn: ApplyFn,
    variables: Any,
    quantizers: Mapping[str, Any],
    name: str,
    candidates: Sequence[Any],
    images: Any,
    float_logits: Any,
    *,
    context: str = "float",
    batch_size: int = 32,
) -> np.ndarray:
    """Psi of one site for each of its candidate quantizers, float64 (candidates,).

    Every run is the executable of :func:`simulate.forward`.

    Args:
      apply_fn, variables: the network: float weights for ``context="float"``, w_hat for "quantized".
      quantizers: of all sites, at the reference count.
      name: the site; candidates: its quantizers, all of the structure of ``quantizers[name]``.
      images: calibration images; float_logits: the float network's logits for them, (n, K).
      context: "float": only this site is quantized; "quantized": all sites are, this one with the candidate.
    """
    if context not in CONTEXTS:
        raise unknown("allocation.context", context, CONTEXTS)
    enabled = simulate.switches(quantizers, (name,) if context == "float" else True)

    def start(candidate: Any) -> list[tuple[jax.Array, int]]:
        changed = dict(quantizers) | {name: candidate}
        return simulate.dispatch(apply_fn, variables, changed, enabled, images, batch_size)

    # All runs are started before the first is waited for, so that the device can overlap them.
    runs = [start(candidate) for candidate in candidates]
    return np.asarray([_mean_kl(float_logits, simulate.gather(run)) for run in runs])


_kl_divergence = jax.jit(kl_divergence)


def _mean_kl(float_logits: Any, logits: np.ndarray) -> float:
    return float(np.mean(np.asarray(_kl_divergence(float_logits, logits), np.float64)))


def perturbation_table(
    apply_fn: ApplyFn,
    variables: Any,
    quantizers: Mapping[str, Any],
    tables: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    images: Any,
    float_logits: Any,
    *,
    context: str = "float",
    batch_size: int = 32,
) -> np.ndarray:
    """:func:`perturbation_row` of the sites ``names``, (sites, candidates); ``tables[j][name]`` is candidate j."""
    rows = [
        perturbation_row(
            apply_fn, variables, quantizers, name, [table[name] for table in tables], images, float_logits,
            context=context, batch_size=batch_size,
        )
        for name in names
    ]  # fmt: skip
    return np.stack(rows)


def allocate(psi: np.ndarray, cost: np.ndarray, budget: float, *, solver: str = "milp") -> np.ndarray:
    """The candidate of each site with the least total perturbation within the budget; exact.

    Args:
      psi: (sites, candidates) float, perturbations.
      cost: (sites, candidates), BOPs.
      budget: the most that the chosen costs may sum to.
      solver: "milp" (HiGHS; falls back to "dp" where it gives no answer) or "dp", exact where the costs divided by
        their greatest common divisor fit a million bins, else on costs rounded up to such a grid.

    Returns:
      int64 (sites,), indices of candidates.

    Raises:
      ConfigError: shapes differ, a value isn't finite, or even the cheapest choice is above the budget.
    """
    psi, cost = np.asarray(psi, np.float64), np.asarray(cost, np.float64)
    if psi.ndim != 2 or psi.shape != cost.shape or not (np.isfinite(psi).all() and np.isfinite(cost).all()):
        raise ConfigError(f"perturbations {psi.shape} and costs {cost.shape} must be finite tables of one shape")
    if solver not in SOLVERS:
        raise unknown("allocation.solver", solver, SOLVERS)
    if (smallest := cost.min(1).sum()) > budget:
        raise ConfigError(f"the budget of {budget:.0f} BOPs can't be met; the smallest possible is {smallest:.0f}")
    choice = _allocate_milp(psi, cost, budget) if solver == "milp" else None
    return _allocate_dp(psi, cost, budget) if choice is None else choice


def total(table: np.ndarray, choice: np.ndarray) -> float:
    """The sum over sites of ``table[site, choice[site]]``."""
    return float(np.take_along_axis(np.asarray(table, np.float64), np.asarray(choice)[:, None], 1).sum())


def _allocate_milp(psi: np.ndarray, cost: np.ndarray, budget: float) -> np.ndarray | None:
    sites, candidates = psi.shape
    one_hot = scipy.sparse.kron(scipy.sparse.eye(sites), np.ones((1, candidates)), format="csr")
    scale = max(float(np.abs(cost).max()), 1.0)  # costs are near 1e9; HiGHS wants coefficients near 1
    found = scipy.optimize.milp(
        psi.ravel() / max(float(np.abs(psi).max()), np.finfo(float).tiny),
        constraints=[
            scipy.optimize.LinearConstraint(one_hot, 1, 1),
            scipy.optimize.LinearConstraint(cost.reshape(1, -1) / scale, -np.inf, budget / scale),
        ],
        integrality=np.ones(psi.size),
        bounds=scipy.optimize.Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        return None
    choice = found.x.reshape(sites, candidates).argmax(1)
    # The solver's tolerance may let the sum exceed the budget by a hair; then the exact program decides.
    return choice if total(cost, choice) <= budget else None


def _allocate_dp(psi: np.ndarray, cost: np.ndarray, budget: float) -> np.ndarray:
    whole = np.array_equal(cost, np.rint(cost))
    divisor = math.gcd(*map(int, cost.ravel())) if whole else 0
    budget = min(budget, cost.max(1).sum())
    unit = float(divisor) if divisor and budget / divisor <= DP_BINS else budget / DP_BINS
    weight = np.ceil(cost / unit - 1e-12).astype(np.int64) if unit else np.zeros(cost.shape, np.int64)
    bins = int(budget / unit + 1e-9) + 1 if unit else 1
    if weight.min(1).sum() >= bins:  # only the rounding of the grid is in the way
        return cost.argmin(1)
    best, choices = np.zeros(bins), []
    for row, size in zip(psi, weight):
        options = np.full((len(row), bins), np.inf)
        for j, (value, w) in enumerate(zip(row, size)):
            if w < bins:
                options[j, w:] = best[: bins - w] + value
        choices.append(options.argmin(0).astype(np.int16))
        best = options.min(0)
    choice, left = np.zeros(len(psi), np.int64), bins - 1
    for site in reversed(range(len(psi))):
        choice[site] = choices[site][left]
        left -= weight[site, choice[site]]
    return choice
