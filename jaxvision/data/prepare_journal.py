"""Copies many files, remembering each one that is complete, so that a copy can be killed and continued."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from jaxvision.core.errors import DataError
from jaxvision.data.prepare_files import Progress, disk_trouble, make_folder, read_bytes, silent, writing

JOURNAL = ".prepare_journal.jsonl"


@dataclass(frozen=True)
class Item:
    """A file to make: ``name`` below the target (with ``/``), its size in bytes, and how to read it.

    ``origin`` is what error messages call it.
    """

    name: str
    size: int
    read: Callable[[], bytes]
    origin: str


class Journal:
    """``<target>/.prepare_journal.jsonl``: one line ``{"name", "size", "blake2b"}`` for each complete file.

    A line is written after its file got its name; a line that a kill cut short counts as absent.
    """

    def __init__(self, target: Path):
        self._target = target
        self._path = target / JOURNAL
        self._done: dict[str, tuple[int, str]] = {}
        content = read_bytes(self._path) if self._path.exists() else b""
        for line in content.split(b"\n"):
            try:
                entry = json.loads(line)
                self._done[entry["name"]] = (entry["size"], entry["blake2b"])
            except (ValueError, KeyError, TypeError):
                continue  # the line that was being written when the run was killed
        try:
            self._file = open(self._path, "ab")  # noqa: SIM115 (closed by __exit__)
            if content and not content.endswith(b"\n"):
                self._file.write(b"\n")
        except OSError as error:
            raise disk_trouble(self._path, error) from error

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise disk_trouble(self._path, error) from error

    def complete(self, item: Item) -> bool:
        """Is the file there, of the size of its source and with the content that was written?

        The content is read because a file that was not flushed before a loss of power can have the right size
        and be full of zeros.
        """
        entry, path = self._done.get(item.name), self._target / item.name
        if entry is None or entry[0] != item.size or not path.is_file() or path.stat().st_size != item.size:
            return False
        return _digest(read_bytes(path)) == entry[1]

    def digest(self, names: Iterable[str]) -> str:
        """One digest of these files' names and contents, whatever their order."""
        lines = (f"{self._done[name][1]} {name}\n" for name in sorted(names))
        total = hashlib.blake2b(digest_size=16)
        for line in lines:
            total.update(line.encode())
        return total.hexdigest()

    def add(self, name: str, content: bytes) -> None:
        entry = {"name": name, "size": len(content), "blake2b": _digest(content)}
        self._done[name] = (entry["size"], entry["blake2b"])
        try:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise disk_trouble(self._path, error) from error


@dataclass
class Copied:
    """How many files were written, how many were complete before, the bytes of both, and one digest of all."""

    written: int = 0
    kept: int = 0
    size: int = 0
    digest: str = ""


def copy_items(
    items: Iterable[Item], target: Path, *, description: str, total: int | None = None, progress: Progress = silent
) -> Copied:
    """Makes each item's file below ``target``, except those that an earlier run completed.

    Raises:
      DataError: an item can't be read whole, or two have one name.
      StorageError: a file can't be written.
    """
    copied, seen, folders = Copied(), set(), set()
    make_folder(target)
    with Journal(target) as journal, progress(description, total) as advance:
        for item in items:
            if item.name in seen:
                raise DataError(f"{item.origin} is there twice; remove one of the two")
            seen.add(item.name)
            path = target / item.name
            if path.parent not in folders:
                make_folder(path.parent)
                folders.add(path.parent)
            if journal.complete(item):
                copied.kept += 1
            else:
                content = item.read()
                if len(content) != item.size:
                    raise DataError(f"{item.origin} ends after {len(content)} of {item.size} bytes; copy it again")
                # No wait for the disk: a million of them would take hours, and the journal's digest finds losses.
                with writing(path, durable=False) as file:
                    file.write(content)
                journal.add(item.name, content)
                copied.written += 1
            copied.size += item.size
            advance(1)
        copied.digest = journal.digest(seen)
    return copied


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
