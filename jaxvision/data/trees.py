"""A tree of files, in a directory or in a zip archive."""

import os
import posixpath
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

from jaxvision.core.errors import DataError
from jaxvision.data.decode import first_line


class Tree(Protocol):
    """A directory tree or one in a zip; names are relative with forward slashes.

    ``where`` + name is what error messages call a file.
    """

    where: str

    def entries(self) -> tuple[list[str], list[str]]:
        """The names of all folders and of all files, without hidden ones."""
        ...

    def exists(self, name: str) -> bool:
        """Is there such a file?"""
        ...

    def read(self, name: str) -> bytes:
        """A file's content; DataError names the one that can't be read."""
        ...


def open_tree(path: Path, inside: str = "") -> Tree:
    """The directory or zip archive at ``path``, from its folder ``inside`` on.

    Raises:
      DataError: there is none.
    """
    if path.is_dir():
        return _Directory(path / inside)
    if path.is_file():
        return _Zip(path, inside.strip("/"))
    raise DataError(f"{path} doesn't exist; give a folder or zip with <class>/<image> in it")


class _Directory:
    """A :class:`Tree` of files."""

    def __init__(self, root: Path):
        self.root = root
        self.where = f"{root}/"

    def entries(self) -> tuple[list[str], list[str]]:
        folders, files = [], []
        for current, below, names in os.walk(self.root, followlinks=True, onerror=_cannot_list):
            below[:] = [name for name in below if not hidden(name)]
            prefix = Path(current).relative_to(self.root).as_posix() + "/"
            prefix = "" if prefix == "./" else prefix
            folders += [prefix + name for name in below]
            files += [prefix + name for name in names if not hidden(name)]
        return folders, files

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise DataError(f"{self.where}{name} can't be read ({error.strerror}); restore it") from error


class _Zip:
    """A :class:`Tree` in a zip archive; one open handle, shared by threads under a lock."""

    def __init__(self, path: Path, inside: str):
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            reason = first_line(error)
            raise DataError(f"{path} is no readable zip archive ({reason}); copy or download it again") from error
        self._prefix = f"{inside}/" if inside else ""
        self.where = f"{path}:{self._prefix}"
        self._lock = threading.Lock()
        if not any(name.startswith(self._prefix) for name in self._archive.namelist()):
            top = sorted({name.split("/", 1)[0] for name in self._archive.namelist()})
            raise DataError(
                f"{path} has no folder '{inside}' (it has {shorten(top)}); correct the name, "
                "or, if every split has a zip of its own, write {split} in the path"
            )

    def entries(self) -> tuple[list[str], list[str]]:
        folders, files = set(), set()
        for name in self._archive.namelist():
            relative = name.removeprefix(self._prefix)
            if not name.startswith(self._prefix) or not relative or any(map(hidden, relative.rstrip("/").split("/"))):
                continue
            if relative in files:
                raise DataError(f"{self.where}{relative} is in the archive twice; remove one")
            folder = relative.rstrip("/") if relative.endswith("/") else posixpath.dirname(relative)
            if not relative.endswith("/"):
                files.add(relative)
            while folder:
                folders.add(folder)
                folder = posixpath.dirname(folder)
        return list(folders), list(files)

    def exists(self, name: str) -> bool:
        return self._prefix + name in self._archive.NameToInfo

    def read(self, name: str) -> bytes:
        if not self.exists(name):
            raise DataError(f"{self.where}{name} doesn't exist; make the archive again")
        try:
            with self._lock:  # ZipFile counts its readers without a lock of its own
                return self._archive.read(self._prefix + name)
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError, zlib.error) as error:
            reason = first_line(error)
            raise DataError(f"{self.where}{name} can't be read ({reason}); make the archive again") from error


def read_table(tree: Tree, name: str, columns: int, *, sep: str | None = None) -> list[list[str]]:
    """The lines of a text file cut into words, at least ``columns`` each; blank lines are skipped.

    Raises:
      DataError: the file is missing or empty, or a line is too short.
    """
    if not tree.exists(name):
        raise DataError(f"{tree.where}{name} doesn't exist, but the data set needs this list; restore it")
    rows = []
    for number, line in enumerate(tree.read(name).decode("utf-8", "replace").splitlines(), 1):
        words = line.strip().split(sep)
        if not line.strip():
            continue
        if len(words) < columns:
            raise DataError(f"{tree.where}{name} line {number} has {len(words)} of {columns} columns; restore it")
        rows.append(words)
    if not rows:
        raise DataError(f"{tree.where}{name} is empty; restore it")
    return rows


def shorten(names: list[str]) -> str:
    """The names with commas, at most eight of them; "nothing" where there are none."""
    return (", ".join(names[:8]) + (", ..." if len(names) > 8 else "")) or "nothing"


def hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def _cannot_list(error: OSError) -> None:
    raise DataError(f"{error.filename} can't be listed ({error.strerror}); check its permissions") from error
