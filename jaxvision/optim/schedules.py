"""Learning rates as pure functions of the step, ``schedule(step) -> float32 ()``; any optax transform takes them.

All lengths are optimizer steps. Recipes written in epochs are converted explicitly with :func:`epochs_to_steps`,
and a scheduler that a published recipe called once an epoch is :func:`staircase` of the smooth one.
"""

import itertools
import math

import jax.numpy as jnp
import optax

from jaxvision.core.errors import ConfigError


def epochs_to_steps(epochs: float, steps_per_epoch: int) -> int:
    """The whole number of steps in ``epochs`` epochs, rounded to the nearest.

    Raises:
      ConfigError: ``epochs`` is negative or not finite, or ``steps_per_epoch`` is smaller than 1.
    """
    if not (math.isfinite(epochs) and epochs >= 0):
        raise ConfigError(f"epochs is {epochs}, but must be a finite number of at least 0")
    if steps_per_epoch < 1:
        raise ConfigError(f"steps_per_epoch is {steps_per_epoch}, but must be at least 1; is the batch too large?")
    return round(epochs * steps_per_epoch)


def constant(value: float) -> optax.Schedule:
    """``value`` at every step."""
    _check_rate("value", value)
    return lambda step: jnp.full(jnp.shape(step), value, jnp.float32)


def linear(start: float, end: float, steps: int) -> optax.Schedule:
    """``start + (end - start) min(t / steps, 1)``."""
    _check_rate("start", start)
    _check_rate("end", end)
    _check_steps("steps", steps, least=1)
    return lambda step: start + (end - start) * jnp.minimum(_float(step) / steps, 1.0)


def polynomial(peak: float, steps: int, *, power: float = 0.9, end: float = 0.0) -> optax.Schedule:
    """``end + (peak - end) (1 - min(t / steps, 1))^power``; the "poly" rule of segmentation with power 0.9."""
    _check_rate("peak", peak)
    _check_rate("end", end)
    _check_steps("steps", steps, least=1)
    return lambda step: end + (peak - end) * (1.0 - jnp.minimum(_float(step) / steps, 1.0)) ** power


def cosine(
    peak: float, steps: int, *, warmup_steps: int = 0, warmup_start: float = 0.0, end: float = 0.0
) -> optax.Schedule:
    """Linear warm-up, then half a cosine over the steps that are left, as PyTorch.

    With W = ``warmup_steps`` and T = ``steps`` (warm-up included):
      t <  W: warmup_start + (peak - warmup_start) t / W
      t >= W: end + (peak - end) (1 + cos(pi (t - W) / (T - W))) / 2, and ``end`` from T on.
    Source: ``SequentialLR(LinearLR, CosineAnnealingLR(T_max=T - W, eta_min=end))`` stepped every batch.
    """
    _check_lengths(peak, steps, warmup_steps, warmup_start, end)

    def decay(step):
        done = jnp.clip((step - warmup_steps) / max(steps - warmup_steps, 1), 0.0, 1.0)
        return end + (peak - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))

    return _with_warmup(decay, peak, warmup_steps, warmup_start)


def timm_cosine(
    peak: float, steps: int, *, warmup_steps: int = 0, warmup_start: float = 1e-6, end: float = 1e-5
) -> optax.Schedule:
    """Linear warm-up laid over a cosine that began at step 0, as timm (``warmup_prefix=False``, its default).

    With W = ``warmup_steps`` and T = ``steps``:
      t <  W: warmup_start + (peak - warmup_start) t / W
      t >= W: end + (peak - end) (1 + cos(pi t / T)) / 2, and ``end`` from T on.
    So the rate never reaches ``peak``: it drops a little at t = W, where :func:`cosine` is continuous.
    Source: timm ``CosineLRScheduler``; the DeiT recipe calls it once an epoch (see :func:`staircase`).
    """
    _check_lengths(peak, steps, warmup_steps, warmup_start, end)

    def decay(step):
        return end + (peak - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(step / steps, 1.0)))

    return _with_warmup(decay, peak, warmup_steps, warmup_start)


def multistep(
    peak: float,
    boundaries: tuple[int, ...],
    *,
    gamma: float = 0.1,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
) -> optax.Schedule:
    """``peak gamma^(number of boundaries <= t)`` after a linear warm-up; ``boundaries`` count from step 0.

    Source: PyTorch ``MultiStepLR`` stepped every batch.

    Raises:
      ConfigError: the boundaries don't increase, or one lies inside the warm-up.
    """
    _check_rate("peak", peak)
    _check_rate("warmup_start", warmup_start)
    _check_steps("warmup_steps", warmup_steps)
    if any(b <= a for a, b in itertools.pairwise(boundaries)) or any(b < max(warmup_steps, 1) for b in boundaries):
        raise ConfigError(
            f"the schedule's boundaries are {tuple(boundaries)}, but must increase, be positive and come after the "
            f"{warmup_steps} warm-up steps"
        )

    def decay(step):
        passed = sum((step >= boundary).astype(jnp.int32) for boundary in boundaries) if boundaries else 0
        return peak * gamma ** _float(passed)

    return _with_warmup(decay, peak, warmup_steps, warmup_start)


def staircase(schedule: optax.Schedule, every: int) -> optax.Schedule:
    """``schedule(floor(t / every) every)``: a schedule that moves only once in ``every`` steps (once an epoch)."""
    _check_steps("every", every, least=1)
    return lambda step: schedule(jnp.asarray(step) // every * every)


def _with_warmup(decay, peak, warmup_steps, warmup_start):
    def schedule(step):
        step = _float(step)
        ramp = warmup_start + (peak - warmup_start) * step / max(warmup_steps, 1)
        return jnp.where(step < warmup_steps, ramp, decay(step))

    return schedule


def _float(step):
    # float32 counts exactly to 2^24 = 16.8 million steps.
    return jnp.asarray(step).astype(jnp.float32)


def _check_lengths(peak, steps, warmup_steps, warmup_start, end):
    _check_rate("peak", peak)
    _check_rate("warmup_start", warmup_start)
    _check_rate("end", end)
    _check_steps("steps", steps, least=1)
    _check_steps("warmup_steps", warmup_steps)
    if warmup_steps > steps:
        raise ConfigError(f"warmup_steps is {warmup_steps}, but the schedule has only {steps} steps")


def _check_rate(name, value):
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"the schedule's {name} is {value}, but must be a finite number of at least 0")


def _check_steps(name, value, least=0):
    if value != int(value) or value < least:
        raise ConfigError(f"the schedule's {name} is {value}, but must be a whole number of at least {least}")
