"""The blocks of a configuration that many methods share, read and checked: ``data``, ``model``, ``optimizer``, ``ema``.

``configs/common.py`` has a function with the defaults of each block. Every function here reads all fields of its
block, also those that another field switches off, so that ``Config.check_all_read`` finds what nobody knows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from jaxvision.core import trees
from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.engine.datasets import Data, build_data
from jaxvision.models import torch_import, weight_file, zoo
from jaxvision.optim import ema, optimizers, schedules

__all__ = [
    "Data",
    "Model",
    "Optimizer",
    "build_average",
    "build_data",
    "build_model",
    "build_optimizer",
    "build_rule",
    "build_schedule",
]

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "linear", "cosine", "timm_cosine", "multistep", "polynomial")


@dataclass(frozen=True)
class Model:
    """What a ``model`` block describes.

    Attributes:
      name: in the zoo.
      module: the network.
      image: float32 [1, H, W, C] of zeros, for ``init``.
      pretrained: the variables read from ``init_from``, or None.
      kept: names of leaves (``params/fc/kernel``) that stay as ``init`` makes them all the same.
    """

    name: str
    module: nn.Module
    image: np.ndarray
    pretrained: Any = None
    kept: frozenset[str] = frozenset()

    def init(self, key: Any) -> Any:
        """Fresh variables, traceable."""
        return self.module.init(key, self.image)

    def load(self, fresh: Any) -> Any:
        """``fresh`` variables with the pretrained values, where there are any, in their place; on the host.

        Not a part of ``init``: there the values would be compiled into the program as constants.
        """
        if self.pretrained is None:
            return fresh
        return trees.map_named(lambda name, new, old: new if name in self.kept else old, fresh, self.pretrained)


def build_model(config: Config, data: Data) -> Model:
    """The network of a ``model`` block.

    Fields: name (in the zoo), settings (a block of the network's attributes), dtype of the computation, num_classes
    (None: the data's), init_from (weights file, "": none), init_keep (PyTorch names of modules that keep their fresh
    values, such as ("fc",) for another number of classes).

    Raises:
      ConfigError, DataError: the model, the data and the weights don't fit each other.
    """
    name, dtype = config.name, DTYPES[config.one_of("dtype", tuple(DTYPES))]
    wanted, init_from, keep = config.num_classes, config.init_from, tuple(config.init_keep)
    settings = config.settings.to_dict()
    if wanted is not None and wanted != data.num_classes:
        raise ConfigError(
            f"{config.where('num_classes')}={wanted}, but the data have {data.num_classes} classes; leave it out"
        )
    module = zoo.build(name, num_classes=data.num_classes, dtype=dtype, **settings)
    image = np.zeros((1, *data.image_shape), np.float32)
    if not init_from:
        if keep:
            raise ConfigError(f"{config.where('init_keep')}={keep}, but there is no init_from to keep anything from")
        return Model(name, module, image)
    shapes = zoo.variable_shapes(module, data.image_shape[:2], data.image_shape[2])
    family, leaves = zoo.spec(name).family, trees.named_leaves(shapes)
    kept = frozenset(leaf for leaf in leaves if torch_import.is_dropped(torch_import.torch_name(leaf, family), keep))
    # What is kept isn't read from the template; zeros stand in for it.
    template = trees.map_named(lambda leaf, s: np.zeros(s.shape, s.dtype) if leaf in kept else s, shapes)
    pretrained = weight_file.load_pretrained(init_from, name, template, keep=keep)
    return Model(name, module, image, pretrained, kept)


@dataclass(frozen=True)
class Optimizer:
    """What an ``optimizer`` block describes.

    Attributes:
      transform: clipping, update rule and schedule.
      schedule: the learning rate as a function of the step.
      accumulate: micro-batches a step.
    """

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    accumulate: int


def build_optimizer(config: Config, steps: int, steps_per_epoch: int) -> Optimizer:
    """The optimizer of an ``optimizer`` block for a run of ``steps`` steps.

    Fields: lr, schedule (a block, see :func:`build_schedule`), and those of :func:`build_rule`.

    Raises:
      ConfigError: an unknown name or a value out of range; a regex without a match is found when the parameters
        are first shaped, before anything is compiled.
    """
    schedule = build_schedule(config.schedule, float(config.positive("lr")), steps, steps_per_epoch)
    rule, accumulate = build_rule(config)
    return Optimizer(rule(schedule), schedule, accumulate)


def build_rule(config: Config) -> tuple[Callable[[optax.Schedule], optax.GradientTransformation], int]:
    """The update rule of an ``optimizer`` block as a function of the learning rate's schedule, and ``accumulate``.

    Fields: name, momentum, nesterov (sgd), b1, b2, eps (adam, adamw), weight_decay, no_decay (regexes of
    parameters without decay), clip_norm (0: off), accumulate. Errors as :func:`build_optimizer`.
    """
    name, mask = config.name, optimizers.decay_mask(tuple(config.no_decay))
    decay = {"weight_decay": float(config.weight_decay), "decay_mask": mask}
    adam = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    momentum, nesterov, clip = config.momentum, config.nesterov, config.positive("clip_norm", zero=True)
    accumulate, unseen = config.positive("accumulate"), not config.weight_decay and bool(config.no_decay)
    if name not in OPTIMIZERS:
        raise unknown(config.where("name"), name, OPTIMIZERS)

    def rule(schedule: optax.Schedule) -> optax.GradientTransformation:
        if name == "sgd":
            transform = optimizers.sgd(schedule, momentum, nesterov, **decay)
        else:
            transform = getattr(optimizers, name)(schedule, **adam, **decay)
        if unseen:
            # Without decay nobody would look at the rules, and a wrong one would pass unseen.
            transform = optax.chain(transform, _check_only(mask))
        return optax.chain(optimizers.clip_by_global_norm(clip), transform) if clip else transform

    return rule, accumulate


def check_accumulation(config: Config, batch_size: int) -> int:
    """``accumulate`` of an ``optimizer`` block.

    Raises:
      ConfigError: a batch of ``batch_size`` can't be cut into as many equal parts on each device.
    """
    accumulate, devices = config.positive("accumulate"), jax.device_count()
    if batch_size % (accumulate * devices):
        raise ConfigError(
            f"config.data.batch_size={batch_size} can't be cut into {config.where('accumulate')}={accumulate} equal "
            f"parts on each of {devices} device(s)"
        )
    return accumulate


def build_schedule(config: Config, lr: float, steps: int, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate of a ``schedule`` block over ``steps`` steps, with the peak ``lr``.

    Fields: name, warmup_epochs, warmup_lr (at step 0), end_lr, milestones (epochs) and gamma (multistep), power
    (polynomial), per_epoch (True: the rate moves at the start of an epoch only, as in many published recipes).
    """
    name = config.name
    to_steps = lambda epochs: schedules.epochs_to_steps(epochs, steps_per_epoch)  # noqa: E731
    warmup = {"warmup_steps": to_steps(config.warmup_epochs), "warmup_start": float(config.warmup_lr)}
    end, milestones = float(config.end_lr), tuple(to_steps(epoch) for epoch in config.milestones)
    gamma, power, per_epoch = config.gamma, config.power, config.one_of("per_epoch", (True, False))
    steps = max(steps, warmup["warmup_steps"], 1) if steps < 1 else steps  # 0 steps: evaluation only
    makers: dict[str, Callable[[], optax.Schedule]] = {
        "constant": lambda: schedules.constant(lr),
        "linear": lambda: schedules.linear(lr, end, steps),
        "cosine": lambda: schedules.cosine(lr, steps, end=end, **warmup),
        "timm_cosine": lambda: schedules.timm_cosine(lr, steps, end=end, **warmup),
        "multistep": lambda: schedules.multistep(lr, milestones, gamma=gamma, **warmup),
        "polynomial": lambda: schedules.polynomial(lr, steps, power=power, end=end),
    }
    if name not in makers:
        raise unknown(config.where("name"), name, SCHEDULES)
    if name not in ("cosine", "timm_cosine", "multistep") and warmup["warmup_steps"]:
        raise ConfigError(
            f"{config.where('warmup_epochs')}={config.warmup_epochs}, but the schedule '{name}' has no warm-up; "
            "set it to 0 or use cosine, timm_cosine or multistep"
        )
    schedule = makers[name]()
    return schedules.staircase(schedule, steps_per_epoch) if per_epoch else schedule


def build_average(config: Config) -> optax.Schedule | None:
    """The decay schedule of an ``ema`` block (decay, warmup), or None where its decay is 0."""
    decay, warmup = config.positive("decay", zero=True), config.one_of("warmup", (True, False))
    return ema.decay_schedule(decay, warmup=warmup) if decay else None


def _check_only(mask: Callable[[Any], Any]) -> optax.GradientTransformation:
    def init(params):
        mask(params)
        return optax.EmptyState()

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
