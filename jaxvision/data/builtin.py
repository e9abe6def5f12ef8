"""Data that come with the installed libraries: scikit-learn's 1797 handwritten digits."""

import numpy as np

from jaxvision.core.errors import ConfigError
from jaxvision.data.resize import resize_images
from jaxvision.data.sources import ArraySource

NUM_TRAIN = 1297


def digits(split: str, *, raw: bool = False) -> ArraySource:
    """Handwritten digits, 10 classes: 1297 for training, 500 for testing.

    The split is one fixed permutation, the same for every seed.

    Args:
      split: ``"train"``, ``"test"`` or ``"all"`` (1797, in the permutation's order).
      raw: False: float32 ``[N, 8, 8, 1]`` in 0..1; True: uint8 ``[N, 8, 8, 1]`` in 0..16, as scikit-learn stores it
        (:func:`jaxvision.data.transforms.normalize` would divide these by 255).
    """
    image, label = _digits(split)
    return ArraySource(image if raw else image.astype(np.float32) / 16, label, num_classes=10, name=f"digits '{split}'")


def digits16(split: str) -> ArraySource:
    """The digits at 16 x 16: ``(x / 16 - 0.5) / 0.5``, then bilinear (``align_corners=False``).

    float32 ``[N, 16, 16, 1]`` in -1..1, normalised already. The same split as :func:`digits`.
    """
    image, label = _digits(split)
    scaled = (image.astype(np.float32) / 16 - 0.5) / 0.5
    return ArraySource(resize_images(scaled, (16, 16)), label, num_classes=10, name=f"digits16 '{split}'")


def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 ``[N, 8, 8, 1]`` in 0..16 and labels ``[N]``."""
    if split not in ("train", "test", "all"):
        raise ConfigError(f"split='{split}' is unknown for digits; use train, test or all")
    from sklearn.datasets import load_digits  # here, because the import takes a second

    bunch = load_digits()
    # RandomState's streams are frozen for good, unlike those of np.random.Generator.
    order = np.random.RandomState(0).permutation(len(bunch.target))
    order = {"train": order[:NUM_TRAIN], "test": order[NUM_TRAIN:], "all": order}[split]
    return bunch.images[order].astype(np.uint8)[..., None], bunch.target[order]
