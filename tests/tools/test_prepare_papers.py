"""Preparing SVHN, Tiny-ImageNet, CUB and VOC: from archives and folders, killed and continued, and broken."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from jaxvision.data import open_source, prepare_images, prepare_layout
from jaxvision.data.prepare_journal import JOURNAL
from jaxvision.tools import prepare_data
from tests.data import layouts

VOC_TOP, CUB_TOP, TINY_TOP = "VOCdevkit/VOC2012/", "CUB_200_2011/", "tiny-imagenet-200/"


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output, and the line of the error; mistakes give exactly one line."""
    code = prepare_data.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.endswith(" done")]
    if code:
        assert len(lines) == 1 and lines[0].startswith("prepare_data: ") and "Traceback" not in err
    return code, out, lines[0] if code else ""


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_svhn(tmp_path, capsys, monkeypatch):
    source = tmp_path / "svhn"
    source.mkdir()
    for split, n in (("train", 6), ("test", 4)):
        layouts.svhn_mat(source / f"{split}_32x32.mat", n)
    code, _, error = run(capsys, "svhn", "--from", source, "--to", tmp_path / "data")
    assert code == 64 and "train_32x32.mat has MD5" in error and "e26dedcc434d2e4c54c9b2d4a06d8373" in error
    for name in ("train_32x32.mat", "test_32x32.mat"):
        monkeypatch.setitem(prepare_images.SVHN, name, md5(source / name))
    code, out, _ = run(capsys, "svhn", "--from", source, "--to", tmp_path / "data")
    assert code == 0 and "train.npz: 6 images of 10 classes" in out and "test.npz: 4 images" in out
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["source"]["official"] is True and manifest["outputs"]["train.npz"]["examples"] == 6
    for split in ("train", "test"):
        packed = open_source("svhn", path=tmp_path / "data", split=split)
        raw = open_source("svhn", path=source, split=split)
        np.testing.assert_array_equal(packed.take(np.arange(4))["image"], raw.take(np.arange(4))["image"])
        assert packed.labels.tolist() == raw.labels.tolist() and packed.class_names == tuple("0123456789")
    assert run(capsys, "svhn", "--from", source / "test_32x32.mat", "--to", tmp_path / "one")[0] == 0
    assert not (tmp_path / "one" / "train.npz").exists()
    code, _, error = run(capsys, "svhn", "--from", tmp_path, "--to", tmp_path / "data")
    assert code == 64 and "is and holds none of train_32x32.mat" in error


def test_a_truncated_mat_file(tmp_path, capsys):
    path = layouts.svhn_mat(tmp_path / "test_32x32.mat", 30)
    path.write_bytes(path.read_bytes()[:-1000])
    code, _, error = run(capsys, "svhn", "--from", tmp_path, "--to", tmp_path / "data", "--allow_other")
    assert code == 64 and f"{path} is cut short or damaged" in error and not (tmp_path / "data").exists()


def test_tiny_imagenet(tmp_path, capsys, monkeypatch):
    files = layouts.tiny_imagenet()
    folder = layouts.write(tmp_path / "tiny-imagenet-200", files)
    archive = layouts.write_zip(tmp_path / "tiny-imagenet-200.zip", files, TINY_TOP)
    code, _, error = run(capsys, "tiny_imagenet", "--from", archive, "--to", tmp_path / "a")
    assert code == 64 and "90528d7ca1a48142e341f4ef8d21d0de" in error and not (tmp_path / "a").exists()
    monkeypatch.setitem(prepare_images.TINY_IMAGENET, archive.name, md5(archive))
    for source, target in ((archive, "a"), (folder, "b")):
        code, out, _ = run(capsys, "tiny_imagenet", "--from", source, "--to", tmp_path / target)
        assert code == 0 and "train.npz: 36 images of 3 classes" in out and "val.npz: 6 images" in out
    for split in ("train", "val"):
        assert md5(tmp_path / "a" / f"{split}.npz") == md5(tmp_path / "b" / f"{split}.npz")
        packed = open_source("tiny_imagenet", path=tmp_path / "a", split=split)
        raw = open_source("tiny_imagenet", path=folder, split=split)
        assert packed.class_names == raw.class_names and packed.labels.tolist() == raw.labels.tolist()
        np.testing.assert_array_equal(packed.take(np.arange(6))["image"], raw.take(np.arange(6))["image"])
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["source"]["official"] is True


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("val/images/val_7.JPEG", layouts.picture(64, 63), "val_7.JPEG has 64x63 pixels, not 64x64"),
        ("val/images/val_7.JPEG", layouts.picture(64, 64)[:500], "val_7.JPEG can't be decoded"),
        ("train/n01443537/images/x.txt.jpg", b"", "x.txt.jpg is empty"),
    ],
)
def test_tiny_imagenet_with_a_broken_image(name, content, says, tmp_path, capsys):
    folder = layouts.write(tmp_path / "tiny", {**layouts.tiny_imagenet(), name: content})
    code, _, error = run(capsys, "tiny_imagenet", "--from", folder, "--to", tmp_path / "data")
    assert code == 64 and says in error and not (tmp_path / "data" / "val.npz").exists()


def found(target: Path) -> dict[str, bytes]:
    files = [path for path in target.rglob("*") if path.is_file() and not path.name.startswith((".", "manifest"))]
    return {path.relative_to(target).as_posix(): path.read_bytes() for path in files}


def test_cub_from_the_archive_and_the_folder(tmp_path, capsys, monkeypatch):
    files = layouts.cub()
    archive = layouts.write_tar(tmp_path / "CUB_200_2011.tgz", {"attributes.txt": b"x"} | {
        CUB_TOP + name: content for name, content in files.items()
    }, mode="w:gz")  # fmt: skip
    folder = layouts.write(tmp_path / "CUB_200_2011", files)
    code, _, error = run(capsys, "cub", "--from", archive, "--to", tmp_path / "a")
    assert code == 64 and "97eceeb196236b17998738112f37df78" in error
    monkeypatch.setitem(prepare_layout.CUB.archives, archive.name, md5(archive))
    code, out, _ = run(capsys, "cub", "--from", archive, "--to", tmp_path / "a", "--verify")
    assert code == 0 and "train: 6 images\ntest: 6 images\n16 files written, 0 there before" in out
    assert "verified: all images decode" in out
    assert run(capsys, "cub", "--from", folder, "--to", tmp_path / "b")[0] == 0
    expected = {
        name: content for name, content in files.items() if name not in ("README", "attributes/certainties.txt")
    }
    assert found(tmp_path / "a") == found(tmp_path / "b") == expected
    facts = [json.loads((tmp_path / each / "manifest.json").read_text()) for each in "ab"]
    assert facts[0]["splits"] == {"train": 6, "test": 6} and facts[0]["sources"][archive.name]["official"] is True
    assert facts[0]["sources"][archive.name]["blake2b"] == facts[1]["sources"]["CUB_200_2011"]["blake2b"]
    assert open_source("cub", path=tmp_path / "a", split="test").labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_second_run_keeps_what_is_whole_and_mends_the_rest(tmp_path, capsys):
    files, target = layouts.cub(), tmp_path / "cub"
    archive = layouts.write_tar(tmp_path / "birds.tgz", {CUB_TOP + name: files[name] for name in files}, mode="w:gz")
    arguments = ("cub", "--from", archive, "--to", target, "--allow_other")
    assert run(capsys, *arguments)[0] == 0
    before = found(target)
    names = sorted(name for name in before if name.endswith(".jpg"))
    (target / names[0]).unlink()
    (target / names[1]).write_bytes(before[names[1]][:50])
    (target / names[2]).write_bytes(bytes(len(before[names[2]])))  # as after a loss of power
    with open(target / JOURNAL, "ab") as journal:
        journal.write(b'{"name": "images/001')
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "3 files written, 13 there before" in out and found(target) == before


def test_voc_and_its_additions(tmp_path, capsys, monkeypatch):
    files, target = layouts.voc2012(), tmp_path / "voc"
    archive = layouts.write_tar(tmp_path / "VOCtrainval_11-May-2012.tar", files, VOC_TOP)
    assert "6cd6e144f989b92b3379bac3b3de84fd" in run(capsys, "voc2012", "--from", archive, "--to", target)[2]
    monkeypatch.setitem(prepare_layout.VOC2012.archives, archive.name, md5(archive))
    more = layouts.write_zip(
        tmp_path / "SegmentationClassAug.zip",
        {
            "SegmentationClassAug/2007_000032.png": layouts.grey_mask(layouts.voc_labels(38, 50, 0)),
            "__MACOSX/SegmentationClassAug/._2007_000032.png": b"junk",
            "list/train_aug.txt": b"/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n",
        },
    )
    code, _, error = run(capsys, "voc2012", "--from", more, "--to", tmp_path / "other", "--allow_other")
    assert code == 64 and ("has no JPEGImages/" in error or "prepare the main archive" in error)
    code, out, _ = run(capsys, "voc2012", "--from", archive, "--to", target, "--verify")
    assert code == 0 and "train: 3 images\ntrainval: 5 images\nval: 2 images\n13 files written" in out
    skipped = ("ImageSets/Main", "Annotations", "SegmentationObject")
    expected = {name: content for name, content in files.items() if not name.startswith(skipped)}
    assert found(target) == expected
    code, out, _ = run(capsys, "voc2012", "--from", more, "--to", target, "--allow_other")
    assert code == 0 and "train_aug: 1 images" in out and "2 files written" in out
    manifest = json.loads((target / "manifest.json").read_text())
    assert set(manifest["sources"]) == {archive.name, more.name}
    assert manifest["splits"] == {"train": 3, "trainval": 5, "val": 2, "train_aug": 1}
    assert len(open_source("voc2012", path=target, split="train_aug")) == 1
    code, _, error = run(capsys, "cub", "--from", archive, "--to", target, "--allow_other")
    assert code == 64 and "is the manifest of voc2012, not of cub" in error


MASK = "SegmentationClass/2007_000033.png"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"JPEGImages/2007_000033.jpg": b"x"}, "of 5 images are damaged, first: "),
        (
            {MASK: layouts.palette_mask(np.full((38, 50), 77, np.uint8))},
            "has the label 77, but the classes are 0 to 20",
        ),
        ({MASK: layouts.palette_mask(np.zeros((38, 51), np.uint8))}, f"{MASK} has 51x38 pixels, but its image"),
        ({"ImageSets/Segmentation/val.txt": b"2007_000099\n"}, "2007_000099.jpg doesn't exist, but the list 'val'"),
        ({"ImageSets/Segmentation/val.txt": b""}, "val.txt is empty"),
    ],
)
def test_voc_names_the_broken_file(change, says, tmp_path, capsys):
    folder = layouts.write(tmp_path / "VOC2012", {**layouts.voc2012(), **change})
    code, _, error = run(capsys, "voc2012", "--from", folder, "--to", tmp_path / "data", "--verify")
    assert code == 64 and says in error and str(tmp_path / "data") in error


def test_archives_that_are_damaged_or_lead_astray(tmp_path, capsys):
    files = {CUB_TOP + name: content for name, content in layouts.cub().items()}
    whole = layouts.write_tar(tmp_path / "whole.tgz", files, mode="w:gz").read_bytes()
    bad = {
        "cut.tgz": (whole[: len(whole) // 2], "download the archive again"),
        "text.tgz": (b"hello", "text.tgz is no tar archive or is damaged"),
        "evil.zip": (
            layouts.write_zip(tmp_path / "x", {"../images.txt": b"1"}).read_bytes(),
            "leads out of its folder",
        ),
        "evil.tar": (
            layouts.write_tar(tmp_path / "y", {"../images.txt": b"1"}).read_bytes(),
            "leads out of its folder",
        ),
        "none.tar": (layouts.write_tar(tmp_path / "z", {"a.txt": b"1"}).read_bytes(), "holds no file of cub"),
    }
    for name, (content, says) in bad.items():
        (tmp_path / name).write_bytes(content)
        code, _, error = run(capsys, "cub", "--from", tmp_path / name, "--to", tmp_path / "to", "--allow_other")
        assert code == 64 and says in error, name
    code, _, error = run(capsys, "cub", "--from", tmp_path / "nowhere", "--to", tmp_path / "to")
    assert code == 64 and "nowhere doesn't exist" in error
