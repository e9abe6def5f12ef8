"""Numbers, text and structs out of MATLAB 5 files (``save`` without ``-v7.3``), checked byte by byte.

``scipy.io.loadmat`` reads more, but crashes the process on some damaged files.
"""

import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxvision.core.errors import DataError

_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
# How the numbers are stored; and the array classes that hold plain numbers.
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_COMPLEX = 0x0800
_STRUCT, _TEXT = 2, 4
_ENCODINGS = {16: "utf-8", 17: "utf-16", 18: "utf-32"}


def read_mat(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named arrays of real numbers that the file has, in MATLAB's (column-major) order; others are skipped.

    Raises:
      DataError: naming the file that is missing, cut short, damaged, or of another format.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    return _read(content, str(path), names, _numbers)


def read_structs(content: bytes, where: str, name: str) -> list[dict[str, np.ndarray | str]] | None:
    """The structs of an array of them, in column-major order; None if the file has no such name.

    Args:
      content: the file.
      where: what messages call it.
      name: of the array.

    Returns:
      Of each struct the fields that are real numbers (arrays) or a line of text; others are left out.

    Raises:
      DataError: as of :func:`read_mat`.
    """
    return _read(content, where, (name,), _structs).get(name)


def _read(content: bytes, where: str, names: tuple[str, ...], value: Callable[["_Matrix"], Any]) -> dict[str, Any]:
    order = {b"IM": "<", b"MI": ">"}.get(content[126:_HEADER])
    if order is None or not content.startswith(b"MATLAB 5.0"):
        raise DataError(f"{where} is cut short or no MATLAB 5 file; download it again")
    try:
        matrices = _matrices(memoryview(content)[_HEADER:], order)
        return {matrix.name: value(matrix) for matrix in matrices if matrix.name in names}
    except (ValueError, struct.error, zlib.error, MemoryError) as error:
        raise DataError(f"{where} is cut short or damaged ({error or 'too large'}); download it again") from error


def _matrices(content: memoryview, order: str) -> Iterator["_Matrix"]:
    while len(content):
        kind, element, content = _element(content, order)
        if kind == _COMPRESSED:
            whole = _inflated(element, order)
            kind, element, _ = _element(memoryview(whole), order)
        if kind == _MATRIX:
            yield _matrix(element, order)


def _inflated(element: memoryview, order: str) -> bytes:
    """The element in a compressed one; no more memory than it says it needs."""
    inflater = zlib.decompressobj()
    tag = inflater.decompress(element, 8)
    size = 8 + struct.unpack(f"{order}II", tag)[1]
    whole = tag + inflater.decompress(inflater.unconsumed_tail, max(1, size - len(tag)))
    inflater.decompress(inflater.unconsumed_tail, 8)  # the end, where the checksum is compared
    if not inflater.eof:
        raise ValueError("compressed data without an end")
    return whole


def _element(content: memoryview, order: str) -> tuple[int, memoryview, memoryview]:
    """The type and bytes of the first element, and what follows it."""
    kind, size = struct.unpack_from(f"{order}II", content)
    if kind >> 16:  # a small element: up to four bytes of data within the tag
        kind, size, start = kind & 0xFFFF, kind >> 16, 4
        following = 8
    else:
        start, following = 8, 8 + size
        following += 0 if kind == _COMPRESSED else -size % 8
    if start + size > len(content) or (start == 4 and size > 4):
        raise ValueError(f"an element of {size} bytes ends after {len(content) - start}")
    return kind, content[start : start + size], content[following:]


@dataclass(frozen=True)
class _Matrix:
    """Head of an array: its class, whether complex, shape, name; and what follows."""

    kind: int
    is_complex: bool
    shape: list[int]
    name: str
    rest: memoryview
    order: str


def _matrix(element: memoryview, order: str) -> _Matrix:
    parts = []
    for _ in range(3):
        _, part, element = _element(element, order)
        parts.append(part)
    flags, shape = struct.unpack_from(f"{order}I", parts[0])[0], np.frombuffer(parts[1], f"{order}i4").tolist()
    name = bytes(parts[2]).decode("latin1")
    return _Matrix(flags & 0xFF, bool(flags & _COMPLEX), shape, name, element, order)


def _numbers(matrix: _Matrix) -> np.ndarray:
    name, shape = matrix.name, matrix.shape
    if matrix.kind not in _CLASSES or matrix.is_complex:
        raise ValueError(f"'{name}' is no array of real numbers")
    kind, values, _ = _element(matrix.rest, matrix.order)
    if kind not in _STORED:
        raise ValueError(f"'{name}' has numbers of the unknown type {kind}")
    stored = np.frombuffer(values, matrix.order + _STORED[kind])
    if len(shape) < 2 or min(shape) < 0 or math.prod(shape) != len(stored):
        raise ValueError(f"'{name}' has the shape {tuple(shape)} and {len(stored)} numbers")
    return stored.astype(_CLASSES[matrix.kind], copy=False).reshape(shape, order="F")


def _text(matrix: _Matrix) -> str:
    kind, values, _ = _element(matrix.rest, matrix.order)
    if kind in _ENCODINGS:
        ending = "" if kind == 16 else {"<": "-le", ">": "-be"}[matrix.order]
        return bytes(values).decode(_ENCODINGS[kind] + ending)
    return "".join(map(chr, np.frombuffer(values, matrix.order + _STORED.get(kind, "u1")).tolist()))


def _structs(matrix: _Matrix) -> list[dict[str, np.ndarray | str]]:
    if matrix.kind != _STRUCT or len(matrix.shape) < 2 or min(matrix.shape) < 0:
        raise ValueError(f"'{matrix.name}' is no array of structs")
    _, length, rest = _element(matrix.rest, matrix.order)
    _, names, rest = _element(rest, matrix.order)
    width = struct.unpack(f"{matrix.order}i", length)[0]
    if width < 1 or len(names) % width or not len(names):
        raise ValueError(f"'{matrix.name}' has no fields")
    fields = [bytes(names[i : i + width]).split(b"\0")[0].decode("latin1") for i in range(0, len(names), width)]
    found: list[dict[str, np.ndarray | str]] = []
    for _ in range(math.prod(matrix.shape)):
        values: dict[str, np.ndarray | str] = {}
        for field in fields:
            kind, element, rest = _element(rest, matrix.order)
            if kind != _MATRIX:
                raise ValueError(f"field '{field}' of '{matrix.name}' is no array")
            if not len(element):  # an empty array
                continue
            inner = _matrix(element, matrix.order)
            if inner.kind == _TEXT:
                values[field] = _text(inner)
            elif inner.kind in _CLASSES and not inner.is_complex:
                values[field] = _numbers(inner)
        found.append(values)
    return found
