"""The task that compares calibration losses: every arm for several seeds, then one table; ACLS and RankMixup share it.

The only place where their configuration is read (its fields are explained in ``configs/calibration.py``).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.data import EvalBatches
from jaxvision.data.transforms import IGNORE
from jaxvision.engine import arms, calibration_arms, calibration_names, calibration_table, recipes
from jaxvision.engine.calibration_arms import Monitor, Trainer
from jaxvision.engine.calibration_names import Recipe
from jaxvision.engine.calibration_outcome import Addition, Measuring, Run
from jaxvision.engine.datasets import other_evaluation
from jaxvision.engine.seeds import HOW
from jaxvision.engine.task import Batch, Task
from jaxvision.metrics.calibration_scaling import METHODS
from jaxvision.metrics.long_tail import groups_by_rank
from jaxvision.models import zoo
from jaxvision.optim import schedules

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
    seeds = arms.check_seeds(config)
    chosen = _recipes(config)
    index = any(recipe.spec.needs == "history" for recipe in chosen)
    data = recipes.build_data(config.data, config.seed, zoo.spec(config.model.name), index=index)
    model = recipes.build_model(config.model, data)
    outputs = jax.eval_shape(lambda: model.module.init_with_output(jax.random.key(0), model.image)[0]).shape[1:]
    measuring = _measuring(config, data, dense=len(outputs) > 1)
    per_epoch = data.train.steps_per_epoch
    steps = max(schedules.epochs_to_steps(config.positive("epochs"), per_epoch), 1)
    every = round(config.positive("eval_every_epochs", zero=True) * per_epoch)
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
    )
    _check_batch(data.train.batch_at(0), trainers)
    ways = tuple(trainer.arm() for trainer in trainers)
    stages = arms.stages(
        ways,
        seeds,
        [data.train.with_seed(seed) for seed in seeds],
        {"validation": data.validation, "test": data.eval},
        every=every,
        how=config.one_of("how", HOW),
    )
    title = f"{title}: {model.name} on {config.data.source}"
    run = Run(title, seeds, trainers, ways, model, data, measuring, _unknown(config, data))
    init = functools.partial(arms.start_state, model.init, seeds)
    # Shaping the state finds what the parameters' names and shapes can tell.
    jax.eval_shape(stages[0].begin, jax.eval_shape(init, _key()), _key())
    report = functools.partial(calibration_table.make, run, addition)
    load = None if model.pretrained is None else functools.partial(arms.load_start, model.load)
    return Task(name, init, stages, report, load=load)


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _unknown(config: Config, data: recipes.Data) -> dict[str, EvalBatches]:
    """The block ``ood``: name -> out-of-distribution images."""
    block = config.ood
    name, _ = block.source, (block.path, block.split, block.options.to_dict())
    return {name: other_evaluation(block, data, data.eval.batch_size)} if name else {}


def _recipes(config: Config) -> tuple[Recipe, ...]:
    configured = calibration_names.read_losses(config.losses.to_dict())
    names = tuple(config.arms)
    found = tuple(calibration_names.parse(name, configured) for name in names)
    texts = [recipe.text for recipe in found]
    if not texts or len(set(texts)) != len(texts):
        raise ConfigError(f"config.arms={names} must be at least one arm, each once")
    return found


def _measuring(config: Config, data: recipes.Data, *, dense: bool) -> Measuring:
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
        raise ConfigError(
            f"{where} is 0, but each loss's temperature is fitted on a validation split; hold some training images out"
        )
    if data.validation.num_examples < 2 or data.eval.num_examples < 2:
        counts = data.validation.num_examples, data.eval.num_examples
        raise ConfigError(
            f"there are {counts[0]} validation and {counts[1]} test images ({where}), but fitting and measuring need "
            "at least 2 of each"
        )
    return measuring


def _check_batch(batch: Batch, trainers: tuple[Trainer, ...]) -> None:
    """Looks at one batch's labels and tries each loss on its shapes."""
    outputs, dense = trainers[0].outputs, trainers[0].dense
    name = "label_map" if dense else "label"
    if name not in batch:
        raise ConfigError(
            f"the network labels {'pixels' if dense else 'images'}, but the data have no '{name}'; for shapes set "
            "config.data.options.label_map to True"
        )
    labels = np.asarray(batch[name])
    if dense and labels.shape[1:] != outputs[:-1]:
        raise ConfigError(f"the network labels {outputs[:-1]} pixels, but the label maps have {labels.shape[1:]}")
    counted = labels[labels != IGNORE] if dense else labels
    if counted.size and counted.max() >= outputs[-1]:
        raise ConfigError(
            f"label {counted.max()} of the first batch is none of the data's {outputs[-1]} classes "
            f"(0 to {outputs[-1] - 1})"
        )
    for trainer in trainers:
        trainer.try_loss(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch))
