"""ImageNet preprocessing at example level, to the pixel what timm and torchvision do with Pillow."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from jaxvision.core.errors import ConfigError
from jaxvision.data.augment import (
    Example,
    ExampleTransform,
    RandomResizedCrop,
    color_jitter,
    from_pillow,
    normalize,
    random_horizontal_flip,
    resampling,
    to_pillow,
)
from jaxvision.data.rand_augment import RandAugment
from jaxvision.data.transforms import check_statistics, compose, normalize_image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def resize_shorter_side(picture: Image.Image, size: int, method: str = "bicubic") -> Image.Image:
    """The image with its shorter side at ``size``, the longer at ``int(size * longer / shorter)``, antialiased.

    Source: torchvision ``Resize(size)`` on Pillow images.
    """
    width, height = picture.size
    if width <= height:
        new = (size, int(size * height / width))
    else:
        new = (int(size * width / height), size)
    return picture if new == picture.size else picture.resize(new, resampling(method))


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """The central ``size`` x ``size``; the offset is ``round((side - size) / 2)``, halves to even (torchvision)."""
    width, height = picture.size
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    return picture.crop((left, top, left + size, top + size))


def imagenet_eval(
    size: int = 224,
    crop_fraction: float = 0.875,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    method: str = "bicubic",
) -> ExampleTransform:
    """Shorter side to ``floor(size / crop_fraction)``, central ``size`` x ``size``, ``(x / 255 - mean) / std``.

    Args:
      size: output side.
      crop_fraction: in (0, 1]; 0.875 for DeiT, 0.9 for ViT and Swin.
      mean, std: per channel, of pixels in 0..1.
      method: ``"bicubic"`` or ``"bilinear"``, antialiased by Pillow.

    Returns:
      A transform of ``image`` uint8 ``[H, W, 3]`` to float32 ``[size, size, 3]``.

    Source: timm ``transforms_imagenet_eval``.
    """
    if not 0 < crop_fraction <= 1 or size < 1:
        raise ConfigError(
            f"imagenet_eval got size={size}, crop_fraction={crop_fraction}; size must be positive, fraction in (0, 1]"
        )
    resampling(method)
    mean, std = check_statistics(mean, std)
    shorter = math.floor(size / crop_fraction)

    def transform(example: Example, rng: np.random.Generator) -> Example:
        del rng
        picture = center_crop(resize_shorter_side(to_pillow(example["image"]), shorter, method), size)
        return {**example, "image": normalize_image(from_pillow(picture), mean, std)}

    return transform


def imagenet_train(
    size: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    jitter: float = 0.0,
    rand_augment: RandAugment | None = None,
    method: str = "bicubic",
) -> ExampleTransform:
    """Random resized crop, flip, then RandAugment or else colour jitter of strength ``jitter``, then normalise.

    Random erasing follows at batch level (:func:`jaxvision.data.transforms.random_erasing`).

    Source: timm ``transforms_imagenet_train``; DeiT passes ``rand_augment=RandAugment()``.
    """
    if rand_augment is not None and jitter:
        raise ConfigError(f"imagenet_train got jitter={jitter} and a rand_augment; the recipes use one: drop the other")
    steps = [RandomResizedCrop(size, scale, ratio, method), random_horizontal_flip()]
    if rand_augment is not None:
        steps.append(rand_augment)
    elif jitter:
        steps.append(color_jitter(jitter, jitter, jitter))
    return compose(*steps, normalize(mean, std))
