"""A file of bytes, and beside it a JSON file that says what they are: written whole, read only together.

The JSON file carries ``format``, ``version`` and the SHA-256 of the other. ``Announced`` is for arrays in the bytes:
all that the JSON file speaks of must be there, and nothing else.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxvision.core import trees
from jaxvision.core.errors import DataError

VARIABLES = "variables/"
SAFETENSORS = (".safetensors", ".json")
"""What the names of the two files end with."""


def _files(path: str | os.PathLike, endings: tuple[str, str]) -> tuple[Path, Path]:
    path = Path(path)
    return path.with_name(path.name + endings[0]), path.with_name(path.name + endings[1])


def save(path: str | os.PathLike, endings: tuple[str, str], data: bytes, metadata: Mapping[str, Any]) -> None:
    """Writes the bytes and then the JSON file, each complete or not at all; adds ``sha256`` to the metadata."""
    stored, described = _files(path, endings)
    metadata = {**metadata, "sha256": hashlib.sha256(data).hexdigest()}
    stored.parent.mkdir(parents=True, exist_ok=True)
    _write(stored, data)
    _write(described, (json.dumps(metadata, indent=1) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: str | os.PathLike, endings: tuple[str, str], what: str) -> tuple[bytes, dict[str, Any]]:
    """The bytes and the metadata.

    Raises:
      DataError: a file of ``what`` ("an integer network") is missing, damaged, or they don't belong together.
    """
    stored, described = _files(path, endings)
    for file in (described, stored):
        if not file.is_file():
            raise DataError(f"{file} does not exist; {what} is a {described.suffix} and a {stored.suffix} file")
    try:
        metadata = json.loads(described.read_bytes())
    except ValueError as error:
        raise DataError(f"{described} is not valid JSON: {error}") from error
    data = stored.read_bytes()
    if not isinstance(metadata, dict) or hashlib.sha256(data).hexdigest() != metadata.get("sha256"):
        raise DataError(f"{stored} is damaged or belongs to another model: its SHA-256 differs from the JSON file's")
    return data, metadata


def check_format(metadata: Mapping[str, Any], form: str, version: int, what: str) -> None:
    """Raises DataError where the metadata are not those of ``what`` ("integer network") in this format and version."""
    if metadata.get("format") != form or metadata.get("version") != version:
        found = f"{metadata.get('format')!r} version {metadata.get('version')!r}"
        raise DataError(f"this is no {what} of format {form!r} version {version}, but {found}")


class Announced:
    """Arrays by name, taken one after the other as the metadata announce them.

    Args:
      arrays: what the file holds.
      what: for messages, "integer network".
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], what: str):
        self._left, self._what = dict(arrays), what

    def take(self, name: str) -> np.ndarray:
        """The array of that name, once; raises DataError where there is none."""
        if name not in self._left:
            raise DataError(f"the {self._what} has no array {name!r}, which its JSON file announces")
        return self._left.pop(name)

    def variables(self, others: Mapping[str, Any]) -> dict[str, Any]:
        """What is left, ``variables/...``, and ``others`` of such names, as nested dicts.

        Raises:
          DataError: an array of another name is left.
        """
        for name in self._left:
            if not name.startswith(VARIABLES):
                raise DataError(f"the {self._what} has an array {name!r} that its JSON file doesn't mention")
        return trees.nested({name.removeprefix(VARIABLES): leaf for name, leaf in {**self._left, **others}.items()})


def contiguous(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays in C order: safetensors writes a buffer as it lies."""
    return {name: np.ascontiguousarray(leaf).reshape(np.shape(leaf)) for name, leaf in arrays.items()}
