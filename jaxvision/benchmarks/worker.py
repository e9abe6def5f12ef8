"""A candidate of a benchmark in a process of its own: with its library's defaults, its own memory and threads."""

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from jaxvision.core import host_memory


class Worker:
    """``worker()`` runs ``make(*arguments)()`` in another process and returns when it is done.

    Attributes:
      facts: the ``facts`` of what was made, if it has any.
      processor: seconds of processor time of all its threads so far, in its runs.
    """

    def __init__(self, make: Callable[..., Callable[[], object]], *arguments: Any, keep_memory: bool = False):
        """Returns once ``make``, a function of a module, is done there.

        ``keep_memory``: with :func:`host_memory.keep_freed_memory`, as ``jaxvision.main`` and no library has it.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments, keep_memory), daemon=True)
        self._process.start()
        theirs.close()
        self.facts: dict[str, float] = self._pipe.recv()
        self.processor = 0.0

    def __call__(self) -> None:
        self._pipe.send(True)
        self.processor += self._pipe.recv()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.send(False)
        self._process.join()
        self._pipe.close()
        self._process.close()


def _serve(pipe: Connection, make: Callable[..., Callable[[], object]], arguments: Any, keep_memory: bool) -> None:
    if keep_memory:
        host_memory.keep_freed_memory()
    run = make(*arguments)
    pipe.send(getattr(run, "facts", {}))
    with contextlib.suppress(EOFError):  # The benchmark ended early.
        while pipe.recv():
            begin = time.process_time()
            run()
            pipe.send(time.process_time() - begin)
