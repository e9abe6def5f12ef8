"""What every preparation of a data set needs: whole files or none, digests, safe archive members, progress."""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

import numpy as np

from jaxvision.core.errors import ConfigError, DataError, StorageError

Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
"""``with progress(description, total or None) as advance: ... advance(1)``."""


@contextmanager
def silent(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """The :data:`Progress` that shows nothing."""
    del description, total
    yield lambda count: None


def make_folder(path: Path) -> None:
    """Makes a folder to write into.

    Raises:
      ConfigError: a file stands in its place.
      StorageError: the disk doesn't let us.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{path} can't be a folder because a file stands in its place; give another --to") from error
    except OSError as error:
        raise disk_trouble(path, error) from error


def disk_trouble(path: Path, error: OSError) -> StorageError:
    """The error for a file that can't be written."""
    return StorageError(f"{path} can't be written: {error.strerror or error}; mend that and run the same command again")


@contextmanager
def writing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file that appears under its name only when it is complete, even after ``kill -9``.

    Args:
      path: the name. Until then the content lies beside it in a hidden file, which the next try overwrites.
      durable: True also waits until the disk has it, so that it survives a loss of power.

    Raises:
      StorageError: the disk is full, read-only or broken.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise disk_trouble(path, error) from error
    finally:
        with suppress(OSError):  # a disk that refuses this is the trouble that is being reported
            temporary.unlink(missing_ok=True)


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An uncompressed npz, equal bytes for equal arrays."""
    with writing(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def write_json(path: Path, value: Any) -> None:
    with writing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def digest(path: Path, algorithm: str = "sha256") -> str:
    """The hexadecimal digest of a file.

    Raises:
      DataError: it can't be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error


def read_bytes(path: Path) -> bytes:
    """The content of a file that the person gave.

    Raises:
      DataError: it can't be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error


def describe_npz(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A manifest's entry for an npz: digest, number of examples, examples of each class."""
    classes = len(arrays["class_names"])
    counts = np.bincount(arrays["label"], minlength=classes).tolist()
    return {"sha256": digest(path), "examples": len(arrays["label"]), "classes": classes, "examples_per_class": counts}


def open_tar(path: Path | str, file: IO[bytes] | None = None) -> tarfile.TarFile:
    """Opens a tar archive, compressed or not; with ``file`` an archive in an archive, called ``path``.

    Raises:
      DataError: missing, or no tar archive.
    """
    try:
        return tarfile.open(path, "r:*") if file is None else tarfile.open(fileobj=file, mode="r:*")
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path} is no tar archive or is damaged; download it again") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error


def member_path(archive: str, member: tarfile.TarInfo) -> PurePosixPath:
    """The name of an archive's member as a path that stays inside the folder it is unpacked into.

    Raises:
      DataError: the member is a link or a device, or its name leads elsewhere.
    """
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        raise DataError(f"{archive} holds {member.name!a}, which leads out of its folder; refused")
    if not (member.isfile() or member.isdir()):
        raise DataError(f"{archive} holds {member.name!a}, which is a link or a device; refused")
    return path
