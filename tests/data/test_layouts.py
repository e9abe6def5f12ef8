"""Tiny-ImageNet, CUB, VOC and SVHN as they are downloaded: what is read, and what a broken file is called."""

import io

import numpy as np
import pytest
from PIL import Image

from jaxvision.core.errors import ConfigError, DataError
from jaxvision.data import open_source, splits
from jaxvision.data.sources import Source
from jaxvision.data.voc import CLASS_NAMES
from tests.data import layouts


def fault(kind, name, **options):
    with pytest.raises(kind) as error:
        source = open_source(name, **options)
        source.verify()
    assert "\n" not in str(error.value)
    return str(error.value)


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


# Tiny-ImageNet


def test_tiny_imagenet_folder_and_zip(tmp_path):
    files = layouts.tiny_imagenet(8)
    folder = layouts.write(tmp_path / "data" / "tiny-imagenet-200", files)
    archive = layouts.write_zip(tmp_path / "tiny-imagenet-200.zip", files, "tiny-imagenet-200/")
    for path in (folder, folder.parent, archive):
        train = open_source("tiny_imagenet", path=path)
        assert isinstance(train, Source) and len(train) == 36 and train.class_names == tuple(sorted(layouts.WNIDS))
        assert train.labels.tolist() == np.repeat(range(3), 12).tolist()
        np.testing.assert_array_equal(train[1]["image"], pixels(files["train/n01443537/images/n01443537_1.JPEG"]))
        # names in their order as text, which the published split builds on
        np.testing.assert_array_equal(train[2]["image"], pixels(files["train/n01443537/images/n01443537_10.JPEG"]))
        val = open_source("tiny_imagenet", path=path, split="val")
        assert len(val) == 6 and val.class_names == train.class_names
        # sorted as text: val_10 (the fourth of the list, the first class of WNIDS), val_11, val_12, val_7, val_8, val_9
        assert val.labels.tolist() == [1, 0, 2, 1, 0, 2]
        np.testing.assert_array_equal(val.take(np.array([0]))["image"][0], pixels(files["val/images/val_10.JPEG"]))
        assert train.verify() + val.verify() == 42
    kept, held_out = splits.per_class(train.labels, 6, seed=1)
    assert len(kept) == 30 and np.bincount(train.labels[held_out]).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("split", "change", "says"),
    [
        ("train", {"wnids.txt": None}, "has no wnids.txt; give the folder tiny-imagenet-200"),
        ("train", {"wnids.txt": b"n02124075\nn01443537\n"}, "train/ has the class 'n04067472', which wnids.txt lacks"),
        ("train", {"wnids.txt": b"\n"}, "wnids.txt is empty"),
        ("train", {"train/n04067472/images": None}, "n04067472 is a class folder without images"),
        ("train", {"train/n04067472/images/n04067472_3.JPEG": b"x"}, "n04067472_3.JPEG can't be decoded"),
        ("train", {"train/n04067472/images/n04067472_3.JPEG": b""}, "n04067472_3.JPEG is empty"),
        ("val", {"val/val_annotations.txt": None}, "val_annotations.txt doesn't exist"),
        ("val", {"val/val_annotations.txt": b"val_7.JPEG\n"}, "line 1 has 1 of 2 columns"),
        ("val", {"val/val_annotations.txt": b"val_7.JPEG\tn999\n"}, "gives val_7.JPEG the class 'n999'"),
        ("val", {"val/val_annotations.txt": b"val_7.JPEG\tn02124075\n"}, "lists no image of the class 'n01443537'"),
        ("val", {"val/images/val_7.JPEG": None}, "val/images/val_7.JPEG doesn't exist"),
    ],
)
def test_tiny_imagenet_names_what_is_wrong(split, change, says, tmp_path):
    for path in (_changed(tmp_path / "a", layouts.tiny_imagenet(8), change), None):
        if path is None:
            files = _without(layouts.tiny_imagenet(8), change)
            path = layouts.write_zip(tmp_path / "a.zip", files)
            if "without images" in says:
                continue  # a zip of that tree has no such folder
        message = fault(DataError, "tiny_imagenet", path=path, split=split)
        assert says in message and str(path) in message


def _without(files, change):
    gone = [name for name, content in change.items() if content is None]
    files = {name: content for name, content in files.items() if not any(name.startswith(each) for each in gone)}
    return files | {name: content for name, content in change.items() if content is not None}


def _changed(folder, files, change):
    layouts.write(folder, _without(files, change))
    return folder


def test_tiny_imagenet_has_two_labelled_splits(tmp_path):
    layouts.write(tmp_path, layouts.tiny_imagenet(8))
    assert "split='test' is unknown" in fault(ConfigError, "tiny_imagenet", path=tmp_path, split="test")
    assert "nowhere doesn't exist" in fault(DataError, "tiny_imagenet", path=tmp_path / "nowhere")


# CUB


def test_cub(tmp_path):
    files = layouts.cub()
    folder = layouts.write(tmp_path / "CUB_200_2011", files)
    for path in (folder, tmp_path):
        train, test = (open_source("cub", path=path, split=split) for split in ("train", "test"))
        assert isinstance(train, Source) and train.class_names == layouts.BIRDS == test.class_names
        assert train.labels.tolist() == test.labels.tolist() == [0, 0, 1, 1, 2, 2]
        np.testing.assert_array_equal(train[2]["image"], pixels(files[f"images/{layouts.BIRDS[1]}/bird_6.jpg"]))
        np.testing.assert_array_equal(test[0]["image"], pixels(files[f"images/{layouts.BIRDS[0]}/bird_1.jpg"]))
        assert train.verify() + test.verify() == 12


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classes.txt": None}, "classes.txt doesn't exist, but the data set needs this list"),
        ({"images.txt": None}, "images.txt doesn't exist"),
        ({"train_test_split.txt": b"1 1\n2 0\n"}, "train_test_split.txt and images.txt don't list the same images"),
        ({"image_class_labels.txt": None}, "image_class_labels.txt doesn't exist"),
        ({"classes.txt": b"1 a\n2 b\n"}, "the class '3', but there are 2"),
        ({"classes.txt": b"1 a\n2 b\n3 c\n4 d\n"}, "for 'train' lists no image of the class 'd'"),
        ({"images.txt": b"one a.jpg\n"}, "images.txt has the image number 'one'"),
        ({f"images/{layouts.BIRDS[1]}/bird_6.jpg": None}, "bird_6.jpg doesn't exist, but"),
        ({f"images/{layouts.BIRDS[1]}/bird_6.jpg": b"x"}, "1 of 6 images are damaged, first"),
    ],
)
def test_cub_names_what_is_wrong(change, says, tmp_path):
    message = fault(DataError, "cub", path=_changed(tmp_path / "cub", layouts.cub(), change))
    assert says in message and f"{tmp_path}/cub/" in message


def test_cub_mistakes(tmp_path):
    layouts.write(tmp_path, layouts.cub())
    assert "split='val' is unknown for cub" in fault(ConfigError, "cub", path=tmp_path, split="val")
    assert "is no folder; give CUB_200_2011" in fault(DataError, "cub", path=tmp_path / "images.txt")


# VOC


def test_voc(tmp_path):
    files = layouts.voc2012()
    root = layouts.write(tmp_path / "VOCdevkit" / "VOC2012", files)
    for path in (root, root.parent, tmp_path):
        train = open_source("voc2012", path=path)
        assert isinstance(train, Source) and len(train) == 3 and train.num_classes == 21
        assert train.class_names == CLASS_NAMES and CLASS_NAMES[15] == "person"
        example = train[2]
        assert example["image"].shape == (50, 38, 3) and example["label_map"].dtype == np.uint8
        # indices, not the palette's colours
        np.testing.assert_array_equal(example["label_map"], layouts.voc_labels(38, 50, 4))
        np.testing.assert_array_equal(example["image"], pixels(files["JPEGImages/2007_000063.jpg"]))
        assert len(open_source("voc2012", path=path, split="trainval")) == 5 and train.verify() == 3
    assert train.take(np.array([0, 1]))["label_map"].shape == (2, 50, 38)


def test_voc_with_additional_masks_and_both_forms_of_lists(tmp_path):
    files = layouts.voc2012()
    labels = layouts.voc_labels(38, 50, 7)
    files["SegmentationClassAug/2007_000032.png"] = layouts.grey_mask(labels)
    files["list/train_aug.txt"] = b"/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n"
    files["ImageSets/Segmentation/aug_ids.txt"] = b"2007_000032\n"
    layouts.write(tmp_path, files)
    pairs = open_source("voc2012", path=tmp_path, split="train_aug")
    ids = open_source("voc2012", path=tmp_path, split="aug_ids", masks="SegmentationClassAug")
    official = open_source("voc2012", path=tmp_path, split="aug_ids")
    np.testing.assert_array_equal(pairs[0]["label_map"], labels)
    np.testing.assert_array_equal(ids[0]["label_map"], labels)
    np.testing.assert_array_equal(official[0]["label_map"], layouts.voc_labels(38, 50, 0))


MASK = "SegmentationClass/2007_000032.png"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ImageSets/Segmentation/train.txt": None}, "train.txt doesn't exist; there are the lists trainval, val"),
        ({"ImageSets/Segmentation/train.txt": b"\n"}, "train.txt is empty"),
        ({"JPEGImages/2007_000039.jpg": None}, "JPEGImages/2007_000039.jpg doesn't exist, but the list 'train' names"),
        ({MASK: None}, f"{MASK} doesn't exist"),
        ({MASK: layouts.palette_mask(np.zeros((50, 39), np.uint8))}, f"{MASK} has 39x50 pixels, but its image"),
        (
            {MASK: layouts.palette_mask(np.full((50, 38), 21, np.uint8))},
            f"{MASK} has the label 21, but the classes are",
        ),
        ({MASK: layouts.picture(38, 50, form="PNG")}, f"{MASK} has the colour mode RGB"),
        ({MASK: layouts.palette_mask(layouts.voc_labels(38, 50, 0))[:300]}, f"{MASK} can't be decoded"),
        ({MASK: b""}, f"{MASK} is empty"),
        ({"JPEGImages/2007_000032.jpg": b"x"}, "JPEGImages/2007_000032.jpg can't be decoded"),
        ({"JPEGImages": None}, "has no JPEGImages/; give the folder VOC2012"),
    ],
)
def test_voc_names_what_is_wrong(change, says, tmp_path):
    message = fault(DataError, "voc2012", path=_changed(tmp_path, layouts.voc2012(), change))
    assert says in message and str(tmp_path) in message


# SVHN


def test_svhn(tmp_path):
    from scipy.io import loadmat

    layouts.svhn_mat(tmp_path / "train_32x32.mat", 7)
    layouts.svhn_mat(tmp_path / "test_32x32.mat", 3)
    raw = loadmat(tmp_path / "train_32x32.mat")
    source = open_source("svhn", path=tmp_path)
    assert source.num_classes == 10 and len(open_source("svhn", path=tmp_path, split="test")) == 3
    assert source.labels.tolist() == [1, 4, 7, 0, 3, 6, 9]  # 10 is the digit 0
    for n, y, x, c in ((0, 0, 0, 0), (6, 31, 2, 1), (3, 5, 30, 2)):
        assert source[n]["image"][y, x, c] == raw["X"][y, x, c, n]
    assert "extra_32x32.mat can't be read: No such file" in fault(DataError, "svhn", path=tmp_path, split="extra")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"y": None}, "has no array 'y'"),
        ({"X": None}, "has no array 'X'"),
        ({"y": np.ones((4, 1), np.uint8)}, "has 5 images in 'X' and 4 labels in 'y'"),
        ({"y": np.full((5, 1), 11, np.uint8)}, "'y' holds other labels than 1 to 10"),
        ({"y": np.zeros((5, 1), np.uint8)}, "'y' holds other labels than 1 to 10"),
        ({"X": np.zeros((32, 32, 3, 5))}, "'X' is float64 (32, 32, 3, 5), not uint8"),
        ({"X": np.zeros((28, 32, 3, 5), np.uint8)}, "'X' is uint8 (28, 32, 3, 5)"),
    ],
)
def test_svhn_of_wrong_form(changes, says, tmp_path):
    path = layouts.svhn_mat(tmp_path / "train_32x32.mat", **changes)
    message = fault(DataError, "svhn", path=tmp_path)
    assert says in message and str(path) in message


def test_svhn_cut_short_anywhere_or_no_mat_file(tmp_path):
    path = layouts.svhn_mat(tmp_path / "train_32x32.mat", 40)
    content = path.read_bytes()
    for length in (0, 3, 60, 127, 128, 132, 140, 200, 5000, len(content) // 2, len(content) - 90, len(content) - 1):
        path.write_bytes(content[:length])
        message = fault(DataError, "svhn", path=tmp_path)
        assert "cut short" in message and str(path) in message, length
    for content in (b"<html>" * 100, b"\x89HDF\r\n\x1a\n" + bytes(1000), b"MATLAB 5.0 MAT-file" + bytes(500)):
        path.write_bytes(content)
        assert str(path) in fault(DataError, "svhn", path=tmp_path)
