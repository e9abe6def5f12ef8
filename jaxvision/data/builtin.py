"""Data that come with the installed libraries: scikit-learn's 1797 handwritten digits."""

import numpy as np

from jaxvision.core.errors import ConfigError
from jaxvision.data.resize import resize_images
from jaxvision.data.sources import ArraySource

NUM_TRAIN = 1297
NUM_DIGITS = 1797


def digits(split: str, *, raw: bool = False, num_train: int = NUM_TRAIN, noise: float = 0.0) -> ArraySource:
    """Handwritten digits, 10 classes: 1297 for training, 500 for testing.

    The split is one fixed permutation, the same for every seed.

    Args:
      split: ``"train"``, ``"test"`` or ``"all"`` (1797, in the permutation's order).
      raw: False: float32 ``[N, 8, 8, 1]`` in 0..1; True: uint8 ``[N, 8, 8, 1]`` in 0..16, as scikit-learn stores it
        (:func:`jaxvision.data.transforms.normalize` would divide these by 255).
      num_train: how many are for training; the others are for testing.
      noise: standard deviation of the Gaussian noise on every pixel in 0..1, drawn once: an image has the same in every
        epoch and for every seed. Not clipped.

    Raises:
      ConfigError: an unknown split, a number out of range, noise on raw pixels.
    """
    if not isinstance(num_train, int) or not 1 <= num_train < NUM_DIGITS:
        raise ConfigError(f"num_train={num_train!r} of digits must be a whole number from 1 to {NUM_DIGITS - 1}")
    if not 0 <= noise < np.inf or (noise and raw):
        raise ConfigError(f"noise={noise} of digits must be at least 0, and 0 for raw=True")
    image, label = _digits(split, num_train)
    if raw:
        return ArraySource(image, label, num_classes=10, name=f"digits '{split}'")
    pixels = image.astype(np.float32) / 16
    if noise:
        everywhere = np.random.RandomState(1).standard_normal((NUM_DIGITS, *image.shape[1:])).astype(np.float32)
        pixels = pixels + np.float32(noise) * everywhere[_part(split, num_train)]
    return ArraySource(pixels, label, num_classes=10, name=f"digits '{split}'")


def digits16(split: str) -> ArraySource:
    """The digits at 16 x 16: ``(x / 16 - 0.5) / 0.5``, then bilinear (``align_corners=False``).

    float32 ``[N, 16, 16, 1]`` in -1..1, normalised already. The same split as :func:`digits`.
    """
    image, label = _digits(split)
    scaled = (image.astype(np.float32) / 16 - 0.5) / 0.5
    return ArraySource(resize_images(scaled, (16, 16)), label, num_classes=10, name=f"digits16 '{split}'")


def _part(split: str, num_train: int) -> slice:
    if split not in ("train", "test", "all"):
        raise ConfigError(f"split='{split}' is unknown for digits; use train, test or all")
    return {"train": slice(num_train), "test": slice(num_train, None), "all": slice(None)}[split]


def _digits(split: str, num_train: int = NUM_TRAIN) -> tuple[np.ndarray, np.ndarray]:
    """uint8 ``[N, 8, 8, 1]`` in 0..16 and labels ``[N]``."""
    part = _part(split, num_train)
    from sklearn.datasets import load_digits  # here, because the import takes a second

    bunch = load_digits()
    # RandomState's streams are frozen for good, unlike those of np.random.Generator.
    order = np.random.RandomState(0).permutation(len(bunch.target))[part]
    return bunch.images[order].astype(np.uint8)[..., None], bunch.target[order]
