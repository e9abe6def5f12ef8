"""The fields of the configuration that say how arms train, read and checked for ``task.py``."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxvision.core import name_rules, trees
from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.engine import recipes
from jaxvision.methods.trs import optimizers, training
from jaxvision.methods.trs.variants import Variant
from jaxvision.models.quantized import QuantizedNetwork
from jaxvision.optim import schedules
from jaxvision.optim.transition_rate import GRANULARITIES

LIMITS = ("min_step_size", "max_step_size")


def recipe(config: Config, steps: int, per_epoch: int) -> optimizers.Recipe:
    """What the optimizers of all arms share: the blocks ``optimizer``, ``transition`` and ``freezing``."""
    block, control, freezing = config.optimizer, config.transition, config.freezing
    shape = recipes.build_schedule(block.schedule, 1.0, steps, per_epoch)
    low, high = _below_one(freezing, "end"), _below_one(freezing, "start")
    limits = {name: _optional(control, name, zero=name == "min_step_size") for name in LIMITS}
    if None not in limits.values() and limits["min_step_size"] > limits["max_step_size"]:
        raise ConfigError(
            f"{control.where('min_step_size')}={limits['min_step_size']} is above {control.where('max_step_size')}="
            f"{limits['max_step_size']}; swap them, or leave one out"
        )
    initial_rate = _optional(control, "initial_rate", zero=True)
    if initial_rate is not None and initial_rate > 1:
        raise ConfigError(
            f"{control.where('initial_rate')}={initial_rate} must be at most 1, as rates are fractions of the weights"
        )
    given = {**limits, "initial_rate": initial_rate}
    granularity = control.one_of("granularity", GRANULARITIES)
    return optimizers.Recipe(
        shape,
        momentum=_below_one(block, "momentum", zero=True),
        nesterov=block.one_of("nesterov", (True, False)),
        b1=_below_one(block, "b1", zero=True),
        b2=_below_one(block, "b2", zero=True),
        eps=block.positive("eps"),
        weight_decay=float(block.positive("weight_decay", zero=True)),
        scale_lr=float(block.positive("scale_lr", zero=True)),
        control={"granularity": granularity, **{name: value for name, value in given.items() if value is not None}},
        rate_momentum=_below_one(control, "momentum", zero=True),
        eta=_optional(control, "eta"),
        freezing=schedules.cosine(high, max(steps, 1), end=low),
        freezing_momentum=_below_one(freezing, "momentum"),
        oscillation=config.one_of("oscillation", (True, False)),
    )


def _below_one(config: Config, key: str, *, zero: bool = False) -> float:
    """A field above 0 (or, with ``zero``, at least 0) and below 1."""
    value = config.positive(key, zero=zero)
    if not value < 1:
        raise ConfigError(f"{config.where(key)}={value!r} must be below 1")
    return value


def _optional(config: Config, key: str, *, zero: bool = False) -> float | None:
    """A field that may be None, else a number above 0 (or, with ``zero``, at least 0)."""
    return None if getattr(config, key) is None else config.positive(key, zero=zero)


def labels(control: Config, model: recipes.Model) -> Callable[[QuantizedNetwork], dict[str, Any]]:
    """From a network to the argument ``labels`` of its transition rates; there is none unless rates are a label's."""
    patterns, where = control.words("labels"), control.where("labels")
    if (control.granularity == "label") != bool(patterns):
        raise ConfigError(
            f"{where}={patterns!r}, but {control.where('granularity')}={control.granularity!r}: regular expressions of "
            "kernels that share a rate go with 'label', and only with it"
        )

    def label(name: str, _: Any) -> str:
        index = name_rules.first(patterns, name)
        return name if index is None else patterns[index]

    def of(network: QuantizedNetwork) -> dict[str, Any]:
        if not patterns:
            return {}
        layers = network.check(model.image)
        name_rules.check(where, patterns, [name for name, layer in layers.items() if layer.bits.weight is not None])
        return {"labels": functools.partial(trees.map_named, label)}

    return of


def curvature(block: Config, per_epoch: int) -> training.Curvature | None:
    """The block ``ewgs``."""
    every = schedules.epochs_to_steps(block.positive("every_epochs", zero=True), per_epoch)
    batches, draws = block.positive("batches"), block.positive("draws")
    if every and every < batches:
        raise ConfigError(
            f"{block.where('every_epochs')}={block.every_epochs} is {every} steps, fewer than the "
            f"{block.where('batches')}={batches} that an estimate takes"
        )
    return training.Curvature(every, batches, draws) if every else None


def rising(weight: float, steps: int) -> Callable[[jax.Array], jax.Array]:
    """0 at first, ``weight`` at the end, along a cosine."""
    falling = schedules.cosine(weight, max(steps, 1))
    return lambda count: weight - falling(count)


def check_limits(config: Config, variant: Variant, rates: tuple[float, ...]) -> None:
    """Raises ConfigError where a scheduled arm would start with a step size beyond its limits."""
    low, high = (getattr(config.transition, name) for name in LIMITS)
    beyond = [r for r in rates if (low is not None and r < low) or (high is not None and r > high)]
    if variant.scheduled and beyond:
        raise ConfigError(
            f"{config.grid.where(variant.optimizer)}={rates} has {beyond[0]:g}, with which {variant.name!r} would "
            f"start beyond config.transition.min_step_size={low} or max_step_size={high}; change one of the two"
        )
