"""The quantization sites of a network: finding them, and looking at the float network's values there.

A site is a named tap of the network (``core.types.Tap``), called by the timm name of the module whose input it is.
Here and in the rest of the method a network is ``apply_fn(variables, images, tap=tap) -> logits``, float32 images
(B, H, W, 3) and logits (B, K); ``module.apply`` of this package's transformers is one.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.methods.igq_vit import groups
from jaxvision.quant import activation

ApplyFn = Callable[..., jax.Array]
KINDS: tuple[tuple[str, str], ...] = (
    (r"^patch_embed\.proj$", "image"),
    (r"\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2|downsample\.reduction)$", "channels"),
    (r"\.attn\.softmax$", "rows"),
    (r"(\.attn\.[qkv]|^head(_dist|\.fc)?)$", "tensor"),
)
"""(pattern, kind): the first pattern found in a tap's name decides; a tap that matches none is no site."""


@dataclass(frozen=True)
class Site:
    """One quantized tensor.

    Attributes:
      name: of the tap, such as "blocks.0.attn.qkv".
      kind: "image" (always 8 bit), "channels" (input of an FC layer), "rows" (attention) or "tensor".
      shape: of the value for one image; the first axis counts its windows (1 without windows).
      weight: name of the kernel that the value is multiplied with, such as "blocks_0/attn/qkv/kernel"; None for
        attention.
      fan_out: output channels of that kernel, 0 for attention.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weight: str | None
    fan_out: int

    @property
    def grouped(self) -> bool:
        """Whether instance-aware groups apply."""
        return self.kind in ("channels", "rows")

    @property
    def one_token(self) -> bool:
        """Whether it is the input of an FC layer that sees one token an image, as the classifier's."""
        return self.kind == "tensor" and self.weight is not None

    @property
    def tokens(self) -> int:
        """N of an FC input (all windows of an image together)."""
        return int(np.prod(self.shape[:-1]))


def _kernel_of(name: str, kernels: Mapping[str, Any]) -> str | None:
    """The kernel for a timm module name: its own, or its parent's (``head.fc`` is ``head``)."""
    path = re.sub(r"\.(\d+)", r"_\1", name).replace(".", "/")
    return next((k for k in (f"{path}/kernel", f"{path.rpartition('/')[0]}/kernel") if k in kernels), None)


def list_sites(
    apply_fn: ApplyFn,
    variables: Any,
    image_shape: Sequence[int],
    kinds: Sequence[tuple[str, str]] = KINDS,
) -> tuple[Site, ...]:
    """The sites in the order of the forward pass, by an abstract trace (no computation).

    An FC input of one token has nothing to take a minimum over and is listed as "tensor".

    Args:
      apply_fn, variables: the network; ``variables`` may be ``ShapeDtypeStruct`` s.
      image_shape: (H, W, C).
      kinds: see :data:`KINDS`.

    Raises:
      ConfigError: the network has no site, or names one twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def tap(name: str, x: jax.Array) -> jax.Array:
        if name in shapes:
            raise ConfigError(f"the network taps {name!r} twice; sites need names of their own")
        shapes[name] = x.shape
        return x

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    jax.eval_shape(lambda v, x: apply_fn(v, x, tap=tap), variables, image)
    kernels = trees.named_leaves(variables["params"])
    found = []
    for name, shape in shapes.items():
        kind = next((kind for pattern, kind in kinds if re.search(pattern, name)), None)
        if kind is None:
            continue
        weight = _kernel_of(name, kernels)
        kind = "tensor" if kind == "channels" and np.prod(shape[:-1]) == 1 else kind
        found.append(Site(name, kind, shape, weight, kernels[weight].shape[-1] if weight else 0))
    if not found:
        raise ConfigError(f"the network has no quantization site among its taps ({', '.join(shapes) or 'none'})")
    return tuple(found)


@partial(jax.jit, static_argnames=("apply_fn", "sites", "look"))
def _look(apply_fn: ApplyFn, variables: Any, images: jax.Array, sites: tuple[Site, ...], look: Callable) -> Any:
    kinds = {site.name: site.kind for site in sites}
    seen = {}

    def tap(name: str, x: jax.Array) -> jax.Array:
        if name in kinds:
            seen[name] = look(kinds[name], x, images.shape[0])
        return x

    apply_fn(variables, images, tap=tap)
    return seen


def _chunked(look: Callable, apply_fn: ApplyFn, variables: Any, images: Any, sites: Any, chunk: int) -> Any:
    """``look(kind, x, batch_size)`` at each site, ``chunk`` images at a time, joined along axis 0 on the host."""
    images, parts = np.asarray(images), []
    chunk = min(chunk, len(images))
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk]
        padded = np.concatenate([part, np.repeat(part[:1], chunk - len(part), axis=0)])
        seen = jax.device_get(_look(apply_fn, variables, padded, tuple(sites), look))
        parts.append({name: value[: len(value) // chunk * len(part)] for name, value in seen.items()})
    return {site.name: np.concatenate([part[site.name] for part in parts]) for site in sites}


def _values(kind: str, x: jax.Array, batch_size: int) -> jax.Array:
    del kind, batch_size
    return x


def site_range(kind: str, x: jax.Array, batch_size: int) -> jax.Array:
    """Minimum and maximum: "channels" (B, C, 2), "rows" (B * windows, H, N, 2), other kinds, of each image, (B, 2)."""
    if kind == "channels":
        return groups.channel_range(activation.per_instance(x, batch_size))
    return groups.row_range(x if kind == "rows" else x.reshape(batch_size, -1))


def _window_range(kind: str, x: jax.Array, batch_size: int) -> jax.Array:
    return site_range(kind, x, x.shape[0] if kind == "channels" else batch_size)


RANGES = {"image": site_range, "window": _window_range}
"""``(kind, x, batch_size) -> ranges`` by what has a range of its own: FC inputs of an image, or of each window."""


def collect(
    apply_fn: ApplyFn, variables: Any, images: Any, sites: Iterable[Site], chunk: int = 32
) -> dict[str, np.ndarray]:
    """The float network's values at the sites, on the host: name -> array whose first axis is images * windows.

    Everything is kept: ask for few sites of a large network. One compiled program for a set of sites.
    """
    return _chunked(_values, apply_fn, variables, images, tuple(sites), chunk)


def collect_ranges(
    apply_fn: ApplyFn, variables: Any, images: Any, sites: Iterable[Site], chunk: int = 32, instance: str = "image"
) -> dict[str, np.ndarray]:
    """:func:`site_range` of the float network at the sites, pooled over chunks; no activation is stored.

    ``instance="window"``: the ranges of FC inputs are those of each window, (images * windows, C, 2).
    """
    return _chunked(RANGES[instance], apply_fn, variables, images, tuple(sites), chunk)
