"""The task that compares calibration losses: every arm for several seeds, then one table; ACLS and RankMixup share it.

The only place where their configuration is read (its fields are explained in ``configs/calibration.py``).
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError, DataError
from jaxvision.data import EvalBatches
from jaxvision.data.transforms import IGNORE
from jaxvision.engine import arms, calibration_arms, calibration_names, calibration_table, recipes
from jaxvision.engine.calibration_arms import Monitor
from jaxvision.engine.calibration_names import Recipe
from jaxvision.engine.calibration_outcome import Addition, Measuring, Run
from jaxvision.engine.datasets import other_evaluation
from jaxvision.engine.seeds import HOW
from jaxvision.engine.task import Task
from jaxvision.metrics.calibration_scaling import METHODS
from jaxvision.metrics.long_tail import groups_by_rank
from jaxvision.models import zoo
from jaxvision.optim import schedules

VALIDATION, TEST = "validation", "test"
CHOICES = {"last": "", "best_validation": f"{VALIDATION}/accuracy"}
"""What ``config.choose`` may be -> ``Trainer.best``."""
_PART = 256
"""Label maps that are looked at together."""

Monitors = Callable[[Recipe], Callable[[Mapping[str, Any]], Monitor] | None]


def make(config: Config, name: str, title: str, *, monitors: Monitors, addition: Addition) -> Task:
    """The task of a configuration.

    Args:
      config: of ``configs/calibration.py``'s fields.
      name, title: of the method.
      monitors: recipe -> what is logged while that arm trains, or None.
      addition: what the method adds to the report.

    Raises:
      ConfigError, DataError: anything in it that can't work.
    """
    seeds, best = arms.check_seeds(config), CHOICES[config.one_of("choose", tuple(CHOICES))]
    chosen = _recipes(config)
    index = any(recipe.spec.needs == "history" for recipe in chosen)
    data = recipes.build_data(config.data, config.seed, zoo.spec(config.model.name), index=index)
    model = recipes.build_model(config.model, data)
    outputs = jax.eval_shape(lambda: model.module.init_with_output(jax.random.key(0), model.image)[0]).shape[1:]
    dense = len(outputs) > 1
    unknown = _unknown(config, data, dense=dense)
    measuring = _measuring(config, data, dense=dense, chosen=bool(best))
    _check_labels(data, outputs)
    per_epoch = data.train.steps_per_epoch
    steps = max(schedules.epochs_to_steps(config.positive("epochs"), per_epoch), 1)
    every = round(config.positive("eval_every_epochs", zero=True) * per_epoch)
    if best and not every:
        raise ConfigError(
            f"config.choose={config.choose!r} takes the best of several evaluations, but config.eval_every_epochs="
            f"{config.eval_every_epochs} evaluates at the end alone; set it to 1"
        )
    optimizer = recipes.build_optimizer(config.optimizer, steps, per_epoch)
    if optimizer.accumulate != 1:
        raise ConfigError(
            f"config.optimizer.accumulate={optimizer.accumulate} must be 1: losses of this comparison look at pairs of "
            "rows or at whole batches; lower config.data.batch_size instead"
        )
    trainers = calibration_arms.trained(
        chosen,
        monitors,
        module=model.module,
        outputs=outputs,
        transform=optimizer.transform,
        schedule=optimizer.schedule,
        steps=steps,
        per_epoch=per_epoch,
        train_size=data.train_examples.num_examples,
        num_bins=measuring.num_bins,
        best=best,
    )
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), data.train.batch_at(0))
    for trainer in trainers:
        trainer.try_loss(shapes)
    ways = tuple(trainer.arm() for trainer in trainers)
    stages = arms.stages(
        ways,
        seeds,
        [data.train.with_seed(seed) for seed in seeds],
        # Test images would be evaluated with networks that the report has nothing of.
        {VALIDATION: data.validation} if best else {VALIDATION: data.validation, TEST: data.eval},
        every=every,
        how=config.one_of("how", HOW),
    )
    title = f"{title}: {model.name} on {config.data.source}"
    run = Run(title, seeds, trainers, ways, model, data, measuring, unknown)
    init = functools.partial(arms.start_state, model.init, seeds)
    # Shaping the state finds what the parameters' names and shapes can tell.
    jax.eval_shape(stages[0].begin, jax.eval_shape(init, _key()), _key())
    report = functools.partial(calibration_table.make, run, addition)
    load = None if model.pretrained is None else functools.partial(arms.load_start, model.load)
    return Task(name, init, stages, report, load=load)


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _unknown(config: Config, data: recipes.Data, *, dense: bool) -> dict[str, EvalBatches]:
    """The block ``ood``: name -> out-of-distribution images."""
    block = config.ood
    name, _ = block.source, (block.path, block.split, block.options.to_dict())
    if name and dense:
        raise ConfigError(
            f"{block.where('source')}={name!r} is for networks that label images, but {config.model.name} labels "
            "pixels; set it to ''"
        )
    return {name: other_evaluation(block, data, data.eval.batch_size)} if name else {}


def _recipes(config: Config) -> tuple[Recipe, ...]:
    configured = calibration_names.read_losses(config.losses.to_dict())
    names = tuple(config.arms)
    found = tuple(calibration_names.parse(name, configured) for name in names)
    texts = [recipe.text for recipe in found]
    if not texts or len(set(texts)) != len(texts):
        raise ConfigError(f"config.arms={names} must be at least one arm, each once")
    return found


def _measuring(config: Config, data: recipes.Data, *, dense: bool, chosen: bool) -> Measuring:
    measuring = Measuring(
        num_bins=config.positive("num_bins"),
        simulations=config.positive("simulations", zero=True),
        temperature=config.one_of("temperature", METHODS),
        ignore=tuple(config.ignore_labels),
        save_logits=config.one_of("save_logits", (True, False)),
        groups=groups_by_rank(data.num_classes) if config.one_of("long_tail_groups", (True, False)) else (),
    )
    if not dense and measuring.ignore:
        raise ConfigError(
            f"config.ignore_labels={measuring.ignore} is for networks that label pixels; set it to () for images"
        )
    if data.num_classes < 2:
        raise ConfigError(f"config.data.source={config.data.source!r} has one class; calibration needs at least 2")
    where = config.data.where("validation_size")
    if config.data.eval_split == config.data.train_split:
        raise ConfigError(
            f"{config.data.where('eval_split')}={config.data.eval_split!r} is the training split too: losses would be "
            "judged, and temperatures fitted, on images that they are reported on; name another split"
        )
    if data.validation is None:
        what = "network is chosen and its temperature fitted" if chosen else "temperature is fitted"
        raise ConfigError(f"{where} is 0, but each loss's {what} on a validation split; hold some training images out")
    if data.validation.num_examples < 2 or data.eval.num_examples < 2:
        counts = data.validation.num_examples, data.eval.num_examples
        raise ConfigError(
            f"there are {counts[0]} validation and {counts[1]} test images ({where}), but fitting and measuring need "
            "at least 2 of each"
        )
    return measuring


def _check_labels(data: recipes.Data, outputs: tuple[int, ...]) -> None:
    """Do the labels fit the network? Those of all pixels in memory; of other data those of each split's first batch."""
    dense, classes = len(outputs) > 1, outputs[-1]
    name, batch = "label_map" if dense else "label", data.train.batch_at(0)
    if name not in batch:
        raise ConfigError(
            "the network labels pixels, but the data have no 'label_map'; for shapes set "
            "config.data.options.label_map to True"
            if dense
            else "the network labels images, but the data have no 'label'; set config.model.name to a network that "
            "labels pixels, such as plain_cnn_dense"
        )
    if dense and batch[name].shape[1:] != outputs[:-1]:
        raise ConfigError(f"the network labels {outputs[:-1]} pixels, but the label maps have {batch[name].shape[1:]}")
    splits = {"training": data.train_examples, "validation": data.validation, "test": data.eval}
    found = {split: _label_maps(batches) for split, batches in splits.items()} if dense else {"training": [batch[name]]}
    for split, labels in ((split, labels) for split, parts in found.items() for labels in parts):
        wrong = labels[((labels < 0) | (labels >= classes)) & ((labels != IGNORE) | (not dense))]
        if wrong.size:
            raise DataError(
                f"label {wrong[0]} of the {split} images is none of the data's {classes} classes (0 to {classes - 1})"
                f"{f'; pixels that do not count have the label {IGNORE}' if dense else ''}"
            )


def _label_maps(batches: EvalBatches) -> Iterator[np.ndarray]:
    """All label maps of a source in memory, a part at a time; of one whose images are decoded the first batch's."""
    source = batches.source
    if not getattr(source, "in_memory", False):
        yield batches.batch_at(0)["label_map"]
        return
    for start in range(0, len(source), _PART):
        yield source.take(np.arange(start, min(start + _PART, len(source))))["label_map"]
