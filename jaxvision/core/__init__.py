"""What every other layer stands on: keys by name and step, named pytree leaves, errors with exit codes."""
