"""Numeric arrays out of MATLAB 5 files (``save`` without ``-v7.3``), checked byte by byte.

``scipy.io.loadmat`` reads more, but crashes the process on some damaged files.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxvision.core.errors import DataError

_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
# How the numbers are stored; and the array classes that hold plain numbers.
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_COMPLEX = 0x0800


def read_mat(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named arrays of real numbers that the file has, in MATLAB's (column-major) order; others are skipped.

    Raises:
      DataError: naming the file that is missing, cut short, damaged, or of another format.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    order = {b"IM": "<", b"MI": ">"}.get(content[126:_HEADER])
    if order is None or not content.startswith(b"MATLAB 5.0"):
        raise DataError(f"{path} is cut short or no MATLAB 5 file; download it again")
    try:
        return dict(_arrays(memoryview(content)[_HEADER:], order, names))
    except (ValueError, struct.error, zlib.error, MemoryError) as error:
        raise DataError(f"{path} is cut short or damaged ({error or 'too large'}); download it again") from error


def _arrays(content: memoryview, order: str, names: tuple[str, ...]) -> Iterator[tuple[str, np.ndarray]]:
    while len(content):
        kind, element, content = _element(content, order)
        if kind == _COMPRESSED:
            whole = _inflated(element, order)
            kind, element, _ = _element(memoryview(whole), order)
        if kind == _MATRIX:
            named = _matrix(element, order, names)
            if named:
                yield named


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


def _matrix(element: memoryview, order: str, names: tuple[str, ...]) -> tuple[str, np.ndarray] | None:
    parts = []
    for _ in range(3):
        _, part, element = _element(element, order)
        parts.append(part)
    flags, shape = struct.unpack_from(f"{order}I", parts[0])[0], np.frombuffer(parts[1], f"{order}i4").tolist()
    name = bytes(parts[2]).decode("latin1")
    if name not in names:
        return None
    if flags & 0xFF not in _CLASSES or flags & _COMPLEX:
        raise ValueError(f"'{name}' is no array of real numbers")
    kind, values, _ = _element(element, order)
    if kind not in _STORED:
        raise ValueError(f"'{name}' has numbers of the unknown type {kind}")
    stored = np.frombuffer(values, order + _STORED[kind])
    if len(shape) < 2 or min(shape) < 0 or math.prod(shape) != len(stored):
        raise ValueError(f"'{name}' has the shape {tuple(shape)} and {len(stored)} numbers")
    return name, stored.astype(_CLASSES[flags & 0xFF], copy=False).reshape(shape, order="F")
