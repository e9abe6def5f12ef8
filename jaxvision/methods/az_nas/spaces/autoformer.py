"""AutoFormer's spaces T, S and B: embedding width, depth, and heads and MLP ratio of each block."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np

from jaxvision.core import rng
from jaxvision.core.errors import ConfigError
from jaxvision.methods.az_nas import autoformer_program
from jaxvision.methods.az_nas.spaces.space import Architecture, Cost, Scores
from jaxvision.models import autoformer_architecture


@dataclass(frozen=True)
class Choices:
    """What a space chooses from; the largest of each makes the supernet.

    Attributes:
      super_width: D of the supernet, at least the largest of ``widths``.
      widths: of the embedding, one for the whole network.
      heads, ratios: of each block; ratios are multiples of a half.
      depths: numbers of blocks.
    """

    super_width: int
    widths: tuple[int, ...]
    heads: tuple[int, ...]
    ratios: tuple[float, ...]
    depths: tuple[int, ...]


SIZES: dict[str, Choices] = {
    "t": Choices(256, (192, 216, 240), (3, 4), (3.5, 4.0), (12, 13, 14)),
    "s": Choices(448, (320, 384, 448), (5, 6, 7), (3.0, 3.5, 4.0), (12, 13, 14)),
    "b": Choices(640, (528, 576, 624), (9, 10), (3.0, 3.5, 4.0), (14, 15, 16)),
}
"""The official spaces. (Some of the official configurations list 8 heads for B; the search does not.)"""


@dataclass(frozen=True)
class AutoFormer:
    """Architectures int32 [2 + 2 L], L the largest depth: depth, width, the heads of each block, twice its MLP ratio.

    Numbers of absent blocks are 0.

    Attributes:
      size: a key of ``SIZES``, for the name.
      choices: None: those of ``size``.
      patch_size: pixels a side.
      supernet_seed: of the weights. All candidates are slices of one supernet; the key of a score draws its images and
        probes. (In configurations -1 stands for the run's.)
    """

    size: str = "t"
    choices: Choices | None = None
    patch_size: int = 16
    supernet_seed: int = 0

    proxies: ClassVar[tuple[str, ...]] = ("expressivity", "trainability", "complexity")

    def __post_init__(self) -> None:
        if self.choices is None:
            if self.size not in SIZES:
                raise ConfigError(f"AutoFormer size={self.size!r} is unknown; there are: {', '.join(SIZES)}")
            object.__setattr__(self, "choices", SIZES[self.size])

    @property
    def name(self) -> str:
        """``autoformer_t``."""
        return f"autoformer_{self.size}"

    @property
    def max_depth(self) -> int:
        """L."""
        return max(self.choices.depths)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an architecture."""
        return (2 + 2 * self.max_depth,)

    def sample(self, generator: np.random.Generator) -> Architecture:
        """Depth, width, and the heads and ratio of each block, each uniformly from its choices."""
        depth, width = generator.choice(self.choices.depths), generator.choice(self.choices.widths)
        heads, ratios = self._blocks(generator)
        return self._encode(depth, width, heads, ratios)

    def mutate(self, architecture: Architecture, generator: np.random.Generator, replacements: int) -> Architecture:
        """A copy in which ``replacements`` times the width, the depth or one block is drawn anew, each as probable.

        The official search draws at random only; this is for searches that evolve. A deeper child's new blocks are
        drawn too.
        """
        depth, width, heads, ratios = self._fields(architecture)
        fresh_heads, fresh_ratios = self._blocks(generator)
        heads, ratios = np.where(heads, heads, fresh_heads), np.where(ratios, ratios, fresh_ratios)
        for _ in range(replacements):
            place = int(generator.integers(depth + 2))
            if place == 0:
                depth = int(generator.choice(self.choices.depths))
            elif place == 1:
                width = int(generator.choice(self.choices.widths))
            else:
                heads[place - 2] = generator.choice(self.choices.heads)
                ratios[place - 2] = 2 * generator.choice(self.choices.ratios)
        return self._encode(depth, width, heads, ratios)

    def _blocks(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        heads = generator.choice(self.choices.heads, self.max_depth)
        return heads, (2 * generator.choice(self.choices.ratios, self.max_depth)).astype(int)

    def _encode(self, depth: int, width: int, heads: np.ndarray, ratios: np.ndarray) -> Architecture:
        present = np.arange(self.max_depth) < depth
        return np.concatenate([[depth, width], heads * present, ratios * present]).astype(np.int32)

    def _fields(self, architecture: Architecture) -> tuple[int, int, np.ndarray, np.ndarray]:
        heads, ratios = architecture[2:].reshape(2, -1)
        return int(architecture[0]), int(architecture[1]), heads.copy(), ratios.copy()

    def decode(self, architecture: Architecture) -> autoformer_architecture.Architecture:
        """The architecture as the network takes it."""
        depth, width, heads, ratios = self._fields(architecture)
        return autoformer_architecture.Architecture(
            width, tuple(map(int, heads[:depth])), tuple(float(ratio) / 2 for ratio in ratios[:depth])
        )

    def to_string(self, architecture: Architecture) -> str:
        """``E192-H4R3.5-H3R4-...``."""
        return autoformer_architecture.to_string(self.decode(architecture))

    def from_string(self, text: str) -> Architecture:
        """The inverse; ConfigError for a malformed string and for a choice that the space doesn't have."""
        found = autoformer_architecture.from_string(text)
        blocks = list(zip(found.num_heads, found.mlp_ratio, strict=True))
        wanted = [("width", found.embed_dim, self.choices.widths), ("depth", found.depth, self.choices.depths)]
        for number, (heads, ratio) in enumerate(blocks, start=1):
            wanted.append((f"number of heads of block {number}", heads, self.choices.heads))
            wanted.append((f"MLP ratio of block {number}", ratio, self.choices.ratios))
        for what, value, allowed in wanted:
            if value not in allowed:
                raise ConfigError(
                    f"architecture='{text}': the {what} is {value:g}; the space '{self.name}' has "
                    f"{', '.join(f'{choice:g}' for choice in allowed)}"
                )
        heads, ratios = (np.zeros(self.max_depth) for _ in range(2))
        heads[: found.depth], ratios[: found.depth] = found.num_heads, 2 * np.asarray(found.mlp_ratio)
        return self._encode(found.depth, found.embed_dim, heads, ratios)

    def cost(self, architecture: Architecture) -> Cost:
        """Multiply-adds and parameters at 224x224 with 1000 classes, whatever the scoring uses; blocks as layers."""
        found = self.decode(architecture)
        return Cost(autoformer_architecture.flops(found), autoformer_architecture.num_params(found), found.depth)

    def scorer(self, resolution: int = 224, batch_size: int = 64) -> Callable[[Architecture, jax.Array], Scores]:
        """``(architecture, key) -> {expressivity, trainability, complexity}``; one program for each width.

        Raises:
          ConfigError: a resolution of no whole number of patches.
        """
        if resolution < self.patch_size or resolution % self.patch_size:
            raise ConfigError(f"resolution={resolution} must be a multiple of the patch size, {self.patch_size}")

        @functools.cache
        def supernet() -> autoformer_program.Supernet:
            # With the first score: a search that is only described allocates nothing.
            choices = self.choices
            return autoformer_program.init(
                rng.key(self.supernet_seed, "az_nas/supernet"),
                choices.super_width,
                max(choices.heads),
                int(choices.super_width * max(choices.ratios)),
                self.max_depth,
                (resolution // self.patch_size) ** 2,
                self.patch_size,
            )

        def score(architecture: Architecture, key: jax.Array) -> Scores:
            depth, width, heads, ratios = self._fields(architecture)
            # int(E ratio), as the network rounds it.
            hidden = (width * ratios // 2).astype(np.int32)
            scores = autoformer_program.score(
                supernet(), np.int32(depth), heads, hidden, key,
                width=width, batch_size=batch_size, resolution=resolution,
            )  # fmt: skip
            values = {name: float(value) for name, value in jax.device_get(scores).items()}
            return {**values, "complexity": float(self.cost(architecture).flops)}

        return score

    def model(self, architecture: Architecture) -> tuple[str, dict[str, Any]]:
        """The stand-alone network ``autoformer``."""
        return "autoformer", {"architecture": self.to_string(architecture)}
