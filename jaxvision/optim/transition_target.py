"""Targets R^t of the transition rate: the schedules of learning rates, on the fraction of weights that change level."""

import math

import optax

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.optim import schedules

SHAPES = ("cosine", "step", "linear", "constant")


def initial_target(factor: float, bits: int, *, scale_with_bits: bool = True) -> float:
    """R^0 = factor sqrt(bits), or ``factor`` itself.

    The paper scales with the weights' bits (supplement, "TR factor"); the official code takes R^0 as a flag, so that
    its 5e-3 at 2 bits is ``scale_with_bits=False``. Which of the two the published numbers used isn't established.

    Raises:
      ConfigError: R^0 is not in (0, 1], or the bits aren't 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise ConfigError(f"the target's bits are {bits}, but weights have 1 to 8")
    rate = factor * math.sqrt(bits) if scale_with_bits else factor
    if not 0 < rate <= 1:
        raise ConfigError(
            f"the target's factor {factor} gives a transition rate of {rate:.3g}, but a rate is the fraction of "
            "weights that change in a step: above 0, at most 1, and 1e-3 to 1e-2 in the paper"
        )
    return rate


def transition_target(
    factor: float,
    bits: int,
    shape: str = "cosine",
    total: int | None = None,
    *,
    scale_with_bits: bool = True,
    steps_per_epoch: int | None = None,
    end: float = 0.0,
    boundaries: tuple[int, ...] | None = None,
    gamma: float = 0.1,
) -> optax.Schedule:
    """R^t = R^0 shape(t), with R^0 of :func:`initial_target`.

    "cosine": end + (R^0 - end) (1 + cos(pi t / total)) / 2; "linear": from R^0 to end;
    "step": R^0 gamma^(boundaries passed); "constant": R^0.

    Args:
      factor: the paper's lambda, 1e-3 to 1e-2.
      bits: bits of the weights, 1 to 8.
      shape: one of :data:`SHAPES`.
      total: steps of the run; not needed for "constant".
      scale_with_bits: see :func:`initial_target`.
      steps_per_epoch: if given, the target moves once an epoch, t = floor(t / steps_per_epoch) steps_per_epoch, as in
        the official code; otherwise at every step.
      end: value from ``total`` on, of "cosine" and "linear".
      boundaries: steps at which "step" decays; default: a quarter, half and three quarters of the run (official code).
      gamma: the decay of "step".

    Raises:
      ConfigError: a shape that doesn't exist, a number out of range, or no ``total`` where it is needed.
    """
    start = initial_target(factor, bits, scale_with_bits=scale_with_bits)
    if shape not in SHAPES:
        raise unknown("the target's shape", shape, SHAPES)
    if shape == "constant":
        return schedules.constant(start)
    if total is None:
        raise ConfigError(f"the target's shape {shape!r} needs total, the number of steps of the run")
    if shape == "cosine":
        smooth = schedules.cosine(start, total, end=end)
    elif shape == "linear":
        smooth = schedules.linear(start, end, total)
    else:
        quarters = (total // 4, total // 2, 3 * total // 4)
        smooth = schedules.multistep(start, quarters if boundaries is None else boundaries, gamma=gamma)
    return smooth if steps_per_epoch is None else schedules.staircase(smooth, steps_per_epoch)
