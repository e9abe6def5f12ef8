"""Sets of small images to npz files: SVHN from its .mat files, Tiny-ImageNet from its zip."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxvision.core.errors import DataError
from jaxvision.data.prepare_archive import check_official, describe_source
from jaxvision.data.prepare_files import Progress, describe_npz, digest, make_folder, silent, write_json, write_npz
from jaxvision.data.prepare_folder import decode_all
from jaxvision.data.svhn import CLASS_NAMES, svhn_arrays
from jaxvision.data.tiny_imagenet import SPLITS, TOP, tiny_imagenet

SVHN = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
    "extra_32x32.mat": "a93ce644f1a588dc4d68dda5feec44a7",
}
TINY_IMAGENET = {f"{TOP}.zip": "90528d7ca1a48142e341f4ef8d21d0de"}
_SIDE = 64


def prepare_svhn(
    source: Path, target: Path, *, allow_other: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Writes ``<split>.npz`` for each ``<split>_32x32.mat`` that is there, and ``manifest.json``.

    Each npz: ``image`` uint8 (N,32,32,3), ``label`` int64 (N,), ``class_names`` str (10,), the digits.

    Args:
      source: the folder that holds the files, or one of them.
      target: the folder to write.
      allow_other: True takes files whose MD5 is not that of the official ones.
      progress: shows how far it is.

    Returns:
      What ``manifest.json`` holds, of the files of this call.

    Raises:
      DataError: naming the file that is missing, damaged or not the official one.
      StorageError: the target can't be written.
    """
    files = [source] if source.is_file() else [source / name for name in SVHN if (source / name).is_file()]
    if not files or any(file.name not in SVHN for file in files):
        raise DataError(f"{source} is and holds none of {', '.join(SVHN)}; give the folder that holds them")
    described, official = {}, []
    for file in files:  # all of them before the first is read
        md5 = digest(file, "md5")
        official.append(check_official(file, md5, {file.name: SVHN[file.name]}, allow_other))
        described[file.name] = digest(file)
    manifest: dict[str, Any] = {
        "dataset": "svhn",
        "source": {"name": source.name, "sha256": described, "official": all(official)},
        "outputs": {},
    }
    with progress("svhn: files", len(files)) as advance:
        for file in files:
            image, label = svhn_arrays(file)
            _write(target / f"{file.name.split('_')[0]}.npz", image, label, CLASS_NAMES, manifest)
            advance(1)
    write_json(target / "manifest.json", manifest)
    return manifest


def prepare_tiny_imagenet(
    source: Path, target: Path, *, allow_other: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Writes ``train.npz``, ``val.npz`` and ``manifest.json``; 1.4 GB, decoded once and for all.

    Each npz: ``image`` uint8 (N,64,64,3), ``label`` int64 (N,), ``class_names`` str (K,), the sorted wnids.

    Args:
      source: ``tiny-imagenet-200.zip``, or the folder unpacked from it.
      target: the folder to write.
      allow_other: True takes a zip whose MD5 is not that of the official one.
      progress: shows how far it is.

    Returns:
      What ``manifest.json`` holds.

    Raises:
      ConfigError: more images than memory.
      DataError: naming the list, class or image that is missing, damaged or of another size.
      StorageError: the target can't be written.
    """
    manifest: dict[str, Any] = {
        "dataset": "tiny_imagenet",
        "source": describe_source(source, TINY_IMAGENET, allow_other),
        "outputs": {},
    }
    sources = {split: tiny_imagenet(source, split) for split in SPLITS}  # both lists before the first image

    def check(image: np.ndarray, file: str) -> np.ndarray:
        if image.shape != (_SIDE, _SIDE, 3):
            height, width = image.shape[:2]
            raise DataError(f"{source}: {file} has {width}x{height} pixels, not {_SIDE}x{_SIDE}; restore it")
        return image

    for split, images in sources.items():
        pixels = decode_all(images, _SIDE, check, f"tiny_imagenet {split}", progress)
        _write(target / f"{split}.npz", pixels, images.labels.astype(np.int64), images.class_names, manifest)
    write_json(target / "manifest.json", manifest)
    return manifest


def _write(
    path: Path, image: np.ndarray, label: np.ndarray, class_names: tuple[str, ...], manifest: dict[str, Any]
) -> None:
    make_folder(path.parent)
    arrays = {"image": image, "label": label, "class_names": np.array(class_names)}
    write_npz(path, arrays)
    manifest["outputs"][path.name] = describe_npz(path, arrays)
