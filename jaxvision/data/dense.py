"""Example-level transforms that move an image and its label map together, ``(example, generator) -> example``.

``image`` is uint8 ``[H, W, 3]``; where the example has a ``label_map`` uint8 ``[H, W]`` it is resized by nearest, and
what comes in from outside the image is black and has the label 255, "ignore". Mirroring and random resized crops, which
move both as well, are in :mod:`jaxvision.data.augment`.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from jaxvision.core.errors import ConfigError
from jaxvision.data.augment import (
    Example,
    ExampleTransform,
    from_pillow,
    normalize,
    random_horizontal_flip,
    resampling,
    shift_hsv,
    to_pillow,
)
from jaxvision.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from jaxvision.data.transforms import IGNORE, compose


def resize(height: int, width: int, method: str = "bilinear") -> ExampleTransform:
    """Both sides to a size, whatever the ratio; by Pillow, antialiased."""
    _check_sizes(height=height, width=width)
    resampling(method)

    def transform(example: Example, rng: np.random.Generator) -> Example:
        del rng
        return _resized(example, height, width, method)

    return transform


def resize_longest(size: int, method: str = "bilinear") -> ExampleTransform:
    """The longer side to ``size``, the other in proportion (rounded, at least 1); shrinks and enlarges.

    Source: albumentations ``LongestMaxSize``, which doesn't antialias where it shrinks.
    """
    _check_sizes(size=size)
    resampling(method)

    def transform(example: Example, rng: np.random.Generator) -> Example:
        del rng
        height, width = example["image"].shape[:2]
        scale = size / max(height, width)
        return _resized(example, max(1, round(height * scale)), max(1, round(width * scale)), method)

    return transform


def random_scale(low: float, high: float, method: str = "bilinear") -> ExampleTransform:
    """Both sides times one factor, uniform in ``low ... high`` (0.5 to 2 in many segmentation recipes)."""
    if not 0 < low <= high:
        raise ConfigError(f"random_scale got ({low}, {high}); use 0 < low <= high")
    resampling(method)

    def transform(example: Example, rng: np.random.Generator) -> Example:
        height, width = example["image"].shape[:2]
        scale = rng.uniform(low, high)
        return _resized(example, max(1, round(height * scale)), max(1, round(width * scale)), method)

    return transform


def pad_to(size: int) -> ExampleTransform:
    """Sides below ``size`` are padded to it: half before (rounded down), the rest behind.

    Source: albumentations ``PadIfNeeded`` with a constant border.
    """
    _check_sizes(size=size)

    def pad(array: np.ndarray, fill: int) -> np.ndarray:
        missing = [max(0, size - side) for side in array.shape[:2]]
        widths = [(each // 2, each - each // 2) for each in missing] + [(0, 0)] * (array.ndim - 2)
        return np.pad(array, widths, constant_values=fill) if any(missing) else array

    def transform(example: Example, rng: np.random.Generator) -> Example:
        del rng
        return _move(example, pad)

    return transform


def random_crop(size: int) -> ExampleTransform:
    """A ``size`` x ``size`` part at a uniform place; ConfigError if the image is smaller (see :func:`pad_to`)."""
    _check_sizes(size=size)

    def transform(example: Example, rng: np.random.Generator) -> Example:
        room = _room(example, size)
        top, left = (int(rng.integers(0, each + 1)) for each in room)
        return _cut(example, top, left, size)

    return transform


def center_crop(size: int) -> ExampleTransform:
    """The central ``size`` x ``size`` part, offsets rounded down; ConfigError if the image is smaller."""
    _check_sizes(size=size)

    def transform(example: Example, rng: np.random.Generator) -> Example:
        del rng
        top, left = (each // 2 for each in _room(example, size))
        return _cut(example, top, left, size)

    return transform


def random_brightness_contrast(limit: float = 0.3, p: float = 0.5) -> ExampleTransform:
    """With probability ``p``: ``clip(a x + 255 b)``, a uniform in 1 - limit ... 1 + limit, b in -limit ... limit.

    Source: albumentations ``RandomBrightnessContrast(limit, limit)``.
    """
    if limit < 0 or not 0 <= p <= 1:
        raise ConfigError(f"random_brightness_contrast got limit={limit}, p={p}; use 0 <= limit and 0 <= p <= 1")

    def transform(example: Example, rng: np.random.Generator) -> Example:
        if rng.uniform() >= p:
            return example
        slope, shift = 1 + rng.uniform(-limit, limit), 255 * rng.uniform(-limit, limit)
        table = np.rint(np.clip(np.arange(256) * slope + shift, 0, 255)).astype(np.uint8)
        return {**example, "image": table[example["image"]]}

    return transform


def random_hsv(hue: float = 1 / 9, saturation: float = 30, value: float = 20, p: float = 0.5) -> ExampleTransform:
    """With probability ``p``: hue turned by a part of the circle, saturation and value of 0 ... 255 moved, all uniform.

    Source: albumentations ``HueSaturationValue``, whose default hue is 20 of OpenCV's 180.
    """
    if min(hue, saturation, value) < 0 or not 0 <= p <= 1:
        raise ConfigError(f"random_hsv got {hue}, {saturation}, {value}, p={p}; use 0 or more, and 0 <= p <= 1")

    def transform(example: Example, rng: np.random.Generator) -> Example:
        if rng.uniform() >= p:
            return example
        shifts = [rng.uniform(-limit, limit) for limit in (hue, saturation, value)]
        return {**example, "image": from_pillow(shift_hsv(to_pillow(example["image"]), *shifts))}

    return transform


def voc_train(
    size: int = 512,
    longest: int = 640,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    *,
    flip: bool = True,
    jitter: float = 0.3,
) -> ExampleTransform:
    """Longer side to ``longest``, padded to ``size``, random crop, mirror, colours (if ``jitter``), normalised.

    Source: ``data_transformer`` in ``calibrate/data/voc.py`` of MbLS, which RankMixup and ACLS build on.
    """
    steps = [resize_longest(longest), pad_to(size), random_crop(size)]
    steps += [random_horizontal_flip()] if flip else []
    steps += [random_brightness_contrast(jitter), random_hsv()] if jitter else []
    return compose(*steps, normalize(mean, std))


def voc_eval(
    size: int = 480, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> ExampleTransform:
    """Longer side to ``size``, padded to a square, normalised. Source as :func:`voc_train`."""
    return compose(resize_longest(size), pad_to(size), normalize(mean, std))


def square_train(
    size: int = 224,
    whole: int = 256,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    *,
    flip: bool = True,
    method: str = "bilinear",
) -> ExampleTransform:
    """The whole image to ``whole`` x ``whole``, random crop of ``size``, mirror, normalised.

    Source: ``data_transformer`` in ``calibrate/data/cub.py`` of MbLS (CUB-200-2011).
    """
    steps = [resize(whole, whole, method), random_crop(size), *([random_horizontal_flip()] if flip else [])]
    return compose(*steps, normalize(mean, std))


def square_eval(
    size: int = 224,
    whole: int = 256,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    method: str = "bilinear",
) -> ExampleTransform:
    """The whole image to ``whole`` x ``whole``, central crop of ``size``, normalised.

    Source as :func:`square_train`.
    """
    return compose(resize(whole, whole, method), center_crop(size), normalize(mean, std))


def _resized(example: Example, height: int, width: int, method: str) -> Example:
    if example["image"].shape[:2] == (height, width):
        return example
    out = {**example, "image": from_pillow(to_pillow(example["image"]).resize((width, height), resampling(method)))}
    if "label_map" in example:
        labels = Image.fromarray(example["label_map"])
        out["label_map"] = np.asarray(labels.resize((width, height), Image.Resampling.NEAREST))
    return out


def _move(example: Example, move: Callable[[np.ndarray, int], np.ndarray]) -> Example:
    out = {**example, "image": move(example["image"], 0)}
    if "label_map" in example:
        out["label_map"] = move(example["label_map"], IGNORE)
    return out


def _cut(example: Example, top: int, left: int, size: int) -> Example:
    return _move(example, lambda array, _: array[top : top + size, left : left + size])


def _room(example: Example, size: int) -> tuple[int, int]:
    height, width = example["image"].shape[:2]
    if min(height, width) < size:
        raise ConfigError(
            f"a crop of {size} x {size} doesn't fit into an image of {width} x {height}; put pad_to before it"
        )
    return height - size, width - size


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or size < 1:
            raise ConfigError(f"{name}={size!r} is no number of pixels; use an integer of at least 1")
