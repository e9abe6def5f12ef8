"""The search spaces by name, and what the search may ask of each beyond :class:`Space`."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from jaxvision.core.config import Config
from jaxvision.core.errors import unknown
from jaxvision.methods.az_nas.search import Scorer
from jaxvision.methods.az_nas.spaces.autoformer import AutoFormer
from jaxvision.methods.az_nas.spaces.mbv2 import MBV2
from jaxvision.methods.az_nas.spaces.nb201 import NasBench201Space
from jaxvision.methods.az_nas.spaces.space import Architecture, Space
from jaxvision.models import nas_bench_201


@dataclass(frozen=True)
class Entry:
    """A space, ready to be searched.

    Attributes:
      name: in ``config.space.name``.
      space: the space.
      preset: of ``configs/classification.py``, with which what was found trains.
      initial: where evolution starts; None: at a random architecture within the budget.
      size: how many architectures there are, where they can be numbered; else 0.
      at, number: the architecture of a number below ``size``, and its inverse.
      canonical: the architecture that stands for all that compute the same function.
      in_benchmark: whether NAS-Bench-201's table has their accuracies, by ``number``.
      network: width and cells of the NAS-Bench-201 network, for the proxies of other papers, which know no other.
      batched: ``(resolution, batch_size, together) -> scorer`` of several architectures at once, for accelerators.
    """

    name: str
    space: Space
    preset: str
    initial: Architecture | None = None
    size: int = 0
    at: Callable[[int], Architecture] | None = None
    number: Callable[[Architecture], int] | None = None
    canonical: Callable[[Architecture], Architecture] | None = None
    in_benchmark: bool = False
    network: dict[str, int] | None = None
    batched: Callable[[int, int, int], Scorer] | None = None


def _nas_bench_201(config: Config, seed: int) -> Entry:
    del seed
    space = _made(NasBench201Space, config)
    return Entry(
        config.name,
        space,
        preset="",
        initial=np.full(space.shape, nas_bench_201.SKIP, np.int32),
        size=nas_bench_201.NUM_ARCHITECTURES,
        at=nas_bench_201.from_index,
        number=nas_bench_201.to_index,
        canonical=space.function,
        in_benchmark=True,
        network={"width": space.width, "cells": space.num_cells},
        batched=space.batched_scorer,
    )


def _mbv2(config: Config, seed: int) -> Entry:
    del seed
    space = _made(MBV2, config)
    return Entry(config.name, space, preset="imagenet_mbv2_searched", initial=space.initial)


def _autoformer(config: Config, seed: int) -> Entry:
    space = _made(AutoFormer, config, size=config.name[-1])
    if space.supernet_seed < 0:
        space = replace(space, supernet_seed=seed)
    return Entry(config.name, space, preset="imagenet_autoformer")


def _made(space: type, config: Config, **given: Any) -> Any:
    """The space with the options of the configuration, which must be fields of its class."""
    options, known = config.options, {field.name for field in fields(space) if field.init} - given.keys()
    for name, value in options.to_dict().items():
        if name not in known:
            raise unknown(config.where("options"), name, known)
        if isinstance(value, int) and not isinstance(value, bool) and name != "supernet_seed":
            options.positive(name)
    return space(**given, **options.to_dict())


SPACES: dict[str, Callable[[Config, int], Entry]] = {
    "nas_bench_201": _nas_bench_201,
    "mbv2": _mbv2,
    **dict.fromkeys(("autoformer_t", "autoformer_s", "autoformer_b"), _autoformer),
}
"""Name -> function of the ``config.space`` block and the run's seed."""


def build(config: Config, seed: int = 0) -> Entry:
    """The space of a ``space`` block.

    Fields: name; options, a block of the space's own settings.

    Args:
      config: the block.
      seed: of the run; AutoFormer's supernet has it, unless the option ``supernet_seed`` says another.

    Raises:
      ConfigError: an unknown name or option, or a value that can't work.
    """
    if config.name not in SPACES:
        raise unknown(config.where("name"), config.name, SPACES)
    return SPACES[config.name](config, seed)
