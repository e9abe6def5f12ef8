"""The task ``trs``: [train float networks] -> each arm: quantize them and train on -> tables and figures.

The only place where the configuration is read, with ``settings.py`` (its fields are explained in ``configs/trs.py``).
Every arm is one stage whose members are all seeds and learning rates (``engine/arms.py``).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.engine import arms, recipes, reestimation, supervised
from jaxvision.engine.quantization import FLOAT_BITS, bit_rules, build_network
from jaxvision.engine.seeds import HOW
from jaxvision.engine.task import State, Task
from jaxvision.methods.trs import report, settings, training, variants, weights
from jaxvision.methods.trs.outcome import Run
from jaxvision.methods.trs.training import Trainer
from jaxvision.methods.trs.variants import Variant
from jaxvision.models import zoo
from jaxvision.models.quantized import QuantizedNetwork
from jaxvision.optim import schedules, transition_rules
from jaxvision.optim.transition_target import initial_target

FLOAT = "float"


def make(config: Config) -> Task:
    """The task of a configuration.

    Raises:
      ConfigError, DataError: anything in it that can't work.
    """
    seeds = arms.check_seeds(config)
    data = recipes.build_data(config.data, config.seed, zoo.spec(config.model.name))
    model, quantized = weights.load_model(config.model, data)
    per_epoch = data.train.steps_per_epoch
    steps = schedules.epochs_to_steps(config.positive("epochs", zero=True), per_epoch)
    every = round(config.positive("eval_every_epochs", zero=True) * per_epoch)
    loaded = quantized is not None or model.pretrained is not None
    images = _calibration(config, data)
    pretraining = _float_arm(config, model, per_epoch, images, loaded=loaded)
    offset = pretraining[0].steps if pretraining else 0
    batches = reestimation.count(config, jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0))))
    trainers = _trainers(
        config, data, model, steps, per_epoch, offset, batches, images=None if quantized is not None else images
    )
    start = weights.Start.of(config.model.init_from, model, quantized, trainers, seeds)
    rates = _grid(config, trainers, data)
    ways = tuple(trainer.arm(steps, rates[trainer.variant.optimizer]) for trainer in trainers)
    validation = {} if data.validation is None else {"validation": data.validation}
    common = (seeds, [data.train.with_seed(seed) for seed in seeds], {**validation, "test": data.eval})
    how = config.one_of("how", HOW)
    made = arms.stages((*pretraining, *ways), *common, every=every, how=how)
    stages = made[: len(pretraining)]
    for stage, way, trainer in zip(made[len(pretraining) :], ways, trainers, strict=True):
        first = trainer.offset + steps
        stages += reestimation.stages(stage, way, trainer.network, *common, batches=batches, first=first, how=how)
    title = f"{model.name} on {config.data.source}"
    run = Run(title, seeds, trainers, ways, bool(pretraining), config.export, model, data, batches)
    # Shaping the state finds what the parameters' names and shapes can tell.
    jax.eval_shape(start.init, jax.eval_shape(lambda: jax.random.key(0)))
    return Task("trs", start.init, stages, functools.partial(report.make, run), load=start.load if loaded else None)


def _float_arm(
    config: Config, model: recipes.Model, per_epoch: int, images: Callable[[], np.ndarray], *, loaded: bool
) -> tuple[arms.Arm, ...]:
    """The stage that trains the float network of each seed, unless weights are given."""
    binary = config.float.one_of("quantized_inputs", (True, False))
    epochs = config.float.positive("epochs", zero=True)
    steps = max(schedules.epochs_to_steps(epochs, per_epoch), 1)
    optimizer = recipes.build_optimizer(config.float.optimizer, steps, per_epoch)
    recipes.check_accumulation(config.float.optimizer, config.data.batch_size)
    if loaded:
        return ()
    if not epochs:
        raise ConfigError(
            "config.model.init_from is empty and config.float.epochs is 0, but quantized training starts from a "
            "trained float network; give a weights file, or epochs to train one"
        )

    network = build_network(_float_weights(config.quantization), model.module, model.image) if binary else model.module

    def begin(variables: Any, setting: Any, key: jax.Array) -> State:
        del setting
        if binary:
            variables = network.calibrate(training.merge(network.init(key, model.image), variables), images())
        return supervised.new_state(variables, optimizer.transform, average=False)

    step = supervised.train_step(network, optimizer.transform, training.loss_fn(0.0), accumulate=optimizer.accumulate)
    evaluate = training.evaluation(network)
    schedule = {"lr": optimizer.schedule}
    return (arms.Arm(FLOAT, begin, step, steps, evaluate, schedules=schedule, pretrains=True),)


def _float_weights(block: Config) -> Config:
    """The block ``quantization`` with float weights and gradients."""
    rules = tuple((pattern, (FLOAT_BITS, width, FLOAT_BITS)) for pattern, (_, width, _) in bit_rules(block))
    changes = {"weight_bits": FLOAT_BITS, "gradient_bits": FLOAT_BITS, "bit_rules": rules, "execution": "fake"}
    return Config({**block.to_dict(), **changes}, "config.quantization")


def _trainers(
    config: Config,
    data: recipes.Data,
    model: recipes.Model,
    steps: int,
    per_epoch: int,
    offset: int,
    batches: int,
    *,
    images: Callable[[], np.ndarray] | None,
) -> tuple[Trainer, ...]:
    """The arms; the first starts after ``offset`` steps of the run, ``batches`` re-estimate statistics after each.

    ``images`` are what scales are fitted to; None: they are fitted already.
    """
    chosen, recipe = _variants(config), settings.recipe(config, steps, per_epoch)
    common: dict[str, Any] = {
        "family_of_run": config.quantization.family,
        "image": model.image,
        "images": images,
        "smoothing": config.optimizer.positive("label_smoothing", zero=True),
        "accumulate": recipes.check_accumulation(config.optimizer, config.data.batch_size),
        "dampening": settings.rising(config.dampening.positive("weight", zero=True), steps),
    }
    networks = {
        name: build_network(_with_family(config, name), model.module, model.image)
        for name in dict.fromkeys(variant.family for variant in chosen)
    }
    scaled, made = config.transition.one_of("scale_with_bits", (True, False)), []
    control, labels = recipe.control, settings.labels(config.transition, model)
    curvature = settings.curvature(config.ewgs, per_epoch)
    for index, variant in enumerate(chosen):
        network = networks[variant.family]
        training.check_remedy(variant, network, model.image)
        variant, factors = _with_target(variant, network, model, scaled=scaled)
        made.append(
            Trainer(
                variant,
                network,
                recipe=dataclasses.replace(recipe, target_factors=factors, control=control | labels(network)),
                offset=offset + index * (steps + batches),
                keep_variables=variant.name == config.export,
                curvature=curvature if variant.family == "ewgs" else None,
                **common,
            )
        )
    return tuple(made)


def _with_target(
    variant: Variant, network: QuantizedNetwork, model: recipes.Model, *, scaled: bool
) -> tuple[Variant, Mapping[str, float]]:
    """The variant with R^0 of the widest layer for its target, and each latent weight's factor of that."""
    if not variant.scheduled:
        return variant, {}
    layers = network.check(model.image)
    bits = {name: layer.bits.weight for name, layer in layers.items() if layer.bits.weight is not None}
    if not bits:
        raise ConfigError(
            f"config.arms has {variant.name!r}, but no weights are quantized, so there are no transitions; "
            "set config.quantization.weight_bits"
        )
    widest = max(bits.values())
    try:
        target = initial_target(variant.target, widest, scale_with_bits=scaled)
    except ConfigError as error:
        raise ConfigError(
            f"config.transition.target, or what {variant.name!r} in config.arms names: {error}"
        ) from error
    factors = {name: (width / widest) ** 0.5 for name, width in bits.items()} if scaled else {}
    return dataclasses.replace(variant, target=target), factors


def _calibration(config: Config, data: recipes.Data) -> Callable[[], np.ndarray]:
    """The images that scales are fitted to; read when a network is first quantized."""
    count = config.positive("calibration_images")
    if count > data.train_examples.num_examples:
        raise ConfigError(
            f"config.calibration_images={count} is more than the {data.train_examples.num_examples} of "
            "the training split"
        )
    chosen = data.train_examples.subset(np.arange(count), batch_size=count)
    return functools.cache(lambda: chosen.batch_at(0)["image"])


def _variants(config: Config) -> tuple[Variant, ...]:
    names, baseline = tuple(config.arms), config.one_of("baseline", variants.OPTIMIZERS)
    target, rule = float(config.transition.positive("target")), config.transition.rule
    if rule not in transition_rules.RULES:
        raise unknown("config.transition.rule", rule, transition_rules.RULES)
    if not names or len(set(names)) != len(names) or FLOAT in names:
        raise ConfigError(f"config.arms={names} must be at least one arm, each once")
    if config.export and config.export not in names:
        raise unknown("config.export", config.export, names)
    family = config.quantization.family
    return tuple(variants.parse(name, family=family, baseline=baseline, target=target, rule=rule) for name in names)


def _with_family(config: Config, family: str) -> Config:
    """The block ``quantization`` with another family; a learned output scale is the base family's alone."""
    values = config.quantization.to_dict()
    own = family == values["family"]
    return Config({**values, "family": family, **({} if own else {"output_scale": None})}, "config.quantization")


def _grid(config: Config, trainers: tuple[Trainer, ...], data: recipes.Data) -> dict[str, tuple[float, ...]]:
    """The learning rates of each optimizer."""
    rates = {name: config.grid.numbers(name) for name in variants.OPTIMIZERS}
    for name in dict.fromkeys(trainer.variant.optimizer for trainer in trainers):
        found, where = rates[name], config.grid.where(name)
        if not found or min(found) <= 0 or len(set(found)) != len(found):
            raise ConfigError(f"{where}={found} must be at least one learning rate above 0, each once")
        if len(found) > 1 and data.validation is None:
            raise ConfigError(
                f"{where}={found} has several learning rates, but config.data.validation_size is 0, so that there is "
                "nothing to choose one on; hold images out, or leave one rate"
            )
    for trainer in trainers:
        settings.check_limits(config, trainer.variant, rates[trainer.variant.optimizer])
    return rates
