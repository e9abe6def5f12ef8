"""The MobileNetV2-type space: structures of residual units, changed block by block from one initial structure."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import numpy as np

from jaxvision.core.errors import ConfigError
from jaxvision.methods.az_nas import mbv2_program
from jaxvision.methods.az_nas.spaces.space import Architecture, Cost, Scores
from jaxvision.models import mbv2_structure
from jaxvision.models.mbv2_structure import Block, round_to_8

MAX_BLOCKS = 32
SPLIT_LAYERS = 6

TYPES = tuple((e, k) for k in mbv2_structure.KERNELS for e in mbv2_structure.EXPANSIONS)
"""(expansion, kernel) of a residual block in the official order."""

# The official code lists each block's candidates with repetitions of the types and draws from that list.
OFFICIAL_WEIGHTS = (12, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2)

_FACTORS = (2.5, 2, 1.5, 1.25, 1, 1 / 1.25, 1 / 1.5, 1 / 2, 1 / 2.5)


def channel_choices(channels: int) -> tuple[int, ...]:
    """What a width may become: its multiples by 2.5 ... 1 / 2.5, rounded to multiples of 8, the largest first."""
    return tuple(sorted({round_to_8(channels * factor) for factor in _FACTORS}, reverse=True))


def layer_choices(layers: int) -> tuple[int, ...]:
    """What a number of layers may become: up to two more or fewer, at least one."""
    return tuple(n for n in range(layers - 2, layers + 3) if n >= 1)


def split(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Residual blocks of 6 or more layers as two: 3 layers, and the others at stride 1."""

    def parts(block: Block) -> tuple[Block, ...]:
        if not block.expansion or block.layers < SPLIT_LAYERS:
            return (block,)
        first = replace(block, layers=SPLIT_LAYERS // 2)
        return first, replace(block, inputs=block.features, stride=1, layers=block.layers - first.layers)

    return tuple(itertools.chain.from_iterable(parts(block) for block in blocks))


def _chained(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """The blocks with the input widths that the ones before give."""
    widths = [blocks[0].inputs, *(block.features for block in blocks[:-1])]
    return tuple(replace(block, inputs=width) for block, width in zip(blocks, widths, strict=True))


@dataclass(frozen=True)
class MBV2:
    """Structures int32 [32, 7]: a row a block (the fields of :class:`Block` in their order), zeros behind the last.

    Attributes:
      start: the structure from which a search makes its first candidates; the official one.
      uniform_types: draw (expansion, kernel) uniformly instead of with the official code's unequal probabilities,
        which favour small kernels 3 to 1.
      cost_resolution, num_classes: of the counters; budgets are for 224 and ImageNet, whatever the scoring uses.
    """

    start: str = mbv2_structure.INITIAL
    uniform_types: bool = False
    cost_resolution: int = 224
    num_classes: int = 1000

    name: ClassVar[str] = "mbv2"
    shape: ClassVar[tuple[int, ...]] = (MAX_BLOCKS, 7)
    proxies: ClassVar[tuple[str, ...]] = ("expressivity", "progressivity", "trainability", "complexity")

    @property
    def initial(self) -> Architecture:
        """``start``, encoded."""
        return self.from_string(self.start)

    def sample(self, generator: np.random.Generator) -> Architecture | None:
        """The initial structure with one block changed: the space has no other distribution to draw from."""
        return self.mutate(self.initial, generator, 1)

    def mutate(
        self, architecture: Architecture, generator: np.random.Generator, replacements: int
    ) -> Architecture | None:
        """A copy with up to ``replacements`` blocks changed (a block drawn twice counts, but changes once).

        A residual block gets a new type, width, number of layers and bottleneck at once, the stem a new width; the 1x1
        convolution at the end stays. Strides never change. Blocks of 6 and more layers are split afterwards; None where
        that makes more than 32 blocks.

        Source: official code, ``get_new_random_structure_str``.
        """
        blocks = list(self.decode(architecture))
        drawn = set()
        for _ in range(replacements):
            index = int(generator.integers(len(blocks)))
            if index not in drawn:
                blocks[index] = self._changed(blocks[index], generator)
                drawn.add(index)
        # The official code splits once more when it reads the structure back.
        blocks = split(split(_chained(blocks)))
        return self._encode(blocks) if len(blocks) <= MAX_BLOCKS else None

    def _changed(self, block: Block, generator: np.random.Generator) -> Block:
        if not block.expansion:
            if block.kernel == 1:
                return block
            return replace(block, features=int(generator.choice(channel_choices(block.features))))
        weights = np.ones(len(TYPES)) if self.uniform_types else np.asarray(OFFICIAL_WEIGHTS)
        expansion, kernel = TYPES[generator.choice(len(TYPES), p=weights / weights.sum())]
        return replace(
            block,
            expansion=expansion,
            kernel=kernel,
            features=int(generator.choice(channel_choices(block.features))),
            layers=int(generator.choice(layer_choices(block.layers))),
            bottleneck=int(generator.choice(channel_choices(block.bottleneck))),
        )

    def decode(self, architecture: Architecture) -> tuple[Block, ...]:
        """The blocks of an encoded structure."""
        return tuple(Block(*map(int, row)) for row in architecture if row[0])

    def _encode(self, blocks: Sequence[Block]) -> Architecture:
        if len(blocks) > MAX_BLOCKS:
            raise ConfigError(
                f"a structure of {len(blocks)} blocks is longer than the {MAX_BLOCKS} of the space 'mbv2'"
            )
        rows = np.zeros(self.shape, np.int32)
        for row, block in zip(rows, blocks, strict=False):
            row[:] = (
                block.kernel, block.inputs, block.features, block.stride, block.layers, block.expansion,
                block.bottleneck,
            )  # fmt: skip
        return rows

    def to_string(self, architecture: Architecture) -> str:
        """``SuperConvK3BNRELU(3,8,2,1)SuperResIDWE6K3(8,32,2,8,1)...``."""
        return mbv2_structure.to_string(self.decode(architecture))

    def from_string(self, text: str) -> Architecture:
        """The structure of a string; says which block is malformed."""
        return self._encode(mbv2_structure.from_string(text))

    def cost(self, architecture: Architecture) -> Cost:
        """Multiply-adds, true parameters (the official ``model_size`` is smaller) and layers."""
        blocks = self.decode(architecture)
        return Cost(
            mbv2_structure.flops(blocks, self.cost_resolution, self.num_classes),
            mbv2_structure.num_params(blocks, self.num_classes),
            mbv2_structure.num_layers(blocks),
        )

    def scorer(self, resolution: int = 224, batch_size: int = 64) -> Callable[[Architecture, jax.Array], Scores]:
        """``(architecture, key) -> {expressivity, progressivity, trainability, complexity}``; see ``mbv2_program``.

        Raises:
          ConfigError: a resolution that the strides don't divide; mutation keeps those of ``start``.
        """
        mbv2_program.check_resolution(self.decode(self.initial), resolution)

        def score(architecture: Architecture, key: jax.Array) -> Scores:
            generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
            scores = mbv2_program.score(self.decode(architecture), generator, resolution, batch_size)
            return {**scores, "complexity": float(self.cost(architecture).flops)}

        return score

    def model(self, architecture: Architecture) -> tuple[str, dict[str, Any]]:
        """The network ``mbv2_searched``, with the squeeze-excite with which found structures are trained."""
        return "mbv2_searched", {"structure": self.to_string(architecture), "use_se": True}
