"""Batch-level transforms, vectorised: ``(batch, draws) -> batch`` on ``image`` ``[B, H, W, C]``.

Geometric transforms move ``label_map`` ``[B, H, W]`` (segmentation) along where the batch has one; what comes in from
outside the image gets the label 255, "ignore". Crop in pixel space, before :func:`normalize`: PyTorch pads with black.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxvision.core.errors import ConfigError
from jaxvision.data.draws import Draws
from jaxvision.data.resize import METHODS, resize_images

Batch = dict[str, np.ndarray]
Transform = Callable[[Batch, Draws], Batch]

IGNORE = 255


def compose(*transforms: Callable[[dict, Any], dict]) -> Callable[[dict, Any], dict]:
    """The transforms one after the other; all batch-level or all example-level."""

    def apply(value: dict, randomness: Any) -> dict:
        for transform in transforms:
            value = transform(value, randomness)
        return value

    return apply


def random_crop_with_padding(padding: int = 4, mode: str = "zero") -> Transform:
    """Pads every side by ``padding`` and cuts the original size at a uniform offset in ``0 .. 2 * padding``.

    PyTorch's ``RandomCrop(size, padding=padding)``.

    Args:
      padding: pixels, at least 1.
      mode: ``"zero"`` or ``"reflect"`` (without repeating the edge).
    """
    if padding < 1:
        raise ConfigError(f"padding={padding} is not positive; use at least 1 or leave the crop out")
    _check_choice("mode", mode, ("zero", "reflect"))

    def cut(array: np.ndarray, tops: np.ndarray, lefts: np.ndarray, fill: int) -> np.ndarray:
        height, width = array.shape[1:3]
        pad = [(0, 0), (padding, padding), (padding, padding)] + [(0, 0)] * (array.ndim - 3)
        padded = np.pad(array, pad, mode="reflect") if mode == "reflect" else np.pad(array, pad, constant_values=fill)
        out = np.empty_like(array)
        for row, (top, left) in enumerate(zip(tops.tolist(), lefts.tolist())):  # block copies: faster than a gather
            out[row] = padded[row, top : top + height, left : left + width]
        return out

    def transform(batch: Batch, draws: Draws) -> Batch:
        tops, lefts = draws.integers(0, 2 * padding + 1), draws.integers(0, 2 * padding + 1)
        return _geometric(batch, lambda array, fill: cut(array, tops, lefts, fill))

    return transform


def random_horizontal_flip(p: float = 0.5) -> Transform:
    """Mirrors the width axis of each image with probability ``p``."""
    _check_probability(p)

    def transform(batch: Batch, draws: Draws) -> Batch:
        flip = draws.uniform() < p

        def mirror(array: np.ndarray, _: int) -> np.ndarray:
            out = array.copy()
            out[flip] = array[flip, :, ::-1]
            return out

        return _geometric(batch, mirror)

    return transform


def normalize(mean: Sequence[float], std: Sequence[float]) -> Transform:
    """``(x / 255 - mean) / std`` per channel, float32; see :func:`normalize_image`."""
    mean, std = check_statistics(mean, std)

    def transform(batch: Batch, draws: Draws) -> Batch:
        del draws
        return {**batch, "image": normalize_image(batch["image"], mean, std)}

    return transform


def normalize_image(image: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """``(x / 255 - mean) / std`` in float32, operation by operation as torchvision's ``ToTensor`` and ``Normalize``.

    Args:
      image: ``[..., W, C]``, uint8 in 0..255, or float32, which is taken to be in 0..1 already and not divided.
      mean, std: float32 ``[C]``.

    Raises:
      ConfigError: if ``C`` differs from the number of means.
    """
    if image.shape[-1] != len(mean):
        raise ConfigError(f"normalize has {len(mean)} means for {image.shape[-1]} channels; give one for each")
    out = image.astype(np.float32, order="C")
    rows = out.reshape(*image.shape[:-2], -1)  # a view; whole rows of pixels make NumPy's inner loop long
    if image.dtype == np.uint8:
        rows /= np.float32(255)
    rows -= np.tile(mean, image.shape[-2])
    rows /= np.tile(std, image.shape[-2])
    return out


def check_statistics(mean: Sequence[float], std: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation as float32 arrays; ConfigError for unequal lengths or a std that isn't positive."""
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if mean.ndim != 1 or mean.shape != std.shape or not (std > 0).all():
        raise ConfigError(f"mean={mean.tolist()} and std={std.tolist()} must be of one length, and std above 0")
    return mean, std


def random_erasing(
    p: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
    mode: str = "pixel",
) -> Transform:
    """Overwrites one random rectangle of each image with probability ``p``; after :func:`normalize`.

    Ten tries: area ``A = H W U(area)``, ratio ``r = exp U(log ratio)``, height ``round sqrt(A r)``, width
    ``round sqrt(A / r)``; the first that is smaller than the image lands at a uniform place.

    Args:
      p: probability per image.
      area: bounds of the rectangle's share of the image.
      ratio: bounds of its height over its width.
      mode: ``"pixel"``: a standard normal number per pixel and channel; ``"zero"``: zeros.

    Source: timm ``data/random_erasing.py`` (modes ``pixel`` and ``const``, count 1).
    """
    _check_probability(p)
    _check_choice("mode", mode, ("pixel", "zero"))

    def erase(image: np.ndarray, generator: np.random.Generator) -> None:
        height, width, channels = image.shape
        for _ in range(10):
            target = generator.uniform(*area) * height * width
            aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
            h, w = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
            if h < height and w < width:
                top, left = generator.integers(0, height - h + 1), generator.integers(0, width - w + 1)
                fill = generator.standard_normal((h, w, channels), np.float32) if mode == "pixel" else 0
                image[top : top + h, left : left + w] = fill
                return

    def transform(batch: Batch, draws: Draws) -> Batch:
        image = batch["image"]
        if mode == "pixel" and image.dtype == np.uint8:
            raise ConfigError("random_erasing with mode='pixel' got uint8 images; put it after normalize")
        image = image.copy()
        chosen = draws.uniform() < p
        for row, generator in enumerate(draws.row_generators(chosen)):
            if generator is not None:
                erase(image[row], generator)
        return {**batch, "image": image}

    return transform


def cutout(length: int) -> Transform:
    """Zeroes one square of side ``length`` (even) around a uniform pixel, cut at the border.

    After :func:`normalize` zero is the mean. Source: DeVries & Taylor 2017, official code ``util/cutout.py``.
    """
    if length < 2 or length % 2:
        raise ConfigError(f"cutout length={length} is not an even number of at least 2; use one")

    def transform(batch: Batch, draws: Draws) -> Batch:
        image = batch["image"]
        height, width = image.shape[1:3]
        y, x = draws.integers(0, height), draws.integers(0, width)
        in_rows = _near(np.arange(height), y, length // 2)
        in_columns = _near(np.arange(width), x, length // 2)
        hole = in_rows[:, :, None] & in_columns[:, None, :]
        return {**batch, "image": np.where(hole[..., None], np.zeros((), image.dtype), image)}

    return transform


def _near(positions: np.ndarray, centre: np.ndarray, half: int) -> np.ndarray:
    """bool ``[B, n]``: ``centre - half <= position < centre + half``."""
    offset = positions[None] - centre[:, None]
    return (offset >= -half) & (offset < half)


def resize(size: int | tuple[int, int], method: str = "bilinear", antialias: bool = True) -> Transform:
    """Resizes to ``size`` (height, width), see :mod:`jaxvision.data.resize`; ``label_map`` by nearest."""
    size = (size, size) if isinstance(size, int) else tuple(size)
    _check_choice("method", method, METHODS)

    def transform(batch: Batch, draws: Draws) -> Batch:
        del draws
        out = {**batch, "image": resize_images(batch["image"], size, method, antialias)}
        if "label_map" in batch:
            out["label_map"] = resize_images(batch["label_map"][..., None], size, "nearest")[..., 0]
        return out

    return transform


def _geometric(batch: Batch, move: Callable[[np.ndarray, int], np.ndarray]) -> Batch:
    """Applies ``move(array, fill)`` to the image and, where there is one, to the label map."""
    out = {**batch, "image": move(batch["image"], 0)}
    if "label_map" in batch:
        out["label_map"] = move(batch["label_map"], IGNORE)
    return out


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ConfigError(f"p={p} is not a probability; use a number from 0 to 1")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}='{value}' is unknown; use one of {', '.join(choices)}")
