"""metrics.jsonl: one object a line, the truth about a run; a resumed run cuts it back to its checkpoint."""

import json
import math
import os
from pathlib import Path
from typing import Any

from jaxvision.core.errors import StorageError


class RowLog:
    """An append-only file of JSON rows.

    Attributes:
      count: the rows written so far, earlier runs included; the same on every host.
    """

    def __init__(self, path: Path, *, write: bool = True):
        self.path = path
        self._write = write
        self._file = None
        self.count = 0

    def resume(self, count: int) -> None:
        """Keeps the first ``count`` rows, those that a checkpoint knew of, and opens the file for appending."""
        self.count = count
        if not self._write:
            return
        kept = self.rows()[:count]
        if len(kept) < count:
            raise StorageError(
                f"{self.path} has {len(kept)} whole rows but the checkpoint was taken after {count}; "
                "restore the file, or start in another --workdir"
            )
        temporary = self.path.with_name(self.path.name + ".new")
        with temporary.open("w") as file:
            file.writelines(_line(row) for row in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        self._file = self.path.open("a")

    def append(self, row: dict[str, Any]) -> None:
        """Writes one row through to the operating system: it survives the death of this process."""
        self.count += 1
        if self._file is not None:
            self._file.write(_line(row))
            self._file.flush()

    def sync(self) -> None:
        """Makes the rows survive the death of the machine, before a checkpoint that follows them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """The complete rows on disk."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text().splitlines(keepends=True):
            try:
                row = json.loads(line)
            except ValueError:
                break  # A line cut off by a kill; what follows it can't be trusted either.
            if not line.endswith("\n") or not isinstance(row, dict):
                break
            rows.append(row)
        return rows

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(row: dict[str, Any]) -> str:
    # JSON knows no NaN; an evaluation of nothing logs null.
    missing = {key: None for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps({**row, **missing}, allow_nan=False) + "\n"
