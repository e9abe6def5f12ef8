"""Optimizers with PyTorch's update rules, schedules as functions of the step, and averages of parameters."""

from jaxvision.optim import ema, optimizers, schedules

__all__ = ["ema", "optimizers", "schedules"]
