"""Images in class folders, ``<class>/<anything>.jpg``, in a directory or in a zip archive."""

import fnmatch
import os
import posixpath
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np

from jaxvision.core.errors import DataError
from jaxvision.data.decode import NUM_THREADS, decode_image, first_line, map_threaded
from jaxvision.data.sources import Example, stack

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's list


class FolderSource:
    """A class-folder data set, decoded when it is read.

    Classes are the top folders sorted by name; files are sorted by folder, then by name, below each class at any
    depth: the order and labels of torchvision's ``ImageFolder``. A directory and a zip of it give the same source.
    Hidden files and folders are skipped.

    Args:
      path: a directory or a ``.zip`` file.
      inside: for a zip, the folder in it that holds the class folders, such as ``"train"``.
      ignore: patterns of file names to skip (``"*.txt"``); any other file that isn't an image is an error.

    Raises:
      DataError: naming the file or folder, when the layout isn't right.
    """

    in_memory = False

    def __init__(self, path: str | Path, *, inside: str = "", ignore: tuple[str, ...] = ()):
        self.path = Path(path)
        if self.path.is_dir():
            self._reader = _Directory(self.path)
        elif self.path.is_file():
            self._reader = _Zip(self.path, inside.strip("/"))
        else:
            raise DataError(f"{self.path} doesn't exist; give a folder or zip with <class>/<image> in it")
        where = self._reader.where
        folders, files = self._reader.entries()
        self.class_names, self.files = _index(where, folders, files, ignore)
        number = {name: label for label, name in enumerate(self.class_names)}
        self.labels = np.array([number[file.split("/", 1)[0]] for file in self.files], np.int32)
        self.num_classes = len(self.class_names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        """``image`` uint8 ``[H, W, 3]`` RGB and ``label`` int32 scalar; DataError names a damaged file."""
        file = self.files[index]
        image = decode_image(self._reader.read(file), self._reader.where + file)
        return {"image": image, "label": self.labels[index]}

    def take(self, indices: np.ndarray) -> Example:
        return stack(map_threaded(self.__getitem__, np.asarray(indices).tolist(), NUM_THREADS))

    def verify(self, num_threads: int = NUM_THREADS) -> int:
        """Decodes every image and returns their number.

        Raises:
          DataError: with the number of damaged files and the first one's name and fault.
        """
        faults = [fault for fault in map_threaded(self._fault, range(len(self)), num_threads) if fault]
        if faults:
            raise DataError(f"{len(faults)} of {len(self)} images are damaged, first: {faults[0]}")
        return len(self)

    def _fault(self, index: int) -> str | None:
        try:
            self[index]
        except DataError as error:
            return str(error)
        return None


class _Directory:
    """Lists and reads a directory tree; names are relative with forward slashes."""

    def __init__(self, root: Path):
        self.root = root
        self.where = f"{root}/"

    def entries(self) -> tuple[list[str], list[str]]:
        folders, files = [], []
        for current, below, names in os.walk(self.root, followlinks=True, onerror=_cannot_list):
            below[:] = [name for name in below if not _hidden(name)]
            prefix = Path(current).relative_to(self.root).as_posix() + "/"
            prefix = "" if prefix == "./" else prefix
            folders += [prefix + name for name in below]
            files += [prefix + name for name in names if not _hidden(name)]
        return folders, files

    def read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise DataError(f"{self.where}{name} can't be read ({error.strerror}); restore it") from error


class _Zip:
    """Lists and reads a zip archive; one open handle, shared by threads under a lock."""

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
            if not name.startswith(self._prefix) or not relative or any(map(_hidden, relative.rstrip("/").split("/"))):
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

    def read(self, name: str) -> bytes:
        try:
            with self._lock:  # ZipFile counts its readers without a lock of its own
                return self._archive.read(self._prefix + name)
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError, zlib.error) as error:
            reason = first_line(error)
            raise DataError(f"{self.where}{name} can't be read ({reason}); make the archive again") from error


def shorten(names: list[str]) -> str:
    """The names with commas, at most eight of them; "nothing" where there are none."""
    return (", ".join(names[:8]) + (", ..." if len(names) > 8 else "")) or "nothing"


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def _cannot_list(error: OSError) -> None:
    raise DataError(f"{error.filename} can't be listed ({error.strerror}); check its permissions") from error


def _index(
    where: str, folders: list[str], files: list[str], ignore: tuple[str, ...]
) -> tuple[tuple[str, ...], list[str]]:
    """The sorted class names and the sorted image names of a tree, after checking its layout."""
    classes = sorted(folder for folder in folders if "/" not in folder)
    _check_duplicates(where, classes)
    images = []
    for file in files:
        is_image = file.lower().endswith(IMAGE_SUFFIXES)
        if any(fnmatch.fnmatch(posixpath.basename(file), pattern) for pattern in ignore):
            continue
        if "/" in file and not is_image:
            raise DataError(
                f"{where}{file} is not an image ({', '.join(IMAGE_SUFFIXES)}); remove it or name it in 'ignore'"
            )
        if "/" not in file and is_image:
            raise DataError(f"{where}{file} lies outside a class folder; move it into {where}<class>/")
        if is_image:
            images.append(file)
    if not classes:
        raise DataError(f"{where} has no class folders; put the images into {where}<class>/<file>.jpg")
    occupied = {file.split("/", 1)[0] for file in images}
    empty = [name for name in classes if name not in occupied]
    if empty:
        raise DataError(f"{where}{empty[0]} is a class folder without images; add images or remove the folder")
    if len(classes) == 1 and all(file.count("/") > 1 for file in images):
        raise DataError(
            f"{where} holds the single folder '{classes[0]}' with folders in it, so it looks like a wrapper around "
            f"the class folders; open {where}{classes[0]} instead (for a zip: inside='{classes[0]}')"
        )
    return tuple(classes), sorted(images, key=lambda file: (file.split("/", 1)[0], *posixpath.split(file)))


def _check_duplicates(where: str, classes: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in classes:
        first = seen.setdefault(name.strip().casefold(), name)
        if first != name:
            raise DataError(
                f"{where} has two folders for one class, '{first}' and '{name}' (they differ in case or spaces only); "
                "merge them"
            )
