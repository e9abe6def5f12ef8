"""The benchmark's table, with scorers that take no time."""

import argparse

import numpy as np
import pytest

from jaxvision.benchmarks import az_nas, torch_nas_bench_201
from jaxvision.models import nas_bench_201


@pytest.mark.parametrize("sizes", [(32, 64), (8, 4)])
def test_the_table_has_rates_the_official_cost_and_a_verdict_by_the_clock(sizes, monkeypatch, capsys):
    each, ticks = {"jaxvision": 0.5, "PyTorch": 1.0}, [0.0]

    def scorer(name):
        def score(operations):
            ticks[0] += each[name]

        return lambda options: score

    monkeypatch.setattr(az_nas, "SCORERS", {name: scorer(name) for name in each})
    monkeypatch.setattr(az_nas.time, "process_time", lambda: ticks[0])
    monkeypatch.setattr(az_nas, "first_score", lambda options, name: (21.0, 7.0, 600.0))
    monkeypatch.setattr(torch_nas_bench_201, "available", lambda: True)
    every = nas_bench_201.all_architectures()
    options = argparse.Namespace(resolution=sizes[0], batch=sizes[1], seed=0)
    az_nas.compare(options, every, every[np.arange(3)])
    text = capsys.readouterr().out
    assert "jaxvision    2.00 architectures/s,   500.0 ms each (500.0 to 500.0); first score 21.0 s, 7.0 s by" in text
    assert "first score, s by the clock: 21.00 (at most 20: NO)" in text
    assert "PyTorch / jaxvision, an architecture: 2.00 (at least 1.3: yes)" in text
    official = "0.85 to 0.95 architectures/s, 1050 to 1180 ms each (measured once): 2.10 to 2.36 x jaxvision's time"
    assert (official in text) == (sizes == (32, 64))
