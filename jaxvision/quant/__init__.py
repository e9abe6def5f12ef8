"""Quantizers that stand on their own: uniform and group fake quantization, weight intervals, observers."""
