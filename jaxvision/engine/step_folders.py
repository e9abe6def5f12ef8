"""The folders of a run's checkpoints, one per step, and the ledger of those that were committed.

The ledger is what notices a folder that somebody deleted. A marker beside the directory tells "never saved" from "all
lost", the directory and its ledger included. Folders appear and disappear by a rename; what a kill leaves half done has
a name of its own and is removed by :meth:`StepFolders.sweep`.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxvision.core.errors import StorageError
from jaxvision.engine import manifest

LEDGER = "LEDGER.json"
_STEP = re.compile(r"0|[1-9][0-9]{0,8}")  # below a billion: the processes exchange steps as int32
_LEFT_OVER = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|deleted)")
_KNOWN_CAUSES = re.compile(
    "No space left on device|Disk quota exceeded|File too large|Read-only file system|Permission denied"
)

logger = logging.getLogger("jaxvision")


class StepFolders:
    """Lists, commits, deletes and quarantines ``<directory>/<step>``.

    The methods raise OSError where the file system refuses.

    Args:
      directory: of the step folders; need not exist yet.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory).absolute()
        self.quarantine = self.directory.parent / "quarantine"
        self.marker = self.directory.with_name(f"{self.directory.name}.saved")
        self._scores: dict[int, float | None] = {}

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """The steps that have a folder, oldest first."""
        if not self.directory.is_dir():
            return []
        names = [entry.name for entry in self.directory.iterdir() if entry.is_dir()]
        return sorted(int(name) for name in names if _STEP.fullmatch(name))

    def scores(self) -> dict[int, float | None]:
        """The score of each step there; None where it has none or its manifest is damaged."""
        scores = {}
        for step in self.steps():
            if step not in self._scores:
                try:
                    self._scores[step] = manifest.read(self.path(step) / manifest.PATH, step).score
                except manifest.Damaged:
                    self._scores[step] = None
            scores[step] = self._scores[step]
        return scores

    def forget(self, step: int) -> None:
        """Drops what is remembered of a step, whose folder is going to be another one."""
        self._scores.pop(step, None)

    def prepare(self) -> None:
        """Makes the directory, and removes what a kill left behind."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.sweep()

    def sweep(self) -> None:
        """Removes folders whose saving or deletion did not end. Call it while nothing is being saved."""
        for entry in self.directory.iterdir():
            if _LEFT_OVER.fullmatch(entry.name):
                shutil.rmtree(entry)

    def commit(self, step: int, keep: Iterable[int]) -> None:
        """Makes a new folder durable, enters it in the ledger, then deletes what need not be kept; in this order."""
        _sync_tree(self.path(step))
        if not self.marker.exists():
            self.marker.touch()
            _sync(self.marker.parent)
        keep = set(keep)
        self.write_ledger([there for there in self.steps() if there in keep])
        for old in self.steps():
            if old not in keep:
                self.path(old).rename(self.directory / f"{old}.deleted")
        self.sweep()

    def ever_saved(self) -> bool:
        """Was a step committed here, whatever is left of it?"""
        return self.marker.exists() or (self.directory / LEDGER).exists() or bool(self.steps())

    def put_away(self, step: int) -> Path | None:
        """Moves a folder to the quarantine, under a name that is free; None if there is no folder."""
        if not self.path(step).is_dir():
            return None
        target, count = self.quarantine / f"step_{step}", 0
        while target.exists():
            count += 1
            target = self.quarantine / f"step_{step}_{count}"
        self.quarantine.mkdir(exist_ok=True)
        return self.path(step).rename(target)

    def write_ledger(self, steps: list[int]) -> None:
        """Replaces the ledger atomically and durably: a temporary file, fsync, rename, fsync of the directory."""
        temporary = self.directory / f"{LEDGER}.tmp"
        with temporary.open("w") as file:
            json.dump({"steps": sorted(steps)}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.directory / LEDGER)
        _sync(self.directory)

    def read_ledger(self) -> list[int] | None:
        """The committed steps; None where there is no ledger; [] with a warning where it can't be parsed."""
        path = self.directory / LEDGER
        try:
            return sorted(int(step) for step in json.loads(path.read_bytes())["steps"] if _STEP.fullmatch(str(step)))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            logger.warning("%s can't be parsed; going by the folders that are there", path)
            return []

    def check_readable(self, step: int) -> None:
        """Raises StorageError for a file without read permission, which is no damage."""
        for parent, folders, files in os.walk(self.path(step)):
            for name in (*folders, *files):
                if not os.access(path := Path(parent, name), os.R_OK):
                    raise StorageError(f"{path} can't be read: give this user the permission to read the checkpoints")


def guarded(action: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a method of :class:`StepFolders`; what the file system refuses becomes a StorageError."""
    try:
        return action(*arguments)
    except OSError as error:
        raise StorageError(
            f"{action.__self__.directory} can't be written: {cause(error)}; use a run directory that can"
        ) from error


def cause(error: BaseException) -> str:
    """The cause in a few words: the system's own, or the first line of what a library says."""
    if found := _KNOWN_CAUSES.search(str(error)):
        return found[0]
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip().split("\n")[0]
    return text[:200] or type(error).__name__


def _sync(path: Path) -> None:
    """Makes a file, or the entries of a directory, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))
    _sync(folder.parent)
