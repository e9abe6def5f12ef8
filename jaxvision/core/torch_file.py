"""Reads PyTorch checkpoint files into numpy, without PyTorch and without running anything that a file contains.

Both formats of ``torch.save``: the zip archive (since 1.6) and the older sequence of five pickles and raw storages.
"""

import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxvision.core import safe_pickle, torch_pickle
from jaxvision.core.errors import DataError
from jaxvision.core.numpy_pickle import NumpyHandlers
from jaxvision.core.safe_pickle import printable
from jaxvision.core.torch_pickle import Storage, StorageType

MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
PROTOCOL = 1001  # torch.serialization.PROTOCOL_VERSION


def read_torch_checkpoint(path: str | Path, *, skip_unknown: bool = False) -> dict[Any, Any]:
    """The content of a file that ``torch.save`` wrote, with numpy arrays for tensors.

    Tensors are read-only arrays, views of the storages in the file: shared storages stay shared, a transposed
    tensor is a strided view. Parameters come as plain arrays, ``OrderedDict`` as dict, dtypes as ``np.dtype``,
    ``torch.Size`` as tuple, devices as str; bfloat16 and float8 as the ``ml_dtypes`` types.

    Args:
      path: the file (``.pth``, ``.pt``, ``.bin``, ``.ckpt``).
      skip_unknown: True puts an inert :class:`~jaxvision.core.safe_pickle.Placeholder` where the file names
        something that is not weights (``argparse.Namespace``, an optimizer); nothing of it is imported or called.

    Returns:
      The dictionary that was saved, nested as it was.

    Raises:
      DataError: missing or damaged, no dictionary, or the file asks for a name that is not weights.
    """
    name = str(path)
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            read = _read_zip if zipfile.is_zipfile(file) else _read_legacy
            file.seek(0)
            value = read(file, size, name, skip_unknown)
    except OSError as error:
        raise DataError(f"{name} can't be read: {error.strerror or error}") from error
    if type(value) is not dict:
        kind = value.name if isinstance(value, safe_pickle.Placeholder) else type(value).__name__
        raise DataError(f"{name} holds a {kind}, not a dictionary of weights; save model.state_dict() instead")
    return value


def _read_zip(file: BinaryIO, size: int, name: str, skip_unknown: bool) -> Any:
    """``<archive>/data.pkl``, and an entry ``<archive>/data/<key>`` for each storage."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            roots = [entry[: -len("data.pkl")] for entry in entries if entry.split("/")[-1] == "data.pkl"]
            if len(roots) != 1 or roots[0].count("/") > 1:
                raise DataError(f"{name} is a zip file without one data.pkl in it: not a PyTorch checkpoint")
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values())
            if packed or sum(entry.file_size for entry in entries.values()) > size:
                # torch.save stores without compression: what it wrote can't unfold into more than its own size.
                raise DataError(f"{name} was packed again or is damaged; use the file that torch.save wrote")
            order = archive.read(roots[0] + "byteorder") if roots[0] + "byteorder" in entries else b"little"
            storages: dict[str, Storage] = {}

            def persistent_load(pid: Any) -> Any:
                unknown = torch_pickle.unknown_id(pid)
                if unknown is not None:
                    return unknown
                kind, key, numel = torch_pickle.storage_id(pid)
                if key not in storages:
                    if f"{roots[0]}data/{key}" not in entries:
                        raise DataError(f"{name} is damaged: the storage {printable(key)} is missing")
                    storages[key] = Storage.from_bytes(archive.read(f"{roots[0]}data/{key}"), kind, order == b"big")
                return storages[key].checked(kind, numel)

            content = archive.read(roots[0] + "data.pkl")
            return _load(content, len(content), name, persistent_load, skip_unknown, torch_pickle.view)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{name} is damaged: {printable(str(error))}") from error


def _read_legacy(file: BinaryIO, size: int, name: str, skip_unknown: bool) -> Any:
    """Magic number, protocol, machine, the object, the list of storage keys; then the storages in that order.

    The object comes before its memory, so it is read twice: first to learn the type of each storage, again when
    the storages are there.
    """
    if safe_pickle.load(file, allowed={}, name=name) != MAGIC:
        raise DataError(f"{name} is no file that torch.save wrote")
    protocol = safe_pickle.load(file, allowed={}, name=name)
    machine = safe_pickle.load(file, allowed={}, name=name)
    if protocol != PROTOCOL or type(machine) is not dict:
        raise DataError(f"{name} is a PyTorch file of protocol {printable(str(protocol))}; {PROTOCOL} is read")
    start = file.tell()
    kinds: dict[str, tuple[StorageType, int]] = {}

    def collect(pid: Any) -> Any:
        unknown = torch_pickle.unknown_id(pid)
        if unknown is None:
            kind, key, numel = torch_pickle.storage_id(pid)
            kinds[key] = (kind, numel)
        return unknown

    _load(file, size, name, collect, skip_unknown, lambda *args: None)
    keys = safe_pickle.load(file, allowed={}, name=name)
    if type(keys) is not list or not all(isinstance(key, str) for key in keys) or not set(kinds) <= set(keys):
        raise DataError(f"{name} is damaged: its storages don't match its tensors")
    if set(kinds) != set(keys):
        # A storage of unknown type has an unknown length, so those after it can't be found.
        raise DataError(f"{name} holds storages of a type that is not read; save it again with a newer PyTorch")
    big = machine.get("little_endian") is False
    storages = {key: _read_legacy_storage(file, *kinds[key], big, size, name) for key in keys}

    def persistent_load(pid: Any) -> Any:
        unknown = torch_pickle.unknown_id(pid)
        if unknown is not None:
            return unknown
        kind, key, numel = torch_pickle.storage_id(pid)
        whole = storages[key].checked(kind, numel)
        if len(pid) < 6 or pid[5] is None:
            return whole
        _, offset, length = pid[5]  # a view of a storage, before PyTorch 0.4
        return whole.part(offset, length)

    file.seek(start)
    return _load(file, size, name, persistent_load, skip_unknown, torch_pickle.view)


def _read_legacy_storage(file: BinaryIO, kind: StorageType, numel: int, big: bool, size: int, name: str) -> Storage:
    """Eight bytes with the number of elements, then the elements."""
    stored = int.from_bytes(file.read(8), "big" if big else "little")
    length = numel * kind.dtype.itemsize
    if stored != numel or length > size - file.tell():
        raise DataError(f"{name} is damaged or was not copied whole: a storage of {length} bytes is missing")
    try:
        return Storage.from_bytes(file.read(length), kind, big)
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error


def _load(
    file: BinaryIO | bytes,
    size: int,
    name: str,
    persistent_load: Callable[[Any], Any],
    skip_unknown: bool,
    tensor: Callable[..., np.ndarray | None],
) -> Any:
    """The pickle of the object. ``dict`` takes (and drops) attributes: a state dict has ``_metadata``."""
    numpy = NumpyHandlers(size)
    return safe_pickle.load(
        file,
        allowed={**numpy.allowed, **torch_pickle.names(tensor)},
        build={**numpy.build, dict: lambda target, state: None},
        persistent_load=persistent_load,
        skip_unknown=skip_unknown,
        name=name,
    )
