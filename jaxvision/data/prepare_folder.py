"""Packs images in class folders into one npz file of equal-sized images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxvision.core.errors import ConfigError
from jaxvision.data.augment import from_pillow, to_pillow
from jaxvision.data.decode import map_threaded
from jaxvision.data.folder import FolderSource, ListedSource
from jaxvision.data.imagenet import center_crop, resize_shorter_side
from jaxvision.data.prepare_files import Progress, describe_npz, digest, make_folder, silent, write_json, write_npz

_CHUNK = 256


def pack_folder(
    source: Path,
    target: Path,
    size: int,
    *,
    inside: str = "",
    ignore: tuple[str, ...] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Writes ``target`` (npz) and ``<target without .npz>.manifest.json``.

    Each image is scaled so that its shorter side is ``size`` (bicubic, antialiased) and cut to its central
    ``size`` x ``size``; one that has this size already is kept to the pixel.

    The npz: ``image`` uint8 (N,size,size,3), ``label`` int64 (N,), ``class_names`` str (K,): the class folders
    sorted by name.

    Args:
      source: a folder or zip with ``<class>/<image>``.
      target: the npz file.
      size: pixels.
      inside: the folder in a zip that holds the class folders.
      ignore: patterns of files that are no images.
      progress: shows how far it is.

    Returns:
      What the manifest holds.

    Raises:
      ConfigError: a wrong size or target, or more images than memory.
      DataError: naming the file that is no image or the class that is empty.
      StorageError: the target can't be written.
    """
    if size < 1:
        raise ConfigError(f"--size={size}: give a number of pixels, at least 1")
    if target.suffix != ".npz":
        raise ConfigError(f"--to={target}: give the name of a file that ends in .npz")
    folder = FolderSource(source, inside=inside, ignore=ignore)

    def fit(image: np.ndarray, file: str) -> np.ndarray:
        del file
        return from_pillow(center_crop(resize_shorter_side(to_pillow(image), size), size))

    images = decode_all(folder, size, fit, source.name, progress)
    make_folder(target.parent)
    arrays = {"image": images, "label": folder.labels.astype(np.int64), "class_names": np.array(folder.class_names)}
    write_npz(target, arrays)
    described = {"name": source.name, "sha256": digest(source) if source.is_file() else None}
    manifest = {"dataset": "folder", "source": described, "outputs": {target.name: describe_npz(target, arrays)}}
    write_json(target.with_suffix(".manifest.json"), manifest)
    return manifest


def decode_all(
    source: FolderSource | ListedSource,
    size: int,
    fit: Callable[[np.ndarray, str], np.ndarray],
    name: str,
    progress: Progress,
) -> np.ndarray:
    """All images of a source, uint8 ``[N, size, size, 3]``, each as ``fit`` makes it of its pixels and its file's name.

    Raises:
      ConfigError: more images than memory.
      DataError: naming the image that can't be decoded.
    """
    try:
        images = np.empty((len(source), size, size, 3), np.uint8)
    except (MemoryError, ValueError) as error:
        need = len(source) * size * size * 3 / 2**30
        raise ConfigError(f"{len(source)} images at --size={size} need {need:.0f} GiB; give a smaller size") from error
    with progress(f"{name}: images", len(source)) as advance:
        for start in range(0, len(source), _CHUNK):
            rows = range(start, min(start + _CHUNK, len(source)))
            images[rows.start : rows.stop] = map_threaded(
                lambda row: fit(source[row]["image"], source.files[row]), rows, 8
            )
            advance(len(rows))
    return images
