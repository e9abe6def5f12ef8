"""Image bytes to arrays, and the threads that do it."""

import functools
import io
import os
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from jaxvision.core.errors import DataError

NUM_THREADS = 16  # reading threads of a process; Grain's own default

# What Pillow's decoders raise on damaged input; UnidentifiedImageError is an OSError.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def decode_image(data: bytes, name: str, channels: int = 3) -> np.ndarray:
    """The image in ``data`` as uint8 ``[H, W, channels]``; RGB for 3 channels, grey for 1.

    Decoded by Pillow, EXIF orientation ignored, as torchvision's ``ImageFolder`` does.

    Args:
      data: the file's bytes.
      name: the file's name for the error message.
      channels: 1 or 3.

    Raises:
      DataError: naming the file, if it is empty, truncated or no image.
    """

    def convert(picture: Image.Image) -> np.ndarray:
        if picture.mode == "P" and "transparency" in picture.info:
            picture = picture.convert("RGBA")  # same colours; straight to RGB makes Pillow warn
        return np.array(picture.convert("L" if channels == 1 else "RGB"))

    pixels = _decode(data, name, convert)
    return pixels[:, :, None] if channels == 1 else pixels


def decode_label_map(data: bytes, name: str, num_classes: int, ignore: int = 255) -> np.ndarray:
    """The labels uint8 ``[H, W]`` of a palette image (its indices, not its colours) or a grey one.

    Args:
      data: the file's bytes.
      name: the file's name for the error message.
      num_classes: K; labels are 0 ... K - 1 and ``ignore``.
      ignore: the label of pixels that don't count.

    Raises:
      DataError: naming the file, if it is damaged, in colours, or has a label beyond the classes.
    """

    def convert(picture: Image.Image) -> np.ndarray:
        if picture.mode not in ("P", "L"):
            raise DataError(f"{name} has the colour mode {picture.mode}; a label map must be a palette or grey image")
        return np.array(picture)

    labels = _decode(data, name, convert)
    wrong = labels[(labels >= num_classes) & (labels != ignore)]
    if wrong.size:
        raise DataError(f"{name} has the label {wrong[0]}, but the classes are 0 to {num_classes - 1}; correct it")
    return labels


def _decode(data: bytes, name: str, convert: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    if not data:
        raise DataError(f"{name} is empty (0 bytes); replace it or remove it")
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return convert(picture)
    except _DAMAGED as error:
        # Pillow names an in-memory buffer by its address, which tells the reader nothing.
        reason = first_line(error)
        reason = "not an image file that Pillow knows" if "cannot identify" in reason else reason
        raise DataError(f"{name} can't be decoded ({reason}); replace it or remove it") from error


@functools.cache
def _pool(process: int, num_threads: int) -> ThreadPoolExecutor:
    del process  # part of the cache key: threads don't survive a fork
    return ThreadPoolExecutor(num_threads, thread_name_prefix="jaxvision-read")


def map_threaded(function: Callable[[Any], Any], items: Iterable[Any], num_threads: int) -> list[Any]:
    """``[function(item) for item in items]`` on this process's reading threads, in order.

    Decoding releases the interpreter lock, so threads are enough, and unlike processes they start at once.
    ``num_threads`` below 2 runs in the calling thread.
    """
    if num_threads < 2:
        return [function(item) for item in items]
    return list(_pool(os.getpid(), num_threads).map(function, items))


def first_line(error: BaseException) -> str:
    """The first line of another library's error text, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
