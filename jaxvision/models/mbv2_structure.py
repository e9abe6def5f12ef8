"""Structures of the MobileNetV2-type search space of ZenNAS, ZiCo and AZ-NAS: strings, units, counters.

A structure is a chain of blocks, written ``SuperConvK{k}BNRELU(in,out,stride,layers)`` and
``SuperResIDWE{e}K{k}(in,out,stride,bottleneck,layers)``, one behind the other.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxvision.core.errors import ConfigError

EXPANSIONS = (1, 2, 4, 6)
KERNELS = (3, 5, 7)
STRIDES = (1, 2)

INITIAL = (
    "SuperConvK3BNRELU(3,8,2,1)SuperResIDWE6K3(8,32,2,8,1)SuperResIDWE6K3(32,48,2,32,1)"
    "SuperResIDWE6K3(48,96,2,48,1)SuperResIDWE6K3(96,128,2,96,1)SuperConvK1BNRELU(128,2048,1,1)"
)
"""From which every search starts: 162 million multiply-adds at 224x224."""

_CONV = re.compile(r"SuperConvK(\d+)BNRELU\((\d+),(\d+),(\d+),(\d+)\)")
_RESIDUAL = re.compile(r"SuperResIDWE(\d+)K(\d+)\((\d+),(\d+),(\d+),(\d+),(\d+)\)")


def round_to_8(channels: float) -> int:
    """The multiple of 8 nearest to ``channels`` (halves to the even one), at least 8."""
    return max(8, 8 * round(channels / 8))


@dataclass(frozen=True)
class Block:
    """One block of a structure.

    Attributes:
      kernel: k of its convolutions.
      inputs, features: channels before and behind it.
      stride: of its first layer.
      layers: L. A convolution block has L convolutions, a residual one 2 L residual units.
      expansion: e, hidden channels over output channels of a unit; 0 makes it a convolution block.
      bottleneck: b, channels between the two units of a layer; 0 in a convolution block.
    """

    kernel: int
    inputs: int
    features: int
    stride: int
    layers: int
    expansion: int = 0
    bottleneck: int = 0

    def __str__(self) -> str:
        if not self.expansion:
            return f"SuperConvK{self.kernel}BNRELU({self.inputs},{self.features},{self.stride},{self.layers})"
        return (
            f"SuperResIDWE{self.expansion}K{self.kernel}"
            f"({self.inputs},{self.features},{self.stride},{self.bottleneck},{self.layers})"
        )


@dataclass(frozen=True)
class Unit:
    """One residual unit, or (``hidden=0``) one convolution, each with its normalisations and a ReLU at the end.

    Attributes:
      projection: whether the shortcut is a strided 1x1 convolution instead of the input itself.
    """

    kernel: int
    inputs: int
    hidden: int
    features: int
    stride: int
    projection: bool = False


def units(blocks: Sequence[Block]) -> tuple[Unit, ...]:
    """The units of a structure in order; the output of each is a feature for AZ-NAS."""
    return tuple(unit for block in blocks for unit in _units(block))


def _units(block: Block) -> Iterator[Unit]:
    for layer in range(block.layers):
        inputs, stride = (block.inputs, block.stride) if layer == 0 else (block.features, 1)
        if not block.expansion:
            yield Unit(block.kernel, inputs, 0, block.features, stride)
            continue
        b, features = block.bottleneck, block.features
        hidden = round_to_8(b * block.expansion)
        # The first shortcut of a block is a projection even where the shapes agree (official code).
        yield Unit(block.kernel, inputs, hidden, b, stride, projection=layer == 0 or inputs != b)
        yield Unit(block.kernel, b, round_to_8(features * block.expansion), features, 1, projection=b != features)


# --- strings -------------------------------------------------------------------------------------------------------


def to_string(blocks: Sequence[Block]) -> str:
    """The structure as one string without blanks."""
    return "".join(str(block) for block in blocks)


def from_string(text: str) -> tuple[Block, ...]:
    """The blocks of a structure string; blanks don't count.

    Raises:
      ConfigError: says which block is malformed, or doesn't fit the one before it.
    """
    parts = [part for part in re.split(r"(?=Super)", "".join(str(text).split())) if part]
    if not parts:
        raise ConfigError(f"structure='{text}' must be blocks such as those of the initial structure, {INITIAL}")
    blocks: list[Block] = []
    for number, part in enumerate(parts, start=1):
        block = _block(part, f"block {number} of the structure, '{part}',")
        before = blocks[-1].features if blocks else 3
        if block.inputs != before:
            what = f"block {number - 1} gives {before}" if blocks else "an image has 3"
            raise ConfigError(f"block {number} of the structure, '{part}', takes {block.inputs} channels but {what}")
        blocks.append(block)
    return tuple(blocks)


def _block(part: str, where: str) -> Block:
    if match := _CONV.fullmatch(part):
        kernel, inputs, features, stride, layers = map(int, match.groups())
        block = Block(kernel, inputs, features, stride, layers)
        if kernel not in (1, *KERNELS):
            raise ConfigError(f"{where} has kernel size {kernel}; there are {(1, *KERNELS)}")
    elif match := _RESIDUAL.fullmatch(part):
        expansion, kernel, inputs, features, stride, bottleneck, layers = map(int, match.groups())
        block = Block(kernel, inputs, features, stride, layers, expansion, bottleneck)
        if kernel not in KERNELS or expansion not in EXPANSIONS:
            raise ConfigError(
                f"{where} has expansion {expansion} and kernel size {kernel}; there are {EXPANSIONS} and {KERNELS}"
            )
        if bottleneck < 1:
            raise ConfigError(f"{where} must have a bottleneck of at least 1 channel")
    else:
        raise ConfigError(
            f"{where} must be like SuperConvK3BNRELU(in,out,stride,layers) or "
            "SuperResIDWE6K3(in,out,stride,bottleneck,layers)"
        )
    if stride not in STRIDES or layers < 1 or features < 1:
        raise ConfigError(f"{where} must have stride 1 or 2, and at least one layer and one channel")
    return block


# --- counters ------------------------------------------------------------------------------------------------------


def num_layers(blocks: Sequence[Block]) -> int:
    """The sum of L over all blocks, convolution blocks included, as the budgets count layers."""
    return sum(block.layers for block in blocks)


def total_stride(blocks: Sequence[Block]) -> int:
    """Pixels of the image a side for one of the last feature map."""
    return math.prod(block.stride for block in blocks)


def flops(blocks: Sequence[Block], resolution: int = 224, num_classes: int = 1000) -> int:
    """Multiply-adds of one square image by the official counter, on which budgets and published numbers rest.

    Normalisations count one operation a value. The counter measures a projection at the size behind the block, divided
    by the stride once more: at stride 2 a quarter of its true cost. That is kept.
    """
    total, size = 0, resolution
    for unit in units(blocks):
        out = size // unit.stride
        if not unit.hidden:
            total += unit.inputs * unit.features * unit.kernel**2 * size**2 // unit.stride**2 + out**2 * unit.features
        else:
            total += unit.inputs * unit.hidden * size**2 + size**2 * unit.hidden
            total += unit.hidden * unit.kernel**2 * size**2 // unit.stride**2 + out**2 * unit.hidden
            total += unit.hidden * unit.features * out**2 + out**2 * unit.features
        if unit.projection:
            total += (unit.inputs + 1) * unit.features * out**2 // unit.stride**2
        size = out
    return total + blocks[-1].features * num_classes


def num_params(blocks: Sequence[Block], num_classes: int = 1000) -> int:
    """Trainable parameters, without squeeze-excite."""
    return _weights(blocks, per_norm=2, projection_norms=True) + blocks[-1].features * num_classes + num_classes


def model_size(blocks: Sequence[Block], num_classes: int = 1000) -> int:
    """The official counter of parameters, for budgets only: one value a normalised channel, none of a projection."""
    return _weights(blocks, per_norm=1, projection_norms=False) + blocks[-1].features * num_classes + 1


def _weights(blocks: Sequence[Block], per_norm: int, projection_norms: bool) -> int:
    total = 0
    for unit in units(blocks):
        if not unit.hidden:
            total += unit.inputs * unit.features * unit.kernel**2 + per_norm * unit.features
        else:
            total += unit.hidden * (unit.inputs + unit.kernel**2 + unit.features)
            total += per_norm * (2 * unit.hidden + unit.features)
        if unit.projection:
            total += (unit.inputs + 1) * unit.features + (per_norm * unit.features if projection_norms else 0)
    return total
