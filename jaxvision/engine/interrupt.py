"""SIGTERM and SIGINT end a run at the next step boundary, with its state saved; a second one ends it at once."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import jax
import numpy as np

from jaxvision.core.errors import Preempted


class Interrupt:
    """Context manager that remembers the first signal and restores the default handling for the second."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received: int | None = None
        self._previous: dict[int, object] = {}
        self._at_once = ""

    def __enter__(self) -> "Interrupt":
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for other in self.SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        if self._at_once:
            raise Preempted(f"stopped by {self.name} {self._at_once}")

    @contextlib.contextmanager
    def at_once(self, where: str) -> Iterator[None]:
        """Inside, a signal raises Preempted wherever the program stands: for work that a new start does again.

        Args:
          where: goes on the sentence "stopped by SIGTERM ...".
        """
        if self.received is not None:
            raise Preempted(f"stopped by {self.name} {where}")
        self._at_once = where
        try:
            yield
        finally:
            self._at_once = ""

    def requested(self, synchronize: bool) -> bool:
        """Should the run stop here? Over several hosts all must answer alike, so they ask each other.

        Args:
          synchronize: True at the steps where every host asks (a function of the step); hosts on their own
            always answer.
        """
        if jax.process_count() == 1:
            return self.received is not None
        if not synchronize:
            return False
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.asarray(self.received is not None))))

    @property
    def name(self) -> str:
        """Such as SIGTERM."""
        return signal.Signals(self.received).name if self.received is not None else "another host's signal"
