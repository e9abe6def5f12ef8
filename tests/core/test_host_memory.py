"""Freed memory stays in the process on a CPU, and nowhere else."""

import subprocess
import sys

import pytest

from jaxvision.core import host_memory

LEFT = """
import resource, sys
from pathlib import Path
from jaxvision.core import host_memory
kept = host_memory.keep_freed_memory(Path(sys.argv[1]))
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(2**26)
before = faults()
bytearray(2**26)
print(kept, faults() - before)
"""


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in ("JAX_PLATFORMS", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
@pytest.mark.parametrize("settings", [{}, {"MALLOC_ARENA_MAX": "4"}])
def test_a_freed_array_is_had_again_without_asking_the_system(tmp_path, monkeypatch, settings):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", LEFT, str(tmp_path)]
    kept, faults = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    pages = 2**26 // 2**12
    if settings:
        assert kept == "False" and int(faults) > 0
    else:
        assert kept == "True" and int(faults) < pages // 100


def test_beside_an_accelerator_nothing_changes(tmp_path, monkeypatch):
    (tmp_path / "nvidia0").touch()
    assert not host_memory.keep_freed_memory(tmp_path)
    assert not host_memory._on_cpu(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert host_memory._on_cpu(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    assert not host_memory._on_cpu(tmp_path / "nothing")
