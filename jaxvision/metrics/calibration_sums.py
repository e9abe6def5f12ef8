"""Calibration inside the engine's evaluation: the ECE as a metric object that merges by adding its arrays.

Confidences are summed as integers: ``round(r 2^30)``, cut into digits of 11 bits. Integer sums don't depend on their
order, so the same confidences give bit for bit the same bins in every batch size and on every device count, and a bin
of a hundred million pixels is as exact as one of ten; float32 sums would stall at 2^24. The rounding is 2^-31.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import struct
from jaxvision.metrics import calibration
from jaxvision.metrics.calibration import NUM_BINS, Bins

_DIGIT = 11
_DIGITS = 6
_FRACTION = 30
_CHUNK = 1 << 20
"""Rows after which carries are moved on: 2^20 digits below 2^11 stay below 2^31."""


@struct.dataclass
class ExactBins:
    """The integer sums behind :class:`~jaxvision.metrics.calibration.Bins`.

    Attributes:
      count: int32 [..., n].
      digits: int32 [..., n, 6], the sum of confidences in units of 2^-30, digits of 11 bits, the lowest first.
      correct: int32 [..., n].
      total: int32 [...].
    """

    count: jax.Array
    digits: jax.Array
    correct: jax.Array
    total: jax.Array

    @classmethod
    def of(cls, confidence: jax.Array, correct: jax.Array, where: jax.Array, num_bins: int) -> "ExactBins":
        """Fixed bins of confidences [N] in (0, 1]; ``correct``, ``where`` bool [N]; rows not ``where`` are left out."""
        edges = jnp.asarray(calibration.fixed_edges(num_bins))
        parts = [
            _bin(*(each[start : start + _CHUNK] for each in (confidence, correct, where)), edges)
            for start in range(0, len(confidence), _CHUNK)
        ]
        return jax.tree.map(lambda *each: sum(each[1:], each[0]), *parts)

    def merge(self, other: "ExactBins") -> "ExactBins":
        """The bins of both sets of rows."""
        return jax.tree.map(jnp.add, self, other)

    def bins(self) -> Bins:
        """As numbers: float32, or float64 if the leaves are NumPy arrays."""
        xp = self.count.__array_namespace__()
        dtype = np.float64 if xp is np else jnp.float32
        units = np.asarray([2.0 ** (_DIGIT * i - _FRACTION) for i in range(_DIGITS)])
        confidence = (self.digits.astype(dtype) * units.astype(dtype)).sum(-1)
        return Bins(self.count.astype(dtype), confidence, self.correct.astype(dtype), self.total.astype(dtype))


def _bin(confidence: jax.Array, correct: jax.Array, where: jax.Array, edges: jax.Array) -> ExactBins:
    num_bins = len(edges) - 1
    where = where.astype(bool)
    # A padded row may hold anything, NaN included.
    r = jnp.where(where, confidence.astype(jnp.float32), 0.0)
    index = jnp.sum(r[:, None] > edges[None, :-1], axis=-1) - 1
    integer = jnp.round(jnp.minimum(r, 1.0) * 2.0**_FRACTION).astype(jnp.int32)
    columns = [(integer >> (_DIGIT * i)) & (2**_DIGIT - 1) for i in range(3)]
    columns += [jnp.ones_like(integer), correct.astype(jnp.int32)]
    # segment_sum drops the index -1, of rows that are in no bin.
    sums = jax.ops.segment_sum(jnp.stack(columns, -1), index, num_bins)
    return ExactBins(sums[:, 3], _carry(sums[:, :3]), sums[:, 4], jnp.sum(where, dtype=jnp.int32))


def _carry(digits: jax.Array) -> jax.Array:
    """The same numbers in six digits below 2^11 each: half a million batches fit before an int32 overflows."""
    out, carry = [], jnp.zeros_like(digits[..., 0])
    for i in range(_DIGITS):
        value = carry + (digits[..., i] if i < digits.shape[-1] else 0)
        out.append(value & (2**_DIGIT - 1))
        carry = value >> _DIGIT
    return jnp.stack(out, -1)


@struct.dataclass
class TopError:
    """The ECE with fixed bins alone: what is worth a look while a network trains. ``top``: bins [n]."""

    top: ExactBins

    @classmethod
    def of(
        cls, logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None, *, num_bins: int = NUM_BINS
    ) -> "TopError":
        """The sums of one batch: logits float [B, K], labels int [B], mask [B]."""
        p = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        where = jnp.ones(labels.shape, bool) if mask is None else jnp.asarray(mask) > 0
        return cls(ExactBins.of(jnp.max(p, -1), jnp.argmax(p, -1) == labels, where, num_bins))

    def merge(self, other: "TopError") -> "TopError":
        """The error of both sets of rows."""
        return TopError(self.top.merge(other.top))

    def compute(self) -> jax.Array:
        """In [0, 1]; NaN of no rows."""
        return calibration.ece(self.top.bins())
