"""Arrays in other people's files, read from the front in blocks: npy, npz, safetensors; PyTorch files at once.

Nothing in a file is executed. Files are read, not mapped, so that memory stays at a few blocks.
"""

import difflib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
import safetensors

from jaxvision.core.errors import DataError
from jaxvision.core.torch_file import read_torch_checkpoint

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
_SAFETENSORS = {
    **{f"F{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    **{f"{sign}{bits}": np.dtype(f"<{sign.lower()}{bits // 8}") for sign in "IU" for bits in (8, 16, 32, 64)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class StoredArray:
    """An array in a file.

    Attributes:
      name: for messages: file and key.
      shape, dtype: of it.
      open: opens a stream that stands at the first number.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    open: Callable[[], BinaryIO]

    def blocks(self, step: int) -> Iterator[np.ndarray]:
        """The array in pieces of ``step`` along its first axis.

        Raises:
          DataError: the file ends early or is damaged.
        """
        inner = int(np.prod(self.shape[1:], dtype=np.int64))
        try:
            with self.open() as stream:
                for first in range(0, self.shape[0], step):
                    rows = min(step, self.shape[0] - first)
                    data = stream.read(rows * inner * self.dtype.itemsize)
                    if len(data) != rows * inner * self.dtype.itemsize:
                        raise DataError(f"{self.name} ends after {first} of {self.shape[0]} rows: the file is cut off")
                    yield np.frombuffer(data, self.dtype).reshape(rows, *self.shape[1:])
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{self.name} can't be read ({error}): the file is damaged") from error


def open_arrays(path: Path) -> dict[str, StoredArray]:
    """The arrays of a file by their keys; an npy file's only one has the key ''.

    Raises:
      DataError: missing, empty, damaged, or of another kind.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file; give a .npz, .npy, .safetensors or .pt file")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty")
    try:
        if path.suffix == ".npy":
            return {"": _npy(str(path), lambda: open(path, "rb"))}
        if path.suffix == ".npz":
            return _npz(path)
        if path.suffix == ".safetensors":
            return _safetensors(path)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, safetensors.SafetensorError) as error:
        raise DataError(f"{path} can't be read as {path.suffix[1:]} ({error})") from error
    if path.suffix in TORCH_SUFFIXES:
        values = read_torch_checkpoint(path)
        return {str(key): _held(f"{key} of {path}", value) for key, value in values.items() if hasattr(value, "dtype")}
    kinds = ", ".join((".npz", ".npy", ".safetensors", *TORCH_SUFFIXES))
    raise DataError(f"{path} ends in '{path.suffix}'; logits and labels come as {kinds}")


def find(arrays: dict[str, StoredArray], key: str, path: Path) -> StoredArray:
    """One array of a file.

    Raises:
      DataError: the file doesn't hold it.
    """
    if key in arrays:
        return arrays[key]
    if list(arrays) == [""]:
        return arrays[""]
    close = difflib.get_close_matches(key, arrays, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise DataError(f"{path} holds no array '{key}'{hint} (it holds: {', '.join(sorted(arrays)) or 'nothing'})")


def _npz(path: Path) -> dict[str, StoredArray]:
    found = {}
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
    for member in names:

        def stream(member: str = member) -> BinaryIO:
            # The archive stays open as long as its member does.
            return zipfile.ZipFile(path).open(member)

        key = member.removesuffix(".npy")
        found[key] = _npy(f"{key} of {path}", stream)
    return found


def _npy(name: str, stream: Callable[[], BinaryIO]) -> StoredArray:
    def header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)

    def opened() -> BinaryIO:
        file = stream()
        header(file)
        return file

    with stream() as file:
        shape, fortran, dtype = header(file)
    if dtype.hasobject:
        raise DataError(f"{name} holds Python objects, not numbers; save it as a plain array")
    if fortran and len(shape) > 1:
        raise DataError(f"{name} is stored column by column; save np.ascontiguousarray of it")
    if not shape:
        raise DataError(f"{name} is a single number, not an array of rows")
    return StoredArray(name, shape, dtype, opened)


def _safetensors(path: Path) -> dict[str, StoredArray]:
    # The library checks header and offsets; the numbers are then read from where the header says.
    with safetensors.safe_open(path, framework="numpy"):
        pass
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    found = {}
    for key, entry in header.items():
        if key == "__metadata__" or not entry["shape"] or entry["dtype"] not in _SAFETENSORS:
            continue

        def opened(start: int = 8 + size + entry["data_offsets"][0]) -> BinaryIO:
            file = open(path, "rb")  # noqa: SIM115 (closed by whoever reads)
            file.seek(start)
            return file

        found[key] = StoredArray(f"{key} of {path}", tuple(entry["shape"]), _SAFETENSORS[entry["dtype"]], opened)
    return found


def _held(name: str, array: np.ndarray) -> StoredArray:
    data = np.ascontiguousarray(array)
    return StoredArray(name, data.shape, data.dtype, lambda: io.BytesIO(data.tobytes()))
