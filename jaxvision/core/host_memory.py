"""Whether the C library keeps the memory that a computation on the CPU frees.

XLA frees the temporary arrays of a step at its end and asks for them again in the next. glibc gives blocks of that size
back to the system, which hands them out again page by page and zeroed: a fifth of the time of a W2A2 training step
of ResNet-20 with 256 images (``benchmarks.trs``). Kept in one heap, they are there at once.
"""

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

# Parameters of mallopt, from glibc's malloc.h, and the values: one heap for all threads, as only the first may grow
# without limit; no block of its own for a large array; never shrink.
_KEEP = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}
ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*")
"""Device files of GPUs and TPUs."""


def keep_freed_memory(devices: Path = Path("/dev")) -> bool:
    """Keeps freed memory in the process from now on; to be called before the first thread starts.

    Nothing happens, and False is returned, beside an accelerator (unless ``JAX_PLATFORMS=cpu``), where the C library
    isn't glibc, and where the environment has settings of malloc (``MALLOC_...``, ``GLIBC_TUNABLES``) of its own.
    """
    if not _on_cpu(devices) or _has_settings(os.environ):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(parameter, value) for parameter, value in _KEEP.values())


def _on_cpu(devices: Path) -> bool:
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(found for pattern in ACCELERATORS for found in devices.glob(pattern))


def _has_settings(names: Iterable[str]) -> bool:
    return any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in names)
