"""The transforms of a ``data`` block, by the name of its pipeline."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.data import Source, transforms
from jaxvision.data.dense import square_eval, square_train, voc_eval, voc_train
from jaxvision.data.imagenet import imagenet_eval, imagenet_train
from jaxvision.data.rand_augment import RandAugment
from jaxvision.models import zoo

PIPELINES = ("array", "imagenet", "square", "voc")


@dataclass(frozen=True)
class Augment:
    """The block ``data.augment``; 0 or False switches a part off.

    Attributes:
      crop_padding: pixels of padding of a random crop of the original size ("array").
      flip: mirror with probability 1/2 (all but "imagenet", which always does).
      scale: bounds of the area of a random resized crop ("imagenet").
      jitter: strength of the colour jitter ("imagenet", "voc").
      rand_augment: magnitude of RandAugment ("array", "imagenet"); needs uint8 RGB images and no label maps.
      erasing: probability of random erasing with noise (all but "voc").
    """

    crop_padding: int
    flip: bool
    scale: tuple[float, float]
    jitter: float
    rand_augment: float
    erasing: float

    @classmethod
    def read(cls, config: Config) -> "Augment":
        """The block, checked."""
        return cls(
            crop_padding=config.positive("crop_padding", zero=True),
            flip=config.one_of("flip", (True, False)),
            scale=tuple(config.scale),
            jitter=config.positive("jitter", zero=True),
            rand_augment=config.positive("rand_augment", zero=True),
            erasing=config.positive("erasing", zero=True),
        )

    def rand_augment_map(self) -> RandAugment | None:
        """DeiT's RandAugment of this magnitude."""
        return RandAugment(magnitude=self.rand_augment) if self.rand_augment else None

    def erasing_map(self) -> list[transforms.Transform]:
        """Random erasing, where there is any."""
        return [transforms.random_erasing(self.erasing)] if self.erasing else []


@dataclass(frozen=True)
class Pipeline:
    """The transforms of both splits, as keyword arguments of the batches, and the shape of the images they give."""

    image_shape: tuple[int, int, int]
    train: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)


def build_pipeline(
    kind: str,
    augment: Augment,
    where: Config,
    sizes: tuple[int, int],
    source: Source,
    spec: zoo.Spec,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Pipeline:
    """One of :data:`PIPELINES` for images of a source.

    Args:
      kind: its name.
      augment: what is switched on.
      where: the block of ``augment``, for messages.
      sizes: of the training and of the evaluation images; 0: the pipeline's own. Only "voc" has two.
      source: whose first example tells the images' form.
      spec: of the network.
      mean, std: of the normalisation.

    Raises:
      ConfigError: an augmentation that the pipeline doesn't have, or images that don't suit it.
    """
    if kind != "voc" and sizes[1] not in (0, sizes[0]):
        raise ConfigError(f"data.eval_size={sizes[1]} is for the pipeline 'voc'; set it to 0")
    if kind == "array":
        return array_pipeline(augment, where, sizes[0], source, mean, std)
    if augment.crop_padding:
        raise ConfigError(
            f"{where.where('crop_padding')}={augment.crop_padding} is for the pipeline 'array'; set it to 0"
        )
    if kind == "imagenet":
        return imagenet_pipeline(augment, sizes[0], spec, mean, std)
    if augment.rand_augment:
        raise ConfigError(
            f"{where.where('rand_augment')}={augment.rand_augment} is for the pipelines 'array' and 'imagenet'; "
            "set it to 0"
        )
    if kind == "square":
        return square_pipeline(augment, where, sizes[0], spec, mean, std)
    return voc_pipeline(augment, where, sizes, source, mean, std)


def array_pipeline(
    augment: Augment, where: Config, size: int, source: Source, mean: tuple[float, ...], std: tuple[float, ...]
) -> Pipeline:
    """Images of one size: [RandAugment] -> [resize] -> [crop] -> [flip] -> normalise -> [erasing].

    Evaluation: [resize] -> normalise. A label map moves along.
    """
    _no_jitter(augment, where)
    first = source[0]
    example = first["image"]
    height, width, channels = np.shape(example)
    if augment.rand_augment and "label_map" in first:
        raise ConfigError(
            f"{where.where('rand_augment')}={augment.rand_augment} moves images but not their label maps; set it to 0"
        )
    if augment.rand_augment and (example.dtype != np.uint8 or channels != 3):
        raise ConfigError(
            f"{where.where('rand_augment')}={augment.rand_augment} needs uint8 RGB images, but these are "
            f"{example.dtype} with {channels} channel(s); set it to 0"
        )
    if len(mean) != channels:
        raise ConfigError(
            f"the images have {channels} channel(s), but the normalisation has {len(mean)} means; "
            "set data.mean and data.std to one number a channel"
        )
    resize = [transforms.resize(size)] if size else []
    normalize = transforms.normalize(mean, std)
    random = [transforms.random_crop_with_padding(augment.crop_padding)] if augment.crop_padding else []
    random += [transforms.random_horizontal_flip()] if augment.flip else []
    return Pipeline(
        (size, size, channels) if size else (height, width, channels),
        {
            "transform": transforms.compose(*resize, *random, normalize, *augment.erasing_map()),
            "example_transform": augment.rand_augment_map(),
        },
        {"transform": transforms.compose(*resize, normalize)},
    )


def imagenet_pipeline(
    augment: Augment, size: int, spec: zoo.Spec, mean: tuple[float, ...], std: tuple[float, ...]
) -> Pipeline:
    """Photographs: random resized crop -> flip -> [RandAugment or jitter] -> normalise -> [erasing].

    Evaluation: shorter side and central crop as the network's :class:`~jaxvision.models.zoo.Spec` says -> normalise.
    """
    size, method = size or spec.input_size[0], spec.interpolation
    train = imagenet_train(
        size,
        mean,
        std,
        scale=augment.scale,
        jitter=augment.jitter,
        rand_augment=augment.rand_augment_map(),
        method=method,
    )
    erasing = transforms.compose(*augment.erasing_map()) if augment.erasing else None
    return Pipeline(
        (size, size, 3),
        {"example_transform": train, "transform": erasing},
        {"example_transform": imagenet_eval(size, spec.crop_fraction, mean, std, method)},
    )


def square_pipeline(
    augment: Augment, where: Config, size: int, spec: zoo.Spec, mean: tuple[float, ...], std: tuple[float, ...]
) -> Pipeline:
    """Photographs without their ratio (CUB): image to a square -> random crop -> [flip] -> normalise -> [erasing].

    Evaluation: the same square -> central crop -> normalise. The square's side is ``size`` over the network's crop
    fraction, 256 for 224.
    """
    _no_jitter(augment, where)
    size, method = size or spec.input_size[0], spec.interpolation
    whole = round(size / spec.crop_fraction)
    erasing = transforms.compose(*augment.erasing_map()) if augment.erasing else None
    return Pipeline(
        (size, size, 3),
        {
            "example_transform": square_train(size, whole, mean, std, flip=augment.flip, method=method),
            "transform": erasing,
        },
        {"example_transform": square_eval(size, whole, mean, std, method)},
    )


def voc_pipeline(
    augment: Augment,
    where: Config,
    sizes: tuple[int, int],
    source: Source,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Pipeline:
    """Segmentation: longer side to 1.25 x size -> pad -> random crop -> [flip] -> [colours] -> normalise.

    Evaluation: longer side to the evaluation size -> pad -> normalise. The sizes are 512 and 480 by default.
    """
    if augment.erasing:
        raise ConfigError(f"{where.where('erasing')}={augment.erasing} isn't for the pipeline 'voc'; set it to 0")
    if "label_map" not in source[0]:
        raise ConfigError("data.pipeline='voc' needs examples with a label map; use another pipeline or data set")
    size = sizes[0] or 512
    train = voc_train(size, size * 5 // 4, mean, std, flip=augment.flip, jitter=augment.jitter)
    return Pipeline(
        (size, size, 3),
        {"example_transform": train},
        {"example_transform": voc_eval(sizes[1] or sizes[0] or 480, mean, std)},
    )


def _no_jitter(augment: Augment, where: Config) -> None:
    if augment.jitter:
        raise ConfigError(
            f"{where.where('jitter')}={augment.jitter} is for the pipelines 'imagenet' and 'voc'; set it to 0"
        )
