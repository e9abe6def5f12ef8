"""Example-level random transforms on Pillow, ``(example, generator) -> example``; they run on the reading threads.

``image`` is uint8 ``[H, W, 3]`` RGB going in and coming out. Put :func:`jaxvision.data.transforms.normalize` behind
them at batch level, or :func:`normalize` of this module last.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from jaxvision.core.errors import ConfigError
from jaxvision.data.transforms import check_statistics, normalize_image

Example = dict[str, Any]
ExampleTransform = Callable[[Example, np.random.Generator], Example]

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resampling(method: str) -> Image.Resampling:
    """Pillow's filter for ``"bilinear"`` or ``"bicubic"``."""
    if method not in _RESAMPLING:
        raise ConfigError(f"resampling method '{method}' is unknown; use one of {', '.join(_RESAMPLING)}")
    return _RESAMPLING[method]


def to_pillow(image: np.ndarray) -> Image.Image:
    """uint8 ``[H, W, 3]`` or ``[H, W, 1]`` as a Pillow image of mode RGB or L."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def from_pillow(picture: Image.Image) -> np.ndarray:
    """A Pillow image of mode RGB or L as uint8 ``[H, W, C]``."""
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, resized to ``size`` x ``size``.

    Ten tries: area ``A = H W U(scale)``, ratio ``r = exp U(log ratio)``, width ``round sqrt(A r)``, height
    ``round sqrt(A / r)``; the first that fits lands at a uniform place. Otherwise the largest centred part of an
    allowed ratio. A ``label_map`` ``[H, W]`` is cut likewise and resized by nearest.

    Source: torchvision ``RandomResizedCrop`` (``get_params``).
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    method: str = "bicubic"

    def __post_init__(self):
        resampling(self.method)
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigError(f"RandomResizedCrop {name}=({low}, {high}) is not 0 < low <= high; use such bounds")

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the part to cut."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            target = height * width * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
        w, h = width, height
        if width / height < min(self.ratio):
            h = round(w / min(self.ratio))
        elif width / height > max(self.ratio):
            w = round(h * max(self.ratio))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        top, left, h, w = self.box(*example["image"].shape[:2], rng)
        size, corners = (self.size, self.size), (left, top, left + w, top + h)
        picture = to_pillow(example["image"]).crop(corners).resize(size, resampling(self.method))
        out = {**example, "image": from_pillow(picture)}
        if "label_map" in example:
            map_picture = Image.fromarray(example["label_map"]).crop(corners)
            out["label_map"] = np.asarray(map_picture.resize(size, Image.Resampling.NEAREST))
        return out


def random_horizontal_flip(p: float = 0.5) -> ExampleTransform:
    """Mirrors the image (and ``label_map``) with probability ``p``."""
    if not 0 <= p <= 1:
        raise ConfigError(f"p={p} is not a probability; use a number from 0 to 1")

    def transform(example: Example, rng: np.random.Generator) -> Example:
        if rng.uniform() >= p:
            return example
        return {name: value[:, ::-1] if name in ("image", "label_map") else value for name, value in example.items()}

    return transform


def normalize(mean: Sequence[float], std: Sequence[float]) -> ExampleTransform:
    """``(x / 255 - mean) / std`` per channel, float32; see :func:`jaxvision.data.transforms.normalize_image`."""
    mean, std = check_statistics(mean, std)

    def transform(example: Example, rng: np.random.Generator) -> Example:
        del rng
        return {**example, "image": normalize_image(example["image"], mean, std)}

    return transform


def color_jitter(
    brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0
) -> ExampleTransform:
    """Changes brightness, contrast, saturation and hue by random factors in random order.

    The first three factors are ``U(max(0, 1 - x), 1 + x)``; the hue turns by ``U(-hue, hue)`` of the circle.

    Source: torchvision ``ColorJitter``.
    """
    strengths = (brightness, contrast, saturation)
    if min(strengths) < 0 or not 0 <= hue <= 0.5:
        raise ConfigError(
            f"color_jitter got brightness, contrast, saturation = {strengths} and hue={hue}; "
            "the first three must be 0 or more, hue from 0 to 0.5"
        )
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)

    def transform(example: Example, rng: np.random.Generator) -> Example:
        picture = to_pillow(example["image"])
        order = rng.permutation(4)
        factors = [rng.uniform(max(0.0, 1 - x), 1 + x) for x in strengths]
        turn = rng.uniform(-hue, hue)
        for kind in order.tolist():
            if kind == 3 and hue:
                picture = shift_hsv(picture, turn)
            elif kind < 3 and strengths[kind]:
                picture = enhancers[kind](picture).enhance(factors[kind])
        return {**example, "image": from_pillow(picture)}

    return transform


def shift_hsv(picture: Image.Image, turn: float, saturation: float = 0, value: float = 0) -> Image.Image:
    """The hue turned by a part of the circle, saturation and value (0 ... 255) moved and clipped."""
    hue, *others = (np.asarray(band).astype(np.int16) for band in picture.convert("HSV").split())
    bands = [(hue + int(turn * 255)) % 256]
    bands += [np.clip(band + round(shift), 0, 255) for band, shift in zip(others, (saturation, value))]
    return Image.merge("HSV", [Image.fromarray(band.astype(np.uint8)) for band in bands]).convert("RGB")
