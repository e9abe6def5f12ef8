"""The search spaces by name, and what the search may ask of each beyond :class:`Space`."""

from collections.abc import Callable
from dataclasses import dataclass, fields
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
      initial: where evolution starts; None: it can't.
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


def _nas_bench_201(config: Config) -> Entry:
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


def _mbv2(config: Config) -> Entry:
    space = _made(MBV2, config)
    return Entry(config.name, space, preset="imagenet_mbv2_searched", initial=space.initial)


def _autoformer(config: Config) -> Entry:
    space = _made(AutoFormer, config, size=config.name[-1])
    return Entry(config.name, space, preset="imagenet_autoformer", initial=space.sample(np.random.default_rng(0)))


def _made(space: type, config: Config, **given: Any) -> Any:
    """The space with the options of the configuration, which must be fields of its class."""
    options, known = config.options.to_dict(), {field.name for field in fields(space) if field.init} - given.keys()
    for name in options:
        if name not in known:
            raise unknown(f"{config.where('options')}", name, known)
    return space(**given, **options)


SPACES: dict[str, Callable[[Config], Entry]] = {
    "nas_bench_201": _nas_bench_201,
    "mbv2": _mbv2,
    **dict.fromkeys(("autoformer_t", "autoformer_s", "autoformer_b"), _autoformer),
}
"""Name -> function that reads the ``config.space`` block."""


def build(config: Config) -> Entry:
    """The space of a ``space`` block.

    Fields: name; options, a block of the space's own settings.

    Raises:
      ConfigError: an unknown name or option.
    """
    if config.name not in SPACES:
        raise unknown(config.where("name"), config.name, SPACES)
    return SPACES[config.name](config)
