"""Batches made ahead on threads. As a batch is a function of its step, nothing here needs to be saved."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def prefetch(batch_at: Callable[[int], Any], start: int, stop: int, depth: int = 2) -> Iterator[Any]:
    """Yields ``batch_at(start) ... batch_at(stop - 1)`` in order, ``depth`` of them being made ahead.

    An error in ``batch_at`` is raised where its batch is asked for, after the batches before it.
    """
    with ThreadPoolExecutor(depth, thread_name_prefix="batches") as pool:
        waiting = deque(pool.submit(batch_at, step) for step in range(start, min(start + depth, stop)))
        step = start + len(waiting)
        try:
            while waiting:
                batch = waiting.popleft().result()
                if step < stop:
                    waiting.append(pool.submit(batch_at, step))
                    step += 1
                yield batch
        finally:
            for future in waiting:
                future.cancel()
