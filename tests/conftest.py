"""Every test run: CPU, a persistent compilation cache, programs compiled fast (they run once or twice).

XLA compiles these programs in less than half the time without optimization, with its older code generator for fusions
(the newer makes an LLVM module of each) and with one LLVM module a program. The README's main command, which CI runs
as well, has XLA's defaults.
"""

import gc
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
CACHE = Path(os.environ.get("JAXVISION_CACHE", Path(tempfile.gettempdir()) / "jaxvision-cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
QUICKLY = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ["XLA_FLAGS"] = " ".join([*QUICKLY, os.environ.get("XLA_FLAGS", "")]).strip()
# Tracing makes millions of objects that stay: with Python's default thresholds a fifth of the time goes into looking
# through them again.
gc.set_threshold(100_000, 50, 1000)
