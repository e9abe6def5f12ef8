"""The task ``lbt``: one stage an arm, each for every seed, gradient width and setting; then tables and figures.

The only place where the configuration is read (its fields are explained in ``configs/lbt.py``).
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.engine import arms, recipes, reestimation
from jaxvision.engine.seeds import HOW
from jaxvision.engine.task import Batch, EvalData, Stage, State, Task
from jaxvision.methods.lbt import control, networks, report
from jaxvision.methods.lbt.control import Control
from jaxvision.methods.lbt.training import MEMBER, Optimizers, Trainer
from jaxvision.models import zoo
from jaxvision.optim import schedules

logger = logging.getLogger("jaxvision")

ARMS = ("float", "wa", "fixed", "dsgc", "whole_error", "piecewise", "lbt")


@dataclass(frozen=True)
class Choices:
    """What the arms have in common.

    Attributes:
      seeds, names: of trainings and arms; names in the order of the table.
      bits: widths of gradients.
      rates: learning rates to try.
      controls: how each arm with quantized gradients chooses gamma.
      export: the arm whose network is written, "": none.
    """

    seeds: tuple[int, ...]
    names: tuple[str, ...]
    bits: tuple[int, ...]
    rates: tuple[float, ...]
    controls: Mapping[str, Control]
    alphas: tuple[float, ...]
    first_last: str
    start_images: int
    how: str
    export: str


def make(config: Config) -> Task:
    """The task of a configuration.

    Raises:
      ConfigError, DataError: anything in it that can't work.
    """
    spec = zoo.spec(config.model.name)
    data = recipes.build_data(config.data, config.seed, spec)
    model = recipes.build_model(config.model, data)
    epochs, every = config.positive("epochs"), config.positive("eval_every_epochs", zero=True)
    per_epoch = data.train.steps_per_epoch
    steps = max(1, schedules.epochs_to_steps(epochs, per_epoch))
    optimizers = _optimizers(config, steps, per_epoch)
    choices = _choices(config, per_epoch)
    if len(choices.rates) > 1 and data.validation is None:
        raise ConfigError(
            f"{config.where('lr_grid')} has {len(choices.rates)} rates to choose from, which needs images that aren't "
            "reported: set config.data.validation_size"
        )
    built = networks.build(
        config.quantization,
        {name: choices.controls.get(name) for name in choices.names},
        max(choices.bits),
        choices.first_last,
        model,
    )
    networks.check_scales(built, model)
    data_shape = (data.train.batch_size // optimizers.accumulate, *data.image_shape)
    trained = [data.train.with_seed(seed) for seed in choices.seeds]
    first = functools.cache(functools.partial(_first_batch, trained, choices.start_images))
    batches = reestimation.count(config, jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0))))
    pairs = [
        _arm(name, built[name], choices, model, optimizers, first, steps, index * (steps + batches))
        for index, name in enumerate(choices.names)
    ]
    warning = networks.too_few(built["lbt"], choices.alphas, choices.bits, data_shape) if "lbt" in built else ""
    if warning:
        logger.warning("%s", warning)

    evals: dict[str, EvalData] = {"test": data.eval}
    if data.validation is not None:
        evals["validation"] = data.validation
    probe = data.train_examples.subset(np.arange(data.train.batch_size), data.train.batch_size)
    every = round(every * per_epoch)
    stages: list[Stage] = []
    for (arm, trainer), before in zip(pairs, [None, *(arm for arm, _ in pairs)]):
        stages += reestimation.stages(
            _stage(arm, trainer, choices, trained, evals, every, probe, before),
            arm,
            trainer.network,
            choices.seeds,
            trained,
            evals,
            batches=batches,
            first=trainer.offset + steps,
            how=choices.how,
        )

    def init(key: jax.Array) -> State:
        state = arms.start_state(model.init, choices.seeds, key)
        member = jnp.arange(len(choices.seeds), dtype=jnp.int32)
        return state.replace(extra={arms.START: {**state.extra[arms.START], MEMBER: member}})

    def load(state: State) -> State:
        return arms.load_start(load_one, state)

    def load_one(start: Mapping[str, Any]) -> dict[str, Any]:
        fresh = {name: tree for name, tree in start.items() if name != MEMBER}
        return {**model.load(fresh), MEMBER: start[MEMBER]}

    made = functools.partial(
        report.make,
        report.Comparison(
            title=f"{model.name} on {config.data.source}",
            arms=tuple(arm for arm, _ in pairs),
            seeds=choices.seeds,
            bits=choices.bits,
            alpha=choices.alphas[0],
            steps=steps,
            reestimated=batches,
            choose="validation" if data.validation is not None else "test",
            images={name: each.num_examples for name, each in {**evals, report.PROBE: probe}.items()},
            warning=warning,
            export=choices.export,
            model=model,
            family=config.quantization.family,
            network=built[choices.export].network if choices.export else None,
        ),
    )
    return Task("lbt", init, tuple(stages), made, load=None if model.pretrained is None else load)


def _choices(config: Config, steps_per_epoch: int) -> Choices:
    """The fields seeds, arms, gradient_bits, lr_grid, first_last, interval, fixed_gammas, search, how."""
    seeds, names, bits = arms.check_seeds(config), config.words("arms"), config.numbers("gradient_bits")
    gammas, rates = config.numbers("fixed_gammas"), config.numbers("lr_grid") or (config.optimizer.lr,)
    block, search = config.interval, config.search
    alphas, factors = block.numbers("alphas"), search.numbers("rate_factors")
    for name, values in (("arms", names), ("gradient_bits", bits), ("fixed_gammas", gammas),
                          ("interval.alphas", alphas), ("lr_grid", rates),
                          ("search.rate_factors", factors)):  # fmt: skip
        if not values or len(set(values)) != len(values):
            raise ConfigError(f"{config.where(name)}={values} must be at least one value, each once")
    for name in names:
        if name not in ARMS:
            raise unknown(config.where("arms"), name, ARMS)
    if wrong := [width for width in bits if type(width) is not int or not 2 <= width <= 8]:
        raise ConfigError(f"{config.where('gradient_bits')} has {wrong[0]!r}, but widths are whole numbers from 2 to 8")
    if "piecewise" in names and max(bits) < control.FEWEST_PIECEWISE:
        raise ConfigError(f"{config.where('arms')} has 'piecewise', which needs 3 gradient bits, but there are {bits}")
    if wrong := [gamma for gamma in gammas if not 0 < gamma <= 1]:
        raise ConfigError(f"{config.where('fixed_gammas')} has {wrong[0]!r}, but gamma is above 0 and at most 1")
    if wrong := [rate for rate in rates if not rate > 0]:
        raise ConfigError(f"{config.where('lr_grid')} has {wrong[0]!r}, but learning rates are above 0")
    freeze = schedules.epochs_to_steps(block.positive("freeze_epochs", zero=True), steps_per_epoch)
    searched, points = search.positive("every"), search.positive("points")
    controls = {
        "fixed": control.fixed(gammas),
        "dsgc": control.dsgc(searched, points, factors),
        "whole_error": control.whole_error(searched, points),
        "piecewise": control.piecewise(),
        "lbt": control.lbt(alphas, block.beta, block.start, freeze),
    }
    first_last, how = config.one_of("first_last", networks.FIRST_LAST), config.one_of("how", HOW)
    start_images = block.positive("start_images", zero=True)
    export = config.export
    if export and (export not in names or export == "float"):
        raise unknown(config.where("export"), export, [name for name in names if name != "float"])
    return Choices(seeds, names, bits, rates, controls, alphas, first_last, start_images, how, export)


def _optimizers(config: Config, steps: int, steps_per_epoch: int) -> Optimizers:
    rule, _ = recipes.build_rule(config.optimizer)
    config.optimizer.positive("lr")
    shape = recipes.build_schedule(config.optimizer.schedule, 1.0, steps, steps_per_epoch)
    accumulate = recipes.check_accumulation(config.optimizer, config.data.batch_size)
    return Optimizers(rule, config.positive("scale_lr", zero=True), shape, accumulate)


def _arm(
    name: str,
    built: networks.Built,
    choices: Choices,
    model: recipes.Model,
    optimizers: Optimizers,
    first: Callable[[], Batch],
    steps: int,
    offset: int,
) -> tuple[arms.Arm, Trainer]:
    chosen, grid = choices.controls.get(name), {}
    if chosen is not None:
        least = control.FEWEST_PIECEWISE if chosen.kind == "piecewise" else 2
        grid["gradient_bits"] = tuple(float(width) for width in choices.bits if width >= least)
        grid |= chosen.grid
    grid["lr"] = choices.rates
    trainer = Trainer(built.network, model.image, first, optimizers, chosen, built.follows, choices.alphas[0], offset)
    arm = arms.Arm(
        name,
        trainer.begin,
        trainer.step,
        steps,
        trainer.evaluate,
        grid,
        {"schedule": optimizers.shape},
        separate=("loss", "gamma/"),
        keep=trainer.keep if name == choices.export else None,
        check=trainer.check,
    )
    return arm, trainer


def _stage(
    arm: arms.Arm,
    trainer: Trainer,
    choices: Choices,
    trained: Sequence[Any],
    evals: Mapping[str, EvalData],
    every: int,
    probe: EvalData,
    before: arms.Arm | None,
) -> Stage:
    """The arm's stage after the arm ``before``; where its gradients are quantized, they are measured at its end."""
    stage = arms.stage(arm, choices.seeds, trained, evals, every=every, how=choices.how, after=before)
    if trainer.control is None:
        return stage
    measured = dataclasses.replace(arm, evaluate=trainer.probe)
    extra = arms.stage(measured, choices.seeds, trained, {report.PROBE: probe}, how=choices.how)
    return dataclasses.replace(stage, evals={**stage.evals, **extra.evals})


def _first_batch(trained: Sequence[Any], images: int) -> Batch:
    """The first batch of every seed, or as many images of it: leaves [S, B, ...]."""
    batches = [examples.batch_at(0) for examples in trained]
    return {name: np.stack([batch[name][: images or None] for batch in batches]) for name in ("image", "label")}
