"""Calibration inside the engine's evaluation: metric objects that merge by adding their arrays.

Confidences are summed as integers: ``round(r 2^30)``, cut into digits of 11 bits. Integer sums don't depend on their
order, so the same confidences give bit for bit the same bins in every batch size and on every device count, and a bin
of a hundred million pixels is as exact as one of ten; float32 sums would stall at 2^24. The rounding is 2^-31.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import struct
from jaxvision.metrics import calibration
from jaxvision.metrics.calibration import NUM_BINS, Bins, Ranked
from jaxvision.metrics.mean import Mean

_DIGIT = 11
_DIGITS = 6
_FRACTION = 30
_CHUNK = 1 << 20
"""Rows after which carries are moved on: 2^20 digits below 2^11 stay below 2^31."""
_AT_ONCE = 1 << 20


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
    def of(
        cls,
        confidence: jax.Array,
        correct: jax.Array,
        where: jax.Array,
        num_bins: int,
        *,
        include_lowest: bool = False,
    ) -> "ExactBins":
        """Fixed bins of confidences [N] in [0, 1]; ``correct`` and ``where`` bool [N]; rows not ``where`` are left out.

        A confidence of exactly 0 is in no bin, as officially; with ``include_lowest`` it is in the lowest.
        """
        edges = jnp.asarray(calibration.fixed_edges(num_bins))
        parts = [
            _bin(*(each[start : start + _CHUNK] for each in (confidence, correct, where)), edges, include_lowest)
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


def _bin(
    confidence: jax.Array, correct: jax.Array, where: jax.Array, edges: jax.Array, include_lowest: bool
) -> ExactBins:
    num_bins = len(edges) - 1
    where = where.astype(bool)
    # A padded row may hold anything, NaN included.
    r = jnp.where(where, confidence.astype(jnp.float32), 0.0)
    index = jnp.sum(r[:, None] > edges[None, :-1], axis=-1) - 1
    if include_lowest:
        index = jnp.where(where, jnp.maximum(index, 0), -1)
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
class Calibration:
    """Accuracy, NLL, Brier score and the calibration errors with fixed bins, pooled over the whole set.

    Attributes:
      top: bins of the predicted class [n].
      classes: bins of every class's probability [K, n]; None where ``of`` was told to leave them out.
      nll: in nats.
      brier: ``sum_k (p_k - 1[y = k])^2`` in [0, 2].
    """

    top: ExactBins
    classes: ExactBins | None
    nll: Mean
    brier: Mean

    @classmethod
    def init(cls, num_classes: int, *, num_bins: int = NUM_BINS, classwise: bool = True) -> "Calibration":
        """Nothing counted yet."""
        row = jnp.zeros((1, num_classes))
        none = jnp.zeros(1, bool)
        return cls.of(row, jnp.zeros(1, jnp.int32), none, num_bins=num_bins, classwise=classwise)

    @classmethod
    def of(
        cls,
        logits: jax.Array,
        labels: jax.Array,
        mask: jax.Array | None = None,
        *,
        num_bins: int = NUM_BINS,
        classwise: bool = True,
        ignore: int | None = None,
        include_lowest: bool = False,
    ) -> "Calibration":
        """The sums of one batch.

        Args:
          logits: float [B, ..., K]; softmax in float32.
          labels: int [B, ...]; one that is no class and neither masked nor ignored makes NLL and Brier NaN.
          mask: [B] or the labels' shape; 1 for what counts. The rest may hold anything.
          num_bins: n.
          classwise: False leaves out the bins of every class, K times the work.
          ignore: a label that doesn't count, such as 255 in segmentation.
          include_lowest: classwise, a probability of exactly 0 is in the lowest bin; officially it is in none, which
            on saturated logits hides the rows whose own label has it.
        """
        where = _where(labels, mask, ignore)
        logits, labels, where = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), where.reshape(-1)
        # Selecting before the arithmetic: what doesn't count may be NaN, and its label may be no class.
        labels = jnp.where(where, labels, 0)
        log_p = jax.nn.log_softmax(jnp.where(where[:, None], logits, 0).astype(jnp.float32), axis=-1)
        p = jnp.exp(log_p)
        own, confidence = jnp.take_along_axis(log_p, labels[:, None], -1)[:, 0], jnp.max(p, -1)
        weights = where.astype(jnp.float32)
        brier = jnp.sum(p * p, -1) - 2 * jnp.exp(own) + 1
        top = ExactBins.of(confidence, jnp.argmax(p, -1) == labels, where, num_bins)
        classes = None
        if classwise:
            is_label = labels[:, None] == jnp.arange(p.shape[-1])
            # One class at a time where the rows are pixels: all at once would take 20 bytes a probability.
            classes = jax.lax.map(
                lambda pair: ExactBins.of(*pair, where, num_bins, include_lowest=include_lowest),
                (p.T, is_label.T),
                batch_size=max(1, _AT_ONCE // len(p)),
            )
        return cls(top, classes, Mean.of(-own, weights), Mean.of(brier, weights))

    def update(self, logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None, **options) -> "Calibration":
        """With one more batch; arguments of :meth:`of`."""
        options = {"num_bins": self.top.count.shape[-1], "classwise": self.classes is not None, **options}
        return self.merge(Calibration.of(logits, labels, mask, **options))

    def merge(self, other: "Calibration") -> "Calibration":
        """The metric of both sets of rows."""
        return jax.tree.map(lambda a, b: a + b, self, other)

    def compute(self, *, all_classes: bool = False) -> dict[str, jax.Array]:
        """``accuracy``, ``nll``, ``brier``, ``ece`` ... (``calibration.ERRORS``), ``classwise_ece``; NaN of no rows.

        Classwise ECE is that over the classes 0 ... max(label) as officially, or with ``all_classes`` over all K.
        """
        top = self.top.bins()
        # Every row has a confidence above 0, so the bins hold them all.
        values = {"accuracy": top.correct.sum(-1) / top.total, "nll": self.nll.compute(), "brier": self.brier.compute()}
        values |= {name: error(top) for name, error in calibration.ERRORS.items()}
        if self.classes is not None:
            classes = self.classes.bins()
            seen = None if all_classes else classes.correct.sum(-1)
            values["classwise_ece"] = calibration.classwise_ece(classes, seen)
        return values


def _where(labels: jax.Array, mask: jax.Array | None, ignore: int | None) -> jax.Array:
    where = jnp.ones(labels.shape, bool)
    if mask is not None:
        mask = jnp.asarray(mask) > 0
        where &= mask.reshape(mask.shape + (1,) * (labels.ndim - mask.ndim))
    return where if ignore is None else where & (labels != ignore)


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
        correct = jnp.argmax(p, -1) == labels
        return cls(ExactBins.of(jnp.max(p, -1), correct, _where(labels, mask, None), num_bins))

    def merge(self, other: "TopError") -> "TopError":
        """The error of both sets of rows."""
        return TopError(self.top.merge(other.top))

    def compute(self) -> jax.Array:
        """In [0, 1]; NaN of no rows."""
        return calibration.ece(self.top.bins())


@struct.dataclass
class Confidences:
    """Every row's confidence, at the row's number: what the exact adaptive ECE of a whole set needs.

    Each batch writes its rows into arrays of zeros of the set's size; adding them up pools the set exactly, because a
    row is in one batch only. 8 bytes a row and a batch's addition of that size: for sets of images, not of pixels.

    Attributes:
      confidence: float32 [N], 0 where no row was seen.
      correct: int32 [N].
    """

    confidence: jax.Array
    correct: jax.Array

    @classmethod
    def of(
        cls, logits: jax.Array, labels: jax.Array, index: jax.Array, size: int, mask: jax.Array | None = None
    ) -> "Confidences":
        """The rows of one batch.

        Args:
          logits: float [B, K].
          labels: int [B].
          index: int [B], the row's number in the set, 0 <= index < size; each occurs once in the whole set.
          size: N, static.
          mask: [B], 1 for what counts.
        """
        where = _where(labels, mask, None)
        p = jax.nn.softmax(jnp.where(where[:, None], logits, 0).astype(jnp.float32), axis=-1)
        # A number past the end is dropped, and no row that doesn't count may write.
        index = jnp.where(where, index, size)
        confidence = jnp.zeros(size, jnp.float32).at[index].add(jnp.max(p, -1), mode="drop")
        correct = jnp.zeros(size, jnp.int32).at[index].add(jnp.argmax(p, -1) == labels, mode="drop")
        return cls(confidence, correct)

    def merge(self, other: "Confidences") -> "Confidences":
        """The rows of both."""
        return jax.tree.map(jnp.add, self, other)

    def ranked(self) -> Ranked:
        """The rows that were seen, on the host."""
        confidence, correct = np.asarray(self.confidence), np.asarray(self.correct)
        seen = confidence > 0
        return Ranked.of(confidence[seen], correct[seen])

    def compute(self, *, num_bins: int = NUM_BINS, include_lowest: bool = False) -> dict[str, np.float64]:
        """``adaptive_ece`` in float64; not traceable. NaN of no rows."""
        ranked = self.ranked()
        if not len(ranked.count):
            return {"adaptive_ece": np.float64(np.nan)}
        bins = ranked.bins(ranked.adaptive_edges(num_bins), include_lowest=include_lowest)
        return {"adaptive_ece": calibration.ece(bins)}
