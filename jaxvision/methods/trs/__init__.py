"""Transition-rate scheduling for quantization-aware training (TRS), with its baselines."""
