"""Procedural scenes for segmentation: several overlapping shapes on a background, with their label map.

Classes are shape and hue together. There are three hues, so from the fourth object class on each shares its hue with an
earlier one and is told from it by its shape alone: what makes class-incremental segmentation forget.
"""

import math

import numpy as np

from jaxvision.core import rng
from jaxvision.core.errors import ConfigError
from jaxvision.data.drawn import DrawnSource
from jaxvision.data.procedural import SHAPES
from jaxvision.data.sources import Example
from jaxvision.data.transforms import IGNORE

# The object classes 1, 2, ... in order; class c has hue (c - 1) % 3.
_ORDER = ("circle", "square", "triangle", "ring", "cross", "bar", "star", "crescent")
_HUES = ("red", "green", "blue")
CLASS_NAMES = ("background", *(f"{_HUES[i % 3]} {shape}" for i, shape in enumerate(_ORDER)))
_RADIUS = (9 / 64, 15 / 64)
_NOISE = 0.04


def scenes(
    n: int,
    size: int = 64,
    seed: int = 0,
    *,
    split: str = "train",
    num_classes: int = 7,
    objects: tuple[int, int] = (1, 3),
    border: int = 1,
) -> DrawnSource:
    """``n`` images of a few objects each, the later ones in front; example i is a function of (seed, split, i).

    Grey background in .3 ... .7 with a weak linear gradient in colour; for each object a random class, position,
    rotation, radius 9/64 ... 15/64 of the side, and colour: its hue's channel .75 ... 1, the others .15 ... .3;
    Gaussian noise of .04 on every pixel.

    Args:
      n: number of images, at least 1.
      size: side in pixels, at least 16.
      seed: with ``split``, names the set; splits don't share images.
      split: any name, such as ``"train"`` or ``"test"``.
      num_classes: K with the background, the first so many of :data:`CLASS_NAMES`; 2 to 9.
      objects: the smallest and the largest number of objects, uniform.
      border: pixels around each object that have the label 255, "ignore", as in VOC; 0 leaves none.

    Returns:
      A source in memory of ``image`` uint8 ``[size, size, 3]`` and ``label_map`` uint8 ``[size, size]``: 0 background,
      1 ... K - 1 objects, 255 borders.

    Raises:
      ConfigError: an argument outside of its range.
    """
    low, high = objects
    if n < 1 or size < 16 or seed < 0 or not 2 <= num_classes <= len(CLASS_NAMES):
        raise ConfigError(
            f"scenes got n={n}, size={size}, seed={seed}, num_classes={num_classes}; "
            f"they must be at least 1, at least 16, at least 0, and 2 to {len(CLASS_NAMES)}"
        )
    if not 1 <= low <= high or border < 0:
        raise ConfigError(f"scenes got objects={tuple(objects)}, border={border}; use 1 <= low <= high and 0 <= border")

    def draw(index: int) -> Example:
        generator = rng.generator(seed, f"scenes/{split}", index)
        return _scene(generator, size, num_classes, (low, high), border)

    return DrawnSource(n, draw, CLASS_NAMES[:num_classes])


def _scene(
    generator: np.random.Generator, size: int, num_classes: int, objects: tuple[int, int], border: int
) -> Example:
    grid = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(grid, grid)
    slope = generator.uniform(-0.1, 0.1, (2, 3))
    image = generator.uniform(0.3, 0.7) + (x - 0.5)[..., None] * slope[0] + (y - 0.5)[..., None] * slope[1]
    label_map = np.zeros((size, size), np.uint8)
    for _ in range(generator.integers(objects[0], objects[1] + 1)):
        label = int(generator.integers(1, num_classes))
        radius, angle = generator.uniform(*_RADIUS), generator.uniform(0, 2 * math.pi)
        x0, y0 = generator.uniform(radius, 1 - radius, 2)
        u = ((x - x0) * math.cos(angle) + (y - y0) * math.sin(angle)) / radius
        v = ((y - y0) * math.cos(angle) - (x - x0) * math.sin(angle)) / radius
        colour = generator.uniform(0.15, 0.3, 3)
        colour[(label - 1) % 3] = generator.uniform(0.75, 1)
        inside = SHAPES[_ORDER[label - 1]](u, v)
        image[inside] = colour
        label_map[_grown(inside, border)] = IGNORE
        label_map[inside] = label
    image += generator.normal(0, _NOISE, image.shape)
    return {"image": np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), "label_map": label_map}


def _grown(inside: np.ndarray, pixels: int) -> np.ndarray:
    """bool ``[H, W]``: what is inside or at most so many steps up, down, left or right of it."""
    for _ in range(pixels):
        out = inside.copy()
        out[1:] |= inside[:-1]
        out[:-1] |= inside[1:]
        out[:, 1:] |= inside[:, :-1]
        out[:, :-1] |= inside[:, 1:]
        inside = out
    return inside
