"""Architectures of the AutoFormer search space (Chen et al. 2021, arXiv:2107.00651): strings and counters.

An architecture is written ``E192-H4R3.5-H3R4-...``: the embedding's width, then heads and MLP ratio of each block.
"""

import re
from dataclasses import dataclass

from jaxvision.core.errors import ConfigError

HEAD_WIDTH = 64
MAX_DISTANCE = 14
"""Relative positions further away than this share one entry of the tables."""

TINY = "E192-H4R3.5-H3R3.5-H4R3.5-H4R4-H4R3.5-H4R3.5-H4R3.5-H3R3.5-H3R3.5-H4R3.5-H4R4-H4R4"
SMALL = "E384-H7R3-H7R3-H6R3-H6R4-H5R3.5-H6R3-H6R3-H6R3.5-H7R4-H7R3-H5R3-H5R3-H6R3-H7R4"
BASE = "E528-H10R3-H10R3.5-H10R3.5-H10R3.5-H10R3-H10R3.5-H10R3-H10R4-H10R4-H10R3-H10R3-H9R4-H10R3.5-H10R3-H10R4-H10R4"
"""What AZ-NAS found within the limits of AutoFormer's three sizes, as released: 5.9, 23.0 and 53.7 M parameters."""


@dataclass(frozen=True)
class Architecture:
    """One vision transformer.

    Attributes:
      embed_dim: D.
      num_heads: of each block, 64 wide each, whatever D is.
      mlp_ratio: of each block; the hidden width is ``int(D ratio)``.
    """

    embed_dim: int
    num_heads: tuple[int, ...]
    mlp_ratio: tuple[float, ...]

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.num_heads)

    @property
    def hidden(self) -> tuple[int, ...]:
        """The width inside the MLP of each block."""
        return tuple(int(self.embed_dim * ratio) for ratio in self.mlp_ratio)


def to_string(architecture: Architecture) -> str:
    """``E192-H4R3.5-H3R4``; :func:`from_string` inverts it."""
    blocks = zip(architecture.num_heads, architecture.mlp_ratio, strict=True)
    return "-".join([f"E{architecture.embed_dim}", *(f"H{heads}R{ratio:g}" for heads, ratio in blocks)])


def from_string(text: str) -> Architecture:
    """The architecture of a string.

    Raises:
      ConfigError: another form; says which block.
    """
    head, *blocks = str(text).strip().split("-")
    embedding = re.fullmatch(r"E([1-9]\d*)", head)
    if not embedding or not blocks:
        raise ConfigError(f"architecture='{text}' must start with the width and have a block: E192-H3R4-H4R3.5")
    heads, ratios = [], []
    for number, block in enumerate(blocks, start=1):
        match = re.fullmatch(r"H([1-9]\d*)R(\d+(?:\.\d+)?)", block)
        if not match or int(int(embedding[1]) * float(match[2])) < 1:
            raise ConfigError(
                f"architecture='{text}': block {number} is '{block}'; it must be heads and MLP ratio, like H3R3.5"
            )
        heads.append(int(match[1]))
        ratios.append(float(match[2]))
    return Architecture(int(embedding[1]), tuple(heads), tuple(ratios))


# --- counters ------------------------------------------------------------------------------------------------------


def flops(architecture: Architecture, patches: int = 196, patch_size: int = 16, num_classes: int = 1000) -> int:
    """Multiply-adds of one image by the official counter, on which the published numbers rest.

    It takes one token too many in the blocks (198 at 224x224, which have 197) and classifies every token.
    """
    width, tokens = architecture.embed_dim, patches + 2
    # Halves are summed first: each is one addition for two values.
    doubled = 2 * (width + patches * 3 * patch_size**2 * width + (patches + 1) * num_classes * width)
    doubled += (patches + 1) * width
    for heads, hidden in zip(architecture.num_heads, architecture.hidden, strict=True):
        inner = HEAD_WIDTH * heads
        doubled += 2 * (2 * tokens * width + tokens * width * 4 * inner + 2 * tokens**2 * inner)
        doubled += 2 * 2 * MAX_DISTANCE * tokens**2 + tokens**2 + tokens * inner
        doubled += 2 * 2 * tokens * width * hidden
    return doubled // 2


def num_params(architecture: Architecture, patches: int = 196, patch_size: int = 16, num_classes: int = 1000) -> int:
    """Trainable parameters; the official counter, with which the spaces are limited, gives the same."""
    width = architecture.embed_dim
    total = (3 * patch_size**2 + 1) * width + 2 * width + (width + 1) * num_classes + (patches + 2) * width
    for heads, hidden in zip(architecture.num_heads, architecture.hidden, strict=True):
        inner = HEAD_WIDTH * heads
        total += 4 * (2 * MAX_DISTANCE + 2) * HEAD_WIDTH + 3 * inner * (width + 1) + (inner + 1) * width
        total += 4 * width + hidden * (width + 1) + (hidden + 1) * width
    return total
