"""The parameters of :mod:`supernet`: their structure, which is every architecture's, and how they are drawn.

The kernel of an edge lies in one slot [3, 3, C, C] whatever the edge does: a 3x3 kernel, a 1x1 kernel in its middle,
or zeros. So the parameters of all architectures have one structure, a gradient is zero where an architecture has no
weight, and nothing that sums over weights has to know the architecture.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.models.nas_bench_201 import CONV_1X1, CONV_3X3, EDGES

Params = dict[str, Any]

INITS = ("kaiming", "normal", "default")
STAGES = 3


@dataclass(frozen=True)
class Skeleton:
    """What surrounds the cells.

    Attributes:
      width: channels C of the first stage; 2 C and 4 C in the others.
      cells: a stage, N.
      num_classes: K.
      channels: of the images.
    """

    width: int = 16
    cells: int = 5
    num_classes: int = 10
    channels: int = 3

    def __post_init__(self) -> None:
        for name in ("width", "cells", "num_classes", "channels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} of the NAS-Bench-201 network must be at least 1")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the three stages."""
        return tuple(self.width * 2**stage for stage in range(STAGES))


def shapes(skeleton: Skeleton) -> dict[str, tuple[int, ...]]:
    """The parameters' shapes by name; ``.../kernel`` are weights, the others scales and biases."""
    first, *_, last = skeleton.widths
    found = {"stem/kernel": (3, 3, skeleton.channels, first), **_affine("stem", (first,))}
    for stage, width in enumerate(skeleton.widths):
        if stage:
            name, half = f"reduction{stage}", width // 2
            found |= {f"{name}/first/kernel": (3, 3, half, width), **_affine(f"{name}/first", (width,))}
            found |= {f"{name}/second/kernel": (3, 3, width, width), **_affine(f"{name}/second", (width,))}
            found[f"{name}/shortcut/kernel"] = (1, 1, half, width)
        name, stack = f"stage{stage + 1}", (skeleton.cells, len(EDGES))
        found |= {f"{name}/kernel": (*stack, 3, 3, width, width), **_affine(name, (*stack, width))}
    found |= _affine("last", (last,))
    return found | {"head/kernel": (last, skeleton.num_classes), "head/bias": (skeleton.num_classes,)}


def _affine(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}/scale": shape, f"{name}/bias": shape}


def weights_of_supernet(skeleton: Skeleton) -> int:
    """Weights of the benchmark's supernet, whose edges have a 3x3 and a 1x1 convolution each; no biases or scales."""
    return _weights(skeleton, len(EDGES) * 10)


def weights_of(architecture: np.ndarray, skeleton: Skeleton) -> int:
    """Weights of one architecture's network; no biases or scales."""
    return _weights(skeleton, int(np.sum(np.asarray([0, 0, 1, 9, 0])[architecture])))


def _weights(skeleton: Skeleton, per_cell: int) -> int:
    """With cells of ``per_cell`` C^2 weights."""
    outside = (shape for name, shape in shapes(skeleton).items() if "kernel" in name and not name.startswith("stage"))
    cells = sum(skeleton.cells * per_cell * width**2 for width in skeleton.widths)
    return cells + sum(math.prod(shape) for shape in outside)


def init(key: jax.Array, architecture: jax.Array, skeleton: Skeleton, how: str = "kaiming") -> Params:
    """Fresh parameters of one architecture; scales of normalisations are 1, their biases 0.

    Args:
      key: of the draw.
      architecture: int32 [6], may be traced.
      skeleton: of the network.
      how: the weights' distribution. "kaiming": N(0, 2 / fan_in), no bias (AZ-NAS and most proxies); "normal":
        N(0, 1), no bias (Zen); "default": PyTorch's U(+-1 / sqrt(fan_in)), the head's bias as well (TE-NAS, GradSign,
        ZiCo). The fan-in of a 1x1 edge is C, of a 3x3 edge 9 C.

    Returns:
      nested dict of float32 arrays, shapes as :func:`shapes`; slots of edges without a convolution are zero.

    Raises:
      ConfigError: another ``how``.
    """
    if how not in INITS:
        raise unknown("how", how, INITS)
    wanted = shapes(skeleton)
    drawn = [name for name in wanted if name.endswith("kernel") or (name == "head/bias" and how == "default")]
    sizes = [math.prod(wanted[name]) for name in drawn]
    # One draw for all: the time to compile a generator counts.
    total = (sum(sizes),)
    flat = jax.random.uniform(key, total, minval=-1.0) if how == "default" else jax.random.normal(key, total)
    values = {name: jnp.full(shape, name.endswith("scale"), jnp.float32) for name, shape in wanted.items()}
    start = 0
    for name, size in zip(drawn, sizes, strict=True):
        values[name] = flat[start : start + size].reshape(wanted[name])
        start += size
        if name.startswith("stage"):
            values[name] *= _slots(architecture, wanted[name][-1], how)
        else:
            fan_in = skeleton.widths[-1] if name.startswith("head") else math.prod(wanted[name][:-1])
            values[name] *= _spread(fan_in, how)
    return trees.nested(values)


def _spread(fan_in: int, how: str) -> float:
    return {"kaiming": math.sqrt(2 / fan_in), "normal": 1.0, "default": 1 / math.sqrt(fan_in)}[how]


def _slots(architecture: jax.Array, width: int, how: str) -> jax.Array:
    """The factor of each number of the edges' slots, [6, 3, 3, 1, 1]: zero where the architecture has no weight."""
    middle = jnp.zeros((3, 3)).at[1, 1].set(_spread(width, how))
    everywhere = jnp.full((3, 3), _spread(9 * width, how))
    operation = architecture[:, None, None]
    factor = jnp.where(operation == CONV_1X1, middle, 0) + jnp.where(operation == CONV_3X3, everywhere, 0)
    return factor[..., None, None]
