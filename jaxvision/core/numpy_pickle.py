"""What numpy arrays in a pickle mean, without calling what the pickle names."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxvision.core import safe_pickle
from jaxvision.core.errors import DataError

_CODE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)")
_SLACK = 1 << 16


class _Dtype:
    """A dtype while it is read: its byte order comes later, by BUILD."""

    __slots__ = ("value",)

    def __init__(self, value: np.dtype):
        self.value = value


class NumpyHandlers:
    """The names that pickled arrays use (numpy 1 and 2, Python 2 and 3), for :func:`safe_pickle.load`.

    Args:
      limit: the file's size. A file may make twice as many bytes of arrays (protocols below 3 encode text first and
        fill the array from that); without a limit a small file could ask for the same megabytes again and again.
    """

    def __init__(self, limit: int):
        self._left = 2 * limit + _SLACK
        self.allowed: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): "numpy.ndarray",
            ("numpy", "dtype"): _dtype,
            ("_codecs", "encode"): self._encode,
            ("builtins", "bytes"): _no_bytes,
            ("__builtin__", "bytes"): _no_bytes,
        }
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            self.allowed[module, "_reconstruct"] = _reconstruct
            self.allowed[module, "scalar"] = _scalar
        self.build: dict[type, Callable[[Any, Any], None]] = {np.ndarray: self._fill, _Dtype: _set_order}

    def _charge(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise ValueError("it makes more array bytes than it holds")

    def _encode(self, text: str, encoding: str) -> bytes:
        """``_codecs.encode``: how protocols below 3 write bytes."""
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise ValueError("only latin1 text can be bytes")
        self._charge(len(text))
        return text.encode("latin1")

    def _fill(self, array: np.ndarray, state: tuple) -> None:
        """``ndarray.__setstate__`` of an array that ``_reconstruct`` made and nobody has filled yet."""
        _, shape, dtype, fortran, raw = state if len(state) == 5 else (1, *state)
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if array.size or not array.flags.owndata:
            raise ValueError("an array is filled twice")
        if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes) or not _is_shape(shape):
            raise ValueError("an array holds something else than numbers")
        if math.prod(shape) * dtype.value.itemsize != len(raw):
            raise ValueError(f"an array of shape {shape} has {len(raw)} bytes")
        self._charge(len(raw))
        array.__setstate__((1, shape, dtype.value, bool(fortran), raw))


def load_numpy_dict(file: str | Path | bytes, name: str | None = None) -> dict[str, Any]:
    """A pickled dictionary of arrays, numbers, strings and lists of these, such as a batch file of CIFAR.

    Args:
      file: a path or the bytes.
      name: what error messages call the file.

    Returns:
      The dictionary. Keys are str; strings that Python 2 wrote stay ``bytes``; arrays own their memory.

    Raises:
      DataError: missing, damaged, asks for code, or is no dictionary.
    """
    if not isinstance(file, bytes):
        name = name or str(file)
        try:
            file = Path(file).read_bytes()
        except OSError as error:
            raise DataError(f"{name} can't be read: {error.strerror}") from error
    name = name or "the pickle"
    numpy = NumpyHandlers(len(file))
    value = safe_pickle.load(file, allowed=numpy.allowed, build=numpy.build, encoding="bytes", name=name)
    if type(value) is not dict:
        raise DataError(f"{name} holds a {type(value).__name__}, not a dictionary")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): item for key, item in value.items()}


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _is_shape(shape: Any) -> bool:
    return type(shape) is tuple and len(shape) <= 32 and all(type(n) is int and n >= 0 for n in shape)


def _no_bytes() -> bytes:
    """How protocols below 3 write the empty bytes. With arguments it would be a way to claim memory."""
    return b""


def _dtype(code: Any, align: Any = False, copy: Any = False) -> _Dtype:
    del align, copy
    code = _text(code)
    if not isinstance(code, str) or not _CODE.fullmatch(code):
        raise ValueError(f"arrays of type {code!r} are not read")
    return _Dtype(np.dtype(code))


def _set_order(dtype: _Dtype, state: tuple) -> None:
    order, structure = _text(state[1]), state[2:5]
    if order not in ("<", ">", "|", "=") or any(part is not None for part in structure):
        raise ValueError("arrays of records are not read")
    dtype.value = dtype.value.newbyteorder(order)


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    del shape, code
    if kind != "numpy.ndarray":
        raise ValueError("only plain arrays are read")
    return np.empty(0, np.uint8)


def _scalar(dtype: _Dtype, raw: Any) -> np.generic:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes) or len(raw) != dtype.value.itemsize:
        raise ValueError("a number of the wrong size")
    return np.frombuffer(raw, dtype.value)[0]
