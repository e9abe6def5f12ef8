"""Optimizers with PyTorch's update rules, transition-rate scheduling, schedules of the step, averages of parameters.

Everything is an optax transformation or a pure function; nothing here needs the rest of the package.
"""

from jaxvision.optim import ema, optimizers, oscillation, schedules, transition_rules
from jaxvision.optim.oscillation import dampening_loss, freeze_oscillating, oscillation_metrics
from jaxvision.optim.transition_optimizers import adamt, adamwt, sgdt, with_transition_rate
from jaxvision.optim.transition_rate import (
    TransitionRateState,
    reset_codes,
    scale_by_transition_rate,
    transition_metrics,
)
from jaxvision.optim.transition_rules import TransitionRule
from jaxvision.optim.transition_target import transition_target

__all__ = [
    "TransitionRateState",
    "TransitionRule",
    "adamt",
    "adamwt",
    "dampening_loss",
    "ema",
    "freeze_oscillating",
    "optimizers",
    "oscillation",
    "oscillation_metrics",
    "reset_codes",
    "scale_by_transition_rate",
    "schedules",
    "sgdt",
    "transition_metrics",
    "transition_rules",
    "transition_target",
    "with_transition_rate",
]
