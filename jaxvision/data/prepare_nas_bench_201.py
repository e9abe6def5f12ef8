"""NAS-Bench-201's accuracies out of the official release of NATS-Bench, read without running what it contains.

The release (Dong et al. 2021, arXiv:2009.00437) is ``NATS-tss-v1_0-3ffb9-simple.tar``: one bz2-compressed pickle an
architecture, each ``{"12": ..., "200": ...}`` by epochs of training, with the results of every seed on four data sets.
"""

import bz2
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from jaxvision.core import safe_pickle
from jaxvision.core.errors import DataError
from jaxvision.core.numpy_pickle import NumpyHandlers
from jaxvision.data.prepare_archive import archive_items
from jaxvision.data.prepare_files import Progress, silent

EPOCHS = 200
RESULTS = {
    "cifar10_test": ("cifar10", "ori-test"),
    "cifar10_valid": ("cifar10-valid", "x-valid"),
    "cifar100_test": ("cifar100", "x-test"),
    "cifar100_valid": ("cifar100", "x-valid"),
    "imagenet16_120_test": ("ImageNet16-120", "x-test"),
    "imagenet16_120_valid": ("ImageNet16-120", "x-valid"),
}
"""Column of the table -> (trained on, evaluated on) as the release calls them."""

_FILE = re.compile(r"\d{1,6}\.pickle\.pbz2")
_MAX_UNPACKED = 1 << 24  # bytes; the official files unpack to 0.33 MB


@dataclass(frozen=True)
class Record:
    """One architecture of the benchmark.

    Attributes:
      architecture: as a string.
      accuracies: percent after 200 epochs, mean over the seeds that were trained, by column.
      params: parameters with ten classes as the benchmark counts them, mean over seeds (wrong for 204 of them).
    """

    architecture: str
    accuracies: dict[str, float]
    params: float


def read_release(source: Path, *, total: int, progress: Progress = silent) -> list[Record]:
    """The architectures in a release, in the order of its files.

    Args:
      source: ``NATS-tss-v1_0-3ffb9-simple.tar`` or the folder unpacked from it.
      total: how many the progress bar expects; other numbers are for the caller to judge.
      progress: shows how far it is.

    Raises:
      DataError: missing, damaged, of another form, or asks to run something.
    """
    records = []
    with progress("nas_bench_201: architectures", total) as advance:
        for item in archive_items(source, _select):
            records.append(read_record(item.read(), item.origin))
            advance(1)
    if not records:
        raise DataError(
            f"{source} holds no file like 000000.pickle.pbz2; give NATS-tss-v1_0-3ffb9-simple.tar or its folder"
        )
    return records


def read_record(content: bytes, name: str) -> Record:
    """The record in the bytes of one ``<number>.pickle.pbz2``; ``name`` is for messages."""
    raw = _unpack(content, name)
    numpy = NumpyHandlers(len(raw))
    allowed = {**numpy.allowed, ("collections", "OrderedDict"): lambda items=(): dict(items)}
    value = safe_pickle.load(raw, allowed=allowed, build=numpy.build, name=name)
    try:
        results = value[str(EPOCHS)]
        accuracies = {column: _mean_accuracy(results, *where) for column, where in RESULTS.items()}
        trained = [results["all_results"]["cifar10", seed] for seed in results["dataset_seed"]["cifar10"]]
        params = sum(float(one["params"]) for one in trained) / len(trained) * 1e6
        return Record(str(results["arch_str"]), accuracies, params)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError, AttributeError) as error:
        reason = safe_pickle.printable(f"{type(error).__name__}: {error}")
        raise DataError(f"{name} is no result of {EPOCHS} epochs of NATS-Bench's topology space ({reason})") from error


def _mean_accuracy(results: dict[str, Any], dataset: str, split: str) -> float:
    """After the last epoch, mean over seeds, percent."""
    seeds = results["dataset_seed"][dataset]
    values = [float(results["all_results"][dataset, s]["eval_acc1es"][f"{split}@{EPOCHS - 1}"]) for s in seeds]
    mean = sum(values) / len(values)
    if not 0 <= mean <= 100:
        raise ValueError(f"an accuracy of {mean} %")
    return mean


def _select(path: PurePosixPath) -> str | None:
    return path.name if _FILE.fullmatch(path.name) else None


def _unpack(content: bytes, name: str) -> bytes:
    unpacker = bz2.BZ2Decompressor()
    try:
        raw = unpacker.decompress(content, max_length=_MAX_UNPACKED)
    except (OSError, ValueError) as error:
        raise DataError(f"{name} is no bz2 file or is damaged ({error}); download the release again") from error
    if not unpacker.eof:
        raise DataError(f"{name} was cut short, or unpacks to more than any file of the release; download it again")
    return raw
