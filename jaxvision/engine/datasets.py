"""The ``data`` block of a configuration: sources and their transforms as training and evaluation batches."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.data import EvalBatches, Source, Subset, TrainBatches, open_source, transforms
from jaxvision.data.imagenet import imagenet_eval, imagenet_train
from jaxvision.data.rand_augment import RandAugment
from jaxvision.models import zoo

PIPELINES = ("array", "imagenet")


@dataclass(frozen=True)
class Data:
    """What a ``data`` block describes.

    Attributes:
      train: batches of the training split; None where only evaluation was asked for.
      train_examples: the training split in order, under evaluation preprocessing (for calibration); None likewise.
      eval: batches of the evaluation split.
      validation: the examples held out of the training split for choosing (a learning rate, a temperature); None
        where there are none.
      num_classes, class_names: K and the names.
      image_shape: (H, W, C) of the batches.
      mean, std: of the normalisation, for drawing images.
    """

    train: TrainBatches | None
    train_examples: EvalBatches | None
    eval: EvalBatches
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation: EvalBatches | None = None


@dataclass(frozen=True)
class Augment:
    """The block ``data.augment``; 0 or False switches a part off.

    Attributes:
      crop_padding: pixels of padding of a random crop of the original size ("array").
      flip: mirror with probability 1/2 ("array"; "imagenet" always does).
      scale: bounds of the area of a random resized crop ("imagenet").
      jitter: strength of the colour jitter ("imagenet").
      rand_augment: magnitude of RandAugment; needs uint8 RGB images.
      erasing: probability of random erasing with noise.
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


def build_data(config: Config, seed: int, spec: zoo.Spec, *, train: bool = True) -> Data:
    """The batches of a ``data`` block.

    Fields: source, path ("": none), options (a block for the source), train_split, eval_split, train_size (0: all),
    validation_size (held out of the training split; both by one fixed permutation), batch_size,
    eval_batch_size, pipeline, size (0: as the images are; for "imagenet" the network's), mean and std ((): the
    network's), augment (a block, see :class:`Augment`).

    Pipelines: "array" for images of one size; "imagenet" for photographs (:func:`array_pipeline`,
    :func:`imagenet_pipeline`).

    Args:
      config: the block.
      seed: of the run; names the order and the augmentation.
      spec: of the network.
      train: False: the training split isn't opened.

    Raises:
      ConfigError, DataError: a value that is out of range, or data that aren't there.
    """
    batch_size, eval_batch_size = config.positive("batch_size"), config.positive("eval_batch_size")
    kind, size = config.one_of("pipeline", PIPELINES), config.positive("size", zero=True)
    mean, std = tuple(config.mean or spec.mean), tuple(config.std or spec.std)
    where, augment = config.augment, Augment.read(config.augment)
    train_split, eval_split, options = config.train_split, config.eval_split, config.options.to_dict()
    source, path = config.source, config.path or None
    sizes = (config.positive("train_size", zero=True), config.positive("validation_size", zero=True))

    held_out = open_source(source, path=path, split=eval_split, **options)
    if kind == "imagenet":
        pipeline = imagenet_pipeline(augment, where, size, spec, mean, std)
    else:
        pipeline = array_pipeline(augment, where, size, held_out, mean, std)
    batches = train_examples = validation = None
    if train:
        examples = open_source(source, path=path, split=train_split, **options)
        _check_same_classes(config, examples, held_out)
        examples, chosen = cut(config, examples, *sizes)
        validation = None if chosen is None else EvalBatches(chosen, eval_batch_size, **pipeline.eval)
        batches = TrainBatches(examples, batch_size, seed=seed, **pipeline.train)
        train_examples = EvalBatches(examples, eval_batch_size, **pipeline.eval)
    return Data(
        batches,
        train_examples,
        EvalBatches(held_out, eval_batch_size, **pipeline.eval),
        held_out.num_classes,
        tuple(held_out.class_names),
        pipeline.image_shape,
        mean,
        std,
        validation,
    )


def cut(config: Config, examples: Source, train: int, validation: int) -> tuple[Source, Source | None]:
    """The first ``train`` (0: all that remain) and the last ``validation`` examples in a fixed random order.

    Raises:
      ConfigError: there aren't so many.
    """
    if not train and not validation:
        return examples, None
    if (train or 1) + validation > len(examples):
        raise ConfigError(
            f"{config.where('train_size')}={train} and {config.where('validation_size')}={validation} "
            f"don't fit into the {len(examples)} examples of the split '{config.train_split}'"
        )
    order = np.random.RandomState(0).permutation(len(examples))  # its streams are frozen for good
    kept = order[: train or len(order) - validation]
    return Subset(examples, np.sort(kept)), Subset(examples, np.sort(order[-validation:])) if validation else None


def array_pipeline(
    augment: Augment, where: Config, size: int, source: Source, mean: tuple[float, ...], std: tuple[float, ...]
) -> Pipeline:
    """Images of one size: [RandAugment] -> [resize] -> [crop] -> [flip] -> normalise -> [erasing].

    Evaluation: [resize] -> normalise.
    """
    if augment.jitter:
        raise ConfigError(f"{where.where('jitter')}={augment.jitter} is for the pipeline 'imagenet'; set it to 0")
    example = source[0]["image"]
    height, width, channels = np.shape(example)
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
    augment: Augment, where: Config, size: int, spec: zoo.Spec, mean: tuple[float, ...], std: tuple[float, ...]
) -> Pipeline:
    """Photographs: random resized crop -> flip -> [RandAugment or jitter] -> normalise -> [erasing].

    Evaluation: shorter side and central crop as the network's :class:`~jaxvision.models.zoo.Spec` says -> normalise.
    """
    if augment.crop_padding:
        raise ConfigError(
            f"{where.where('crop_padding')}={augment.crop_padding} is for the pipeline 'array'; set it to 0"
        )
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


def _check_same_classes(config: Config, train: Source, held_out: Source) -> None:
    if tuple(train.class_names) != tuple(held_out.class_names):
        raise ConfigError(
            f"the splits '{config.train_split}' ({train.num_classes} classes) and '{config.eval_split}' "
            f"({held_out.num_classes} classes) of {config.where('source')}={config.source!r} differ in their classes"
        )
