"""Tiny-ImageNet in its official layout, a folder ``tiny-imagenet-200`` or the zip of it.

wnids.txt                      the classes, one a line
train/<wnid>/images/*.JPEG
val/images/*.JPEG              their classes: val/val_annotations.txt, <image> TAB <wnid> TAB <box>
test/                          has no labels
"""

from pathlib import Path

import numpy as np

from jaxvision.core.errors import ConfigError, DataError
from jaxvision.data.folder import FolderSource, ListedSource
from jaxvision.data.trees import open_tree, read_table

TOP = "tiny-imagenet-200"
CLASSES, ANNOTATIONS = "wnids.txt", "val_annotations.txt"
SPLITS = ("train", "val")


def tiny_imagenet(path: str | Path, split: str) -> FolderSource | ListedSource:
    """The training images, or the official validation images (the test set of the calibration papers).

    Classes are numbered by their sorted wnids and images are sorted by name, as in the official code of ACLS and
    RankMixup, whose training and validation images are a cut of ``train`` (:func:`jaxvision.data.splits.per_class`).

    Args:
      path: the folder ``tiny-imagenet-200``, the folder that holds it, or the official zip.
      split: ``"train"`` or ``"val"``.

    Raises:
      ConfigError: another split.
      DataError: naming the list, class or image that is missing or damaged.
    """
    if split not in SPLITS:
        raise ConfigError(f"split='{split}' is unknown for tiny_imagenet; use train or val (test has no labels)")
    path = Path(path)
    top = find_top(path)
    wnids = sorted(row[0] for row in read_table(open_tree(path, top), CLASSES, 1))
    inside = f"{top}/{split}".strip("/")
    if split == "train":
        source = FolderSource(path, inside=inside, ignore=("*.txt",))
        _check_classes(source, wnids)
        return source
    tree, number = open_tree(path, inside), {wnid: label for label, wnid in enumerate(wnids)}
    name = f"{tree.where}{ANNOTATIONS}"
    labels: dict[str, int] = {}
    for image, wnid, *_ in read_table(tree, ANNOTATIONS, 2):
        if wnid not in number:
            raise DataError(f"{name} gives {image} the class '{wnid}', which {CLASSES} doesn't list; restore both")
        labels[f"images/{image}"] = number[wnid]
    files = sorted(labels)
    return ListedSource(tree, files, np.array([labels[file] for file in files]), wnids, name)


def find_top(path: Path) -> str:
    """Where below ``path`` the data set lies: "" or ``tiny-imagenet-200``.

    Raises:
      DataError: there is none.
    """
    tree = open_tree(path)
    for top in ("", TOP):
        if tree.exists(f"{top}/{CLASSES}".strip("/")):
            return top
    raise DataError(f"{path} has no {CLASSES}; give the folder {TOP} or {TOP}.zip")


def _check_classes(source: FolderSource, wnids: list[str]) -> None:
    for name in sorted(set(wnids) ^ set(source.class_names)):
        listed, there = (CLASSES, "train/") if name in wnids else ("train/", CLASSES)
        raise DataError(f"{source.path}: {listed} has the class '{name}', which {there} lacks; restore both")
