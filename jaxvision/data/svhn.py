"""Street View House Numbers, cropped digits: the official ``<split>_32x32.mat`` files."""

from pathlib import Path

import numpy as np

from jaxvision.core.errors import DataError
from jaxvision.data.mat_file import read_mat
from jaxvision.data.sources import ArraySource

CLASS_NAMES = tuple("0123456789")


def svhn_arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """uint8 ``[N, 32, 32, 3]`` and the digits int64 ``[N]`` of a .mat file, where ``X`` is ``[32, 32, 3, N]`` and the
    digit 0 is written as 10.

    Raises:
      DataError: naming the file that is missing, cut short, damaged, or of another form.
    """
    arrays = read_mat(path, ("X", "y"))
    for name in ("X", "y"):
        if name not in arrays:
            raise DataError(f"{path} has no array '{name}': it is cut short or not one of SVHN's; download it again")
    image, label = arrays["X"], arrays["y"].reshape(-1)
    if image.dtype != np.uint8 or image.ndim != 4 or image.shape[:3] != (32, 32, 3) or not image.shape[3]:
        raise DataError(f"{path}: 'X' is {image.dtype} {image.shape}, not uint8 (32, 32, 3, N); download it again")
    if len(label) != image.shape[3]:
        raise DataError(f"{path} has {image.shape[3]} images in 'X' and {len(label)} labels in 'y'; download it again")
    if not np.issubdtype(label.dtype, np.number) or not np.isin(label, np.arange(1, 11)).all():
        raise DataError(f"{path}: 'y' holds other labels than 1 to 10; download it again")
    return np.ascontiguousarray(image.transpose(3, 0, 1, 2)), label.astype(np.int64) % 10


def svhn(path: Path) -> ArraySource:
    """The .mat file as a source; ten classes, the digits."""
    image, label = svhn_arrays(path)
    return ArraySource(image, label, CLASS_NAMES, name=str(path))
