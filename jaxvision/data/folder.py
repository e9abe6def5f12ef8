"""Images in class folders, ``<class>/<anything>.jpg``, in a directory or in a zip archive; images in a list."""

import fnmatch
import posixpath
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxvision.core.errors import DataError
from jaxvision.data.decode import NUM_THREADS, decode_image, map_threaded
from jaxvision.data.sources import Example, Source, stack
from jaxvision.data.trees import Tree, open_tree

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's list


class FolderSource:
    """A class-folder data set, decoded when it is read.

    Classes are the top folders sorted by name; files are sorted by folder, then by name, below each class at any
    depth: the order and labels of torchvision's ``ImageFolder``. A directory and a zip of it give the same source.
    Hidden files and folders are skipped.

    Args:
      path: a directory or a ``.zip`` file.
      inside: the folder in it that holds the class folders, such as ``"train"``.
      ignore: patterns of file names to skip (``"*.txt"``); any other file that isn't an image is an error.

    Raises:
      DataError: naming the file or folder, when the layout isn't right.
    """

    in_memory = False

    def __init__(self, path: str | Path, *, inside: str = "", ignore: tuple[str, ...] = ()):
        self.path = Path(path)
        self._reader = open_tree(self.path, inside)
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
        """Decodes every image and returns their number; DataError counts the damaged ones and names the first."""
        return verify(self, num_threads)


class ListedSource:
    """Images that a list names, decoded when they are read.

    Args:
      tree: where they are.
      files: N names in it.
      labels: integer ``[N]`` in ``0 .. K - 1``.
      class_names: K names.
      name: the list, for error messages.

    Raises:
      DataError: naming the image that isn't there, or the class that has none.
    """

    in_memory = False

    def __init__(self, tree: Tree, files: Sequence[str], labels: np.ndarray, class_names: Sequence[str], name: str):
        self._tree, self.files, self.labels = tree, list(files), np.asarray(labels, np.int32)
        self.class_names, self.num_classes = tuple(class_names), len(class_names)
        missing = next((file for file in self.files if not tree.exists(file)), None)
        if missing is not None:
            raise DataError(f"{tree.where}{missing} doesn't exist, but {name} lists it; restore it")
        empty = np.flatnonzero(np.bincount(self.labels, minlength=self.num_classes) == 0)
        if empty.size:
            raise DataError(f"{name} lists no image of the class '{self.class_names[empty[0]]}'; restore the list")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        """``image`` uint8 ``[H, W, 3]`` RGB and ``label`` int32 scalar; DataError names a damaged file."""
        file = self.files[index]
        return {"image": decode_image(self._tree.read(file), self._tree.where + file), "label": self.labels[index]}

    def take(self, indices: np.ndarray) -> Example:
        return stack(map_threaded(self.__getitem__, np.asarray(indices).tolist(), NUM_THREADS))

    def verify(self, num_threads: int = NUM_THREADS) -> int:
        """Decodes every image and returns their number; DataError counts the damaged ones and names the first."""
        return verify(self, num_threads)


def verify(source: Source, num_threads: int = NUM_THREADS) -> int:
    """Reads every example of a source that decodes, and returns their number.

    Raises:
      DataError: with the number of damaged ones and the first one's name and fault.
    """

    def fault(index: int) -> str | None:
        try:
            source[index]
        except DataError as error:
            return str(error)
        return None

    faults = [line for line in map_threaded(fault, range(len(source)), num_threads) if line]
    if faults:
        raise DataError(f"{len(faults)} of {len(source)} images are damaged, first: {faults[0]}")
    return len(source)


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
