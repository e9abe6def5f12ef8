"""Timing several things fairly in one run: warmed up, interleaved, the median of the rounds."""

import statistics
import time
from collections.abc import Callable, Mapping

REST = 0.3
"""Seconds. OpenMP's threads, PyTorch's among them, spin for up to 0.2 s after their work: what runs next would
share its cores with them (a DeiT-S of XLA beside PyTorch on two cores took 1.3 times as long as alone)."""


def interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int = 5, rest: float = REST
) -> dict[str, float]:
    """Median seconds of each candidate.

    Every candidate runs once to compile and warm up, then all run one after the other in each round, so that a slow
    moment of the machine hits all of them.

    Args:
      candidates: name -> function without arguments that returns when its work is done.
      rounds: how many rounds.
      rest: seconds of sleep before each timed run; 0 where all candidates share one pool of threads.
    """
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            time.sleep(rest)
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def processor_seconds(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median processor seconds of each candidate, over all threads: a busy machine disturbs them less than the clock.

    For candidates that are nearly alike: one round to warm up, then every other round in reverse order.
    """
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name in list(candidates)[:: -1 if number % 2 else 1]:
            begin = time.process_time()
            candidates[name]()
            taken[name].append(time.process_time() - begin)
    return {name: statistics.median(values[1:]) for name, values in taken.items()}
