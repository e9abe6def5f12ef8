"""LBT: training in low-bit fixed point, with a controller for the clipping interval of gradients."""
