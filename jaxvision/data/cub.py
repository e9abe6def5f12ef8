"""Caltech-UCSD Birds-200-2011 in its official layout.

images.txt               <number> <class folder>/<image>
image_class_labels.txt   <number> <class, from 1>
train_test_split.txt     <number> <1: train, 0: test>
classes.txt              <class> <name>
images/<class folder>/*.jpg
"""

from pathlib import Path

import numpy as np

from jaxvision.core.errors import ConfigError, DataError
from jaxvision.data.folder import ListedSource
from jaxvision.data.trees import Tree, open_tree, read_table

TOP = "CUB_200_2011"
LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
SPLITS = ("train", "test")


def cub(path: str | Path, split: str) -> ListedSource:
    """The birds of one split, in the order of ``images.txt``: 5,994 for training and 5,794 for testing.

    Args:
      path: the folder ``CUB_200_2011``, or the folder that holds it.
      split: ``"train"`` or ``"test"``.

    Raises:
      ConfigError: another split.
      DataError: naming the list, class or image that is missing or damaged.
    """
    if split not in SPLITS:
        raise ConfigError(f"split='{split}' is unknown for cub; use train or test")
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path} is no folder; give {TOP}, unpacked from {TOP}.tgz")
    tree = open_tree(path / TOP if (path / TOP).is_dir() else path)
    names = [row[1] for row in read_table(tree, "classes.txt", 2)]
    columns = [_column(tree, name) for name in LISTS[:3]]
    numbers = columns[0]
    for name, column in zip(LISTS[1:], columns[1:]):
        if column.keys() != numbers.keys():
            odd = min(column.keys() ^ numbers.keys(), key=int)
            raise DataError(
                f"{tree.where}{name} and {LISTS[0]} don't list the same images, such as {odd}; restore both"
            )
    files, labels, training = ([column[number] for number in numbers] for column in columns)
    chosen = [i for i, flag in enumerate(training) if flag == ("1" if split == "train" else "0")]
    label = np.array([_label(tree, files[i], labels[i], len(names)) for i in chosen], np.int32)
    return ListedSource(
        tree, [f"images/{files[i]}" for i in chosen], label, names, f"{tree.where}{LISTS[2]} for '{split}'"
    )


def _column(tree: Tree, name: str) -> dict[str, str]:
    """The second column by the first, an image's number."""
    rows = read_table(tree, name, 2)
    wrong = next((row[0] for row in rows if not row[0].isdecimal()), None)
    if wrong is not None:
        raise DataError(f"{tree.where}{name} has the image number {wrong!a}; restore it")
    return {row[0]: row[1] for row in rows}


def _label(tree: Tree, file: str, text: str, classes: int) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= classes:
        raise DataError(f"{tree.where}{LISTS[1]} gives {file} the class {text!a}, but there are {classes}; restore it")
    return int(text) - 1
