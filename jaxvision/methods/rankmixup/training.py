"""RankMixup's forward passes inside a training step: the raw batch, then all its views in one pass."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.engine.calibration_passes import LossCall, Passes
from jaxvision.engine.task import Batch
from jaxvision.methods.rankmixup import forward, views


@dataclass(frozen=True)
class TwoPasses:
    """A network that takes (images, what its second pass needs) and gives (raw logits, mixed logits).

    Attributes:
      passes: :func:`forward.forward_twice` or :func:`forward.forward_mixed_features`.
      module: the network.
    """

    passes: Callable[..., Any]
    module: Any

    def apply(
        self, variables: Any, images: tuple[jax.Array, ...], *, train: bool, rngs: Any, mutable: list[str]
    ) -> tuple[tuple[jax.Array, jax.Array], Any]:
        """As a module's, in training mode alone; ``mutable`` is all but ``params`` anyway."""
        del train, mutable
        raw, mixed, state = self.passes(self.module, variables, *images, rngs)
        return (raw, mixed), state


def mrl_passes(settings: Mapping[str, Any], num_classes: int) -> Passes:
    """For MRL: ``settings`` are those of :func:`views.mixed_views`, and ``layer``: where views are mixed.

    Raises:
      ConfigError: an unknown layer, or CutMix of features.
    """

    def loss(call: LossCall, outputs: tuple[jax.Array, jax.Array], batch: Batch) -> Any:
        keep = batch["keep"]
        return call(*outputs, batch["label"], keep[0] if len(keep) == 1 else keep, where=batch.get("where"))

    return _passes(settings, num_classes, loss)


def mndcg_passes(settings: Mapping[str, Any], num_classes: int) -> Passes:
    """For M-NDCG; settings and errors as of :func:`mrl_passes`."""

    def loss(call: LossCall, outputs: tuple[jax.Array, jax.Array], batch: Batch) -> Any:
        return call(*outputs, batch["label"], batch["relevance"], where=batch.get("where"))

    return _passes(settings, num_classes, loss)


def _passes(settings: Mapping[str, Any], num_classes: int, loss: Callable[..., Any]) -> Passes:
    settings = dict(settings)
    layer = settings.pop("layer")
    if layer not in forward.LAYERS:
        raise unknown("layer", layer, forward.LAYERS)
    if layer == "features" and settings["mix"] != "mixup":
        raise ConfigError(
            f"layer='features' with mix={settings['mix']!r} would cut boxes out of vectors; use mix='mixup', or "
            "layer='input'"
        )

    def prepare(batch: Batch, key: jax.Array) -> Batch:
        image, label = batch["image"], batch["label"]
        if layer == "input":
            drawn = views.mixed_views(key, image, label, num_classes=num_classes, **settings)
            images = image, drawn.images
        else:
            drawn = views.draw_views(key, label, **{name: settings[name] for name in settings if name != "mix"})
            images = image, drawn.lam, drawn.perm
        return {**batch, "image": images, "keep": drawn.keep, "relevance": drawn.relevance}

    passes = forward.forward_twice if layer == "input" else forward.forward_mixed_features
    return Passes(loss, lambda outputs: outputs[0], prepare, functools.partial(TwoPasses, passes))
