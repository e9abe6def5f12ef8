"""The interval of gradient quantization: LBT's controller, its start, its error measures, and other choices of gamma.

With alpha the fraction of gradients that count as large and R(gamma) = mean[|G| > gamma gmax] (LBT, ECCV 2024)::

    gamma <- clip(gamma + beta sign(R(gamma) - alpha / (2^b - 1)), 0.001, 1)        once a step and layer

R comes out of the backward pass as two counts (:func:`jaxvision.quant.gradient.clip_counts`). Everything here is a pure
function of arrays; functions of a gradient take maxima and counts over all devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxvision.core import devices, struct
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.quant import gradient

SMALLEST = 1e-3
"""gamma never falls below this."""
BETA = 1e-3
SEARCH_MOMENTUM = 0.999
SEARCH_STEP = 1e-3
STARTS = ("one", "search", "quantile")
GAMMAS = tuple(np.linspace(0.05, 1, 96).round(2).tolist())
"""Where the searches for the least error look."""
FEWEST_CLIPPED = 4


# --- the controller --------------------------------------------------------------------------------------------------


def check_controller(alpha: float, beta: float = BETA, start: str = "quantile") -> None:
    """Raises ConfigError where a setting of the controller is impossible."""
    if not 0 < alpha <= 1:
        raise ConfigError(f"alpha={alpha!r} must be a fraction of the gradients, above 0 and at most 1")
    if not 0 < beta < 1:
        raise ConfigError(f"beta={beta!r} must be a step of gamma, between 0 and 1")
    if start not in STARTS:
        raise unknown("interval start", start, STARTS)


def target_ratio(alpha: ArrayLike, bits: ArrayLike) -> jax.Array:
    """alpha / (2^b - 1): the clip ratio at which LBT's error bound is (nearly) least."""
    return jnp.asarray(alpha) / jnp.asarray((1 << bits) - 1, jnp.result_type(float))


def update_interval(
    gamma: jax.Array,
    n_clipped: ArrayLike,
    n_total: ArrayLike,
    bits: ArrayLike,
    *,
    alpha: ArrayLike,
    beta: ArrayLike = BETA,
    frozen: ArrayLike = False,
) -> jax.Array:
    """gamma of the next step: ``clip(gamma + beta sign(n_clipped / n_total - alpha / (2^b - 1)), 0.001, 1)``.

    Args:
      gamma, n_clipped, n_total: float, any one shape (one or many layers). Where ``n_total`` is 0 (the gradient was
        all zero or not finite) gamma stays. Counts may be sums or means over devices, uses and accumulated batches.
      bits: int or integer array that broadcasts. alpha, beta: float. frozen: bool; True keeps gamma.

    Source: LBT official code ``train.py: update_interval`` (sign(0) = 0, no momentum).
    """
    return _stepped(gamma, n_clipped, n_total, target_ratio(alpha, bits), beta, frozen)


def update_large_threshold(
    tau: jax.Array, n_large: ArrayLike, n_total: ArrayLike, *, alpha: ArrayLike, beta: ArrayLike = BETA
) -> jax.Array:
    """The same controller with target alpha: tau gmax tracks the magnitude from which gradients are large.

    ``n_large`` counts |G| > tau gmax. A diagnostic of the released code; it steers nothing.
    """
    return _stepped(tau, n_large, n_total, alpha, beta, False)


def _stepped(
    value: jax.Array, count: ArrayLike, total: ArrayLike, target: ArrayLike, beta: ArrayLike, frozen: ArrayLike
) -> jax.Array:
    value = jnp.asarray(value)
    ratio = jnp.asarray(count) / jnp.maximum(total, 1)
    moved = jnp.clip(value + beta * jnp.sign(ratio - target), SMALLEST, 1)
    return jnp.where((jnp.asarray(total) > 0) & ~jnp.asarray(frozen), moved, value).astype(value.dtype)


def warn_if_too_few(n_elements: int, alpha: float, bits: int) -> str | None:
    """A warning where a layer has so few gradients that the target clip ratio is a handful of elements, else None.

    The target count is ``n_elements alpha / (2^b - 1)``; below 4 gamma follows single elements or sticks at 1.
    """
    count = n_elements * alpha / ((1 << bits) - 1)
    if count >= FEWEST_CLIPPED:
        return None
    return (
        f"the gradient has {n_elements} elements, of which alpha={alpha:g} and {bits} bits let {count:.2g} be clipped "
        f"(fewer than {FEWEST_CLIPPED}); raise alpha above {FEWEST_CLIPPED * ((1 << bits) - 1) / n_elements:.2g} "
        "or the batch size"
    )


# --- start -----------------------------------------------------------------------------------------------------------


def start_gamma(g: jax.Array, start: str, bits: ArrayLike, alpha: ArrayLike) -> jax.Array:
    """gamma of the first step, float (), from that step's gradient; 1 where it is all zero or not finite.

    "one": 1. "search": the released code's: from 1 downwards in steps of 0.001 until the moving average
    ``rbar <- 0.999 rbar + 0.001 R(gamma)`` exceeds the target ratio, one step back (it overshoots). "quantile" (ours):
    the (K + 1)-th largest |g| / gmax with K = max(1, round(alpha N / (2^b - 1))), where the controller wants to be.
    """
    check_controller(1.0, start=start)
    ratio, size, usable = _clip_ratio(g)
    one = jnp.ones((), ratio(1.0).dtype)
    if start == "one":
        return one
    if start == "search":
        found = _search(ratio, target_ratio(alpha, bits), usable)
    else:
        count = jnp.maximum(1, jnp.round(target_ratio(alpha, bits) * size))
        found = _upper_quantile(ratio, count / size)
    return jnp.where(usable, jnp.clip(found, SMALLEST, 1), 1).astype(one.dtype)


def _clip_ratio(g: jax.Array) -> tuple[Callable[[ArrayLike], jax.Array], jax.Array, jax.Array]:
    """The function R(gamma) over all devices, the number of elements, and whether gmax is positive and finite."""
    magnitude = jnp.abs(gradient.working(g))
    largest = devices.max_over_devices(jnp.max(magnitude))
    size = devices.sum_over_devices(jnp.asarray(g.size, magnitude.dtype))

    def ratio(gamma: ArrayLike) -> jax.Array:
        count = jnp.sum(magnitude > gamma * largest).astype(magnitude.dtype)
        return devices.sum_over_devices(count) / size

    return ratio, size, (largest > 0) & jnp.isfinite(largest)


def _search(ratio: Callable[[ArrayLike], jax.Array], target: jax.Array, usable: jax.Array) -> jax.Array:
    def body(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        gamma, average, _, rounds = state
        average = SEARCH_MOMENTUM * average + (1 - SEARCH_MOMENTUM) * ratio(gamma)
        direction = jnp.sign(average - target)
        return gamma + SEARCH_STEP * direction, average, direction > 0, rounds + 1

    def goes_on(state: tuple[jax.Array, ...]) -> jax.Array:
        gamma, _, turned, rounds = state
        return usable & ~turned & (gamma > SMALLEST) & (rounds < 10 / SEARCH_STEP)

    start = jnp.ones_like(target), jnp.zeros_like(target), jnp.array(False), jnp.int32(0)
    return jax.lax.while_loop(goes_on, body, start)[0]


def _upper_quantile(ratio: Callable[[ArrayLike], jax.Array], fraction: jax.Array) -> jax.Array:
    """The least gamma with R(gamma) <= fraction, by bisection: counts add up over devices, sorted arrays do not."""
    dtype = ratio(1.0).dtype

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) / 2
        enough = ratio(middle) <= fraction
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    rounds = jnp.finfo(dtype).nmant + 8
    return jax.lax.fori_loop(0, rounds, halve, (jnp.zeros((), dtype), jnp.ones((), dtype)))[1]


# --- error of the quantized gradient ---------------------------------------------------------------------------------


def error_bound(clip_ratio: ArrayLike, gamma: ArrayLike, alpha: ArrayLike, bits: ArrayLike) -> jax.Array:
    """Upper bound of E(G_L): ``(1 - R/alpha) gamma / (2^b - 2) + (R/alpha) (1 - gamma)``, R/alpha at most 1.

    Nearest rounding, divided by gmax; arguments broadcast. An unclipped value errs by half a step at most, a clipped
    one by gmax (1 - gamma). For R > alpha all large gradients are clipped.
    """
    clipped = jnp.minimum(jnp.asarray(clip_ratio) / alpha, 1)
    levels = jnp.asarray((1 << bits) - 2, clipped.dtype)
    return (1 - clipped) * gamma / levels + clipped * (1 - jnp.asarray(gamma))


@struct.dataclass
class GradientErrors:
    """Errors of one gradient, float (): ``all_mean`` E(G) and ``large_mean`` E(G_L), both divided by gmax, and
    ``clip_ratio`` R; all 0 where the gradient is all zero or not finite."""

    all_mean: jax.Array
    large_mean: jax.Array
    clip_ratio: jax.Array


def gradient_errors(
    g: jax.Array, gamma: ArrayLike, bits: ArrayLike, alpha: ArrayLike, kind: str = "uniform", exponent: int = 0
) -> GradientErrors:
    """E(G) = mean |Q(g) - g| / gmax over all g, and E(G_L) over the round(alpha N) largest |g|; nearest rounding.

    ``kind``, ``exponent``: of Q, see :class:`gradient.GradientOptions`.
    """
    ratio, size, usable = _clip_ratio(g)
    x = gradient.working(g)
    largest = devices.max_over_devices(jnp.max(jnp.abs(x)))
    if kind == "uniform":
        quantized = gradient.nearest(x, gamma, largest, bits)
    else:
        quantized = gradient.quantize_gradient(x, gamma, bits, kind=kind, exponent=exponent).dequantize()
    error = jnp.abs(quantized - x) / jnp.where(usable, largest, 1)
    count = jnp.maximum(1, jnp.round(alpha * size))
    large = jnp.abs(x) > _upper_quantile(ratio, count / size) * largest
    number = devices.sum_over_devices(jnp.sum(large).astype(x.dtype))
    means = (
        devices.sum_over_devices(jnp.sum(error)) / size,
        devices.sum_over_devices(jnp.sum(jnp.where(large, error, 0))) / jnp.maximum(number, 1),
        ratio(gamma),
    )
    return GradientErrors(*(jnp.where(usable, value, 0) for value in means))


# --- other choices of gamma ------------------------------------------------------------------------------------------


def cosine_distance(g: jax.Array, gamma: ArrayLike, bits: ArrayLike) -> jax.Array:
    """DSGC's ``1 - <G, Q(G)> / (|G| |Q(G)|)``, float (), nearest rounding, over all devices; 0 for a zero gradient."""
    x = gradient.working(g)
    quantized = gradient.nearest(x, gamma, devices.max_over_devices(jnp.max(jnp.abs(x))), bits)
    sums = jnp.stack([jnp.sum(x * quantized), jnp.sum(x * x), jnp.sum(quantized * quantized)])
    product, square, other = devices.sum_over_devices(sums)
    norms = jnp.sqrt(square) * jnp.sqrt(other)
    return jnp.where(norms > 0, 1 - product / jnp.where(norms > 0, norms, 1), 0)


def squared_error(g: jax.Array, gamma: ArrayLike, bits: ArrayLike) -> jax.Array:
    """mean (Q(g) - g)^2 over all elements and devices, float (), nearest rounding."""
    x = gradient.working(g)
    quantized = gradient.nearest(x, gamma, devices.max_over_devices(jnp.max(jnp.abs(x))), bits)
    sums = jnp.stack([jnp.sum(jnp.square(quantized - x)), jnp.asarray(x.size, x.dtype)])
    total, size = devices.sum_over_devices(sums)
    return total / size


def least(
    measure: Callable[..., jax.Array], g: jax.Array, bits: ArrayLike, gammas: ArrayLike = GAMMAS
) -> tuple[jax.Array, jax.Array]:
    """The gamma of the grid at which ``measure(g, gamma, bits)`` is least (the first one), and that value.

    With :func:`cosine_distance` this is DSGC (Zhu et al., CVPR 2020; repeat it every 100 steps), with
    :func:`squared_error` the minimisation of the error of all gradients.
    """
    gammas = jnp.asarray(gammas, gradient.working(g).dtype)
    values = jax.lax.map(lambda gamma: measure(g, gamma, bits), gammas)
    best = jnp.argmin(values)
    return gammas[best], values[best]


def dsgc_rate_factor(distance: ArrayLike) -> jax.Array:
    """DSGC's factor on the learning rate, ``max(exp(-20 d), 0.1)``."""
    return jnp.maximum(jnp.exp(-20 * jnp.asarray(distance)), 0.1)
