"""CIFAR-10 and CIFAR-100: from the official Python archives to npz files, without unpickling what was downloaded."""

import hashlib
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxvision.core.errors import DataError
from jaxvision.core.numpy_pickle import load_numpy_dict
from jaxvision.data.prepare_archive import check_official
from jaxvision.data.prepare_files import (
    Progress,
    describe_npz,
    digest,
    make_folder,
    member_path,
    open_tar,
    read_bytes,
    silent,
    write_json,
    write_npz,
)

_MAX_MEMBER = 1 << 28  # bytes; the largest official file has 155 MB


@dataclass(frozen=True)
class Form:
    """What an archive holds: file names with their MD5, and the keys in them."""

    archive: str
    md5: str
    folder: str
    splits: dict[str, tuple[str, ...]]
    meta: str
    files: dict[str, str]
    labels: dict[str, tuple[str, str]]
    """array -> (key of the labels in a batch, key of the names in the meta file)"""


FORMS = {
    "cifar10": Form(
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        splits={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        meta="batches.meta",
        files={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
        labels={"label": ("labels", "label_names")},
    ),
    "cifar100": Form(
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        splits={"train": ("train",), "test": ("test",)},
        meta="meta",
        files={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
        labels={"label": ("fine_labels", "fine_label_names"), "coarse_label": ("coarse_labels", "coarse_label_names")},
    ),
}


def prepare_cifar(
    kind: str, source: Path, target: Path, *, allow_other: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Writes ``train.npz``, ``test.npz`` and ``manifest.json``.

    Each npz: ``image`` uint8 (N,32,32,3), ``label`` int64 (N,), ``class_names`` str (K,); for CIFAR-100 the fine
    labels, and ``coarse_label`` and ``coarse_class_names`` beside them.

    Args:
      kind: ``"cifar10"`` or ``"cifar100"``.
      source: the official archive, or the folder unpacked from it.
      target: the folder to write.
      allow_other: True takes files whose MD5 is not that of the official ones.
      progress: shows how far it is.

    Returns:
      What ``manifest.json`` holds.

    Raises:
      DataError: the source is missing, damaged, not the official one, or asks to run code.
      StorageError: the target can't be written.
    """
    form = FORMS[kind]
    if source.is_dir():
        files, described = _read_folder(form, source, allow_other)
    elif source.is_file():
        files, described = _read_archive(form, source, allow_other)
    else:
        raise DataError(f"{source} doesn't exist; give {form.archive} or the folder {form.folder} unpacked from it")
    meta = load_numpy_dict(files[form.meta], f"{source}:{form.meta}")
    names = {array: _class_names(meta, keys[1], f"{source}:{form.meta}") for array, keys in form.labels.items()}
    make_folder(target)
    manifest: dict[str, Any] = {"dataset": kind, "source": described, "outputs": {}}
    with progress(f"{kind}: batches", sum(map(len, form.splits.values()))) as advance:
        for split, batches in form.splits.items():
            parts = []
            for batch in batches:
                parts.append(_batch(form, files[batch], names, f"{source}:{batch}"))
                advance(1)
            arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            for array, values in names.items():
                arrays[array.replace("label", "class_names")] = values
            write_npz(target / f"{split}.npz", arrays)
            manifest["outputs"][f"{split}.npz"] = describe_npz(target / f"{split}.npz", arrays)
    write_json(target / "manifest.json", manifest)
    return manifest


def _read_archive(form: Form, path: Path, allow_other: bool) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The bytes of each file in an archive; nothing is unpacked to disk."""
    md5 = digest(path, "md5")
    _check_md5(form, path, md5, form.md5, allow_other)
    files = {}
    try:
        with open_tar(path) as archive:
            for member in archive:
                place = member_path(str(path), member)
                if member.isfile() and place.parent.name == form.folder and place.name in form.files:
                    if member.size > _MAX_MEMBER:
                        raise DataError(f"{path} holds {place} of {member.size} bytes, which is no CIFAR file")
                    files[place.name] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); download it again") from error
    _check_complete(form, path, files)
    return files, {"name": path.name, "sha256": digest(path), "official": md5 == form.md5}


def _read_folder(form: Form, path: Path, allow_other: bool) -> tuple[dict[str, bytes], dict[str, Any]]:
    folder = path / form.folder if (path / form.folder).is_dir() else path
    files, official = {}, True
    for name, expected in form.files.items():
        if not (folder / name).is_file():
            continue
        content = read_bytes(folder / name)
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        _check_md5(form, folder / name, md5, expected, allow_other)
        official &= md5 == expected
        files[name] = content
    _check_complete(form, folder, files)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return files, {"name": folder.name, "sha256": digests, "official": official}


def _check_md5(form: Form, path: Path, md5: str, expected: str, allow_other: bool) -> None:
    if md5 == expected or allow_other:
        return
    for kind, other in FORMS.items():
        if md5 == other.md5:
            raise DataError(f"{path} is {other.archive}; run the command '{kind}' on it")
    check_official(path, md5, {form.archive: expected}, allow_other)


def _check_complete(form: Form, path: Path, files: dict[str, bytes]) -> None:
    missing = [name for name in form.files if name not in files]
    if missing:
        raise DataError(f"{path} has no {form.folder}/{missing[0]}; give {form.archive} or the folder unpacked from it")


def _class_names(meta: dict[str, Any], key: str, name: str) -> np.ndarray:
    values = meta.get(key)
    values = [value.decode() if isinstance(value, bytes) else value for value in values or ()]
    if not values or not all(isinstance(value, str) for value in values):
        raise DataError(f"{name} has no list of class names '{key}'")
    return np.array(values)


def _batch(form: Form, content: bytes, names: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """One batch file: ``data`` uint8 (N,3072) holds red, green, blue planes of 32x32, row by row."""
    batch = load_numpy_dict(content, name)
    data = batch.get("data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise DataError(f"{name} has no uint8 array 'data' of shape (N, 3072)")
    if not len(data):
        raise DataError(f"{name} holds no images")
    arrays = {"image": np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))}
    for array, (key, _) in form.labels.items():
        values, classes = batch.get(key), len(names[array])
        if not isinstance(values, list) or not all(type(v) is int and 0 <= v < classes for v in values):
            raise DataError(f"{name} has no list '{key}' of numbers from 0 to {classes - 1}")
        if len(values) != len(data):
            raise DataError(f"{name} has {len(data)} images and {len(values)} '{key}'")
        arrays[array] = np.array(values, np.int64)
    return arrays
