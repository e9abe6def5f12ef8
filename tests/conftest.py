"""Every test run: CPU, a persistent compilation cache, strict dtypes left to the tests that want them."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
CACHE = Path(os.environ.get("JAXVISION_CACHE", Path(tempfile.gettempdir()) / "jaxvision-cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
