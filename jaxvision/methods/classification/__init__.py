"""Plain supervised classification: the float baseline of every method."""
