"""ImageNet (ILSVRC 2012) as class folders, from folders or from the official tar archives."""

import json
import os
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxvision.core.errors import DataError
from jaxvision.data.decode import decode_image, map_threaded
from jaxvision.data.folder import IMAGE_SUFFIXES
from jaxvision.data.imagenet_labels import SYNSET, Labels
from jaxvision.data.prepare_archive import tar_members
from jaxvision.data.prepare_files import Progress, member_path, open_tar, read_bytes, silent, write_json
from jaxvision.data.prepare_journal import Copied, Item, copy_items

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_MAX_IMAGE = 1 << 28  # bytes; the largest official one has 15 MB
_CHUNK = 256


def prepare_imagenet(
    source: Path,
    target: Path,
    *,
    val_labels: Path | None = None,
    devkit: Path | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Any], dict[str, Copied]]:
    """Writes ``train/<synset>/*.JPEG``, ``val/<synset>/*.JPEG`` and ``manifest.json``; can be killed and continued.

    Args:
      source: a folder with ``train/<synset>/`` and ``val/`` (class folders or flat), or with the official tars
        ``ILSVRC2012_img_train.tar`` and ``ILSVRC2012_img_val.tar``; or one of the two tars.
      target: the folder to write.
      val_labels: for a flat validation split: a file with a synset a line in the order of the images, or with
        ``<image> <synset>`` (or Kaggle's CSV) lines.
      devkit: instead of it: the official ``ILSVRC2012_devkit_t12.tar.gz`` or the folder unpacked from it.
      progress: shows how far it is.

    Returns:
      What ``manifest.json`` holds (for each split: images, classes, bytes and a digest over all names and
      contents), and what this call copied of each split.

    Raises:
      DataError: naming the file or class that is missing, damaged or in the wrong place.
      StorageError: the target can't be written.
    """
    train, val = _find(source)
    labels = Labels.read(val_labels, devkit)
    manifest, done = _manifest(target), {}
    for split, place in (("train", train), ("val", val)):
        if place is None:
            continue
        if place.is_dir():
            items = list(_val_folder(place, labels) if split == "val" else _class_folders(place, "train"))
            total = len(items)
        else:
            items, total = (_val_tar(place, labels) if split == "val" else _train_tar(place)), None
        copied = copy_items(items, target, description=f"imagenet: {split}", total=total, progress=progress)
        done[split] = copied
        manifest["splits"][split] = {
            "source": place.name,
            "images": copied.written + copied.kept,
            "classes": len(_files(target / split)),
            "bytes": copied.size,
            "blake2b": copied.digest,
        }
    _check_classes(target)
    write_json(target / "manifest.json", manifest)
    return manifest, done


def broken_images(root: Path, *, threads: int = 8, progress: Progress = silent) -> tuple[int, list[str]]:
    """Decodes every file below ``root/train`` and ``root/val``.

    Returns:
      The number of files, and one line for each that is no whole image, naming it.

    Raises:
      DataError: neither folder is there.
    """
    folders = [root / split for split in ("train", "val") if (root / split).is_dir()]
    if not folders:
        raise DataError(f"{root} has no train/ and no val/; give the folder that was prepared")
    files = [
        Path(current) / name
        for folder in folders
        for current, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".")
    ]
    files.sort()

    def fault(path: Path) -> str | None:
        try:
            decode_image(read_bytes(path), str(path))
        except DataError as error:
            return str(error)
        return None

    faults: list[str] = []
    # Pillow warns of odd metadata, which some of the official images have; the pixels are what counts here.
    with warnings.catch_warnings(action="ignore"), progress("imagenet: decoding", len(files)) as advance:
        for start in range(0, len(files), _CHUNK):
            part = files[start : start + _CHUNK]
            faults += [line for line in map_threaded(fault, part, threads) if line]
            advance(len(part))
    return len(files), faults


def _find(source: Path) -> tuple[Path | None, Path | None]:
    """Where the two splits are."""
    if source.is_file():
        return (source, None) if _holds_class_tars(source) else (None, source)
    if not source.is_dir():
        raise DataError(f"{source} doesn't exist; give a folder with train/ and val/, or the official tar archives")
    found = []
    for split, archive in (("train", TRAIN_TAR), ("val", VAL_TAR)):
        places = [place for place in (source / split, source / archive) if place.exists()]
        found.append(places[0] if places else None)
    if found == [None, None]:
        raise DataError(f"{source} has no train/, val/, {TRAIN_TAR} or {VAL_TAR}; give the folder that holds them")
    if found[1] and found[1].is_file() and _holds_class_tars(found[1]):
        raise DataError(f"{found[1]} holds class archives: it is the training split under the name of the other")
    return found[0], found[1]


def _holds_class_tars(path: Path) -> bool:
    with open_tar(path) as archive:
        for member in tar_members(archive, str(path)):
            return member.name.endswith(".tar")
    raise DataError(f"{path} is an empty archive; download it again")


def _image_item(archive: tarfile.TarFile, member: tarfile.TarInfo, origin: str, folder: str) -> Item:
    name = member_path(origin, member).name
    if not name.lower().endswith(IMAGE_SUFFIXES) or member.size > _MAX_IMAGE:
        raise DataError(f"{origin} holds {member.name!a}, which is no image; give the official archive")

    def read() -> bytes:
        try:
            return archive.extractfile(member).read()
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"{origin}:{member.name} can't be read ({error}); download the archive again") from error

    return Item(f"{folder}/{name}", member.size, read, f"{origin}:{member.name}")


def _train_tar(path: Path) -> Iterator[Item]:
    """A tar of one tar a class, ``n01440764.tar``, of images."""
    with open_tar(path) as outer:
        for member in tar_members(outer, str(path)):
            name = member_path(str(path), member).name
            synset, origin = name.removesuffix(".tar"), f"{path}:{member.name}"
            if not name.endswith(".tar") or not SYNSET.fullmatch(synset):
                raise DataError(f"{path} holds {member.name!a}, which is no class archive such as n01440764.tar")
            empty = True
            with open_tar(origin, outer.extractfile(member)) as inner:
                for image in tar_members(inner, origin):
                    empty = False
                    yield _image_item(inner, image, origin, f"train/{synset}")
            if empty:
                raise DataError(f"{origin} holds no images; download {path.name} again")


def _val_tar(path: Path, labels: Labels) -> Iterator[Item]:
    """A tar of images; the class comes from the labels."""
    with open_tar(path) as archive:
        members = list(tar_members(archive, str(path)))
        names = [member_path(str(path), member).name for member in members]
        synsets = labels.of(names, str(path))
        for member, synset in zip(members, synsets):
            yield _image_item(archive, member, str(path), f"val/{synset}")


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} can't be listed: {error.strerror}") from error


def _class_folders(root: Path, split: str) -> Iterator[Item]:
    folders = _files(root)
    if not folders:
        raise DataError(f"{root} is empty; it must hold a folder for each class")
    for folder in folders:
        if not folder.is_dir() or not SYNSET.fullmatch(folder.name):
            raise DataError(f"{folder} is no class folder such as n01440764; move it out of {root}")
        files = _files(folder)
        if not files:
            raise DataError(f"{folder} is a class without images; add them or remove the folder")
        yield from (_file_item(file, f"{split}/{folder.name}") for file in files)


def _val_folder(root: Path, labels: Labels) -> Iterator[Item]:
    files = _files(root)
    if not files or any(file.is_dir() for file in files):
        yield from _class_folders(root, "val")
        return
    synsets = labels.of([file.name for file in files], str(root))
    yield from (_file_item(file, f"val/{synset}") for file, synset in zip(files, synsets))


def _file_item(file: Path, folder: str) -> Item:
    if not file.is_file() or not file.name.lower().endswith(IMAGE_SUFFIXES):
        raise DataError(f"{file} is no image ({', '.join(IMAGE_SUFFIXES)}); remove it")
    return Item(f"{folder}/{file.name}", file.stat().st_size, lambda: read_bytes(file), str(file))


def _manifest(target: Path) -> dict[str, Any]:
    """The manifest to complete: the splits can be prepared one after the other."""
    path = target / "manifest.json"
    if path.is_file():
        try:
            old = json.loads(read_bytes(path))
            return {"dataset": "imagenet", "splits": dict(old["splits"])}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no manifest of ImageNet; give another --to or remove it") from error
    return {"dataset": "imagenet", "splits": {}}


def _check_classes(target: Path) -> None:
    """Labels are the numbers of the sorted class folders, so the two splits must have the same ones."""
    if not all((target / split).is_dir() for split in ("train", "val")):
        return
    train, val = ({path.name for path in _files(target / split)} for split in ("train", "val"))
    for split, missing in (("val", train - val), ("train", val - train)):
        if missing:
            raise DataError(
                f"{target / split} lacks {len(missing)} classes that the other split has, such as {min(missing)}: "
                "the labels of the two would not agree"
            )
