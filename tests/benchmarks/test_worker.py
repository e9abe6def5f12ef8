"""A candidate in a process of its own."""

import functools
import math
import os

import pytest

from jaxvision.benchmarks import training
from jaxvision.benchmarks.worker import Worker


def count_to(limit):
    """A candidate that says where it ran."""

    def count():
        return sum(range(limit))

    count.facts = {"process": os.getpid(), "limit": limit}
    return count


def test_a_worker_runs_elsewhere_and_counts_its_processor_time():
    worker = Worker(count_to, 3_000_000)
    assert worker.facts["process"] != os.getpid() and worker.facts["limit"] == 3_000_000
    assert worker.processor == 0
    worker()
    first = worker.processor
    worker()
    assert 0 < first < worker.processor
    seconds, processor = training.measure({"count": worker}, rounds=1)
    assert processor["count"] > 0 and seconds["count"] > 0
    worker.close()


def test_what_can_be_called_without_facts_has_none():
    worker = Worker(functools.partial, math.sqrt, 2.0)
    assert worker.facts == {}
    worker()
    worker.close()


def test_a_mistake_while_it_is_made_ends_the_benchmark(capfd):
    with pytest.raises(EOFError):
        Worker(math.sqrt, -1.0)
    assert "math domain error" in capfd.readouterr().err
