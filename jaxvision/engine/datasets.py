"""The ``data`` block of a configuration: sources and their transforms as training and evaluation batches."""

from dataclasses import dataclass

import numpy as np

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.data import EvalBatches, Source, Subset, TrainBatches, open_source, splits, transforms
from jaxvision.data.sources import labels_of
from jaxvision.engine.pipelines import PIPELINES, Augment, build_pipeline
from jaxvision.models import zoo

RULES = ("fixed", "shuffle", "per_class", "eval")


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


def build_data(config: Config, seed: int, spec: zoo.Spec, *, train: bool = True, index: bool = False) -> Data:
    """The batches of a ``data`` block.

    Fields: source, path ("": none), options (a block for the source), train_split, eval_split, train_size (0: all),
    validation_size (held out, see :func:`cut`), batch_size, eval_batch_size, pipeline, size (0: as the images are,
    the network's, or the recipe's), mean and std ((): the network's), augment (a block, see
    :class:`~jaxvision.engine.pipelines.Augment`).
    And, which may be left out: validation_rule and validation_seed (see :func:`cut`), class_aware (examples that a
    class gives in its turn; 0: no turns, see :class:`~jaxvision.data.class_aware.ClassAwareSampler`), eval_size (0: as
    size), eval_mean and eval_std ((): mean and std; of the evaluation split alone).

    Pipelines: "array" for images of one size, with or without label maps; "imagenet" and "square" for photographs;
    "voc" for photographs with label maps. See :mod:`jaxvision.engine.pipelines`.

    Args:
      config: the block.
      seed: of the run; names the order and the augmentation.
      spec: of the network.
      train: False: the training split isn't opened.
      index: the batches carry ``index``, the example's number in their set.

    Raises:
      ConfigError, DataError: a value that is out of range, or data that aren't there.
    """
    batch_size, eval_batch_size = config.positive("batch_size"), config.positive("eval_batch_size")
    kind = config.one_of("pipeline", PIPELINES)
    size = (config.positive("size", zero=True), _optional(config, "eval_size"))
    mean, std = tuple(config.mean or spec.mean), tuple(config.std or spec.std)
    eval_mean, eval_std = (tuple(config.get(name, ())) for name in ("eval_mean", "eval_std"))
    where, augment = config.augment, Augment.read(config.augment)
    train_split, eval_split, options = config.train_split, config.eval_split, config.options.to_dict()
    source, path = config.source, config.path or None
    sizes = (config.positive("train_size", zero=True), config.positive("validation_size", zero=True))
    rule, class_aware = _rule(config), _optional(config, "class_aware")

    held_out = open_source(source, path=path, split=eval_split, **options)
    pipeline = build_pipeline(kind, augment, where, size, held_out, spec, mean, std)
    evaluation = pipeline.eval
    if eval_mean or eval_std:
        changed = (eval_mean or mean, eval_std or std)
        evaluation = build_pipeline(kind, augment, where, size, held_out, spec, *changed).eval
    batches = train_examples = validation = chosen = None
    if rule[0] == "eval":
        held_out, chosen = cut(config, held_out, 0, sizes[1], split=eval_split)
        sizes, rule = (sizes[0], 0), RULES[:1]
    if train:
        examples = open_source(source, path=path, split=train_split, **options)
        _check_same_classes(config, examples, held_out)
        examples, own = cut(config, examples, *sizes, *rule)
        chosen = own if chosen is None else chosen
        validation = None if chosen is None else EvalBatches(chosen, eval_batch_size, index=index, **pipeline.eval)
        order = {"seed": seed, "class_aware": class_aware, "index": index}
        batches = TrainBatches(examples, batch_size, **order, **pipeline.train)
        train_examples = EvalBatches(examples, eval_batch_size, index=index, **pipeline.eval)
    return Data(
        batches,
        train_examples,
        EvalBatches(held_out, eval_batch_size, index=index, **evaluation),
        held_out.num_classes,
        tuple(held_out.class_names),
        pipeline.image_shape,
        mean,
        std,
        validation,
    )


def cut(
    config: Config,
    examples: Source,
    train: int,
    validation: int,
    rule: str = "fixed",
    seed: int = 0,
    *,
    split: str = "",
) -> tuple[Source, Source | None]:
    """``train`` (0: all that remain) training examples and ``validation`` others.

    Args:
      config: the block, for messages.
      examples: the training split.
      train, validation: how many.
      rule: which are held out. "fixed": the last ones in one random order, the same for every seed. "shuffle": the
        first ones of a shuffle, CIFAR's split in published code (:func:`jaxvision.data.splits.shuffled`). "per_class":
        as many of each class, Tiny-ImageNet's (:func:`~jaxvision.data.splits.per_class`). In a configuration also
        "eval": the validation examples are those of the rule "fixed" in the evaluation split, which is tested without
        them, and training has all of its own, as in the papers on ImageNet.
      seed: of the published rules.
      split: the split's name, for messages; "": the training split's.

    Raises:
      ConfigError: there aren't so many.
    """
    if not train and not validation:
        return examples, None
    if (train or 1) + validation > len(examples):
        raise ConfigError(
            f"{config.where('train_size')}={train} and {config.where('validation_size')}={validation} "
            f"don't fit into the {len(examples)} examples of the split '{split or config.train_split}'"
        )
    order = np.random.RandomState(0).permutation(len(examples))  # its streams are frozen for good
    chosen = order[len(order) - validation :]
    kept = order[: len(order) - validation]
    if validation and rule == "shuffle":
        kept, chosen = splits.shuffled(len(examples), validation, seed)
    elif validation and rule == "per_class":
        kept, chosen = splits.per_class(labels_of(examples), validation, seed)
        kept = order[np.isin(order, kept)]  # not class by class: the first ones are a fair sample
    kept = kept[: train or len(kept)]
    return Subset(examples, np.sort(kept)), Subset(examples, np.sort(chosen)) if validation else None


def other_evaluation(config: Config, data: Data, batch_size: int) -> EvalBatches:
    """Another data set under the evaluation preprocessing of this one, such as out-of-distribution images.

    Its images are resized (bilinear, antialiased) to this data set's size and normalised as these. Fields: source,
    path, options, split.

    Args:
      config: the block.
      data: what the network is trained on.
      batch_size: of the evaluation.

    Raises:
      ConfigError, DataError: data that aren't there, or whose channels are others.
    """
    options = config.options.to_dict()
    source = open_source(config.source, path=config.path or None, split=config.split, **options)
    channels = np.shape(source[0]["image"])[-1]
    if channels != data.image_shape[-1]:
        raise ConfigError(
            f"{config.where('source')}={config.source!r} has images of {channels} channel(s), but the network takes "
            f"{data.image_shape[-1]}; use another data set"
        )
    transform = transforms.compose(transforms.resize(data.image_shape[:2]), transforms.normalize(data.mean, data.std))
    return EvalBatches(source, batch_size, transform=transform)


def _optional(config: Config, key: str) -> int:
    """A number of at least 0 that configurations of before didn't have."""
    value = config.positive(key, zero=True) if key in config else 0
    if not isinstance(value, int):
        raise ConfigError(f"{config.where(key)}={value!r} must be a whole number")
    return value


def _rule(config: Config) -> tuple[str, int]:
    name = config.one_of("validation_rule", RULES) if "validation_rule" in config else RULES[0]
    return name, _optional(config, "validation_seed")


def _check_same_classes(config: Config, train: Source, held_out: Source) -> None:
    if tuple(train.class_names) != tuple(held_out.class_names):
        raise ConfigError(
            f"the splits '{config.train_split}' ({train.num_classes} classes) and '{config.eval_split}' "
            f"({held_out.num_classes} classes) of {config.where('source')}={config.source!r} differ in their classes"
        )
