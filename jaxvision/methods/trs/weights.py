"""Weight files: what a run starts from, a float network or the quantized one of a run before."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxvision.core import trees
from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.engine import arms, parallel, quantized_files
from jaxvision.engine import seeds as seed_axis
from jaxvision.engine.recipes import Data, Model, build_model
from jaxvision.engine.task import State
from jaxvision.methods.trs.training import Trainer
from jaxvision.models import weight_file
from jaxvision.models.quantized_attention import is_size

SCALES = ("kernel_scale", "input_scale", "input_alpha", "output_scale")
"""Fields whose start value comes from the data and mustn't be 0."""


def load_model(config: Config, data: Data) -> tuple[Model, dict[str, str] | None]:
    """The network of a ``model`` block, and the metadata of ``init_from`` where that is a quantized network's file.

    The variables of a quantized file aren't read here, as their names depend on the arms; :func:`load_quantized` does.
    """
    path = config.init_from
    metadata = weight_file.read_metadata(path) if path else {}
    if "bits" not in metadata:
        return build_model(config, data), None
    if metadata.get("model") != config.name:
        raise ConfigError(f"{config.where('init_from')}={path!r} holds a {metadata.get('model')}, not a {config.name}")
    if config.init_keep:
        raise ConfigError(f"{config.where('init_keep')} is for float weights, but {path!r} holds a quantized network")
    return build_model(Config({**config.to_dict(), "init_from": ""}, "config.model"), data), metadata


def load_quantized(path: str, found: Mapping[str, str], trainers: tuple[Trainer, ...], model: Model) -> Any:
    """The variables of a quantized network's file.

    Raises:
      ConfigError: an arm has other quantizers or another bit width.
      DataError: the file doesn't fit the network.
    """
    saved = json.loads(found["bits"])
    for trainer in trainers:
        name, asked = trainer.variant.name, quantized_files.widths(trainer.network, model.image)
        if found["family"] != trainer.variant.family:
            raise ConfigError(
                f"{path} holds a network with quantizers of the family {found['family']!r}, but the arm {name!r} has "
                f"{trainer.variant.family!r}; leave the arm out, or start from float weights"
            )
        if layer := next((layer for layer in {**saved, **asked} if saved.get(layer) != asked.get(layer)), None):
            raise ConfigError(
                f"{path} holds a network whose {layer} has {_text(saved.get(layer))}, but the arm {name!r} asks for "
                f"{_text(asked.get(layer))}; start from float weights, or set config.quantization to the file's bits"
            )
    shapes = jax.eval_shape(trainers[0].network.init, jax.eval_shape(lambda: jax.random.key(0)), model.image)
    return weight_file.load_variables(path, shapes)


@dataclass(frozen=True)
class Start:
    """Where the arms of a run start from.

    Attributes:
      path: the weights file; "": none.
      fresh: key -> variables of the network, before anything is trained or loaded.
      read: fresh variables of a seed -> the file's, with those that ``init_keep`` keeps; None without a file.
      trainers: the arms.
      seeds: of the run.
    """

    path: str
    fresh: Callable[[Any], Any]
    read: Callable[[Any], Any] | None
    trainers: tuple[Trainer, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(
        cls,
        path: str,
        model: Model,
        quantized: Mapping[str, str] | None,
        trainers: tuple[Trainer, ...],
        seeds: tuple[int, ...],
    ) -> "Start":
        """The start of a run; ``model`` and ``quantized`` are what :func:`load_model` gives."""
        if quantized is not None:
            variables = load_quantized(path, quantized, trainers, model)
            return cls(path, trainers[0].fresh, lambda fresh: variables, trainers, seeds)
        return cls(path, model.init, None if model.pretrained is None else model.load, trainers, seeds)

    def init(self, key: Any) -> State:
        """See :class:`jaxvision.engine.task.Task`."""
        return arms.start_state(self.fresh, self.seeds, key)

    def load(self, state: State) -> State:
        """Every seed starts from the file's variables; raises ConfigError where a scale would start at 0."""
        loaded = arms.load_start(self.read, state)
        check_scales(seed_axis.member(loaded.extra[arms.START], 0), self.trainers, self.path)
        return loaded


def check_scales(variables: Any, trainers: tuple[Trainer, ...], path: str) -> None:
    """Raises ConfigError where an arm's quantizers would start with a scale of 0, or one that isn't finite.

    Args:
      variables: those of ``model.init_from``, host arrays.
      trainers: the arms; those with the same family have the same start, so one of each is tried.
      path: for the message.
    """
    for trainer in {trainer.variant.family: trainer for trainer in trainers}.values():
        fitted = jax.jit(trainer.quantized, compiler_options=parallel.compiler_options(0))
        params = fitted(variables, jax.random.key(0))["params"]
        for name, value in trees.named_leaves(params).items():
            leaf = name.rpartition("/")[-1]
            if (leaf in SCALES or is_size(leaf)) and not (np.isfinite(value) & (value != 0)).all():
                raise ConfigError(
                    f"{path}: {name} of the arm {trainer.variant.name!r} starts at {np.ravel(value)[0]:g}, as what it "
                    "is fitted to is constant or not finite; look at that layer's weights and at the calibration images"
                )


def _text(bits: list[int | None] | None) -> str:
    if bits is None:
        return "no quantizers"
    return "".join(f"{letter}{32 if width is None else width}" for letter, width in zip("WA", bits, strict=True))
