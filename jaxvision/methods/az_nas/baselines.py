"""The older training-free proxies beside AZ-NAS, under one interface: name -> :class:`Proxy`.

``make_baseline(name, settings)`` is a function of the architecture, compiled once for the whole space.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core.errors import ConfigError, DataError, unknown
from jaxvision.engine import parallel
from jaxvision.methods.az_nas import baseline_activations as activations
from jaxvision.methods.az_nas import baseline_gradients as gradients
from jaxvision.methods.az_nas import supernet_init
from jaxvision.methods.az_nas.supernet_init import Skeleton
from jaxvision.models import nas_bench_201

NOTHING, NOISE, DATA = "nothing", "noise", "data"
GRADSIGN_MEANS = ("supernet", "own")

Batch = Mapping[str, np.ndarray]
Baseline = Callable[..., float]
"""``(architecture int32 [6], key, batch=None) -> score``; larger is better, NaN where there is none."""


@dataclass(frozen=True)
class Settings:
    """Under which circumstances proxies are measured.

    Attributes:
      skeleton: of the network.
      resolution: H = W of noise images.
      batch_size: B of noise images.
      gradsign_mean: over the weights of the "supernet" (the paper's table) or of the architecture's "own".
    """

    skeleton: Skeleton = Skeleton()  # noqa: RUF009
    resolution: int = 32
    batch_size: int = 64
    gradsign_mean: str = "supernet"

    def __post_init__(self) -> None:
        if self.resolution < 4 or self.resolution % 4:
            raise ConfigError(f"resolution={self.resolution} must be a multiple of 4: two reductions halve the images")
        if self.batch_size < 2:
            raise ConfigError(f"batch_size={self.batch_size} must be at least 2: proxies compare images")
        if self.gradsign_mean not in GRADSIGN_MEANS:
            raise unknown("gradsign_mean", self.gradsign_mean, GRADSIGN_MEANS)


@dataclass(frozen=True)
class Proxy:
    """One proxy.

    Attributes:
      name: in configurations and tables.
      needs: "nothing" but the architecture; "noise": N(0, 1) images and uniform labels, drawn from the key; "data":
        real images and labels.
      batches: how many of them, 1 or 2.
      init: distribution of the weights, of ``supernet_init.INITS``.
      measure: ``(params, architecture, images [n, B, H, W, C], labels [n, B]) -> arrays``, traceable.
      finish: from those arrays (NumPy) to the score, on the host in float64.
    """

    name: str
    needs: str
    batches: int = 1
    init: str = "kaiming"
    measure: Callable[..., Any] | None = None
    finish: Callable[[Any], float] = float


def _log_flow(scaled: tuple[np.ndarray, np.ndarray]) -> float:
    """``ln(m exp(l))``: the same ranks as ``m exp(l)``, which float64 can't hold beyond 1e308. -inf where nothing
    flows."""
    value, log_scale = (float(part) for part in scaled)
    return math.log(value) + log_scale if value > 0 else -math.inf


_PROXIES = (
    Proxy("params", NOTHING),
    Proxy("flops", NOTHING),
    Proxy("grad_norm", NOISE, measure=gradients.grad_norm),
    Proxy("snip", DATA, measure=gradients.snip),
    Proxy("synflow", NOISE, measure=gradients.synflow, finish=_log_flow),
    Proxy("grasp", DATA, measure=gradients.grasp),
    Proxy("naswot", NOISE, measure=activations.agreement, finish=activations.log_determinant),
    Proxy("zen", NOISE, 2, init="normal", measure=activations.zen),
    Proxy("te_nas_ntk", DATA, init="default", measure=gradients.ntk, finish=activations.condition),
    Proxy("te_nas_regions", NOISE, init="default", measure=activations.agreement, finish=activations.linear_regions),
    Proxy("gradsign", DATA, init="default", measure=gradients.gradsign),
    Proxy("zico", DATA, 2, init="default", measure=gradients.zico),
)
BASELINES: dict[str, Proxy] = {proxy.name: proxy for proxy in _PROXIES}
"""TE-NAS ranks architectures by each of its two scores and adds the ranks."""


def make_baseline(name: str, settings: Settings) -> Baseline:
    """``(architecture, key, batch) -> score`` of one proxy, one compiled program for all architectures.

    Args:
      name: of ``BASELINES``.
      settings: skeleton, size of the noise.

    Returns:
      a function of an architecture int32 [6]; of a key, which names weights, noise and random labels; and of a batch
      ``{"image": float32 [n, B, H, W, C], "label": int32 [n, B]}`` of n = 1 or 2 batches of real images, normalised,
      for proxies that need some (others ignore it). Only another shape of the batch compiles again.

    Raises:
      ConfigError: an unknown name. When called, DataError: a batch that doesn't fit.
    """
    if name not in BASELINES:
        raise unknown("baseline", name, BASELINES)
    proxy = BASELINES[name]
    if proxy.needs == NOTHING:
        return lambda architecture, key=None, batch=None: _counted(name, settings, architecture)
    measure = jax.jit(_program(proxy, settings), compiler_options=parallel.compiler_options(1))

    def score(architecture: np.ndarray, key: jax.Array, batch: Batch | None = None) -> float:
        data = None if proxy.needs == NOISE else _real(proxy, settings.skeleton, batch)
        value = proxy.finish(jax.device_get(measure(jnp.asarray(architecture, jnp.int32), key, data)))
        if name == "gradsign":
            value /= _weights(settings, architecture)
        return value

    return score


def _program(proxy: Proxy, settings: Settings) -> Callable[..., Any]:
    skeleton = settings.skeleton

    def measure(architecture: jax.Array, key: jax.Array, data: tuple[jax.Array, jax.Array] | None) -> Any:
        for_weights, for_images, for_labels = jax.random.split(key, 3)
        params = supernet_init.init(for_weights, architecture, skeleton, proxy.init)
        if data is None:
            shape = (proxy.batches, settings.batch_size, settings.resolution, settings.resolution, skeleton.channels)
            labels = jax.random.randint(for_labels, shape[:2], 0, skeleton.num_classes)
            data = jax.random.normal(for_images, shape), labels
        return proxy.measure(params, architecture, *data)

    return measure


def _counted(name: str, settings: Settings, architecture: np.ndarray) -> float:
    skeleton = settings.skeleton
    network = {"num_classes": skeleton.num_classes, "width": skeleton.width, "cells": skeleton.cells}
    if name == "params":
        return float(nas_bench_201.parameters(np.asarray(architecture), **network))
    return float(nas_bench_201.flops(np.asarray(architecture), settings.resolution, **network))


def _weights(settings: Settings, architecture: np.ndarray) -> int:
    """What GradSign's sum is divided by."""
    if settings.gradsign_mean == "supernet":
        return supernet_init.weights_of_supernet(settings.skeleton)
    return supernet_init.weights_of(architecture, settings.skeleton)


def _real(proxy: Proxy, skeleton: Skeleton, batch: Batch | None) -> tuple[jax.Array, jax.Array]:
    """Images and labels of as many batches as the proxy needs."""
    wanted = proxy.batches
    if batch is None:
        raise DataError(f"the proxy '{proxy.name}' needs {wanted} batch(es) of images with labels, and got none")
    images, labels = np.asarray(batch["image"], np.float32), np.asarray(batch["label"], np.int32)
    if (
        images.ndim != 5
        or len(images) < wanted
        or images.shape[-1] != skeleton.channels
        or labels.shape != images.shape[:2]
    ):
        raise DataError(
            f"the proxy '{proxy.name}' needs image [{wanted}, B, H, W, {skeleton.channels}] and label [{wanted}, B], "
            f"but got {images.shape} and {labels.shape}"
        )
    if images.shape[2] % 4 or images.shape[3] % 4:
        raise DataError(f"images of {images.shape[2]} x {images.shape[3]} pixels: both must be multiples of 4")
    if labels.min() < 0 or labels.max() >= skeleton.num_classes:
        raise DataError(
            f"labels reach from {labels.min()} to {labels.max()}, the network has {skeleton.num_classes} classes"
        )
    return jnp.asarray(images[:wanted]), jnp.asarray(labels[:wanted])
