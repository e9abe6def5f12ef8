"""Every test run: CPU, a persistent compilation cache, programs compiled fast (they run once or twice)."""

import gc
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
CACHE = Path(os.environ.get("JAXVISION_CACHE", Path(tempfile.gettempdir()) / "jaxvision-cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=1 {os.environ.get('XLA_FLAGS', '')}".strip()
# Tracing makes millions of objects that stay: with Python's default thresholds a fifth of the time goes into looking
# through them again.
gc.set_threshold(100_000, 50, 1000)
