import io
import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from jaxvision.core.errors import DataError
from jaxvision.data.folder import FolderSource
from jaxvision.data.sources import Source, stack


def picture(seed, mode="RGB", size=(9, 7)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(seed, kind="PNG", mode="RGB", **options):
    buffer = io.BytesIO()
    picture(seed, mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path):
    """Two classes of different depth, written in an order that isn't the sorted one."""
    root = tmp_path / "train"
    names = ("dog/2.png", "cat b/1.png", "cat/10.jpg", "cat/2.JPEG", "cat/more/1.png", "dog/1.png")
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number, "PNG" if name.endswith("png") else "JPEG"))
    (root / ".DS_Store").write_text("x")
    (root / "cat" / ".hidden.txt").write_text("x")
    (root / "README.md").write_text("outside the class folders, other files don't matter")
    return root


def zipped(root, prefix=""):
    path = root.parent / f"{root.name}{len(prefix)}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*"), reverse=True):
            archive.write(file, prefix + file.relative_to(root).as_posix())
    return path


def fault(path, **options):
    with pytest.raises(DataError) as error:
        FolderSource(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_order_labels_and_pixels(root):
    source = FolderSource(root)
    assert source.class_names == ("cat", "cat b", "dog") and source.num_classes == 3
    # as torchvision's ImageFolder: class by class, folder by folder, plain string order of file names
    assert source.files == ["cat/10.jpg", "cat/2.JPEG", "cat/more/1.png", "cat b/1.png", "dog/1.png", "dog/2.png"]
    np.testing.assert_array_equal(source.labels, [0, 0, 0, 1, 2, 2])
    example = source[5]
    assert example["image"].dtype == np.uint8 and example["label"].dtype == np.int32 and isinstance(source, Source)
    np.testing.assert_array_equal(example["image"], np.asarray(picture(0)))
    assert source.verify() == len(source) == 6


@pytest.mark.parametrize("prefix", ["", "data/train/"])
def test_folder_equals_zip(root, prefix):
    folder, archive = FolderSource(root), FolderSource(zipped(root, prefix), inside=prefix)
    assert folder.files == archive.files and folder.class_names == archive.class_names
    np.testing.assert_array_equal(folder.labels, archive.labels)
    every = np.arange(6)
    a, b = folder.take(every), archive.take(every)
    np.testing.assert_array_equal(a["image"], b["image"])
    stacked = stack([folder[i] for i in range(6)])
    np.testing.assert_array_equal(a["image"], stacked["image"])
    np.testing.assert_array_equal(a["label"], stacked["label"])


def test_every_mode_becomes_rgb(tmp_path):
    modes = {"a/0.png": ("PNG", "L"), "a/1.png": ("PNG", "P"), "b/2.png": ("PNG", "RGBA"), "b/3.jpg": ("JPEG", "CMYK")}
    for number, (name, (kind, mode)) in enumerate(modes.items()):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        options = {"transparency": bytes(range(256))} if mode == "P" else {}
        (tmp_path / name).write_bytes(encoded(number, kind, mode, **options))
    source = FolderSource(tmp_path)
    assert all(source[i]["image"].shape == (7, 9, 3) for i in range(4))
    np.testing.assert_array_equal(source[1]["image"], np.asarray(picture(1, "P").convert("RGB")))


def test_many_threads_read_one_zip(root):
    source = FolderSource(zipped(root))
    expected = [source[i]["image"] for i in range(6)]
    order = np.random.default_rng(0).integers(0, 6, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        for index, example in zip(order, pool.map(source.__getitem__, order)):
            np.testing.assert_array_equal(example["image"], expected[index])


def test_the_zip_is_read_by_one_thread_at_a_time(root, monkeypatch):
    """ZipFile's count of its readers isn't thread-safe; the race is too rare to wait for."""
    source, inside, most = FolderSource(zipped(root)), [], []
    read = source._reader._archive.read

    def watched(name):
        inside.append(name)
        most.append(len(inside))
        time.sleep(0.001)
        inside.remove(name)
        return read(name)

    monkeypatch.setattr(source._reader._archive, "read", watched)
    source.take(np.arange(6).repeat(5))
    assert len(most) == 30 and max(most) == 1


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_damaged_image_is_named_when_read(root, damage, archive):
    jpeg = (root / "cat/10.jpg").read_bytes()
    content = {"truncated": jpeg[: len(jpeg) // 2], "text": b"not an image", "empty": b""}
    (root / "cat/10.jpg").write_bytes(content[damage])
    source = FolderSource(zipped(root) if archive else root)
    assert source[1]["image"].shape == (7, 9, 3)
    with pytest.raises(DataError) as error:
        source[0]
    assert "cat/10.jpg" in str(error.value) and "replace it or remove it" in str(error.value)
    assert "\n" not in str(error.value) and "BytesIO" not in str(error.value)
    (root / "dog/1.png").write_bytes((root / "dog/1.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"2 of 6 images are damaged, first: .*cat/10.jpg"):
        FolderSource(root).verify()


def test_damage_inside_a_zip(root):
    path = zipped(root)
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("cat/10.jpg").header_offset
    content = bytearray(path.read_bytes())
    content[offset + 60] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train0.zip:cat/10.jpg can't be (read|decoded)"):
        FolderSource(path)[0]
    path.write_bytes(content[:200])
    assert "train0.zip is no readable zip" in fault(path)


def test_missing_and_vanished(root):
    assert "nowhere doesn't exist" in fault(root / "nowhere")
    source = FolderSource(root)
    (root / "cat/10.jpg").unlink()
    with pytest.raises(DataError, match=r"cat/10.jpg can't be read \(No such file"):
        source[0]


def test_no_classes(root, tmp_path):
    (tmp_path / "none").mkdir()
    assert "has no class folders" in fault(tmp_path / "none")
    (tmp_path / "none/1.png").write_bytes(encoded(0))
    assert "none/1.png lies outside a class folder" in fault(tmp_path / "none")


def test_empty_class(root):
    (root / "ant").mkdir()
    for path in (root, zipped(root)):
        assert "ant is a class folder without images" in fault(path)
    (root / "ant/deeper").mkdir()
    assert "ant is a class folder without images" in fault(root)


def test_other_files_in_a_class(root):
    (root / "cat/boxes.txt").write_text("1 2 3")
    for path in (root, zipped(root)):
        assert "cat/boxes.txt is not an image" in fault(path)
        assert len(FolderSource(path, ignore=("*.txt",))) == 6


def test_one_class_twice(root):
    (root / "Cat").mkdir()
    (root / "Cat/1.png").write_bytes(encoded(0))
    if len(os.listdir(root)) == 6:  # a file system that tells the case of letters
        assert "'Cat' and 'cat'" in fault(root)
    with zipfile.ZipFile(root.parent / "twice.zip", "w") as archive:
        for name in ("cat/1.png", "CAT/1.png"):
            archive.writestr(name, encoded(0))
    assert "'CAT' and 'cat'" in fault(root.parent / "twice.zip")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(root.parent / "same.zip", "w") as archive:
        for name in ("cat/1.png", "dog/1.png", "cat/1.png"):
            archive.writestr(name, encoded(0))
    assert "cat/1.png is in the archive twice" in fault(root.parent / "same.zip")


def test_a_wrapper_around_the_class_folders(root):
    (root / "README.md").unlink()
    assert "looks like a wrapper" in fault(root.parent)
    path = zipped(root, "wrapped/")
    assert "inside='wrapped'" in fault(path)
    assert len(FolderSource(path, inside="wrapped")) == 6
    assert "has no folder 'test' (it has wrapped)" in fault(path, inside="test")
