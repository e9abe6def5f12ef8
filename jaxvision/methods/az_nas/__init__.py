"""AZ-NAS: training-free architecture search by four proxies whose ranks are put together non-linearly."""
