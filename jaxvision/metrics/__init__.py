"""Metrics as sums: init, update, merge, compute, so that any split of the data gives the same number."""

from jaxvision.metrics import classification
from jaxvision.metrics.mean import Mean

__all__ = ["Mean", "classification"]
