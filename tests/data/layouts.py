"""Tiny data sets in the real formats, written by the tests that read them."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from jaxvision.data import voc

WNIDS = ("n02124075", "n01443537", "n04067472")
BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")


def picture(width: int, height: int, seed: int = 0, form: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def palette_mask(labels: np.ndarray) -> bytes:
    """As VOC writes masks: indices into a palette of colours that say nothing about the index."""
    palette = Image.new("P", labels.shape[::-1])
    palette.putdata(labels.reshape(-1).tolist())
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    file = io.BytesIO()
    palette.save(file, "PNG")
    return file.getvalue()


def grey_mask(labels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(labels).save(file, "PNG")
    return file.getvalue()


def tiny_imagenet(side: int = 64) -> dict[str, bytes]:
    """Twelve images of each class for training (so that names don't sort by number), two for testing."""
    files = {"wnids.txt": "\n".join(WNIDS).encode(), "words.txt": b"n01443537\tgoldfish\n"}
    for k, wnid in enumerate(WNIDS):
        files[f"train/{wnid}/{wnid}_boxes.txt"] = f"{wnid}_0.JPEG\t0\t0\t9\t9\n".encode()
        for i in range(12):
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = picture(side, side, 20 * k + i)
    lines = []
    for i in range(6):
        files[f"val/images/val_{i + 7}.JPEG"] = picture(side, side, 100 + i)
        lines.append(f"val_{i + 7}.JPEG\t{WNIDS[i % 3]}\t0\t32\t44\t62\n")
    files["val/val_annotations.txt"] = "".join(lines).encode()
    files["test/images/test_0.JPEG"] = picture(side, side, 200)
    return files


def cub() -> dict[str, bytes]:
    """Four images of each class, two of them for training."""
    images, labels, training = [], [], []
    files = {"classes.txt": "".join(f"{i} {name}\n" for i, name in enumerate(BIRDS, 1)).encode()}
    for k, bird in enumerate(BIRDS):
        for i in range(4):
            number = 4 * k + i + 1
            images.append(f"{number} {bird}/bird_{number}.jpg\n")
            labels.append(f"{number} {k + 1}\n")
            training.append(f"{number} {i % 2}\n")
            files[f"images/{bird}/bird_{number}.jpg"] = picture(20 + i, 30, number)
    lists = {"images.txt": images, "image_class_labels.txt": labels, "train_test_split.txt": training}
    files |= {name: "".join(lines).encode() for name, lines in lists.items()}
    return files | {"attributes/certainties.txt": b"1 not visible\n", "README": b"birds"}


def voc_labels(width: int, height: int, seed: int) -> np.ndarray:
    labels = np.random.default_rng(seed).choice(np.array([0, 1, 15, 20, 255], np.uint8), (height, width))
    labels[0, 0] = 20
    return labels


def voc2012() -> dict[str, bytes]:
    """Five images: three in the list train, two in val; and what isn't segmentation."""
    files = {
        "ImageSets/Segmentation/train.txt": b"2007_000032\n2007_000039\n2007_000063",  # no newline at the end
        "ImageSets/Segmentation/val.txt": b"2007_000033\n2007_000042\n",
        "ImageSets/Segmentation/trainval.txt": b"2007_000032\n2007_000033\n2007_000039\n2007_000042\n2007_000063\n",
        "ImageSets/Main/aeroplane_train.txt": b"2007_000032 1\n",
        "Annotations/2007_000032.xml": b"<annotation/>",
        "SegmentationObject/2007_000032.png": b"instances",
    }
    for i, name in enumerate(("2007_000032", "2007_000033", "2007_000039", "2007_000042", "2007_000063")):
        width, height = (50, 38) if i % 2 else (38, 50)
        files[f"{voc.IMAGES}/{name}.jpg"] = picture(width, height, i)
        files[f"{voc.MASKS}/{name}.png"] = palette_mask(voc_labels(width, height, i))
    return files


def svhn_mat(path: Path, n: int = 5, **changes) -> Path:
    """The form of the official files: compressed, images along the last axis, ten for the digit 0."""
    draw = np.random.default_rng(n)
    arrays = {
        "X": draw.integers(0, 256, (32, 32, 3, n), np.uint8),
        "y": (np.arange(n, dtype=np.uint8)[:, None] * 3) % 10 + 1,
        **changes,
    }
    savemat(path, {name: array for name, array in arrays.items() if array is not None}, do_compression=True)
    return path


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path: Path, files: dict[str, bytes], top: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{top}{name}", content)
    return path


def write_tar(path: Path, files: dict[str, bytes], top: str = "", mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{top}{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
