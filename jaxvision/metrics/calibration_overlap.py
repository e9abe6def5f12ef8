"""Is what a temperature is fitted on also what is reported? Rows of logits are compared by their fingerprints."""

from dataclasses import dataclass

import numpy as np

from jaxvision.core.errors import DataError
from jaxvision.metrics.calibration_rows import Block, Rows, in_threads, part_rows

MOST = 1 << 20
"""Different fingerprints that are kept of a set: of larger ones a sample, 16 MiB."""
LEAK = 0.5
"""The share of validation rows among the reported ones, beyond what chance explains, that is refused."""


def refuse_overlap(validation: Rows, test: Rows) -> None:
    """Looks for the validation rows among the rows that would be reported, in any order.

    Coarse logits (half precision of two classes, a network that gives the same for every input) repeat by chance: a
    new row is among the reported ones about as often as these repeat themselves (1 minus the share of rows that occur
    once: Good and Turing's estimate), which is taken off.

    Args:
      validation: what something is fitted on.
      test: what is reported.

    Raises:
      DataError: half of the validation rows or more are reported ones, or the sets are the same.
    """
    if validation is test:
        share, leaked = 1.0, True
    else:
        fitted, reported = _fingerprints(validation), _fingerprints(test)
        limit = min(fitted.limit, reported.limit)
        fitted, reported = fitted.up_to(limit), reported.up_to(limit)
        seen = np.isin(fitted.values, reported.values, assume_unique=True)
        share = fitted.counts[seen].sum() / max(fitted.counts.sum(), 1)
        chance = 1 - np.count_nonzero(reported.counts == 1) / max(reported.counts.sum(), 1)
        same = len(fitted.values) > 1 and all(
            np.array_equal(*each) for each in ((fitted.values, reported.values), (fitted.counts, reported.counts))
        )
        leaked = same or share - chance >= LEAK
    if leaked:
        raise DataError(
            f"{share:.0%} of the rows of {validation.name} are among the rows that would be reported on; fit on a "
            "validation split that has none of them"
        )


@dataclass(frozen=True)
class _Fingerprints:
    """Of the rows whose fingerprint is at most ``limit``: the different ones, ascending, and how often each occurs."""

    values: np.ndarray
    counts: np.ndarray
    limit: np.uint64

    def up_to(self, limit: np.uint64) -> "_Fingerprints":
        size = np.searchsorted(self.values, limit, side="right")
        return _Fingerprints(self.values[:size], self.counts[:size], limit)

    def joined(self, values: np.ndarray) -> "_Fingerprints":
        """With more rows; the smallest ``MOST`` are kept: the same sample of whatever set a row is in."""
        values, counts = np.unique(values[values <= self.limit], return_counts=True)
        every, place = np.unique(np.concatenate([self.values, values]), return_inverse=True)
        total = np.bincount(place, np.concatenate([self.counts, counts]), len(every)).astype(np.int64)
        found = _Fingerprints(every, total, self.limit)
        return found if len(every) <= MOST else found.up_to(every[MOST - 1])


def _fingerprints(rows: Rows) -> _Fingerprints:
    """Sums of a row's float32 words, each times a random odd number, modulo 2^64: equal rows have equal ones.

    Two different rows share one with a chance of about 2^-64 (2^-48 of bfloat16 numbers, whose low bits are zero).
    """
    factors = np.random.default_rng(0).integers(0, 2**64, rows.num_classes, np.uint64) | np.uint64(1)

    def look(block: Block) -> np.ndarray:
        step, found = part_rows(rows.num_classes), [np.empty(0, np.uint64)]
        for start in range(0, len(block[0]), step):
            # Adding 0 makes -0 a 0.
            words = (block[0][start : start + step].astype(np.float32) + np.float32(0)).view(np.uint32)
            found.append(np.einsum("ij,j->i", words, factors, dtype=np.uint64, casting="unsafe"))
        return np.concatenate(found)

    kept = _Fingerprints(np.empty(0, np.uint64), np.empty(0, np.int64), np.uint64(2**64 - 1))
    waiting, size = [], 0
    for values in in_threads(look, rows.blocks()):
        waiting.append(values)
        size += len(values)
        if size > MOST:
            kept, waiting, size = kept.joined(np.concatenate(waiting)), [], 0
    return kept.joined(np.concatenate(waiting)) if waiting else kept
