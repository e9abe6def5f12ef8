"""Preparing data sets: the arrays and folders are right, runs can be killed, bad input ends in one line."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxvision.data import open_source, prepare_cifar
from jaxvision.data.prepare_journal import JOURNAL
from jaxvision.tools import prepare_data

ROOT = Path(__file__).parents[2]
SYNSETS = ("n01440764", "n01443537", "n01484850")


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output, and the line of the error; mistakes give exactly one line."""
    code = prepare_data.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.endswith(" done")]
    if code:
        assert len(lines) == 1 and lines[0].startswith("prepare_data: ") and "Traceback" not in err
    return code, out, lines[0] if code else ""


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "jaxvision.tools.prepare_data", *map(str, arguments)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


# CIFAR


CLASSES = {("cifar10", "label"): 10, ("cifar100", "label"): 100, ("cifar100", "coarse_label"): 20}


def cifar_files(kind: str, seed: int = 0) -> dict[str, bytes]:
    """The files of an archive with three images a batch."""
    draw = np.random.default_rng(seed)
    form = prepare_cifar.FORMS[kind]
    files = {}
    for split, batches in form.splits.items():
        for batch in batches:
            value = {b"data": draw.integers(0, 256, (3, 3072), np.uint8), b"batch_label": split.encode()}
            for array, (key, _) in form.labels.items():
                value[key.encode()] = draw.integers(0, CLASSES[kind, array], 3).tolist()
            files[batch] = pickle.dumps(value, protocol=2)
    names = {
        key.encode(): [f"{array}{i}".encode() for i in range(CLASSES[kind, array])]
        for array, (_, key) in form.labels.items()
    }
    files[form.meta] = pickle.dumps(names, protocol=2)
    return files


def write_cifar(path: Path, kind: str, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"readme.html": b"<html>", **files}.items():
            member = tarfile.TarInfo(f"{prepare_cifar.FORMS[kind].folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_archive(kind, tmp_path, capsys):
    files = cifar_files(kind)
    source = write_cifar(tmp_path / "download.tar.gz", kind, files)
    target = tmp_path / "data"
    code, out, _ = run(capsys, kind, "--from", source, "--to", target, "--allow_other")
    assert code == 0 and "train.npz: " in out
    batches = prepare_cifar.FORMS[kind].splits["train"]
    raw = np.concatenate([pickle.loads(files[batch])[b"data"] for batch in batches])
    with np.load(target / "train.npz") as arrays:
        assert arrays["image"].shape == (len(raw), 32, 32, 3) and arrays["image"].dtype == np.uint8
        assert arrays["label"].dtype == np.int64
        for n, y, x, channel in [(0, 0, 0, 0), (1, 2, 3, 1), (2, 31, 30, 2), (len(raw) - 1, 5, 0, 1)]:
            assert arrays["image"][n, y, x, channel] == raw[n, channel * 1024 + y * 32 + x]
        key = b"labels" if kind == "cifar10" else b"fine_labels"
        assert arrays["label"].tolist() == [label for batch in batches for label in pickle.loads(files[batch])[key]]
        assert arrays["class_names"].tolist() == [f"label{i}" for i in range(CLASSES[kind, "label"])]
        if kind == "cifar100":
            assert arrays["coarse_label"].tolist() == pickle.loads(files["train"])[b"coarse_labels"]
            assert arrays["coarse_class_names"][3] == "coarse_label3"
    opened = open_source(kind, path=target, split="test")
    assert len(opened) == 3 and opened.num_classes == CLASSES[kind, "label"] and opened.class_names[9] == "label9"
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["source"]["official"] is False
    assert manifest["source"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    for name, facts in manifest["outputs"].items():
        assert facts["sha256"] == hashlib.sha256((target / name).read_bytes()).hexdigest()
    assert manifest["outputs"]["train.npz"]["examples"] == len(raw)
    assert sum(manifest["outputs"]["test.npz"]["examples_per_class"]) == 3


def test_cifar_folder_gives_the_same_bytes_as_the_archive(tmp_path, capsys):
    files = cifar_files("cifar10")
    folder = tmp_path / "unpacked" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    archive = write_cifar(tmp_path / "a.tar.gz", "cifar10", files)
    for source, target in ((archive, "1"), (folder, "2"), (folder.parent, "3")):
        assert run(capsys, "cifar10", "--from", source, "--to", tmp_path / target, "--allow_other")[0] == 0
    contents = {(tmp_path / target / "train.npz").read_bytes() for target in "123"}
    assert len(contents) == 1


def test_official_md5(tmp_path, capsys, monkeypatch):
    source = write_cifar(tmp_path / "cifar-10-python.tar.gz", "cifar10", cifar_files("cifar10"))
    md5 = hashlib.md5(source.read_bytes()).hexdigest()
    code, _, error = run(capsys, "cifar10", "--from", source, "--to", tmp_path / "data")
    assert code == 64 and f"has MD5 {md5}" in error and "c58f30108f718f92721af3b95e74349a" in error
    assert "--allow_other" in error and not (tmp_path / "data").exists()
    official = dataclasses.replace(prepare_cifar.FORMS["cifar10"], md5=md5)
    monkeypatch.setitem(prepare_cifar.FORMS, "cifar10", official)
    assert run(capsys, "cifar10", "--from", source, "--to", tmp_path / "data")[0] == 0
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["source"]["official"] is True
    code, _, error = run(capsys, "cifar100", "--from", source, "--to", tmp_path / "other")
    assert code == 64 and "run the command 'cifar10' on it" in error


def _bad_cifar(name: str) -> dict[str, bytes]:
    files = cifar_files("cifar10")
    batch = pickle.loads(files["data_batch_2"])
    if name == "missing batch":
        del files["data_batch_3"]
    elif name == "labels too few":
        files["data_batch_2"] = pickle.dumps({**batch, b"labels": [1, 2]}, protocol=2)
    elif name == "label too large":
        files["data_batch_2"] = pickle.dumps({**batch, b"labels": [1, 2, 10]}, protocol=2)
    elif name == "no data":
        files["data_batch_2"] = pickle.dumps({b"labels": [1, 2, 3]}, protocol=2)
    elif name == "wrong shape":
        files["data_batch_2"] = pickle.dumps({**batch, b"data": batch[b"data"][:, :100]}, protocol=2)
    elif name == "empty":
        files["data_batch_2"] = pickle.dumps({**batch, b"data": batch[b"data"][:0], b"labels": []}, protocol=2)
    elif name == "no names":
        files["batches.meta"] = pickle.dumps({b"vec": 1}, protocol=2)
    elif name == "no pickle":
        files["data_batch_2"] = b"<html>"
    return files


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing batch", "has no cifar-10-batches-py/data_batch_3"),
        ("labels too few", "data_batch_2 has 3 images and 2 'labels'"),
        ("label too large", "data_batch_2 has no list 'labels' of numbers from 0 to 9"),
        ("no data", "data_batch_2 has no uint8 array 'data'"),
        ("wrong shape", "data_batch_2 has no uint8 array 'data'"),
        ("empty", "data_batch_2 holds no images"),
        ("no names", "batches.meta has no list of class names"),
        ("no pickle", "data_batch_2 can't be read"),
    ],
)
def test_cifar_of_wrong_form(name, says, tmp_path, capsys):
    source = write_cifar(tmp_path / "a.tar.gz", "cifar10", _bad_cifar(name))
    code, _, error = run(capsys, "cifar10", "--from", source, "--to", tmp_path / "data", "--allow_other")
    assert code == 64 and says in error


class _Attack:
    def __init__(self, mark: Path):
        self._mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self._mark}'",)


def test_cifar_that_asks_for_code(tmp_path, capsys):
    files = cifar_files("cifar10")
    files["test_batch"] = pickle.dumps({b"data": _Attack(tmp_path / "ran")})
    source = write_cifar(tmp_path / "a.tar.gz", "cifar10", files)
    code, _, error = run(capsys, "cifar10", "--from", source, "--to", tmp_path / "data", "--allow_other")
    assert code == 64 and "test_batch asks to run posix.system; refused" in error
    assert not (tmp_path / "ran").exists()
    pickle.loads(files["test_batch"])
    assert (tmp_path / "ran").exists()  # the attack is a real one


def test_cifar_archive_that_is_none(tmp_path, capsys):
    paths = {
        "text": b"hello",
        "cut": write_cifar(tmp_path / "a", "cifar10", cifar_files("cifar10")).read_bytes()[:5000],
    }
    for name, content in paths.items():
        path = tmp_path / name
        path.write_bytes(content)
        code, _, error = run(capsys, "cifar10", "--from", path, "--to", tmp_path / "data", "--allow_other")
        assert code == 64 and f"{path} is" in error and "damaged" in error
    code, _, error = run(capsys, "cifar10", "--from", tmp_path / "nowhere", "--to", tmp_path / "data")
    assert code == 64 and "nowhere doesn't exist" in error
    (tmp_path / "bad.tar.gz").write_bytes(gzip.compress(tar_bytes({"../evil": b"x"})))
    code, _, error = run(capsys, "cifar10", "--from", tmp_path / "bad.tar.gz", "--to", tmp_path / "d", "--allow_other")
    assert code == 64 and "'../evil', which leads out of its folder; refused" in error


# class folders


def picture(width: int, height: int, seed: int = 0, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def photo_tree() -> dict[str, bytes]:
    tree = {f"dog/{i}.png": picture(8, 8, i) for i in range(3)}
    return tree | {"cat/wide.png": picture(20, 10, 7), "cat/tall.jpg": picture(9, 12, 8, "JPEG")}


def write_tree(folder: Path, tree: dict[str, bytes]) -> Path:
    for name, content in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_folder_and_zip_pack_alike(tmp_path, capsys):
    tree = photo_tree()
    folder = write_tree(tmp_path / "photos", tree)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for name, content in tree.items():
            archive.writestr(name, content)
    for source, target in ((folder, "a.npz"), (tmp_path / "photos.zip", "b.npz")):
        code, out, _ = run(capsys, "folder", "--from", source, "--to", tmp_path / target, "--size", 8)
        assert code == 0 and f"{target}: 5 images of 2 classes" in out
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["image"].shape == (5, 8, 8, 3) and arrays["image"].dtype == np.uint8
        assert arrays["label"].tolist() == [0, 0, 1, 1, 1] and arrays["class_names"].tolist() == ["cat", "dog"]
        np.testing.assert_array_equal(arrays["image"][3], np.asarray(Image.open(io.BytesIO(tree["dog/1.png"]))))
        wide = Image.open(io.BytesIO(tree["cat/wide.png"])).resize((16, 8), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(arrays["image"][1], np.asarray(wide)[:, 4:12])
    manifest = json.loads((tmp_path / "b.manifest.json").read_text())
    assert manifest["outputs"]["b.npz"]["examples_per_class"] == [2, 3]
    assert len(open_source("npz", path=tmp_path / "{split}.npz", split="a")) == 5


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("dog/broken.png", picture(8, 8)[:60], "dog/broken.png can't be decoded"),
        ("dog/empty.png", b"", "dog/empty.png is empty"),
        ("dog/labels.txt", b"1", "dog/labels.txt is not an image"),
        ("loose.png", picture(8, 8), "loose.png lies outside a class folder"),
        ("bird/.keep", b"", "bird is a class folder without images"),
    ],
)
def test_folder_names_what_is_wrong(name, content, says, tmp_path, capsys):
    folder = write_tree(tmp_path / "photos", {**photo_tree(), name: content})
    code, _, error = run(capsys, "folder", "--from", folder, "--to", tmp_path / "a.npz", "--size", 8)
    assert code == 64 and says in error and not (tmp_path / "a.npz").exists()


def test_folder_arguments(tmp_path, capsys):
    folder = write_tree(tmp_path / "photos", photo_tree())
    for size, target, says in ((0, "a.npz", "--size=0"), (8, "a.zip", "ends in .npz"), (10**9, "a.npz", "GiB")):
        code, _, error = run(capsys, "folder", "--from", folder, "--to", tmp_path / target, "--size", size)
        assert code == 64 and says in error


# ImageNet


def tar_bytes(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


TRAIN = {
    f"{synset}/{synset}_{i}.JPEG": picture(12, 9, 10 * k + i, "JPEG")
    for k, synset in enumerate(SYNSETS)
    for i in range(3)
}
VAL = {f"ILSVRC2012_val_{i:08d}.JPEG": picture(9, 12, 100 + i, "JPEG") for i in range(1, 7)}
VAL_SYNSETS = [SYNSETS[i] for i in (2, 0, 1, 1, 0, 2)]
EXPECTED = {f"train/{name}": content for name, content in TRAIN.items()} | {
    f"val/{synset}/{name}": content for synset, (name, content) in zip(VAL_SYNSETS, VAL.items())
}


def train_tar() -> bytes:
    inner = {
        f"{synset}.tar": tar_bytes({n.split("/")[1]: c for n, c in TRAIN.items() if n.startswith(synset)})
        for synset in SYNSETS
    }
    return tar_bytes(inner)


def write_tars(folder: Path) -> Path:
    return write_tree(folder, {"ILSVRC2012_img_train.tar": train_tar(), "ILSVRC2012_img_val.tar": tar_bytes(VAL)})


def write_devkit(path: Path) -> Path:
    from scipy.io import savemat

    rows = [(3, SYNSETS[2]), (1, SYNSETS[0]), (2, SYNSETS[1]), (1001, "n00001740")]
    synsets = np.array(rows, [("ILSVRC2012_ID", object), ("WNID", object)]).reshape(-1, 1)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{SYNSETS.index(synset) + 1}\n" for synset in VAL_SYNSETS)
    root = "ILSVRC2012_devkit_t12/data"
    files = {f"{root}/meta.mat": meta.getvalue(), f"{root}/ILSVRC2012_validation_ground_truth.txt": truth.encode()}
    path.write_bytes(gzip.compress(tar_bytes(files)))
    return path


def found(target: Path) -> dict[str, bytes]:
    files = [path for split in ("train", "val") for path in (target / split).rglob("*") if path.is_file()]
    return {path.relative_to(target).as_posix(): path.read_bytes() for path in files}


def val_labels(path: Path, form: str) -> Path:
    lines = {
        "order": VAL_SYNSETS,
        "pairs": [f"val/{name} {synset}" for name, synset in reversed(list(zip(VAL, VAL_SYNSETS)))],
        "kaggle": ["ImageId,PredictionString", *(f"{n[:-5]},{s} 1 2 3 4" for n, s in zip(VAL, VAL_SYNSETS))],
    }[form]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_imagenet_from_tars_and_devkit(tmp_path, capsys):
    source, target = write_tars(tmp_path / "source"), tmp_path / "imagenet"
    devkit = write_devkit(tmp_path / "devkit.tar.gz")
    code, out, _ = run(capsys, "imagenet", "--from", source, "--to", target, "--devkit", devkit, "--verify")
    assert code == 0 and "train: 9 images of 3 classes" in out and "verified: all 15 images decode" in out
    assert found(target) == EXPECTED
    manifest = json.loads((target / "manifest.json").read_text())["splits"]
    assert manifest["val"]["images"] == 6 and manifest["train"]["bytes"] == sum(map(len, TRAIN.values()))
    opened = open_source("imagenet", path=target, split="val")
    assert opened.class_names == SYNSETS and opened.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert run(capsys, "imagenet", "--to", target, "--verify")[0] == 0


@pytest.mark.parametrize("form", ["order", "pairs", "kaggle"])
def test_imagenet_from_folders_with_flat_val(form, tmp_path, capsys):
    tree = {f"train/{name}": content for name, content in TRAIN.items()}
    source = write_tree(tmp_path / "source", tree | {f"val/{name}": content for name, content in VAL.items()})
    labels = val_labels(tmp_path / "labels.txt", form)
    target = tmp_path / "imagenet"
    assert run(capsys, "imagenet", "--from", source, "--to", target, "--val_labels", labels)[0] == 0
    assert found(target) == EXPECTED


def test_imagenet_splits_one_by_one_and_from_class_folders(tmp_path, capsys):
    tars, devkit = write_tars(tmp_path / "tars"), write_devkit(tmp_path / "devkit.tar.gz")
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(capsys, "imagenet", "--from", tars / "ILSVRC2012_img_train.tar", "--to", first)[0] == 0
    val = tars / "ILSVRC2012_img_val.tar"
    assert run(capsys, "imagenet", "--from", val, "--to", first, "--devkit", devkit)[0] == 0
    assert found(first) == EXPECTED
    assert run(capsys, "imagenet", "--from", first, "--to", second)[0] == 0
    assert found(second) == EXPECTED
    splits = [json.loads((target / "manifest.json").read_text())["splits"] for target in (first, second)]
    for split in ("train", "val"):
        assert splits[0][split]["blake2b"] == splits[1][split]["blake2b"]


def test_second_run_keeps_what_is_whole_and_mends_the_rest(tmp_path, capsys):
    source, target = write_tars(tmp_path / "source"), tmp_path / "imagenet"
    devkit = write_devkit(tmp_path / "devkit.tar.gz")
    arguments = ("imagenet", "--from", source, "--to", target, "--devkit", devkit)
    run(capsys, *arguments)
    names = sorted(EXPECTED)
    (target / names[0]).unlink()
    (target / names[1]).write_bytes(EXPECTED[names[1]][:50])
    (target / names[2]).write_bytes(bytes(len(EXPECTED[names[2]])))  # as after a loss of power
    with open(target / JOURNAL, "ab") as journal:
        journal.write(b'{"name": "train/n014')
    untouched = (target / names[3]).stat().st_mtime_ns
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "(3 written, 6 there before)" in out and "(0 written, 6 there before)" in out
    assert found(target) == EXPECTED and (target / names[3]).stat().st_mtime_ns == untouched
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "(0 written, 9 there before)" in out


def test_killed_run_continues(tmp_path, capsys):
    """kill -9 in the middle leaves only whole files under final names; the next run copies the rest."""
    content = {f"{SYNSETS[i % 2]}/{i}.JPEG": b"%d " % i * 50 for i in range(2500)}
    source = write_tree(tmp_path / "source", {f"train/{name}": data for name, data in content.items()})
    target = tmp_path / "imagenet"
    journal = target / JOURNAL
    process = subprocess.Popen(command("imagenet", "--from", source, "--to", target), env=ENVIRONMENT)
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.stat().st_size > 5_000) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -9
    whole = [path for path in (target / "train").rglob("*.JPEG") if not path.name.startswith(".")]
    assert 0 < len(whole) < len(content)
    assert all(path.read_bytes() == content[path.relative_to(target / "train").as_posix()] for path in whole)
    code, out, _ = run(capsys, "imagenet", "--from", source, "--to", target)
    kept = int(out.split("written, ")[1].split(" ")[0])
    assert code == 0 and len(whole) - 1 <= kept <= len(whole)
    assert {name.removeprefix("train/"): data for name, data in found(target).items()} == content


def test_full_disk(tmp_path):
    source = write_cifar(tmp_path / "a.tar.gz", "cifar10", cifar_files("cifar10"))
    target = tmp_path / "data"
    arguments = command("cifar10", "--from", source, "--to", target, "--allow_other")
    limited = ["sh", "-c", 'ulimit -f 20; exec "$@"', "sh", *arguments]
    done = subprocess.run(limited, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 74
    assert done.stderr.splitlines()[-1].startswith(
        f"prepare_data: {target / 'train.npz'} can't be written: File too large"
    )
    assert "Traceback" not in done.stderr and list(target.iterdir()) == []


def test_target_in_the_way(tmp_path, capsys):
    source = write_cifar(tmp_path / "a.tar.gz", "cifar10", cifar_files("cifar10"))
    (tmp_path / "file").write_text("")
    code, _, error = run(capsys, "cifar10", "--from", source, "--to", tmp_path / "file", "--allow_other")
    assert code == 64 and "a file stands in its place" in error


def member_tar(name: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "elsewhere"
        archive.addfile(member)
    return file.getvalue()


EVIL = {
    "parent": (member_tar("../../evil.JPEG"), "leads out of its folder; refused"),
    "absolute": (member_tar("/evil.JPEG"), "leads out of its folder; refused"),
    "inside": (member_tar("a/../../evil.JPEG"), "leads out of its folder; refused"),
    "backslash": (member_tar("..\\evil.JPEG"), "leads out of its folder; refused"),
    "symlink": (member_tar("evil.JPEG", tarfile.SYMTYPE), "a link or a device; refused"),
    "hardlink": (member_tar("evil.JPEG", tarfile.LNKTYPE), "a link or a device; refused"),
    "device": (member_tar("evil.JPEG", tarfile.CHRTYPE), "a link or a device; refused"),
    "other file": (tar_bytes({"readme.txt": b"x"}), "'readme.txt', which is no image"),
    "empty class": (tar_bytes({}), "n01440764.tar holds no images"),
    "no tar": (b"x" * 3000, "n01440764.tar is no tar archive or is damaged"),
    "cut": (tar_bytes({"a.JPEG": b"x" * 3000})[:1024], "a.JPEG can't be read (unexpected end of data)"),
    "cut between files": (tar_bytes({"a.JPEG": b"x" * 512, "b.JPEG": b"y"})[:1024], "has no end mark"),
    "twice": (tar_bytes({"a.JPEG": b"x", "./a.JPEG": b"y"}), "is there twice"),
}


@pytest.mark.parametrize("name", EVIL)
def test_bad_class_archives(name, tmp_path, capsys):
    content, says = EVIL[name]
    source = tmp_path / "source.tar"
    source.write_bytes(tar_bytes({"n01440764.tar": content}))
    code, _, error = run(capsys, "imagenet", "--from", source, "--to", tmp_path / "deep" / "imagenet")
    assert code == 64 and says in error and str(source) in error
    assert not list(tmp_path.rglob("*evil*"))


def test_archive_cut_short(tmp_path, capsys):
    content = train_tar()
    source = tmp_path / "train.tar"
    for end in (len(content) // 2, 512 * 30, 700, 0):
        source.write_bytes(content[:end])
        code, _, error = run(capsys, "imagenet", "--from", source, "--to", tmp_path / f"to{end}")
        assert code == 64 and str(source) in error


def _wrong(name: str, folder: Path) -> list:
    """The arguments of a mistake about splits and labels."""
    labels, write = folder / "labels.txt", lambda tree: write_tree(folder / "source", tree)
    labels.write_text("n01440764\n" * 5)
    flat = {f"val/{file}": content for file, content in VAL.items()}
    if name == "nothing there":
        return ["--from", write({"photos/a.jpg": b"x"})]
    if name == "train under the name of val":
        return ["--from", write({"ILSVRC2012_img_val.tar": train_tar()})]
    if name == "val under the name of train":
        return ["--from", write({"ILSVRC2012_img_train.tar": tar_bytes(VAL)})]
    if name == "test split":
        images = {"ILSVRC2012_test_00000001.JPEG": b"x"}
        return ["--from", write({"ILSVRC2012_img_val.tar": tar_bytes(images)}), "--val_labels", labels]
    if name == "flat without labels":
        return ["--from", write(flat)]
    if name == "too few labels":
        return ["--from", write(flat), "--val_labels", labels]
    if name == "label of no image":
        labels.write_text("cat.JPEG n01440764\n")
        return ["--from", write(flat), "--val_labels", labels]
    if name == "label is no synset":
        labels.write_text("n01440764\ncat\n")
        return ["--from", write(flat), "--val_labels", labels]
    if name == "both labels":
        return ["--from", write(flat), "--val_labels", labels, "--devkit", labels]
    if name == "devkit is none":
        return ["--from", write(flat), "--devkit", write({"a/b.txt": b"x"})]
    if name == "empty class":
        (folder / "source/train/n01440764").mkdir(parents=True)
        return ["--from", folder / "source"]
    if name == "class folder":
        return ["--from", write({"train/cats/a.JPEG": b"x"})]
    if name == "classes differ":
        return ["--from", write({"train/n01440764/a.JPEG": b"x", "val/n01443537/a.JPEG": b"x"})]
    return []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing there", "source has no train/, val/, ILSVRC2012_img_train.tar"),
        ("train under the name of val", "ILSVRC2012_img_val.tar holds class archives: it is the training split"),
        (
            "val under the name of train",
            "ILSVRC2012_img_train.tar holds 'ILSVRC2012_val_00000001.JPEG', which is no class",
        ),
        ("test split", "ILSVRC2012_img_val.tar holds images of the test split"),
        ("flat without labels", "source/val has its images in no class folders; give --devkit or --val_labels"),
        ("too few labels", "labels.txt has 5 labels,"),
        ("label of no image", "labels.txt has no label for"),
        ("label is no synset", "labels.txt line 2 has no synset"),
        ("both labels", "--val_labels and --devkit both"),
        ("devkit is none", "has no data/meta.mat"),
        ("empty class", "train/n01440764 is a class without images"),
        ("class folder", "train/cats is no class folder such as n01440764"),
        ("classes differ", "lacks 1 classes that the other split has, such as n01440764"),
        ("no source", "--from=DIR_OR_TAR is needed"),
    ],
)
def test_imagenet_mistakes(name, says, tmp_path, capsys):
    code, _, error = run(capsys, "imagenet", *_wrong(name, tmp_path), "--to", tmp_path / "to")
    assert code == 64 and says in error


def test_verify_lists_each_broken_image(tmp_path, capsys):
    good, name = next(iter(TRAIN.values())), "n01440764"
    tree = {
        f"train/{name}/good.JPEG": good,
        f"train/{name}/cut.JPEG": good[:-200],
        f"val/{name}/text.JPEG": b"no image",
    }
    source = write_tree(tmp_path / "source", tree)
    code, out, error = run(capsys, "imagenet", "--from", source, "--to", tmp_path / "to", "--verify")
    assert code == 64 and "2 of 3 images" in error
    lines = out.splitlines()
    assert len(lines) == 2
    assert (
        f"train/{name}/cut.JPEG can't be decoded" in lines[0] and f"val/{name}/text.JPEG can't be decoded" in lines[1]
    )
    code, _, error = run(capsys, "imagenet", "--to", tmp_path / "nowhere", "--verify")
    assert code == 64 and "has no train/ and no val/" in error


# the command line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "DATASET"),
        (["cifar11"], "invalid choice: 'cifar11'"),
        (["cifar10", "--from", "x"], "--to"),
        (["folder", "--from", "x", "--to", "y.npz", "--size", "big"], "--size: invalid int value: 'big'"),
        (["imagenet", "--to", "x", "--verif"], "unrecognized arguments: --verif"),
    ],
)
def test_command_line_mistakes(arguments, says, capsys):
    code, _, error = run(capsys, *arguments)
    assert code == 64 and says in error and "--help" in error


def test_help_is_fast_because_it_imports_little():
    """About 0.1 s; what takes long to import isn't imported (a clock would fail on a busy machine)."""
    code = (
        "import sys; from jaxvision.tools import prepare_data\n"
        "try: prepare_data.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'jax', 'numpy', 'PIL', 'rich', 'scipy'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in prepare_data.COMMANDS)
