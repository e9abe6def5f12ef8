"""How a quantized network is judged: accuracy, divergence from the float network, and SQNR, as evaluations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import struct
from jaxvision.engine.task import Batch, EvalData
from jaxvision.methods.igq_vit import allocation, integer, simulate
from jaxvision.methods.igq_vit.calibration import QuantizedNetwork
from jaxvision.methods.igq_vit.sites import ApplyFn
from jaxvision.metrics import Mean, classification


@struct.dataclass
class Exact:
    """A whole number as a metric, int64 () on the host: BOPs have more digits than float32 holds."""

    value: np.int64

    @classmethod
    def of(cls, value: int) -> "Exact":
        """The metric of one number."""
        return cls(np.int64(value))

    def merge(self, other: "Exact") -> "Exact":
        """The sum."""
        return Exact(self.value + other.value)

    def compute(self) -> np.int64:
        """The number."""
        return self.value


@struct.dataclass
class Power:
    """Signal and noise power at one site, float32 (); merges by addition, computes to the SQNR in dB."""

    signal: jax.Array
    noise: jax.Array

    def merge(self, other: "Power") -> "Power":
        return Power(self.signal + other.signal, self.noise + other.noise)

    def compute(self) -> jax.Array:
        """10 log10(signal / noise)."""
        return 10 * jnp.log10(self.signal / self.noise)


class WithReference:
    """Evaluation batches with the float network's logits: leaf ``reference``, float32 (B, K), computed once.

    Args:
      data: the batches.
      predict: images (B, H, W, C) -> logits (B, K) of the float network.
    """

    def __init__(self, data: EvalData, predict: Callable[[Any], jax.Array]):
        self._data, self._predict = data, predict
        self.num_batches, self.batch_size = data.num_batches, data.batch_size
        self._logits: dict[tuple[int, int, int], np.ndarray] = {}

    def batch_at(self, index: int, shard_index: int = 0, shard_count: int = 1) -> Batch:
        """The batch of ``data`` (see there), and ``reference``."""
        batch = self._data.batch_at(index, shard_index, shard_count)
        key = (index, shard_index, shard_count)
        if key not in self._logits:
            self._logits[key] = np.asarray(self._predict(batch["image"]))
        return {**batch, "reference": self._logits[key]}


def judge(apply_fn: ApplyFn) -> Callable[[QuantizedNetwork, Batch], dict[str, Any]]:
    """The evaluation ``(network, batch) -> metrics``: the quantized network against the float one.

    Metrics over the rows with mask 1: ``accuracy`` and ``float_accuracy`` of the two against the labels; ``kl``,
    KL(softmax reference || softmax quantized) in nats; ``agreement`` of the two argmaxes. ``reference``: see
    :class:`WithReference`. A network with ``layers`` runs in integers, any other is simulated; simulated ones whose
    quantizers have the same classes and shapes are one program.
    """

    def update(network: QuantizedNetwork, batch: Batch) -> dict[str, Any]:
        variables, quantizers, images = network.variables, network.quantizers, batch["image"]
        if network.layers is None:
            logits = simulate.forward(apply_fn, variables, quantizers, simulate.switches(quantizers), images)
        else:
            logits = integer.forward_int(
                apply_fn, variables, quantizers, network.layers, images, one_product=network.one_product
            )
        reference, mask = batch["reference"], batch["mask"]
        return {
            "accuracy": classification.accuracy(logits, batch["label"], mask),
            "float_accuracy": classification.accuracy(reference, batch["label"], mask),
            "kl": Mean.of(allocation.kl_divergence(reference, logits), mask),
            "agreement": Mean.of(jnp.argmax(reference, -1) == jnp.argmax(logits, -1), mask),
        }

    return update


def sqnr(apply_fn: ApplyFn) -> Callable[[QuantizedNetwork, Batch], dict[str, Power]]:
    """The evaluation ``(network, batch) -> {"sqnr/<site>": Power}``.

    The noise is that of quantizing the value which reaches a site when no activation is quantized (kernels are), so
    one site's error doesn't reach another.
    """

    def update(network: QuantizedNetwork, batch: Batch) -> dict[str, Power]:
        off = simulate.switches(network.quantizers, False)
        _, powers = simulate.forward_with_noise(apply_fn, network.variables, network.quantizers, off, batch["image"])
        real = batch["mask"] > 0
        return {
            f"sqnr/{name}": Power(jnp.sum(jnp.where(real, signal, 0)), jnp.sum(jnp.where(real, noise, 0)))
            for name, (signal, noise) in powers.items()
        }

    return update
