"""PASCAL VOC 2012 segmentation in its official layout.

JPEGImages/<id>.jpg
SegmentationClass/<id>.png              palette images: 0 background, 1 to 20 the classes, 255 "ignore"
SegmentationClassAug/<id>.png           optional: 10,582 training masks, grey images
ImageSets/Segmentation/<split>.txt      an <id> a line; or list/<split>.txt
"""

from pathlib import Path

import numpy as np

from jaxvision.core.errors import DataError
from jaxvision.data.decode import NUM_THREADS, decode_image, decode_label_map, map_threaded
from jaxvision.data.folder import verify
from jaxvision.data.sources import Example, stack
from jaxvision.data.trees import open_tree, read_table, shorten

CLASS_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
IMAGES, MASKS, AUGMENTED = "JPEGImages", "SegmentationClass", "SegmentationClassAug"
LISTS = ("ImageSets/Segmentation", "list")
_TOPS = ("", "VOC2012", "VOCdevkit/VOC2012")


class VocSource:
    """Images with a label for each pixel; ``image`` uint8 ``[H, W, 3]`` and ``label_map`` uint8 ``[H, W]``.

    A list's lines are ids, or ``/JPEGImages/<id>.jpg /<masks>/<id>.png`` as in the lists of SegmentationClassAug.

    Args:
      path: the folder VOC2012, or one that holds it or VOCdevkit.
      split: the name of a list, such as ``"train"``, ``"val"``, ``"trainval"``, ``"train_aug"``.
      masks: the folder of the masks, for lists of ids.

    Raises:
      DataError: naming the list, image or mask that is missing; when read, the one that is damaged, the mask whose size
        is not its image's, or that has a label beyond the classes.
    """

    in_memory = False
    class_names = CLASS_NAMES
    num_classes = len(CLASS_NAMES)

    def __init__(self, path: str | Path, split: str, *, masks: str = MASKS):
        self.root = _root(Path(path))
        self._tree = open_tree(self.root)
        self.pairs = [_pair(row, masks) for row in read_table(self._tree, self._list(split), 1)]
        for name in (name for pair in self.pairs for name in pair):
            if not self._tree.exists(name):
                raise DataError(f"{self.root}/{name} doesn't exist, but the list '{split}' names it; restore it")

    def _list(self, split: str) -> str:
        for folder in LISTS:
            if self._tree.exists(f"{folder}/{split}.txt"):
                return f"{folder}/{split}.txt"
        found = sorted({file.stem for folder in LISTS for file in (self.root / folder).glob("*.txt")})
        raise DataError(f"{self.root}/{LISTS[0]}/{split}.txt doesn't exist; there are the lists {shorten(found)}")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        image_name, mask_name = self.pairs[index]
        where = f"{self.root}/{mask_name}"
        image = decode_image(self._tree.read(image_name), f"{self.root}/{image_name}")
        label_map = decode_label_map(self._tree.read(mask_name), where, self.num_classes)
        if label_map.shape != image.shape[:2]:
            raise DataError(
                f"{where} has {_size(label_map)} pixels, but its image {image_name} has {_size(image)}; restore both"
            )
        return {"image": image, "label_map": label_map}

    def take(self, indices: np.ndarray) -> Example:
        return stack(map_threaded(self.__getitem__, np.asarray(indices).tolist(), NUM_THREADS))

    def verify(self, num_threads: int = NUM_THREADS) -> int:
        """Reads every pair and returns their number; DataError counts the damaged ones and names the first."""
        return verify(self, num_threads)


def _root(path: Path) -> Path:
    for top in _TOPS:
        if (path / top / IMAGES).is_dir():
            return path / top
    raise DataError(f"{path} has no {IMAGES}/; give the folder VOC2012, or the one that holds VOCdevkit")


def _pair(row: list[str], masks: str) -> tuple[str, str]:
    if len(row) > 1:
        return row[0].lstrip("/"), row[1].lstrip("/")
    return f"{IMAGES}/{row[0]}.jpg", f"{masks}/{row[0]}.png"


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"
