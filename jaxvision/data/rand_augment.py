"""RandAugment as DeiT uses it: timm's ``rand-m9-mstd0.5-inc1`` on Pillow images."""

import dataclasses
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from jaxvision.core.errors import ConfigError
from jaxvision.data.augment import Example, from_pillow, resampling, to_pillow

MAX_LEVEL = 10.0


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """``num_ops`` operations drawn with replacement from :data:`OPERATIONS`, each applied with probability ``p``.

    The level of an applied operation is ``N(magnitude, magnitude_std)`` cut to ``0 .. 10``; every operation grows
    stronger with it ("inc1"), and those with a direction take either with equal probability.

    Args:
      num_ops: operations per image.
      magnitude: mean level.
      magnitude_std: its standard deviation.
      p: probability that a drawn operation is applied.
      fill: RGB of what comes in from outside; by default the ImageNet mean in pixels, as timm sets it.
      method: resampling of rotations, shears and shifts; DeiT trains with bicubic.

    Source: Cubuk et al. 2020 (arXiv 1909.13719); timm ``data/auto_augment.py``, the increasing set.
    """

    num_ops: int = 2
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    p: float = 0.5
    fill: tuple[int, int, int] = (124, 116, 104)
    method: str = "bicubic"

    def __post_init__(self):
        resampling(self.method)
        if not 0 <= self.magnitude <= MAX_LEVEL:
            raise ConfigError(f"RandAugment magnitude={self.magnitude} is outside 0..10; use a level from 0 to 10")
        if self.num_ops < 1 or self.magnitude_std < 0 or not 0 <= self.p <= 1:
            raise ConfigError(
                f"RandAugment got num_ops={self.num_ops}, magnitude_std={self.magnitude_std}, p={self.p}; "
                "they must be at least 1, at least 0, and from 0 to 1"
            )

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        picture = to_pillow(example["image"])
        for name in rng.choice(list(OPERATIONS), self.num_ops).tolist():
            if rng.uniform() >= self.p:
                continue
            level = min(max(rng.normal(self.magnitude, self.magnitude_std), 0.0), MAX_LEVEL)
            picture = self.operate(picture, name, level, 1 if rng.uniform() < 0.5 else -1)
        return {**example, "image": from_pillow(picture)}

    def operate(self, picture: Image.Image, name: str, level: float, sign: int) -> Image.Image:
        """One operation at a level of ``0 .. 10``; ``sign`` (1 or -1) is the direction, for those that have one."""
        warp = _Warp(resampling(self.method), self.fill)
        return OPERATIONS[name](picture, level / MAX_LEVEL, sign, warp)


@dataclasses.dataclass(frozen=True)
class _Warp:
    resample: Image.Resampling
    fill: tuple[int, int, int]

    def affine(self, picture: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
        return picture.transform(
            picture.size, Image.Transform.AFFINE, matrix, resample=self.resample, fillcolor=self.fill
        )

    def rotate(self, picture: Image.Image, degrees: float) -> Image.Image:
        return picture.rotate(degrees, resample=self.resample, fillcolor=self.fill)


def _enhance(kind: Callable) -> Callable:
    def operation(picture: Image.Image, strength: float, sign: int, warp: _Warp) -> Image.Image:
        del warp
        return kind(picture).enhance(max(0.1, 1.0 + sign * 0.9 * strength))

    return operation


def _posterize(picture: Image.Image, strength: float) -> Image.Image:
    # Keeps 4 down to 0 bits, and 0 bits is black: ImageOps.posterize of Pillow 13 refuses 0.
    mask = 256 - 2 ** (4 + int(4 * strength))
    return picture.point([value & mask for value in range(256)] * len(picture.getbands()))


def _solarize_add(picture: Image.Image, strength: float) -> Image.Image:
    add = int(110 * strength)
    table = [min(255, value + add) if value < 128 else value for value in range(256)]
    return picture.point(table * len(picture.getbands()))


# Each is (picture, strength in 0..1, sign, warp) -> picture; the order is timm's.
OPERATIONS: dict[str, Callable[[Image.Image, float, int, _Warp], Image.Image]] = {
    "AutoContrast": lambda picture, strength, sign, warp: ImageOps.autocontrast(picture),
    "Equalize": lambda picture, strength, sign, warp: ImageOps.equalize(picture),
    "Invert": lambda picture, strength, sign, warp: ImageOps.invert(picture),
    "Rotate": lambda picture, strength, sign, warp: warp.rotate(picture, sign * 30 * strength),
    "Posterize": lambda picture, strength, sign, warp: _posterize(picture, strength),
    "Solarize": lambda picture, strength, sign, warp: ImageOps.solarize(picture, 256 - int(256 * strength)),
    "SolarizeAdd": lambda picture, strength, sign, warp: _solarize_add(picture, strength),
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": lambda picture, strength, sign, warp: warp.affine(picture, (1, sign * 0.3 * strength, 0, 0, 1, 0)),
    "ShearY": lambda picture, strength, sign, warp: warp.affine(picture, (1, 0, 0, sign * 0.3 * strength, 1, 0)),
    "TranslateX": lambda picture, strength, sign, warp: warp.affine(
        picture, (1, 0, sign * 0.45 * strength * picture.width, 0, 1, 0)
    ),
    "TranslateY": lambda picture, strength, sign, warp: warp.affine(
        picture, (1, 0, 0, 0, 1, sign * 0.45 * strength * picture.height)
    ),
}
