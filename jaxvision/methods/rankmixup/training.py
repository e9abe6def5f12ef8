"""RankMixup's forward passes inside a training step: the raw batch, then all its views in one pass."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxvision.engine.calibration_passes import LossCall, Passes
from jaxvision.engine.task import Batch
from jaxvision.methods.rankmixup import views


@dataclass(frozen=True)
class TwoPasses:
    """A network that takes (images, mixed images) and gives (raw logits, mixed logits): :func:`views.forward_twice`."""

    module: Any

    def apply(
        self, variables: Any, images: tuple[jax.Array, jax.Array], *, train: bool, rngs: Any, mutable: list[str]
    ) -> tuple[tuple[jax.Array, jax.Array], Any]:
        """As a module's, in training mode alone; ``mutable`` is all but ``params`` anyway."""
        del train, mutable
        raw, mixed, state = views.forward_twice(self.module, variables, *images, rngs)
        return (raw, mixed), state


def mrl_passes(settings: Mapping[str, Any], num_classes: int) -> Passes:
    """For MRL: ``settings`` are those of :func:`views.mixed_views`: ``alpha``, ``num_views``, ``per_sample``."""

    def loss(call: LossCall, outputs: tuple[jax.Array, jax.Array], batch: Batch) -> Any:
        keep = batch["keep"]
        return call(*outputs, batch["label"], keep[0] if len(keep) == 1 else keep, where=batch.get("where"))

    return _passes(settings, num_classes, loss)


def mndcg_passes(settings: Mapping[str, Any], num_classes: int) -> Passes:
    """For M-NDCG: ``settings`` are those of :func:`views.mixed_views`: ``alpha``, ``num_views``, ``per_sample``."""

    def loss(call: LossCall, outputs: tuple[jax.Array, jax.Array], batch: Batch) -> Any:
        return call(*outputs, batch["label"], batch["relevance"], where=batch.get("where"))

    return _passes(settings, num_classes, loss)


def _passes(settings: Mapping[str, Any], num_classes: int, loss: Callable[..., Any]) -> Passes:
    def prepare(batch: Batch, key: jax.Array) -> Batch:
        drawn = views.mixed_views(key, batch["image"], batch["label"], num_classes=num_classes, **settings)
        return {
            **batch,
            "image": (batch["image"], drawn.images),
            "keep": drawn.keep,
            "relevance": drawn.relevance,
        }

    return Passes(loss, lambda outputs: outputs[0], prepare, TwoPasses)
