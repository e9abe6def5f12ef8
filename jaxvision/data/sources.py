"""Where examples come from: the protocol of a source, arrays in memory, npz files, subsets.

An example is ``{"image": [H, W, C], "label": int32 scalar, ...}``; ``take`` gives the same leaves stacked
along a new first axis.
"""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from jaxvision.core.errors import ConfigError, DataError
from jaxvision.data.decode import first_line

Example = dict[str, np.ndarray]


@runtime_checkable
class Source(Protocol):
    """A finite data set with random access; thread-safe.

    A source that sets ``in_memory = True`` says that ``take`` is cheap and vectorised; the examples of any other
    are read one by one on threads.
    """

    num_classes: int
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def take(self, indices: np.ndarray) -> Example: ...


def stack(examples: Sequence[Example]) -> Example:
    """Examples as one batch: every leaf ``[B, ...]``.

    Raises:
      DataError: if the examples' shapes differ, naming the leaf and the shapes.
    """
    batch = {}
    for name in examples[0]:
        leaves = [example[name] for example in examples]
        shapes = sorted({np.shape(leaf) for leaf in leaves})
        if len(shapes) > 1:
            raise DataError(
                f"examples of one batch have different '{name}' shapes, such as {shapes[0]} and {shapes[-1]}; "
                "add an example_transform that gives them one size (imagenet_eval, RandomResizedCrop)"
            )
        batch[name] = np.stack(leaves)
    return batch


class ArraySource:
    """A data set in memory.

    Args:
      image: uint8 or float32 ``[N, H, W, C]``, or ``[N, H, W]`` (a channel axis is added).
      label: integer ``[N]`` in ``0 .. K - 1``.
      class_names: ``K`` names; by default the numbers.
      num_classes: ``K``; by default the number of names, or else the largest label + 1.
      extra: more leaves ``[N, ...]``, such as ``label_map``.
      name: what error messages call it.

    Raises:
      DataError: if lengths, dtypes, ranks or label values don't fit.
    """

    in_memory = True

    def __init__(
        self,
        image: np.ndarray,
        label: np.ndarray,
        class_names: Sequence[str] | None = None,
        *,
        num_classes: int | None = None,
        extra: Mapping[str, np.ndarray] | None = None,
        name: str = "the arrays",
    ):
        image, label = np.asarray(image), np.asarray(label)
        _check_arrays(image, label, name)
        image = image[..., None] if image.ndim == 3 else image
        top = int(label.max()) + 1
        if num_classes is None:
            num_classes = len(class_names) if class_names is not None else top
        _check_classes(label, num_classes, class_names, name)
        self.num_classes = num_classes
        self.class_names = tuple(class_names) if class_names is not None else tuple(map(str, range(num_classes)))
        leaves = {"image": image, "label": label.astype(np.int32), **(extra or {})}
        for key, leaf in leaves.items():
            if len(leaf) != len(image):
                raise DataError(f"{name}: '{key}' has {len(leaf)} rows, 'image' has {len(image)}; they must be equal")
        self._leaves = {key: _read_only(leaf) for key, leaf in leaves.items()}

    @property
    def labels(self) -> np.ndarray:
        """int32 ``[N]``."""
        return self._leaves["label"]

    def __len__(self) -> int:
        return len(self._leaves["image"])

    def __getitem__(self, index: int) -> Example:
        return {key: leaf[index] for key, leaf in self._leaves.items()}

    def take(self, indices: np.ndarray) -> Example:
        return {key: leaf[indices] for key, leaf in self._leaves.items()}


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view that a transform working in place can't write through."""
    view = array.view()
    view.flags.writeable = False
    return view


def _check_arrays(image: np.ndarray, label: np.ndarray, name: str) -> None:
    if image.ndim not in (3, 4):
        raise DataError(f"{name}: 'image' has shape {image.shape}; it must be (N, H, W, C) or (N, H, W)")
    if image.dtype not in (np.uint8, np.float32):
        raise DataError(f"{name}: 'image' has dtype {image.dtype}; it must be uint8 (0 to 255) or float32")
    if label.ndim != 1 or not np.issubdtype(label.dtype, np.integer):
        raise DataError(f"{name}: 'label' is {label.dtype} with shape {label.shape}; it must be integers (N,)")
    if len(image) != len(label):
        raise DataError(f"{name}: 'image' has {len(image)} rows, 'label' has {len(label)}; they must be equal")
    if not len(image):
        raise DataError(f"{name}: holds no examples; give at least one")


def _check_classes(label: np.ndarray, num_classes: int, class_names: Sequence[str] | None, name: str) -> None:
    if class_names is not None and len(class_names) != num_classes:
        raise DataError(f"{name}: has {len(class_names)} class names for {num_classes} classes; they must be equal")
    wrong = np.flatnonzero((label < 0) | (label >= num_classes))
    if wrong.size:
        raise DataError(
            f"{name}: label {int(label[wrong[0]])} of example {int(wrong[0])} is outside 0..{num_classes - 1}; "
            "correct the labels or the class names"
        )


class Subset:
    """The examples of ``source`` at ``indices``, in that order (a validation split, one class, one task)."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source = source
        self._indices = np.asarray(indices)
        size = len(source)
        if self._indices.ndim != 1 or not np.issubdtype(self._indices.dtype, np.integer) or not len(self._indices):
            raise DataError(
                f"a subset needs a non-empty 1-D integer array of indices, got {self._indices.dtype} "
                f"with shape {self._indices.shape}"
            )
        if self._indices.min() < 0 or self._indices.max() >= size:
            raise DataError(
                f"subset indices {self._indices.min()}..{self._indices.max()} leave the source's 0..{size - 1}"
            )
        self.in_memory = getattr(source, "in_memory", False)
        self.num_classes = source.num_classes
        self.class_names = source.class_names

    @property
    def labels(self) -> np.ndarray:
        """int32 ``[N]``, where the source knows its own."""
        return labels_of(self._source)[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._indices[index])]

    def take(self, indices: np.ndarray) -> Example:
        return self._source.take(self._indices[indices])


def labels_of(source: Source) -> np.ndarray:
    """The labels int32 ``[N]`` of all examples, without reading the images.

    Raises:
      ConfigError: the source doesn't know them before it reads (tfds), or has none (segmentation).
    """
    labels = getattr(source, "labels", None)
    if labels is None:
        raise ConfigError(
            f"{type(source).__name__} doesn't know the labels of its examples beforehand; leave out what needs them "
            "(class-aware sampling, a split per class, an imbalance), or open the data as npz or class folders"
        )
    return labels


def npz_source(path: str | Path, *, num_classes: int | None = None) -> ArraySource:
    """The data set in an npz file, read into memory.

    Args:
      path: an npz with ``image`` uint8 (N,H,W,C) or (N,H,W), ``label`` integer (N,), and optionally
        ``class_names`` (K,) strings. Never unpickles.
      num_classes: ``K``; by default the number of class names, or else the largest label + 1.

    Raises:
      DataError: if the file is missing, damaged, or its arrays don't fit.
    """
    if not Path(path).is_file():
        raise DataError(f"{path} doesn't exist; give an npz file with 'image' and 'label'")
    arrays = read_npz(path, ("image", "label"), ("class_names",))
    names = arrays.get("class_names")
    return ArraySource(
        arrays["image"],
        arrays["label"],
        None if names is None else [_text(value) for value in names.tolist()],
        num_classes=num_classes,
        name=str(path),
    )


def read_npz(
    path: str | Path, needed: Sequence[str], optional: Sequence[str] = (), *, advice: str = "write it again"
) -> dict[str, np.ndarray]:
    """Arrays of an npz file: the needed ones, and those of the optional ones that it has. Never unpickles.

    Args:
      path: of the file.
      needed, optional: names.
      advice: what to do about a file that can't be used, for the messages.

    Raises:
      DataError: the file is missing, damaged or no npz, or has not all that is needed.
    """
    try:
        with open(path, "rb") as handle:  # np.load leaves a damaged file that it opened itself open
            file = np.load(handle, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"{path} is a single array, not an npz with {', '.join(needed)}; {advice}")
            found = file.files
            arrays = {key: file[key] for key in (*needed, *optional) if key in found}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = first_line(error)
        raise DataError(f"{path} can't be read as an npz of plain arrays ({reason}); {advice}") from error
    missing = [key for key in needed if key not in arrays]
    if missing:
        raise DataError(f"{path} has no array '{missing[0]}' (it has {', '.join(found) or 'none'}); {advice}")
    return arrays


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
