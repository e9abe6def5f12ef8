"""Procedural images: one coloured, textured shape on a noisy background, with its class and its label map."""

import math

import numpy as np

from jaxvision.core import rng
from jaxvision.core.errors import ConfigError
from jaxvision.data.drawn import DrawnSource
from jaxvision.data.sources import Example


def _circle(u, v):
    return u**2 + v**2 < 1


def _square(u, v):
    return np.maximum(abs(u), abs(v)) < 0.8


def _triangle(u, v):
    return (v > -0.5) & (v + math.sqrt(3) * abs(u) < 1)


def _ring(u, v):
    return abs(np.hypot(u, v) - 0.75) < 0.25


def _cross(u, v):
    return (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 0.95)


def _star(u, v):
    return np.hypot(u, v) < 0.62 + 0.38 * np.cos(5 * np.arctan2(u, v))


def _crescent(u, v):
    return (u**2 + v**2 < 1) & ((u - 0.5) ** 2 + v**2 > 0.64)


def _bar(u, v):
    return (abs(u) < 0.95) & (abs(v) < 0.25)


# ``(u, v) -> bool`` in coordinates in which the shape fits the unit circle.
SHAPES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
    "cross": _cross,
    "star": _star,
    "crescent": _crescent,
    "bar": _bar,
}
CLASS_NAMES = tuple(SHAPES)


class ShapesSource(DrawnSource):
    """Lazily drawn images; example ``i`` is a function of (seed, stream, i). See :func:`shapes`."""

    def __init__(self, num_examples: int, size: int, seed: int, stream: str, num_classes: int, label_map: bool):
        super().__init__(num_examples, self._example, CLASS_NAMES[:num_classes])
        self._size, self._seed, self._stream, self._with_map = size, seed, stream, label_map

    @property
    def labels(self) -> np.ndarray:
        """int32 ``[N]``."""
        return np.arange(len(self), dtype=np.int32) % self.num_classes

    def _example(self, index: int) -> Example:
        generator = rng.generator(self._seed, self._stream, index)
        label = index % self.num_classes  # balanced; training shuffles anyway
        image, inside = _render(generator, SHAPES[self.class_names[label]], self._size)
        example = {"image": image, "label": np.int32(label)}
        if self._with_map:
            example["label_map"] = inside.astype(np.uint8) * np.uint8(label + 1)
        return example


def _render(generator: np.random.Generator, shape, size: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 ``[size, size, 3]`` and bool ``[size, size]`` (the shape's pixels)."""
    radius = generator.uniform(0.22, 0.4)
    x0, y0 = generator.uniform(radius, 1 - radius, 2)
    angle, stripe_angle, slope_angle = generator.uniform(0, 2 * math.pi, 3)
    background = generator.uniform(0, 1, 3)
    # A step of 0.35 to 0.65 around the circle [0, 1) is a difference of at least 0.35 in every channel.
    colour = (background + generator.uniform(0.35, 0.65, 3)) % 1
    frequency, stripes, slope = generator.uniform((3, 0.05, 0), (8, 0.15, 0.2))
    noise = generator.normal(0, 0.06, (size, size, 3))

    grid = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(grid - x0, grid - y0)
    u = (x * math.cos(angle) + y * math.sin(angle)) / radius
    v = (y * math.cos(angle) - x * math.sin(angle)) / radius
    inside = shape(u, v)
    texture = stripes * np.sin(frequency * (u * math.cos(stripe_angle) + v * math.sin(stripe_angle)))
    gradient = slope * (x * math.cos(slope_angle) + y * math.sin(slope_angle))
    image = np.where(inside[..., None], colour + texture[..., None], background + gradient[..., None]) + noise
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), inside


def shapes(
    n: int, size: int = 32, seed: int = 0, *, split: str = "train", num_classes: int = 8, label_map: bool = False
) -> ShapesSource:
    """``n`` procedural images of one shape each; class ``i % num_classes``.

    Position, scale, rotation, colours, stripes, background gradient and pixel noise vary.

    Args:
      n: number of images.
      size: side in pixels, at least 8.
      seed: with ``split``, names the set; splits don't share images.
      split: any name, such as ``"train"`` or ``"test"``.
      num_classes: the first so many of :data:`CLASS_NAMES`, 2 to 8.
      label_map: adds ``label_map`` uint8 ``[size, size]``: 0 background, class + 1 on the shape. (Not ``mask``: that
        name is the padding mask of evaluation batches.)

    Returns:
      A source of ``image`` uint8 ``[size, size, 3]`` and ``label`` int32.
    """
    if n < 1 or size < 8 or seed < 0 or not 2 <= num_classes <= len(CLASS_NAMES):
        raise ConfigError(
            f"shapes got n={n}, size={size}, seed={seed}, num_classes={num_classes}; "
            f"they must be at least 1, at least 8, at least 0, and 2 to {len(CLASS_NAMES)}"
        )
    return ShapesSource(n, size, seed, f"shapes/{split}", num_classes, label_map)
