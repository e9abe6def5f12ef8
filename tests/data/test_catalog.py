import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxvision.core.errors import ConfigError, DataError
from jaxvision.data import open_source, source_names

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    for split, n in (("train", 6), ("test", 4)):
        np.savez(tmp_path / f"{split}.npz", image=image[:n], label=np.arange(n) % 3)
        with zipfile.ZipFile(tmp_path / f"images_{split}.zip", "w") as archive:
            for i in range(n):
                file = tmp_path / "tree" / split / f"class{i % 2}" / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image[i]).save(file)
                archive.write(file, f"class{i % 2}/{i}.png")
    with zipfile.ZipFile(tmp_path / "both.zip", "w") as archive:
        for file in (tmp_path / "tree").rglob("*.png"):
            archive.write(file, file.relative_to(tmp_path / "tree").as_posix())
    return tmp_path


def fault(kind, name, **options):
    with pytest.raises(kind) as error:
        open_source(name, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_built_in_sets():
    assert len(open_source("digits", split="test")) == 500
    assert open_source("digits", raw=True)[0]["image"].dtype == np.uint8
    assert open_source("digits16")[0]["image"].shape == (16, 16, 1)
    shapes = open_source("shapes", split="test", size=16, n=9, num_classes=3, label_map=True)
    assert len(shapes) == 9 and shapes.num_classes == 3 and shapes[0]["label_map"].shape == (16, 16)
    assert len(open_source("shapes")) == 2000


def test_npz(root):
    assert len(open_source("npz", path=root)) == 6
    assert len(open_source("npz", path=str(root), split="test")) == 4
    assert len(open_source("npz", path=root / "{split}.npz", split="test")) == 4
    assert open_source("npz", path=root).num_classes == 3
    assert open_source("npz", path=root, num_classes=7).num_classes == 7
    assert open_source("cifar10", path=root).num_classes == 10
    assert open_source("cifar100", path=root, split="test").num_classes == 100
    assert "has no val.npz; it has test, train" in fault(DataError, "npz", path=root, split="val")
    assert "is a file; give its folder, or a name with {split}" in fault(DataError, "npz", path=root / "train.npz")
    assert "nowhere doesn't exist" in fault(DataError, "cifar10", path=root / "nowhere")


def test_folder(root):
    sources = [
        open_source("folder", path=root / "tree", split="test"),
        open_source("imagenet", path=root / "tree", split="test"),
        open_source("folder", path=root / "both.zip", split="test"),
        open_source("folder", path=root / "images_{split}.zip", split="test"),
        open_source("folder", path=root / "tree" / "{split}", split="test", ignore=("*.txt",)),
    ]
    (root / "images_test.zip").rename(root / "test.zip")
    sources.append(open_source("folder", path=root, split="test"))
    for source in sources:
        assert source.class_names == ("class0", "class1")
        np.testing.assert_array_equal(source.take(np.arange(4))["image"], sources[0].take(np.arange(4))["image"])
    assert "it has test, train; correct the split" in fault(DataError, "folder", path=root / "tree", split="val")
    assert "has no folder 'val' (it has test, train)" in fault(DataError, "folder", path=root / "both.zip", split="val")
    wrong = fault(DataError, "folder", path=root / "images_train.zip")
    assert "has no folder 'train' (it has class0, class1)" in wrong and "{split}" in wrong
    assert "nowhere doesn't exist" in fault(DataError, "imagenet", path=root / "nowhere")


def test_home_is_expanded(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    assert len(open_source("npz", path="~")) == 6


def test_mistakes(root):
    assert "'cifar1O' is unknown; did you mean 'cifar10'?" in fault(ConfigError, "cifar1O", path=root)
    assert "use one of digits" in fault(ConfigError, "zzzzzz")
    assert "no option 'sise'; it takes n, size, seed" in fault(ConfigError, "shapes", sise=3)
    assert "it takes none" in fault(ConfigError, "digits16", size=3)
    assert "it takes none" in fault(ConfigError, "tfds:mnist", size=3)
    assert "needs a path" in fault(ConfigError, "imagenet")
    assert "reads no files" in fault(ConfigError, "digits", path=root)
    assert "split='val' is unknown for shapes" in fault(ConfigError, "shapes", split="val")
    assert "needs a path" in fault(ConfigError, "voc2012")
    assert "imbalance=0" in fault(ConfigError, "npz", path=root, imbalance=0)
    known = "digits digits16 shapes scenes npz folder cifar10 cifar100 svhn tiny_imagenet cub voc2012 imagenet"
    assert set(known.split()) <= set(source_names())


def test_importing_is_light_and_starts_no_backend():
    code = """
import sys, time
import jax
start = time.perf_counter()
import jaxvision.data
import jaxvision.data.imagenet, jaxvision.data.rand_augment
seconds = time.perf_counter() - start
heavy = {"tensorflow", "tensorflow_datasets", "torch", "grain", "sklearn", "scipy", "flax"} & set(sys.modules)
assert not heavy, heavy
from jax._src import xla_bridge
assert not xla_bridge._backends, "a backend was started"
print(seconds)
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2.0  # 0.1 s on an idle machine; the bound is for a busy one
