"""Data sets by name, as configurations name them."""

import difflib
import inspect
from pathlib import Path

from jaxvision.core.errors import ConfigError, DataError
from jaxvision.data import builtin, procedural
from jaxvision.data.cub import cub
from jaxvision.data.drawn import DrawnSource
from jaxvision.data.folder import FolderSource
from jaxvision.data.scenes import scenes
from jaxvision.data.sources import ArraySource, Source, Subset, npz_source
from jaxvision.data.splits import long_tail
from jaxvision.data.svhn import svhn
from jaxvision.data.tfds_source import TfdsSource, tfds_source
from jaxvision.data.tiny_imagenet import tiny_imagenet
from jaxvision.data.trees import shorten
from jaxvision.data.voc import MASKS, VocSource

_SHAPES_EXAMPLES = {"train": 2000, "test": 500}
_SCENES_EXAMPLES = {"train": 1200, "test": 300}


def source_names() -> tuple[str, ...]:
    """The names that :func:`open_source` knows."""
    return (*_OPENERS, "tfds:<name>")


def open_source(name: str, *, path: str | Path | None = None, split: str = "train", **options) -> Source:
    """Opens a data set by name.

    ======================= ============================================================ ===========================
    name                    path                                                         options
    ======================= ============================================================ ===========================
    digits, digits16        none                                                         digits: raw, num_train, noise
    shapes                  none                                                         n, size, seed, num_classes,
                                                                                         label_map
    scenes                  none                                                         n, size, seed, num_classes,
                                                                                         objects, border
    npz, cifar10, cifar100  a folder with ``<split>.npz``, or a file name with           imbalance, imbalance_seed;
                            ``{split}`` in it                                            npz: num_classes
    svhn                    likewise, or a folder with ``<split>_32x32.mat``
    tiny_imagenet           likewise, or the folder or zip tiny-imagenet-200
    cub                     the folder CUB_200_2011
    voc2012                 the folder VOC2012; splits are its lists                     masks
    folder, imagenet        a folder with ``<split>/`` or ``<split>.zip``, a zip with    ignore
                            ``<split>/`` in it, or a name with ``{split}`` in it
    tfds:<name>             the tfds data folder, or none for tfds's default
    ======================= ============================================================ ===========================

    Args:
      name: one of :func:`source_names`.
      path: where the data set is; ``~`` is expanded.
      split: such as ``"train"``, ``"test"``, ``"val"``.
      **options: see the table.

    Raises:
      ConfigError: for an unknown name or option, a missing path, or a path that the data set doesn't take.
      DataError: if the files aren't there or aren't right.

    ``imbalance`` makes the split "train" long-tailed, see :func:`jaxvision.data.splits.long_tail`; ``masks`` is
    SegmentationClass or SegmentationClassAug.
    """
    path = Path(path).expanduser() if path else None
    if name.startswith("tfds:"):
        _check_options(name, _open_tfds, options)
        return _open_tfds(name, path, split)
    if name not in _OPENERS:
        close = difflib.get_close_matches(name, _OPENERS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"use one of {', '.join(source_names())}"
        raise ConfigError(f"data set '{name}' is unknown; {hint}")
    opener = _OPENERS[name]
    _check_options(name, opener, options)
    return opener(name, path, split, **options)


def _check_options(name: str, opener, options: dict) -> None:
    known = list(inspect.signature(opener).parameters)[3:]
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ConfigError(f"data set '{name}' has no option '{option}'; {takes}")


def _no_path(name: str, path: Path | None) -> None:
    if path is not None:
        raise ConfigError(f"data set '{name}' is built in and reads no files, but path='{path}' is set; leave it out")


def _require_path(name: str, path: Path | None) -> Path:
    if path is None:
        raise ConfigError(f"data set '{name}' needs a path; give the folder that holds it")
    return path


def _open_digits(
    name: str,
    path: Path | None,
    split: str,
    raw: bool = False,
    num_train: int = builtin.NUM_TRAIN,
    noise: float = 0.0,
) -> ArraySource:
    _no_path(name, path)
    return builtin.digits(split, raw=raw, num_train=num_train, noise=noise)


def _open_digits16(name: str, path: Path | None, split: str) -> ArraySource:
    _no_path(name, path)
    return builtin.digits16(split)


def _open_shapes(
    name: str,
    path: Path | None,
    split: str,
    n: int | None = None,
    size: int = 32,
    seed: int = 0,
    num_classes: int = 8,
    label_map: bool = False,
) -> procedural.ShapesSource:
    _no_path(name, path)
    if split not in _SHAPES_EXAMPLES:
        raise ConfigError(f"split='{split}' is unknown for shapes; use train or test")
    n = _SHAPES_EXAMPLES[split] if n is None else n
    return procedural.shapes(n, size, seed, split=split, num_classes=num_classes, label_map=label_map)


def _open_scenes(
    name: str,
    path: Path | None,
    split: str,
    n: int | None = None,
    size: int = 64,
    seed: int = 0,
    num_classes: int = 7,
    objects: tuple[int, int] = (1, 3),
    border: int = 1,
) -> DrawnSource:
    _no_path(name, path)
    if split not in _SCENES_EXAMPLES:
        raise ConfigError(f"split='{split}' is unknown for scenes; use train or test")
    n = _SCENES_EXAMPLES[split] if n is None else n
    return scenes(n, size, seed, split=split, num_classes=num_classes, objects=tuple(objects), border=border)


def _open_cifar(
    name: str, path: Path | None, split: str, imbalance: float = 1.0, imbalance_seed: int = 0
) -> ArraySource | Subset:
    classes = {"cifar10": 10, "cifar100": 100}[name]
    return _open_npz(name, path, split, classes, imbalance, imbalance_seed)


def _open_npz(
    name: str,
    path: Path | None,
    split: str,
    num_classes: int | None = None,
    imbalance: float = 1.0,
    imbalance_seed: int = 0,
) -> ArraySource | Subset:
    source = npz_source(_npz_file(_require_path(name, path), split), num_classes=num_classes)
    if split != "train" or imbalance == 1:
        return source
    return Subset(source, long_tail(source.labels, source.num_classes, imbalance, imbalance_seed))


def _npz_file(path: Path, split: str) -> str | Path:
    if "{split}" in str(path):
        return str(path).replace("{split}", split)
    if not path.exists():
        raise DataError(f"{path} doesn't exist; give the folder that holds {split}.npz")
    if not path.is_dir():
        raise DataError(f"{path} is a file; give its folder, or a name with {{split}} in it for the splits")
    file = path / f"{split}.npz"
    if not file.is_file():
        found = sorted(entry.stem for entry in path.glob("*.npz"))
        raise DataError(f"{path} has no {split}.npz; {_splits_found(found)}")
    return file


def _is_npz(path: Path) -> bool:
    """Is this what ``prepare_data`` writes, rather than the official files?"""
    return "{split}" in str(path) or (path.is_dir() and any(path.glob("*.npz")))


def _open_svhn(name: str, path: Path | None, split: str) -> ArraySource:
    path = _require_path(name, path)
    if _is_npz(path):
        return npz_source(_npz_file(path, split), num_classes=10)
    return svhn(path / f"{split}_32x32.mat")


def _open_tiny_imagenet(name: str, path: Path | None, split: str) -> Source:
    path = _require_path(name, path)
    return npz_source(_npz_file(path, split)) if _is_npz(path) else tiny_imagenet(path, split)


def _open_cub(name: str, path: Path | None, split: str) -> Source:
    return cub(_require_path(name, path), split)


def _open_voc(name: str, path: Path | None, split: str, masks: str = MASKS) -> VocSource:
    return VocSource(_require_path(name, path), split, masks=masks)


def _open_folder(name: str, path: Path | None, split: str, ignore: tuple[str, ...] = ()) -> FolderSource:
    path = _require_path(name, path)
    if "{split}" in str(path):
        return FolderSource(str(path).replace("{split}", split), ignore=ignore)
    if not path.exists():
        raise DataError(f"{path} doesn't exist; give the folder that holds {split}/<class>/<image>")
    if path.is_file():
        return FolderSource(path, inside=split, ignore=ignore)
    for candidate in (path / split, path / f"{split}.zip"):
        if candidate.exists():
            return FolderSource(candidate, ignore=ignore)
    found = sorted({entry.stem for entry in path.iterdir() if entry.is_dir() or entry.suffix == ".zip"})
    raise DataError(f"{path} has no {split}/ and no {split}.zip; {_splits_found(found)}")


def _splits_found(found: list[str]) -> str:
    return f"it has {shorten(found)}; correct the split or the path"


def _open_tfds(name: str, path: Path | None, split: str) -> TfdsSource:
    return tfds_source(name.removeprefix("tfds:"), split, path)


_OPENERS = {
    "digits": _open_digits,
    "digits16": _open_digits16,
    "shapes": _open_shapes,
    "scenes": _open_scenes,
    "npz": _open_npz,
    "cifar10": _open_cifar,
    "cifar100": _open_cifar,
    "svhn": _open_svhn,
    "tiny_imagenet": _open_tiny_imagenet,
    "cub": _open_cub,
    "voc2012": _open_voc,
    "folder": _open_folder,
    "imagenet": _open_folder,
}
