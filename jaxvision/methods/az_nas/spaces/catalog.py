"""The search spaces by name, and what the search may ask of each beyond :class:`Space`."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxvision.core.config import Config
from jaxvision.core.errors import unknown
from jaxvision.methods.az_nas.search import Scorer
from jaxvision.methods.az_nas.spaces.space import Architecture, Space


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


SPACES: dict[str, Callable[[Config], Entry]] = {}
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
