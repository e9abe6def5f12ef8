"""Progress for people: a rich bar with rate, ETA and the last metrics; plain lines where stderr is no terminal."""

import sys
import time
from typing import Any


def brief(metrics: dict[str, Any], most: int = 6) -> str:
    """The first few metrics as a line; those with a slash in their name are details for the log."""
    shown = [(name, value) for name, value in metrics.items() if "/" not in name]
    return "  ".join(f"{name} {value:.4g}" for name, value in shown[:most])


class Progress:
    """One bar a stage.

    Args:
      enabled: False on all hosts but the first.
    """

    def __init__(self, enabled: bool = True):
        self._enabled = enabled
        self._bar = None
        self._task = None
        self._stage = ""
        self._total = 0
        self._start = (0.0, 0)
        self._last_line = 0.0
        if enabled and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("[bold]{task.description}"),
                progress.BarColumn(bar_width=28),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[rate]}"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}", style="cyan"),
                console=Console(stderr=True),
                refresh_per_second=4,
            )

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str, done: int, total: int) -> None:
        """Starts the bar of a stage, of which ``done`` steps were done by an earlier run."""
        self._stage, self._total, self._start, self._last_line = name, total, (time.monotonic(), done), 0.0
        if self._bar is not None:
            if self._task is not None:
                self._bar.stop_task(self._task)
            self._task = self._bar.add_task(name, total=total, completed=done, rate="", note="")

    def advance(self, done: int, note: str = "", metrics: dict[str, Any] | None = None) -> None:
        """Says how many steps of the stage are done; prints a line only with metrics or a note, at most each second."""
        if not self._enabled:
            return
        text = note or brief(metrics or {})
        if self._bar is not None:
            shown = {"note": text} if text else {}
            self._bar.update(self._task, completed=done, rate=f"{self._rate(done):.1f}/s", **shown)
        elif text and (done == self._total or time.monotonic() - self._last_line > 1.0):
            self._last_line = time.monotonic()
            rate = self._rate(done)
            left = f"{(self._total - done) / rate:.0f} s left" if rate else ""
            line = f"{self._stage} {done}/{self._total}  {rate:.1f} steps/s  {left}  {text}"
            print(line, file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        """One line that stays."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def _rate(self, done: int) -> float:
        start, first = self._start
        return (done - first) / max(time.monotonic() - start, 1e-9)
