"""The quantized network, simulated: ordinary float layers on fake-quantized activations and weights.

Quantizers and switches are traced arguments, so the float network, every group count, every bit-width and every run
with a single site quantized are one executable, as long as the quantizers keep their classes and shapes.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core.errors import ConfigError
from jaxvision.methods.igq_vit.sites import ApplyFn


class QuantizedTap:
    """The tap that quantizes: ``where(enabled[name], quantizers[name](x), x)``, other taps untouched.

    Args:
      quantizers: site -> pytree called as ``q(x, batch_size) -> x_hat``.
      enabled: site -> bool (), traced.
      batch_size: images in the batch.
      record: also keep ``powers``, see :func:`forward_with_noise`.
    """

    def __init__(
        self, quantizers: Mapping[str, Any], enabled: Mapping[str, Any], batch_size: int, record: bool = False
    ):
        self._quantizers, self._enabled, self._batch_size = quantizers, enabled, batch_size
        self._record = record
        self.powers: dict[str, tuple[jax.Array, jax.Array]] = {}
        self.seen: set[str] = set()

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        """The value that the network goes on with."""
        if name not in self._quantizers:
            return x
        self.seen.add(name)
        x_hat = self._quantizers[name](x, self._batch_size)
        if self._record:
            self.powers[name] = self._power(x), self._power(x - x_hat)
        return jnp.where(self._enabled[name], x_hat, x)

    def _power(self, x: jax.Array) -> jax.Array:
        return jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))).reshape(self._batch_size, -1).sum(1)

    def check_all_seen(self) -> None:
        """Raises ConfigError where a quantizer's site isn't one of the network's taps."""
        if missing := sorted(set(self._quantizers) - self.seen):
            raise ConfigError(f"the network has no tap {missing[0]!r}, for which there is a quantizer")


def switches(quantizers: Iterable[str], on: bool | Iterable[str] = True) -> dict[str, np.ndarray]:
    """``enabled`` for the sites of ``quantizers``: all, none or the named ones; ConfigError for unknown names."""
    names = list(quantizers)
    chosen = set(names if on is True else () if on is False else on)
    if unknown := sorted(chosen - set(names)):
        raise ConfigError(f"there is no quantizer for the site {unknown[0]!r}")
    return {name: np.asarray(name in chosen) for name in names}


@partial(jax.jit, static_argnames="apply_fn")
def forward(apply_fn: ApplyFn, variables: Any, quantizers: Any, enabled: Any, images: jax.Array) -> jax.Array:
    """Logits (B, K) of the network with the enabled sites quantized.

    Args:
      apply_fn: the network; static.
      variables: with w_hat for the quantized kernels, or float.
      quantizers: site -> quantizer; enabled: site -> bool (), of :func:`switches`. With all off the logits are the
        float network's.
      images: (B, H, W, C) float32.
    """
    tap = QuantizedTap(quantizers, enabled, images.shape[0])
    logits = apply_fn(variables, images, tap=tap)
    tap.check_all_seen()
    return logits


@partial(jax.jit, static_argnames="apply_fn")
def float_forward(apply_fn: ApplyFn, variables: Any, images: jax.Array) -> jax.Array:
    """Logits (B, K) of the network as it is: one program for all seeds and all rounded kernels."""
    return apply_fn(variables, images)


@partial(jax.jit, static_argnames="apply_fn")
def forward_with_noise(
    apply_fn: ApplyFn, variables: Any, quantizers: Any, enabled: Any, images: jax.Array
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """:func:`forward`, and the power of signal and quantization noise at every site.

    Returns:
      logits (B, K), and by site the sums over each image of x^2 and (x - x_hat)^2, two (B,) float arrays. ``x`` is
      what reaches the site in this run (all sites off: the float network's value), enabled or not.
    """
    tap = QuantizedTap(quantizers, enabled, images.shape[0], record=True)
    logits = apply_fn(variables, images, tap=tap)
    tap.check_all_seen()
    return logits, tap.powers


def dispatch(
    apply_fn: ApplyFn, variables: Any, quantizers: Any, enabled: Any, images: Any, batch_size: int = 128
) -> list[tuple[jax.Array, int]]:
    """Starts :func:`forward` over any number of images without waiting: (logits, real rows) of each batch."""
    return [
        (forward(apply_fn, variables, quantizers, enabled, batch), size) for batch, size in _batches(images, batch_size)
    ]


def gather(run: list[tuple[jax.Array, int]]) -> np.ndarray:
    """The logits (n, K) of what :func:`dispatch` started, on the host."""
    return np.concatenate([np.asarray(logits)[:size] for logits, size in run])


def predict(
    apply_fn: ApplyFn, variables: Any, quantizers: Any, enabled: Any, images: Any, batch_size: int = 128
) -> np.ndarray:
    """:func:`forward` over any number of images, (n, K) on the host; the last batch is padded, so one compile."""
    return gather(dispatch(apply_fn, variables, quantizers, enabled, images, batch_size))


def _batches(images: Any, batch_size: int) -> Iterable[tuple[np.ndarray, int]]:
    images = np.asarray(images)
    batch_size = min(batch_size, len(images))
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        yield np.concatenate([part, np.repeat(part[:1], batch_size - len(part), axis=0)]), len(part)
