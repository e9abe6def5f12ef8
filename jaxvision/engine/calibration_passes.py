"""The forward passes of a training step, by what a calibration loss needs beside logits and labels.

Most losses need one pass over the batch. Mixup trains on mixed images, RegMixup on both in one pass, CRL remembers how
often each sample was right. A loss that needs something else names its own maker of :class:`Passes`
(``LossSpec.passes``), as RankMixup's do.

In the batches here ``label`` is int32 [B] (or [B, H, W]), ``where``, where there is one, bool of that shape.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxvision.engine import supervised
from jaxvision.engine.task import Batch
from jaxvision.losses.registry import LossSpec
from jaxvision.models import mixing

HISTORY, INDEX, WHERE = "history", "index", "where"

LossCall = Callable[..., Any]
"""``(logits, labels, *, where, **arrays) -> CalibrationLoss``, hyper-parameters filled in."""


def _as_it_is(module: Any) -> Any:
    return module


@dataclass(frozen=True)
class Passes:
    """What happens between a batch and a loss.

    Attributes:
      loss: ``(call, outputs, batch) -> CalibrationLoss``: gives the loss function its arguments.
      raw: ``outputs -> logits`` of the unmixed images; None where no such pass is made.
      prepare: ``(batch, key) -> batch`` before the forward pass.
      network: ``module -> module``: what is applied to ``batch["image"]`` in the place of the network.
    """

    loss: Callable[[LossCall, Any, Batch], Any]
    raw: Callable[[Any], jax.Array] | None = _as_it_is
    prepare: supervised.Prepare | None = None
    network: Callable[[Any], Any] = _as_it_is


def of(spec: LossSpec, settings: Mapping[str, Any], num_classes: int) -> Passes:
    """The passes of a loss; ``settings`` are those of ``LossSpec.mixing``."""
    maker = spec.load_passes() if spec.passes else MAKERS[spec.needs]
    return maker(settings, num_classes)


def _arguments(batch: Batch) -> tuple[jax.Array, jax.Array | None]:
    return batch["label"], batch.get(WHERE)


def logits_alone(settings: Mapping[str, Any], num_classes: int) -> Passes:
    """One pass; the loss sees logits and labels."""
    del settings, num_classes

    def loss(call: LossCall, outputs: jax.Array, batch: Batch) -> Any:
        labels, where = _arguments(batch)
        return call(outputs, labels, where=where)

    return Passes(loss)


def with_history(settings: Mapping[str, Any], num_classes: int) -> Passes:
    """One pass; the loss sees CRL's ``history`` and each row's number in the training set too."""
    del settings, num_classes

    def loss(call: LossCall, outputs: jax.Array, batch: Batch) -> Any:
        labels, where = _arguments(batch)
        return call(outputs, labels, history=batch[HISTORY], sample_index=batch[INDEX], where=where)

    return Passes(loss)


def mixed_alone(settings: Mapping[str, Any], num_classes: int) -> Passes:
    """One pass over mixed images: ``lam x + (1 - lam) x_partner``, one lam and one permutation a batch."""
    del num_classes

    def prepare(batch: Batch, key: jax.Array) -> Batch:
        mixed, partner = _mix(batch, key, settings["alpha"])
        return {**batch, **partner, "image": mixed}

    def loss(call: LossCall, outputs: jax.Array, batch: Batch) -> Any:
        labels, _ = _arguments(batch)
        return call(outputs, labels, partner_labels=batch["partner_label"], lam=batch["lam"], where=batch.get("both"))

    return Passes(loss, None, prepare)


def raw_and_mixed(settings: Mapping[str, Any], num_classes: int) -> Passes:
    """One pass over 2 N images, raw ones first: batch normalisation sees them together, as in RegMixup's code."""
    del num_classes

    def prepare(batch: Batch, key: jax.Array) -> Batch:
        mixed, partner = _mix(batch, key, settings["alpha"])
        return {**batch, **partner, "image": jnp.concatenate([batch["image"], mixed])}

    def loss(call: LossCall, outputs: jax.Array, batch: Batch) -> Any:
        labels, where = _arguments(batch)
        raw, mixed = jnp.split(outputs, 2)
        return call(
            raw,
            labels,
            mixed_logits=mixed,
            partner_labels=batch["partner_label"],
            lam=batch["lam"],
            where=where,
            mixed_where=batch.get("both"),
        )

    return Passes(loss, lambda outputs: jnp.split(outputs, 2)[0], prepare)


def _mix(batch: Batch, key: jax.Array, alpha: float) -> tuple[jax.Array, Batch]:
    """Mixed images, and what the loss needs to know of the partners."""
    images = batch["image"]
    pairs = mixing.draw_pairs(key, len(images), alpha)
    others = {name: batch[name] for name in ("image", "label")}
    if WHERE in batch:
        others[WHERE] = batch[WHERE].astype(jnp.int32)
    others = mixing.permute_rows(others, pairs.permutation)
    found = {"partner_label": others["label"], "lam": pairs.lam}
    if WHERE in batch:
        found["both"] = batch[WHERE] & (others[WHERE] > 0)
    return mixing.blend(images, others["image"], pairs.lam), found


MAKERS: dict[str, Callable[[Mapping[str, Any], int], Passes]] = {
    "logits": logits_alone,
    "history": with_history,
    "mixup": mixed_alone,
    "raw_and_mixup": raw_and_mixed,
}
