"""Measurements side by side, one file a claim: ``python -m jaxvision.benchmarks.<name>``."""
