"""The accuracies of all 15,625 NAS-Bench-201 architectures as one npz file.

``arch_ops`` int8 [15625, 6] and ``params`` int32 [15625] (C = 16, N = 5, ten classes) say which architecture a row is;
``<dataset>_test`` and ``<dataset>_valid`` uint16 [15625] are accuracies in hundredths of a percent after 200 epochs,
mean over seeds. ``python -m jaxvision.tools.prepare_data nas_bench_201`` makes it from the benchmark's release.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxvision.core.errors import DataError
from jaxvision.data import sources
from jaxvision.data.prepare_nas_bench_201 import RESULTS, Record
from jaxvision.models import nas_bench_201

DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet16_120": "ImageNet16-120"}
MOST_WRONG = 1000
"""The benchmark averages its own counts over seeds; 204 architectures come out wrong. More than this: another order."""

_HOW = "make it with python -m jaxvision.tools.prepare_data nas_bench_201"


@dataclass(frozen=True)
class AccuracyTable:
    """Test accuracies in percent, float64 [15625] by data set, in the order of ``nas_bench_201.from_index``."""

    test: dict[str, np.ndarray]


def read(path: str | Path) -> AccuracyTable:
    """The table in a file.

    Raises:
      DataError: it can't be read, a column is missing, of another shape or type or no accuracies in hundredths of a
        percent, or its rows are in another order.
    """
    needed = ("arch_ops", "params", *(f"{name}_test" for name in DATASETS))
    arrays = sources.read_npz(path, needed, advice=_HOW)
    _check(path, arrays)
    return AccuracyTable({name: arrays[f"{name}_test"] / 100 for name in DATASETS})


def _check(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    count = nas_bench_201.NUM_ARCHITECTURES
    for name, array in arrays.items():
        shape = (count, len(nas_bench_201.EDGES)) if name == "arch_ops" else (count,)
        if array.shape != shape or not np.issubdtype(array.dtype, np.integer):
            raise DataError(
                f"{path}: column '{name}' is {array.dtype} of shape {array.shape}, it must be integers {shape}; {_HOW}"
            )
    for name in (f"{name}_test" for name in DATASETS):
        low, high = int(arrays[name].min()), int(arrays[name].max())
        # Every data set has networks of more than 1 %, even at random.
        if low < 0 or not 100 < high <= 10_000:
            raise DataError(
                f"{path}: column '{name}' reaches from {low:,} to {high:,}, it must be accuracies in hundredths of a "
                f"percent (9,437 for 94.37 %); {_HOW}"
            )
    expected = parameters()
    wrong = np.flatnonzero(arrays["params"] != expected)
    if len(wrong):
        row = int(wrong[0])
        has = f"row {row} has {int(arrays['params'][row]):,} parameters, architecture {row} has {int(expected[row]):,}"
    else:
        wrong = np.flatnonzero((arrays["arch_ops"] != nas_bench_201.all_architectures()).any(1))
        if not len(wrong):
            return
        row = int(wrong[0])
        has = f"row {row} has the operations {arrays['arch_ops'][row].tolist()}, architecture {row} others"
    raise DataError(
        f"{path}: {has} ({len(wrong):,} rows differ): it is in another order than the product of the operations; {_HOW}"
    )


def parameters() -> np.ndarray:
    """Exact parameters of every architecture, int64 [15625]."""
    return np.asarray(nas_bench_201.parameters(nas_bench_201.all_architectures(), num_classes=10))


def pack(records: Sequence[Record], source: str | Path) -> dict[str, np.ndarray]:
    """The arrays of the file, from the records of a release in any order.

    Raises:
      DataError: an architecture is missing or there twice, or the parameter counts are those of other architectures.
    """
    count = nas_bench_201.NUM_ARCHITECTURES
    rows = [nas_bench_201.to_index(nas_bench_201.from_string(record.architecture)) for record in records]
    found, times = np.unique(rows, return_counts=True)
    if len(found) != len(rows):
        twice = nas_bench_201.to_string(nas_bench_201.from_index(int(found[times > 1][0])))
        raise DataError(f"{source} holds {twice} more than once; give one whole release")
    if len(rows) != count:
        absent = int(np.setdiff1d(np.arange(count), found)[0])
        text = nas_bench_201.to_string(nas_bench_201.from_index(absent))
        raise DataError(f"{source} holds {len(rows):,} of {count:,} architectures; {text} is missing")
    arrays = {"arch_ops": nas_bench_201.all_architectures().astype(np.int8), "params": parameters().astype(np.int32)}
    claimed = np.empty(count)
    claimed[rows] = [record.params for record in records]
    wrong = int((np.abs(claimed - arrays["params"]) > 1).sum())
    if wrong > MOST_WRONG:
        raise DataError(
            f"{source}: the parameter counts of {wrong:,} architectures are not those of their strings (204 are known "
            "to be wrong): the files belong to other architectures"
        )
    for column in RESULTS:
        arrays[column] = np.empty(count, np.uint16)
        arrays[column][rows] = [round(100 * record.accuracies[column]) for record in records]
    return arrays
