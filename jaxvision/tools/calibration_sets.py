"""The files of the calibration command as rows: what is reported, what is fitted on, what is unknown."""

import argparse
from collections.abc import Callable, Iterator

import numpy as np

from jaxvision.core.errors import DataError
from jaxvision.metrics import calibration_rows
from jaxvision.metrics.calibration_rows import Rows
from jaxvision.tools import calibration_files
from jaxvision.tools.calibration_files import StoredArray


class StoredRows:
    """Stored arrays as rows; of probabilities also their logarithms, which scaling works on.

    Attributes:
      rows, logits: what is measured, what is scaled.
      batches: (size) -> rows of so many images at a time, in the order of the file; needs labels and all rows chosen.
      total: rows of the file.
      size: for people.
    """

    def __init__(
        self,
        logits: StoredArray,
        labels: StoredArray | None,
        options: argparse.Namespace,
        chosen: Callable[[int], np.ndarray] | None = None,
    ):
        calibration_rows.check_shapes(logits.shape, logits.shape[:-1] if labels is None else labels.shape, logits.name)
        if labels is not None:
            calibration_rows.check_labels_type(labels.dtype, logits.name)
        self.total = int(np.prod(logits.shape[:-1], dtype=np.int64))
        if not self.total:
            raise DataError(f"{logits.name} hold no row: the shape is {logits.shape}")
        self.size = f"{self.total:,} rows x {logits.shape[-1]:,} classes of {logits.dtype}"
        classes, mask = logits.shape[-1], None if chosen is None else chosen(self.total)
        step = max(1, calibration_rows.BLOCK // max(int(np.prod(logits.shape[1:], dtype=np.int64)), 1))

        def blocks() -> Iterator[calibration_rows.Block]:
            pieces = labels.blocks(step) if labels is not None else None
            for block in logits.blocks(step):
                z = block.reshape(-1, classes)
                yield z, np.zeros(len(z), np.int64) if pieces is None else next(pieces).reshape(-1)

        ignore = options.ignore if labels is not None else ()

        def batches(size: int) -> Iterator[Rows]:
            for pair in zip(logits.blocks(size), labels.blocks(size)):
                yield Rows.of(*pair, ignore=ignore, name=logits.name)

        self.batches = batches
        self.rows = Rows(calibration_rows.checked(blocks, classes, ignore, logits.name, mask), classes, logits.name)
        self.logits = _logarithms(self.rows) if options.probabilities else self.rows
        if not options.probabilities:
            _refuse_probabilities(self.rows)


HELD = 1 << 28
"""Bytes of a validation split that are kept in memory: a fit looks at it ten times."""


def held(rows: Rows) -> Rows:
    """The same rows, read once and kept if they are small enough, or else as they are."""
    blocks, size = [], 0
    for block in rows.blocks():
        size += block[0].nbytes
        if size > HELD:
            return rows
        # A block may be a view of a larger one.
        blocks.append(tuple(np.array(each) for each in block))
    return Rows(lambda: iter(blocks), rows.num_classes, rows.name)


def _logarithms(rows: Rows) -> Rows:
    def blocks() -> Iterator[calibration_rows.Block]:
        for p, labels in rows.blocks():
            yield np.log(np.clip(p, np.finfo(p.dtype).tiny, 1)), labels

    return Rows(blocks, rows.num_classes, rows.name)


def _refuse_probabilities(rows: Rows) -> None:
    for block, _ in rows.blocks():
        part = block[:1000]
        if len(part) >= 10 and part.min() >= 0 and (abs(part.sum(-1) - 1) < 1e-3).all():
            raise DataError(
                f"{rows.name} are probabilities (no number is negative, each row sums to 1): give --probabilities"
            )
        return


def open_sets(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, StoredRows]:
    """``test``, and where there are some ``validation`` and ``ood``.

    Args:
      options: of the command.
      say: prints a line.

    Raises:
      DataError: what is wrong with the files.
    """
    arrays = calibration_files.open_arrays(options.source)
    logits = calibration_files.find(arrays, options.logits_key, options.source)
    where = options.labels or options.source
    if options.labels is None and list(arrays) == [""]:
        raise DataError(f"{options.source} holds one array; give the labels with --labels FILE")
    labels = calibration_files.find(
        calibration_files.open_arrays(where) if options.labels else arrays, options.labels_key, where
    )
    chosen = None
    if options.hold_out is not None:
        # Both splits are drawn from the same numbers.
        def chosen(total: int) -> np.ndarray:
            return np.random.default_rng(options.seed).permutation(total) >= round(options.hold_out * total)

    sets = {"test": StoredRows(logits, labels, options, chosen)}
    say(f"{options.source}: {sets['test'].size}, read in blocks of at most 16 MiB")
    if chosen is not None:
        sets["validation"] = StoredRows(logits, labels, options, lambda total: ~chosen(total))
    elif options.validation:
        more = calibration_files.open_arrays(options.validation)
        pair = (
            calibration_files.find(more, key, options.validation) for key in (options.logits_key, options.labels_key)
        )
        sets["validation"] = StoredRows(*pair, options)
    elif "val_logits" in arrays:
        pair = (calibration_files.find(arrays, key, options.source) for key in ("val_logits", "val_labels"))
        sets["validation"] = StoredRows(*pair, options)
    if options.ood:
        more = calibration_files.open_arrays(options.ood)
        sets["ood"] = StoredRows(calibration_files.find(more, options.logits_key, options.ood), None, options)
    elif "ood_logits" in arrays:
        sets["ood"] = StoredRows(arrays["ood_logits"], None, options)
    for name, other in sets.items():
        if other.rows.num_classes != sets["test"].rows.num_classes:
            raise DataError(
                f"{other.rows.name} ({name}) have {other.rows.num_classes} classes, "
                f"but {sets['test'].rows.name} have {sets['test'].rows.num_classes}"
            )
    return sets
