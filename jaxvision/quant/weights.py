"""Post-training quantization of kernels: an interval for each output channel, codes, and the rounded parameters.

Kernels are in this package's layout: output channels last (Dense ``(in, out)``, Conv ``HWIO``). The interval of an
output channel comes from all its input weights.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxvision.core import name_rules, struct, trees
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.quant import uniform

METHODS = ("percentile", "minmax", "mse", "repq")
GRANULARITIES = ("channel", "tensor")
SEARCH_PERCENTILES = (99.9, 99.99, 99.999)
"""RepQ-ViT's three candidates (official code, ``quant/quantizer.py``)."""
EPSILONS = (0.0, 0.01, 0.1, 0.5, 1.0)
"""Candidates for the clipped percentage; the paper's value isn't readable."""
SHRINKS = 90
"""The line search tries the range times 1 - 0.01 i, i < 90, as FQ-ViT's OMSE does."""


@struct.dataclass
class QuantizedTensor:
    """The integer form of one kernel; ``w_hat = scale * (codes - zero)``.

    Attributes:
      codes: uint8, the kernel's shape, 0..2^bits - 1.
      scale, zero: float, (out,) or () per tensor; the zero point is integral.
      bits: the width, static.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array
    bits: int = struct.field(pytree_node=False)

    def dequantize(self) -> jax.Array:
        """w_hat, of the scale's type; bit for bit the same wherever it is computed (one rounding an element)."""
        return uniform.dequantize(self.codes, self.scale, self.zero)


@dataclass(frozen=True)
class WeightPolicy:
    """Which kernels are quantized, and how.

    Attributes:
      bits: width, 1 to 8.
      method: "percentile" (the paper), "minmax", "mse" or "repq".
      epsilon: percent cut off at each end by "percentile".
      granularity: "channel": an interval for each output channel; "tensor": one.
      pattern: regular expression (``re.search``) of the parameters' names that are quantized. The default takes every
        kernel, so no position embedding, token, bias, norm or relative-position table.
      bit_rules: (pattern, bits) pairs; the first that matches a kernel's name wins over ``bits``.
    """

    bits: int = 4
    method: str = "percentile"
    epsilon: float = 0.01
    granularity: str = "channel"
    pattern: str = r"(^|/)kernel$"
    bit_rules: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (("method", METHODS), ("granularity", GRANULARITIES)):
            if getattr(self, name) not in allowed:
                raise unknown(f"weights.{name}", getattr(self, name), allowed)
        if not 0 <= self.epsilon < 50:
            raise ConfigError(f"weights.epsilon={self.epsilon} must be a percentage from 0 to below 50")
        for bits in (self.bits, *(bits for _, bits in self.bit_rules)):
            if uniform.check_bits(bits, "weights.bits") > 8:
                raise ConfigError(f"weights.bits={bits} must be at most 8")


def percentiles(x: ArrayLike, levels: Sequence[float]) -> np.ndarray:
    """Percentiles over axis 0 of ``x`` [n, channels], linear interpolation: [levels, channels], the type of ``x``.

    On the host, by partial sorting: much faster than sorting the millions of values that an activation has, and
    with ranks in float64.
    """
    x = np.asarray(x)
    return np.percentile(x, np.asarray(levels, np.float64), axis=0).astype(x.dtype)


def percentile_interval(w: ArrayLike, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """The (epsilon, 100 - epsilon) percentiles over axis 0 of ``w`` [n, channels]: 2 x [channels]. On the host."""
    lower, upper = percentiles(w, (epsilon, 100 - epsilon))
    return lower, upper


def _least_error(w: jax.Array, lowers: jax.Array, uppers: jax.Array, bits: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Of K intervals [K, channels] the one of least squared error for each channel; ties: the first."""

    def error(interval: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.sum(jnp.square(w - uniform.fake_quant_interval(w, *interval, bits)), axis=0)

    best = jnp.argmin(jax.lax.map(error, (lowers, uppers)), axis=0)[None]
    return jnp.take_along_axis(lowers, best, 0)[0], jnp.take_along_axis(uppers, best, 0)[0]


@jax.jit
def mse_interval(w: jax.Array, bits: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Minimum and maximum over axis 0 of ``w`` [n, channels], times the factor of least squared error.

    The factors are 1 - 0.01 i, i = 0..89, each channel choosing its own. Returns 2 x [channels].
    """
    shrink = jnp.asarray(1 - 0.01 * np.arange(SHRINKS), w.dtype)[:, None]
    return _least_error(w, shrink * w.min(0), shrink * w.max(0), bits)


def percentile_search(
    x: ArrayLike, bits: ArrayLike, levels: Sequence[float] = SEARCH_PERCENTILES
) -> tuple[jax.Array, jax.Array]:
    """Of the intervals (100 - p, p) percentiles the one of least squared error (RepQ-ViT's calibration).

    Args:
      x: [n, channels] float: over axis 0, each channel choosing for itself.
      bits: width.
      levels: candidate percentiles, above 50.

    Returns:
      lower and upper, [channels].
    """
    lowers, uppers = np.split(percentiles(x, [*(100 - level for level in levels), *levels]), 2)
    return _searched(np.asarray(x), lowers, uppers, bits)


_searched = jax.jit(_least_error)


def tensor_interval(x: ArrayLike, bits: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """:func:`percentile_search` over all elements of ``x``: the interval of a per-tensor quantizer, 2 x ()."""
    lower, upper = percentile_search(np.asarray(x).reshape(-1, 1), bits)
    return lower[0], upper[0]


def weight_interval(w: jax.Array, policy: WeightPolicy) -> tuple[jax.Array, jax.Array]:
    """The interval(s) of one kernel (..., out) under ``policy``: lower and upper, (out,) or () per tensor."""
    flat = jnp.asarray(w).reshape(-1, 1 if policy.granularity == "tensor" else w.shape[-1])
    find: dict[str, Callable[[], tuple[jax.Array, jax.Array]]] = {
        "percentile": partial(percentile_interval, flat, policy.epsilon),
        "minmax": lambda: (flat.min(0), flat.max(0)),
        "mse": partial(mse_interval, flat, policy.bits),
        "repq": partial(percentile_search, flat, policy.bits),
    }
    lower, upper = find[policy.method]()
    return (lower[0], upper[0]) if policy.granularity == "tensor" else (lower, upper)


def quantize_tensor(w: jax.Array, policy: WeightPolicy) -> QuantizedTensor:
    """The codes of one kernel (..., out) under ``policy`` (whose ``bits`` hold, not its ``bit_rules``)."""
    return QuantizedTensor(*_encode(w, *weight_interval(w, policy), policy.bits), policy.bits)


@jax.jit
def _encode(w: jax.Array, lower: jax.Array, upper: jax.Array, bits: ArrayLike) -> tuple[jax.Array, ...]:
    scale, zero = uniform.affine_params(lower, upper, bits)
    return uniform.quantize(w, scale, zero, bits).astype(jnp.uint8), scale, zero


def quantize_params(params: Any, policy: WeightPolicy) -> tuple[Any, dict[str, QuantizedTensor]]:
    """Quantizes the kernels of a parameter tree.

    Args:
      params: nested dict of float arrays.
      policy: which and how.

    Returns:
      ``params`` with each chosen kernel replaced by w_hat (same shape and type), and the integer forms by name.

    Raises:
      ConfigError: the pattern matches no parameter, or a bit rule decides about none.
    """
    names = [name for name in trees.named_leaves(params) if re.search(policy.pattern, name)]
    if not names:
        raise ConfigError(f"weights.pattern={policy.pattern!r} matches none of the network's parameters")
    patterns = [pattern for pattern, _ in policy.bit_rules]
    name_rules.check("weights.bit_rules", patterns, names)
    codes = {}
    for name, leaf in trees.named_leaves(params).items():
        if name in names:
            rule = name_rules.first(patterns, name)
            bits = policy.bits if rule is None else policy.bit_rules[rule][1]
            codes[name] = quantize_tensor(leaf, replace(policy, bits=bits))
    return with_kernels(params, codes), codes


def with_kernels(params: Any, codes: dict[str, QuantizedTensor]) -> Any:
    """``params`` with the named kernels replaced by what their codes stand for."""
    return trees.map_named(
        lambda name, leaf: codes[name].dequantize().astype(leaf.dtype) if name in codes else leaf, params
    )


def choose_epsilon(
    params: Any, policy: WeightPolicy, error: Callable[[Any], float], candidates: Sequence[float] = EPSILONS
) -> tuple[float, dict[float, float]]:
    """The clipped percentage of least calibration error, one for the whole model.

    Args:
      params: float parameters.
      policy: its ``epsilon`` is what is chosen; its method must be "percentile".
      error: maps quantized parameters to a number, such as the mean KL divergence on the calibration images.
      candidates: percentages; ties: the first.

    Returns:
      the chosen one, and the error of each.
    """
    if policy.method != "percentile":
        raise ConfigError(f"weights.epsilon can't be chosen for weights.method={policy.method!r}; use 'percentile'")
    errors = {eps: float(error(quantize_params(params, replace(policy, epsilon=eps))[0])) for eps in candidates}
    return min(errors, key=errors.__getitem__), errors
