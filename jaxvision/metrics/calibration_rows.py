"""Logits and labels as rows that are read block by block, and the threads that work on the blocks."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jaxvision.core.errors import DataError

BLOCK = 1 << 22
"""Numbers in a block: 16 MiB of float32."""
_PART = 1 << 18
"""Numbers that one thread works on at once: they stay in its cache."""

Block = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Rows:
    """Logits and labels that can be read again and again, block by block.

    Attributes:
      blocks: () -> an iterator over (logits [b, K], labels int [b]).
      num_classes: K.
      name: what error messages call the logits.
    """

    blocks: Callable[[], Iterator[Block]]
    num_classes: int
    name: str = "the logits"

    @classmethod
    def of(
        cls, logits: np.ndarray, labels: np.ndarray, *, ignore: Sequence[int] = (), name: str = "the logits"
    ) -> "Rows":
        """From arrays.

        Args:
          logits: float [..., K], memory-mapped or not.
          labels: int [...].
          ignore: labels whose rows don't count, such as 255 in segmentation.
          name: for messages.

        Raises:
          DataError: shapes or types that don't fit; when a block is read: a label that is no class, or a logit that
            is not finite.
        """
        check_shapes(logits.shape, labels.shape, name)
        check_labels_type(labels.dtype, name)
        classes = logits.shape[-1]
        # Dense predictions are cut along the first axis: flattening a transposed array would copy it.
        inner = max(int(np.prod(logits.shape[1:])), 1)
        step = max(1, BLOCK // inner)

        def blocks() -> Iterator[Block]:
            for first in range(0, len(logits), step):
                part = slice(first, first + step)
                yield np.asarray(logits[part]).reshape(-1, classes), np.asarray(labels[part]).reshape(-1)

        return cls(checked(blocks, classes, ignore, name), classes, name)


def check_shapes(logits: Sequence[int], labels: Sequence[int], name: str) -> None:
    """Raises a DataError unless the shapes are [..., K] and [...] with K >= 2."""
    logits, labels = tuple(logits), tuple(labels)
    if len(logits) < 2:
        raise DataError(f"{name} have the shape {logits}, but must be (rows, classes)")
    if logits[-1] < 2:
        raise DataError(f"{name} have {logits[-1]} class on their last axis, but calibration needs at least 2")
    if logits[:-1] != labels:
        hint = ""
        if len(logits) > 2 and (logits[0], *logits[2:]) == labels:
            hint = "; the class axis must be the last one: transpose (N, K, H, W) to (N, H, W, K)"
        raise DataError(f"{name} have the shape {logits}, which does not fit labels of shape {labels}{hint}")


def check_labels_type(dtype: np.dtype, name: str) -> None:
    """Raises a DataError unless labels are integers."""
    if dtype.kind not in "iu":
        raise DataError(f"the labels of {name} are {dtype}, but must be integers (class numbers)")


def checked(
    blocks: Callable[[], Iterator[Block]],
    classes: int,
    ignore: Sequence[int],
    name: str,
    chosen: np.ndarray | None = None,
) -> Callable[[], Iterator[Block]]:
    """The blocks as float32 or float64 and int64, only the rows that count, every number looked at.

    ``chosen`` bool [rows] leaves out rows too.
    """

    def look() -> Iterator[Block]:
        first = 0
        for logits, labels in blocks():
            labels = labels.astype(np.int64)
            counts = ~np.isin(labels, list(ignore))
            if chosen is not None:
                counts &= chosen[first : first + len(labels)]
            wrong = counts & ((labels < 0) | (labels >= classes))
            if wrong.any():
                row = int(np.argmax(wrong))
                raise DataError(
                    f"label {labels[row]} of row {first + row} is none of the {classes} classes of {name} "
                    f"(0 to {classes - 1}); labels that don't count must be ignored explicitly"
                )
            logits = _as_float(logits, name)
            finite = np.isfinite(logits)
            if not finite.all() and (bad := counts & ~finite.all(-1)).any():
                row = int(np.argmax(bad))
                value = logits[row][~finite[row]][0]
                raise DataError(f"row {first + row} of {name} holds {value}; every logit must be a finite number")
            first += len(labels)
            yield (logits, labels) if counts.all() else (logits[counts], labels[counts])

    return look


def _as_float(logits: np.ndarray, name: str) -> np.ndarray:
    """float64 stays; everything smaller, bfloat16 of ml_dtypes included, becomes float32."""
    dtype = logits.dtype
    if dtype.kind in "iub":
        raise DataError(f"{name} are {dtype}, but must be floating point; are these predicted classes?")
    if dtype.type is np.void and dtype.names is None:
        raise DataError(
            f"{name} are raw bytes ({dtype.itemsize} a number): npz and npy files lose the type of bfloat16 and of "
            "8-bit floats; save float32, or a safetensors file"
        )
    if dtype.kind != "f" and not _is_small_float(dtype):
        raise DataError(f"{name} are {dtype}, but must be real floating point numbers")
    if dtype.itemsize >= 8:
        return logits.astype(np.float64, copy=False)
    return logits.astype(np.float32, copy=False)


def _is_small_float(dtype: np.dtype) -> bool:
    """Is it one of ml_dtypes' (bfloat16, ...)? NumPy's kind of them is that of raw bytes."""
    try:
        return dtype.kind == "V" and ml_dtypes.finfo(dtype).bits <= 16
    except ValueError:
        return False


def in_threads(work: Callable[[Any], Any], items: Iterable[Any], threads: int | None = None) -> Iterator[Any]:
    """``map(work, items)`` in order on a few threads, with a few items at a time in memory."""
    threads = threads or min(os.cpu_count() or 1, 8)
    waiting: deque[Any] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def part_rows(classes: int) -> int:
    """Rows that are worked on at once: a multiple of 32, and few enough for float32 sums over them."""
    return int(np.clip(_PART // classes // 32 * 32, 32, 2048))
