"""TensorBoard events beside metrics.jsonl (which is the truth; events of a resumed run may overlap)."""

from pathlib import Path


class Events:
    """Writes scalars; does nothing when disabled."""

    def __init__(self, directory: Path, *, enabled: bool):
        self._writer = None
        if enabled:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(directory), flush_secs=10)

    def scalars(self, step: int, prefix: str, numbers: dict[str, float]) -> None:
        """One point for each number, under ``prefix/name``."""
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes the file."""
        if self._writer is not None:
            self._writer.close()
